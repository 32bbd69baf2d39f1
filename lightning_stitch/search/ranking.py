"""Order candidates by what they gave on the selection images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import DEFAULT_STRENGTHS, comparable_columns, count_of, fit_ridge_head, task_of
from lightning_stitch.maths import centre_rows, linear_cka, loo_ridge, r2
from lightning_stitch.stitching import Batch, Candidate

_REFERENCE_DIRECTIONS = 64  # of three networks' 3,840 features they hold nine tenths; more order no differently


@dataclass(frozen=True, slots=True)
class SelectionData:
    """What a ranking may look at.

    Attributes:
        features: Each candidate's features of the selection images.
        targets: Their targets, None where there are none: class indices (images,), integers 0 and 1 (images x labels),
            or floats (images,) or (images x numbers).
        own_features: For each candidate the features that its last source, unmodified, gives of the same images.
        num_classes: Number of classes, labels or numbers; None without targets.
    """

    features: Sequence[Tensor]
    targets: Tensor | None
    own_features: Sequence[Tensor]
    num_classes: int | None


Ranking = Callable[[Sequence[Candidate], SelectionData], Sequence[Mapping[str, float]]]
"""Gives each candidate's scores by name; the first name decides, the others break ties; more is better."""


def by_loo_soft_r2(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """Leave-one-out R2 of softened labels, then of the labels, then accuracy and negative log-loss.

    An image's softened label is the mean of its own and of what ridge heads on the sources' own features say of it when
    they have not seen it. Few labels are noisy targets; what the sources make of all the others is less so (as in
    knowledge distillation, Hinton et al. 2015), and unlike agreement it leaves out what the task has no use for. It
    favours the sources a little, whose own words they are. Numbers are standardised, and softened likewise; for them
    and for several labels R2 alone breaks ties.
    """
    scores = by_loo_r2(candidates, selection)
    soft = softened_labels(candidates, selection)
    return [
        {"loo_soft_r2": r2(predict_left_out(features, soft), soft), **score}
        for features, score in zip(selection.features, scores, strict=True)
    ]


def softened_labels(candidates: Sequence[Candidate], selection: SelectionData) -> Tensor:
    """The softened label of each image (images x classes), float64."""
    assert selection.targets is not None  # or there would be no scores
    labels = comparable_columns(selection.targets, num_classes=selection.num_classes)
    predictions = []
    for name, features in _source_features(candidates, selection).items():
        with _naming([name]):
            predictions.append(predict_left_out(features, labels))
    return (labels + torch.stack(predictions).mean(0)) / 2


def by_loo_r2(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """Leave-one-out R2 of a ridge head's scores on the selection images, then its accuracy and negative log-loss.

    Accuracy counts on which side of a boundary an image falls; this counts how far, and needs no temperature.
    """
    if selection.targets is None:
        raise CalibrationError(MISSING_LABELS)
    count = selection.num_classes if selection.num_classes is not None else count_of(selection.targets)
    ranked = []
    for features in selection.features:
        _, fit = fit_ridge_head(features, selection.targets, num_classes=count, task=task_of(selection.targets))
        scores = {"loo_r2": fit.loo_r2}
        if fit.loo_accuracy is not None and fit.loo_log_loss is not None:
            scores |= {"loo_accuracy": fit.loo_accuracy, "neg_loo_log_loss": -fit.loo_log_loss}
        ranked.append(scores)
    return ranked


def by_consensus(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """Leave-one-out R2 of all sources' own features together, predicted from a candidate's; then its agreement.

    Each source weighs the same. One reference for all candidates makes those comparable that end in different sources:
    what several sources see in an image counts more than what one of them sees alone. Without labels nothing shows
    that a candidate is better than every source, so none scores higher than the best of them. "agreement" is the
    debiased CKA of a candidate's features with its last source's own, of which a source has 1.
    """
    sources = _source_features(candidates, selection)
    reference = _reference(sources)
    scores = []
    for candidate, features, of_source in zip(candidates, selection.features, selection.own_features, strict=True):
        with _naming(sources):
            explained = r2(predict_left_out(features, reference), reference)
        with _naming([_last_source(candidate)]):
            scores.append({"consensus": explained, "agreement": float(linear_cka(features, of_source))})
    of_sources = (score["consensus"] for score, c in zip(scores, candidates, strict=True) if c.kind == "source")
    best = max(of_sources, default=math.inf)
    return [{**score, "consensus": min(score["consensus"], best)} for score in scores]


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


def _source_features(candidates: Sequence[Candidate], selection: SelectionData) -> dict[str, Tensor]:
    """Features of the sources in which candidates end, by name."""
    return {_last_source(c): features for c, features in zip(candidates, selection.own_features, strict=True)}


def _reference(sources: Mapping[str, Tensor]) -> Tensor:
    """Features of sources side by side, each of them centred and of the same total variance; leading directions only.

    A rotation of the columns changes no sum of squares, so that few columns hold (nearly) all that thousands do.
    """
    centred = []
    for name, features in sources.items():
        with _naming([name]):
            x = centre_rows(features, estimator="biased").rows.double()
        centred.append(x / torch.linalg.vector_norm(x))
    joined = torch.cat(centred, dim=1)
    if len(joined) > joined.shape[1]:
        return joined @ torch.linalg.eigh(joined.T @ joined).eigenvectors[:, -_REFERENCE_DIRECTIONS:]
    squares, directions = torch.linalg.eigh(joined @ joined.T)
    return (directions * squares.clamp_min(0).sqrt())[:, -_REFERENCE_DIRECTIONS:]


def predict_left_out(features: Tensor, target: Tensor) -> Tensor:
    """Each image's target as ridge regression on the others predicts it, at the strength of least squared error."""
    fit = loo_ridge(features, target, strengths=DEFAULT_STRENGTHS)
    return fit.predictions[int((fit.predictions - target).square().sum((1, 2)).argmin())]


@contextmanager
def _naming(sources: Iterable[str]) -> Iterator[None]:
    """Say with whose features a candidate's cannot be compared."""
    try:
        yield
    except CalibrationError as error:
        names = " and ".join(map(repr, sources))
        raise CalibrationError(
            f"Agreement with the features of source {names} on the selection images: {error}"
        ) from error


def _last_source(candidate: Candidate) -> str:
    return candidate.recipe.fragments[-1].source


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
