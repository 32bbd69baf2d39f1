"""Search strategies: generators of candidates, the most promising first as far as CKA can tell.

`DepthFirst` is the StitchNet paper's search; `Beam` follows the best stitches of every size class, so that one search
yields networks from large to small. Filters (validity, repeats, budget, thresholds) come before the choice of the best,
and equal scores are ordered by where they stand, so that the same input gives the same candidates in the same order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from lightning_stitch.errors import StitchError
from lightning_stitch.io import Carried
from lightning_stitch.search.space import Edge, Filters, SearchSpace, State
from lightning_stitch.stitching import Candidate


class Strategy(Protocol):
    """A way through the search space."""

    def __call__(self, space: SearchSpace) -> Iterator[Candidate]:
        """Give candidates, each of which keeps the space's budget."""


@dataclass(frozen=True, slots=True)
class DepthFirst:
    """The StitchNet paper's depth-first search (arXiv 2301.01947, REFERENCE: K, T, L).

    Every fragment lies between two neighbouring cuts, and every transition is a stitch. A source stitched to itself
    throughout is left out: `paths.self_stitched` has it.

    Args:
        span: K, the stitches followed at each step.
        threshold: T, the least product of CKAs.
        edge_threshold: Least CKA of a single stitch.
        max_fragments: L, the most fragments in a network.
        sample: Follow one random path instead of all.
        max_networks: Stop after so many networks; None: when the space is exhausted.
        seed: Of the random path.

    Raises:
        StitchError: If a number is too small to find anything.
    """

    span: int = 2
    threshold: float = 0.5
    edge_threshold: float = 0.5
    max_fragments: int = 16
    sample: bool = False
    max_networks: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check(self.max_fragments, span=self.span, max_networks=self.max_networks)

    def __call__(self, space: SearchSpace) -> Iterator[Candidate]:
        """Give networks in depth-first order."""
        generator = random.Random(self.seed)
        starts = space.starts()
        if self.sample:
            starts = [generator.choice(starts)]
        count = 0
        for state in starts:
            if not space.sources[state.source].activations:
                continue
            first = space.sources[state.source].activations[0]
            for candidate in self._extend(space, state, first, 1, generator):
                yield candidate
                count += 1
                if count == self.max_networks:
                    return

    def _extend(
        self, space: SearchSpace, state: State, activation: Carried, depth: int, generator: random.Random
    ) -> Iterator[Candidate]:
        filters = Filters(
            single_pieces=True,
            only_ends=depth == self.max_fragments - 1,
            min_cka=self.edge_threshold,
            min_product=self.threshold,
        )
        edges = space.edges(state, state.entry, activation, filters)
        best = sorted(edges, key=lambda edge: (-edge.cka, edge.source, edge.receiver))[: self.span]
        if self.sample and best:
            best = [generator.choice(best)]
        for edge in best:
            entered = space.enter(edge, activation)
            if entered.entry == len(space.sources[entered.source].parts.pieces) - 1:
                candidate = space.complete(entered)
                if not space.budget.allows(candidate.cost):
                    space.rejected["over the budget"] += 1
                elif all(a.source == b.source and a.last == b.first for a, b in pairwise(candidate.steps)):
                    space.rejected["a source stitched to itself, which is a candidate already"] += 1
                else:
                    yield candidate
            else:
                _, onward = next(iter(space.walk(entered)))
                yield from self._extend(space, entered, onward, depth + 1, generator)


