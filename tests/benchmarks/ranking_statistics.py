"""How well a ranking can predict accuracies that are themselves measured with noise, and how well one does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, rankdata


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What noise in the accuracies leaves to be predicted.

    Attributes:
        halves: Spearman between the accuracies on two random halves of the test images, averaged over halvings.
        full: The same between two test sets of the full size, by the Spearman-Brown formula: 2 h / (1 + h).
        ceiling: sqrt(full): what the true accuracies themselves would reach against those on this test set.
        standard_error: Of one accuracy, binomial: sqrt(mean p (1 - p) / images).
        paired_error: Of one accuracy beside the others, which meet the same images: what is left of it when an image's
            difficulty, the same for all, is taken out.
        spread: Standard deviation of the accuracies over the candidates.
        within_noise: Whether candidates of one accuracy would spread as far (Cochran's Q, 5 % level): then nothing can
            be ranked.
    """

    halves: float
    full: float
    ceiling: float
    standard_error: float
    paired_error: float
    spread: float
    within_noise: bool


def noise_ceiling(correct: np.ndarray, *, halvings: int = 200, seed: int = 0) -> Ceiling:
    """The ceiling of candidates whose answers (candidates x test images, bool) are right or wrong."""
    generator = np.random.default_rng(seed)
    candidates, images = correct.shape
    found = []
    for _ in range(halvings):
        order = generator.permutation(images)
        one, other = (correct[:, half].mean(1) for half in (order[: images // 2], order[images // 2 :]))
        found.append(spearman(one, other))
    halves = float(np.mean(found))
    full = max(0.0, 2 * halves / (1 + halves))
    accuracies = correct.mean(1)
    spread = float(accuracies.std(ddof=1))
    standard_error = math.sqrt((accuracies * (1 - accuracies)).mean() / images)
    easiness = correct.mean(0)
    paired_error = math.sqrt((easiness * (1 - easiness)).sum() * candidates / (candidates - 1)) / images
    # Cochran's Q is (candidates - 1) times the squared ratio of the two.
    limit = chi2.ppf(0.95, candidates - 1) / (candidates - 1) * paired_error**2
    return Ceiling(
        halves, full, math.sqrt(full), standard_error, paired_error, spread, within_noise=bool(spread**2 <= limit)
    )


def spearman(scores: np.ndarray, accuracies: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis; 0 where one of the two is the same for all, which orders nothing."""
    x, y = (rankdata(values, axis=-1) for values in np.broadcast_arrays(scores, accuracies))
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    norms = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    return (x * y).sum(-1) / np.where(norms > 0, norms, np.inf)


def spearman_interval(
    draws: np.ndarray, accuracies: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman of scores (draws x candidates), averaged over draws, and its 95 % bootstrap interval over candidates."""
    count = len(accuracies)
    chosen = np.random.default_rng(seed).integers(count, size=(resamples, count))
    resampled = spearman(draws[:, chosen], accuracies[chosen]).mean(0)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(spearman(draws, accuracies).mean()), float(low), float(high)
