"""A search's journal: the answers that cost something to find, kept on disk so that a stopped search can go on.

A search is deterministic, so what it remembers is not where its strategy stood but what it was answered: the CKAs of
one cut of one running network, one fitted stitch, the features that candidates gave of one batch, a measured latency.
A search that goes on runs its strategy anew and asks the same questions; only where the journal ends is anything
computed. Any strategy can be gone on with like this. What it ends with is what it would have ended with uninterrupted,
bit for bit on the same kind of machine with as many threads.

answers.jsonl holds one record a line, each with a checksum of its own, written by one call of the operating system:
when the process is killed at any moment, no answer that was recorded is lost, and a line that was cut short is dropped.
The tensors of an answer lie in a file of their own under tensors/ (safetensors), which is there before its record is.
Files are not forced to the disk: after a loss of power what is missing or damaged is found by its checksum and computed
anew.
"""

from __future__ import annotations

import json
import os
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

import dataclasses

from lightning_stitch.cost import Budget
from lightning_stitch.errors import JournalError
from lightning_stitch.io import UNFINISHED, TensorFile, differences, in_words, key_of, plain, versions, write_tensors
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import Segmented, settings_identity, source_identity

SCHEMA_VERSION = 1
_RECORDS, _TENSORS, _CALIBRATION = "answers.jsonl", "tensors", "calibration"


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found.

    Attributes:
        value: Plain JSON values; floats come back bit for bit.
        tensors: Tensors by name, on the CPU when they were read.
    """

    value: Any
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Answers(Protocol):
    """What remembers answers."""

    def find(self, question: Sequence[Any]) -> list[Answer]:
        """All that was recorded as an answer to a question, in that order."""

    def record(self, question: Sequence[Any], answer: Answer) -> None:
        """Remember an answer; a question may have several."""

    def agree(self, entries: Mapping[str, Any]) -> None:
        """Remember what the search depends on, or find it unchanged."""


class NoJournal:
    """Remembers nothing."""

    def find(self, question: Sequence[Any]) -> list[Answer]:
        """Nothing."""
        return []

    def record(self, question: Sequence[Any], answer: Answer) -> None:
        """Remember nothing."""

    def agree(self, entries: Mapping[str, Any]) -> None:
        """Any search will do."""


class Journal:
    """Remembers answers in a directory; made where there is none yet.

    Args:
        directory: The directory, of one search alone.

    Raises:
        JournalError: If it cannot be read or written to, or a newer version wrote it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._entries: dict[str, Any] = {}
        self._answers: dict[str, list[dict[str, Any]]] = {}
        try:
            (self.directory / _TENSORS).mkdir(parents=True, exist_ok=True)
            self._lock()
            for left in (self.directory / _TENSORS).glob(f"*{UNFINISHED}"):
                left.unlink()
            end = self._read()
            with (self.directory / _RECORDS).open("ab") as file:
                # Behind a line that was cut short the next one would be lost, too.
                if file.tell() > end:
                    file.truncate(end)
        except OSError as error:
            raise self._unwritable(error) from error
        schema = self._entries.get("schema", SCHEMA_VERSION)
        if schema != SCHEMA_VERSION:
            raise JournalError(
                f"The journal in {self.directory} has schema {schema!r}; this version of lightning_stitch reads schema "
                f"{SCHEMA_VERSION}. Upgrade lightning_stitch if it is newer, or name another directory."
            )
        self.agree({"schema": SCHEMA_VERSION})

    @property
    def calibration(self) -> Path:
        """Where the search's calibration is saved."""
        return self.directory / _CALIBRATION

    def find(self, question: Sequence[Any]) -> list[Answer]:
        """All that was recorded as an answer to a question, in that order; damaged ones are left out.

        Args:
            question: Plain values.
        """
        found = []
        for record in self._answers.get(key_of(*question), []):
            tensors: dict[str, Tensor] = {}
            if "tensors" in record:
                try:
                    file = TensorFile(self.directory / _TENSORS / str(record["file"]), record["tensors"])
                except (OSError, ValueError):
                    continue
                tensors = {name: file.read(name) for name in file.names}
            found.append(Answer(record["value"], tensors))
        return found

    def record(self, question: Sequence[Any], answer: Answer) -> None:
        """Remember an answer; it is safe from the process being killed when this returns.

        Args:
            question: Plain values.
            answer: One answer to it.

        Raises:
            JournalError: If it cannot be written.
        """
        key = key_of(*question)
        earlier = self._answers.setdefault(key, [])
        record = {"question": key, "kind": question[0], "value": plain(answer.value)}
        if answer.tensors:
            record["file"] = f"{key}.{len(earlier)}.safetensors"
            path = self.directory / _TENSORS / record["file"]
            try:
                record["tensors"] = write_tensors(
                    path, {name: partial(torch.Tensor.detach, x) for name, x in answer.tensors.items()}
                )
            except OSError as error:
                raise self._unwritable(error) from error
        self._append(record)
        earlier.append(record)

    def agree(self, entries: Mapping[str, Any]) -> None:
        """Remember what the search depends on, or find it unchanged.

        Args:
            entries: Plain values by name.

        Raises:
            JournalError: If the journal is of another search; what differs is named.
        """
        here = dict(plain(entries))
        there = {name: self._entries[name] for name in here if name in self._entries}
        if found := differences(there, {name: here[name] for name in there}):
            raise JournalError(
                f"The journal in {self.directory} is of another search: {in_words(found)}. Search with what it was "
                f"begun with, or name another directory."
            )
        new = {name: value for name, value in here.items() if name not in there}
        if new:
            self._append({"entries": new})
            self._entries.update(new)

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({"crc32": zlib.crc32(_text(record)), "record": record}).encode() + b"\n"
        try:
            # One unbuffered write: Ctrl-C comes before it or after it.
            with (self.directory / _RECORDS).open("ab", buffering=0) as file:
                written = file.write(line)
        except OSError as error:
            raise self._unwritable(error) from error
        if written != len(line):
            raise self._unwritable("No space left on device")

    def _read(self) -> int:
        """Take up all whole records; gives where the last of them ends."""
        path, end = self.directory / _RECORDS, 0
        if not path.exists():
            return end
        with path.open("rb") as file:
            for line in file:
                record = _record(line)
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                if record is None:
                    continue
                if "entries" in record:
                    self._entries.update(record["entries"])
                else:
                    self._answers.setdefault(record["question"], []).append(record)
        return end

    def _lock(self) -> None:
        """Keep other processes out, where the system can; it lets them in when this one is gone, however it went."""
        if fcntl is None:
            return
        lock = (self.directory / "lock").open("w")
        weakref.finalize(self, lock.close)
        try:
            # Of this process alone: a lock that its children share would outlive it.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(
                f"The journal in {self.directory} is in use by another process. Wait for it, or name another directory."
            ) from None

    def _unwritable(self, error: object) -> JournalError:
        return JournalError(
            f"The journal in {self.directory} cannot be written: {error}. Make room or name another directory; what it "
            f"holds already is good."
        )


