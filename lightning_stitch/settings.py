"""What calibration and search are asked to do, as frozen values."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from lightning_stitch.cost import Budget
from lightning_stitch.errors import BudgetError, StitchError

Granularity = Literal["stages", "blocks", "reference", "all"]
Estimator = Literal["debiased", "biased"]
Keeping = Literal["disk", "memory"]
_Class = TypeVar("_Class")


def image_shape_of(size: int | tuple[int, ...]) -> tuple[int, int, int]:
    """(channels, height, width), of those, of (height, width), or of one number, a square; three channels by default.

    Raises:
        StitchError: If it is none of these.

    Example:
        >>> image_shape_of(96), image_shape_of((64, 96)), image_shape_of((1, 8, 8))
        ((3, 96, 96), (3, 64, 96), (1, 8, 8))
    """
    numbers = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    shape = (3, *numbers) if len(numbers) == 2 else numbers
    if len(shape) != 3 or not all(type(number) is int and number > 0 for number in shape):
        raise StitchError(
            f"An image's size is 96, (96, 128) or (3, 96, 128) (channels, height, width); found {size!r}."
        )
    return shape


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """How activations are sampled and scored.

    Attributes:
        granularity: Which cuts are offered (`CutGraph.cuts`): a word or a list of cut names for all sources, or a
            mapping from a source's name to its own; sources that it leaves out offer their "blocks".
        estimator: Of CKA, "debiased" or "biased" (the paper's).
        rows_per_image: Most rows that are sampled of one image at one cut.
        until: Where a network ends: at the "features" that its last source's classifier reads, or at its "output".
        readout: What is read of a network: "all", the mean and standard deviation over positions at the end of every
            block that it passes, and its final vector (of tokens the prefix tokens, too); "last", the final vector
            alone (the paper's; of a network that ends early the mean); or a list of cut names, read besides the final
            vector. Networks that end at an output give that alone. (None, for `FragmentSearch`: "all", but "last" where
            the module has no head, or where a head of its own learns the features.)
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
    readout: str | Sequence[str] = "all"
    seed: int = 0
    keep_activations: Keeping = "disk"

    def __post_init__(self) -> None:
        """Check the words and numbers."""
        if self.until not in ("features", "output"):
            raise StitchError(f"until must be 'features' or 'output'; found {self.until!r}.")
        per_source = self.granularity.values() if isinstance(self.granularity, Mapping) else [self.granularity]
        if not all(_names_cuts(one, get_args(Granularity)) for one in per_source):
            raise StitchError(
                f"granularity must be one of {get_args(Granularity)}, a list of cut names, or a mapping from sources "
                f"to these; found {self.granularity!r}."
            )
        if not _names_cuts(self.readout, ("all", "last")):
            raise StitchError(f"readout must be 'all', 'last' or a list of cut names; found {self.readout!r}.")
        if self.estimator not in get_args(Estimator):
            raise StitchError(f"estimator must be one of {get_args(Estimator)}; found {self.estimator!r}.")
        if self.keep_activations not in get_args(Keeping):
            raise StitchError(f"keep_activations must be one of {get_args(Keeping)}; found {self.keep_activations!r}.")
        if not isinstance(self.rows_per_image, int) or self.rows_per_image < 1:
            raise StitchError(f"rows_per_image must be an integer, at least 1; found {self.rows_per_image!r}.")
        if not isinstance(self.seed, int):
            raise StitchError(f"seed must be an integer; found {self.seed!r}.")

    def granularity_of(self, source: str) -> Granularity | Sequence[str]:
        """Which cuts of a source are offered."""
        if isinstance(self.granularity, Mapping):
            return self.granularity.get(source, "blocks")
        return self.granularity


def _names_cuts(value: object, words: Sequence[str]) -> bool:
    """Whether it is one of some words, or a list of names."""
    if isinstance(value, str):
        return value in words
    return isinstance(value, Sequence) and all(isinstance(name, str) for name in value)


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What a search proposes, and by what it chooses.

    Attributes:
        strategy: A generator of candidates; None: `Beam()`. `DepthFirst(...)` is the paper's.
        budget: Limits that the chosen network and all StitchNets of the result keep: on parameters, MACs, milliseconds,
            bytes of activations and score; None: none.
        ranking: How to rank on the selection images. By labels: "loo_soft_r2" or "loo_r2"; without: "consensus" or
            "cka_product"; or a function. "auto": the first of those by labels, or of those without where there are
            none, or where the module's head ("class_map", "none") is fitted without.
        ridge: Strength of the stitches' fit, relative to the mean variance of the sender's channels; 0 is the paper's.
        bias: Whether stitches have a bias; False is the paper's.
        max_candidates: Most StitchNets that are ranked.
        exits: Whether sources that end at one of their cuts are candidates too. They are
            not where networks end at an output, nor under the ranking "cka_product", which would give each of them the
            highest score, as they have no stitch.
        sizes: Heights of smaller images on which sources, whole or ended early, are candidates, too, widths in
            proportion; sources that do not take them are left out. None: none, or under a limit on MACs, latency or
            activations from the data's height down to 64 pixels, each about three quarters of the one before.
        max_roots: Most compositions side by side, read by one joint head, where a ranking goes by labels; each must be
            worth it (`lightning_stitch.search.sides`). 1: none are.
        max_stages: Most stages of a network that stops when it is sure, where the budget has `mean_macs` and a ranking
            goes by labels (`lightning_stitch.search.staging`). 1: there are no such networks.
        heal: Whether to heal the layers behind stitches, where that explains more on held-out calibration images
            (`lightning_stitch.healing`).
        max_healed: Most StitchNets that are healed: of each size class those that explain most as they are.
        time_limit: Seconds from the call after which no more is composed; ranking what there is comes on top. It is
            looked at with every cut and stitch. None: no limit.
        journal: A directory where the search remembers what it found, its calibration too, so that the same search can
            be called again after it was stopped by whatever means, a killed process too, and goes on where it was, to
            the same result. The same search has the same settings and images; but `max_candidates`, `time_limit`,
            `ranking`, `heal` and `max_healed` may be others. Of several ranks each has a directory of its own in it; a
            fast_dev_run leaves it alone. None: nothing is remembered.
    """

    strategy: Callable[..., Any] | None = None
    budget: Budget | None = None
    ranking: str | Callable[..., Any] = "auto"
    ridge: float = 1e-3
    bias: bool = True
    max_candidates: int = 64
    exits: bool = True
    sizes: Sequence[int] | None = None
    max_roots: int = 3
    max_stages: int = 3
    heal: bool = False
    max_healed: int = 16
    time_limit: float | None = None
    journal: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not isinstance(self.budget, Budget | None):
            raise BudgetError(f"budget= is a Budget or None; found {self.budget!r}. Budget.of('25M') reads words.")
        if self.max_roots < 1:
            raise StitchError(f"max_roots must be at least 1; found {self.max_roots}.")
        if self.max_stages < 1:
            raise StitchError(f"max_stages must be at least 1; found {self.max_stages}.")
        if self.sizes is not None and not all(isinstance(size, int) and size > 0 for size in self.sizes):
            raise StitchError(f"sizes= are heights of images in pixels; found {list(self.sizes)}.")

    def smaller_shapes(self, image_shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
        """(channels, height, width) of the smaller images on which sources are candidates, the largest first."""
        channels, height, width = image_shape
        sizes = self.sizes
        if sizes is None:
            steps = (round(height * 0.75**step / 32) * 32 for step in range(1, 12))
            sizes = [step for step in steps if step >= 64] if self.limits.of_static.limits else []
        return [
            (channels, size, round(width * size / height)) for size in sorted(set(sizes), reverse=True) if size < height
        ]

    @property
    def limits(self) -> Budget:
        """The budget; one without limits where none is set."""
        return self.budget or Budget()


def documents_options_of(*settings: type) -> Callable[[type[_Class]], type[_Class]]:
    """Let a class whose options are fields of settings have their documentation in its own, which need not repeat it.

    Args:
        settings: Classes whose "Attributes:" say what the options are.
    """

    def document(cls: type[_Class]) -> type[_Class]:
        options = inspect.signature(cls).parameters
        entries: list[str] = []
        for described in settings:
            attributes = (inspect.getdoc(described) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
            for entry in re.split(r"\n(?=    \w+: )", attributes):
                if entry.strip().partition(":")[0] in options:
                    entries.append(entry)
        before, args, behind = (inspect.getdoc(cls) or "").partition("Args:\n")
        documented, blank, rest = behind.partition("\n\n")
        cls.__doc__ = before + args + "\n".join([documented, *entries]) + blank + rest
        return cls

    return document


LEAN = CalibrationSettings(granularity="stages", rows_per_image=16, keep_activations="memory")
