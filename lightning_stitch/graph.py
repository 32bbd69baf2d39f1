"""Cuts and fragments: where a network can be taken apart, and the parts.

A cut is a place where exactly one activation tensor is live, so that all that lies behind it depends on that tensor
alone. Residual, dense and branching blocks need no special case: inside them several tensors are live. Integers taken
from shapes do not count as live: a fragment computes them anew from its own input's batch size.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import fx, nn

from lightning_stitch._granularity import block_outputs, reference_inputs, with_weights_between
from lightning_stitch._layout import layout_of
from lightning_stitch._tracing import holds_tensor, is_in_place, is_linear_in_batch, probe, trace, value_for_batch
from lightning_stitch.errors import CutError
from lightning_stitch.recipe import Format

Granularity = Literal["stages", "blocks", "reference", "all"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where exactly one activation tensor is live.

    Attributes:
        name: Path of the outermost module whose output it is, or the graph node's name.
        format: How the tensor is laid out.
        shape: Its shape without the batch dimension.
        stride: Pixels of the image for one step on the grid; None for a vector.
        num_prefix_tokens: Class, distillation and register tokens before the grid's (tokens only).
        macs: Multiply-accumulates from the image to here, for one image.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    stride: float | None
    num_prefix_tokens: int
    macs: int

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[0] if self.format == "NCHW" else self.shape[-1]

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) in steps; None for a vector."""
        return _grid(self.format, self.shape, self.num_prefix_tokens)


