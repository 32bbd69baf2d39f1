"""What a network costs, and the limits that a user sets.

One MAC is one multiply-accumulate, two FLOPs of `torch.utils.flop_counter`, whose formulas are used: convolutions and
matrix products (linear layers, attention, recurrent layers) count; what works element by element, norms, softmax,
pooling, reductions, resampling, indexing and copies do not. Any other operator, such as one of the user's own, counts
nothing unless `torch.utils.flop_counter.register_flop_formula` gives it a formula, and is named instead:
`CutGraph.uncounted` and `lightning-stitch inspect` list such work, and warnings tell where it matters.

Activation bytes are the most bytes of activations that are alive at once while one image goes through in eval mode and
float32, the image included: what operators allocate, each until its last reader has run, attention computed as matrix
products. Parameters and buffers, and scratch space inside a kernel, are not in it. So much an executor needs that lets
go of everything in time; eager PyTorch holds the input of a module as long as the module runs, and can need more.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_stitch.errors import BudgetError

_SLACK = 1.25  # by which an estimated latency may exceed its limit

# The measures of a cost: the unit and how many make one of it, and the thing measured.
_UNITS = {
    "params": ("M", 1e6, "parameters"),
    "macs": ("M", 1e6, "MACs"),
    "activation_bytes": ("MB", 1e6, "of activations"),
    "latency_ms": ("ms", 1.0, "for one image"),
}

# Limits in words: "mean 1.2G MACs".
_LIMIT = re.compile(r"(mean )?\s*(\d+\.?\d*|\.\d+)\s*([kMG]|%)?\s*(MACs|parameters|params|ms|B)?")
_FACTORS = {None: 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_THINGS = {"parameters": "max_params", "params": "max_params", "ms": "max_latency_ms", "B": "max_activation_bytes"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one network costs.

    Costs of parts that run one after the other add up, all but activation bytes: what is alive at once is known of a
    whole network alone, so that a sum has none.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates for one image.
        activation_bytes: Most bytes of activations alive at once for one image, float32; None: not measured.
        latency_ms: Milliseconds for one image, by estimate; 0 where no limit asked for it.
        mean_macs: Multiply-accumulates of an image on average, where not all images go all the way; None: all do.
    """

    params: int
    macs: int
    activation_bytes: int | None = None
    latency_ms: float = 0.0
    mean_macs: float | None = None

    def __add__(self, other: Cost) -> Cost:
        latency_ms = self.latency_ms + other.latency_ms
        return Cost(self.params + other.params, self.macs + other.macs, latency_ms=latency_ms)

    def __str__(self) -> str:
        peak = self.activation_bytes
        activations = "" if peak is None else f", {in_words('activation_bytes', peak, digits=3)}"
        mean = "" if self.mean_macs is None else f" at most, {self.mean_macs / 1e6:.1f} M on average"
        return f"{self.params / 1e6:.2f} M parameters, {self.macs / 1e6:.1f} M MACs{mean}{activations}"

    @property
    def expected_macs(self) -> float:
        """Multiply-accumulates of an image on average."""
        return self.macs if self.mean_macs is None else self.mean_macs


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that every returned network keeps; the head is not counted.

    Args:
        max_params: Most parameters; None: no limit.
        max_macs: Most multiply-accumulates for one image; None: no limit.
        mean_macs: Most multiply-accumulates for an image on average. Under this limit networks with stages are
            candidates, too, whose further stages run for those images alone that the ones before are unsure of; the
            average is that of the labelled images, left out of the heads' fits. None: no limit.
        max_latency_ms: Most milliseconds for one image, a batch of its own, on the device of the search: the median of
            several runs after some to warm up (`lightning_stitch.search.latency`). The search goes by an estimate, and
            may exceed the limit by a quarter; what it finds is then assembled and measured, and kept only within the
            limit. Measured times vary, so that under this limit, and no other, a search need not repeat. None: no
            limit.
        max_activation_bytes: Most bytes of activations alive at once for one image, in eval mode and float32, as
            `network_cost` counts them. The search does not go by it: what it finds is assembled and counted, and kept
            only within the limit. None: no limit.
        min_score: Least leave-one-out accuracy on the selection images, where the ranking has one (all by labels have),
            else least value of the ranking's first score. The network of the fewest multiply-accumulates that reaches
            it is then the best, not the one of the highest score. None: no limit.

    Raises:
        BudgetError: If a limit is not positive, or the score not finite.

    >>> Budget(max_macs=2e9).allows(Cost(params=25_000_000, macs=4_100_000_000))
    False
    """

    max_params: float | None = None
    max_macs: float | None = None
    max_latency_ms: float | None = None
    max_activation_bytes: float | None = None
    min_score: float | None = None
    mean_macs: float | None = None

    def __post_init__(self) -> None:
        """Check the limits."""
        for measure in _UNITS:
            limit = getattr(self, f"max_{measure}")
            if limit is not None and not limit > 0:
                raise BudgetError(f"max_{measure} must be positive or None; found {limit}.")
        if self.mean_macs is not None and not self.mean_macs > 0:
            raise BudgetError(f"mean_macs must be positive or None; found {self.mean_macs}.")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise BudgetError(f"min_score must be a finite number or None; found {self.min_score}.")

    @classmethod
    def of(cls, words: str, *, cheapest_macs: Callable[[], float] | None = None) -> Budget:
        """Limits in words, several with commas between them.

        Args:
            words: "25M" or "1.2G MACs" (`max_macs`), "mean 25M" (`mean_macs`), "50%" or "mean 50%" (of the cheapest
                source's MACs), "5M parameters" (`max_params`), "20 ms" (`max_latency_ms`), "8 MB"
                (`max_activation_bytes`).
            cheapest_macs: Tells the MACs of the cheapest source where a limit is a share; None: it is refused.

        Raises:
            BudgetError: If a limit has no such meaning, or one is given twice.

        >>> print(Budget.of("25M, 20 ms"))
        at most 25 M MACs and at most 20 ms for one image
        """
        limits: dict[str, float] = {}
        for part in words.split(","):
            match = _LIMIT.fullmatch(part.strip())
            mean, number, unit, thing = match.groups() if match else (None, "", "", "")
            measure = {"MACs": "mean_macs" if mean else "max_macs", **_THINGS}.get(thing or "MACs")
            if not match or (mean and measure != "mean_macs") or (unit == "%" and thing not in (None, "MACs")):
                raise BudgetError(
                    f"{part.strip()!r} is no limit. Write '25M' or '50%' (multiply-accumulates, '%' of those of the "
                    f"cheapest source), 'mean 25M', '5M parameters', '20 ms' or '8 MB'; several with commas."
                )
            if unit == "%" and cheapest_macs is None:
                raise BudgetError(f"{part.strip()!r} is a share of a source's cost, and no sources are known here.")
            if measure is None or measure in limits:
                raise BudgetError(f"{words!r} limits {measure} twice.")
            share = cheapest_macs() / 100 if unit == "%" and cheapest_macs is not None else 1.0
            limits[measure] = float(number) * (share if unit == "%" else _FACTORS[unit])
        return cls(**limits)

    @property
    def limits(self) -> dict[str, float]:
        """The limits on costs that there are, by the cost's measure."""
        limits = {measure: getattr(self, f"max_{measure}") for measure in _UNITS}
        return {measure: limit for measure, limit in limits.items() if limit is not None}

    def allows(self, cost: Cost) -> bool:
        """Whether a cost keeps every limit; its latency is an estimate and keeps the limit within a quarter.

        Activation bytes that were not measured keep any limit.
        """
        if self.mean_macs is not None and cost.expected_macs > self.mean_macs:
            return False
        figures = {measure: getattr(cost, measure) for measure in self.limits}
        return all(figure is None or figure <= self.most(measure) for measure, figure in figures.items())

    @property
    def of_all_images(self) -> Budget:
        """The limits that every image keeps, without those on what images have on average."""
        return dataclasses.replace(self, mean_macs=None)

    @property
    def of_static(self) -> Budget:
        """The limits on what all images run alike: what they may have on average is the most, too."""
        limits = [limit for limit in (self.max_macs, self.mean_macs) if limit is not None]
        return dataclasses.replace(self, max_macs=min(limits, default=None), mean_macs=None)

    def most(self, measure: str) -> float:
        """The most that a cost may have in a measure: its limit, or where it is estimated a quarter more."""
        return self.limits[measure] * (_SLACK if measure == "latency_ms" else 1)

    def warn_of_uncounted(self, uncounted: Mapping[str, Sequence[str]]) -> None:
        """Warn where a limit on MACs is kept by counts that leave work out, by the source's name."""
        if self.max_macs is not None or self.mean_macs is not None:
            for name, operations in uncounted.items():
                warn_of_uncounted(name, operations)

    def __str__(self) -> str:
        limits = [f"at most {in_words(measure, limit)}" for measure, limit in self.limits.items()]
        if self.mean_macs is not None:
            limits.append(f"{in_words('macs', self.mean_macs)} on average")
        if self.min_score is not None:
            limits.append(f"a score of at least {self.min_score:g}")
        return " and ".join(limits) or "no limit"


def in_words(measure: str, value: float, *, digits: int = 6, bare: bool = False) -> str:
    """A figure of a cost in words, as "2.5 M parameters"; bare, as "2.5 M"."""
    unit, one, thing = _UNITS[measure]
    return f"{value / one:.{digits}g} {unit}" + ("" if bare else f" {thing}")


def warn_of_uncounted(name: str, operations: Sequence[str]) -> None:
    """Warn of what a count of multiply-accumulates leaves out, if there is anything."""
    if operations:
        more = f" and {len(operations) - 3} more" if len(operations) > 3 else ""
        warnings.warn(
            f"The MACs of {name} leave out {', '.join(operations[:3])}{more}: there is no FLOP formula for them. "
            f"torch.utils.flop_counter.register_flop_formula gives them one.",
            stacklevel=3,
        )
