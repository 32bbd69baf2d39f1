"""Order candidates by what they gave on the selection images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_stitch.candidates import Candidate
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.functional import linear_cka
from lightning_stitch.heads import loo_scores


@dataclass(frozen=True, slots=True)
class SelectionData:
    """What a ranking may look at.

    Attributes:
        features: Each candidate's features of the selection images.
        targets: Their labels; None where there are none.
        own_features: For each candidate the features that its last source, unmodified, gives of the same images.
        num_classes: Number of classes; None without labels.
    """

    features: Sequence[Tensor]
    targets: Tensor | None
    own_features: Sequence[Tensor]
    num_classes: int | None


Ranking = Callable[[Sequence[Candidate], SelectionData], Sequence[Mapping[str, float]]]
"""Gives each candidate's scores by name; the first name decides, the others break ties; more is better."""


def by_loo_accuracy(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """Leave-one-out accuracy of a ridge head on the selection images, then its negative log-loss."""
    scores = []
    for features in selection.features:
        fit = loo_scores(features, _labels(selection), num_classes=selection.num_classes or 0)
        scores.append({"loo_accuracy": fit.loo_accuracy, "neg_loo_log_loss": -fit.loo_log_loss})
    return scores


def by_loo_log_loss(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """Negative leave-one-out log-loss of a ridge head on the selection images, then its accuracy."""
    return [
        {"neg_loo_log_loss": score["neg_loo_log_loss"], "loo_accuracy": score["loo_accuracy"]}
        for score in by_loo_accuracy(candidates, selection)
    ]


def by_agreement(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """Debiased CKA between a candidate's final features and its last source's own, on the selection images."""
    scores = []
    for candidate, features, own in zip(candidates, selection.features, selection.own_features, strict=True):
        try:
            scores.append({"agreement": float(linear_cka(features, own))})
        except CalibrationError as error:
            name = candidate.recipe.fragments[-1].source
            raise CalibrationError(
                f"Agreement with the features of source {name!r} on the selection images: {error}"
            ) from error
    return scores


def by_cka_product(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """The product of the CKAs of a candidate's stitches: the paper's guide, a weak predictor."""
    return [{"cka_product": candidate.cka_product} for candidate in candidates]


RANKINGS: dict[str, Ranking] = {
    "loo_accuracy": by_loo_accuracy,
    "loo_log_loss": by_loo_log_loss,
    "agreement": by_agreement,
    "cka_product": by_cka_product,
}


NEED_LABELS = ("loo_accuracy", "loo_log_loss")
MISSING_LABELS = "This ranking needs labels for the selection images; use ranking='agreement' without."


def find_ranking(ranking: str | Ranking, *, labelled: bool) -> Ranking:
    """The ranking of that name; "auto": leave-one-out accuracy with labels, agreement without.

    Raises:
        StitchError: If the name is unknown.
    """
    if not isinstance(ranking, str):
        return ranking
    name = ("loo_accuracy" if labelled else "agreement") if ranking == "auto" else ranking
    if name not in RANKINGS:
        raise StitchError(f"Unknown ranking {ranking!r}; choose from {['auto', *RANKINGS]} or give a function.")
    return RANKINGS[name]


def _labels(selection: SelectionData) -> Tensor:
    if selection.targets is None:
        raise CalibrationError(MISSING_LABELS)
    return selection.targets
