"""Several candidates of a search joined into one network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

from torch import nn

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cutting import copy_module
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import RidgeHead, fit_ridge_head
from lightning_stitch.networks import StitchedNetwork, assemble
from lightning_stitch.progress import Silent
from lightning_stitch.recipe import Average, Mean, Recipe
from lightning_stitch.search import Ranked, SearchResult, keys_of_reads
from lightning_stitch.stitching import Batch, Candidate, Read, Way, tree_of


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
        top: How many of a result's candidates; self-stitched sources and networks with stages are left out.
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
    if isinstance(candidates, SearchResult):
        candidates = [r for r in candidates.ranked if r.candidate.kind not in ("self-stitched", "staged")][:top]
    members = [c.candidate if isinstance(c, Ranked) else c for c in candidates]
    if not members:
        raise StitchError("An ensemble needs at least one candidate; found none.")
    average = None
    ways, reads, groups = _merge_reads(members)
    if mean is not None:
        heads = _fit_heads(pool, members, train, num_classes) if heads is None else heads
        _check_heads(heads, len(members))
        width = len(heads[0].weight) if isinstance(heads[0], RidgeHead) else members[0].recipe.num_features
        average = Average(groups, width, mean, with_heads=isinstance(heads[0], RidgeHead))
    elif heads is not None or train is not None:
        raise StitchError(
            "mean=None gives features for one joint head of your own; it takes neither heads= nor train=."
        )
    tree = tree_of(ways, reads, pool.all_parts)
    refs = {part.name: part.source.ref for part in pool.parts}
    recipe = Recipe(
        sources=tuple(refs[name] for name in dict.fromkeys(fragment.ref.source for fragment in tree.fragments)),
        fragments=tuple(fragment.ref for fragment in tree.fragments),
        taps=tree.taps,
        input_size=pool.image_shape,
        average=average,
    )
    return assemble(
        recipe,
        pool.graphs,
        [fragment.stitch for fragment in tree.fragments],
        [fragment.tensors for fragment in tree.fragments],
        [copy_module(head) for head in heads or [] if isinstance(head, RidgeHead)],
    )


def _merge_reads(members: Sequence[Candidate]) -> tuple[list[Way], list[Read], tuple[tuple[int, ...], ...]]:
    """All ways and reads of some candidates, each once, and which of the reads are each candidate's."""
    ways = list(dict.fromkeys(way for member in members for way in member.ways))
    reads: dict[str, Read] = {}
    keys = [keys_of_reads(member) for member in members]
    for member, of_member in zip(members, keys, strict=True):
        for key, read in zip(of_member, member.reads, strict=True):
            reads.setdefault(key, read._replace(way=ways.index(member.ways[read.way])))
    numbers = {key: number for number, key in enumerate(reads)}
    return ways, list(reads.values()), tuple(tuple(numbers[key] for key in of_member) for of_member in keys)


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
    return [
        fit_ridge_head(outcome.features, labels, num_classes=count, blocks=outcome.blocks)[0] for outcome in outcomes
    ]
