"""Several candidates of a search joined into one network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor, nn

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cutting import copy_module
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import RidgeHead, fit_ridge_head
from lightning_stitch.networks import StitchedNetwork, assemble
from lightning_stitch.progress import Silent
from lightning_stitch.recipe import Average, FragmentRef, Mean, Recipe, SourceRef
from lightning_stitch.search import Ranked, SearchResult
from lightning_stitch.stitching import Batch, Candidate, Segmented, Step, Stitch


def ensemble(
    pool: Pool,
    candidates: SearchResult | Sequence[Candidate | Ranked],
    train: Iterable[Batch] | None = None,
    *,
    top: int = 3,
    mean: Mean | None = "arithmetic",
    heads: Sequence[nn.Module] | None = None,
    num_classes: int | None = None,
) -> StitchedNetwork:
    """One network of several candidates of one search, fragments and stitches that they share computed and held once.

    Two candidates share all pieces from the image up to the first that differs: another piece, another stitch before
    it, a stitch folded into it, or other numbers (healing). Each gets a head of its own, and the probabilities are
    averaged; or all are read side by side by one joint head, which the caller fits.

    Args:
        pool: The pool that was searched.
        candidates: A search's result, of which the best are taken, or candidates.
        train: Batches of (images, labels), on which each member's closed-form head is fitted.
        top: How many of a result's candidates.
        mean: "arithmetic" or "geometric"; None: no heads, the network gives the candidates' features side by side.
        heads: A `RidgeHead` of each candidate instead; they are copied.
        num_classes: Number of classes of the fitted heads; None: as many as the labels say.

    Raises:
        StitchError: If there are no candidates, the mean is unknown, or there is not one head for each candidate.
        CalibrationError: If members need heads and there are neither heads nor labels.

    Example:
        >>> network = ensemble(pool, result, train_loader, top=5)  # doctest: +SKIP
        >>> network(images).softmax(-1)  # doctest: +SKIP
    """
    if mean not in (None, *get_args(Mean)):
        raise StitchError(f"mean must be one of {get_args(Mean)}, or None for a joint head; found {mean!r}.")
    chosen = candidates.ranked[:top] if isinstance(candidates, SearchResult) else candidates
    members = [c.candidate if isinstance(c, Ranked) else c for c in chosen]
    if not members:
        raise StitchError("An ensemble needs at least one candidate; found none.")
    if mean is None and not (heads is None and train is None):
        raise StitchError(
            "mean=None gives features for one joint head of your own; it takes neither heads= nor train=."
        )
    if mean is not None:
        heads = _fitted_heads(pool, members, train, num_classes) if heads is None else heads
        _check_heads(heads, len(members))
    tree = _tree(members, pool.parts)
    places = [next(number for number, node in enumerate(tree) if index in node.ends) for index in range(len(members))]
    recipe = Recipe(
        sources=tuple(_sources(tree, pool.parts)),
        fragments=tuple(node.ref(pool.parts) for node in tree),
        taps=tuple(
            dataclasses.replace(tap, fragment=place)
            for member, place in zip(members, places, strict=True)
            for tap in member.recipe.taps
        ),
        input_size=pool.image_shape,
        average=None if mean is None else _average(mean, members, heads or []),
    )
    graphs = {part.name: part.graph for part in pool.parts}
    copies = [copy_module(head) for head in heads or [] if isinstance(head, RidgeHead)]
    return assemble(recipe, graphs, [node.stitch for node in tree], [node.tensors for node in tree], copies)


def _check_heads(heads: Sequence[nn.Module], num_members: int) -> None:
    """Refuse heads that cannot be averaged."""
    if len(heads) != num_members:
        raise StitchError(f"Each candidate needs a head; found {num_members} candidates and {len(heads)} heads.")
    widths = {len(head.weight) if isinstance(head, RidgeHead) else None for head in heads}
    if (None in widths and len(widths) > 1) or not all(isinstance(h, RidgeHead | nn.Identity) for h in heads):
        raise StitchError(f"heads= are RidgeHeads of as many classes; found {[type(head).__name__ for head in heads]}.")
    if len(widths) > 1:
        raise StitchError(f"The heads of an ensemble have as many classes; found {sorted(map(str, widths))}.")


def _average(mean: Mean, members: Sequence[Candidate], heads: Sequence[nn.Module]) -> Average:
    """Which taps each member reads, one after the other."""
    numbers = iter(range(sum(len(member.recipe.taps) for member in members)))
    groups = tuple(tuple(next(numbers) for _ in member.recipe.taps) for member in members)
    first = heads[0]
    width = len(first.weight) if isinstance(first, RidgeHead) else members[0].recipe.num_features
    return Average(groups, width, mean, with_heads=isinstance(first, RidgeHead))


def _fitted_heads(
    pool: Pool, members: Sequence[Candidate], train: Iterable[Batch] | None, num_classes: int | None
) -> list[nn.Module]:
    if train is None:
        if pool.settings.until == "output":
            return [nn.Identity() for _ in members]
        raise CalibrationError("The members of an ensemble need heads: give train=, batches of (images, labels).")
    outcomes, labels = pool.outcomes(members, train, progress=Silent())
    if labels is None:
        raise CalibrationError("train= must be batches of (images, labels); found images alone.")
    count = num_classes or int(labels.max()) + 1
    return [fit_ridge_head(outcome.features, labels, num_classes=count)[0] for outcome in outcomes]


@dataclass(slots=True)
class _Node:
    """Pieces [first, last) of one source that run for the same members."""

    parent: int | None
    source: int
    first: int
    last: int
    stitch: Stitch | None
    step: Step
    ends: list[int] = field(default_factory=list)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.step.tensors

    def ref(self, parts: Sequence[Segmented]) -> FragmentRef:
        part = parts[self.source]
        names = [None, *(cut.name for cut in part.cuts), part.end]
        stitch = None if self.stitch is None else self.step.spec
        return FragmentRef(part.name, names[self.first], names[self.last], self.parent, stitch)


def _tree(members: Sequence[Candidate], parts: Sequence[Segmented]) -> list[_Node]:
    """The members' pieces, those that are the same merged, and runs of pieces without a fork joined to one node."""
    pieces: list[_Node] = []
    known: dict[tuple[Any, ...], int] = {}
    for index, member in enumerate(members):
        parent: int | None = None
        for step, after in zip(member.steps, (*member.steps[1:], None), strict=True):
            for piece in range(step.first, step.last):
                stitch = step.stitch if piece == step.first else None
                folded = after is not None and piece + 1 == step.last and _is_folded_before(after)
                key = (parent, step.source, piece, step.key, after.key if after is not None and folded else None)
                if key not in known:
                    known[key] = len(pieces)
                    pieces.append(_Node(parent, step.source, piece, piece + 1, stitch, step))
                parent = known[key]
        assert parent is not None
        pieces[parent].ends.append(index)
    return _joined(pieces)


def _is_folded_before(step: Step) -> bool:
    return step.spec is not None and step.spec.placement == "producer"


def _joined(pieces: Sequence[_Node]) -> list[_Node]:
    children = [sum(other.parent == number for other in pieces) for number in range(len(pieces))]
    tree: list[_Node] = []
    place: dict[int, int] = {}
    for number, piece in enumerate(pieces):
        before = piece.parent
        if before is not None and piece.stitch is None and children[before] == 1 and not pieces[before].ends:
            place[number] = place[before]
            tree[place[number]].last = piece.last
            tree[place[number]].ends = piece.ends
            continue
        place[number] = len(tree)
        piece.parent = None if before is None else place[before]
        tree.append(piece)
    return tree


def _sources(tree: Sequence[_Node], parts: Sequence[Segmented]) -> list[SourceRef]:
    return [parts[index].source.ref for index in dict.fromkeys(node.source for node in tree)]
