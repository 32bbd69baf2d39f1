from __future__ import annotations

import dataclasses
import random
from typing import Literal

import pytest
import torch
from doubles.clock import Clock, timed
from doubles.small_sources import plain
from doubles.tensors import digits, noise

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget, Cost
from lightning_stitch.errors import BudgetError, CalibrationError
from lightning_stitch.progress import Silent
from lightning_stitch.recipe import FragmentRef, Preprocessing, Recipe, SourceRef
from lightning_stitch.search.results import Ranked, SearchResult, choose, measure_candidates, pick
from lightning_stitch.search.strategies import Beam, DepthFirst
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.candidates import Candidate

SHAPE = (3, 16, 16)
CALIBRATION = 0.7 * digits(12, 16)[0] + 0.3 * noise(12, *SHAPE)
SELECTION = [digits(40, 16, first=20, classes=3)]
EVERYTHING = DepthFirst(span=99, threshold=-9, edge_threshold=-9, max_fragments=4)
SOURCE = SourceRef("a", "a", "timm", "a", "sha256:0", Preprocessing(SHAPE, (0.5,) * 3, (0.5,) * 3))


def random_result(seed: int) -> SearchResult:
    """Sixty networks, the dearer the better on the whole, of so few costs and scores that there are ties."""
    draw = random.Random(seed)
    recipe = Recipe.chain((SOURCE,), (FragmentRef("a", None, None),), num_features=2, input_size=SHAPE)
    found = []
    for _ in range(60):
        size = draw.randrange(9)
        params, macs, activation_bytes = (size + draw.randrange(4) for _ in range(3))
        scores = {"accuracy": (size + draw.randrange(5)) // 2 / 6, "certainty": draw.randrange(3) / 2}
        candidate = Candidate(recipe, "source", ((),), (), Cost(params, macs))
        found.append(Ranked(candidate, scores, features=1, seconds=0.0, activation_bytes=activation_bytes))
    found.sort(key=lambda r: tuple(-value for value in r.scores.values()))
    return choose(found, Budget(), rejected={}, seconds={}, num_selection_labels=0)


@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("seed", range(8))
def test_the_pareto_set_is_what_nothing_else_beats(seed: int, measure: Literal["macs", "params"]) -> None:
    result = random_result(seed)

    def cost_of(r: Ranked) -> float:
        return float(getattr(r.candidate.cost, measure))

    def beats(one: Ranked, other: Ranked) -> bool:
        costs = [cost_of(r) for r in (one, other)]
        scores = [r.scores["accuracy"] for r in (one, other)]
        if costs[0] == costs[1] and scores[0] == scores[1]:
            return result.ranked.index(one) < result.ranked.index(other)
        return costs[0] <= costs[1] and scores[0] >= scores[1]

    # By identity: two of the sixty may be alike in every figure.
    expected = [r for r in result.ranked if not any(beats(other, r) for other in result.ranked if other is not r)]
    found = result.pareto(measure)
    assert len(found) > 2
    assert {id(r) for r in found} == {id(r) for r in expected}
    costs = [cost_of(r) for r in found]
    assert costs == sorted(set(costs))
    assert [r.score for r in found] == sorted({r.score for r in found})


def test_the_pareto_set_is_by_macs_where_nothing_is_said() -> None:
    result = random_result(0)
    assert result.pareto() == result.pareto("macs") != result.pareto("params")


def test_only_what_keeps_the_other_limits_is_measured_and_what_is_over_one_no_further() -> None:
    timed_candidates: list[Candidate] = []

    def latency_ms(candidate: Candidate) -> float:
        timed_candidates.append(candidate)
        return candidate.cost.macs / 2

    unmeasured = [dataclasses.replace(r, activation_bytes=None) for r in random_result(0).ranked]
    budget = Budget(max_macs=8, max_activation_bytes=6, max_latency_ms=3, min_score=0.5)
    meters = {"activation_bytes": lambda c: c.cost.params, "latency_ms": latency_ms}
    ranked = measure_candidates(unmeasured, budget, meters, Silent())
    for r in ranked:
        cost = r.candidate.cost
        counted = cost.macs <= 8 and r.score >= 0.5
        assert r.activation_bytes == (cost.params if counted else None)
        assert r.latency_ms == (cost.macs / 2 if counted and cost.params <= 6 else None)
    assert len(timed_candidates) == sum(r.latency_ms is not None for r in ranked) > 0
    stitched = [
        dataclasses.replace(r, candidate=dataclasses.replace(r.candidate, kind="stitched"))
        for r in ranked[1:]
        if r.candidate.cost.macs <= 8  # a search composes nothing else
    ]
    ranked = [ranked[0], *stitched]
    result = choose(ranked, budget, rejected={"before": 1}, seconds={}, num_selection_labels=0)
    within = [r for r in ranked if r.latency_ms is not None and r.latency_ms <= 3]
    assert result.best is min(within, key=lambda r: r.candidate.cost.macs)
    over = [r for r in stitched if r.score >= 0.5 and r.candidate.cost.params > 6]
    assert result.rejected["over the activation budget when measured"] == len(over) > 0
    slow = [r for r in stitched if r.latency_ms is not None and r.latency_ms > 3]
    assert result.rejected["over the latency budget when measured"] == len(slow) > 0


# -- another budget afterwards ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(
        [plain("a", (8, 9, 10), seed=0), plain("b", (4, 7, 12), seed=1, strides=(2, 2, 1))],
        SHAPE,
        settings=CalibrationSettings(readout="last"),
    )


