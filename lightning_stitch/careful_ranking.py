"""A ranking for few images: nothing takes the best source's place by luck alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_stitch.search.ranking import SelectionData, by_loo_soft_r2, left_out, softened_labels
from lightning_stitch.stitching.candidates import Candidate

_STANDARD_ERRORS = 2  # the best of some twenty, of which many are alike, is often one above its due


def by_careful_r2(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """`ranking.by_loo_soft_r2`, less two standard errors of how far a candidate is ahead of the best source.

    Of twenty candidates on a few images one is always ahead, and mostly by luck. The error is that of the mean over
    the images of the difference of both squared errors, image by image; it is none for sources. So a candidate comes
    before the best source where it is ahead by twice the error or more, and among candidates those count for less that
    are ahead by a few images.
    """
    scores = by_loo_soft_r2(candidates, selection)
    soft = softened_labels(candidates, selection)
    total = (soft - soft.mean(0)).square().sum()
    errors = [(left_out(features, soft) - soft).square().sum(1) / total for features in selection.features]
    sources = [number for number, candidate in enumerate(candidates) if candidate.kind == "source"]
    best = max(sources, key=lambda number: scores[number]["loo_soft_r2"])
    careful = []
    for candidate, score, error in zip(candidates, scores, errors, strict=True):
        spread = 0.0 if candidate.kind == "source" else float((errors[best] - error).std()) * math.sqrt(len(error))
        careful.append({"careful_r2": score["loo_soft_r2"] - _STANDARD_ERRORS * spread, **score})
    return careful
