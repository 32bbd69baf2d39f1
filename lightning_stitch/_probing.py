"""Learn what each node of a traced network yields and costs: one pass over fake tensors, which computes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from lightning_stitch._operators import FORMULAS, UncountedOperators, plain_attention
from lightning_stitch._tracing import left_as_it_was
from lightning_stitch.errors import CutError


@dataclass(frozen=True, slots=True)
class Yield:
    """What a node yields for one batch size: shape and dtype of a tensor, or the value of anything else.

    `memory` is the same for tensors that lie in the same memory (views, results of in-place operations). `uncounted`
    are the operators whose work `macs` leaves out, `written` the arguments that the node wrote into.
    """

    shape: tuple[int, ...] | None
    is_floating: bool
    value: Any
    macs: int
    uncounted: tuple[str, ...]
    written: tuple[fx.Node, ...]
    memory: int | None = None


class _Prober(fx.Interpreter):
    """Runs a graph on fake tensors and notes what every node yields and how many FLOPs it takes."""

    def __init__(self, module: fx.GraphModule, counter: FlopCounterMode, operators: UncountedOperators) -> None:
        super().__init__(module)
        self.extra_traceback = False  # torch.fx would add advice on its own tools to the error
        self.counter = counter
        self.operators = operators
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
        macs = (self.counter.get_total_flops() - before) // 2
        uncounted = self.operators.take()
        written = tuple(argument for argument, version in self._versions(n).items() if version != versions[argument])
        if isinstance(result, Tensor):
            memory = self._memories.setdefault(StorageWeakRef(result.untyped_storage()), len(self._memories))
            self.yields[n] = Yield(
                tuple(result.shape), result.is_floating_point(), None, macs, uncounted, written, memory
            )
        else:
            self.yields[n] = Yield(None, False, result, macs, uncounted, written)
        return result

    def _versions(self, n: fx.Node) -> dict[fx.Node, int]:
        """How often each tensor among a node's arguments, or a view of it, has been written into."""
        found = {argument: self.env[argument] for argument in n.all_input_nodes}
        return {node: t._version for node, t in found.items() if isinstance(t, Tensor) and not t.is_inference()}


def probe(traced: fx.GraphModule, input_size: tuple[int, int, int], *, batch_size: int) -> dict[fx.Node, Yield]:
    """What every node yields for `batch_size` images of that size, and its MACs for the whole batch (eval mode).

    Nothing is computed: the run is on fake tensors. One MAC is one multiply-accumulate, half of what
    `torch.utils.flop_counter` counts; element-wise operations, norms, pooling and resampling count nothing, and the
    operators that it has no formula for are named beside (see `_operators`).

    Raises:
        CutError: If the graph does not accept images of that size; the message names the operation.
    """
    parameter = next(traced.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    dtype = torch.float32 if parameter is None else parameter.dtype
    # What fails becomes a CutError; torch would print its traceback besides.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        operators = UncountedOperators(counter)
        # Gradients stay on: fake views of parameters cannot be made without.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with left_as_it_was(traced), torch.enable_grad(), fake, plain_attention(), operators, counter:
            traced.eval()
            images = torch.zeros((batch_size, *input_size), device=device, dtype=dtype)
            prober = _Prober(traced, counter, operators)
            prober.run(images)
    finally:
        logger.disabled = was_disabled
    return prober.yields


def uncounted_work(yields: Mapping[fx.Node, Yield]) -> tuple[str, ...]:
    """What the nodes' MACs leave out, as "module: operator", in the nodes' order and each once."""
    return tuple(
        dict.fromkeys(f"{_place_of(node)}: {name}" for node, seen in yields.items() for name in seen.uncounted)
    )


def _place_of(node: fx.Node) -> str:
    """Path of the module that a node is or belongs to; the node's own name where that is the network itself."""
    if node.op == "call_module":
        return str(node.target)
    calls = list(node.meta.get("nn_module_stack", {}).values())
    # The first name of each path is the network's own.
    return (calls[-1][0].partition(".")[2] if calls else "") or node.name


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
