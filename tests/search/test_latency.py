from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from doubles.clock import Clock, timed
from torch import Tensor, nn

from lightning_stitch.search.latency import RUNS, WARM_UP, latency_per_image, network_latency, piece_latencies
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.segments import segment

CPU = torch.device("cpu")


class Scripted(nn.Module):
    """Takes the milliseconds that are written, run after run."""

    def __init__(self, clock: Clock, milliseconds: list[float]) -> None:
        super().__init__()
        self.clock, self.milliseconds = clock, milliseconds
        self.runs: list[tuple[tuple[int, ...], bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.milliseconds[len(self.runs)] / 1000
        self.runs.append((tuple(x.shape), torch.is_inference_mode_enabled()))
        return x


def test_a_latency_is_the_median_of_runs_of_one_image_behind_those_that_warm_up(clock: Clock) -> None:
    counted = [5.0, 80.0, 4.0, 3.0, 7.0, 1.0, 60.0, 6.0, 2.0]
    assert len(counted) == RUNS
    network, before = Scripted(clock, [900.0] * WARM_UP + counted), torch.get_rng_state()
    assert network_latency(network, (3, 5, 7), CPU) == pytest.approx(5.0)
    assert network.runs == [((1, 3, 5, 7), True)] * (WARM_UP + RUNS)
    assert torch.equal(torch.get_rng_state(), before)


def test_in_batches_an_image_takes_its_share_of_all_batches_once_the_first_has_warmed_up(clock: Clock) -> None:
    network = Scripted(clock, [900.0, 5.0, 7.0, 3.0])
    assert latency_per_image(network, torch.rand(10, 3, 4, 4), batch_size=4) == pytest.approx(1.5)
    assert [shape[0] for shape, _ in network.runs] == [4, 4, 4, 2]
    assert all(inference for _, inference in network.runs)


def test_an_accelerator_is_waited_for_before_each_look_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            events.append(f"run on {x.device}")
            return x

    # A device that computes nothing stands for one that computes on its own.
    device = SimpleNamespace(synchronize=lambda: events.append("wait"))
    monkeypatch.setattr(torch, "meta", device, raising=False)
    clock = SimpleNamespace(perf_counter=lambda: events.append("look") or 0.0)
    monkeypatch.setattr("lightning_stitch.search.latency.time", clock)
    assert network_latency(Noting(), (3, 4, 4), torch.device("meta")) == 0
    assert events == ["wait", "look", "run on meta", "wait", "look"] * (WARM_UP + RUNS)


@pytest.mark.parametrize("until", ["features", "output"])
def test_pieces_take_their_share_of_what_the_whole_source_takes(clock: Clock, until: str) -> None:
    sources = [timed("a", (4, 5, 6), (3, 1, 2)), timed("b", (4, 5, 6), (0.5, 0.25, 4))]
    parts = [segment(source, CalibrationSettings(until=until), (3, 8, 8)) for source in sources]
    ends = [0.0] if until == "output" else []
    found = piece_latencies(parts, CPU)
    assert found == [pytest.approx([3, 1, 2, *ends]), pytest.approx([0.5, 0.25, 4, *ends])]

    # Each look at the clock takes time, as a call of a piece does: the whole has one, each piece has another.
    clock.each_look = 0.001
    found = piece_latencies(parts, CPU)
    assert [sum(times) for times in found] == pytest.approx([7, 5.75])
    assert found[0][:3] == pytest.approx([7 * (takes + 1) / (6 + 3 + len(ends)) for takes in (3, 1, 2)])
