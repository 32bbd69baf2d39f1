"""Recipes with stages, and a pool in which a search finds networks that have some."""

from __future__ import annotations

from collections.abc import Sequence

from doubles.small_sources import live
from doubles.two_colours import OneColour

from lightning_stitch import Pool
from lightning_stitch.recipe import FragmentRef, Preprocessing, Recipe, SourceRef, Tap
from lightning_stitch.stages import OperatingPoint, Stages


def recipe_of_stages(widths: Sequence[int], *, goes_on: Sequence[tuple[float, ...]], point: int) -> Recipe:
    """A chain whose every fragment ends at a vector of some width, which is a stage."""
    source = SourceRef("a", "timm:a", "timm", "a", "sha256:0", Preprocessing((3, 8, 8), (0.0,) * 3, (1.0,) * 3))
    ends = [f"cut{number}" for number in range(len(widths))]
    fragments = tuple(
        FragmentRef("a", start, end, parent)
        for start, end, parent in zip((None, *ends), ends, (None, *range(len(ends))), strict=False)
    )
    stages = Stages(
        taps=tuple(range(1, len(widths) + 1)),
        macs=tuple(10 * (number + 1) for number in range(len(widths))),
        points=tuple(OperatingPoint(shares, 10.0 * (1 + sum(shares))) for shares in goes_on),
        point=point,
    )
    taps = tuple(Tap(number, width) for number, width in enumerate(widths))
    return Recipe((source,), fragments, taps, (3, 8, 8), stages=stages)


def two_coloured_pool() -> Pool:
    """Two sources, of which one sees red and the other green, for images of `two_colours`."""
    return Pool([live(OneColour(0).eval(), "red"), live(OneColour(1).eval(), "green")], (3, 16, 16))
