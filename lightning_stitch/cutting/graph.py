"""Cuts and fragments: where a network can be taken apart, and the parts.

Integers taken from shapes do not count as live: a fragment computes them anew from its own input's batch size.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import fx, nn

from lightning_stitch.cutting.copies import copy_module
from lightning_stitch.cutting.dataflow import Dataflow
from lightning_stitch.cutting.granularity import block_outputs, reference_inputs, with_weights_between
from lightning_stitch.cutting.layouts import layout_of
from lightning_stitch.cutting.outlines import with_network
from lightning_stitch.cutting.probing import value_for_batch
from lightning_stitch.cutting.tracing import follow_device, trace_somehow
from lightning_stitch.cutting.train_mode import train_mode_difference
from lightning_stitch.errors import CutError, nearest
from lightning_stitch.recipe import Format
from lightning_stitch.settings import Granularity

_MOST_PREFIX_TOKENS = 8  # a class token, one of distillation, and a handful of registers


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where exactly one activation tensor is live.

    Attributes:
        name: Path of the outermost module whose output it is, or the graph node's name.
        format: How the tensor is laid out.
        shape: Its shape without the batch dimension.
        grid: (height, width) in steps; None for a vector.
        stride: Pixels of the image for one step on the grid; None for a vector.
        num_prefix_tokens: Class, distillation and register tokens before the grid's (tokens only).
        macs: Multiply-accumulates from the image to here, for one image.
    """

    name: str
    format: Format
    shape: tuple[int, ...]
    grid: tuple[int, int] | None
    stride: float | None
    num_prefix_tokens: int
    macs: int

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[0] if self.format == "NCHW" else self.shape[-1]


