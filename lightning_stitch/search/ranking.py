"""Order candidates by what they gave on the selection images.

All goes by Gram matrices, rows x rows: that of a readout is the sum over its taps, each feature standardised and each
tap's statistics weighing the same, so that no candidate runs again and a candidate of thousands of features costs what
one of ten does. What several candidates read alike is summed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, pairwise, takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import (
    DEFAULT_STRENGTHS,
    class_temperature,
    comparable_columns,
    task_of,
)
from lightning_stitch.maths import block_gram, centre_gram, centre_rows, cka_of_grams, loo_ridge_of_gram, r2
from lightning_stitch.search.evaluation import Outcome
from lightning_stitch.search.ranks import ALONE, Ranks
from lightning_stitch.stitching import Batch, Candidate

_REFERENCE_DIRECTIONS = 64  # of three networks' 3,840 features they hold nine tenths; more order no differently
MAX_ROWS = 1024
"""Most images that a ranking goes by, drawn by seed: leave-one-out of so many takes a quarter of a second."""


class Judgement(NamedTuple):
    """What a ranking says of one candidate: its scores, and each image's squared error and loss (images,).

    Errors are shares of the targets' variance: their sum is 1 - R2. Losses are those by which stages are judged
    (`scores_of_predictions`); of targets that are no classes the same as the errors.
    """

    scores: dict[str, float]
    errors: Tensor
    losses: Tensor


@dataclass(frozen=True)
class SelectionData:
    """What a ranking may look at.

    Attributes:
        outcomes: What each candidate gave of the selection images.
        targets: Their targets, None where there are none: class indices (images,), integers 0 and 1 (images x labels),
            or floats (images,) or (images x numbers).
        last_sources: For each candidate the name of the source that its first way ends in.
        sources: What each source, unmodified, gave of the same images, by name.
        num_classes: Number of classes, labels or numbers; None without targets.
        ranks: Who shares the judging.
        errors: Where a ranking leaves, by a candidate's number, its errors on images left out (`Judgement`).
        losses: Likewise its losses.
    """

    outcomes: Sequence[Outcome]
    targets: Tensor | None
    last_sources: Sequence[str]
    sources: Mapping[str, Outcome]
    num_classes: int | None
    ranks: Ranks = ALONE
    errors: dict[int, Tensor] = field(default_factory=dict, repr=False)
    losses: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @property
    def features(self) -> list[Tensor]:
        """Each candidate's features of the selection images, raw, all taps side by side."""
        return [outcome.features for outcome in self.outcomes]

    @property
    def own_features(self) -> list[Tensor]:
        """For each candidate the features that its last source, unmodified, gives."""
        return [self.sources[name].features for name in self.last_sources]

    def judge(self, score: Callable[[int, Tensor], Judgement]) -> list[dict[str, float]]:
        """What is said of each candidate by its number and its readout's Gram matrix; notes errors and losses.

        Those that begin alike are judged in a row, so that few matrices are held at once.
        """
        numbers = in_order_of_taps(self.outcomes)

        def judge_some(some: Sequence[int]) -> list[Judgement]:
            grams = grams_of([self.outcomes[number] for number in some])
            return [score(some[place], gram) for place, gram in grams]

        scores: dict[int, dict[str, float]] = {}
        for number, judgement in zip(numbers, self.ranks.share(numbers, judge_some), strict=True):
            scores[number] = judgement.scores
            self.errors[number], self.losses[number] = judgement.errors, judgement.losses
        return [scores[number] for number in range(len(self.outcomes))]

    @cached_property
    def source_grams(self) -> dict[str, Tensor]:
        """The Gram matrix of each source, by name."""
        for name, outcome in self.sources.items():
            with _naming([name]):
                centre_rows(outcome.features, estimator="biased")  # which says what cannot be compared with
        names = list(self.sources)
        return {names[number]: gram for number, gram in grams_of(list(self.sources.values()))}

    @cached_property
    def columns(self) -> Tensor:
        """The targets as columns whose R2 says something (`comparable_columns`)."""
        if self.targets is None:
            raise CalibrationError(MISSING_LABELS)
        return comparable_columns(self.targets, num_classes=self.num_classes)

    @cached_property
    def _of_sources(self) -> list[Tensor]:
        """What ridge heads on the sources' own readouts say of each image left out (images x columns)."""
        predictions = []
        for name, gram in self.source_grams.items():
            with _naming([name]):
                predictions += predict_left_out(gram, self.columns)
        return predictions

    @cached_property
    def softened(self) -> Tensor:
        """The softened label of each image (images x classes), float64: `by_loo_soft_r2`."""
        return (self.columns + torch.stack(self._of_sources).mean(0)) / 2

    @cached_property
    def softened_classes(self) -> Tensor:
        """The same as probabilities of classes, those of the sources' heads calibrated."""
        probabilities = [(class_temperature(x, self.columns) * x).softmax(1) for x in self._of_sources]
        return (self.columns + torch.stack(probabilities).mean(0)) / 2


