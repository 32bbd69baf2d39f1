"""What operators cost beyond what torch's FLOP formulas know, and which of them do work that has no formula.

The convention is torch's own: multiply-accumulates are those of matrix products and convolutions. What works element by
element, norms, softmax, pooling, reductions, sorting, resampling (grid sampling, too), indexing, views, copies and
factories cost nothing by it. Any other operator without a formula is real work that a count leaves out: custom
operators, Fourier transforms, linear algebra, distances, products with quantised weights or of a matrix and a vector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_FREE_TAGS = frozenset({"pointwise", "reduction", "view_copy", "inplace_view"})
# Names in ATen, without underscores around them, of what neither tags nor schema show to cost nothing.
_FREE_NAMES = re.compile(
    "|".join(
        (
            # element by element
            r"hardswish|glu|log_sigmoid_forward|prelu_kernel|threshold|rrelu_with_noise|(native_|fused_)?dropout",
            r"copysign|floor_divide|polar|complex|tril|triu|fake_quantize_\w+|quantize_per_\w+|dequantize|thnn_fused_\w+",
            # norms, softmax, pooling, resampling
            r"\w*(norm|softmax|pool\dd)\w*|upsample\w*|\w*(grid_sampler|affine_grid_generator)\w*",
            # reductions and sorting
            r"sum|mean|prod|amax|amin|aminmax|max|min|all|any|(var|std)(_mean)?|logsumexp|count_nonzero|is_(all|any)_true",
            r"cum\w+|logcumsumexp|bincount|histc|segment_reduce|trace|argmax|argmin|sort|topk|kthvalue|\w*median|mode",
            r"unique\w*|nonzero\w*|bucketize|searchsorted|isin",
            # indexing and copies
            r"(unsafe_)?(masked_)?index\w*|masked_\w+|\w*scatter\w*|gather|take|put|embedding\w*|diag_embed|block_diag",
            r"\w*(clone|copy|cat|stack)|fill|zero|lift|repeat\w*|flip|roll|rot90|\w*_pad\w*|pixel_\w+|channel_shuffle",
            r"im2col|col2im|unsafe_(view|split\w*)|resize\w*",
            # factories that take a tensor as their model
            r"\w+_like|new_\w+|bernoulli|uniform|random|exponential",
        )
    )
)


def _recurrent_flops(sequences: Sequence[int], matrices: Sequence[Sequence[int]]) -> int:
    """Each step of each sequence meets each weight matrix once; biases, as everywhere, count nothing."""
    return 2 * math.prod(sequences[:-1]) * sum(math.prod(shape) for shape in matrices if len(shape) == 2)


def _one_layer_flops(x: Sequence[int], w_x: Sequence[int], w_h: Sequence[int], *_: Any, out_shape: Any = None) -> int:
    return _recurrent_flops(x, (w_x, w_h))


def _all_layers_flops(x: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, out_shape: Any = None) -> int:
    return _recurrent_flops(x, weights)


# Where a device has no kernel for a whole recurrent layer, torch makes it of linear layers and counts these.
FORMULAS = {
    torch.ops.aten.mkldnn_rnn_layer: _one_layer_flops,
    torch.ops.aten._cudnn_rnn: _all_layers_flops,
}


@contextmanager
def plain_attention() -> Iterator[None]:
    """Run attention as matrix products.

    Which of its fused kernels runs depends on the device and on `requires_grad`, and some of them have no formula.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


class UncountedOperators(TorchDispatchMode):
    """Notes the operators that do work and have no formula, as they run below a counter of FLOPs.

    Args:
        counter: What counts; it must be entered after this, so that it takes operators apart first.
    """

    # The counter hands these on.
    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter = counter
        self._found: dict[str, None] = {}

    def take(self) -> tuple[str, ...]:
        """The operators noted since the last call, in order, each once."""
        found = tuple(self._found)
        self._found.clear()
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self._counter.flop_registry and not _costs_nothing(func):
            self._found[str(packet)] = None
        return func(*args, **(kwargs or {}))


@cache
def _costs_nothing(operator: Any) -> bool:
    """Whether an operator costs nothing by the convention."""
    if not isinstance(operator, OpOverload):
        return False
    schema, packet = operator._schema, operator._overloadpacket
    makes_tensors = schema.is_mutable or any("Tensor" in str(result.type) for result in schema.returns)
    reads_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
    is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
    if is_view or not makes_tensors or not reads_tensors:
        return True
    # In-place variants and those with out= lack some of the tags of the plain ones.
    plain = getattr(getattr(torch.ops, operator.namespace), packet.__name__.removesuffix("_"), packet)
    if any(tag.name in _FREE_TAGS for p in (packet, plain) for name in p.overloads() for tag in getattr(p, name).tags):
        return True
    return operator.namespace == "aten" and _FREE_NAMES.fullmatch(packet.__name__.strip("_")) is not None