@pytest.fixture(scope="module")
def free(pool: Pool) -> SearchResult:
    return pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING)


@pytest.mark.parametrize("min_score", [None, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_a_budget_afterwards_gives_what_a_search_under_it_gives(
    pool: Pool, free: SearchResult, seed: int, min_score: float | None
) -> None:
    draw = random.Random(seed)
    measures = draw.sample(["params", "macs"], seed % 2 + 1)
    limits = {f"max_{m}": draw.choice([getattr(r.candidate.cost, m) for r in free.ranked]) for m in measures}
    budget = Budget(**limits, min_score=min_score)
    found = free.within(budget)
    if found is None:
        with pytest.raises(BudgetError):
            pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, budget=budget)
        return
    again = pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, budget=budget)
    assert found.candidate.recipe == again.best.candidate.recipe
    if again.best_stitched is not None and min_score is None:
        stitched = free.within(budget, kind="stitched")
        assert stitched is not None
        assert stitched.candidate.recipe == again.best_stitched.candidate.recipe


def test_without_a_limit_it_is_the_best_and_of_a_kind_the_best_of_that_kind(free: SearchResult) -> None:
    assert free.within(Budget()) is free.best
    assert free.within(Budget(), kind="source") is free.best_source
    assert free.within(Budget(), kind="self-stitched") is next(
        r for r in free.ranked if r.candidate.kind == "self-stitched"
    )
    assert free.within(Budget(), kind="stitched") is free.best_stitched
    first = next(r for r in free.ranked if r.candidate.kind == "early exit")
    assert free.within(Budget(), kind="early exit") is first


def test_where_nothing_keeps_the_budget_there_is_none(free: SearchResult) -> None:
    assert free.within(Budget(max_macs=1)) is None
    cheapest = min(r.candidate.cost.macs for r in free.ranked)
    assert free.within(Budget(max_macs=cheapest)) is not None
    assert free.within(Budget(max_macs=cheapest), kind="source") is None


def test_with_a_least_score_it_is_the_one_of_the_fewest_macs(free: SearchResult) -> None:
    accuracies = {id(r): r.scores["loo_accuracy"] for r in free.ranked}
    least = sorted(accuracies.values())[len(accuracies) // 2]
    found = free.within(Budget(min_score=least))
    assert found is not None
    reaching = [r for r in free.ranked if accuracies[id(r)] >= least]
    assert found.candidate.cost.macs == min(r.candidate.cost.macs for r in reaching)
    assert len(reaching) < len(free.ranked)
    assert free.within(Budget(min_score=max(accuracies.values()) + 1e-6)) is None


def test_activation_bytes_are_there_where_a_search_measured_them(pool: Pool, free: SearchResult) -> None:
    words = r"measured no activation bytes; search with a budget that limits max_activation_bytes"
    with pytest.raises(BudgetError, match=words):
        free.within(Budget(max_activation_bytes=1e9))
    limited = Budget(max_activation_bytes=1e9, max_macs=free.best_source.candidate.cost.macs - 1)
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, budget=limited)
    figures = [r.activation_bytes for r in result.ranked]
    assert None in figures  # of the source that is over the limit on MACs
    least = min(figure for figure in figures if figure is not None)
    assert result.within(Budget(max_activation_bytes=least - 1)) is None


