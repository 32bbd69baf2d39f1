from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

import pytest
import torch
from doubles.clock import Clock, timed
from doubles.pools import path
from doubles.progress import Recorder
from doubles.references import counted_bytes, sums_of
from doubles.small_sources import images_seen, plain
from doubles.tensors import digits, noise
from torch import Tensor

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget, Cost
from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.errors import BudgetError
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.ranking import SelectionData
from lightning_stitch.search.results import Ranked, SearchResult, pick
from lightning_stitch.search.strategies import Beam, DepthFirst
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.candidates import Candidate

SHAPE = (3, 16, 16)
CALIBRATION = 0.7 * digits(12, 16)[0] + 0.3 * noise(12, *SHAPE)
SELECTION = [digits(40, 16, first=20, classes=3)]
NO_STITCHES = Beam(max_fragments=2, threshold=2.0)
EVERYTHING = DepthFirst(span=99, threshold=-9, edge_threshold=-9, max_fragments=4)

# -- limits ----------------------------------------------------------------------------------------------------------


def test_costs_add_the_activations_that_are_alive_at_once_do_not() -> None:
    assert Cost(3, 40, 500, 0.5) + Cost(1, 2, 700, 0.25) == Cost(4, 42, None, 0.75)
    assert Cost(3, 40) + Cost(1, 2) == Cost(4, 42)
    assert sum([Cost(1, 2, 9), Cost(3, 4, 5)], Cost(0, 0)) == Cost(4, 6)


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (Cost(25_557_032, 4_089_184_256), "25.56 M parameters, 4089.2 M MACs"),
        (Cost(25_557_032, 4_089_184_256, 6_422_528), "25.56 M parameters, 4089.2 M MACs, 6.42 MB of activations"),
        (Cost(570, 23_000, 3072, 0.5), "0.00 M parameters, 0.0 M MACs, 0.00307 MB of activations"),
    ],
)
def test_a_cost_in_words(cost: Cost, words: str) -> None:
    assert str(cost) == words


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [
        (Budget(), True),
        (Budget(max_params=100), True),
        (Budget(max_params=99), False),
        (Budget(max_macs=2000.0), True),
        (Budget(max_macs=1999.5), False),
        (Budget(max_activation_bytes=300), True),
        (Budget(max_activation_bytes=299), False),
        (Budget(max_latency_ms=4), True),  # by estimate it may be 5
        (Budget(max_latency_ms=3.9), False),
        (Budget(min_score=1e9), True),  # a cost has none
        (Budget(max_params=100, max_macs=1999), False),
        (Budget(max_params=99, max_macs=2000), False),
        (Budget(100, 2000, 4, 300, 0.5), True),
        (Budget(100, 2000, 4, 299, 0.5), False),
    ],
)
def test_a_budget_allows_what_keeps_each_of_its_limits(budget: Budget, allowed: bool) -> None:
    assert budget.allows(Cost(params=100, macs=2000, activation_bytes=300, latency_ms=5.0)) is allowed


def test_activation_bytes_that_nobody_measured_keep_any_limit() -> None:
    assert Budget(max_activation_bytes=1, max_macs=40).allows(Cost(3, 40))
    assert not Budget(max_activation_bytes=1, max_macs=39).allows(Cost(3, 40))


@pytest.mark.parametrize("limit", [0, -1e6, float("nan")])
@pytest.mark.parametrize("name", ["max_params", "max_macs", "max_latency_ms", "max_activation_bytes"])
def test_a_limit_must_be_positive(name: str, limit: float) -> None:
    with pytest.raises(BudgetError, match=f"{name} must be positive or None; found {limit}"):
        Budget(**{name: limit})


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_a_least_score_must_be_finite(score: float) -> None:
    with pytest.raises(BudgetError, match=f"min_score must be a finite number or None; found {score}"):
        Budget(min_score=score)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(), "no limit"),
        (Budget(max_macs=2e9), "at most 2000 M MACs"),
        (Budget(max_params=2.5e6, max_macs=1e8), "at most 2.5 M parameters and at most 100 M MACs"),
        (
            Budget(max_latency_ms=12.5, max_activation_bytes=2e6, min_score=-0.25),
            "at most 2 MB of activations and at most 12.5 ms for one image and a score of at least -0.25",
        ),
    ],
)
def test_a_budget_in_words(budget: Budget, words: str) -> None:
    assert str(budget) == words


