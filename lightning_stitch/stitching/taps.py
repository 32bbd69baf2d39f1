"""Taps: what a composition reads of the activations that it passes, and composes a head's features of.

Of a map (NCHW or NHWC) each channel's mean and standard deviation over the positions are read; of tokens the same over
the patch tokens, and the class and register tokens as they are; a vector as it is. Nothing of an activation is kept but
that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_stitch.cutting import Cut
from lightning_stitch.recipe import Format, Statistic, Tap

_POSITIONS: dict[Format, tuple[int, ...]] = {"NCHW": (2, 3), "NHWC": (1, 2), "tokens": (1,)}
_EPSILON = 1e-12  # so that the gradient of a standard deviation of 0 is finite


def statistics_of(cut: Cut) -> tuple[Statistic, ...]:
    """What is read of a cut by default: mean and standard deviation over positions where there are several, prefix."""
    if cut.grid is None:
        return ()
    spread: tuple[Statistic, ...] = ("std",) if math.prod(cut.grid) > 1 else ()
    prefix: tuple[Statistic, ...] = ("prefix",) if cut.num_prefix_tokens else ()
    return ("mean", *spread, *prefix)


def tap_at(cut: Cut, fragment: int, statistics: tuple[Statistic, ...]) -> Tap:
    """The tap that reads these statistics of a cut, at the end of a fragment; of none, a vector as it is."""
    return Tap(fragment, cut.channels, statistics, cut.num_prefix_tokens if "prefix" in statistics else 0)


class Reading(nn.Module):
    """Statistics of a cut's activation over its positions, side by side (batch, `Tap.num_features`).

    Args:
        cut: The cut; None: a source's end, which gives a vector.
        statistics: "mean", "std" and "prefix", in the order in which they are given; none: a vector, as it is.
    """

    traced_whole = True

    def __init__(self, cut: Cut | None, statistics: tuple[Statistic, ...]) -> None:
        super().__init__()
        self.format: Format = "vector" if cut is None else cut.format
        self.num_prefix_tokens = 0 if cut is None else cut.num_prefix_tokens
        self.statistics = statistics

    def forward(self, x: Tensor) -> Tensor:
        """The statistics of each image's activation."""
        if not self.statistics:
            return x
        prefix = x[:, : self.num_prefix_tokens].flatten(1) if "prefix" in self.statistics else None
        if self.format == "tokens":
            x = x[:, self.num_prefix_tokens :]
        positions = _POSITIONS[self.format]
        vectors: list[Tensor] = []
        if "std" in self.statistics:
            # torch.var_mean takes ten times as long on a CPU.
            mean = x.mean(positions, keepdim=True)
            variance = (x - mean).square().mean(positions)
            by_name = {"mean": mean.flatten(1), "std": (variance + _EPSILON).sqrt(), "prefix": prefix}
        else:
            by_name = {"mean": x.mean(positions), "prefix": prefix}
        for statistic in self.statistics:
            vector = by_name[statistic]
            assert vector is not None
            vectors.append(vector)
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)

    def extra_repr(self) -> str:
        """One line for print(network)."""
        return f"{self.format}, {' and '.join(self.statistics) or 'as it is'}"
