"""Learn what each node of a traced network yields and costs: one pass over fake tensors, which computes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from lightning_stitch._memory import Allocations, Footprint, tensors_in
from lightning_stitch._operators import FORMULAS, UncountedOperators, plain_attention
from lightning_stitch._tracing import left_as_it_was
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
    def memory(self) -> int | None:
        """The number of the memory that a tensor lies in."""
        return None if self.shape is None else next(iter(self.footprint.held), None)


class _Prober(fx.Interpreter):
    """Runs a graph on fake tensors and notes what every node yields, how many FLOPs it takes and how much memory."""

    def __init__(
        self,
        module: fx.GraphModule,
        counter: FlopCounterMode,
        operators: UncountedOperators,
        allocations: Allocations,
    ) -> None:
        super().__init__(module)
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
        macs = (self.counter.get_total_flops() - before) // 2
        uncounted = self.operators.take()
        written = tuple(argument for argument, version in self._versions(n).items() if version != versions[argument])
        held = {self._memory_of(x): self.allocations.bytes_of(x) for x in tensors_in(result)}
        footprint = Footprint(held, self.allocations.take())
        if isinstance(result, Tensor):
            self.yields[n] = Yield(
                tuple(result.shape), result.is_floating_point(), None, macs, uncounted, written, footprint
            )
        else:
            self.yields[n] = Yield(None, False, result, macs, uncounted, written, footprint)
        return result

    def _memory_of(self, x: Tensor) -> int:
        return self._memories.setdefault(StorageWeakRef(x.untyped_storage()), len(self._memories))

    def _versions(self, n: fx.Node) -> dict[fx.Node, int]:
        """How often each tensor among a node's arguments, or a view of it, has been written into."""
        found = {argument: self.env[argument] for argument in n.all_input_nodes}
        return {node: t._version for node, t in found.items() if isinstance(t, Tensor) and not t.is_inference()}


def probe(traced: fx.GraphModule, input_size: tuple[int, int, int], *, batch_size: int) -> dict[fx.Node, Yield]:
    """What every node yields for `batch_size` images, and its MACs and bytes for the whole batch (eval mode).

    Nothing is computed: the run is on fake tensors. One MAC is one multiply-accumulate, half of what
    `torch.utils.flop_counter` counts; element-wise operations, norms, pooling and resampling count nothing, and the
    operators that it has no formula for are named beside (see `_operators`). Bytes are those that operators allocate,
    attention run as matrix products.

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
        operators, allocations = UncountedOperators(counter), Allocations()
        # Gradient mode stays on: fake views of parameters cannot be made without.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with (
            left_as_it_was(traced),
            _frozen(traced),
            torch.enable_grad(),
            fake,
            plain_attention(),
            allocations,
            operators,
            counter,
        ):
            traced.eval()
            images = torch.zeros((batch_size, *input_size), device=device, dtype=dtype)
            prober = _Prober(traced, counter, operators, allocations)
            prober.run(images)
    finally:
        logger.disabled = was_disabled
    return prober.yields


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients of parameters, for which a run would keep activations and copy what it then overwrites."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


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
