"""A search's journal: the answers that cost something to find, kept on disk so that a stopped search can go on.

A search is deterministic, so the journal keeps what it was answered (CKAs, fitted stitches, features, latencies), not
where its strategy stood. A search that goes on runs its strategy anew and asks the same questions; only where the
journal ends is anything computed. The result is that of an uninterrupted search, bit for bit on the same kind of
machine with as many threads.

journal.sqlite holds values as JSON and tensors as safetensors. One process at a time uses it. Each answer is written in
a transaction, so that a killed process loses none that was recorded and leaves none in part. What was damaged on the
disk is found by its checksum and computed anew.
"""

from __future__ import annotations

import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import OutOfMemoryError, Tensor

from lightning_stitch.errors import JournalError, first_lines
from lightning_stitch.io.fingerprints import differences, in_words, key_of, plain
from lightning_stitch.plain_values import has_type

SCHEMA_VERSION = 1
_DATABASE = "journal.sqlite"
_TABLES = """
    PRAGMA locking_mode = EXCLUSIVE;
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    BEGIN EXCLUSIVE;
    CREATE TABLE IF NOT EXISTS entries (name TEXT PRIMARY KEY, value TEXT);
    CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, kind TEXT, value TEXT, checksum INTEGER);
    CREATE TABLE IF NOT EXISTS tensors (key TEXT, name TEXT, content BLOB, PRIMARY KEY (key, name));
    COMMIT;
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a question of a search: plain JSON values, whose floats come back bit for bit, and tensors by name.

    Tuples come back as lists, tensors on the CPU.
    """

    value: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Answers:
    """Answers questions by computing; remembers nothing, nor has a directory for a search's `calibration`."""

    calibration: Path | None = None

    def recall(self, question: Sequence[Any], compute: Callable[[], Answer], hint: Any) -> Answer:
        """The answer to one question (its kind in a word, and plain values), computed where it is not remembered.

        `hint` is the type of the answer's value, lists standing for tuples.
        """
        return self.recall_all([question], lambda missing: [compute()], hint)[0]

    def recall_all(
        self, questions: Sequence[Sequence[Any]], compute: Callable[[Sequence[int]], Sequence[Answer]], hint: Any
    ) -> list[Answer]:
        """The answers to several questions; `compute` gets the places of those that are not remembered, together."""
        return list(compute(range(len(questions))))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What is done here with an answer's tensors fails only where they are not those that were recorded."""
        yield

    def agree(self, entries: Mapping[str, Any]) -> None:
        """Remember what the search depends on, plain values by name, or find it unchanged."""

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *error: BaseException | type[BaseException] | TracebackType | None) -> None:
        """Let others have it."""


