"""A network for a few images of one person, in seconds, from a pool that was prepared once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stitch.composing.cross_fitting import (
    cross_fitted_vectors,
    deal_into_folds,
    final_vectors,
    vectors_of_piece,
)
from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.cutting import reference_tensor
from lightning_stitch.data import decode_images, number_labels
from lightning_stitch.errors import BudgetError, CalibrationError, StitchError
from lightning_stitch.heads import fit_ridge_head
from lightning_stitch.progress import Progress, Silent, timed
from lightning_stitch.recipe import Recipe, Tap
from lightning_stitch.search import (
    Beam,
    Outcome,
    Ranking,
    SearchResult,
    SearchSpace,
    SelectionData,
    by_loo_soft_r2,
    choose,
    costs_of_pairs,
    early_exits,
    keys_of_reads,
    rank,
    unmodified,
)
from lightning_stitch.stitching import Calibrated, Candidate, Segmented, calibrate, chunks

_FEWEST = 4
_FOLDS = 4  # three quarters of the images fit each fold's stitch
_BEAM = Beam(width=2, max_fragments=2)
_STANDARD_ERRORS = 2  # the best of some twenty, of which many are alike, is often one above its due


class OutputSubset(nn.Module):
    """Some of a classifier's outputs, by their indices."""

    indices: Tensor

    def __init__(self, indices: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("indices", torch.tensor(list(indices)))

    def forward(self, logits: Tensor) -> Tensor:
        """Those columns of the logits (batch, outputs)."""
        return logits[:, self.indices]


@dataclass(frozen=True, slots=True)
class Composition:
    """A network for the images of one request.

    Attributes:
        network: Images (batch, channels, height, width) in [0, 1] to logits (batch, classes), whose softmax is the
            probability of each class; to features (batch, features) where there were neither labels nor classes. In
            eval mode; its parameters are its own. `network[0]` is the `StitchedNetwork`, `network[1]` the head.
        classes: What each output stands for: the labels, or indices of the sources' outputs; empty for features.
        result: The candidates with their scores, the best source, and whether it was worth it (`summary()`). Its
            `seconds` are those of each stage: "sources" (their pass over the images), "search", "rank", "assemble".
    """

    network: nn.Sequential
    classes: tuple[Any, ...]
    result: SearchResult

    def __repr__(self) -> str:
        return f"Composition({len(self.classes)} classes, {self.result.best!r})"


def compose_personal(
    pool: Pool,
    images: Tensor | Sequence[Any],
    labels: Sequence[Any] | Tensor | None = None,
    *,
    classes: Sequence[int] | None = None,
    budget: Budget | None = None,
    effort: float = 0.5,
    ridge: float = 1e-3,
    progress: Progress | None = None,
) -> Composition:
    """Compose a network for a few images: each source runs over them once, and what follows costs less than that.

    Candidates are the sources as they are, the sources ended early at each of their cuts (not with `classes`), and
    networks of two fragments, whose fronts have run already. The pool stays as it is: requests share nothing else, and
    the same request gives the same network. The same images fit the stitches, choose, and fit the head, so:

    - a stitched candidate is judged by features that stitches gave which had not seen the image
      (`lightning_stitch.composing.cross_fitting`); sources and early exits are fitted on none of them;
    - with labels each image is left out of the head that classifies it;
    - the best of some twenty candidates on a few images is ahead by luck more often than not, so that none takes the
      best source's place unless it is ahead by two standard errors (`lightning_stitch.composing.personal`).

    The scores are a little optimistic all the same: only images of the same person that were not given here tell how
    good the network is.

    With labels the head is a ridge regression on the final network's features of the images. With `classes` it is the
    last source's own classifier restricted to them, and the candidates are ordered by how likely they find what all
    sources together say of the images among these classes. With neither, the candidates are ordered by
    `ranking.by_consensus`, and the network gives features.

    Args:
        pool: From `Pool.prepare`; any other pool serves, too, and takes longer.
        images: At least 4: a tensor (images, channels, height, width), or a sequence of tensors, PIL images or arrays;
            float in [0, 1] or uint8. They are resized to the pool's image size.
        labels: The class of each image: integers, names or one-hot rows. At least two occur.
        classes: Indices of the sources' outputs, where there are no labels; at least two.
        budget: Limits that the network keeps (the head is not counted); None: none.
        effort: Most multiply-accumulates that stitched candidates run, as a share of those of all sources.
        ridge: Relative strength of the stitches' fit.
        progress: Where to show which stage runs.

    Raises:
        CalibrationError: If images or labels cannot be used.
        BudgetError: If no network keeps the budget, or it limits latency or activation bytes, which are not measured
            here.
        StitchError: If `ridge` or `effort` is out of range, labels and classes are given both, or the sources do not
            have these outputs.

    Example:
        >>> pool = Pool.prepare(sources)  # doctest: +SKIP
        >>> mine = compose_personal(pool, photographs, labels=["cup", "key", "cup", "key"])  # doctest: +SKIP
        >>> mine.classes[mine.network(image).argmax()], mine.result.summary()  # doctest: +SKIP
    """
    budget = budget or Budget()
    if budget.max_latency_ms is not None or budget.max_activation_bytes is not None:
        raise BudgetError(
            "Of a personal network one measures neither latencies nor activation bytes. Limit max_macs instead, or use "
            "Pool.search."
        )
    if not ridge > 0 or not effort >= 0:
        raise StitchError(f"ridge must be above 0 and effort at least 0; found ridge={ridge}, effort={effort}.")
    if len(images) < _FEWEST:
        raise CalibrationError(f"A personal network needs at least {_FEWEST} images; found {len(images)}.")
    targets, names = (None, ()) if labels is None else number_labels(labels, len(images))
    if classes is not None:
        _check_outputs(pool.parts, labels, classes)
        names = tuple(classes)
    exits = classes is None and pool.settings.until == "features"
    costs = pool.prepared.get(exits) or costs_of_pairs(pool.parts, early_exits=exits)
    costs.check(budget)
    batch = decode_images(images, pool.image_shape).to(pool.device)
    seconds: dict[str, float] = {}
    with _stage("sources", seconds, progress):
        sources = [calibrate(part, [batch], pool.settings) for part in pool.parts]
    with _stage("search", seconds, progress):
        space = SearchSpace(sources, pool.settings, costs=costs, budget=budget, ridge=ridge)
        candidates = unmodified(space) + (early_exits(space) if exits else [])
        vectors = [_vectors_at_hand(candidate, sources) for candidate in candidates]
        fold_of = deal_into_folds(len(batch), targets, folds=_FOLDS)
        for candidate in _affordable(list(_BEAM(space)), space, effort):
            candidates.append(candidate)
            vectors.append(cross_fitted_vectors(candidate, sources, pool.settings, fold_of=fold_of, ridge=ridge))
    with _stage("rank", seconds, progress):
        outcomes = [_outcome(candidate, x) for candidate, x in zip(candidates, vectors, strict=True)]
        ranking: str | Ranking = "consensus" if targets is None else by_careful_r2
        if classes is not None:
            ranking = partial(_by_class_consensus, pool=pool, classes=classes)
        ranked, _ = rank(candidates, outcomes, targets, ranking=ranking, num_classes=None, rejected=space.rejected)
    num_labels = 0 if targets is None else len(targets)
    result = choose(ranked, budget, rejected=space.rejected, seconds=seconds, num_selection_labels=num_labels)
    with _stage("assemble", result.seconds, progress):
        chosen = result.best.candidate
        head: nn.Module = nn.Identity()
        if classes is not None:
            chosen = dataclasses.replace(chosen, recipe=_run_to_output(chosen.recipe, pool.parts))
            head = OutputSubset(classes)
        elif targets is not None:
            head = _fit_head(chosen, sources, targets)
        body = pool.assemble(chosen)
        network = nn.Sequential(body, head.to(reference_tensor(body).device)).eval()
    return Composition(network, names, result)


@contextmanager
def _stage(name: str, seconds: dict[str, float], progress: Progress | None) -> Iterator[None]:
    """Name a stage and take its time."""
    (progress or Silent()).start(name, None)
    with timed(seconds, name):
        yield


def _affordable(stitched: Sequence[Candidate], space: SearchSpace, effort: float) -> Iterator[Candidate]:
    """Those whose tails may run: the shortest first, so that they are many, with room for one to run twice.

    The one that is chosen runs once more, behind its final stitch, to give the features that the head is fitted on.
    """
    tails = [candidate.steps[-1] for candidate in stitched]
    macs = [space.costs.run(tail.source, tail.first, tail.last).macs for tail in tails]
    left = effort * sum(source.parts.cost.macs for source in space.sources)
    for spent, candidate in sorted(zip(macs, stitched, strict=True), key=lambda pair: pair[0]):
        if 2 * spent > left:
            space.rejected["more to run than the effort allows"] += 1
            continue
        left -= spent
        yield candidate


def _check_outputs(parts: Sequence[Segmented], labels: Sequence[Any] | Tensor | None, classes: Sequence[int]) -> None:
    """Refuse classes beside labels, and those that are no outputs of all sources."""
    if labels is not None:
        raise StitchError("labels= say already which classes there are; leave classes= out.")
    widths = {part.name: part.graph.output_features() for part in parts}
    if len(set(widths.values())) > 1:
        raise StitchError(f"classes= needs sources with the same outputs; found widths {widths}.")
    (width,) = set(widths.values())
    if len(set(classes)) < max(2, len(classes)) or not all(0 <= index < width for index in classes):
        raise StitchError(
            f"classes= are two or more different indices of the sources' outputs, from 0 to {width - 1}; found "
            f"{list(classes)}."
        )


@torch.inference_mode()
def _vectors_at_hand(candidate: Candidate, sources: Sequence[Calibrated]) -> list[Tensor]:
    """What each tap of a source as it is, or ended early, gives: the sources' pass gave the activations."""
    return [
        vectors_of_piece(sources[candidate.steps[0].source], read.num_pieces - 1, read.statistics)
        for read in candidate.reads
    ]


def _outcome(candidate: Candidate, vectors: Sequence[Tensor]) -> Outcome:
    """Vectors as a ranking takes them."""
    # A copy outside of inference mode is an ordinary tensor. What a candidate alone would take is not measured.
    ordinary = tuple(x.float().cpu().clone() for x in vectors)
    return Outcome(ordinary, keys_of_reads(candidate), candidate.recipe.head_blocks, math.nan)


def _fit_head(candidate: Candidate, sources: Sequence[Calibrated], targets: Tensor) -> nn.Module:
    """A ridge head on the final network's readout of the images."""
    vectors = _vectors_at_hand(candidate, sources) if len(candidate.steps) == 1 else final_vectors(candidate, sources)
    features = _outcome(candidate, vectors).features
    blocks = candidate.recipe.head_blocks
    return fit_ridge_head(features, targets, num_classes=int(targets.max()) + 1, blocks=blocks)[0]


def _run_to_output(recipe: Recipe, parts: Sequence[Segmented]) -> Recipe:
    """A chain's recipe, its last fragment run on through its source's classifier."""
    last = dataclasses.replace(recipe.fragments[-1], end=None)
    width = next(part for part in parts if part.name == last.source).graph.output_features()
    fragments = (*recipe.fragments[:-1], last)
    return dataclasses.replace(recipe, fragments=fragments, taps=(Tap(len(fragments) - 1, width),))


@torch.inference_mode()
def _by_class_consensus(
    candidates: Sequence[Candidate], selection: SelectionData, *, pool: Pool, classes: Sequence[int]
) -> list[dict[str, float]]:
    """The mean log-likelihood of what all sources together say of the images; none is better than the best source."""
    log_probabilities = []
    for candidate, outcome in zip(candidates, selection.outcomes, strict=True):
        features = outcome.vectors[-1]
        part = pool.parts[candidate.steps[-1].source]
        if part.end is not None:
            classifier = part.graph.fragment(part.end, None, share=True).eval()
            features = torch.cat([classifier(x) for x in chunks(features.to(pool.device), 64)])
        log_probabilities.append(features[:, list(classes)].double().log_softmax(1).cpu())
    sources = [number for number, candidate in enumerate(candidates) if candidate.kind == "source"]
    together = torch.stack([log_probabilities[number].exp() for number in sources]).mean(0)
    scores = [float((together * x).sum(1).mean()) for x in log_probabilities]
    best = max(scores[number] for number in sources)
    return [{"class_consensus": min(score, best)} for score in scores]


def by_careful_r2(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """`ranking.by_loo_soft_r2`, less two standard errors of how far a candidate is ahead of the best source.

    Of twenty candidates on a few images one is always ahead, and mostly by luck. The error is that of the mean over
    the images of the difference of both squared errors, image by image; it is none for sources. So a candidate comes
    before the best source where it is ahead by twice the error or more, and among candidates those count for less that
    are ahead by a few images.
    """
    scores, errors = by_loo_soft_r2(candidates, selection), selection.errors
    sources = [number for number, candidate in enumerate(candidates) if candidate.kind == "source"]
    best = max(sources, key=lambda number: scores[number]["loo_soft_r2"])
    careful = []
    for number, (candidate, score) in enumerate(zip(candidates, scores, strict=True)):
        error = errors[number]
        spread = 0.0 if candidate.kind == "source" else float((errors[best] - error).std()) * math.sqrt(len(error))
        careful.append({"careful_r2": score["loo_soft_r2"] - _STANDARD_ERRORS * spread, **score})
    return careful