# -- searches under limits on cost -----------------------------------------------------------------------------------


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


def stitched(result: SearchResult) -> list[Ranked]:
    return [r for r in result.ranked if r.candidate.kind in ("stitched", "shortened")]


def composed(result: SearchResult) -> list[Ranked]:
    """All but the sources as they are and self-stitched, which are returned budget or no."""
    return [r for r in result.ranked if r.candidate.kind in ("stitched", "shortened", "early exit")]


def recipes(ranked: Sequence[Ranked]) -> list[dict[str, object]]:
    return [r.candidate.recipe.to_dict() for r in ranked]


def assert_same(found: Sequence[Ranked], expected: Sequence[Ranked]) -> None:
    """The same networks in the same order; how many receivers are scored at once shows in a CKA's last digit."""
    assert [path(r.candidate) for r in found] == [path(r.candidate) for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.candidate.recipe.scores == pytest.approx(other.candidate.recipe.scores, rel=1e-9)


def never() -> Iterator[Tensor]:
    raise AssertionError("an image was read")
    yield


def random_limits(free: SearchResult, seed: int) -> dict[str, float]:
    draw = random.Random(seed)
    measures = draw.sample(["params", "macs"], seed % 2 + 1)
    costs = [r.candidate.cost for r in free.ranked]
    return {f"max_{m}": draw.choice(sorted({getattr(cost, m) for cost in costs})[1:]) for m in measures}


@pytest.mark.parametrize("seed", range(6))
def test_what_is_returned_is_what_keeps_the_limits_of_all_that_there_is(
    pool: Pool, free: SearchResult, seed: int
) -> None:
    limits = random_limits(free, seed)

    def keeps(ranked: Ranked) -> bool:
        cost = ranked.candidate.cost
        return all(getattr(cost, limit.removeprefix("max_")) <= most for limit, most in limits.items())

    found = pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, budget=Budget(**limits))
    expected = [r for r in free.ranked if keeps(r)]
    assert len(free.ranked) > 20
    assert len(composed(free)) - len(stitched(free)) == sum(len(part.cuts) for part in pool.parts)
    assert_same(composed(found), [r for r in composed(free) if keeps(r)])
    assert_same([found.best], [pick(expected, Budget())])
    assert len(found.ranked) - len(composed(found)) == 4
    for r in (*composed(found), found.best):
        assert sums_of(pool.assemble(r.candidate), SHAPE) == r.candidate.cost
        assert (r.activation_bytes, r.latency_ms) == (None, None)
        assert "activation_bytes" not in r.candidate.recipe.scores


@pytest.mark.parametrize("strategy", [Beam(), EVERYTHING])
@pytest.mark.parametrize("seed", [0, 4, 5])
def test_a_search_without_a_limit_on_latency_repeats(
    pool: Pool, free: SearchResult, strategy: Beam | DepthFirst, seed: int
) -> None:
    budget = Budget(**random_limits(free, seed), min_score=0.3)
    first, second = (
        pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=strategy, budget=budget) for _ in range(2)
    )
    assert recipes(first.ranked) == recipes(second.ranked)
    assert first.rejected == second.rejected


@pytest.mark.parametrize("measure", ["params", "macs"])
@pytest.mark.parametrize("strategy", [Beam(), EVERYTHING])
@pytest.mark.parametrize("exits", [True, False])
def test_a_limit_that_nothing_keeps_is_refused_before_anything_runs(
    pool: Pool, measure: str, strategy: Beam | DepthFirst, exits: bool
) -> None:
    costs = CompositionCosts(pool.parts, bias=True, max_fragments=strategy.max_fragments, early_exits=exits)
    least, words = costs.cheapest(measure)
    assert (words == "b ended at 0") == exits
    # The other limits are kept by all; nothing is measured before these are known to be possible.
    others = {"max_params": 1e9, "max_macs": 1e12, "max_activation_bytes": 1e9, "max_latency_ms": 1e9}
    budget = Budget(**{**others, f"max_{measure}": least - 1})
    with (
        images_seen(pool.parts[0].source) as first,
        images_seen(pool.parts[1].source) as second,
        pytest.raises(BudgetError, match=rf"(?s)No network keeps .* the cheapest composition has .*{re.escape(words)}"),
    ):
        pool.search(never(), never(), strategy=strategy, budget=budget, exits=exits)
    assert first == second == []


