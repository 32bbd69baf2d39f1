"""The loss, the metrics and the predictions of each task."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, PearsonCorrCoef, R2Score
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MultilabelAUROC,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from lightning_stitch.heads import Task


def metrics_for(task: Task, num_classes: int) -> MetricCollection:
    """The metrics of a task, for what `metric_inputs` gives.

    Classes: accuracy and (one-versus-rest) AUROC. Labels: means over the labels of AUROC, average precision, and F1 at
    a probability of one half. Numbers: mean squared and mean absolute error in their own units and R2; for a single
    number Pearson's correlation, too.
    """
    if task == "multiclass":
        return MetricCollection(
            {"accuracy": MulticlassAccuracy(num_classes, average="micro"), "auroc": MulticlassAUROC(num_classes)}
        )
    if task == "multilabel":
        return MetricCollection(
            {
                "auroc": MultilabelAUROC(num_classes),
                "average_precision": MultilabelAveragePrecision(num_classes),
                "f1": MultilabelF1Score(num_classes),
            }
        )
    pearson = {"pearson": PearsonCorrCoef()} if num_classes == 1 else {}
    return MetricCollection({"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": R2Score(), **pearson})


def loss_of(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of classes, the mean binary one of labels, or the mean squared error of numbers; a scalar.

    Targets are class indices (batch,), 0 and 1 (batch, labels), or numbers (batch,) or (batch, numbers).
    """
    if task == "multiclass":
        return F.cross_entropy(outputs, targets)
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))
    return F.mse_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype))


def predictions(task: Task, outputs: Tensor) -> Tensor:
    """Probabilities of classes, probabilities of labels, or the numbers themselves, of logits (batch, classes)."""
    if task == "regression":
        return outputs
    return outputs.softmax(dim=-1) if task == "multiclass" else outputs.sigmoid()


def metric_inputs(task: Task, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets as the task's metrics take them; a single number without its dimension of one."""
    predicted = predictions(task, outputs)
    if task == "regression":
        predicted, targets = predicted.float(), targets.reshape(predicted.shape).to(torch.float32)
        return (predicted[:, 0], targets[:, 0]) if predicted.shape[1] == 1 else (predicted, targets)
    return predicted, targets
