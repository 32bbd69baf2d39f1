from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from doubles.pools import path, space_of
from doubles.small_sources import plain
from doubles.tensors import digits
from ranking import measure, report
from ranking_statistics import noise_ceiling, spearman, spearman_interval
from ranking_tasks import EveryKind, Task
from scipy.stats import spearmanr

from lightning_stitch.search.ranking import NEED_LABELS, RANKINGS
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.search.strategies import Beam


def answers(true: np.ndarray, images: int, seed: int) -> np.ndarray:
    """Candidates of known accuracy, right or wrong about each image independently."""
    return np.random.default_rng(seed).random((len(true), images)) < true[:, None]


@pytest.mark.parametrize("images", [100, 1000])
def test_the_ceiling_is_what_the_true_accuracies_reach(images: int) -> None:
    true = np.linspace(0.7, 0.8, 300)
    correct = [answers(true, images, seed) for seed in range(6)]
    found = [noise_ceiling(one, halvings=50) for one in correct]
    reached = np.mean([spearmanr(true, one.mean(1))[0] for one in correct])
    between = np.mean([spearmanr(a.mean(1), b.mean(1))[0] for a, b in pairwise(correct)])
    assert np.mean([one.ceiling for one in found]) == pytest.approx(reached, abs=0.03)
    assert np.mean([one.full for one in found]) == pytest.approx(between, abs=0.06)
    assert all(one.halves < one.full < one.ceiling < 1 for one in found)
    assert found[0].standard_error == pytest.approx(np.sqrt(0.75 * 0.25 / images), rel=0.02)
    assert not found[0].within_noise


def test_candidates_of_one_accuracy_lie_within_the_noise() -> None:
    found = noise_ceiling(answers(np.full(200, 0.8), 500, 0))
    assert found.within_noise
    assert found.spread == pytest.approx(found.standard_error, rel=0.1)
    assert found.paired_error == pytest.approx(found.standard_error, rel=0.02)
    assert found.halves == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(("differ", "within_noise"), [(0.0, True), (0.015, False)])
def test_images_that_are_hard_for_all_do_not_count_as_noise(differ: float, within_noise: bool) -> None:
    generator = np.random.default_rng(0)
    # Two images in five are easy for all, two hard for all; candidates differ on the others alone.
    image, candidate = np.arange(1000), np.arange(40)[:, None]
    chances = np.where(image < 800, image % 2, 0.5 + (candidate / 4 - 5) * differ)
    correct = generator.random((40, 1000)) < chances
    found = noise_ceiling(correct)
    assert found.within_noise is within_noise
    assert found.paired_error < 0.5 * found.standard_error
    assert found.spread < found.standard_error
    totals, easy = correct.sum(1), correct.sum(0)
    q = 39 * (40 * (totals**2).sum() - totals.sum() ** 2) / (40 * easy.sum() - (easy**2).sum())
    assert 39 * (found.spread / found.paired_error) ** 2 == pytest.approx(q)


def test_a_ranking_that_orders_nothing_predicts_nothing() -> None:
    assert spearman(np.ones(5), np.arange(5.0)) == 0
    assert spearman(np.arange(5.0), np.arange(5.0) ** 3) == pytest.approx(1)


def test_intervals_are_as_wide_as_chance_makes_them_and_average_over_draws() -> None:
    accuracies, scores = np.random.default_rng(0).random((2, 200))
    value, low, high = spearman_interval(scores[None], accuracies)
    assert value == pytest.approx(spearmanr(scores, accuracies)[0])
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(199), rel=0.25)
    both = np.stack([accuracies, -accuracies])
    assert spearman_interval(both, accuracies, resamples=20) == pytest.approx((0, 0, 0))
    assert spearman_interval(both[:1], accuracies, resamples=20) == pytest.approx((1, 1, 1))


def sources() -> list:
    return [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))]


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return space_of(sources(), digits(10, 16)[0])


def test_candidates_of_every_kind_are_distinct_counted_and_the_same_again(space: SearchSpace) -> None:
    strategy = EveryKind([Beam(width=2)], walks=2, paths=18)
    found = [tuple(path(candidate)) for candidate in strategy(space)]
    assert len(set(found)) == len(found) == len(strategy.origins)
    assert found == [tuple(path(candidate)) for candidate in EveryKind([Beam(width=2)], walks=2, paths=18)(space)]
    assert list(dict.fromkeys(strategy.origins.values())) == [
        "Beam(width=2, max_fragments=3)",
        "random walks of DepthFirst",
        "random paths with 1 stitch",
        "random paths with 2 stitches",
    ]
    one_stitch = [fragments for fragments in found if len(fragments) == 2]
    assert {fragments[0][2] for fragments in one_stitch} == {"0", "1"}
    assert {fragments[1][1] for fragments in one_stitch} == {"0", "1"}


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_report_has_every_ranking_and_says_where_nothing_can_be_ranked(shuffled: bool) -> None:
    images, labels = digits(537, 16, classes=3)
    if shuffled:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    sets = [[(x, y)] for x, y in zip(images.split([20, 260, 100, 157]), labels.split([20, 260, 100, 157]), strict=True)]
    found = measure(Task("three digits", sources(), *sets, num_classes=3), EveryKind([Beam()], walks=0, paths=9))
    rows = {row["ranking"]: row for row in found["rankings"]}
    assert set(rows) == {*RANKINGS, "MACs"}
    assert {name for name, row in rows.items() if row["labels"]} == set(NEED_LABELS)
    assert found["test_images"] == 157
    assert found["candidates"] == sum(found["origins"].values())
    assert found["within_noise"] is shuffled
    assert ("nothing can be ranked" in report(found)) is shuffled
    assert found["searched"]["candidates"] == found["origins"]["Beam(width=4, max_fragments=3)"]
    if not shuffled:
        assert rows["loo_r2"]["spearman_all"] > 0.6
        assert rows["loo_r2"]["of_ceiling_all"] == rows["loo_r2"]["spearman_all"] / found["ceiling"]
