"""What calibration and search are asked to do, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_stitch.errors import StitchError

Granularity = Literal["stages", "blocks", "reference", "all"]


Estimator = Literal["debiased", "biased"]


Keeping = Literal["disk", "memory"]


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How activations are sampled and scored.

    Attributes:
        granularity: Which cuts are offered (`CutGraph.cuts`): a word or a list of cut names for all sources, or a
            mapping from a source's name to its own; sources that it leaves out offer their "blocks".
        estimator: Of CKA, "debiased" or "biased" (the paper's).
        rows_per_image: Most rows that are sampled of one image at one cut.
        until: Where a network ends: at the "features" that its last source's classifier reads, or at its "output".
        seed: Of the sampled positions.
        keep_activations: Where activations of the calibration images wait to be carried on while a search lasts: on
            "disk" (an unnamed temporary file, so that memory is rows x channels at any image size), or in "memory".

    Raises:
        StitchError: If a word is unknown or a number is not positive.
    """

    granularity: Granularity | Sequence[str] | Mapping[str, Granularity | Sequence[str]] = "blocks"
    estimator: Estimator = "debiased"
    rows_per_image: int = 32
    until: str = "features"
    seed: int = 0
    keep_activations: Keeping = "disk"

    def __post_init__(self) -> None:
        """Check the words and numbers."""
        if self.until not in ("features", "output"):
            raise StitchError(f"until must be 'features' or 'output'; found {self.until!r}.")
        if self.estimator not in get_args(Estimator):
            raise StitchError(f"estimator must be one of {get_args(Estimator)}; found {self.estimator!r}.")
        if self.keep_activations not in get_args(Keeping):
            raise StitchError(f"keep_activations must be one of {get_args(Keeping)}; found {self.keep_activations!r}.")
        if self.rows_per_image < 1:
            raise StitchError(f"rows_per_image must be at least 1; found {self.rows_per_image}.")

    def granularity_of(self, source: str) -> Granularity | Sequence[str]:
        """Which cuts of a source are offered."""
        if isinstance(self.granularity, Mapping):
            return self.granularity.get(source, "blocks")
        return self.granularity


LEAN = CalibrationSettings(granularity="stages", rows_per_image=16, keep_activations="memory")
