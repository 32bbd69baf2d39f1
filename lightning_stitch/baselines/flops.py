"""What a piece of work costs to run: seconds, and floating-point operations counted as they happen.

Counted are the operators that `torch.utils.flop_counter` has formulas for (convolutions, matrix products, attention),
forward and backward, and besides what closed-form fits are made of: Cholesky factors (n^3 / 3), solves with them
(2 n^2 k), symmetric eigendecompositions (9 n^3; Golub and Van Loan, "Matrix Computations", section 8.3) and products of
a matrix and a vector. One multiply-accumulate is two FLOPs, in whatever precision. What works element by element counts
nothing, an optimizer's update therefore neither. Dry runs on tensors without values count nothing: nothing is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor  # has no public home
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_stitch.cutting import FORMULAS

_EIGEN_FLOPS = 9  # times n^3, vectors included

Shape = Sequence[int]


def _cholesky(matrix: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return math.prod(matrix[:-2]) * matrix[-1] ** 3 // 3


def _cholesky_solve(right: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(right) * right[-2]


def _eigen(matrix: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return _EIGEN_FLOPS * math.prod(matrix[:-2]) * matrix[-1] ** 3


def _matrix_vector(matrix: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(_: Shape, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any) -> int:
    # The scores once more, and the gradients of scores, query, key and value.
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


_ATEN = torch.ops.aten
_MORE_FORMULAS = {
    _ATEN.linalg_cholesky_ex: _cholesky,
    _ATEN.cholesky_solve: _cholesky_solve,
    _ATEN._linalg_eigh: _eigen,
    _ATEN.mv: _matrix_vector,
    _ATEN.dot: _matrix_vector,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True, slots=True)
class Spent:
    """What something took: wall time, processor time of this process over all its threads, and FLOPs."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    flops: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds, self.flops + other.flops)


class Meter:
    """Times what runs inside the context and counts its FLOPs; `spent` has them when it is left.

    The count costs some tens of microseconds for each operator, which are within the seconds.

    Example:
        >>> with Meter() as meter:
        ...     product = torch.ones(2, 3) @ torch.ones(3, 4)
        >>> meter.spent.flops
        48
    """

    def __init__(self) -> None:
        self.spent = Spent()
        self._mode = _Counter()
        self._begun = self._cpu_begun = 0.0

    def __enter__(self) -> Meter:
        self._mode.__enter__()
        self._begun, self._cpu_begun = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop; what an exception ends is metered up to it."""
        seconds, cpu_seconds = time.perf_counter() - self._begun, time.process_time() - self._cpu_begun
        self._mode.__exit__(*error)
        self.spent = Spent(seconds, cpu_seconds, self._mode.flops)


class _Counter(TorchDispatchMode):
    """FlopCounterMode's formulas without its table by modules, whose hooks warn of nested calls.

    Torch's own also tries to decompose every operator, which more than doubles what counting costs (38 ms instead of
    15 on top of a training step of 22, of timm's test_resnet), and that would stand in the seconds of the methods.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._formulas = FlopCounterMode(display=False, custom_mapping={**FORMULAS, **_MORE_FORMULAS}).flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(getattr(func, "_overloadpacket", func))
        if formula is None:
            if isinstance(func, OpOverload) and func.namespace != "prim":
                with self:
                    # In inference mode what is made of other operators on every device comes whole.
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if _is_computed(result):
            self.flops += int(formula(*args, **kwargs, out_val=result))
        return result


def _is_computed(result: Any) -> bool:
    tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    return not any(isinstance(x, FakeTensor) or x.device.type == "meta" for x in tensors)
