from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from doubles.tensors import seeded
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, norm, t

from lightning_stitch.report.paired_tests import (
    equivalence,
    mcnemar,
    score_interval,
    student_quantile,
    student_tail,
)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (5, 0), (9, 3), (40, 60), (200, 130), (1500, 1400)])
def test_mcnemars_test_is_the_exact_binomial_one(won: int, lost: int) -> None:
    expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected, rel=1e-9)


def likeliest_share_lost(won: int, lost: int, num_images: int, difference: float) -> float:
    """Where the likelihood of a true difference has its maximum, found by search."""

    def unlikely(share: float) -> float:
        neither = num_images - won - lost
        counts = ((won, share + difference), (lost, share), (neither, 1 - 2 * share - difference))
        return -sum(count * math.log(p) for count, p in counts if count)

    bounds = (max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
    return float(minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-10}).x)


@pytest.mark.parametrize(("won", "lost", "num_images"), [(14, 0, 54), (1, 0, 30), (20, 9, 500), (300, 280, 4000)])
def test_at_the_intervals_ends_the_score_is_that_of_five_percent(won: int, lost: int, num_images: int) -> None:
    interval = score_interval(won, lost, num_images)
    for end, z in zip(interval, (norm.ppf(0.975), norm.ppf(0.025)), strict=True):
        share = likeliest_share_lost(won, lost, num_images, end)
        error = math.sqrt(num_images * (2 * share + end * (1 - end)))
        assert (won - lost - num_images * end) / error == pytest.approx(z, abs=1e-3)
    assert score_interval(lost, won, num_images) == pytest.approx([-end for end in interval[::-1]])


def test_the_interval_has_a_width_where_nothing_differed() -> None:
    half = norm.ppf(0.975) ** 2 / (100 + norm.ppf(0.975) ** 2)
    assert score_interval(0, 0, 100) == pytest.approx((-half, half))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    shares = torch.tensor([0.05, 0.02, 0.93])
    draws = torch.distributions.Multinomial(300, shares)
    torch.manual_seed(0)
    hits = 0
    for won, lost, _ in draws.sample((400,)).int().tolist():
        low, high = score_interval(won, lost, 300)
        hits += low <= 0.03 <= high
    assert 370 <= hits <= 392


@cache
def declared_equivalent(num_images: int, margin: float) -> tuple[torch.Tensor, ...]:
    """The outcomes (won, lost, neither) that are called equivalent, and the logarithm of how many ways lead to each."""
    counts = torch.arange(num_images + 1, dtype=torch.double)
    won, lost = (x.flatten() for x in torch.meshgrid(counts, counts, indexing="ij"))
    won, lost = won[won + lost <= num_images], lost[won + lost <= num_images]
    neither = num_images - won - lost
    pairs = zip(won.int().tolist(), lost.int().tolist(), strict=True)
    declared = torch.tensor([equivalence(a, b, num_images, margin) <= 0.05 for a, b in pairs])
    ways = math.lgamma(num_images + 1) - (won + 1).lgamma() - (lost + 1).lgamma() - (neither + 1).lgamma()
    return won[declared], lost[declared], neither[declared], ways[declared]


@pytest.mark.parametrize(("num_images", "margin"), [(20, 0.2), (40, 0.1)])
@pytest.mark.parametrize("times", [1, 1.5])
def test_what_is_not_equivalent_is_called_so_in_one_case_of_twenty_at_most(
    num_images: int, margin: float, times: float
) -> None:
    behind = times * margin
    won, lost, neither, ways = declared_equivalent(num_images, margin)
    sizes = []
    for share in torch.linspace(0, (1 - behind) / 2 - 1e-9, 40).double():
        likelihood = won.xlogy(share) + lost.xlogy(share + behind) + neither.xlogy(1 - 2 * share - behind)
        sizes.append(float((ways + likelihood).exp().sum()))
    assert 0 < max(sizes) <= 0.05


@pytest.mark.parametrize("won_alone", [0.0, 0.004, 0.02])
def test_the_size_holds_for_test_sets_as_they_are(won_alone: float) -> None:
    """A thousand images, a margin of one point, by simulation; 0.05 and three standard errors of it."""
    judged = cache(lambda won, lost: equivalence(won, lost, 1000, 0.01) <= 0.05)
    lost_alone = won_alone + 0.01
    counts = torch.multinomial(
        torch.tensor([won_alone, lost_alone, 1 - won_alone - lost_alone]).expand(3000, -1),
        1000,
        replacement=True,
        generator=seeded(0),
    )
    draws = [(int((row == 0).sum()), int((row == 1).sum())) for row in counts]
    declared = sum(judged(won, lost) for won, lost in draws) / len(draws)
    assert declared <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 3000)
    assert declared > 0.005 or won_alone == 0.02


@pytest.mark.parametrize(
    ("won", "lost", "num_images", "margin", "is_equivalent"),
    [
        (0, 0, 20, 0.01, False),  # no power: a network that is far behind may agree on twenty images
        (0, 0, 300, 0.01, False),
        (0, 0, 301, 0.01, True),
        (5, 5, 1000, 0.01, True),
        (0, 12, 1000, 0.01, False),
        (200, 200, 1000, 0.01, False),
        (200, 200, 1000, 0.05, True),
        (30, 60, 10_000, 0.01, True),
        (0, 0, 10_000, 0.0, False),
    ],
)
def test_equivalence_takes_images_enough(
    won: int, lost: int, num_images: int, margin: float, is_equivalent: bool
) -> None:
    p = equivalence(won, lost, num_images, margin)
    assert (p <= 0.05) is is_equivalent
    assert equivalence(lost, won, num_images, margin) == p


def test_with_many_discordant_images_it_is_about_walds_test() -> None:
    error = math.sqrt(900 - 20**2 / 20_000) / 20_000
    z = (0.01 - 20 / 20_000) / error
    expected = 0.5 * math.erfc(z / math.sqrt(2))
    assert equivalence(460, 440, 20_000, 0.01) == pytest.approx(expected + 0.001, abs=0.001)
    z = (0.01 - 20 / 4000) / (math.sqrt(900 - 20**2 / 4000) / 4000)
    expected = 0.5 * math.erfc(z / math.sqrt(2))
    assert equivalence(460, 440, 4000, 0.01) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("degrees", [1, 2, 5, 9, 400])
def test_students_distribution_is_scipys(degrees: int) -> None:
    assert student_quantile(0.95, degrees) == pytest.approx(t.ppf(0.975, degrees), rel=1e-7)
    for value in (0.0, 0.5, 2.3, -9.0):
        assert student_tail(value, degrees) == pytest.approx(2 * t.sf(abs(value), degrees), abs=1e-8)
