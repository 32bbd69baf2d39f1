"""How many bytes of activations are alive at once, from what a dry run allocates and the order in which nodes read it.

An activation is memory that an operator allocates; parameters, buffers and views of either are none. It lives from the
node that makes it to the last one that reads it, or a view of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Notes the memory that operators allocate, and how much of it is alive at once."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._bytes: dict[StorageWeakRef, int] = {}
        self._alive: dict[StorageWeakRef, int] = {}
        self._most = 0

    def take(self) -> int:
        """The most bytes that were alive at once of what was allocated since the last call."""
        most, self._most, self._alive = self._most, 0, {}
        return most

    def bytes_of(self, x: Tensor) -> int:
        """Bytes of the memory that a tensor lies in; 0 where no operator has allocated it."""
        return self._bytes.get(StorageWeakRef(x.untyped_storage()), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = getattr(func, "_schema", None)
        # Views and in-place operators give memory that is there already.
        if schema is None or not any(returned.alias_info is not None for returned in schema.returns):
            for x in tensors_in(result):
                reference = StorageWeakRef(x.untyped_storage())
                if reference not in self._bytes:
                    self._bytes[reference] = self._alive[reference] = x.untyped_storage().nbytes()
            self._alive = {reference: size for reference, size in self._alive.items() if not reference.expired()}
            self._most = max(self._most, sum(self._alive.values()))
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The dense tensors that a value is or contains."""
    return (x for x in tree_leaves(value) if isinstance(x, Tensor) and x.layout is torch.strided)


class Footprint(NamedTuple):
    """What one node needs, in bytes: of the memory that its result lies in, by the memory's number, and while it runs.

    The second is the most that is alive at once of what it allocates, its result included, its arguments not.
    """

    held: Mapping[int, int]
    most: int


class _Folded(NamedTuple):
    """The same as `Occupancy`'s figures up to the layer that takes a stitch in, and what is alive beside its result."""

    beside: int
    behind: int
    at_layer: int
    layer_has_entry: bool


@dataclass(frozen=True, slots=True)
class Occupancy:
    """The bytes of activations that are alive at once in a fragment, for one image.

    Attributes:
        entry: Bytes of the memory that its input lies in where it goes on in its own network.
        exit: Bytes of the memory that its output lies in.
        beside: The most that is alive beside its input.
        behind: The most that is alive when its input is no longer needed.
        copies: Whether it copies its input, which it would overwrite, when a stitch leads to it.
        folded: Figures for a stitch that is folded into its last layer; None: it ends in no such layer.
    """

    entry: int
    exit: int
    beside: int
    behind: int
    copies: bool
    folded: _Folded | None

    def peak(self, *, entry: int | None = None, exit: int | None = None) -> int:
        """The most that is alive at once.

        Args:
            entry: Bytes that a stitch before it gives; None: it goes on in its own network.
            exit: Bytes that its last layer yields once it has taken the stitch behind it in; None: it has not.
        """
        own, entered = entry is None, self.entry if entry is None else entry
        beside, behind = self.beside, self.behind
        if exit is not None:
            assert self.folded is not None
            beside, behind, at_layer, layer_has_entry = self.folded
            behind = max(behind, at_layer + exit + (entered if layer_has_entry else 0))
        copied = 2 * entered if self.copies and not own else 0
        return max(behind, beside + entered, copied)

    def after(self, other: int) -> Occupancy:
        """The same, behind something that runs first and at its peak has so many bytes alive."""
        folded = self.folded and self.folded._replace(behind=max(self.folded.behind, other))
        return dataclasses.replace(self, behind=max(self.behind, other), folded=folded)


def occupancy(
    nodes: Sequence[fx.Node],
    output: fx.Node,
    footprints: Mapping[fx.Node, Footprint],
    *,
    copies: bool = False,
    last_layer: fx.Node | None = None,
) -> Occupancy:
    """What is alive in a fragment.

    Args:
        nodes: Its input and the nodes that it runs, in their order.
        output: The node whose result it gives.
        footprints: What each node needs.
        copies: Whether it copies its input when a stitch leads to it.
        last_layer: The layer that can take a stitch behind the fragment in.
    """
    place = {node: index for index, node in enumerate(nodes)}
    sizes: dict[int, int] = {}
    made: dict[int, int] = {}
    needed: dict[int, int] = {}
    for index, node in enumerate(nodes):
        until = max((place[user] for user in node.users if user in place), default=index)
        until = len(nodes) if node is output else max(until, index)
        for memory, size in footprints[node].held.items():
            sizes[memory] = size
            made.setdefault(memory, index)
            needed[memory] = max(needed.get(memory, 0), until)
    entry = [memory for memory in sizes if made[memory] == 0]
    beside = behind = 0
    folded = None
    for index in range(1, len(nodes)):
        alive = sum(sizes[m] for m in sizes if 0 < made[m] < index <= needed[m])
        has_entry = any(index <= needed[m] for m in entry)
        if nodes[index] is last_layer:
            folded = _Folded(beside, behind, alive, has_entry)
        if has_entry:
            beside = max(beside, alive + footprints[nodes[index]].most)
        else:
            behind = max(behind, alive + footprints[nodes[index]].most)
    return Occupancy(
        entry=sum(sizes[m] for m in entry),
        exit=sum(footprints[output].held.values()),
        beside=beside,
        behind=behind,
        copies=copies,
        folded=folded,
    )
