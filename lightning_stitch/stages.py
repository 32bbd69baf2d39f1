"""Stages: a composition that spends more on those images alone that it is unsure of. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_stitch.errors import RecipeError


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """How far images go at one setting of the thresholds, as the labelled images do that are left out of the heads.

    Attributes:
        goes_on: Of the images that reach each stage but the last, the share that goes on.
        mean_macs: Multiply-accumulates of an image, on average.
        scores: What the search measured there, by name.
    """

    goes_on: tuple[float, ...]
    mean_macs: float
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stages:
    """Readouts part of the way, each with a head: an image that one is sure of goes no further.

    Attributes:
        taps: How many of the recipe's taps, in their order, each stage's head reads; the last reads all of them.
        macs: Multiply-accumulates of an image that stops at each stage.
        points: Settings of the thresholds, the cheapest first.
        point: Which of them is in use, at first the one that the search chose.
        figures: What each stage's head does on all labelled images, left out of its fit: of classes "loo_accuracy" and
            "confidence_auroc", how well its confidence tells right answers from wrong ones (area under the ROC curve).
    """

    taps: tuple[int, ...]
    macs: tuple[int, ...]
    points: tuple[OperatingPoint, ...]
    point: int
    figures: tuple[dict[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Check that the parts fit."""
        count = len(self.taps)
        if count < 2 or self.taps[0] < 1 or list(self.taps) != sorted({*self.taps}):
            raise RecipeError(f"There are two stages or more, which read ever more taps; found {self.taps}.")
        if list(self.macs) != sorted(self.macs) or len(self.macs) != count or self.macs[0] < 0:
            raise RecipeError(f"Each of {count} stages has MACs, ever more; found {self.macs}.")
        if not 0 <= self.point < len(self.points):
            raise RecipeError(f"One of {len(self.points)} settings is chosen; found number {self.point}.")
        if len(self.figures) not in (0, count):
            raise RecipeError(f"Each of {count} stages has figures, or none has; found {len(self.figures)}.")
        for point in self.points:
            if len(point.goes_on) != count - 1 or not all(0 <= share <= 1 for share in point.goes_on):
                raise RecipeError(
                    f"A setting says of each of {count} stages but the last which share goes on; found {point.goes_on}."
                )

    @property
    def stopping(self) -> tuple[float, ...]:
        """Of all images the share that stops at each stage."""
        shares, arriving = [], 1.0
        for goes_on in (*self.chosen.goes_on, 0.0):
            shares.append(arriving * (1 - goes_on))
            arriving *= goes_on
        return tuple(shares)

    @property
    def chosen(self) -> OperatingPoint:
        """The setting that is in use."""
        return self.points[self.point]
