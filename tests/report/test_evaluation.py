from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.text import Text
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score
from torchmetrics.functional.classification import binary_auroc, multiclass_accuracy, multiclass_auroc

from lightning_stitch.errors import StitchError
from lightning_stitch.report.evaluation import Evaluation, score
from lightning_stitch.report.tables import comparison_table, print_comparison, write_comparison
from lightning_stitch.report.verdicts import Verdict, judge
from lightning_stitch.tables import with_interval

METRICS = ("accuracy", "balanced_accuracy", "auroc")


def evaluation(probabilities, **changes):
    costs = {"params": 8_040_000, "macs": 2_840_000_000, "seconds": 687.25, "labels": 512}
    return Evaluation(**{"name": "net", "kind": "stitched", "probabilities": probabilities, **costs, **changes})


def predictions(num_images, num_classes, *, seed=0, skill=1.0, levels=None):
    """Targets of unequal classes and probabilities that know something of them; `levels` makes ties."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.arange(1, num_classes + 1).double()
    targets = torch.multinomial(shares, num_images, replacement=True, generator=generator)
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), targets] += skill
    probabilities = logits.softmax(1)
    if levels is not None:
        probabilities = (probabilities * levels).round() / levels
    return targets, probabilities


def answers(right, targets):
    """Sure predictions that are right exactly where `right` says so (two classes)."""
    return torch.nn.functional.one_hot(torch.where(right, targets, 1 - targets), 2).float()


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("levels", [None, 5])
@pytest.mark.parametrize("seed", range(3))
def test_points_agree_with_scikit_learn_and_torchmetrics(num_classes, levels, seed):
    targets, probabilities = predictions(150, num_classes, seed=seed, levels=levels)
    found = score(evaluation(probabilities), targets, num_resamples=2)
    guess = probabilities.argmax(1)
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, guess), abs=1e-12)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(targets, guess), abs=1e-12)
    aucs = [roc_auc_score(targets == c, probabilities[:, c]) for c in range(num_classes)]
    assert found["auroc"] == pytest.approx(aucs[1] if num_classes == 2 else np.mean(aucs), abs=1e-12)
    average = {
        name: multiclass_accuracy(probabilities, targets, num_classes, average=name).item()
        for name in ("micro", "macro")
    }
    assert found["accuracy"] == pytest.approx(average["micro"], abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(average["macro"], abs=1e-6)
    if num_classes == 2:
        reference = binary_auroc(probabilities[:, 1], targets)
    else:
        reference = multiclass_auroc(probabilities, targets, num_classes)
    assert found["auroc"] == pytest.approx(reference.item(), abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_every_resample_is_scored_as_scikit_learn_scores_the_repeated_images(num_classes):
    targets, probabilities = predictions(150, num_classes, levels=6)
    generator = torch.Generator().manual_seed(5)
    found = score(evaluation(probabilities), targets, num_resamples=40, seed=5)
    picks = torch.randint(150, (40, 150), generator=generator)
    columns = [1] if num_classes == 2 else range(num_classes)
    expected = {
        "accuracy": [accuracy_score(targets[p], probabilities[p].argmax(1)) for p in picks],
        "balanced_accuracy": [balanced_accuracy_score(targets[p], probabilities[p].argmax(1)) for p in picks],
        "auroc": [np.mean([roc_auc_score(targets[p] == c, probabilities[p, c]) for c in columns]) for p in picks],
    }
    for metric, values in expected.items():
        interval = np.quantile(values, [0.025, 0.975])
        assert [found[f"{metric}_low"], found[f"{metric}_high"]] == pytest.approx(interval, abs=1e-12)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(100):
        right = torch.rand(200, generator=torch.Generator().manual_seed(seed)) < 0.8
        targets = torch.arange(200) % 2
        found = score(evaluation(answers(right, targets)), targets, num_resamples=160, seed=seed)
        hits += found["accuracy_low"] <= 0.8 <= found["accuracy_high"]
    assert 90 <= hits <= 99


def test_blocks_of_resamples_do_not_change_the_result(monkeypatch):
    targets, probabilities = predictions(50, 3)
    whole = score(evaluation(probabilities), targets, num_resamples=30)
    monkeypatch.setattr("lightning_stitch.report.evaluation._BLOCK", 50 * 7)
    assert score(evaluation(probabilities), targets, num_resamples=30) == pytest.approx(whole, abs=1e-12)


def test_scores_repeat_follow_the_seed_and_leave_the_global_random_state_alone():
    targets, probabilities = predictions(80, 2)
    before = torch.get_rng_state()
    first = score(evaluation(probabilities), targets)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert score(evaluation(probabilities.half().float()), targets)["accuracy"] == first["accuracy"]
    assert score(evaluation(probabilities), targets) == first
    assert score(evaluation(probabilities), targets, seed=1) != first


def test_one_class_has_no_auroc():
    targets = torch.ones(20, dtype=torch.long)
    found = score(evaluation(answers(torch.arange(20) < 15, targets)), targets)
    assert (found["accuracy"], found["balanced_accuracy"]) == (0.75, 0.75)
    assert [found["auroc"], found["auroc_low"], found["auroc_high"]] == [None] * 3


def test_classes_that_are_absent_do_not_count():
    targets, probabilities = predictions(100, 3)
    wider = torch.cat([probabilities, torch.zeros(100, 2)], 1)
    narrow, wide = (score(evaluation(p), targets, num_resamples=50) for p in (probabilities, wider))
    assert wide == pytest.approx(narrow, abs=1e-12)


@pytest.fixture
def comparison():
    targets, probabilities = predictions(100, 2)
    networks = [
        evaluation(probabilities, name="tf_efficientnet_lite0.in1k [plain]", kind="source", labels=0),
        evaluation(predictions(100, 2, seed=1)[1], name="DenseNet121|ResNet50", kind="self-stitched"),
        evaluation(
            probabilities,
            name="a network of fragments with quite a long name of its own",
            cka_product=0.505,
            budget="<= 50 % of smallest source",
            sources=("a", "b"),
            params=138_357_544,
            macs=15_500_000_000,
        ),
    ]
    return comparison_table(networks, targets, num_resamples=50), judge(networks[0], networks[2], targets)


def test_rows_are_flat_and_plain(comparison):
    rows, _ = comparison
    scores = [metric + end for metric in METRICS for end in ("", "_low", "_high")]
    costs = ["params", "macs", "mean_macs", "seconds", "labels", "cka_product"]
    columns = ["name", "kind", "sources", "budget", *scores, *costs, "verdict"]
    assert [list(row) for row in rows] == [columns] * 3
    assert {type(value) for row in rows for value in row.values()} == {str, int, float, type(None)}
    assert (rows[2]["cka_product"], rows[2]["macs"], rows[1]["budget"]) == (0.505, 15_500_000_000, None)
    assert [row["sources"] for row in rows] == ["", "", "a + b"]


@pytest.mark.parametrize("width", [200, 80, 60])
def test_the_printed_table_keeps_its_width_and_its_numbers(comparison, width):
    rows, sentence = comparison[0], str(comparison[1])
    file = io.StringIO()
    print_comparison(
        rows, sentence, title="Solar [cells]", console=Console(file=file, width=width, force_terminal=True)
    )
    text = Text.from_ansi(file.getvalue()).plain
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    assert "Solar [cells]" in text
    for row in rows if width > 60 else ():
        shown = METRICS if width == 200 else ("accuracy", "auroc")
        assert all(with_interval(row, metric) in text for metric in shown)
    if width > 60:
        assert "138.36" in text
        assert "15500.0" in text


def test_a_table_in_a_pipe_is_not_squeezed(comparison, capsys):
    rows, sentence = comparison[0], str(comparison[1])
    print_comparison(rows, sentence, title="Solar cells")
    printed = capsys.readouterr().out
    assert with_interval(rows[2], "auroc") in printed
    assert "balanced accuracy" in printed
    assert "[plain]" in printed
    assert " ".join(sentence.split()) in " ".join(printed.split())


def test_columns_without_a_value_are_left_out(comparison, capsys):
    rows, sentence = comparison[0], str(comparison[1])
    print_comparison(rows, sentence, title="Solar cells")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("CKA", "AUROC"))
    print_comparison([{**row, "cka_product": None, "auroc": None} for row in rows], sentence, title="Solar cells")
    printed = capsys.readouterr().out
    assert "balanced accuracy" in printed
    assert not any(word in printed for word in ("CKA", "AUROC"))


def test_written_files_read_back(comparison, tmp_path):
    rows, sentence = comparison[0], str(comparison[1])
    settings, verdicts = {"seed": 0, "sources": ["a", "b"]}, [comparison[1]]
    paths = write_comparison(rows, sentence, tmp_path / "new" / "folder", verdicts=verdicts, settings=settings)
    assert [path.name for path in paths] == ["comparison.csv", "comparison.json"]
    record = json.loads(paths[1].read_text(encoding="utf-8"))
    (told,) = record.pop("verdicts")
    assert record == {"verdict": sentence, "settings": settings, "rows": rows}
    assert told.pop("sentence") == sentence
    assert told.pop("worth_it") is comparison[1].worth_it
    assert Verdict(**told) == comparison[1]
    with paths[0].open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
    write_comparison(rows[:1], "again", tmp_path / "new" / "folder")
    assert json.loads(paths[1].read_text(encoding="utf-8"))["rows"] == rows[:1]


@pytest.mark.parametrize("value", [math.nan, object()])
def test_settings_that_json_cannot_hold_are_refused_before_anything_is_written(comparison, tmp_path, value):
    with pytest.raises(StitchError, match="plain JSON"):
        write_comparison(comparison[0], "", tmp_path / "out", settings={"value": value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("probabilities", "words"),
    [
        (torch.tensor([[0.5, 0.5], [math.nan, 1.0], [math.inf, 0.0]]), "net: 2 of 3 images have NaN or infinite"),
    ],
)
def test_probabilities_that_are_none_are_refused(probabilities, words):
    with pytest.raises(StitchError, match=words):
        evaluation(probabilities)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.zeros(9, dtype=torch.long), r"probabilities for 10 images and .* shape \(9,\)"),
        (torch.zeros(10), "as many integers from 0 to 1, found torch.float32"),
        (torch.arange(10) % 3, "10 images and 2 classes; .* integers from 0 to 1, found .* from 0 to 2"),
        (torch.arange(10) % 3 - 1, "found .* from -1 to 1"),
    ],
)
def test_targets_that_do_not_fit_are_refused_everywhere(targets, words):
    fits, other = evaluation(torch.full((len(targets), 3), 0.3)), evaluation(torch.full((10, 2), 0.5))
    with pytest.raises(StitchError, match=words):
        score(other, targets)
    with pytest.raises(StitchError, match=words):
        comparison_table([other], targets)
    with pytest.raises(StitchError):
        judge(fits, other, targets)


def test_an_empty_table_is_refused(tmp_path):
    with pytest.raises(StitchError, match="no rows to show"):
        write_comparison([], "", tmp_path)
    with pytest.raises(StitchError, match="no rows to show"):
        print_comparison([], "", title="")
