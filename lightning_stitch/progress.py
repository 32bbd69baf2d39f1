"""What a search says: messages, progress (one bar at a time, or none), and what each stage took."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

_Step = TypeVar("_Step")


class Progress(Protocol):
    """Where a search shows how far it is."""

    def start(self, stage: str, total: int | None) -> None:
        """Begin a stage of so many steps; None: unknown."""

    def advance(self, steps: int) -> None:
        """Some steps of the stage are done."""


def num_images(batches: Iterable[Any]) -> int | None:
    """How many images a loader will give; None where it cannot tell."""
    try:
        return len(batches.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        # No loader, or one of a stream.
        return None


def counted(steps: Iterable[_Step], progress: Progress) -> Iterator[_Step]:
    """The same, each told to a progress when it is done with."""
    for step in steps:
        yield step
        progress.advance(1)


@contextmanager
def timed(seconds: dict[str, float], stage: str, peaks: dict[str, int] | None = None) -> Iterator[None]:
    """Add the wall time of what is done inside to a stage's seconds, and note the memory that the process had by then.

    That is the most that it ever held, in bytes; where the system does not tell, nothing is noted.
    """
    begun = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - begun
    if peaks is not None and find_spec("resource") is not None:
        resource = import_module("resource")
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks[stage] = most if sys.platform == "darwin" else 1024 * most


class _Stdout(logging.StreamHandler):
    """Writes to what is the standard output when it writes."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """The standard output."""
        return sys.stdout


def say(words: str) -> None:
    """Say something through the logger "lightning_stitch": to the standard output, unless that has another handler."""
    logger = logging.getLogger("lightning_stitch")
    if not logger.handlers:
        logger.addHandler(_Stdout())
        logger.propagate = False
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
    logger.info("%s", words)


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing to put back."""

    def start(self, stage: str, total: int | None) -> None:
        """Show nothing."""

    def advance(self, steps: int) -> None:
        """Show nothing."""


class Bar:
    """A rich progress bar for each stage; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()
        self._bars.stop()

    def start(self, stage: str, total: int | None) -> None:
        """Begin a stage; the one before is taken to be done."""
        self._finish()
        self._task = self._bars.add_task(stage, total=total)

    def advance(self, steps: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._bars.advance(self._task, steps)

    def _finish(self) -> None:
        if self._task is not None:
            done = self._bars.tasks[-1].completed
            self._bars.update(self._task, total=done, completed=done)
