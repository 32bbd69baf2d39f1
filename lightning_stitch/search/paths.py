"""Compositions along a given path: the references of every search, early exits, and those that a user names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from lightning_stitch.cost import Budget
from lightning_stitch.errors import CalibrationError, StitchError, nearest
from lightning_stitch.recipe import FragmentRef
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.stitching import Candidate, Segmented, Step, is_bridgeable


def unmodified(space: SearchSpace) -> list[Candidate]:
    """Every source as it is."""
    return [space.complete(state, kind="source") for state in space.starts()]


def self_stitched(space: SearchSpace) -> Iterator[Candidate]:
    """Every source stitched to itself at each of its cuts that varies, one after the other."""
    for index, source in enumerate(space.sources):
        state = space.starts()[index]
        for cut in range(len(source.parts.cuts)):
            activation = next(x for at, x in space.walk(state) if at == cut)
            edge = space.edge(state, cut, activation, index, cut)
            if edge is not None:
                state = space.enter(edge, activation)
        yield space.complete(state, kind="self-stitched")


def early_exits(space: SearchSpace) -> list[Candidate]:
    """Every source ended at each of its cuts that varies.

    Those that do not keep the budget are left out and counted.
    """
    exits = []
    for state in space.starts():
        source = space.sources[state.source]
        for cut, statistics in enumerate(source.statistics):
            candidate = space.exit(state, cut)
            if statistics.centred is None:
                space.rejected["activation at an early exit does not vary"] += 1
            elif not space.budget.allows(candidate.cost):
                space.rejected["over the budget"] += 1
            else:
                exits.append(candidate)
    return exits


def on_smaller_images(
    parts: Sequence[Segmented], costs: CompositionCosts, budget: Budget, *, before: Sequence[Segmented]
) -> list[Candidate]:
    """Every source on a smaller image, whole and ended at each of its cuts, that keeps a budget.

    `parts` are the sources at these sizes, which stand behind those `before` them among the sources at hand.
    """
    candidates = []
    for index, part in enumerate(parts):
        ends = range(1 if costs.early_exits else len(part.pieces), len(part.pieces) + 1)
        for last in ends:
            cost = costs.run(index, 0, last)
            if budget.allows(cost):
                way = (Step(len(before) + index, 0, last),)
                candidates.append(Candidate.of("smaller image", [way], [*before, *parts], cost, {"cka_product": 1.0}))
    return candidates


def follow(space: SearchSpace, fragments: Sequence[FragmentRef]) -> Candidate:
    """The network of these fragments, in this order, with a stitch between each two of them.

    The first begins at the image, the last ends where networks end in its source (None, or that cut's name as in the
    recipe of a candidate).

    Raises:
        StitchError: If the fragments make no path: an unknown source or cut (the nearest names are offered), a
            fragment that goes backwards, or a stitch from a vector to a grid.
        CalibrationError: If an activation at a stitch does not vary.
    """
    steps = [_resolve(space, fragment) for fragment in fragments]
    if not fragments or fragments[0].start is not None or steps[-1][2] is not None:
        raise StitchError("The first fragment of a network begins at the image, and the last runs to its end (None).")
    state = space.starts()[steps[0][0]]
    for (sender, _, cut), (receiver, entry, _) in pairwise(steps):
        if cut is None or entry is None:
            raise StitchError(
                "Only the first fragment of a network begins at the image, and only the last runs to its end (None)."
            )
        left, entered = space.sources[sender].parts.cuts[cut], space.sources[receiver].parts.cuts[entry]
        if not is_bridgeable(left, entered):
            raise StitchError(f"No stitch leads from a vector ({left.name!r}) to a grid ({entered.name!r}).")
        activation = next(x for at, x in space.walk(state) if at == cut)
        edge = space.edge(state, cut, activation, receiver, entry)
        if edge is None:
            raise CalibrationError(
                f"Nothing can be fitted from {left.name!r} of {space.sources[sender].name!r} to {entered.name!r} of "
                f"{space.sources[receiver].name!r}: one of the two does not vary over the calibration images."
            )
        state = space.enter(edge, activation)
    return space.complete(state)


def _resolve(space: SearchSpace, fragment: FragmentRef) -> tuple[int, int | None, int | None]:
    """Indices of a fragment's source and of its two cuts; None: at the image, at the end."""
    names = [source.name for source in space.sources]
    if fragment.source not in names:
        raise StitchError(f"No source is named {fragment.source!r}. Nearest: {nearest(fragment.source, names)}.")
    index = names.index(fragment.source)
    parts = space.sources[index].parts
    start = None if fragment.start is None else _find_cut(parts, fragment.start)
    end = None if fragment.end in (None, parts.end) else _find_cut(parts, str(fragment.end))
    if start is not None and end is not None and end <= start:
        raise StitchError(f"A fragment goes forward, but {fragment.end!r} does not lie behind {fragment.start!r}.")
    return index, start, end


def _find_cut(parts: Segmented, name: str) -> int:
    offered = [cut.name for cut in parts.cuts]
    wanted = parts.graph.find(name).name
    if wanted not in offered:
        raise StitchError(
            f"Cut {name!r} of source {parts.name!r} is not among those that this pool offers (granularity). Nearest: "
            f"{nearest(wanted, offered)}."
        )
    return offered.index(wanted)
