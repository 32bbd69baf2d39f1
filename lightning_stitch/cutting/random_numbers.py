"""Random numbers that a thread draws without moving, or being moved by, those of the process."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode


class RandomNumbers(TorchDispatchMode):
    """Operators on the CPU that would draw from torch's global generator draw from one of this seed.

    Their numbers are those after `torch.manual_seed(seed)`. Fused dropout, which takes no generator, draws as ever.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        seeded = _with_generator(func)
        like = next((x.device for x in args if isinstance(x, Tensor)), kwargs.get("device"))
        if seeded is not None and kwargs.get("generator") is None and torch.device(like or "cpu").type == "cpu":
            return seeded(*args, **{**kwargs, "generator": self._generator})
        return func(*args, **kwargs)


@cache
def _with_generator(operator: Any) -> Any:
    """The overload of an operator that takes a generator beside the same arguments; None: it draws no numbers."""
    if not isinstance(operator, OpOverload) or torch.Tag.nondeterministic_seeded not in operator.tags:
        return None
    takes = _signature(operator)
    if "generator" in takes:
        return operator
    overloads = [getattr(operator._overloadpacket, name) for name in operator._overloadpacket.overloads()]
    return next((o for o in overloads if _signature(o) == {**takes, "generator": "Optional[Generator]"}), None)


def _signature(operator: OpOverload) -> dict[str, str]:
    return {argument.name: str(argument.type) for argument in operator._schema.arguments}
