"""Networks that take as long as a test says, by a clock that nothing else moves."""

from __future__ import annotations

from collections.abc import Sequence

from doubles.small_sources import live, shake
from torch import Tensor, nn

from lightning_stitch.sources.source import Source


class Clock:
    """Seconds that pass when a `Takes` runs, and at each look if the test says so."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set it to zero, and forget what ran last."""
        self.now, self.each_look, self.last = 0.0, 0.0, ""

    def perf_counter(self) -> float:
        self.now += self.each_look
        return self.now


CLOCK = Clock()


class Takes(nn.Module):
    """Hands on what it gets and takes some milliseconds; more where one of another network ran before it."""

    traced_whole = True

    def __init__(self, network: str, milliseconds: float, *, cold: float = 0.0) -> None:
        super().__init__()
        self.network, self.milliseconds, self.cold = network, milliseconds, cold

    def forward(self, x: Tensor) -> Tensor:
        CLOCK.now += (self.milliseconds + (0 if CLOCK.last == self.network else self.cold)) / 1000
        CLOCK.last = self.network
        return x


def timed(
    name: str, widths: Sequence[int], milliseconds: Sequence[float], *, seed: int = 0, cold: float = 0.0
) -> Source:
    """`doubles.small_sources.plain` with a `Takes` at the end of each block."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride, takes in zip((3, *widths), widths, (1, 2, 1), milliseconds, strict=False):
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        layers.append(nn.Sequential(conv, nn.ReLU(), Takes(name, takes, cold=cold)))
    layers[-1] = nn.Sequential(*layers[-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return live(shake(nn.Sequential(*layers, nn.Linear(widths[-1], 4)), seed), name)