Ranking = Callable[[Sequence[Candidate], SelectionData], Sequence[Mapping[str, float]]]
"""Gives each candidate's scores by name; the first name decides, the others break ties; more is better."""


def in_order_of_taps(outcomes: Sequence[Outcome]) -> list[int]:
    """The numbers of outcomes, those whose taps begin alike in a row."""
    return sorted(range(len(outcomes)), key=lambda number: outcomes[number].keys)


def grams_of(outcomes: Sequence[Outcome]) -> Iterator[tuple[int, Tensor]]:
    """The number and the Gram matrix (images x images, float64) of each outcome, those that begin alike in a row."""
    order = in_order_of_taps(outcomes)
    common = [common_length(outcomes[one].keys, outcomes[other].keys) for one, other in pairwise(order)]
    sums: dict[int, Tensor] = {}  # by how many taps, of those that an outcome to come goes on from
    for place, number in enumerate(order):
        outcome, needed = outcomes[number], set(accumulate(common[place:], min))
        known = max(sums, default=0)
        if outcome.blocks is None:
            x = outcome.features.double()
            gram = (x - x.mean(0)) @ (x - x.mean(0)).T
        else:
            gram = sums.get(known, torch.zeros(()))
            for length, key in enumerate(outcome.keys[known:], start=known + 1):
                gram = gram_of_taps(outcome, {key}).add_(gram)
                if length in needed:
                    sums[length] = gram
        sums = {length: gram for length, gram in sums.items() if length in needed}
        yield number, gram


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """How many items two sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def gram_of_taps(outcome: Outcome, keys: Collection[str]) -> Tensor:
    """The Gram matrix (images x images, float64) of some taps of an outcome that is in blocks, by their keys."""
    assert outcome.blocks is not None
    gram, widths = torch.zeros(()), iter(outcome.blocks)
    for key, x in zip(outcome.keys, outcome.vectors, strict=True):
        for block in x.split(_take(widths, x.shape[1]), dim=1):
            if key in keys:
                gram = block_gram(block).add_(gram)
    return gram


def _take(widths: Iterator[int], total: int) -> list[int]:
    """The next widths that make up a total."""
    taken: list[int] = []
    while sum(taken) < total:
        taken.append(next(widths))
    return taken


def by_loo_soft_r2(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """Leave-one-out R2 of softened labels, then of the labels, then accuracy and negative log-loss.

    An image's softened label is the mean of its own and of what ridge heads on the sources' own readouts say of it when
    they have not seen it. Few labels are noisy targets; what the sources make of all the others is less so (as in
    knowledge distillation, Hinton et al. 2015), and unlike agreement it leaves out what the task has no use for. It
    favours the sources a little, whose own words they are. Numbers are standardised, and softened likewise; for them
    and for several labels R2 alone breaks ties.
    """
    return selection.judge(lambda _, gram: soft_scores(gram, selection))


def by_loo_r2(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """Leave-one-out R2 of a ridge head's scores on the selection images, then its accuracy and negative log-loss.

    Accuracy counts on which side of a boundary an image falls; this counts how far, and needs no temperature.
    """
    return selection.judge(lambda _, gram: label_scores(gram, selection))


def soft_scores(gram: Tensor, selection: SelectionData) -> Judgement:
    """What `by_loo_soft_r2` says of one readout."""
    predictions, softened = predict_left_out(gram, selection.columns, selection.softened)
    errors = squared_errors(softened, selection.softened)
    scores, losses = scores_of_predictions(predictions, selection)
    return Judgement({"loo_soft_r2": 1 - float(errors.sum()), **scores}, errors, errors if losses is None else losses)


def label_scores(gram: Tensor, selection: SelectionData) -> Judgement:
    """What `by_loo_r2` says of one readout."""
    (predictions,) = predict_left_out(gram, selection.columns)
    errors = squared_errors(predictions, selection.columns)
    scores, losses = scores_of_predictions(predictions, selection)
    return Judgement(scores, errors, errors if losses is None else losses)


def scores_of_predictions(predictions: Tensor, selection: SelectionData) -> tuple[dict[str, float], Tensor | None]:
    """R2 of what a ridge head says of each image left out; of classes accuracy and log-loss, too, and losses.

    The loss of an image (images,), a share of their mean, is the cross entropy of its softened classes with
    probabilities at the temperature that suits these: unlike a squared error it is small where a head is right and not
    yet sure of it. None: no classes.
    """
    columns = selection.columns
    scores = {"loo_r2": r2(predictions, columns)}
    assert selection.targets is not None  # or there would be no columns
    if task_of(selection.targets) != "multiclass":
        return scores, None
    classes = columns.argmax(1)
    logits = class_temperature(predictions, columns) * predictions
    accuracy = (predictions.argmax(1) == classes).double().mean()
    scores |= {"loo_accuracy": float(accuracy), "neg_loo_log_loss": -float(F.cross_entropy(logits, classes))}
    softened = selection.softened_classes
    logits = class_temperature(predictions, softened) * predictions
    return scores, F.cross_entropy(logits, softened, reduction="none") / len(columns)


def squared_errors(predictions: Tensor, columns: Tensor) -> Tensor:
    """Each image's squared error (images,), as a share of the columns' variance."""
    return (predictions - columns).square().sum(1) / (columns - columns.mean(0)).square().sum()


def by_consensus(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """Leave-one-out R2 of all sources' own readouts together, predicted from a candidate's; then its agreement.

    Each source weighs the same. One reference for all candidates makes those comparable that end in different sources:
    what several sources see in an image counts more than what one of them sees alone. Each image's reference is
    predicted from the others, so that a wide readout has no advantage of its width. Without labels nothing shows that a
    candidate is better than every source, so none scores higher than the best of them. "agreement" is the debiased CKA
    of a candidate's readout with its last source's own, of which a source has 1.
    """
    sources = selection.source_grams
    reference = _reference(sources)

    def score(number: int, gram: Tensor) -> Judgement:
        with _naming(sources):
            (predictions,) = predict_left_out(gram, reference)
        last, errors = selection.last_sources[number], squared_errors(predictions, reference)
        with _naming([last]):
            agreement = float(cka_of_grams(gram, sources[last]))
        return Judgement({"consensus": 1 - float(errors.sum()), "agreement": agreement}, errors, errors)

    scores = selection.judge(score)
    pairs = list(zip(candidates, scores, strict=True))
    best = max((found["consensus"] for candidate, found in pairs if candidate.kind == "source"), default=math.inf)
    return [{**found, "consensus": min(found["consensus"], best)} for found in scores]


def by_cka_product(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """The product of the CKAs of a candidate's stitches: the paper's guide, a weak predictor."""
    return [{"cka_product": candidate.cka_product} for candidate in candidates]


RANKINGS: dict[str, Ranking] = {
    "loo_soft_r2": by_loo_soft_r2,
    "loo_r2": by_loo_r2,
    "consensus": by_consensus,
    "cka_product": by_cka_product,
}

NEED_LABELS = ("loo_soft_r2", "loo_r2")
MISSING_LABELS = "This ranking needs labels for the selection images; use ranking='consensus' without."


def find_ranking(ranking: str | Ranking, *, labelled: bool) -> Ranking:
    """The ranking of that name; "auto": leave-one-out R2 of softened labels, or without labels the sources' consensus.

    A name that is unknown is a StitchError.
    """
    if not isinstance(ranking, str):
        return ranking
    name = ("loo_soft_r2" if labelled else "consensus") if ranking == "auto" else ranking
    if name not in RANKINGS:
        raise StitchError(f"Unknown ranking {ranking!r}; choose from {['auto', *RANKINGS]} or give a function.")
    return RANKINGS[name]


def _reference(grams: Mapping[str, Tensor]) -> Tensor:
    """Leading directions (images x directions) of all sources' readouts, each of the same total variance."""
    together = torch.stack([centred / centred.trace() for centred in map(centre_gram, grams.values())]).sum(0)
    squares, directions = torch.linalg.eigh(together)
    return (directions * squares.clamp_min(0).sqrt())[:, -_REFERENCE_DIRECTIONS:]


