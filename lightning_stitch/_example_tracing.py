"""Trace by example: for networks whose Python looks at sizes, which torch.fx alone cannot follow.

Every node is evaluated on fake tensors as it is made, so that `if x.ndim != 4`, `len(x)`, `range(x.shape[1])` and loops
over shapes get their answers. The answers hold for images of the example's size; what depends on values still stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_stitch._tracing import ModuleCall, ScopeTracer, WritableProxy, check_traceable, trace
from lightning_stitch.errors import CutError

Way = Literal["symbolic", "example"]


# They make tensors of sizes alone, without a tensor among their arguments by which torch.fx would notice them.
_FACTORIES = (torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.zeros)


class _ExampleProxy(WritableProxy):
    """A proxy that knows what it stands for."""

    tracer: ExampleTracer

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


class ExampleTracer(ScopeTracer):
    """A tracer that answers questions about sizes from an example.

    Args:
        input_size: (channels, height, width) of the example's images.
        like: Gives the example's device and dtype.

    Attributes:
        values: What each node stands for; tensors are fake.
    """

    # A method of a buffer with a size among its arguments is noticed only if the buffer is a proxy.
    proxy_buffer_attributes = True

    def __init__(self, input_size: tuple[int, int, int], like: Tensor) -> None:
        super().__init__(_FACTORIES)
        self._autowrap_search.append(torch)
        self.values: dict[fx.Node, Any] = {}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
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


def tracer_for(network: nn.Module, way: Way, input_size: tuple[int, int, int]) -> ScopeTracer:
    """A tracer that goes that way."""
    if way == "symbolic":
        return ScopeTracer()
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    return ExampleTracer(input_size, like)


def trace_somehow(network: nn.Module, input_size: tuple[int, int, int]) -> tuple[fx.GraphModule, list[ModuleCall], Way]:
    """Trace a network as torch.fx does, or, where that stops, by example.

    Returns:
        As `trace`, and which way it went.

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