class CutGraph:
    """A traced network at one input size: its cuts, the fragments between them, and what they cost.

    Args:
        network: The network; traced in eval mode, its modes are restored and it is not changed.
        input_size: (channels, height, width) of the images.

    Attributes:
        module: The traced network.
        input_size: (channels, height, width) of the images.
        way: "symbolic", good for every input size; or "example", for networks whose Python looks at sizes.

    Raises:
        CutError: If the network cannot be traced, does not accept that input size, or has no cut; or if torch's default
            dtype is not float32.
    """

    def __init__(self, network: nn.Module, input_size: tuple[int, int, int]) -> None:
        if torch.get_default_dtype() != torch.float32:
            raise CutError(
                f"Fragments, stitches and heads compute in float32, but torch's default dtype is "
                f"{torch.get_default_dtype()}. Call torch.set_default_dtype(torch.float32) first."
            )
        self._network = network
        self._num_prefix_tokens = int(getattr(network, "num_prefix_tokens", 0) or 0)
        self._trace(input_size)
        self._resize(input_size)

    def at(self, input_size: tuple[int, int, int]) -> CutGraph:
        """The same network at another input size; traced again only if it was traced by example.

        Raises:
            CutError: If the network does not accept that input size.
        """
        if input_size == self.input_size:
            return self
        graph = copy.copy(self)
        if self.way == "example":
            graph._trace(input_size)
        graph._resize(input_size)
        return graph

    def carry_over(self, network: nn.Module) -> CutGraph | None:
        """The same cuts of the network of which the traced one is an outline; None where `with_network` cannot tell."""
        module = with_network(self.module, self._network, network)
        if module is None:
            return None
        graph = copy.copy(self)
        graph._network, graph.module, graph._flow = network, module, copy.copy(self._flow)
        graph._flow.module = module
        return graph

    def _trace(self, input_size: tuple[int, int, int]) -> None:
        self.module, self._calls, self.way = trace_somehow(self._network, input_size)

    def _resize(self, input_size: tuple[int, int, int]) -> None:
        self.input_size = input_size
        self._flow = Dataflow(self.module, input_size)
        self._input, self._output = self._flow.input, self._flow.output
        self._alone = self._flow.find_sole_live()
        layouts = {node: layout for node in self._flow.nodes if node in self._alone and (layout := self._layout(node))}
        self._cut_nodes = list(layouts)
        if not self._cut_nodes:
            raise CutError(
                f"{type(self.module).__name__} has no place where exactly one activation tensor is live: its branches "
                f"run side by side from the image to the output. Give one branch, or a part that joins them."
            )
        self._names, self._aliases = self._name_cuts()
        self._by_name = {name: node for node, name in self._names.items()}
        self._cuts = {name: self._describe(node, *layouts[node]) for name, node in self._by_name.items()}

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
                (self.find(name) for name in granularity), key=lambda cut: self._flow.position[self._by_name[cut.name]]
            )
        if granularity not in get_args(Granularity):
            raise CutError(
                f"Unknown granularity {granularity!r}; choose from {get_args(Granularity)} or list cut names."
            )
        chosen = self._cut_nodes
        if granularity == "reference":
            chosen = reference_inputs(chosen, self.module)
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
        name_of_cut = self._aliases.get(name, name)
        if name_of_cut not in self._cuts:
            near = nearest(name, [*self._cuts, *self._aliases])
            raise CutError(f'No cut is named {name!r}. Nearest: {near}. cuts(granularity="all") lists all.')
        return self._cuts[name_of_cut]

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
        if len(self._flow.yields_at_2[self._output].shape or ()) == 2:
            return None
        raise CutError(f"{type(self.module).__name__} has no feature vector: its output is not (batch, features).")

    def output_features(self) -> int:
        """Width of the output: number of classes or features."""
        shape = self._flow.yields_at_2[self._output].shape
        assert shape is not None
        return shape[-1]

    # -- fragments -----------------------------------------------------------------------------------------------

    def fragment(self, start: str | None, end: str | None, *, share: bool = False) -> fx.GraphModule:
        """The part of the network between two cuts, as a module with one input and one output.

        It never writes into its input.

        Args:
            start: Name of the cut where it begins; None: at the image.
            end: Name of the cut where it ends; None: at the output.
            share: Whether its parameters are the network's own objects, not copies, through which nothing reaches it.

        Raises:
            CutError: If a cut is unknown or `end` does not lie behind `start`.
        """
        first, last = self._ends(start, end)
        needed, recomputed = self._flow.collect(first, last)
        graph = fx.Graph()
        placeholder = graph.placeholder("x")
        # The caller's tensor is not the fragment's to overwrite.
        writes = self._flow.overwrites(first, needed)
        copies: dict[fx.Node, Any] = {first: graph.call_method("clone", (placeholder,)) if writes else placeholder}
        batch_size = graph.call_method("size", (placeholder, 0)) if recomputed else None
        for node in recomputed:
            two, three = self._flow.yields_at_2[node].value, self._flow.yields_at_3[node].value
            copies[node] = value_for_batch(two, three, lambda k: graph.call_function(operator.mul, (batch_size, k)))
        for node in self._flow.nodes:
            if node in needed:
                copies[node] = graph.node_copy(node, lambda n: copies[n])
                if self._is_view(node, needed):
                    # What a stitch gives may lie in memory in another order than the network's own tensor.
                    copies[node].target = "reshape"
        graph.output(copies[last])
        follow_device(graph, placeholder)
        graph.lint()
        fragment = fx.GraphModule(self.module, graph, class_name="Fragment")
        return fragment if share else copy_module(fragment)

    @property
    def largest_activation(self) -> int:
        """Number of elements of the largest tensor on the way, for one image."""
        return max(math.prod(result.shape) for result in self._flow.yields_at_2.values() if result.shape) // 2

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Work without a FLOP formula that `macs` leaves out, as "blocks.3.attn: torchvision.deform_conv2d"."""
        return self._flow.uncounted(self._flow.collect(self._input, self._output)[0])

    def macs(self, start: str | None, end: str | None) -> int:
        """Multiply-accumulates of the fragment between two cuts, for one image."""
        return self._flow.macs(self._flow.collect(*self._ends(start, end))[0])

    def activation_bytes(self, start: str | None, end: str | None) -> int:
        """The most bytes of activations alive at once in the fragment between two cuts, for one image."""
        return self._flow.activation_bytes(*self._ends(start, end))

    def parameters(self, start: str | None, end: str | None) -> list[nn.Parameter]:
        """The parameters of the fragment between two cuts, each once."""
        return self._parameters_of(self._flow.collect(*self._ends(start, end))[0])

    def train_mode_difference(self) -> str | None:
        """The first operation that the network does in train mode alone, in words; None: there is none."""
        return train_mode_difference(self._network, self.module, self.way, self.input_size)

    # -- inner workings ------------------------------------------------------------------------------------------

    def _ends(self, start: str | None, end: str | None) -> tuple[fx.Node, fx.Node]:
        first = self._input if start is None else self._by_name[self.find(start).name]
        last = self._output if end is None else self._by_name[self.find(end).name]
        if self._flow.position[last] <= self._flow.position[first]:
            raise CutError(f"A fragment goes forward, but cut {end or 'output'!r} does not lie behind {start!r}.")
        return first, last

    def _is_view(self, node: fx.Node, needed: set[fx.Node]) -> bool:
        """Whether a node calls `view` with a shape, and nothing writes into what it gives."""
        plain = node.op == "call_method" and node.target == "view" and not node.kwargs
        return plain and not isinstance(node.args[1], torch.dtype) and not self._flow.overwrites(node, needed)

    def _layout(self, node: fx.Node) -> tuple[Format, int, tuple[int, int] | None] | None:
        shape = self._flow.yields_at_2[node].shape
        if shape is None or not self._flow.is_activation(node):
            return None
        format = layout_of(node, shape, self.module)
        if format == "tokens":
            split = self._split_tokens(shape[1])
            return None if split is None else (format, *split)
        if format is None or format == "vector":
            return None if format is None else (format, 0, None)
        return format, 0, (shape[2], shape[3]) if format == "NCHW" else (shape[1], shape[2])

    def _split_tokens(self, count: int) -> tuple[int, tuple[int, int]] | None:
        """How many of so many tokens are prefix tokens, and the grid of the others; None where they make no grid."""
        _, height, width = self.input_size
        declared = (0, self._num_prefix_tokens)
        for prefix in (*declared, *range(1, _MOST_PREFIX_TOKENS + 1)):
            area = max(count - prefix, 0)
            rows, columns = round(math.sqrt(area * height / width)), round(math.sqrt(area * width / height))
            # A guess must fit the image, too.
            fits = prefix in declared or (rows and height % rows == 0 and width % columns == 0)
            if area and rows * columns == area and fits:
                return prefix, (rows, columns)
        return None

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

    def _describe(self, node: fx.Node, format: Format, prefix: int, grid: tuple[int, int] | None) -> Cut:
        shape = (self._flow.yields_at_2[node].shape or ())[1:]
        stride = None if grid is None else self.input_size[1] / grid[0]
        macs = self._flow.macs(self._flow.collect(self._input, node)[0])
        return Cut(self._names[node], format, shape, grid, stride, prefix, macs)

    def _parameters_of(self, nodes: Iterable[fx.Node]) -> list[nn.Parameter]:
        by_identity: dict[int, nn.Parameter] = {}
        for node in nodes:
            if node.op == "call_module":
                parameters = list(self.module.get_submodule(str(node.target)).parameters())
            elif node.op == "get_attr":
                path, _, name = str(node.target).rpartition(".")
                attribute = getattr(self.module.get_submodule(path), name)
                parameters = [attribute] if isinstance(attribute, nn.Parameter) else []
            else:
                parameters = []
            by_identity.update((id(parameter), parameter) for parameter in parameters)
        return list(by_identity.values())

    def _has_weights_between(self, first: fx.Node, last: fx.Node) -> bool:
        return any(parameter.ndim >= 2 for parameter in self._parameters_of(self._flow.collect(first, last)[0]))