def predict_left_out(gram: Tensor, *targets: Tensor) -> list[Tensor]:
    """Each image's targets as ridge regression on the others predicts them, at the strengths of least squared error."""
    fit = loo_ridge_of_gram(gram, torch.cat(targets, dim=1), strengths=DEFAULT_STRENGTHS)
    predictions, widths = [], [columns.shape[1] for columns in targets]
    for place, errors in enumerate(fit.errors.split(widths, dim=1)):
        of_all = fit.predict_left_out([fit.strengths[int(errors.sum(1).argmin())]])[0]
        predictions.append(of_all.split(widths, dim=1)[place])
    return predictions


@contextmanager
def _naming(sources: Iterable[str]) -> Iterator[None]:
    """Say with whose features a candidate's cannot be compared."""
    try:
        yield
    except CalibrationError as error:
        names = " and ".join(map(repr, sources))
        raise CalibrationError(
            f"Agreement with the readout of source {names} on the selection images: {error}"
        ) from error


def require_labels(batches: Iterable[Batch]) -> Iterable[Batch]:
    """The same batches, once the first is seen to have labels; a CalibrationError where it has none."""
    iterator = iter(batches)
    first = next(iterator, None)
    if isinstance(first, Tensor) or (first is not None and len(first) < 2):
        raise CalibrationError(MISSING_LABELS)
    if iterator is not batches:
        # What can be read anew is: a loader's workers would wait through the whole search, and Ctrl-C would end them.
        return batches
    return chain([] if first is None else [first], iterator)
