"""When a search stops composing before its strategy has said all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Literal, TypeVar

from lightning_stitch.errors import StitchError

Stopped = Literal["time limit", "interrupted"]
_Proposal = TypeVar("_Proposal")


class TimeIsOver(Exception):
    """A search has come to the end of its time; it goes on to ranking."""


class TimeLimit:
    """Some seconds from now on, a positive number (else a StitchError); None: no limit."""

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None and not seconds > 0:
            raise StitchError(f"time_limit is a positive number of seconds, or None; found {seconds}.")
        self._end = None if seconds is None else time.perf_counter() + seconds

    def check(self) -> None:
        """Raise TimeIsOver when they are over."""
        if self._end is not None and time.perf_counter() >= self._end:
            raise TimeIsOver


NO_LIMIT = TimeLimit(None)


def until_stopped(proposals: Iterator[_Proposal], taken: list[_Proposal]) -> Stopped | None:
    """Take proposals until there are no more (None), the time is over or Ctrl-C is pressed, and say which."""
    try:
        for proposal in proposals:
            taken.append(proposal)
    except TimeIsOver:
        return "time limit"
    except KeyboardInterrupt:
        return "interrupted"
    return None