class Journal(Answers):
    """Remembers answers in a directory, made where there is none yet; leave it (`with`) to let others have it.

    Args:
        directory: The directory, of one search alone.

    Raises:
        JournalError: If it cannot be read or written to, is damaged or in use, or a newer version wrote it. Every
            method raises it likewise.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.calibration = self.directory / "calibration"
        with self._errors_in_words():
            self.directory.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.directory / _DATABASE, timeout=0)
            try:
                self._open()
            except BaseException:
                self._database.close()
                raise

    def __exit__(self, *error: BaseException | type[BaseException] | TracebackType | None) -> None:
        """Let other processes have it."""
        self._database.close()

    def recall_all(
        self, questions: Sequence[Sequence[Any]], compute: Callable[[Sequence[int]], Sequence[Answer]], hint: Any
    ) -> list[Answer]:
        """As in `Answers`; those that were computed are recorded."""
        keys = [key_of(*question) for question in questions]
        with self._errors_in_words():
            answers = {key: answer for key in dict.fromkeys(keys) if (answer := self._find(key, hint)) is not None}
        missing = [place for place, key in enumerate(keys) if key not in answers]
        if missing:
            computed = compute(missing)
            with self._errors_in_words(), self._database:
                for place, answer in zip(missing, computed, strict=True):
                    self._record(keys[place], questions[place][0], answer)
                    answers[keys[place]] = answer
        return [answers[key] for key in keys]

    @contextmanager
    def reading(self) -> Iterator[None]:
        """As in `Answers`; there it is damage."""
        try:
            yield
        except OutOfMemoryError:
            raise
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError) as error:
            raise self._damage(first_lines(error)) from error

    def agree(self, entries: Mapping[str, Any]) -> None:
        """As in `Answers`.

        Raises:
            JournalError: If the journal is of another search; what differs is named.
        """
        here = plain(entries)
        with self._errors_in_words():
            remembered = {name: json.loads(x) for name, x in self._database.execute("SELECT * FROM entries")}
        both = [name for name in here if name in remembered]
        if changes := differences({name: remembered[name] for name in both}, {name: here[name] for name in both}):
            raise JournalError(
                f"The journal in {self.directory} is of another search: {in_words(changes)}. Search with what it was "
                f"begun with, or name another directory."
            )
        new = [(name, json.dumps(value)) for name, value in here.items() if name not in both]
        with self._errors_in_words(), self._database:
            self._database.executemany("INSERT INTO entries VALUES (?, ?)", new)

    def _open(self) -> None:
        """Take the database, with no other process in it from here on, and see that it can be written to."""
        self._database.executescript(_TABLES)
        [(schema,)] = self._database.execute("PRAGMA user_version")
        if schema not in (0, SCHEMA_VERSION):
            raise JournalError(
                f"The journal in {self.directory} has schema {schema}; this version of lightning_stitch reads schema "
                f"{SCHEMA_VERSION}. Upgrade lightning_stitch if it is newer, or name another directory."
            )
        if schema == 0:
            self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _find(self, key: str, hint: Any) -> Answer | None:
        """What was recorded; None where nothing was, or it is damaged."""
        row = self._database.execute("SELECT value, checksum FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        query = "SELECT content FROM tensors WHERE key = ? ORDER BY name"
        contents = [content for (content,) in self._database.execute(query, (key,))]
        value, checksum = row
        if _checksum(value, contents) != checksum:
            return None
        plain_value = json.loads(value)
        if not has_type(plain_value, hint):
            raise TypeError(f"an answer is {value[:80]}")
        return Answer(plain_value, {name: x for content in contents for name, x in load(content).items()})

    def _record(self, key: str, kind: str, answer: Answer) -> None:
        value = json.dumps(answer.value)
        # One by one: a database takes no more than 10^9 bytes in a piece, and safetensors no two of one memory.
        contents = {name: save({name: x.detach().contiguous()}) for name, x in sorted(answer.tensors.items())}
        row = (key, kind, value, _checksum(value, contents.values()))
        self._database.execute("DELETE FROM tensors WHERE key = ?", (key,))
        self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?)", row)
        rows = [(key, name, content) for name, content in contents.items()]
        self._database.executemany("INSERT INTO tensors VALUES (?, ?, ?)", rows)

    @contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.OperationalError, sqlite3.DataError) as error:
            if "locked" in str(error):
                raise JournalError(
                    f"The journal in {self.directory} is in use, by this process or another. Wait for it, or name "
                    f"another directory."
                ) from error
            raise JournalError(
                f"The journal in {self.directory} cannot be written: {error}. Make room or name another directory; "
                f"what it holds already is good."
            ) from error
        except (sqlite3.DatabaseError, SafetensorError, ValueError, TypeError, AttributeError) as error:
            # The last three are of columns that hold other types than those written.
            raise self._damage(str(error)) from error

    def _damage(self, words: str) -> JournalError:
        return JournalError(
            f"The journal in {self.directory} is damaged: {words}. Delete it, or name another directory."
        )


def _checksum(value: str, contents: Iterable[bytes]) -> int:
    checksum = zlib.crc32(value.encode())
    for content in contents:
        checksum = zlib.crc32(content, checksum)
    return checksum