# -- a least score ---------------------------------------------------------------------------------------------------


def by_macs(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
    """The larger the better, as if it were so; the second score says the opposite."""
    return [{"size": c.cost.macs / 1e6, "thrift": -c.cost.macs} for c in candidates]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("limits", [{}, {"max_params": 3000}])
def test_with_a_least_score_the_cheapest_that_reaches_it_is_the_best(
    pool: Pool, share: float, limits: dict[str, float]
) -> None:
    found = pool.search(
        [CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, ranking=by_macs, budget=Budget(**limits)
    )
    within = [r for r in found.ranked if Budget(**limits).allows(r.candidate.cost)]
    least = sorted(r.scores["size"] for r in within)[int(share * len(within))]
    budget = Budget(**limits, min_score=least)
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, ranking=by_macs, budget=budget)
    assert result.best.candidate.cost.macs == least * 1e6
    reaching = [r for r in within if r.scores["size"] >= least]
    assert recipes(composed(result)) == recipes([r for r in composed(found) if r in reaching])
    dropped = len(composed(found)) - len(composed(result))
    assert result.rejected["below the least score"] == dropped > 0
    assert result.best_stitched is next(r for r in result.ranked if r.candidate.kind == "stitched")
    source = result.best_source
    assert result.summary() == (
        f"The candidate with the fewest MACs whose size is at least {least:g} ({result.best}) has "
        f"size {result.best.scores['size']:.4f} on the selection images, the best source "
        f"({source.candidate.recipe.fragments[0].source}, {source.candidate.cost}) size {source.scores['size']:.4f}."
    )


@pytest.mark.parametrize(("exits", "end"), [(True, "0"), (False, "2")])
def test_of_equally_cheap_ones_the_better_is_the_best(exits: bool, end: str) -> None:
    def later(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
        return [{"place": float(index)} for index, _ in enumerate(candidates)]

    pool = Pool(
        [plain(name, (4, 7, 12), seed=seed) for seed, name in enumerate("abc")],
        SHAPE,
        settings=CalibrationSettings(readout="last"),
    )
    options = {"ranking": later, "strategy": NO_STITCHES, "budget": Budget(min_score=1), "exits": exits}
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, **options)  # type: ignore[arg-type]
    assert path(result.best.candidate) == [("c", None, end)]


def test_a_score_that_nothing_reaches_names_the_best_that_keeps_the_other_limits(pool: Pool) -> None:
    budget = Budget(max_macs=pool.parts[1].cost.macs, min_score=99)
    kept = pool.search(
        [CALIBRATION], SELECTION, max_roots=1, ranking=by_macs, budget=Budget(max_macs=budget.max_macs)
    ).best
    words = f"within the budget ({budget}): the highest size is {kept.scores['size']:.4f} ({kept.candidate.kind}, "
    with pytest.raises(BudgetError, match=re.escape(f"{words}{kept.candidate.cost}). Lower min_score")):
        pool.search([CALIBRATION], SELECTION, max_roots=1, ranking=by_macs, budget=budget)


# -- activation bytes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weighed(pool: Pool) -> SearchResult:
    return pool.search(
        [CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, budget=Budget(max_activation_bytes=1e9)
    )


def test_under_a_limit_on_activation_bytes_assembled_networks_are_measured(
    pool: Pool, free: SearchResult, weighed: SearchResult
) -> None:
    assert [path(r.candidate) for r in weighed.ranked] == [path(r.candidate) for r in free.ranked]
    for r in weighed.ranked:
        network = pool.assemble(r.candidate)
        assert r.activation_bytes == network_cost(network, SHAPE).activation_bytes
        assert r.activation_bytes == counted_bytes(CutGraph(network, SHAPE).module, SHAPE)
        assert r.candidate.recipe.scores["activation_bytes"] == r.activation_bytes
        assert f"{r.activation_bytes / 1e6:.4g} MB of activations" in str(r)
        assert r.latency_ms is None
    assert "measure" in weighed.seconds


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_what_holds_too_many_activations_when_measured_is_left_out(
    pool: Pool, weighed: SearchResult, share: float
) -> None:
    figures = sorted({r.activation_bytes for r in weighed.ranked if r.activation_bytes is not None})
    budget = Budget(max_activation_bytes=figures[int(share * len(figures))])
    found = pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, budget=budget)

    def keeps(r: Ranked) -> bool:
        return r.activation_bytes is not None and r.activation_bytes <= budget.limits["activation_bytes"]

    assert recipes(composed(found)) == recipes([r for r in composed(weighed) if keeps(r)])
    assert recipes([found.best]) == recipes([r for r in weighed.ranked if keeps(r)][:1])
    left_out = len(composed(weighed)) - len(composed(found))
    assert found.rejected["over the activation budget when measured"] == left_out > 0
    within = weighed.within(budget)
    assert within is not None
    assert within.candidate.recipe == found.best.candidate.recipe


def test_where_all_hold_too_many_activations_the_leanest_is_named(pool: Pool, weighed: SearchResult) -> None:
    least = min(r.activation_bytes for r in weighed.ranked if r.activation_bytes is not None)
    budget = Budget(max_activation_bytes=least - 1)
    words = rf"that were measured, the leanest is over it \(.*, {least / 1e6:.4g} MB of activations\)\. Raise max_activ"
    with pytest.raises(BudgetError, match=words):
        pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, budget=budget)


