"""What a search proposes: complete compositions, and the trees of fragments that they are."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lightning_stitch.cost import Cost
from lightning_stitch.io import key_of, tensors_hash
from lightning_stitch.recipe import FragmentRef, Recipe, Statistic, StitchSpec, Tap
from lightning_stitch.stitching.segments import Segmented
from lightning_stitch.stitching.stitches import Stitch
from lightning_stitch.stitching.taps import tap_at

Kind = Literal[
    "source", "self-stitched", "early exit", "smaller image", "shortened", "stitched", "side by side", "staged"
]
"""An unmodified source; one stitched to itself at each of its cuts; one that ends early; either on a smaller image;
fragments of one source, stitched; fragments of several sources, stitched: a StitchNet; several of these with one head;
one that goes on, behind further heads, for the images alone that it is not sure of.
"""


@dataclass(frozen=True, slots=True)
class Step:
    """Pieces [first, last) of one source, entered through a stitch.

    Attributes:
        source: Place of the source among those at hand.
        first: Its first piece that runs.
        last: Its first piece that does not.
        stitch: What it is entered through, which runs as a layer of its own here; None: it begins at the image, or goes
            on in its source.
        spec: Where the assembled network will have the stitch.
        tensors: Those of the source's parameters and buffers, by name, that have other numbers in this network.
        key: The same for steps of the same numbers, in any process: a hash of those that are not its source's, the
            stitch's and `tensors`; "" where there are none.
    """

    source: int
    first: int
    last: int
    stitch: Stitch | None = field(default=None, repr=False)
    spec: StitchSpec | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Hash the numbers."""
        state = {} if self.stitch is None else self.stitch.state_dict()
        tensors = dict(sorted(self.tensors.items()))
        names = [[*state], [*tensors]]
        key = key_of(names, tensors_hash([*state.values(), *tensors.values()])) if state or tensors else ""
        object.__setattr__(self, "key", key)


Way = tuple[Step, ...]
"""Steps from the image to an end, each behind the one before."""


