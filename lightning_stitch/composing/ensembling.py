"""Several candidates of a search joined into one network."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from torch import Tensor, nn

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cutting import copy_module
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import RidgeHead, fit_ridge_head
from lightning_stitch.networks import StitchedNetwork, assemble
from lightning_stitch.progress import Silent
from lightning_stitch.recipe import Average, FragmentRef, Mean, Recipe
from lightning_stitch.search import Ranked, SearchResult
from lightning_stitch.stitching import Batch, Candidate, Segmented, Stitch


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
    candidates = candidates.ranked[:top] if isinstance(candidates, SearchResult) else candidates
    members = [c.candidate if isinstance(c, Ranked) else c for c in candidates]
    if not members:
        raise StitchError("An ensemble needs at least one candidate; found none.")
    average = None
    if mean is not None:
        heads = _fit_heads(pool, members, train, num_classes) if heads is None else heads
        _check_heads(heads, len(members))
        width = len(heads[0].weight) if isinstance(heads[0], RidgeHead) else members[0].recipe.num_features
        groups = tuple((number,) for number in range(len(members)))
        average = Average(groups, width, mean, with_heads=isinstance(heads[0], RidgeHead))
    elif heads is not None or train is not None:
        raise StitchError(
            "mean=None gives features for one joint head of your own; it takes neither heads= nor train=."
        )
    fragments, ends = _merge_fronts(members, pool.parts)
    refs = {part.name: part.source.ref for part in pool.parts}
    recipe = Recipe(
        sources=tuple(refs[name] for name in dict.fromkeys(fragment.ref.source for fragment in fragments)),
        fragments=tuple(fragment.ref for fragment in fragments),
        taps=tuple(
            dataclasses.replace(member.recipe.taps[0], fragment=end) for member, end in zip(members, ends, strict=True)
        ),
        input_size=pool.image_shape,
        average=average,
    )
    return assemble(
        recipe,
        {part.name: part.graph for part in pool.parts},
        [fragment.stitch for fragment in fragments],
        [fragment.tensors for fragment in fragments],
        [copy_module(head) for head in heads or [] if isinstance(head, RidgeHead)],
    )


def _check_heads(heads: Sequence[nn.Module], num_members: int) -> None:
    """Refuse heads that cannot be averaged."""
    if len(heads) != num_members:
        raise StitchError(f"Each candidate needs a head; found {num_members} candidates and {len(heads)} heads.")
    widths = {len(head.weight) if isinstance(head, RidgeHead) else None for head in heads}
    if (None in widths and len(widths) > 1) or not all(isinstance(h, RidgeHead | nn.Identity) for h in heads):
        raise StitchError(f"heads= are RidgeHeads of as many classes; found {[type(head).__name__ for head in heads]}.")
    if len(widths) > 1:
        raise StitchError(f"The heads of an ensemble have as many classes; found {sorted(map(str, widths))}.")


def _fit_heads(
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


class _Fragment(NamedTuple):
    ref: FragmentRef
    stitch: Stitch | None
    tensors: Mapping[str, Tensor]


def _merge_fronts(members: Sequence[Candidate], parts: Sequence[Segmented]) -> tuple[list[_Fragment], list[int]]:
    """The members' fragments, parents first, shared up to the first piece that differs; and where each member ends."""
    paths = [_piece_keys(member) for member in members]
    users = Counter(path[:length] for path in paths for length in range(len(path) + 1))
    fragments: list[_Fragment] = []
    places: dict[tuple[Any, ...], int] = {}
    ends = []
    for member, path in zip(members, paths, strict=True):
        pieces = [(step, piece) for step in member.steps for piece in range(step.first, step.last)]
        place = None
        for length, (step, piece) in enumerate(pieces):
            front = path[: length + 1]
            names = parts[step.source].ends
            if front in places:
                place = places[front]
            elif place is None or piece == step.first or users[front] < users[path[:length]]:
                stitch, spec = (step.stitch, step.spec) if piece == step.first else (None, None)
                ref = FragmentRef(parts[step.source].name, names[piece], names[piece + 1], place, spec)
                place = len(fragments)
                fragments.append(_Fragment(ref, stitch, step.tensors))
            else:
                longer = dataclasses.replace(fragments[place].ref, end=names[piece + 1])
                fragments[place] = fragments[place]._replace(ref=longer)
            places[front] = place
        assert place is not None
        ends.append(place)
    return fragments, ends


def _piece_keys(member: Candidate) -> tuple[Any, ...]:
    """What each of a member's pieces computes: which it is, with which numbers, and which stitch is folded into it."""
    keys: list[Any] = []
    for step, after in zip(member.steps, (*member.steps[1:], None), strict=True):
        keys += [(step.source, piece, step.key, None) for piece in range(step.first, step.last)]
        if after is not None and after.spec is not None and after.spec.placement == "producer":
            keys[-1] = (*keys[-1][:3], after.key)
    return tuple(keys)
