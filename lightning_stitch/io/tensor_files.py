"""Files that are either there in full or not there at all: written under another name, and renamed when complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lightning_stitch.errors import StitchError

UNFINISHED = ".unfinished"
WRITING_MEND = "Make room or get the right to write there, or name another place; what was there is as it was."


@contextmanager
def complete_or_absent(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that gets its name when all is written.

    Raises:
        StitchError: If it cannot be written; what had its name before is left as it was.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
        os.replace(unfinished, path)
    except OSError as error:
        raise StitchError(f"{path} cannot be written: {error.strerror or error}. {WRITING_MEND}") from error
    finally:
        # On a disk that cannot be written to there is nothing to take away either.
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write plain JSON values."""
    with complete_or_absent(path) as file:
        file.write(json.dumps(value, indent=1).encode())
