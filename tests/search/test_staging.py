"""Stages and their thresholds, chosen together under a budget of average MACs."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import pytest
import torch
from doubles.staged import two_coloured_pool
from doubles.two_colours import two_colours
from sklearn.metrics import roc_auc_score

from lightning_stitch import Budget, BudgetError, SearchResult, StitchedNetwork, StitchError
from lightning_stitch.heads import HeadSettings, StagedHead, confidence
from lightning_stitch.progress import Silent
from lightning_stitch.search import Ranked

IMAGES, LABELS = two_colours(600)
SELECTION = [(IMAGES[16:216], LABELS[16:216])]
pool = cache(two_coloured_pool)


def both() -> int:
    """MACs of both sources side by side."""
    return sum(part.cost.macs for part in pool().parts)


def search(**options: object) -> SearchResult:
    return pool().search([IMAGES[:16]], SELECTION, max_candidates=2, **options)


def staged(result: SearchResult) -> list[Ranked]:
    return [r for r in result.ranked if r.candidate.kind == "staged"]


@cache
def found() -> SearchResult:
    return search(budget=Budget(mean_macs=0.7 * both()))


def fitted(ranked: Ranked) -> tuple[StitchedNetwork, StagedHead]:
    network = pool().assemble(ranked.candidate)
    with torch.no_grad():
        features = network(SELECTION[0][0])
    head, _ = HeadSettings.of("ridge", num_classes=2).fit_for(network.recipe, features, SELECTION[0][1])
    assert isinstance(head, StagedHead)
    return network, head


def test_what_two_sources_together_tell_is_told_for_less_than_both_cost_on_average() -> None:
    best = found().best
    assert best.candidate.kind == "staged"
    assert best.candidate.cost.mean_macs <= 0.7 * both() < best.candidate.cost.macs
    assert best.scores["loo_accuracy"] > 0.88 > 0.85 > found().best_source.scores["loo_accuracy"]
    network, head = fitted(best)
    with torch.no_grad():
        answers, stops = network.in_stages(IMAGES[216:], head)
    macs = torch.tensor(best.candidate.recipe.stages.macs, dtype=torch.float64)[stops].mean()
    assert (answers.argmax(1) == LABELS[216:]).float().mean() > 0.88
    assert macs == pytest.approx(best.candidate.cost.mean_macs, rel=0.15)  # 200 images set the thresholds
    static = search(budget=Budget(max_macs=0.7 * both())).best
    assert static.scores["loo_accuracy"] < best.scores["loo_accuracy"] - 0.05


def test_a_stage_is_what_runs_before_it_and_more_and_costs_as_much_as_it_says() -> None:
    for ranked in staged(found()):
        recipe = ranked.candidate.recipe
        stages = recipe.stages
        assert stages is not None
        assert stages.taps[-1] == len(recipe.taps)
        assert stages.macs[-1] == ranked.candidate.cost.macs
        of_stage = recipe.fragment_stages
        for fragment, stage in zip(recipe.fragments, of_stage, strict=True):
            assert fragment.parent is None or of_stage[fragment.parent] <= stage
        assert set(of_stage) == set(range(len(stages.taps)))


def test_the_settings_reach_from_the_front_alone_to_all_going_all_the_way() -> None:
    for ranked in staged(found()):
        stages = ranked.candidate.recipe.stages
        assert stages is not None
        means, losses = zip(*((p.mean_macs, -p.scores["neg_loo_loss"]) for p in stages.points), strict=True)
        assert list(means) == sorted(means)
        assert means[0] == stages.macs[0]
        assert any(math.prod(point.goes_on) == 1 for point in stages.points)
        assert min(losses) < losses[0]
        chosen = stages.chosen
        assert chosen.mean_macs == ranked.candidate.cost.mean_macs <= 0.7 * both()
        assert ranked.losses is not None
        assert -chosen.scores["neg_loo_loss"] == pytest.approx(float(ranked.losses.sum()))
        least = min(loss for mean, loss in zip(means, losses, strict=True) if mean <= 0.7 * both())
        assert float(ranked.losses.sum()) == pytest.approx(least)


def test_the_mean_of_a_setting_is_that_of_the_shares_that_go_on() -> None:
    stages = found().best.candidate.recipe.stages
    assert stages is not None
    for point in stages.points:
        mean, arriving = float(stages.macs[0]), 1.0
        for share, before, behind in zip(point.goes_on, stages.macs, stages.macs[1:], strict=False):
            arriving *= share
            mean += arriving * (behind - before)
        assert point.mean_macs == pytest.approx(mean, rel=0.02)  # shares are of whole images


def test_each_stage_says_how_often_it_is_right_and_how_well_it_knows() -> None:
    network, head = fitted(found().best)
    stages = found().best.candidate.recipe.stages
    assert stages is not None
    with torch.no_grad():
        outputs = head.outputs(network(IMAGES[216:]))
    for of_stage, figures in zip(outputs, stages.figures, strict=True):
        right = of_stage.argmax(1) == LABELS[216:]
        assert figures["loo_accuracy"] == pytest.approx(float(right.float().mean()), abs=0.08)
        assert figures["confidence_auroc"] == pytest.approx(
            roc_auc_score(right, confidence(of_stage, "multiclass")), abs=0.1
        )
    assert "knows when by AUROC" in network.describe()


def test_stages_are_looked_for_under_a_budget_of_average_macs_alone_and_keep_their_number() -> None:
    assert not staged(search(budget=Budget(max_macs=both())))
    assert not staged(search(budget=Budget(mean_macs=0.7 * both()), max_stages=1))
    two = staged(search(budget=Budget(mean_macs=0.7 * both()), max_stages=2))
    assert [len(r.candidate.recipe.stages.taps) for r in two] == [2]
    with pytest.raises(StitchError, match="max_stages must be at least 1; found 0"):
        search(max_stages=0)


def test_the_worst_case_keeps_its_own_limit_and_what_all_images_run_keeps_the_mean() -> None:
    budget = Budget(mean_macs=0.6 * both(), max_macs=0.9 * both())
    result = search(budget=budget)
    assert staged(result)
    assert all(r.candidate.cost.macs <= 0.9 * both() for r in result.ranked if r.candidate.kind == "staged")
    assert budget.allows(result.best.candidate.cost)
    others = [r for r in result.ranked if r.candidate.kind not in ("staged", "source", "self-stitched")]
    assert all(r.candidate.cost.macs <= 0.6 * both() for r in others)


def test_a_mean_below_the_cheapest_network_is_refused_before_anything_runs() -> None:
    with pytest.raises(BudgetError, match="No network keeps the budget of at most 1e-06 M MACs: the cheapest"):
        search(budget=Budget(mean_macs=1))


def test_without_labels_there_are_no_stages() -> None:
    result = pool().search([IMAGES[:16]], [IMAGES[16:60]], max_candidates=2, budget=Budget(mean_macs=0.7 * both()))
    assert not staged(result)
    assert result.best.candidate.cost.macs <= 0.7 * both()


def test_where_the_front_knows_all_a_static_network_is_chosen() -> None:
    told_by_red = (IMAGES[:, 0].mean((1, 2)) > 0.5).long()
    result = pool().search(
        [IMAGES[:16]],
        [(IMAGES[16:216], told_by_red[16:216])],
        max_candidates=2,
        budget=Budget(mean_macs=0.8 * both()),
    )
    assert result.best.candidate.kind != "staged"


def test_the_same_search_finds_the_same_stages() -> None:
    again = search(budget=Budget(mean_macs=0.7 * both()))
    first, second = (r.best.candidate.recipe.to_dict() for r in (found(), again))
    assert first == second


def test_the_front_of_average_macs_has_staged_networks_and_that_of_most_macs_them_at_their_worst() -> None:
    result = found()
    by_mean = result.pareto("mean_macs")
    assert any(r.candidate.kind == "staged" for r in by_mean)
    spent = [r.candidate.cost.expected_macs for r in by_mean]
    assert spent == sorted(spent)
    cheap = result.within(Budget(mean_macs=0.6 * both()))
    assert cheap is not None
    assert cheap.candidate.cost.expected_macs <= 0.6 * both() < found().best.candidate.cost.expected_macs


def test_stages_of_tasks_other_than_classes_are_found_too() -> None:
    colours = IMAGES.mean((2, 3))
    numbers = colours[:, 0] + colours[:, 1]
    labels = torch.stack([LABELS, (colours[:, 0] > 0.5).long()], dim=1)
    for targets in (numbers, labels):
        result = pool().search(
            [IMAGES[:16]],
            [(IMAGES[16:216], targets[16:216])],
            max_candidates=2,
            budget=Budget(mean_macs=0.7 * both()),
        )
        assert staged(result)
        assert staged(result)[0].score > result.best_source.score


def test_a_budget_is_of_static_networks_what_they_may_have_on_average() -> None:
    budget = Budget(mean_macs=5, max_macs=9, max_params=7)
    assert dataclasses.asdict(budget.of_static) == dataclasses.asdict(Budget(max_macs=5, max_params=7))
    assert dataclasses.asdict(budget.of_all_images) == dataclasses.asdict(Budget(max_macs=9, max_params=7))
    assert str(budget) == "at most 7e-06 M parameters and at most 9e-06 M MACs and 5e-06 M MACs on average"
    assert str(Budget(mean_macs=5e6)) == "5 M MACs on average"
    with pytest.raises(BudgetError, match="mean_macs must be positive or None; found 0"):
        Budget(mean_macs=0)


def test_a_search_of_outcomes_reads_the_same_as_the_network() -> None:
    ranked = staged(found())[0]
    network, head = fitted(ranked)
    outcome, _ = pool().outcomes([ranked.candidate], [(IMAGES[300:340], LABELS[300:340])], progress=Silent())
    with torch.no_grad():
        torch.testing.assert_close(outcome[0].features, network(IMAGES[300:340]), rtol=1e-4, atol=1e-5)
        assert torch.equal(head.stops(outcome[0].features), head.stops(network(IMAGES[300:340])))
