from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import t
from torch import Tensor

from lightning_stitch.errors import StitchError
from lightning_stitch.report.evaluation import Evaluation
from lightning_stitch.report.verdicts import Verdict, guessing_share, in_short, in_words, judge, judge_splits, strongest


def answers(right: Tensor, targets: Tensor, name: str, **costs: Any) -> Evaluation:
    """Sure predictions that are right exactly where `right` says so (two classes)."""
    probabilities = torch.nn.functional.one_hot(torch.where(right, targets, 1 - targets), 2).float()
    return Evaluation(name, "source", probabilities, **{"params": 1, "macs": 100, "seconds": 0.0, "labels": 0, **costs})


def planted(won: int, lost: int, both: int, neither: int = 0, *, macs: int = 100, **options: Any) -> Verdict:
    """The verdict on S against R, whose classes are of the same size."""
    place = torch.arange(won + lost + both + neither)
    targets = place % 2
    is_both = (place >= won + lost) & (place < won + lost + both)
    contender = answers((place < won) | is_both, targets, "S", macs=macs)
    return judge(answers((place >= won) & (place < won + lost) | is_both, targets, "R"), contender, targets, **options)


@pytest.mark.parametrize(
    ("counts", "word"),
    [
        ((40, 10, 450), "better"),
        ((10, 40, 450), "worse"),
        ((12, 10, 478), "undecided"),
        ((0, 0, 50), "undecided"),  # alike, but too few to say so
        ((5, 0, 45), "undecided"),
        ((6, 0, 44), "better"),  # p = 2 / 64
        ((3, 3, 994), "equivalent"),
        ((30, 8, 9962), "equivalent"),  # surely better, by less than counts
    ],
)
def test_planted_outcomes_get_their_word(counts: tuple[int, int, int], word: str) -> None:
    verdict = planted(*counts)
    won, lost, both = counts
    assert verdict.word == word
    assert (verdict.won, verdict.lost, verdict.num_images) == (won, lost, sum(counts))
    assert verdict.difference == pytest.approx((won - lost) / sum(counts))
    assert verdict.accuracy == pytest.approx((won + both) / sum(counts))
    assert verdict.low <= verdict.difference <= verdict.high


def test_a_sure_difference_inside_the_margin_is_equivalent_and_said() -> None:
    verdict = planted(30, 8, 9962)
    assert verdict.p_value < 0.05
    assert "they do differ, but by less than counts" in str(verdict)
    assert planted(30, 8, 9962, margin=0).word == "better"
    assert "they do differ" not in str(planted(3, 3, 994))


def test_the_margin_is_settable() -> None:
    assert planted(12, 10, 478, margin=0.05).word == "equivalent"
    assert "within 5 points" in str(planted(12, 10, 478, margin=0.05))
    for margin in (-0.1, 1.0, math.nan):
        with pytest.raises(StitchError, match=r"margin is a difference in accuracy, from 0 to 1.*found"):
            planted(1, 1, 9, margin=margin)


def test_the_interval_reaches_to_zero_wherever_equal_accuracy_is_not_refuted() -> None:
    for won in range(0, 25, 2):
        for lost in range(0, 25, 3):
            verdict = planted(won, lost, 60)
            assert (verdict.low <= 0 <= verdict.high) is (verdict.p_value >= 0.05)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (planted(40, 10, 450, macs=210), "Worth it: more accurate than R, for 2.1 times its MACs."),
        (planted(40, 10, 450, macs=33), "Worth it: more accurate than R, for 33 % of its MACs."),
        (planted(3, 3, 994, macs=33), "Worth it: as accurate as R, for 33 % of its MACs."),
        (planted(3, 3, 994), "Not worth it: as accurate as R, for as many MACs."),
        (planted(3, 3, 994, macs=120), "Not worth it: as accurate as R, for 1.2 times its MACs."),
        (planted(10, 40, 450, macs=33), "Not worth it: less accurate than R, for 33 % of its MACs."),
        (
            planted(12, 10, 478, macs=33),
            "Not worth it so far: the test images cannot tell it from R, more would; it takes 33 % of its MACs.",
        ),
    ],
)
def test_better_or_as_good_for_less_is_worth_it(verdict: Verdict, words: str) -> None:
    assert verdict.conclusion() == words
    conclusion, _, evidence = str(verdict).partition(" (Of ")
    assert conclusion.endswith(f" {words}")
    assert evidence.endswith(".)")
    assert verdict.worth_it is words.startswith("Worth")


def test_the_sentence_has_all_figures() -> None:
    verdict = planted(40, 10, 450, macs=2_500_000)
    sentence = verdict.sentence()
    assert sentence.startswith(
        "S (2.5 M MACs) is better than R (0.0001 M MACs): right on 0.980 against 0.920, +6.0 points"
    )
    verdict_interval = f"(95 % interval {100 * verdict.low:+.1f} to {100 * verdict.high:+.1f})"
    assert f"{verdict_interval}. Worth it: " in sentence
    assert sentence.endswith(
        "(Of 500 test images 40 only the former and 10 only the latter got right: exact McNemar test, p = 2.4e-05; two "
        "one-sided tests within 1 point, p = 1.)"
    )


def test_a_record_is_plain_json() -> None:
    verdict = planted(40, 10, 450)
    record = json.loads(json.dumps(verdict.record(), allow_nan=False))
    assert record["sentence"] == str(verdict)
    assert record["worth_it"] is True
    assert (record["word"], record["won"]) == ("better", 40)


