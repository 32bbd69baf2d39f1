from __future__ import annotations

import pytest
import torch
from doubles.tensors import normal
from sklearn import metrics as reference
from torch.nn import functional as F

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
