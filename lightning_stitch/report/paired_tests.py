"""Tests of two classifiers on the same images: is one better, are they equivalent, how far apart may they be.

Of `num_images` images the contender alone got `won` right, the rival alone `lost`; the others tell nothing of the
difference in accuracy, (won - lost) / num_images, but that it is small where they are many.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

# Probability left to a share of discordant images outside of the looked-at range (Berger and Boos 1994).
_LEFT_OUT = 0.001
_STANDARD_DEVIATIONS = 7  # of counts, beyond which nothing is summed up: less than 1e-11 of all


def mcnemar(won: int, lost: int) -> float:
    """Two-sided exact p-value of equal accuracy: of `won` successes in `won + lost` tosses of a fair coin.

    McNemar (1947), "Note on the sampling error of the difference between correlated proportions or percentages".
    """
    tosses = won + lost
    tail = sum(math.comb(tosses, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2**tosses)


def equivalence(won: int, lost: int, num_images: int, margin: float) -> float:
    """P-value of accuracies that differ by `margin` or more; small: they are equivalent.

    The larger one of two one-sided tests (Schuirmann 1987, "A comparison of the two one-sided tests procedure and the
    power approach for assessing the equivalence of average bioavailability"). Each is exact and unconditional: outcomes
    are ordered by Tango's score (1998, "Equivalence test and confidence interval for the difference in proportions for
    the paired-sample design"), and the probability of one as extreme is the largest over the shares of discordant
    images that are plausible (Berger and Boos 1994, "P values maximized over a confidence set for the nuisance
    parameter"). So few discordant images prove nothing by themselves: where there is none at
    all, equivalence within one point takes 301 images.
    """
    return max(_not_behind(won, lost, num_images, margin), _not_behind(lost, won, num_images, margin))


def score_interval(won: int, lost: int, num_images: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of the difference in accuracy: where Tango's score keeps it. It has a width where nothing differed."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    counts = _as_doubles(won, lost)
    ends = []
    for limit in (z, -z):
        low, high = -1.0, 1.0  # the score falls with the difference
        for _ in range(50):
            middle = (low + high) / 2
            falls_short = float(_score(*counts, num_images, middle)) < limit
            low, high = (low, middle) if falls_short else (middle, high)
        ends.append((low + high) / 2)
    return ends[0], ends[1]


def student_quantile(probability: float, degrees: int) -> float:
    """What |t| stays below with this probability."""
    angles, inside = _student(degrees)
    place = int(torch.searchsorted(inside, probability).clamp(1, len(inside) - 1))
    share = (probability - inside[place - 1]) / (inside[place] - inside[place - 1])
    return math.sqrt(degrees) * math.tan(float(torch.lerp(angles[place - 1], angles[place], share)))


def student_tail(t: float, degrees: int) -> float:
    """Probability that |t| is at least so large."""
    angles, inside = _student(degrees)
    place = math.atan(abs(t) / math.sqrt(degrees)) / float(angles[1])
    below = min(int(place), len(inside) - 2)
    return 1 - float(torch.lerp(inside[below], inside[below + 1], place - below))


@lru_cache(maxsize=8)
def _student(degrees: int) -> tuple[Tensor, Tensor]:
    """Angles from 0 to pi / 2 and P(|t| < sqrt(degrees) tan(angle)): the angle's density is cos^(degrees - 1)."""
    angles = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.double)
    inside = torch.cumulative_trapezoid(angles.cos() ** (degrees - 1), angles)
    inside = torch.nn.functional.pad(inside, (1, 0))
    return angles, inside / inside[-1]


def _as_doubles(won: int, lost: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(won, dtype=torch.double), torch.tensor(lost, dtype=torch.double)


def _score(won: Tensor, lost: Tensor, num_images: int, difference: float) -> Tensor:
    """How many standard deviations `won - lost` lies above what a true difference makes it; 0 where nothing differs.

    The variance is that of the likeliest shares of images won and lost which have this difference.
    """
    linear = (2 * num_images - won + lost) * difference - (won + lost)
    product = -4 * (2 * num_images) * (-lost * difference * (1 - difference))
    share_lost = ((linear**2 + product).sqrt() - linear) / (4 * num_images)
    variance = num_images * (2 * share_lost + difference * (1 - difference))
    return ((won - lost) - num_images * difference) / variance.clamp(min=1e-300).sqrt()


def _not_behind(won: int, lost: int, num_images: int, margin: float) -> float:
    """P-value of a contender that is `margin` or more behind."""
    observed = float(_score(*_as_doubles(won, lost), num_images, -margin))
    if observed <= 0 or margin <= 0:
        return 1.0
    shares = _plausible((won + lost) / num_images, num_images, at_least=margin)
    if not len(shares):
        return _LEFT_OUT
    win, lose = (shares - margin) / 2, (shares + margin) / 2
    wins, losses = (_counts(p, num_images) for p in (win, lose))
    won_counts, lost_counts = (x.flatten() for x in torch.meshgrid(wins, losses, indexing="ij"))
    kept = (won_counts + lost_counts <= num_images) & (
        _score(won_counts, lost_counts, num_images, -margin) >= observed - 1e-9
    )
    won_counts, lost_counts = won_counts[kept], lost_counts[kept]
    neither = num_images - won_counts - lost_counts
    ways = math.lgamma(num_images + 1) - sum((x + 1).lgamma() for x in (won_counts, lost_counts, neither))
    tails = [
        (ways + won_counts.xlogy(w) + lost_counts.xlogy(x) + neither.xlogy(1 - w - x)).exp().sum()
        for w, x in zip(win, lose, strict=True)
    ]
    return min(1.0, float(max(tails)) + _LEFT_OUT)


def _plausible(share: float, num_images: int, *, at_least: float) -> Tensor:
    """Shares of discordant images, half a standard error apart, with which the observed one is plausible.

    By Chernoff's bound the true one is outside of their range with a probability of at most `_LEFT_OUT`.
    """
    angles = torch.arange(0, math.pi / 2, 0.25 / math.sqrt(num_images), dtype=torch.double)
    grid = angles.sin().square()
    grid = torch.cat([torch.tensor([at_least], dtype=torch.double), grid[grid > at_least]])
    observed = torch.tensor([share, 1 - share], dtype=torch.double)
    both = torch.stack([grid, 1 - grid], 1)
    divergence = (observed.xlogy(observed) - observed.xlogy(both)).sum(1)
    return grid[divergence <= math.log(2 / _LEFT_OUT) / num_images]


def _counts(shares: Tensor, num_images: int) -> Tensor:
    """All counts that any of the shares makes likely."""
    spread = _STANDARD_DEVIATIONS * (num_images * shares * (1 - shares)).sqrt() + _STANDARD_DEVIATIONS**2 / 2
    low = max(0, math.floor(float((num_images * shares - spread).min())))
    high = min(num_images, math.ceil(float((num_images * shares + spread).max())))
    return torch.arange(low, high + 1, dtype=torch.double)
