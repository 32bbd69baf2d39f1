"""How many bytes of activations are alive at once, from what a dry run allocates and the order in which nodes read it.

An activation is memory that an operator allocates; parameters, buffers and views of either are none. It lives from the
node that makes it to the last one that reads it, or a view of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def peak_bytes(nodes: Sequence[fx.Node], output: fx.Node, footprints: Mapping[fx.Node, Footprint]) -> int:
    """The most bytes of activations that are alive at once in a fragment: its input, then nodes in their order."""
    place = {node: index for index, node in enumerate(nodes)}
    sizes: dict[int, int] = {}
    first: dict[int, int] = {}
    needed: dict[int, int] = {}
    for index, node in enumerate(nodes):
        until = max((place[user] for user in node.users if user in place), default=index)
        until = len(nodes) if node is output else max(until, index)
        for memory, size in footprints[node].held.items():
            sizes[memory] = size
            first.setdefault(memory, index)
            needed[memory] = max(needed.get(memory, 0), until)
    peak = sum(footprints[nodes[0]].held.values())
    for index, node in enumerate(nodes[1:], start=1):
        alive = sum(size for memory, size in sizes.items() if first[memory] < index <= needed[memory])
        peak = max(peak, alive + footprints[node].most)
    return peak