def _text(record: Any) -> bytes:
    return json.dumps(record, sort_keys=True).encode()


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line holds; None where it is damaged."""
    try:
        found = json.loads(line)
        record = found["record"]
        return dict(record) if found["crc32"] == zlib.crc32(_text(record)) else None
    except (ValueError, KeyError, TypeError):
        return None


def answered(journal: Answers, question: Sequence[Any], compute: Callable[[], Answer]) -> Answer:
    """The journal's answer to a question, else the one that is computed, which is then recorded.

    Args:
        journal: What remembers answers.
        question: Plain values.
        compute: Finds the answer.
    """
    found = journal.find(question)
    if found:
        return found[0]
    answer = compute()
    journal.record(question, answer)
    return answer


def search_identity(
    parts: Sequence[Segmented],
    settings: CalibrationSettings,
    strategy: object,
    budget: Budget,
    device: torch.device,
    *,
    ridge: float,
    bias: bool,
) -> dict[str, Any]:
    """All that decides what a search finds, but for the images.

    A strategy of this package is known by its arguments, a user's own by its name, as it may not say more.
    """
    ours = type(strategy).__module__.startswith("lightning_stitch.")
    name = getattr(strategy, "__qualname__", type(strategy).__qualname__)
    return {
        "versions": versions("lightning_stitch", "torch"),
        "device": device.type,
        "image_shape": parts[0].image_shape,
        "settings": settings_identity(settings),
        "order": [part.name for part in parts],
        "sources": {part.name: source_identity(part) for part in parts},
        "strategy": repr(strategy) if ours else name,
        "budget": dataclasses.asdict(budget),
        "ridge": ridge,
        "bias": bias,
    }
