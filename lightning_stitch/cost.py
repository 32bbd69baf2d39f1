"""What a network costs, and the limits that a user sets.

One MAC is one multiply-accumulate, two FLOPs of `torch.utils.flop_counter`, whose formulas are used: convolutions and
matrix products (linear layers, attention, recurrent layers) count; what works element by element, norms, softmax,
pooling, reductions, resampling, indexing and copies do not. Any other operator, such as one of the user's own, counts
nothing unless `torch.utils.flop_counter.register_flop_formula` gives it a formula, and is named instead:
`CutGraph.uncounted` and `lightning-stitch inspect` list such work, and warnings tell where it matters.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_stitch._example_tracing import trace_somehow
from lightning_stitch._probing import probe, uncounted_work
from lightning_stitch.errors import BudgetError


@dataclass(frozen=True, slots=True)
class Cost:
    """What one network costs.

    Attributes:
        params: Number of parameters.
        macs: Multiply-accumulates for one image.
    """

    params: int
    macs: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.params + other.params, self.macs + other.macs)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.params - other.params, self.macs - other.macs)

    def __str__(self) -> str:
        return f"{self.params / 1e6:.2f} M parameters, {self.macs / 1e6:.1f} M MACs"


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits that every returned network keeps; the head is not counted.

    Args:
        max_params: Most parameters; None: no limit.
        max_macs: Most multiply-accumulates for one image; None: no limit.

    Raises:
        BudgetError: If a limit is not positive.

    >>> Budget(max_macs=2e9).allows(Cost(params=25_000_000, macs=4_100_000_000))
    False
    """

    max_params: float | None = None
    max_macs: float | None = None

    def __post_init__(self) -> None:
        """Check the limits."""
        for name in ("max_params", "max_macs"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise BudgetError(f"{name} must be positive or None; found {limit}.")

    def allows(self, cost: Cost) -> bool:
        """Whether a cost keeps every limit."""
        return (self.max_params is None or cost.params <= self.max_params) and (
            self.max_macs is None or cost.macs <= self.max_macs
        )

    def warn_of_uncounted(self, uncounted: Mapping[str, Sequence[str]]) -> None:
        """Warn where a limit on MACs is kept by counts that leave work out.

        Args:
            uncounted: `CutGraph.uncounted` of each source, by name.
        """
        if self.max_macs is not None:
            for name, operations in uncounted.items():
                _warn_of_uncounted(name, operations)

    def __str__(self) -> str:
        limits = [
            f"at most {limit / 1e6:g} M {unit}"
            for limit, unit in ((self.max_params, "parameters"), (self.max_macs, "MACs"))
            if limit is not None
        ]
        return " and ".join(limits) or "no limit"


def network_cost(network: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count a network's parameters and MACs for one image of (channels, height, width).

    The MACs are half of what `torch.utils.flop_counter` counts where attention and recurrent layers run as matrix
    products. A UserWarning names the operators that have no formula; their work is not in the count.

    Raises:
        CutError: If the network cannot be traced or does not accept that size.
    """
    traced, _, _ = trace_somehow(network, input_size)
    yields = probe(traced, input_size, batch_size=1)
    _warn_of_uncounted(type(network).__name__, uncounted_work(yields))
    macs = sum(seen.macs for seen in yields.values())
    return Cost(sum(parameter.numel() for parameter in network.parameters()), macs)


def _warn_of_uncounted(name: str, operations: Sequence[str]) -> None:
    if operations:
        more = f" and {len(operations) - 3} more" if len(operations) > 3 else ""
        warnings.warn(
            f"The MACs of {name} leave out {', '.join(operations[:3])}{more}: there is no FLOP formula for them. "
            f"torch.utils.flop_counter.register_flop_formula gives them one.",
            stacklevel=3,
        )
