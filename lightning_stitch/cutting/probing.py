"""Learn what each node of a traced network yields and costs: one pass over fake tensors, which computes nothing."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode  # has no public home
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_stitch.cost import Cost, warn_of_uncounted
from lightning_stitch.cutting.activation_memory import Allocations, Footprint, peak_bytes, tensors_in
from lightning_stitch.cutting.copies import copy_structure
from lightning_stitch.cutting.tracing import trace_somehow
from lightning_stitch.errors import CutError


@dataclass(frozen=True, slots=True)
class Yield:
    """What a node yields for one batch size: shape and dtype of a tensor, or the value of anything else.

    `uncounted` are the operators whose work `macs` leaves out, `written` the arguments that the node wrote into,
    `footprint` what it needs of memory: tensors that lie in the same (views, results of in-place operations) have the
    same number there.
    """

    shape: tuple[int, ...] | None
    is_floating: bool
    value: Any
    macs: int
    uncounted: tuple[str, ...]
    written: tuple[fx.Node, ...]
    footprint: Footprint

    @property
    def holds_tensor(self) -> bool:
        """Whether it is or contains a tensor."""
        return self.shape is not None or any(isinstance(item, Tensor) for item in tree_leaves(self.value))

    @property
    def memory(self) -> int | None:
        """The number of the memory that a tensor lies in."""
        return None if self.shape is None else next(iter(self.footprint.held), None)


class _Prober(fx.Interpreter):
    """Runs a graph on fake tensors and notes what every node yields, how many FLOPs it takes and how much memory."""

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        counter: FlopCounterMode,
        operators: UncountedOperators,
        allocations: Allocations,
    ) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False  # torch.fx would add advice on its own tools to the error
        self.counter = counter
        self.operators = operators
        self.allocations = allocations
        self.yields: dict[fx.Node, Yield] = {}
        # Weak references free the memory, but keep its address from being used again.
        self._memories: dict[StorageWeakRef, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before, versions = self.counter.get_total_flops(), self._versions(n)
        try:
            result = super().run_node(n)
        except Exception as error:
            raise CutError(
                f"{n.format_node() or n.name} fails in a dry run: {type(error).__name__}: {error}"
            ) from error
        written = tuple(argument for argument, version in self._versions(n).items() if version != versions[argument])
        held = {self._memory_of(x): self.allocations.bytes_of(x) for x in tensors_in(result)}
        is_tensor = isinstance(result, Tensor)
        self.yields[n] = Yield(
            shape=tuple(result.shape) if is_tensor else None,
            is_floating=is_tensor and result.is_floating_point(),
            value=None if is_tensor else result,
            macs=(self.counter.get_total_flops() - before) // 2,
            uncounted=self.operators.take(),
            written=written,
            footprint=Footprint(held, self.allocations.take()),
        )
        return result

    def _memory_of(self, x: Tensor) -> int:
        return self._memories.setdefault(StorageWeakRef(x.untyped_storage()), len(self._memories))

    def _versions(self, n: fx.Node) -> dict[fx.Node, int]:
        arguments = {argument: self.env[argument] for argument in n.all_input_nodes}
        return {node: x._version for node, x in arguments.items() if isinstance(x, Tensor) and not x.is_inference()}


def probe(traced: fx.GraphModule, input_size: tuple[int, int, int], *, batch_size: int) -> dict[fx.Node, Yield]:
    """What every node yields for `batch_size` images, and its MACs and bytes for the whole batch (eval mode).

    One MAC is one multiply-accumulate, half of what `torch.utils.flop_counter` counts; element-wise operations, norms,
    pooling and resampling count nothing. Bytes are those that operators allocate, attention run as matrix products.

    Raises:
        CutError: If the graph does not accept images of that size; the message names the operation.
    """
    parameter = next(traced.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    operators, allocations = UncountedOperators(counter), Allocations()
    attention = _PlainAttention()
    prober = _Prober(_without_gradients(traced).eval(), traced.graph, counter, operators, allocations)
    # Gradient mode stays on: fake views of parameters cannot be made without.
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with _unlogged(), torch.enable_grad(), fake, allocations, operators, counter, attention, BaseTorchFunctionMode():
        images = torch.zeros((batch_size, *input_size), device=device, dtype=dtype)
        prober.run(images)
    return prober.yields


def _without_gradients(traced: fx.GraphModule) -> nn.Module:
    """A copy of what a graph reads, whose parameters share memory with the network's and have no gradients.

    For gradients a run would keep activations, and copy what it then overwrites. In the network itself they stay, and
    so do the tensors that LeViT, EfficientFormer, ConViT and their kin cache in attributes as they run.
    """
    read = nn.Module()
    read._modules, read._parameters, read._buffers = traced._modules, traced._parameters, traced._buffers
    return copy_structure(read, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in traced.parameters()})


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from printing the traceback of what fails in this thread on fake tensors: it becomes a CutError."""
    logger, thread = logging.getLogger("torch._subclasses.fake_tensor"), threading.get_ident()

    def is_of_another(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(is_of_another)
    try:
        yield
    finally:
        logger.removeFilter(is_of_another)


class _NoModules(nullcontext[None]):
    """For torch's counter, which would hook every module of the process, to tell which ones its FLOPs are of."""

    parents = frozenset({"Global"})


def uncounted_work(yields: Mapping[fx.Node, Yield]) -> tuple[str, ...]:
    """What the nodes' MACs leave out, as "module: operator", in the nodes' order and each once."""
    return tuple(
        dict.fromkeys(f"{_place_of(node)}: {name}" for node, result in yields.items() for name in result.uncounted)
    )


def _place_of(node: fx.Node) -> str:
    """Path of the module that a node is or belongs to; the node's own name where that is the network itself."""
    if node.op == "call_module":
        return str(node.target)
    calls = list(node.meta.get("nn_module_stack", {}).values())
    # The first name of each path is the network's own.
    return (calls[-1][0].partition(".")[2] if calls else "") or node.name


def is_linear_in_batch(two: Any, three: Any) -> bool:
    """Whether a shape value for batches of two and of three is the same, or a multiple of the batch size."""
    if isinstance(two, list | tuple):
        return len(two) == len(three) and all(is_linear_in_batch(a, b) for a, b in zip(two, three, strict=True))
    if isinstance(two, int) and not isinstance(two, bool):
        return two == three or (two % 2 == 0 and two * 3 == three * 2)
    return bool(two == three)


def value_for_batch(two: Any, three: Any, times_batch: Callable[[int], Any]) -> Any:
    """What a shape value is for any batch: itself where constant, else a multiple of the batch size."""
    if isinstance(two, list | tuple):
        return tuple(value_for_batch(a, b, times_batch) for a, b in zip(two, three, strict=True))
    return two if two == three else times_batch(two // 2)


def network_cost(network: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Count a network's parameters, and its MACs and activation bytes for one image of (channels, height, width).

    A UserWarning names the operators that have no FLOP formula; their work is not in the count. The activation bytes
    are the most that operators have allocated and something has yet to read, at any time of a run.

    Raises:
        CutError: If the network cannot be traced or does not accept that size.
    """
    traced, _, _ = trace_somehow(network, input_size)
    yields = probe(traced, input_size, batch_size=1)
    warn_of_uncounted(type(network).__name__, uncounted_work(yields))
    return Cost(
        params=sum(parameter.numel() for parameter in network.parameters()),
        macs=sum(result.macs for result in yields.values()),
        activation_bytes=_peak_bytes(yields),
    )


def network_activation_bytes(network: nn.Module, input_size: tuple[int, int, int]) -> int:
    """The activation bytes of `network_cost`, alone and without a warning of operators that have no formula."""
    traced, _, _ = trace_somehow(network, input_size)
    return _peak_bytes(probe(traced, input_size, batch_size=1))


def _peak_bytes(yields: Mapping[fx.Node, Yield]) -> int:
    output = next(node for node in yields if node.op == "output")
    return peak_bytes(list(yields), output, {node: result.footprint for node, result in yields.items()})


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


class _PlainAttention(TorchDispatchMode):
    """Runs attention as matrix products, in this thread alone: torch's own switch, `sdpa_kernel`, is the process's.

    Which of its fused kernels runs depends on the device and on `requires_grad`, and some of them have no formula.
    Those of whole layers, `torch.backends.mha`'s, do not run below any mode for functions of torch.
    """

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", None)
        if packet not in _FUSED_ATTENTION:
            return func(*args, **kwargs)
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        output, _ = torch.ops.aten._scaled_dot_product_attention_math(
            *(given[name] for name in ("query", "key", "value")),
            given.get("attn_bias", given.get("attn_mask")),
            given.get("dropout_p", 0.0),
            given.get("is_causal", False),
            scale=given.get("scale"),
        )
        # What the fused kernels return beside it is for gradients.
        return (output, *(output if "Tensor" in str(x.type) else 0 for x in func._schema.returns[1:]))


_FUSED_ATTENTION = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
        "_scaled_dot_product_attention_math_for_mps",
    )
)


class UncountedOperators(TorchDispatchMode):
    """Notes the operators that do work and have no formula, as they run below a counter of FLOPs.

    The counter must be entered after this, so that it takes operators apart first.
    """

    # The counter hands these on.
    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter = counter
        self._noted: dict[str, None] = {}

    def take(self) -> tuple[str, ...]:
        """The operators noted since the last call, in order, each once."""
        noted = tuple(self._noted)
        self._noted.clear()
        return noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self._counter.flop_registry and not _costs_nothing(func):
            self._noted[str(packet)] = None
        return func(*args, **(kwargs or {}))


@cache
def _costs_nothing(operator: Any) -> bool:
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
