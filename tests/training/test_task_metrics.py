from __future__ import annotations

import math
import warnings

import pytest
import torch
from doubles.tensors import normal
from sklearn import metrics as reference
from torch.nn import functional as F

from lightning_stitch.report import Evaluation, score
from lightning_stitch.training.task_metrics import loss_of, metric_inputs, metrics_for, predictions

OUTPUTS = normal(40, 3).float()
CLASSES = torch.arange(40) % 3
LABELS = (normal(40, 3, seed=1) + OUTPUTS > 0).long()
NUMBERS = OUTPUTS * 2 + normal(40, 3, seed=2).float()


def measured(task: str, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    """Over batches of unequal size, as an epoch gives them."""
    found = metrics_for(task, outputs.shape[1])  # type: ignore[arg-type]
    for rows in (slice(0, 17), slice(17, 40)):
        found.update(*metric_inputs(task, outputs[rows], targets[rows]))  # type: ignore[arg-type]
    return {name: float(value) for name, value in found.compute().items()}


def test_classes_are_measured_by_accuracy_and_auroc() -> None:
    p = OUTPUTS.softmax(1).numpy()
    assert measured("multiclass", OUTPUTS, CLASSES) == pytest.approx(
        {
            "accuracy": reference.accuracy_score(CLASSES, p.argmax(1)),
            "auroc": reference.roc_auc_score(CLASSES, p, multi_class="ovr"),
        },
        abs=1e-5,
    )


def test_labels_are_measured_by_auroc_average_precision_and_f1_at_one_half() -> None:
    p = OUTPUTS.sigmoid().numpy()
    assert measured("multilabel", OUTPUTS, LABELS) == pytest.approx(
        {
            "auroc": reference.roc_auc_score(LABELS, p),
            "average_precision": reference.average_precision_score(LABELS, p),
            "f1": reference.f1_score(LABELS, p > 0.5, average="macro"),
        },
        abs=1e-5,
    )


def test_numbers_are_measured_by_errors_in_their_own_units_and_r2() -> None:
    expected = {
        "mse": reference.mean_squared_error(NUMBERS, OUTPUTS),
        "mae": reference.mean_absolute_error(NUMBERS, OUTPUTS),
        "r2": reference.r2_score(NUMBERS, OUTPUTS),
    }
    assert measured("regression", OUTPUTS, NUMBERS.double()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("targets", [NUMBERS[:, 0], NUMBERS[:, :1]])
def test_a_single_number_has_pearsons_correlation_too(targets: torch.Tensor) -> None:
    found = measured("regression", OUTPUTS[:, :1], targets)
    assert found["pearson"] == pytest.approx(float(torch.corrcoef(torch.stack([OUTPUTS[:, 0], NUMBERS[:, 0]]))[0, 1]))
    assert found["r2"] == pytest.approx(reference.r2_score(NUMBERS[:, 0], OUTPUTS[:, 0]), rel=1e-5)


def test_losses_are_cross_entropy_binary_cross_entropy_and_squared_error() -> None:
    p = OUTPUTS.sigmoid()
    binary = -(LABELS * p.log() + (1 - LABELS) * (1 - p).log()).mean()
    torch.testing.assert_close(loss_of("multilabel", OUTPUTS, LABELS), binary)
    torch.testing.assert_close(
        loss_of("multiclass", OUTPUTS, CLASSES), -OUTPUTS.log_softmax(1)[torch.arange(40), CLASSES].mean()
    )
    torch.testing.assert_close(loss_of("regression", OUTPUTS, NUMBERS.double()), (OUTPUTS - NUMBERS).square().mean())
    # One number without a dimension must not be spread over all rows.
    one = OUTPUTS[:, :1]
    torch.testing.assert_close(loss_of("regression", one, NUMBERS[:, 0]), (one[:, 0] - NUMBERS[:, 0]).square().mean())


def test_predictions_are_probabilities_or_the_numbers() -> None:
    torch.testing.assert_close(predictions("multiclass", OUTPUTS), F.softmax(OUTPUTS, 1))
    torch.testing.assert_close(predictions("multilabel", OUTPUTS), OUTPUTS.sigmoid())
    assert torch.equal(predictions("regression", OUTPUTS), OUTPUTS)


def perfect(classes: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Logits of a classifier that is always right."""
    return 8.0 * F.one_hot(classes, num_classes).float()


def test_a_perfect_classifier_of_classes_that_do_not_all_occur_has_an_auroc_of_one() -> None:
    classes = torch.tensor([0, 3, 3, 5, 7, 7, 9, 11] * 5)
    scores = measured("multiclass", perfect(classes, 12), classes)
    assert scores == {"accuracy": 1.0, "auroc": 1.0}


def test_auroc_is_the_mean_over_the_classes_that_occur_as_the_comparison_has_it() -> None:
    outputs = normal(40, 12).float()
    classes = torch.arange(40) % 5 + 3
    p = outputs.softmax(1)
    one_versus_rest = [reference.roc_auc_score(classes == c, p[:, c]) for c in range(3, 8)]
    expected = sum(one_versus_rest) / 5
    evaluation = Evaluation("n", "source", p, params=1, macs=1, seconds=0.0, labels=0)
    assert measured("multiclass", outputs, classes)["auroc"] == pytest.approx(expected, abs=1e-5)
    assert score(evaluation, classes, num_resamples=2)["auroc"] == pytest.approx(expected, abs=1e-5)


def test_labels_that_do_not_occur_or_always_do_are_left_out_where_they_tell_nothing() -> None:
    labels = torch.stack([LABELS[:, 0], torch.zeros(40), torch.ones(40), LABELS[:, 1]], 1).long()
    outputs = torch.cat([OUTPUTS, -OUTPUTS[:, :1]], 1)
    p = outputs.sigmoid().numpy()
    assert measured("multilabel", outputs, labels) == pytest.approx(
        {
            "auroc": reference.roc_auc_score(labels[:, [0, 3]], p[:, [0, 3]]),
            "average_precision": reference.average_precision_score(labels[:, [0, 2, 3]], p[:, [0, 2, 3]]),
            "f1": reference.f1_score(labels[:, [0, 2, 3]], p[:, [0, 2, 3]] > 0.5, average="macro"),
        },
        abs=1e-5,
    )


def test_numbers_that_do_not_vary_are_left_out_and_small_ones_count_in_full() -> None:
    numbers = torch.stack([NUMBERS[:, 0], torch.full((40,), 0.1), 1e-4 * NUMBERS[:, 2]], 1)
    outputs = OUTPUTS * torch.tensor([1, 1, 1e-4])
    expected = [reference.r2_score(numbers[:, column], outputs[:, column]) for column in (0, 2)]
    assert measured("regression", outputs, numbers)["r2"] == pytest.approx(sum(expected) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "undefined", "words"),
    [
        ("multiclass", OUTPUTS, CLASSES * 0 + 2, {"auroc"}, "AUROC is undefined, NaN: all 40 images are of class 2"),
        ("multilabel", OUTPUTS, LABELS * 0 + 1, {"auroc"}, "no label is on some of the 40 images and not on others"),
        (
            "multilabel",
            OUTPUTS,
            LABELS * 0,
            {"auroc", "average_precision", "f1"},
            "none of the 40 images has a label",
        ),
        ("regression", OUTPUTS, NUMBERS * 0 + 0.1, {"r2"}, "R2 is undefined, NaN: the numbers of all 40 images are"),
        ("regression", OUTPUTS[:, :1], NUMBERS[:, 0] * 0, {"r2", "pearson"}, "correlation is undefined, NaN"),
        ("regression", OUTPUTS[:, :1] * 0, NUMBERS[:, 0], {"pearson"}, "the predictions or the numbers of all images"),
    ],
)
def test_what_is_undefined_is_nan_and_said(
    task: str, outputs: torch.Tensor, targets: torch.Tensor, undefined: set[str], words: str
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        scores = measured(task, outputs, targets)
    assert {name for name, value in scores.items() if math.isnan(value)} == undefined
    assert len(warned) == len(undefined)
    assert any(words in str(warning.message) for warning in warned)


def test_a_single_image_is_measured_as_far_as_that_goes() -> None:
    metrics = metrics_for("regression", 1)
    metrics.update(*metric_inputs("regression", OUTPUTS[:1, :1], NUMBERS[:1, 0]))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        scores = metrics.compute()
    assert len(warned) == 2
    assert float(scores["mae"]) == pytest.approx(abs(float(OUTPUTS[0, 0] - NUMBERS[0, 0])))
    assert math.isnan(scores["r2"])
    assert math.isnan(scores["pearson"])


def test_ranks_and_epochs_start_from_nothing() -> None:
    metrics = metrics_for("regression", 3)
    for _ in range(2):
        metrics.update(*metric_inputs("regression", OUTPUTS, NUMBERS))
        assert float(metrics.compute()["r2"]) == pytest.approx(reference.r2_score(NUMBERS, OUTPUTS), rel=1e-5)
        metrics.reset()