class CutGraph:
    """A traced network at one input size: its cuts, the fragments between them, and what they cost.

    Args:
        network: The network; traced in eval mode, its modes are restored and it is not changed.
        input_size: (channels, height, width) of the images.

    Raises:
        CutError: If the network cannot be traced, does not accept that input size, or has no cut.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int, int]) -> None:
        self.module, self._calls = trace(network)
        self._nodes = list(self.module.graph.nodes)
        self._position = {node: index for index, node in enumerate(self._nodes)}
        self._input = next(node for node in self._nodes if node.op == "placeholder")
        self._output = next(node for node in self._nodes if node.op == "output").args[0]
        if not isinstance(self._output, fx.Node):
            raise CutError(
                f"{type(network).__name__} returns more than one tensor; give a part of it that returns one."
            )
        self._num_prefix_tokens = int(getattr(network, "num_prefix_tokens", 0) or 0)
        self._resize(input_size)

    def at(self, input_size: tuple[int, int, int]) -> CutGraph:
        """The same traced network at another input size, without tracing again.

        Raises:
            CutError: If the network does not accept that input size.
        """
        if input_size == self.input_size:
            return self
        other = copy.copy(self)
        other._resize(input_size)
        return other

    def _resize(self, input_size: tuple[int, int, int]) -> None:
        self.input_size = input_size
        # Two batch sizes tell the batch dimension from a constant, in shapes and in integers alike.
        self._yields = probe(self.module, input_size, batch_size=2)
        self._yields_of_three = probe(self.module, input_size, batch_size=3)
        self._from_input = self._descendants(self._input)
        self._writers = self._find_writers()
        self._alone = self._find_alone()
        self._cut_nodes = [node for node in self._nodes if node in self._alone and self._is_cut(node)]
        if not self._cut_nodes:
            raise CutError(f"{type(self.module).__name__} has no place where exactly one activation tensor is live.")
        self._names, self._aliases = self._name_cuts()
        self._by_name = {name: node for node, name in self._names.items()}
        self._cuts = {name: self._describe(node) for name, node in self._by_name.items()}

    # -- cuts ----------------------------------------------------------------------------------------------------

    def cuts(self, granularity: Granularity | Sequence[str] = "blocks") -> list[Cut]:
        """The cuts of that granularity, from the image to the output.

        Args:
            granularity: "blocks": between the blocks of the trunk, each fragment with weights of its own.
                "stages": the last of these before each change of the grid. "reference": the StitchNet authors' rule,
                the inputs of ungrouped convolutions and linear layers whose consumers are all convolutions.
                "all": every cut. Or a list of names.

        Raises:
            CutError: If a name is unknown; the nearest names are offered.
        """
        if not isinstance(granularity, str):
            return sorted(
                (self.find(name) for name in granularity), key=lambda cut: self._position[self._by_name[cut.name]]
            )
        if granularity not in get_args(Granularity):
            raise CutError(
                f"Unknown granularity {granularity!r}; choose from {get_args(Granularity)} or list cut names."
            )
        chosen = self._cut_nodes
        if granularity == "reference":
            chosen = reference_inputs(chosen, self.module, self._first_layer())
        elif granularity != "all":
            blocks = block_outputs(self._calls, self._alone)
            chosen = with_weights_between(
                [node for node in chosen if node in blocks], self._output, self._has_weights_between
            )
        cuts = [self._cuts[self._names[node]] for node in chosen]
        if granularity == "stages":
            following = [*cuts[1:], None]
            cuts = [cut for cut, after in zip(cuts, following, strict=True) if after is None or after.grid != cut.grid]
        return cuts

    def find(self, name: str) -> Cut:
        """The cut of that name, or of a module whose output it is.

        Raises:
            CutError: If there is none; the three nearest names are offered.
        """
        known = self._aliases.get(name, name)
        if known not in self._cuts:
            near = difflib.get_close_matches(name, [*self._cuts, *self._aliases], n=3, cutoff=0.0)
            raise CutError(f'No cut is named {name!r}. Nearest: {", ".join(near)}. cuts(granularity="all") lists all.')
        return self._cuts[known]

    def feature_cut(self) -> Cut | None:
        """The vector that the final classifier reads; None where the output itself is the feature vector.

        Raises:
            CutError: If neither a vector is live before the last weights nor the output is a vector.
        """
        for node in reversed(self._cut_nodes):
            if self._has_weights_between(node, self._output):
                cut = self._cuts[self._names[node]]
                if cut.format == "vector":
                    return cut
                break
        if self._yields[self._output].shape is not None and len(self._yields[self._output].shape or ()) == 2:
            return None
        raise CutError(f"{type(self.module).__name__} has no feature vector: its output is not (batch, features).")

    def output_features(self) -> int:
        """Width of the output: number of classes or features."""
        shape = self._yields[self._output].shape
        assert shape is not None
        return shape[-1]

    # -- fragments -----------------------------------------------------------------------------------------------

    def fragment(self, start: str | None, end: str | None, *, share: bool = False) -> fx.GraphModule:
        """The part of the network between two cuts, as a module with one input and one output.

        It never writes into its input.

        Args:
            start: Name of the cut where it begins; None: at the image.
            end: Name of the cut where it ends; None: at the output.
            share: True: its parameters are the network's own objects. False: copies, so that nothing done to the
                fragment reaches the network.

        Raises:
            CutError: If a cut is unknown or `end` does not lie behind `start`.
        """
        first, last = self._ends(start, end)
        kept, recomputed = self._collect(first, last)
        graph = fx.Graph()
        placeholder = graph.placeholder("x")
        # The caller's tensor is not the fragment's to overwrite.
        writes = any(writer in kept for writer in self._writers[first])
        made: dict[fx.Node, Any] = {first: graph.call_method("clone", (placeholder,)) if writes else placeholder}
        batch_size = graph.call_method("size", (placeholder, 0)) if recomputed else None
        for node in recomputed:
            two, three = self._yields[node].value, self._yields_of_three[node].value
            made[node] = value_for_batch(two, three, lambda k: graph.call_function(_times, (batch_size, k)))
        for node in self._nodes:
            if node in kept:
                made[node] = graph.node_copy(node, lambda n: made[n])
        graph.output(made[last])
        graph.lint()
        fragment = fx.GraphModule(self.module, graph, class_name="Fragment")
        return fragment if share else copy.deepcopy(fragment)

    @property
    def largest_activation(self) -> int:
        """Number of elements of the largest tensor on the way, for one image."""
        return max(math.prod(seen.shape) for seen in self._yields.values() if seen.shape) // 2

    def macs(self, start: str | None, end: str | None) -> int:
        """Multiply-accumulates of the fragment between two cuts, for one image."""
        return self._macs_of(self._collect(*self._ends(start, end))[0])

    def parameters(self, start: str | None, end: str | None) -> list[nn.Parameter]:
        """The parameters of the fragment between two cuts, each once."""
        return self._parameters_of(self._collect(*self._ends(start, end))[0])

    def nodes_after(self, name: str | None) -> list[fx.Node]:
        """The graph nodes that read a cut's tensor; None: the image's."""
        return list((self._input if name is None else self._by_name[self.find(name).name]).users)

    # -- inner workings ------------------------------------------------------------------------------------------

    def _ends(self, start: str | None, end: str | None) -> tuple[fx.Node, fx.Node]:
        first = self._input if start is None else self._by_name[self.find(start).name]
        last = self._output if end is None else self._by_name[self.find(end).name]
        if self._position[last] <= self._position[first]:
            raise CutError(f"A fragment goes forward, but cut {end or 'output'!r} does not lie behind {start!r}.")
        return first, last

    def _descendants(self, first: fx.Node) -> set[fx.Node]:
        found = {first}
        for node in self._nodes[self._position[first] + 1 :]:
            if any(argument in found for argument in node.all_input_nodes):
                found.add(node)
        return found

    def _find_writers(self) -> dict[fx.Node, list[fx.Node]]:
        """For each node the later ones that write into its memory, their results read or not (y.view(-1).add_(1))."""
        memory = {node: seen.memory for node, seen in self._yields.items()}
        written = [
            (node, memory[node.all_input_nodes[0]])
            for node in self._nodes
            if node.all_input_nodes and is_in_place(node, self.module)
        ]
        return {
            node: [w for w, m in written if m == mine and self._position[w] > self._position[node]]
            for node, mine in memory.items()
            if mine is not None
        }

    def _is_shape_value(self, node: fx.Node) -> bool:
        """True for sizes and integers that come from a tensor's shape, not from its values."""
        seen = self._yields.get(node)
        return seen is not None and seen.shape is None and node in self._from_input and not holds_tensor(seen.value)

    def _collect(self, first: fx.Node, last: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
        """The nodes of the fragment, and the shape values from before it that must be recomputed."""
        behind = self._descendants(first)
        kept: set[fx.Node] = set()
        recomputed: list[fx.Node] = []
        until = len(self._nodes) if last is self._output else self._position[last]
        stack = [last, *(w for w in self._writers.get(first, ()) if self._position[w] < until)]
        while stack:
            node = stack.pop()
            if node is first or node in kept or node in recomputed:
                continue
            if self._is_shape_value(node) and node not in behind:
                recomputed.append(node)
                continue
            if node is self._input:
                raise CutError(f"More than the tensor at {first.name!r} reaches {last.name!r}.")
            kept.add(node)
            stack.extend(node.all_input_nodes)
            stack.extend(w for w in self._writers.get(node, ()) if self._position[w] < until)
        return kept, recomputed

    def _find_alone(self) -> set[fx.Node]:
        """The nodes that are at some point the only live ones."""
        needed, _ = self._collect(self._input, self._output)
        live_until: dict[fx.Node, int] = {}
        for node in (self._input, *needed):
            if node in self._from_input and not self._is_shape_value(node):
                readers = [user for user in node.users if user in needed and not self._is_shape_value(user)]
                live_until[node] = max((self._position[user] for user in readers), default=self._position[node])
        live_until[self._output] = len(self._nodes)
        starts = {self._position[node]: node for node in live_until}
        live: set[fx.Node] = set()
        found: set[fx.Node] = set()
        for position in range(len(self._nodes)):
            live = {node for node in live if live_until[node] > position}
            if position in starts:
                live.add(starts[position])
            if len(live) == 1:
                found |= live
        return found

    def _is_cut(self, node: fx.Node) -> bool:
        if node in (self._input, self._output) or not self._descendants(node).issuperset(self._writers.get(node, ())):
            return False
        two, three = self._yields[node].shape, self._yields_of_three[node].shape
        if two is None or three is None or not self._yields[node].is_floating:
            return False
        if (two[0], three[0]) != (2, 3) or two[1:] != three[1:] or layout_of(node, two, self.module) is None:
            return False
        format = layout_of(node, two, self.module)
        if format == "tokens" and _grid(format, two[1:], self._num_prefix_tokens) is None:
            return False
        return all(
            is_linear_in_batch(self._yields[n].value, self._yields_of_three[n].value)
            for n in self._collect(node, self._output)[1]
        )

    def _name_cuts(self) -> tuple[dict[fx.Node, str], dict[str, str]]:
        paths: dict[fx.Node, list[str]] = {}
        for call in self._calls:
            if call.output is not None and call.path:
                paths.setdefault(call.output, []).append(call.path)
        names: dict[fx.Node, str] = {}
        aliases: dict[str, str] = {}
        taken: dict[str, int] = {}
        for node in self._cut_nodes:
            # Calls return inner ones first, so the last path is the outermost module's.
            name = paths[node][-1] if node in paths else node.name
            taken[name] = taken.get(name, 0) + 1
            names[node] = name if taken[name] == 1 else f"{name}@{taken[name]}"
        for node, name in names.items():
            for alias in (*paths.get(node, ()), node.name):
                if alias not in taken:
                    aliases.setdefault(alias, name)
        return names, aliases

    def _describe(self, node: fx.Node) -> Cut:
        shape = (self._yields[node].shape or ())[1:]
        format = layout_of(node, (2, *shape), self.module)
        assert format is not None
        prefix = self._num_prefix_tokens if format == "tokens" else 0
        grid = _grid(format, shape, prefix)
        stride = None if grid is None else self.input_size[1] / grid[0]
        macs = self._macs_of(self._collect(self._input, node)[0])
        return Cut(self._names[node], format, shape, stride, prefix, macs)

    def _macs_of(self, nodes: Iterable[fx.Node]) -> int:
        """For one image; work that is the same for any batch, as on position tables, counts in full."""
        return sum(2 * self._yields[node].macs - self._yields_of_three[node].macs for node in nodes)

    def _parameters_of(self, nodes: Iterable[fx.Node]) -> list[nn.Parameter]:
        found: dict[int, nn.Parameter] = {}
        for node in nodes:
            if node.op == "call_module":
                parameters = list(self.module.get_submodule(str(node.target)).parameters())
            elif node.op == "get_attr":
                path, _, name = str(node.target).rpartition(".")
                attribute = getattr(self.module.get_submodule(path), name)
                parameters = [attribute] if isinstance(attribute, nn.Parameter) else []
            else:
                parameters = []
            found.update((id(parameter), parameter) for parameter in parameters)
        return list(found.values())

    def _has_weights_between(self, first: fx.Node, last: fx.Node) -> bool:
        return any(parameter.ndim >= 2 for parameter in self._parameters_of(self._collect(first, last)[0]))

    def _first_layer(self) -> fx.Node | None:
        for node in self._nodes:
            if node.op == "call_module" and isinstance(
                self.module.get_submodule(str(node.target)), nn.Conv2d | nn.Linear
            ):
                return node
        return None


def _grid(format: Format, shape: tuple[int, ...], num_prefix_tokens: int) -> tuple[int, int] | None:
    if format == "NCHW":
        return shape[1], shape[2]
    if format == "NHWC":
        return shape[0], shape[1]
    if format == "tokens":
        side = math.isqrt(max(shape[0] - num_prefix_tokens, 0))
        return (side, side) if side and side * side == shape[0] - num_prefix_tokens else None
    return None


def _times(batch_size: int, count: int) -> int:
    return batch_size * count
