"""Turn a network into a flat graph of leaf operations.

Tracing is torch.fx's. What is added: the scopes of the module calls (to name cuts), and the rules for what stays whole.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode  # has no public home
from torch.fx import _symbolic_trace
from torch.fx.node import map_aggregate
from torch.nn import functional

from lightning_stitch.cutting.copies import copy_structure
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
_DROPOUT_NAMES = frozenset(dropout.__name__ for dropout in _DROPOUTS)
FUNCTIONAL_DROPOUT = "functional_dropout"
# Functions are replaced in the modules that call them, where two tracers would undo each other's work.
_ONE_AT_A_TIME = threading.RLock()
_OURS = (os.path.dirname(torch.__file__), os.path.dirname(__file__))


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """One call of a submodule during the trace: the number of its first node, and the value it returned."""

    path: str
    module_type: type[nn.Module]
    first: int
    output: fx.Node | None
    is_leaf: bool


class _OneInput(nn.Module):
    """Calls the network with one positional argument, so that its optional arguments keep their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


_AUGMENTED = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")


def write_into(x: Any, operation: str, *arguments: Any) -> Any:
    """`x += y`, `x[key] = y` and their kin: an in-place operation of Python's, by its name in `operator`.

    As a statement in a fragment's code it could not be traced again, as unpickling does.
    """
    if isinstance(x, fx.Proxy):
        name = operation if operation == "setitem" else operation.removeprefix("i")
        return x.tracer.create_proxy("call_function", write_into, (x, operation, *arguments), {}, name=name)
    return getattr(operator, operation)(x, *arguments)


class _WritableProxy(fx.Proxy):
    """A proxy that `x += y` and `x[key] = y` write into.

    torch.fx's own refuses the second, and makes a new tensor of the first, which other names of the old one miss.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        write_into(self, "setitem", key, value)


for _operation in _AUGMENTED:
    setattr(_WritableProxy, f"__{_operation}__", lambda self, x, operation=_operation: write_into(self, operation, x))


class _ThreadPatcher(_symbolic_trace._Patcher):
    """torch.fx's replacements of `nn.Module`'s methods while it traces, but seen by the thread that traces alone."""

    def patch_method(self, cls: type, name: str, new_fn: Callable[..., Any], deduplicate: bool = True) -> None:
        method, thread = getattr(cls, name), threading.get_ident()

        @functools.wraps(method)
        def by_thread(*args: Any, **kwargs: Any) -> Any:
            return (new_fn if threading.get_ident() == thread else method)(*args, **kwargs)

        super().patch_method(cls, name, by_thread, deduplicate)


class _ScopeTracer(fx.Tracer):
    """torch.fx's tracer that keeps whole what must stay whole, and remembers which call made which nodes.

    Other threads run as if there were none; those that want to trace, too, wait.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]] = ()) -> None:
        # timm lists what cannot be traced through; a network of timm's has loaded timm.layers already.
        timm_layers = sys.modules.get("timm.layers")
        listed = timm_layers.get_notrace_functions() if timm_layers else []
        super().__init__(autowrap_functions=(*listed, *functions))
        self._whole: tuple[type, ...] = tuple(timm_layers.get_notrace_modules()) if timm_layers else ()
        self.calls: list[ModuleCall] = []
        self._copies: dict[nn.Module, nn.Module] = {}

    def trace_copy(self, network: nn.Module, *, training: bool) -> tuple[fx.Graph, nn.Module]:
        """The graph of a network, traced in a copy that shares its parameters alone, and the copy with a root above.

        LeViT, EfficientFormer, ConViT and their kin cache tensors in attributes as they run; proxies in the network's
        own would break it, for good or for another thread.
        """
        copied = copy_structure(network)
        # Closures in its attributes still refer to the network's own modules.
        self._copies = dict(zip(network.modules(), copied.modules(), strict=True))
        root = _OneInput(copied.train(training))
        with _ONE_AT_A_TIME:
            patcher = _symbolic_trace._Patcher
            _symbolic_trace._Patcher = _ThreadPatcher  # type: ignore[misc]
            try:
                return self.trace(root), root
            finally:
                _symbolic_trace._Patcher = patcher  # type: ignore[misc]

    def path_of_module(self, mod: nn.Module) -> str:
        return super().path_of_module(self._copies.get(mod, mod))

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _WritableProxy(node, self)

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
    return is_small and "training" in names and not names & _DROPOUT_NAMES


def check_traceable(network: nn.Module) -> None:
    """Refuse, with a CutError, what is compiled or scripted, or wants more than one batch of images."""
    for path, module in network.named_modules():
        where = type(network).__name__ + (f", in its part {path!r}," if path else "")
        if isinstance(module, torch.jit.ScriptModule):
            raise CutError(
                f"{where} is a ScriptModule, whose Python is gone. Give the module that it was scripted or traced from."
            )
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise CutError(
                f"{where} is compiled, and cannot be cut. Give the module as it was before torch.compile, and compile "
                f"the stitched network instead."
            )
    try:
        inspect.signature(network.forward).bind(network)
    except TypeError as error:
        raise CutError(
            f"{type(network).__name__} cannot be called with one batch of images alone: {error}. Give its other inputs "
            f"defaults, or wrap it in a module whose forward takes images and supplies the rest."
        ) from error


