"""Several candidates of a search joined into one network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor, nn

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cutting import copied
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import RidgeHead, fit_ridge_head
from lightning_stitch.networks import Ensemble, _assembled
from lightning_stitch.progress import Silent
from lightning_stitch.recipe import Branch, EnsembleRecipe, FragmentRef, Mean, Member, SourceRef
from lightning_stitch.search import Ranked, SearchResult
from lightning_stitch.stitching import Batch, Candidate, Segmented, Step, Stitch


def ensemble(
    pool: Pool,
    candidates: SearchResult | Sequence[Candidate | Ranked],
    train: Iterable[Batch] | None = None,
    *,
    top: int = 3,
    mean: Mean = "arithmetic",
    heads: Sequence[nn.Module] | None = None,
    num_classes: int | None = None,
) -> Ensemble:
    """One module of several candidates of one search, fragments and stitches that they share computed and held once.

    Two candidates share all pieces from the image up to the first that differs: another piece, another stitch before
    it, a stitch folded into it, or other numbers (healing). Each gets a head of its own.

    Args:
        pool: The pool that was searched.
        candidates: A search's result, of which the best are taken, or candidates.
        train: Batches of (images, labels), on which each member's closed-form head is fitted.
        top: How many of a result's candidates.
        mean: "arithmetic" or "geometric".
        heads: A `RidgeHead` of each candidate instead; they are copied.
        num_classes: Number of classes of the fitted heads; None: as many as the labels say.

    Raises:
        StitchError: If there are no candidates, the mean is unknown, or there is not one head for each candidate.
        CalibrationError: If members need heads and there are neither heads nor labels.

    Example:
        >>> network = ensemble(pool, result, train_loader, top=5)  # doctest: +SKIP
        >>> network(images).softmax(-1)  # doctest: +SKIP
    """
    if mean not in get_args(Mean):
        raise StitchError(f"mean must be one of {get_args(Mean)}; found {mean!r}.")
    given = candidates.ranked[:top] if isinstance(candidates, SearchResult) else candidates
    members = [c.candidate if isinstance(c, Ranked) else c for c in given]
    if not members:
        raise StitchError("An ensemble needs at least one candidate; found none.")
    if heads is None:
        heads = _fitted_heads(pool, members, train, num_classes)
    if len(heads) != len(members):
        raise StitchError(f"Each candidate needs a head; found {len(members)} candidates and {len(heads)} heads.")
    widths = {len(head.weight) if isinstance(head, RidgeHead) else None for head in heads}
    if (None in widths and len(widths) > 1) or not all(isinstance(h, RidgeHead | nn.Identity) for h in heads):
        raise StitchError(f"heads= are RidgeHeads of as many classes; found {[type(head).__name__ for head in heads]}.")
    if len(widths) > 1:
        raise StitchError(f"The heads of an ensemble have as many classes; found {sorted(map(str, widths))}.")
    (width,) = widths
    tree = _tree(members, pool.parts)
    recipe = EnsembleRecipe(
        sources=tuple(_sources(tree, pool.parts)),
        branches=tuple(node.branch(pool.parts) for node in tree),
        members=tuple(
            Member(
                branch=next(number for number, node in enumerate(tree) if index in node.ends),
                pooled=member.pool is not None,
                in_features=head.weight.shape[1] if isinstance(head, RidgeHead) else None,
            )
            for index, (member, head) in enumerate(zip(members, heads, strict=True))
        ),
        mean=mean,
        num_classes=pool.parts[0].graph.output_features() if width is None else width,
        input_size=pool.image_shape,
    )
    graphs = {part.name: part.graph for part in pool.parts}
    copies = [copied(head) for head in heads]
    return _assembled(recipe, graphs, copies, [n.stitch for n in tree], [n.tensors for n in tree])


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

    def branch(self, parts: Sequence[Segmented]) -> Branch:
        part = parts[self.source]
        names = [None, *(cut.name for cut in part.cuts), part.end]
        fragment = FragmentRef(part.name, names[self.first], names[self.last])
        return Branch(self.parent, fragment, None if self.stitch is None else self.step.spec)


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
