"""Turn a network into a flat graph of leaf operations, and learn what each of them yields and costs.

Tracing is torch.fx's. What is added: the scopes of the module calls (to name cuts), the rules for what stays whole, and
one pass over fake tensors that gives every value's shape and every node's multiply-accumulates without computing
anything.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lightning_stitch.errors import CutError

_PREFIX = "network"
_DROPOUTS: dict[Any, Callable[[float], nn.Module]] = {
    functional.dropout: nn.Dropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
    functional.alpha_dropout: nn.AlphaDropout,
    functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_CACHES = (dict, list, set)
_OURS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a submodule during the trace: the nodes it made, [first, last), and the value it returned."""

    path: str
    module_type: type[nn.Module]
    first: int
    last: int
    output: fx.Node | None
    is_leaf: bool


class _OneInput(nn.Module):
    """Calls the network with one positional argument, so that its optional arguments keep their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


class ScopeTracer(fx.Tracer):
    """torch.fx's tracer that keeps whole what must stay whole, and remembers which call made which nodes."""

    def __init__(self, functions: Sequence[Callable[..., Any]] = ()) -> None:
        # timm lists what cannot be traced through; a network of timm's has loaded timm.layers already.
        timm_layers = sys.modules.get("timm.layers")
        listed = timm_layers.get_notrace_functions() if timm_layers else []
        super().__init__(autowrap_functions=(*listed, *functions))
        self._whole: tuple[type, ...] = tuple(timm_layers.get_notrace_modules()) if timm_layers else ()
        self.calls: list[ModuleCall] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Stitches and preprocessing of a stitched network look at sizes, so it can be measured and cut like any other.
        whole = isinstance(m, self._whole) or getattr(m, "traced_whole", False) or _is_random(m)
        is_network = module_qualified_name == _PREFIX
        return not is_network and (super().is_leaf_module(m, module_qualified_name) or whole)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        first = len(self.graph.nodes)
        output = super().call_module(m, forward, args, kwargs)
        self.calls.append(
            ModuleCall(
                path=path.removeprefix(_PREFIX).removeprefix("."),
                module_type=type(m),
                first=first,
                last=len(self.graph.nodes),
                output=output.node if isinstance(output, fx.Proxy) else None,
                is_leaf=self.is_leaf_module(m, path),
            )
        )
        return output


def _is_random(module: nn.Module) -> bool:
    """True for a small module that asks whether it is training (drop path, attention with dropout).

    A trace in eval mode would freeze the answer. `F.dropout` and its kin are excepted: `trace` turns them into modules.
    """
    code = getattr(type(module).forward, "__code__", None)
    names = set(code.co_names if code else ())
    is_small = not any(list(child.children()) for child in module.children())
    return is_small and "training" in names and not names & {dropout.__name__ for dropout in _DROPOUTS}


def trace(network: nn.Module, tracer: ScopeTracer | None = None) -> tuple[fx.GraphModule, list[ModuleCall]]:
    """Trace a network in eval mode into a graph with one placeholder; the network's modes are restored.

    Args:
        network: Any module whose forward takes one image batch (further arguments keep their defaults). Not changed.
        tracer: What traces it.

    Returns:
        The graph module, which shares the network's parameters and names, and the module calls in order of return.

    Raises:
        CutError: If it cannot be traced; the message names the operation that stopped it, and the reason.
    """
    tracer = tracer or ScopeTracer()
    root = _OneInput(network)
    try:
        with left_as_it_was(network):
            network.eval()
            graph = tracer.trace(root)
    except Exception as error:
        raise CutError(
            f"{type(network).__name__} cannot be traced: {type(error).__name__}: {error}{_stopped_at(error)}\n"
            f"Control flow that depends on the values of a tensor stops torch.fx. Register the part that does it as "
            f"a whole with timm.layers.register_notrace_module, or give a part of the network that has none."
        ) from error
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix(_PREFIX + ".")
        # torch.fx would wrap such a function again, for the whole process and under a name that it cannot find.
        node.meta.pop("is_wrapped", None)
    constants = {name: value for name, value in vars(root).items() if isinstance(value, Tensor)}
    if constants:
        # Tensors that forward makes from nothing; torch.fx keeps them at its root.
        network = copy.copy(network)
        for name, value in constants.items():
            setattr(network, name, value)
    traced = fx.GraphModule(network, graph, class_name=type(network).__name__)
    replaced = _dropout_as_modules(traced)
    traced.graph.lint()
    calls = [dataclasses.replace(call, output=replaced.get(call.output, call.output)) for call in tracer.calls]
    return traced, calls