def trace(
    network: nn.Module, tracer: _ScopeTracer | None = None, *, training: bool = False
) -> tuple[fx.GraphModule, list[ModuleCall]]:
    """Trace a network, of whose forward one image batch is the only argument, in eval mode or in train mode.

    The graph module shares the network's parameters and names; the module calls are in order of return.

    Raises:
        CutError: If it cannot be traced; the message names the operation that stopped it, and the reason.
    """
    tracer = tracer or _ScopeTracer()
    try:
        graph, root = tracer.trace_copy(network, training=training)
    except Exception as error:
        raise CutError(
            f"{type(network).__name__} cannot be traced: {type(error).__name__}: {error}{_describe_stop(error)}\n"
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
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Run a network in eval mode, and put every module back into the mode that it was in."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _describe_stop(error: Exception) -> str:
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
        name = f"{FUNCTIONAL_DROPOUT}_{index}"
        traced.add_submodule(name, _DROPOUTS[node.target](p).train(traced.training))
        with traced.graph.inserting_before(node):
            replacement = traced.graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
        node.replace_all_uses_with(replacement)
        traced.graph.erase_node(node)
        replaced[node] = replacement
    traced.recompile()
    return replaced


def follow_device(graph: fx.Graph, placeholder: fx.Node) -> None:
    """Let tensors that a graph makes be where its input is: a trace holds the device that it was made on."""
    fixed = [node for node in graph.nodes if names_device(node)]
    if not fixed:
        return
    with graph.inserting_after(placeholder):
        here = graph.call_function(getattr, (placeholder, "device"))
    for node in fixed:
        node.args = map_aggregate(node.args, lambda a: here if isinstance(a, torch.device) else a)
        named = {"device": here} if "device" in node.kwargs else {}
        node.kwargs = {**node.kwargs, **named}


def names_device(node: fx.Node) -> bool:
    """Whether a node has a device among its arguments."""
    return isinstance(node.kwargs.get("device"), torch.device | str) or any(
        isinstance(value, torch.device) for value in node.args
    )


_WRITERS = frozenset((write_into, operator.setitem, *(getattr(operator, name) for name in _AUGMENTED)))


def is_in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    """True where a node may write into its first argument."""
    if node.op == "call_module":
        return bool(getattr(traced.get_submodule(str(node.target)), "inplace", False))
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    named = name.endswith("_") and not name.endswith("__")
    is_writer = node.op == "call_function" and (node.target in _WRITERS or bool(node.kwargs.get("inplace")))
    return named or is_writer


Way = Literal["symbolic", "example"]


# They make tensors of sizes alone, without a tensor among their arguments by which torch.fx would notice them.
_FACTORIES = (torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.zeros)


class _ExampleProxy(_WritableProxy):
    """A proxy that knows what it stands for."""

    tracer: _ExampleTracer

    def __len__(self) -> int:
        return len(self.tracer.values[self.node])

    def __index__(self) -> int:
        return self._number().__index__()

    def __int__(self) -> int:
        return int(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def _number(self) -> Any:
        value = self.tracer.values[self.node]
        if isinstance(value, Tensor):
            raise fx.proxy.TraceError("symbolically traced variables cannot be used as numbers")
        return value


class _ExampleTracer(_ScopeTracer):
    """A tracer that answers questions about sizes from an example, on which it evaluates each node, on fake tensors."""

    # A method of a buffer with a size among its arguments is noticed only if the buffer is a proxy.
    proxy_buffer_attributes = True

    def __init__(self, network: nn.Module, input_size: tuple[int, int, int]) -> None:
        super().__init__(_FACTORIES)
        # Private: torch.fx patches the functions only where it looks, and autowrap_modules=(torch,) would wrap all of
        # torch's functions and classes.
        self._autowrap_search.append(torch)
        self.values: dict[fx.Node, Any] = {}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
        with self._mode:
            self._example = torch.zeros((2, *input_size), device=like.device, dtype=like.dtype)
        self._evaluating = False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _ExampleProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        self._evaluating = True
        try:
            # Gradients stay on: fake views of parameters cannot be made without.
            with torch.enable_grad(), self._mode:
                self.values[node] = self._evaluate(node)
        finally:
            self._evaluating = False
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._evaluating else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = self.values[obj.node]
        return super().to_bool(obj) if isinstance(value, Tensor) else bool(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return (obj[index] for index in range(len(self.values[obj.node])))  # type: ignore[index]

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: self.values[argument])
        if node.op == "placeholder":
            return self._example
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return getattr(self.root.get_submodule(path), name)
        return args


def tracer_for(network: nn.Module, way: Way, input_size: tuple[int, int, int]) -> _ScopeTracer:
    """A tracer that goes that way."""
    return _ScopeTracer() if way == "symbolic" else _ExampleTracer(network, input_size)


def trace_somehow(network: nn.Module, input_size: tuple[int, int, int]) -> tuple[fx.GraphModule, list[ModuleCall], Way]:
    """Trace a network as torch.fx does, or, where that stops, by example; returned beside `trace`'s result is the way.

    Raises:
        CutError: If neither goes; the message is of the first.
    """
    check_traceable(network)
    try:
        return *trace(network), "symbolic"
    except CutError as error:
        try:
            return *trace(network, tracer_for(network, "example", input_size)), "example"
        except CutError as second:
            raise CutError(f"{error}\nWith an example of {input_size}: {second}") from error
