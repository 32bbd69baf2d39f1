from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from doubles.pools import path
from doubles.progress import Recorder
from doubles.small_sources import images_seen, plain
from doubles.tensors import digits, noise
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_stitch.composing.pool import Pool
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.errors import CalibrationError
from lightning_stitch.heads.ridge import fit_ridge_head
from lightning_stitch.progress import Silent
from lightning_stitch.report.comparison import Comparison, compare, finalists
from lightning_stitch.report.evaluation import Evaluation, verdict
from lightning_stitch.search.results import SearchResult

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
    return Pool([plain("a", (8, 9, 10), seed=0), plain("b", (4, 12, 12), seed=1)], SHAPE)


@pytest.fixture(scope="module")
def result(pool: Pool) -> SearchResult:
    return pool.search([CALIBRATION], loader("selection"))


@pytest.fixture(scope="module")
def comparison(pool: Pool, result: SearchResult) -> Comparison:
    return compare(pool, result, loader("train"), loader("test"), num_classes=3, fractions=FRACTIONS, num_resamples=50)


def test_the_table_holds_sources_self_stitched_sources_and_the_best_under_each_budget(
    result: SearchResult, comparison: Comparison
) -> None:
    found = [(row["name"], row["kind"], row["budget"]) for row in comparison.rows]
    assert sorted(found[:2]) == [(name, "source", None) for name in "ab"]
    assert sorted(found[2:4]) == [(name, "self-stitched", None) for name in "ab"]
    words = {"no budget": math.inf, "<= 150% of MACs": 1.5, "<= 75% of MACs": 0.75}
    assert found[4::2] == [("StitchNet", "stitched", word) for word in words]
    assert [row[1:] for row in found[5::2]] == [("early exit", f"early exit, {word}") for word in words]
    assert comparison.unmet == ("<= 0% of MACs",)
    smallest = min(row["macs"] for row in comparison.rows[:2])
    for row, share in zip(comparison.rows[4:], (share for share in words.values() for _ in range(2)), strict=True):
        kept = [r.candidate for r in result.ranked if r.candidate.cost.macs <= share * smallest]
        chosen = next(candidate for candidate in kept if candidate.kind == row["kind"])
        assert (row["params"], row["macs"]) == (chosen.cost.params, chosen.cost.macs)
        assert row["name"] == ("StitchNet" if row["kind"] == "stitched" else path(chosen)[0][0])


@pytest.mark.parametrize("kind", ["stitched", "early exit"])
def test_under_each_budget_stands_the_first_of_the_ranking_that_fits(pool: Pool, kind: str) -> None:
    result = pool.search(
        [CALIBRATION],
        loader("selection"),
        ranking=lambda candidates, _: [{"macs": float(c.cost.macs)} for c in candidates],
    )
    macs = [r.candidate.cost.macs for r in result.ranked if r.candidate.kind == kind]
    smallest = min(part.cost.macs for part in pool.parts)
    fractions = (1.2, 0.9, 0.7, 0.4, 1e-6)
    chosen, unmet = finalists(result, fractions)
    expected = [max((m for m in macs if m <= share * smallest), default=0) for share in (math.inf, *fractions)]
    assert [f.candidate.cost.macs for f in chosen if f.candidate.kind == kind] == [m for m in expected if m]
    assert len(set(expected)) > 2
    assert kind == "early exit" or len(unmet) == expected.count(0) > 0


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
        assert row["seconds"] > 0
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        accuracies.append(row["accuracy"])
    assert len(set(accuracies)) > 2
    assert max(accuracies) > 0.6


def test_seconds_of_a_stitchnet_hold_the_search_and_of_a_source_do_not(
    result: SearchResult, comparison: Comparison
) -> None:
    by_kind = {row["kind"]: row["seconds"] for row in comparison.rows}
    assert min(by_kind["stitched"], by_kind["early exit"]) > sum(result.seconds.values())
    assert by_kind["self-stitched"] > result.seconds["cut"] + result.seconds["calibrate"]
    chosen, _ = finalists(result, ())
    assert [f.search_seconds for f in chosen if f.candidate.kind == "source"] == [0, 0]


def test_the_sentence_is_the_paired_test_of_the_best_source_and_the_best_stitchnet(
    pool: Pool, result: SearchResult, comparison: Comparison
) -> None:
    targets = PARTS["test"][1]
    assert result.best_stitched is not None
    evaluations = []
    for kind, ranked in (("source", result.best_source), ("stitched", result.best_stitched)):
        candidate = ranked.candidate
        (fitted,), labels = pool.outcomes([candidate], loader("train"), progress=Silent())
        (seen,), _ = pool.outcomes([candidate], loader("test"), progress=Silent())
        assert labels is not None
        head, _ = fit_ridge_head(fitted.features, labels, num_classes=3)
        name = path(candidate)[0][0] if kind == "source" else "StitchNet"
        probabilities = head(seen.features).softmax(-1).detach()
        evaluations.append(
            Evaluation(name, kind, probabilities, candidate.cost.params, candidate.cost.macs, 0.0, 0)  # type: ignore[arg-type]
        )
    assert comparison.sentence == verdict(*evaluations, targets, num_resamples=50)


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
    chosen = ("name", "kind", "budget", "params", "macs", "cka_product")
    assert [[row[c] for c in chosen] for row in other.rows] == [[row[c] for c in chosen] for row in comparison.rows]
    assert [row["accuracy"] for row in other.rows] != [row["accuracy"] for row in comparison.rows]


def test_a_search_without_stitchnets_says_so(pool: Pool) -> None:
    result = pool.search([CALIBRATION], loader("selection"), max_candidates=0, exits=False)
    found = compare(pool, result, loader("train"), loader("test"), num_classes=3, num_resamples=9)
    assert found.unmet == ("any budget", "<= 75% of MACs", "<= 50% of MACs", "<= 33% of MACs")
    assert [row["kind"] for row in found.rows] == ["source"] * 2 + ["self-stitched"] * 2
    assert found.sentence.startswith("No stitched network was chosen")


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
