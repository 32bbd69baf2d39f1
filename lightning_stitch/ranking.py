"""Run many candidates over the same images at once, and order them by what they gave.

Candidates that begin alike share their front: the set of candidates is a prefix tree, and each of its nodes runs once
for a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.functional import linear_cka
from lightning_stitch.heads import loo_scores
from lightning_stitch.segments import Segmented, chunks
from lightning_stitch.space import Candidate
from lightning_stitch.stitches import Stitch


@dataclass(slots=True)
class _Node:
    """One piece or stitch, its own time, the candidates that end here and the nodes behind."""

    run: Callable[[Tensor], Tensor] | None
    seconds: float = 0.0
    ends: list[int] = field(default_factory=list)
    children: dict[tuple[object, ...], _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one candidate gave.

    Attributes:
        features: (images, features), float32, on the CPU.
        seconds: Wall time of its own nodes, shared ones included: what it would have cost alone.
    """

    features: Tensor
    seconds: float


class PrefixTree:
    """Candidates as a prefix tree.

    Args:
        candidates: The candidates.
        parts: The sources that their steps refer to.
    """

    def __init__(self, candidates: Sequence[Candidate], parts: Sequence[Segmented]) -> None:
        self.parts = parts
        self.num_candidates = len(candidates)
        self._images_at_once = min(part.images_at_once for part in parts)
        self._roots: dict[int, _Node] = {}
        for index, candidate in enumerate(candidates):
            first = candidate.steps[0].source
            node = self._roots.setdefault(first, _Node(parts[first].preprocess))
            for step in candidate.steps:
                if step.stitch is not None:
                    node = self._stitch(node, step.stitch)
                for piece in range(step.first, step.last):
                    key = ("piece", step.source, piece)
                    node = node.children.setdefault(key, _Node(parts[step.source].pieces[piece]))
            node.ends.append(index)

    @staticmethod
    def _stitch(node: _Node, stitch: Stitch) -> _Node:
        # The same stitch object means the same path: a search fits each only once.
        return node.children.setdefault(("stitch", id(stitch)), _Node(stitch))

    def run(self, images: Iterable[Tensor], *, on_batch: Callable[[int], None] | None = None) -> list[Outcome]:
        """Run all candidates over the images.

        Args:
            images: Batches (batch, channels, height, width) in [0, 1].
            on_batch: Called with the number of images after each batch.

        Returns:
            One outcome for each candidate, in their order.
        """
        found: list[list[Tensor]] = [[] for _ in range(self.num_candidates)]
        for batch in images:
            with torch.inference_mode():
                for chunk in chunks(batch, self._images_at_once):
                    for root in self._roots.values():
                        self._descend(root, chunk, found)
            if on_batch is not None:
                on_batch(len(batch))
        if self.num_candidates and not found[0]:
            raise CalibrationError("There are no images to run the candidates on.")
        seconds = [0.0] * self.num_candidates
        for root in self._roots.values():
            self._add_seconds(root, 0.0, seconds)
        # Joined outside of inference mode, these are ordinary tensors again, on which a head can be fitted and trained.
        return [Outcome(torch.cat(batches), own) for batches, own in zip(found, seconds, strict=True)]

    def _descend(self, node: _Node, x: Tensor, found: list[list[Tensor]]) -> None:
        begun = time.perf_counter()
        assert node.run is not None
        x = node.run(x)
        node.seconds += time.perf_counter() - begun
        for index in node.ends:
            found[index].append(x.float().cpu())
        for child in node.children.values():
            self._descend(child, x, found)

    def _add_seconds(self, node: _Node, before: float, seconds: list[float]) -> None:
        total = before + node.seconds
        for index in node.ends:
            seconds[index] = total
        for child in node.children.values():
            self._add_seconds(child, total, seconds)


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