@contextmanager
def left_as_it_was(network: nn.Module) -> Iterator[None]:
    """Put back every module's modes, attributes and caches at the end.

    LeViT, EfficientFormer, ConViT and their kin cache tensors in attributes as they run: proxies of a trace or fake
    tensors of a dry run would break them for good.
    """
    before = [
        (vars(module), dict(vars(module)), {k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, _CACHES)})
        for module in network.modules()
    ]
    try:
        yield
    finally:
        for now, attributes, contents in before:
            now.clear()
            now.update(attributes)
            for name, content in contents.items():
                cache = now[name]
                cache.clear()
                cache.extend(content) if isinstance(cache, list) else cache.update(content)


def _stopped_at(error: Exception) -> str:
    """The innermost line of the network's own code on the way to an error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OURS)]
    if not frames:
        return ""
    return f"\nIt stopped in {frames[-1].name} at `{frames[-1].line}` ({frames[-1].filename}:{frames[-1].lineno})."


def _dropout_as_modules(traced: fx.GraphModule) -> dict[fx.Node | None, fx.Node]:
    """Replace `F.dropout(x, p, training=False)` and its kin by modules, which follow train() and eval() again."""
    replaced: dict[fx.Node | None, fx.Node] = {}
    for index, node in enumerate(list(traced.graph.nodes)):
        if node.op != "call_function" or node.target not in _DROPOUTS:
            continue
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        name = f"functional_dropout_{index}"
        traced.add_submodule(name, _DROPOUTS[node.target](p).train(traced.training))
        with traced.graph.inserting_before(node):
            replacement = traced.graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
        node.replace_all_uses_with(replacement)
        traced.graph.erase_node(node)
        replaced[node] = replacement
    traced.recompile()
    return replaced


@dataclass(frozen=True, slots=True)
class Yield:
    """What a node yields for one batch size: shape and dtype of a tensor, or the value of anything else.

    `memory` is the same for tensors that lie in the same memory (views, results of in-place operations).
    """

    shape: tuple[int, ...] | None
    is_floating: bool
    value: Any
    macs: int
    memory: int | None = None


class _Prober(fx.Interpreter):
    """Runs a graph on fake tensors and notes what every node yields and how many FLOPs it takes."""

    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode) -> None:
        super().__init__(module)
        self.extra_traceback = False  # torch.fx would add advice on its own tools to the error
        self.counter = counter
        self.yields: dict[fx.Node, Yield] = {}
        # Weak references free the memory, but keep its address from being used again.
        self._memories: dict[StorageWeakRef, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        try:
            result = super().run_node(n)
        except Exception as error:
            raise CutError(
                f"{n.format_node() or n.name} fails in a dry run: {type(error).__name__}: {error}"
            ) from error
        macs = (self.counter.get_total_flops() - before) // 2
        if isinstance(result, Tensor):
            memory = self._memories.setdefault(StorageWeakRef(result.untyped_storage()), len(self._memories))
            self.yields[n] = Yield(tuple(result.shape), result.is_floating_point(), None, macs, memory)
        else:
            self.yields[n] = Yield(None, False, result, macs)
        return result


def probe(traced: fx.GraphModule, input_size: tuple[int, int, int], *, batch_size: int) -> dict[fx.Node, Yield]:
    """What every node yields for `batch_size` images of that size, and its MACs for the whole batch (eval mode).

    Nothing is computed: the run is on fake tensors. One MAC is one multiply-accumulate, half of what
    `torch.utils.flop_counter` counts; element-wise operations, norms, pooling and resampling count nothing.

    Raises:
        CutError: If the graph does not accept images of that size; the message names the operation.
    """
    parameter = next(traced.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    # Without this the attention backends differ in what the counter knows; the plain one counts as two matmuls.
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    # What fails becomes a CutError; torch would print its traceback besides.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        counter = FlopCounterMode(display=False)
        # Gradients stay on: fake views of parameters cannot be made without.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with left_as_it_was(traced), torch.enable_grad(), fake, attention, counter:
            traced.eval()
            images = torch.zeros((batch_size, *input_size), device=device, dtype=dtype)
            prober = _Prober(traced, counter)
            prober.run(images)
    finally:
        logger.disabled = was_disabled
    return prober.yields


IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name) for name in ("iadd", "isub", "imul", "itruediv", "imatmul", "ior", "iand", "setitem")
)


def is_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True where a node may write into its first argument."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        named = name.endswith("_") and not name.endswith("__")
        return node.target in IN_PLACE_OPERATORS or named or bool(node.kwargs.get("inplace"))
    return node.op == "call_module" and bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))


def holds_tensor(value: Any) -> bool:
    """Whether a value of a graph is or contains a tensor."""
    if isinstance(value, dict):
        return any(holds_tensor(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(holds_tensor(item) for item in value)
    return isinstance(value, Tensor)


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
