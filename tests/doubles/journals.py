"""What lies in a search's journal."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path


@contextmanager
def opened(journal: Path) -> Iterator[sqlite3.Connection]:
    """The database, to be looked at or spoilt."""
    with closing(sqlite3.connect(journal / "journal.sqlite")) as database, database:
        yield database


def answers(journal: Path) -> list[tuple[str, str, str]]:
    """What was recorded, in its order: the question's key, its kind and the value."""
    with opened(journal) as database:
        return list(database.execute("SELECT key, kind, value FROM answers ORDER BY rowid"))