def test_a_limit_on_latency_needs_a_search_that_measured_it(free: SearchResult, clock: Clock) -> None:
    with pytest.raises(BudgetError, match=r"measured no latencies; search with a budget that limits max_latency_ms"):
        free.within(Budget(max_latency_ms=10))
    slow, fast = timed("slow", (8, 9, 10), (1, 10, 1)), timed("fast", (8, 9, 12), (1, 1, 1), seed=1)
    result = Pool([slow, fast], SHAPE, settings=CalibrationSettings(readout="last")).search(
        [CALIBRATION], SELECTION, strategy=Beam(), budget=Budget(max_latency_ms=6)
    )
    found = result.within(Budget(max_latency_ms=2.5))
    assert found is next(r for r in result.ranked if r.latency_ms is not None and r.latency_ms <= 2.5)
    assert found is not None
    assert result.within(Budget(max_latency_ms=0.5)) is None
    # What was over the first budget was not measured, and is in no other.
    assert result.within(Budget(max_latency_ms=99), kind="source") is not None
    assert all(r.latency_ms is None for r in result.ranked if r.candidate.recipe.path.startswith("slow: image .. 2"))


def test_a_source_that_overflows_on_the_images_to_choose_by_is_named() -> None:
    weak = plain("weak", (4, 5, 6), seed=0)
    with torch.no_grad():
        weak.module[3].weight *= 3e38  # type: ignore[index, operator]
    pool = Pool([plain("fine", (5, 6, 7), seed=1), weak], SHAPE, settings=CalibrationSettings(until="output"))
    with pytest.raises(CalibrationError, match=r"Source 'weak' gives NaN or infinite values at its end"):
        pool.search([CALIBRATION * 1e-3], SELECTION)


def judged(kind: str, macs: int, share: float, *, noise_seed: int | None = None, size: int | None = None) -> Ranked:
    """A network whose squared error over 50 images is a share of the variance, the same of all, or with noise."""
    fragment = FragmentRef("a", None, None, image_size=None if size is None else (size, size))
    recipe = Recipe.chain((SOURCE,), (fragment,), num_features=2, input_size=SHAPE)
    candidate = Candidate(recipe, kind, ((),), (), Cost(1, macs))  # type: ignore[arg-type]
    errors = torch.full((50,), share / 50, dtype=torch.float64)
    if noise_seed is not None:
        noise_of_images = torch.randn(50, generator=torch.Generator().manual_seed(noise_seed)).double()
        errors = errors + 0.02 * (noise_of_images - noise_of_images.mean())
    return Ranked(candidate, {"loo_r2": 1 - float(errors.sum())}, features=1, seconds=0.0, errors=errors)


def chosen(*ranked: Ranked) -> Ranked:
    return pick(sorted(ranked, key=lambda r: -r.score), Budget())


def test_what_is_not_ahead_by_a_standard_error_does_not_come_before_a_source_or_a_longer_exit() -> None:
    source, ahead = judged("source", 9, 0.50), judged("stitched", 5, 0.40)
    assert chosen(source, ahead) is ahead
    lucky = judged("stitched", 5, 0.45, noise_seed=0)
    assert lucky.score > source.score
    assert chosen(source, lucky) is source
    short, long = judged("early exit", 3, 0.5), judged("early exit", 4, 0.5)
    small = judged("smaller image", 6, 0.5, size=8)
    assert chosen(short, long, small) is long
    noisy = judged("stitched", 2, 0.45, noise_seed=0)
    assert chosen(noisy, short, long, small) is long
    assert chosen(noisy, judged("shortened", 2, 0.6)) is noisy


def test_several_side_by_side_are_taken_where_they_are_ahead_of_the_best_alone_by_a_standard_error() -> None:
    source = judged("source", 9, 0.50)
    assert chosen(source, judged("side by side", 20, 0.49, noise_seed=1)) is source
    both = judged("side by side", 20, 0.45)
    assert chosen(source, both) is both
    assert chosen(both) is both


def test_with_a_least_score_or_unknown_errors_the_old_order_stands() -> None:
    source, cheap = judged("source", 9, 0.50), judged("stitched", 5, 0.50)
    assert pick([source, cheap], Budget(min_score=0.4)) is cheap
    unknown = dataclasses.replace(judged("stitched", 5, 0.49), errors=None)
    assert chosen(source, unknown) is unknown
