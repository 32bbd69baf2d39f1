from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from doubles.pools import path
from doubles.progress import Recorder
from doubles.small_sources import images_seen, plain
from doubles.tensors import digits, noise
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads.ridge import fit_ridge_head
from lightning_stitch.progress import Silent
from lightning_stitch.report.comparison import Comparison, compare
from lightning_stitch.report.evaluation import Evaluation
from lightning_stitch.report.finalists import Finalist, finalists
from lightning_stitch.report.kinds import label_of, row_name
from lightning_stitch.report.verdicts import in_short, in_words, judge
from lightning_stitch.search.results import SearchResult
from lightning_stitch.settings import CalibrationSettings

SHAPE = (3, 16, 16)
CALIBRATION = 0.7 * digits(12, 16)[0] + 0.3 * noise(12, *SHAPE)
PARTS = {
    name: digits(count, 16, first=first, classes=3)
    for name, count, first in (("selection", 60, 0), ("train", 90, 60), ("test", 80, 150))
}
FRACTIONS = (1.5, 0.75, 0.001)


def loader(name: str, batch_size: int = 32) -> DataLoader:
    return DataLoader(TensorDataset(*PARTS[name]), batch_size=batch_size)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool(
        [plain("a", (8, 9, 10), seed=0), plain("b", (4, 12, 12), seed=1)],
        SHAPE,
        settings=CalibrationSettings(readout="last"),
    )


@pytest.fixture(scope="module")
def result(pool: Pool) -> SearchResult:
    return pool.search([CALIBRATION], loader("selection"), max_roots=1)


@pytest.fixture(scope="module")
def comparison(pool: Pool, result: SearchResult) -> Comparison:
    return compare(pool, result, loader("train"), loader("test"), num_classes=3, fractions=FRACTIONS, num_resamples=50)


def budgets(row: dict[str, Any]) -> list[str]:
    return [] if row["budget"] is None else row["budget"].split("; ")


def test_the_table_holds_sources_self_stitched_sources_and_the_best_under_each_budget(
    result: SearchResult, comparison: Comparison
) -> None:
    first = [(row["name"], row["kind"], row["budget"]) for row in comparison.rows[:4]]
    assert sorted(first[:2]) == [(name, "source", None) for name in "ab"]
    assert sorted(first[2:]) == [(name, "self-stitched", None) for name in "ab"]
    assert comparison.unmet == ("<= 0% of MACs",)
    words = {"no budget": math.inf, "<= 150% of MACs": 1.5, "<= 75% of MACs": 0.75}
    smallest = min(row["macs"] for row in comparison.rows[:2])
    for word, share in words.items():
        for kind in ("stitched", "shortened", "early exit"):
            rows = [row for row in comparison.rows if row["kind"] == kind and word in budgets(row)]
            kept = [r.candidate for r in result.ranked if r.candidate.cost.macs <= share * smallest]
            chosen = next((candidate for candidate in kept if candidate.kind == kind), None)
            assert len(rows) == (chosen is not None) >= (kind != "shortened")
            if chosen is None:
                continue
            (row,) = rows
            assert (row["params"], row["macs"]) == (chosen.cost.params, chosen.cost.macs)
            assert row["name"] == ("StitchNet" if kind == "stitched" else path(chosen)[0][0])


def test_each_network_is_in_the_table_once_and_its_sources_are_told(
    result: SearchResult, comparison: Comparison
) -> None:
    chosen, _ = finalists(result, FRACTIONS)
    assert len({id(finalist.candidate) for finalist in chosen}) == len(chosen) == len(comparison.rows)
    for finalist, row in zip(chosen, comparison.rows, strict=True):
        sources = list(dict.fromkeys(source for source, _, _ in path(finalist.candidate)))
        assert row["sources"] == " + ".join(sources)
        assert (len(sources) > 1) is (row["kind"] == "stitched")