@dataclass(frozen=True, slots=True)
class Beam:
    """Beam search: of each size class the stitches with the highest product of CKAs are followed.

    A fragment may run over any number of cuts, so that a network has few stitches. A size class is a range of the
    complete network's MACs relative to the cheapest source; without classes, skips (which CKA rates low) would never be
    chosen, and no network would be cheaper than the sources.

    Args:
        width: Stitches followed in each size class and level.
        max_fragments: Most fragments in a network; a network has one stitch fewer.
        fractions: Upper bounds of the size classes, as shares of the cheapest source's MACs. One more class holds what
            is above them all.
        threshold: Least product of CKAs.
        max_upsampling: Most by which a stitch may multiply the number of positions: what a coarse map lacks, no finer
            receiver gets back, and none of these would be among the best.
        deep: Stitches followed besides, in each size class and level, of those alone that leave at least half of the
            network's MACs behind them. CKA rates early skips low, but there healing has much to work with.

    Raises:
        StitchError: If a number is too small to find anything.
    """

    width: int = 4
    max_fragments: int = 3
    fractions: tuple[float, ...] = (1.0, 0.75, 0.5, 1 / 3)
    threshold: float = 0.0
    max_upsampling: float = 2.0
    deep: int = 0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check(self.max_fragments, width=self.width)
        if self.deep < 0:
            raise StitchError(f"deep must be at least 0; found {self.deep}.")
        if not self.max_upsampling >= 1:
            raise StitchError(f"max_upsampling must be at least 1; found {self.max_upsampling}.")

    def __call__(self, space: SearchSpace) -> Iterator[Candidate]:
        """Give networks level by level: all with one stitch, then with two, and so on."""
        cheapest = space.cheapest_source.macs
        states = space.starts()
        filters = Filters(max_upsampling=self.max_upsampling, min_product=self.threshold)
        for level in range(1, self.max_fragments):
            shallow, deep = _ClassBests(self.width), _ClassBests(self.deep)
            for state in states:
                for cut, activation in space.walk(state):
                    for edge in space.edges(state, cut, activation, filters):
                        fits = space.budget.allows(edge.total)
                        # What is over the budget as it stands may still be cut short by a later stitch.
                        if fits or level + 1 < self.max_fragments:
                            size = sum(edge.total.macs <= share * cheapest for share in self.fractions) if fits else -1
                            shallow.offer(size, edge, activation)
                            if self.deep and fits and edge.total.macs - edge.cost.macs >= edge.total.macs / 2:
                                deep.offer(size, edge, activation)
                        else:
                            space.rejected["over the budget"] += 1
            states = []
            best = shallow.best()
            edges = [edge for edge, _ in best]
            for edge, activation in [*best, *(entry for entry in deep.best() if entry[0] not in edges)]:
                state = space.enter(edge, activation)
                states.append(state)
                if space.budget.allows(edge.total):
                    yield space.complete(state)


class _ClassBests:
    """The best edges of each class, and the activations that they leave from, no others.

    Within a class no two edges share (sender's source, receiver) or (sender's cut, receiver's source): neighbouring
    cuts score alike, and one of them is enough.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._classes: dict[int, list[tuple[Edge, Carried]]] = {}

    def offer(self, size_class: int, edge: Edge, activation: Carried) -> None:
        candidates = [*self._classes.get(size_class, []), (edge, activation)]
        best: list[tuple[Edge, Carried]] = []
        for entry in sorted(candidates, key=lambda entry: _order(entry[0])):
            if not any(_alike(entry[0], better) for better, _ in best) and len(best) < self.width:
                best.append(entry)
        self._classes[size_class] = best

    def best(self) -> Sequence[tuple[Edge, Carried]]:
        entries = [entry for best in self._classes.values() for entry in best]
        return sorted(entries, key=lambda entry: _order(entry[0]))


def _order(edge: Edge) -> tuple[float, int, int, int, int]:
    return -edge.product, edge.state.source, edge.cut, edge.source, edge.receiver


def _alike(a: Edge, b: Edge) -> bool:
    same_receiver = (a.state.source, a.source, a.receiver) == (b.state.source, b.source, b.receiver)
    same_sender = (a.state.source, a.cut, a.source) == (b.state.source, b.cut, b.source)
    return same_receiver or same_sender


def _check(max_fragments: int, **positive: int | None) -> None:
    for name, value in positive.items():
        if value is not None and value < 1:
            raise StitchError(f"{name} must be at least 1; found {value}.")
    if max_fragments < 2:
        raise StitchError(f"max_fragments must be at least 2, or nothing can be stitched; found {max_fragments}.")
