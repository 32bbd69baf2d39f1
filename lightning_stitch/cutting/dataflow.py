"""What reaches what in a traced network: where one activation alone is live, and which nodes a fragment needs.

Sizes, and tensors made of sizes alone (position tables, masks), do not count as live: they can be made anew from the
batch size, because two dry runs, of two and of three images, tell what depends on it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from torch import fx

from lightning_stitch.cutting.activation_memory import Footprint, peak_bytes
from lightning_stitch.cutting.probing import is_linear_in_batch, probe, uncounted_work
from lightning_stitch.cutting.tracing import is_in_place
from lightning_stitch.errors import CutError


class Dataflow:
    """A traced network at one input size.

    Attributes:
        nodes: The graph's nodes in order; `position` has the index of each.
        input: The images' node; `output` is that of the result.
        yields_at_2: What each node yields for two images; `yields_at_3` for three.
        writers: For each node the later ones that write into its memory, their results read or not.

    Raises:
        CutError: If it does not accept images of that size, or gives more than one tensor.
    """

    def __init__(self, module: fx.GraphModule, input_size: tuple[int, int, int]) -> None:
        self.module = module
        self.nodes = list(module.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.input = next(node for node in self.nodes if node.op == "placeholder")
        output = next(node for node in self.nodes if node.op == "output")
        # Two batch sizes tell the batch dimension from a constant, in shapes and in integers alike.
        self.yields_at_2 = probe(module, input_size, batch_size=2)
        if self.yields_at_2[output].shape is None:
            raise CutError(
                f"{type(module).__name__} returns {_describe(self.yields_at_2[output].value)}, not one tensor. Give "
                f"a part of it that returns one, or wrap it in a module whose forward picks one."
            )
        self.output = output.all_input_nodes[0]
        self.yields_at_3 = probe(module, input_size, batch_size=3)
        self.writers = self._find_writers()
        self._of_pixels = self._find_of_pixels()

    def descendants(self, first: fx.Node) -> set[fx.Node]:
        """All nodes that a node reaches, itself among them."""
        reached = {first}
        for node in self.nodes[self.position[first] + 1 :]:
            if any(argument in reached for argument in node.all_input_nodes):
                reached.add(node)
        return reached

    def collect(self, first: fx.Node, last: fx.Node) -> tuple[set[fx.Node], list[fx.Node]]:
        """The nodes that a fragment from one node to another needs, and the sizes from before it, to be made anew.

        Raises:
            CutError: If more than the first node's tensor reaches the last.
        """
        behind = self.descendants(first)
        needed: set[fx.Node] = set()
        recomputed: list[fx.Node] = []
        until = len(self.nodes) if last is self.output else self.position[last]
        stack = [last, *(w for w in self.writers.get(first, ()) if self.position[w] < until)]
        while stack:
            node = stack.pop()
            if node is first or node in needed or node in recomputed:
                continue
            if self._is_size(node) and node not in behind:
                recomputed.append(node)
                continue
            if node is self.input:
                raise CutError(f"More than the tensor at {first.name!r} reaches {last.name!r}.")
            needed.add(node)
            stack.extend(node.all_input_nodes)
            stack.extend(w for w in self.writers.get(node, ()) if self.position[w] < until)
        return needed, recomputed

    def find_sole_live(self) -> set[fx.Node]:
        """The nodes that are at some point the only live ones that hold something of the images."""
        needed, _ = self.collect(self.input, self.output)
        live_until: dict[fx.Node, int] = {}
        for node in (self.input, *needed):
            if node in self._of_pixels:
                readers = [user for user in node.users if user in needed and user in self._of_pixels]
                live_until[node] = max((self.position[user] for user in readers), default=self.position[node])
        live_until[self.output] = len(self.nodes)
        starts = {self.position[node]: node for node in live_until}
        live: set[fx.Node] = set()
        alone: set[fx.Node] = set()
        for position in range(len(self.nodes)):
            live = {node for node in live if live_until[node] > position}
            if position in starts:
                live.add(starts[position])
            if len(live) == 1:
                alone |= live
        return alone

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a node yields one floating-point tensor for each image, and the network can go on from it alone."""
        if node in (self.input, self.output) or not self.descendants(node).issuperset(self.writers.get(node, ())):
            return False
        two, three = self.yields_at_2[node], self.yields_at_3[node]
        if two.shape is None or three.shape is None or not two.is_floating or not two.shape:
            return False
        if (two.shape[0], three.shape[0]) != (2, 3) or two.shape[1:] != three.shape[1:]:
            return False
        return all(
            is_linear_in_batch(self.yields_at_2[size].value, self.yields_at_3[size].value)
            for size in self.collect(node, self.output)[1]
        )

    def macs(self, nodes: Iterable[fx.Node]) -> int:
        """For one image; work that is the same for any batch, as on position tables, counts in full."""
        return sum(2 * self.yields_at_2[node].macs - self.yields_at_3[node].macs for node in nodes)

    def activation_bytes(self, first: fx.Node, last: fx.Node) -> int:
        """The most bytes of activations that are alive at once on the way from one node to another, for one image."""
        needed, _ = self.collect(first, last)
        nodes = [first, *(node for node in self.nodes if node in needed)]
        return peak_bytes(nodes, last, {node: self._footprint(node) for node in nodes})

    def overwrites(self, first: fx.Node, nodes: Container[fx.Node]) -> bool:
        """Whether one of the nodes writes into a node's memory."""
        return any(writer in nodes for writer in self.writers.get(first, ()))

    def uncounted(self, nodes: Container[fx.Node]) -> tuple[str, ...]:
        """What `macs` leaves out, as "module: operator"."""
        return uncounted_work({node: result for node, result in self.yields_at_2.items() if node in nodes})

    def _footprint(self, node: fx.Node) -> Footprint:
        """For one image; what is the same for any batch counts in full, as in `macs`."""
        two, three = self.yields_at_2[node].footprint, self.yields_at_3[node].footprint
        sizes = zip(two.held, two.held.values(), three.held.values(), strict=False)
        held = {memory: 2 * of_two - of_three for memory, of_two, of_three in sizes}
        return Footprint(held, 2 * two.most - three.most)

    def _find_writers(self) -> dict[fx.Node, list[fx.Node]]:
        memory = {node: result.memory for node, result in self.yields_at_2.items()}
        written = [
            (node, memory[argument])
            for node in self.nodes
            for argument in node.all_input_nodes
            # What did not write in this run, such as dropout, may do so in train mode.
            if argument in self.yields_at_2[node].written
            or (argument is node.all_input_nodes[0] and is_in_place(node, self.module))
        ]
        return {
            node: [w for w, m in written if m == mine and self.position[w] > self.position[node]]
            for node, mine in memory.items()
            if mine is not None
        }

    def _find_of_pixels(self) -> set[fx.Node]:
        of_pixels = {self.input}
        for node in self.nodes:
            is_reached = any(argument in of_pixels for argument in node.all_input_nodes)
            if is_reached and node in self.yields_at_2 and self.yields_at_2[node].holds_tensor:
                of_pixels.add(node)
        return of_pixels

    def _is_size(self, node: fx.Node) -> bool:
        """True for sizes, devices and types that come from a tensor, and integers made of them."""
        if node is self.input or node not in self.yields_at_2 or self.yields_at_2[node].holds_tensor:
            return False
        return bool(node.all_input_nodes)


def _describe(value: Any) -> str:
    kind = type(value).__name__.removeprefix("immutable_")  # torch.fx's own dicts and lists
    if isinstance(value, dict):
        return f"a {kind} of {', '.join(map(repr, value))}"
    if isinstance(value, list | tuple):
        return f"a {kind} of {len(value)}"
    return "None" if value is None else f"a {kind}"