def test_the_choice_and_what_is_over_the_searchs_budget_are_marked(result: SearchResult) -> None:
    limit = sorted(r.candidate.cost.macs for r in result.ranked)[len(result.ranked) // 2]
    chosen, _ = finalists(result, FRACTIONS, Budget(max_macs=limit))
    over = [finalist for finalist in chosen if "over the search's budget" in (finalist.budget or "")]
    assert over
    assert {id(f) for f in over} == {id(f) for f in chosen if f.macs > limit}
    (best,) = [finalist for finalist in chosen if "chosen by the search" in (finalist.budget or "")]
    assert best.candidate is result.best.candidate


@pytest.mark.parametrize("kind", ["stitched", "early exit"])
def test_under_each_budget_stands_the_first_of_the_ranking_that_fits(pool: Pool, kind: str) -> None:
    result = by_macs(pool)
    macs = [r.candidate.cost.macs for r in result.ranked if r.candidate.kind == kind]
    smallest = min(part.cost.macs for part in pool.parts)
    fractions = (1.2, 0.9, 0.7, 0.4, 1e-6)
    chosen, unmet = finalists(result, fractions)
    expected = [max((m for m in macs if m <= share * smallest), default=0) for share in (math.inf, *fractions)]
    under_budgets = [f.macs for f in chosen if f.candidate.kind == kind and not str(f.budget).startswith("<= MACs")]
    assert sorted(under_budgets) == sorted({m for m in expected if m})
    assert len(set(expected)) > 2
    assert kind == "early exit" or len(unmet) == expected.count(0) > 0


def by_macs(pool: Pool) -> SearchResult:
    """A search that ranks the largest network first."""
    return pool.search(
        [CALIBRATION],
        loader("selection"),
        ranking=lambda candidates, _: [{"macs": float(c.cost.macs)} for c in candidates],
    )


def test_the_best_exit_of_no_more_macs_than_a_stitchnet_is_there_too(pool: Pool) -> None:
    result = by_macs(pool)
    chosen, _ = finalists(result, (0.9, 0.7))
    for finalist in (f for f in chosen if f.candidate.kind == "stitched"):
        macs = [r.candidate.cost.macs for r in result.ranked if r.candidate.kind == "early exit"]
        expected = max((m for m in macs if m <= finalist.macs), default=None)
        there = [f.macs for f in chosen if f.candidate.kind == "early exit" and f.macs <= finalist.macs]
        assert max(there, default=None) == expected


def test_rows_are_what_the_assembled_network_and_its_own_head_give(
    pool: Pool, result: SearchResult, comparison: Comparison
) -> None:
    chosen, _ = finalists(result, FRACTIONS)
    (train, labels), (test, targets) = PARTS["train"], PARTS["test"]
    accuracies = []
    for finalist, row in zip(chosen, comparison.rows, strict=True):
        network = pool.assemble(finalist.candidate)
        with torch.no_grad():
            head, _ = fit_ridge_head(network(train), labels, num_classes=3)
            right = head(network(test)).argmax(1) == targets
        # Folding may move an image at the border of two classes.
        assert row["accuracy"] == pytest.approx(right.double().mean().item(), abs=1.5 / len(targets))
        recalls = [right[targets == label].double().mean().item() for label in range(3)]
        assert row["balanced_accuracy"] == pytest.approx(sum(recalls) / 3, abs=0.03)
        cost = network_cost(network, SHAPE)
        assert (row["params"], row["macs"]) == (cost.params, cost.macs)
        without = row["kind"] in ("source", "early exit")
        assert row["cka_product"] == (None if without else finalist.candidate.cka_product)
        assert row["labels"] == len(labels) + (60 if row["budget"] else 0)
        assert (row["name"], row["kind"]) == (row_name(finalist.candidate), finalist.candidate.kind)
        assert row["seconds"] > 0
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        accuracies.append(row["accuracy"])
    assert len(set(accuracies)) > 2
    assert max(accuracies) > 0.6


def test_seconds_of_a_stitchnet_hold_the_search_and_of_a_source_do_not(
    result: SearchResult, comparison: Comparison
) -> None:
    by_kind = {row["kind"]: row["seconds"] for row in comparison.rows}
    assert min(by_kind["stitched"], by_kind["early exit"], by_kind["shortened"]) > sum(result.seconds.values())
    assert by_kind["self-stitched"] > result.seconds["cut"] + result.seconds["calibrate"]
    chosen, _ = finalists(result, ())
    assert [f.search_seconds for f in chosen if f.candidate.kind == "source"] == [0, 0]


def evaluations_of(pool: Pool, chosen: Sequence[Finalist]) -> list[Evaluation]:
    candidates = [finalist.candidate for finalist in chosen]
    fitted, labels = pool.outcomes(candidates, loader("train"), progress=Silent())
    seen, _ = pool.outcomes(candidates, loader("test"), progress=Silent())
    assert labels is not None
    evaluations = []
    for candidate, train, test in zip(candidates, fitted, seen, strict=True):
        head, _ = fit_ridge_head(train.features, labels, num_classes=3)
        probabilities = head(test.features).softmax(-1).detach()
        name, cost = label_of(candidate), candidate.cost
        evaluations.append(Evaluation(name, candidate.kind, probabilities, cost.params, cost.macs, 0.0, 0))
    return evaluations


def test_compositions_are_judged_against_the_best_of_each_kind_of_no_more_macs_and_the_best_source(
    pool: Pool, result: SearchResult, comparison: Comparison
) -> None:
    targets = PARTS["test"][1]
    chosen, _ = finalists(result, FRACTIONS)
    evaluations = {id(f.candidate): e for f, e in zip(chosen, evaluations_of(pool, chosen), strict=True)}
    ranked = [r.candidate for r in result.ranked if id(r.candidate) in evaluations]
    composed = [c for c in ranked if c.kind == "stitched"]
    assert composed
    for candidate in composed:
        rivals = {id(result.best_source.candidate)}
        for kind in ("source", "shortened", "early exit"):
            fitting = (c for c in ranked if c.kind == kind and c.cost.macs <= candidate.cost.macs)
            rivals |= {id(c) for c in (next(fitting, None),) if c is not None}
        contender = evaluations[id(candidate)]
        expected = [judge(evaluations[id(c)], contender, targets) for c in ranked if id(c) in rivals]
        found = [v for v in comparison.verdicts if (v.contender, v.contender_cost) == (contender.name, contender.macs)]
        assert found == expected
        assert len(found) > 1
        (row,) = (r for r, f in zip(comparison.rows, chosen, strict=True) if f.candidate is candidate)
        assert row["verdict"] == in_short(expected)
    judged = {(v.contender, v.contender_cost) for v in comparison.verdicts}
    assert [row["verdict"] is not None for row in comparison.rows].count(True) == len(judged)


def test_the_sentence_tells_of_the_searchs_choice_and_of_the_best_composition(
    result: SearchResult, comparison: Comparison
) -> None:
    first = next(r.candidate for r in result.ranked if r.candidate.kind == "stitched")
    for candidate in [first] if result.best is result.best_source else [result.best.candidate, first]:
        account = [
            v
            for v in comparison.verdicts
            if (v.contender, v.contender_cost) == (label_of(candidate), candidate.cost.macs)
        ]
        assert in_words(account) in comparison.words
    chose_source = f"The search chose {label_of(result.best.candidate)}, the best source, as it is: right on 0."
    assert (chose_source in comparison.words) is (result.best is result.best_source)


def test_an_exit_in_the_table_that_is_ahead_is_named(pool: Pool) -> None:
    """The test labels are what the smallest exit says, which the selection images put last."""
    result = by_macs(pool)
    chosen, _ = finalists(result, FRACTIONS)
    evaluations = evaluations_of(pool, chosen)
    exit = min((e for e in evaluations if e.kind == "early exit"), key=lambda e: e.macs)
    test = DataLoader(TensorDataset(PARTS["test"][0], exit.probabilities.argmax(1)), batch_size=32)
    found = compare(pool, result, loader("train"), test, num_classes=3, fractions=FRACTIONS, num_resamples=9)
    first = next(v for v in found.verdicts if v.contender.startswith("StitchNet"))
    assert exit.name not in {v.rival for v in found.verdicts if v.contender_cost == first.contender_cost}
    words = found.words.split("  ahead of it in the table for no more MACs: ")[1]
    assert f"{exit.name} ({exit.macs / 1e6:.3g} M MACs)" in words


class Counting(Dataset):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.reads = images, labels, Counter[int]()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads[index] += 1
        return self.images[index], self.labels[index]


def test_test_images_are_read_once_and_only_to_compare(pool: Pool) -> None:
    tested = Counting(*PARTS["test"])
    test = DataLoader(tested, batch_size=32)
    result = pool.search([CALIBRATION], loader("selection"), max_candidates=4)
    finalists(result, FRACTIONS)
    assert not tested.reads
    with images_seen(pool.parts[0].source) as first, images_seen(pool.parts[1].source) as second:
        compare(pool, result, loader("train"), test, num_classes=3, num_resamples=9)
    assert tested.reads == dict.fromkeys(range(80), 1)
    assert sum(first) == sum(second) == 90 + 80


def test_test_labels_choose_nothing(pool: Pool, result: SearchResult, comparison: Comparison) -> None:
    images, labels = PARTS["test"]
    shuffled = DataLoader(TensorDataset(images, labels.roll(1)), batch_size=32)
    other = compare(pool, result, loader("train"), shuffled, num_classes=3, fractions=FRACTIONS, num_resamples=50)
    chosen = ("name", "kind", "sources", "budget", "params", "macs", "cka_product")
    assert [[row[c] for c in chosen] for row in other.rows] == [[row[c] for c in chosen] for row in comparison.rows]
    assert [row["accuracy"] for row in other.rows] != [row["accuracy"] for row in comparison.rows]


def test_a_search_without_stitchnets_says_so(pool: Pool) -> None:
    result = pool.search([CALIBRATION], loader("selection"), max_candidates=0, exits=False)
    found = compare(pool, result, loader("train"), loader("test"), num_classes=3, num_resamples=9)
    assert found.unmet == ("any budget", "<= 75% of MACs", "<= 50% of MACs", "<= 33% of MACs")
    assert [row["kind"] for row in found.rows] == ["source"] * 2 + ["self-stitched"] * 2
    assert not any("StitchNet" in verdict.contender for verdict in found.verdicts)
    assert found.words.endswith("No composition of several sources was found that keeps the budget.")


def test_what_is_no_better_than_guessing_is_called_that(pool: Pool, result: SearchResult) -> None:
    images, labels = PARTS["test"]
    random = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    test = DataLoader(TensorDataset(images, random), batch_size=32)
    found = compare(pool, result, loader("train"), test, num_classes=3, num_resamples=9)
    assert "no better than always guessing the commonest class" in found.words
    assert not any(verdict.worth_it for verdict in found.verdicts)


def test_a_wider_margin_reaches_the_verdicts(pool: Pool, result: SearchResult) -> None:
    found = compare(pool, result, loader("train"), loader("test"), num_classes=3, margin=0.6, num_resamples=9)
    assert {verdict.word for verdict in found.verdicts} == {"equivalent"}
    with pytest.raises(StitchError, match="margin is a difference in accuracy"):
        compare(pool, result, [], [], num_classes=3, margin=1)


@pytest.mark.parametrize("unlabelled", ["train", "test"])
def test_both_parts_need_labels(pool: Pool, result: SearchResult, unlabelled: str) -> None:
    given = {name: [PARTS[name][0]] if name == unlabelled else loader(name) for name in ("train", "test")}
    with pytest.raises(CalibrationError, match="needs labels for the training and the test images"):
        compare(pool, result, given["train"], given["test"], num_classes=3)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(*PARTS["test"], strict=True))


def test_progress_is_told_of_head_and_test_images(pool: Pool, result: SearchResult) -> None:
    recorder = Recorder()
    stream = DataLoader(Stream(), batch_size=32)
    compare(pool, result, loader("train"), stream, num_classes=3, num_resamples=9, progress=recorder)
    assert recorder.stages == [("head images", 90, 90), ("test images", None, 80)]