def test_what_is_no_better_than_guessing_is_called_that() -> None:
    targets = (torch.arange(400) < 100).long()  # three quarters are of class 0
    place = torch.arange(400)
    constant = answers(targets == 0, targets, "constant")
    lucky = answers((targets == 0) | (place < 3), targets, "lucky")
    knowing = answers((targets == 0) | (place < 20), targets, "knowing")
    worst = answers(targets == 1, targets, "worst")
    assert [guessing_share(e, targets) for e in (constant, lucky, knowing, worst)] == [0.75, 0.75, None, 0.75]
    verdict = judge(worst, lucky, targets)
    assert verdict.word == "better"
    assert not verdict.worth_it
    assert "Not worth it: lucky is no better than always guessing the commonest class (right on 0.750)." in str(verdict)
    assert "would help" in str(verdict)


def numbers(**changes: Any) -> dict[str, Any]:
    return {"num_train": 300, "num_test": 100, "rival": "last", "contender": "taps", **changes}


def test_splits_are_compared_by_nadeau_and_bengios_corrected_test() -> None:
    # mean 0.02, variance 0.00025: error = sqrt((1 / 5 + 100 / 300) * 0.00025) = 0.011547, t(0.975, 4) = 2.776445
    verdict = judge_splits([0.0, 0.01, 0.02, 0.03, 0.04], **numbers())
    assert verdict.difference == pytest.approx(0.02)
    assert (verdict.low, verdict.high) == pytest.approx((0.02 - 0.0320596, 0.02 + 0.0320596), abs=1e-6)
    assert verdict.p_value == pytest.approx(2 * t.sf(0.02 / 0.01154701, 4), abs=1e-6)
    assert verdict.p_equivalence == pytest.approx(t.cdf(0.01 / 0.01154701, 4), abs=1e-6)
    assert verdict.word == "undecided"
    words = "taps is undecided against last: +2.0 points of accuracy (95 % interval -1.2 to +5.2). Not worth it so far"
    assert str(verdict).startswith(words)
    assert verdict.conclusion() == "Not worth it so far: these splits cannot tell it from last, more would."


@pytest.mark.parametrize(
    ("differences", "changes", "word"),
    [
        ([0.05, 0.06, 0.055, 0.05, 0.06], {}, "better"),
        ([-0.05, -0.06, -0.055, -0.05, -0.06], {}, "worse"),
        ([0.004, -0.003, 0.001, 0.0, -0.002], {}, "equivalent"),
        ([0.004, -0.003, 0.001, 0.0, -0.002], {"margin": 0.001}, "undecided"),
        ([0.004, -0.003, 0.001, 0.0, -0.002], {"num_test": 100_000}, "undecided"),  # overlap: a test set that large
        ([0.0, 0.0], {"num_test": 10}, "undecided"),  # alike by chance
        ([0.0] * 10, {"num_test": 1000}, "equivalent"),
    ],
)
def test_splits_get_their_word(differences: list[float], changes: dict[str, Any], word: str) -> None:
    assert judge_splits(differences, **numbers(**changes)).word == word


def test_the_size_over_splits_without_overlap_is_five_percent() -> None:
    draws = 0.02 * torch.randn(2000, 10, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    few_tests = numbers(num_train=10**9, num_test=1000, margin=0)
    words = [judge_splits(row.tolist(), **few_tests).word for row in draws]
    assert 0.035 < 1 - words.count("undecided") / 2000 < 0.065
    at_margin = [judge_splits((row + 0.01).tolist(), **{**few_tests, "margin": 0.01}).word for row in draws[:1000]]
    assert at_margin.count("equivalent") / 1000 < 0.07


@pytest.mark.parametrize(
    ("differences", "changes", "words"),
    [
        ([0.1], {}, r"two or more finite differences; found \[0.1\]"),
        ([0.1, math.nan], {}, "two or more finite differences"),
        ([0.1, 0.2], {"num_train": 0}, "num_train and num_test must be at least 1; found 0 and 100"),
        ([0.1, 0.2], {"margin": 2}, "margin is a difference in accuracy"),
    ],
)
def test_splits_that_cannot_be_compared_are_refused(
    differences: list[float], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(StitchError, match=words):
        judge_splits(differences, **numbers(**changes))


def against(rival: str, rival_cost: float, verdict: Verdict) -> Verdict:
    return replace(verdict, rival=rival, rival_cost=rival_cost, contender_cost=50)


def interval_of(verdict: Verdict) -> str:
    return f"{100 * verdict.low:+.1f} to {100 * verdict.high:+.1f}"


def test_the_strongest_rival_costs_no_more_and_is_the_one_it_fails_against() -> None:
    better, worse, alike = planted(40, 10, 450), planted(10, 40, 450), planted(3, 3, 994)
    dear, first, second = against("dear", 100, worse), against("first", 50, better), against("second", 40, better)
    assert strongest([dear, first, second]) is first
    failing = against("failing", 30, alike)
    assert strongest([dear, first, failing]) is failing
    assert strongest([dear]) is dear
    assert in_short([dear, first, failing]) == "equivalent to failing"
    assert in_words([dear, first, second]).splitlines() == [
        "S (5e-05 M MACs): right on 0.980 of 500 test images",
        f"  better: +6.0 points ({interval_of(first)}) against first (5e-05 M MACs)",
        f"  worse: -6.0 points ({interval_of(dear)}) against dear (0.0001 M MACs)",
        f"  better: +6.0 points ({interval_of(second)}) against second (4e-05 M MACs)",
        "Worth it: more accurate than first, for as many MACs.",
    ]
    assert "equivalent: +0.0 points" in in_words([against("dear", 100, alike)])