def test_fewer_activation_bytes_than_the_image_has_are_refused_before_one_is_read(pool: Pool) -> None:
    with pytest.raises(BudgetError, match=r"has at least 0\.003072 MB \(the image alone\)"):
        pool.search(never(), never(), budget=Budget(max_activation_bytes=8))


# -- latency ---------------------------------------------------------------------------------------------------------


def clocked(*, cold: float = 0.0) -> Pool:
    """Source "slow" takes 10 ms in its middle block, "fast" 1 ms in each; both begin alike."""
    slow, fast = (
        timed("slow", (8, 9, 10), (1, 10, 1), cold=cold),
        timed("fast", (8, 9, 12), (1, 1, 1), seed=1, cold=cold),
    )
    return Pool([slow, fast], SHAPE, settings=CalibrationSettings(readout="last"))


def crosses_the_slow_block(ranked: Ranked) -> bool:
    return any(step.source == 0 and step.first <= 1 < step.last for step in ranked.candidate.steps)


@pytest.mark.parametrize("strategy", [Beam(), EVERYTHING])
def test_what_is_too_slow_by_estimate_is_not_walked_and_the_rest_is_measured(
    clock: Clock, strategy: Beam | DepthFirst
) -> None:
    pool, recorder = clocked(), Recorder()
    budget = Budget(max_latency_ms=6)
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=strategy, budget=budget, progress=recorder)
    assert len(stitched(result)) > 3
    for r in result.ranked:
        if crosses_the_slow_block(r):
            assert r.candidate.kind not in ("stitched", "shortened")
            assert r.latency_ms is None
        else:
            pieces = sum(step.last - step.first for step in r.candidate.steps)
            assert r.latency_ms == pytest.approx(pieces)
            assert r.candidate.recipe.scores["latency_ms"] == r.latency_ms
            assert r.candidate.cost.latency_ms >= pieces - 1e-9
    assert result.best.latency_ms is not None
    assert result.rejected["over the budget"] > 0
    assert result.seconds.keys() == {"cut", "measure", "calibrate", "search", "rank"}
    assert recorder.stages[-1] == ("measuring", len(result.ranked), len(result.ranked))
    assert f"{result.best.latency_ms:.4g} ms for one image" in str(result.best)
    assert "latency_ms" in pool.assemble(result.best.candidate).describe()


