"""Files that are either there in full or not there at all: written under another name, and renamed when complete.

A download may leave what is neither: a pointer to a file, or a page of words about it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from lightning_stitch.errors import SourceError, StitchError

UNFINISHED = ".unfinished"
WRITING_MEND = "Make room or get the right to write there, or name another place; what was there is as it was."
_POINTERS = {b"version https://git-lfs": ("Git LFS", "git lfs pull"), b"# xet version": ("Xet", "git xet checkout")}
_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")


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


def check_content(path: Path) -> None:
    """Refuse (SourceError) a file that is there in place of the one that was meant: a pointer, a page, or nothing."""
    with path.open("rb") as file:
        start = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for sign, (tool, command) in _POINTERS.items():
        if start.startswith(sign):
            raise SourceError(
                f"{path} is a {tool} pointer, a few lines that stand for the file. Fetch the file itself: `{command}` "
                f"in its folder, or download it from its page."
            )
    if start.startswith(_PAGES):
        raise SourceError(
            f"{path} is a web page (HTML or XML), not the file: a login, an error or the page about it was downloaded. "
            f"Delete it and download the file from its own address."
        )
    if not start:
        raise SourceError(f"{path} is empty: its download broke off. Delete it and download it again.")