class Read(NamedTuple):
    """What is read of one way of a composition: some statistics behind its first so many pieces."""

    way: int
    num_pieces: int
    statistics: tuple[Statistic, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete composition that the search proposes.

    Attributes:
        recipe: Its structure, with the search's scores.
        kind: What it is.
        ways: What it runs, for the sources at hand; what several ways begin with alike runs once.
        reads: Where it is read, in the order of the recipe's taps.
        cost: Its parameters and MACs, and its latency by estimate, stitches and folds included.
    """

    recipe: Recipe
    kind: Kind
    ways: tuple[Way, ...]
    reads: tuple[Read, ...]
    cost: Cost

    def __repr__(self) -> str:
        return f"Candidate({self.kind}, {' | '.join(str(run.ref) for run in self.recipe.runs)}, {self.cost})"

    @classmethod
    def of(
        cls,
        kind: Kind,
        ways: Sequence[Way],
        parts: Sequence[Segmented],
        cost: Cost,
        scores: Mapping[str, float],
        *,
        reads: Sequence[Read] | None = None,
    ) -> Candidate:
        """The candidate of some ways, read as the sources' settings say or as it is told."""
        ways, reads = tuple(ways), _reads_of(ways, parts) if reads is None else tuple(reads)
        tree = tree_of(ways, reads, parts)
        refs = {parts[step.source].name: parts[step.source].source.ref for way in ways for step in way}
        recipe = Recipe(
            sources=tuple(refs.values()),
            fragments=tuple(fragment.ref for fragment in tree.fragments),
            taps=tree.taps,
            input_size=parts[0].image_shape,
            scores={**scores, "params": cost.params, "macs": cost.macs},
        )
        return cls(recipe, kind, ways, reads, cost)

    @property
    def steps(self) -> Way:
        """The steps of its first way; of a chain all that there are."""
        return self.ways[0]

    @property
    def key(self) -> str:
        """The same for candidates that compute the same of the sources at hand, in any process."""
        steps = [[(step.source, step.first, step.last, step.key) for step in way] for way in self.ways]
        return key_of(steps, self.reads)

    @property
    def cka_product(self) -> float:
        """Product of the CKAs of its stitches."""
        return self.recipe.scores["cka_product"]

    def with_steps(self, steps: Sequence[Step], **fields: Any) -> Candidate:
        """A chain whose steps have other numbers, and other fields of the recipe."""
        stitches = [step.spec for step in steps if step.spec is not None]
        recipe = dataclasses.replace(self.recipe.with_stitches(stitches), **fields)
        return dataclasses.replace(self, ways=(tuple(steps),), recipe=recipe)


class TreeFragment(NamedTuple):
    """A fragment of a tree, what leads into it, and its tensors that differ from its source's."""

    ref: FragmentRef
    stitch: Stitch | None
    tensors: Mapping[str, Tensor]


class Tree(NamedTuple):
    """Fragments, parents first, and taps."""

    fragments: list[TreeFragment]
    taps: tuple[Tap, ...]


def pieces_of(way: Way) -> Iterator[tuple[Step, int]]:
    """The pieces that a way runs, each with its step."""
    return ((step, piece) for step in way for piece in range(step.first, step.last))


def tree_of(ways: Sequence[Way], reads: Sequence[Read], parts: Sequence[Segmented]) -> Tree:
    """The fragments of several ways, shared up to the first piece that differs; they end where one is read."""
    paths = [piece_keys(way) for way in ways]
    users = Counter(path[:length] for path in paths for length in range(len(path) + 1))
    ends = {paths[read.way][: read.num_pieces] for read in reads}
    fragments: list[TreeFragment] = []
    places: dict[tuple[Any, ...], int] = {}
    for way, path in zip(ways, paths, strict=True):
        place: int | None = None
        for length, (step, piece) in enumerate(pieces_of(way)):
            before, front = path[:length], path[: length + 1]
            part = parts[step.source]
            if front in places:
                place = places[front]
            elif place is None or piece == step.first or users[front] < users[before] or before in ends:
                stitch, spec = (step.stitch, step.spec) if piece == step.first else (None, None)
                size = part.image_shape[1:] if place is None and part.image_shape != parts[0].image_shape else None
                ref = FragmentRef(part.name, part.ends[piece], part.ends[piece + 1], place, spec, size)
                place = len(fragments)
                fragments.append(TreeFragment(ref, stitch, step.tensors))
            else:
                longer = dataclasses.replace(fragments[place].ref, end=part.ends[piece + 1])
                fragments[place] = fragments[place]._replace(ref=longer)
            places[front] = place
    taps = []
    for read in reads:
        step, piece = list(pieces_of(ways[read.way]))[read.num_pieces - 1]
        part, place = parts[step.source], places[paths[read.way][: read.num_pieces]]
        if piece < len(part.cuts):
            taps.append(tap_at(part.cuts[piece], place, read.statistics))
        else:
            taps.append(Tap(place, part.width_at(piece + 1)))
    return Tree(fragments, tuple(taps))


def piece_keys(way: Way) -> tuple[Any, ...]:
    """What each of a way's pieces computes: which it is, with which numbers, and which stitch is folded into it."""
    keys: list[Any] = []
    for step, after in zip(way, (*way[1:], None), strict=True):
        keys += [(step.source, piece, step.key, None) for piece in range(step.first, step.last)]
        if is_folded_before(after):
            assert after is not None
            keys[-1] = (*keys[-1][:3], after.key)
    return tuple(keys)


def is_folded_before(after: Step | None) -> bool:
    """Whether a step's stitch is folded into the layer before it, whose output is then another."""
    return after is not None and after.spec is not None and after.spec.placement == "producer"


def _reads_of(ways: Sequence[Way], parts: Sequence[Segmented]) -> tuple[Read, ...]:
    """Where ways are read: at every piece's end that is a tap of its source, and at their own end.

    What a stitch is folded into leaves no activation of its own to be read.
    """
    reads: list[Read] = []
    seen = set()
    for number, way in enumerate(ways):
        keys, steps = piece_keys(way), list(pieces_of(way))
        for count, (step, piece) in enumerate(steps, start=1):
            statistics = parts[step.source].statistics_at(piece, is_end=count == len(steps))
            folded = keys[count - 1][3] is not None
            if statistics is not None and not folded and (keys[:count], statistics) not in seen:
                seen.add((keys[:count], statistics))
                reads.append(Read(number, count, statistics))
    return tuple(reads)