def test_what_measures_slower_than_its_estimate_is_turned_down(clock: Clock) -> None:
    # Going over from one network to another costs 20 ms more than either alone.
    result = clocked(cold=20).search([CALIBRATION], SELECTION, max_roots=1, budget=Budget(max_latency_ms=13))
    assert not any(crosses_over(r) for r in result.ranked)
    assert result.rejected["over the latency budget when measured"] > 3
    assert all(r.latency_ms is not None and r.latency_ms <= 13 for r in stitched(result))


def crosses_over(ranked: Ranked) -> bool:
    return len({fragment.source for fragment in ranked.candidate.recipe.fragments}) > 1


@pytest.mark.parametrize(("exits", "limit", "fastest"), [(False, 2.9, ".*, 3"), (True, 0.9, "early exit, .*, 1")])
def test_where_all_measure_too_slow_the_fastest_is_named(clock: Clock, exits: bool, limit: float, fastest: str) -> None:
    # Each piece takes 1 ms, which an estimate may exceed by a quarter.
    words = rf"that were measured, the fastest is over it \({fastest} ms for one image\)"
    budget = Budget(max_latency_ms=limit)
    with pytest.raises(BudgetError, match=words):
        clocked().search([CALIBRATION], SELECTION, max_roots=1, strategy=NO_STITCHES, budget=budget, exits=exits)


@pytest.mark.parametrize(
    ("exits", "limit", "words"),
    [
        # The first block of either, then the last of either: two pieces and a stitch.
        (False, 1, r"at most 1 ms for one image: the cheapest composition has by estimate 2\.\d+"),
        (True, 0.5, r"at most 0.5 ms for one image: the cheapest composition has by estimate 1 ms \(\w+ ended at 0\)"),
    ],
)
def test_a_latency_that_no_composition_can_have_is_refused_before_an_image_is_read(
    clock: Clock, exits: bool, limit: float, words: str
) -> None:
    with pytest.raises(BudgetError, match=words):
        clocked().search(never(), never(), budget=Budget(max_latency_ms=limit), exits=exits)


def test_pieces_are_measured_once_for_all_searches_of_a_pool(clock: Clock) -> None:
    pool = clocked()
    with images_seen(pool.parts[1].source) as seen:
        with pytest.raises(BudgetError):
            pool.search(never(), never(), budget=Budget(max_latency_ms=0.5))
        assert set(seen) == {1}
        seen.clear()
        with pytest.raises(BudgetError):
            pool.search(never(), never(), budget=Budget(max_latency_ms=0.5))
        assert seen == []


def test_a_least_score_and_a_latency_hold_together(clock: Clock) -> None:
    pool = clocked()
    budget = Budget(max_latency_ms=6, min_score=0.4)
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, strategy=EVERYTHING, budget=budget)
    fitting = [r for r in result.ranked if r.reaches(0.4) and r.latency_ms is not None]
    assert result.best.candidate.cost.macs == min(r.candidate.cost.macs for r in fitting)
    # What does not reach the score is not worth a measurement.
    assert all((r.latency_ms is not None) == (r in fitting) for r in result.ranked)
    assert any(not r.reaches(0.4) or r.latency_ms is None for r in result.ranked)


def test_latencies_are_there_by_the_real_clock_too_and_only_where_they_are_asked_for(pool: Pool) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    result = pool.search([CALIBRATION], SELECTION, max_roots=1, budget=Budget(max_latency_ms=1e9), max_candidates=3)
    assert all(r.latency_ms is not None and r.latency_ms > 0 for r in result.ranked)
    assert all(r.candidate.cost.latency_ms > 0 for r in result.ranked)
    assert torch.equal(torch.get_rng_state(), before)
    without = pool.search([CALIBRATION], SELECTION, max_roots=1, max_candidates=3)
    assert all(r.latency_ms is None and r.candidate.cost.latency_ms == 0 for r in without.ranked)
    assert [path(r.candidate) for r in without.ranked] == [path(r.candidate) for r in result.ranked]
