"""What a network costs, and the limits that a user sets.

One MAC is one multiply-accumulate, half a FLOP of `torch.utils.flop_counter`, whose formulas are used: convolutions and
matrix products (linear layers, attention) count; element-wise operations, norms, pooling and resampling do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_stitch._example_tracing import trace_somehow
from lightning_stitch._tracing import probe
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

    def __str__(self) -> str:
        limits = [
            f"at most {limit / 1e6:g} M {unit}"
            for limit, unit in ((self.max_params, "parameters"), (self.max_macs, "MACs"))
            if limit is not None
        ]
        return " and ".join(limits) or "no limit"


def network_cost(network: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count a network's parameters and MACs for one image of (channels, height, width).

    Raises:
        CutError: If the network cannot be traced or does not accept that size.
    """
    traced, _, _ = trace_somehow(network, input_size)
    macs = sum(seen.macs for seen in probe(traced, input_size, batch_size=1).values())
    return Cost(sum(parameter.numel() for parameter in network.parameters()), macs)
