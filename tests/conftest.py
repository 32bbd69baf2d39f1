from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from clock_double import CLOCK, Clock

from lightning_stitch import latency


@pytest.fixture(scope="session", autouse=True)
def heeded_ctrl_c() -> Iterator[None]:
    """Ctrl-C as Python delivers it, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What latencies are measured by, instead of the real time."""
    CLOCK.reset()
    monkeypatch.setattr(latency, "time", CLOCK)
    return CLOCK
