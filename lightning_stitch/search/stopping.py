"""When a search stops composing before its strategy has said all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, TypeVar

from lightning_stitch.errors import StitchError

Stopped = Literal["time limit", "interrupted"]
_Given = TypeVar("_Given")


class TimeIsOver(Exception):
    """A search has come to the end of its time; it goes on to ranking."""


class TimeLimit:
    """Seconds from now on.

    Args:
        seconds: How many; None: no limit.

    Raises:
        StitchError: If they are not positive.
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds > 0:
            raise StitchError(f"time_limit is a positive number of seconds, or None; found {seconds}.")
        self._end = None if seconds is None else time.perf_counter() + seconds

    def check(self) -> None:
        """Raise TimeIsOver when they are over."""
        if self._end is not None and time.perf_counter() >= self._end:
            raise TimeIsOver


NO_LIMIT = TimeLimit(None)


def until_stopped(given: Iterator[_Given], into: list[_Given]) -> Stopped | None:
    """Take what comes until there is no more, the time is over or Ctrl-C is pressed; says which of the last two.

    Args:
        given: What to take from.
        into: Where to put it.
    """
    try:
        for one in given:
            into.append(one)
    except TimeIsOver:
        return "time limit"
    except KeyboardInterrupt:
        return "interrupted"
    return None
