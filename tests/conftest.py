from __future__ import annotations

import pytest
from clock_double import CLOCK, Clock

from lightning_stitch import latency


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What latencies are measured by, instead of the real time."""
    CLOCK.reset()
    monkeypatch.setattr(latency, "time", CLOCK)
    return CLOCK
