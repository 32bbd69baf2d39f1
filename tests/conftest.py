from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from doubles.clock import CLOCK, Clock
from doubles.hub import HubDouble
from doubles.hub_server import point_client_at, serve_hub

from lightning_stitch.report import page
from lightning_stitch.search import latency

# One thread a process: pytest-xdist gives each core a worker, and processes that tests start are given no core at all.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def heeded_ctrl_c() -> Iterator[None]:
    """Ctrl-C as Python delivers it, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def undrawn_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of searches without figures, which take half a second each, but where a test is marked `figures`."""
    if request.node.get_closest_marker("figures") is None:
        monkeypatch.setattr(page, "can_draw", lambda: False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What latencies are measured by, instead of the real time."""
    CLOCK.reset()
    monkeypatch.setattr(latency, "time", CLOCK)
    return CLOCK


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local-dir source with random weights, a licence and five classes."""
    path = tmp_path / "my_resnet"
    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=5).eval()
    model.pretrained_cfg["license"] = "mit"
    timm.models.save_for_hf(model, str(path), safe_serialization=True)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubDouble]:
    """A loopback hub that the client of this process talks to, with an empty cache."""
    with serve_hub() as double:
        point_client_at(double, monkeypatch, str(tmp_path / "cache"))
        yield double
