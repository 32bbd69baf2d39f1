"""The loss, the metrics and the predictions of each task.

torchmetrics averages over all classes or labels, those without an image with 0. The metrics here average over those
that occur, and where nothing is defined they give NaN and say why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

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
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn

from lightning_stitch.heads import Task, predictions


def metrics_for(task: Task, num_classes: int) -> MetricCollection:
    """The metrics of a task, for what `metric_inputs` gives; NaN, with a warning, where one is undefined.

    Classes: accuracy, and one-versus-rest AUROC, the mean over the classes that occur. Labels: AUROC, average precision
    and F1 at a probability of one half, means over the labels that occur (for AUROC also not on every image). Numbers:
    mean squared and mean absolute error in their own units and R2, the mean over the numbers that vary; for a single
    number Pearson's correlation, too.
    """
    if task == "multiclass":
        return MetricCollection(
            {"accuracy": MulticlassAccuracy(num_classes, average="micro"), "auroc": ClassAUROC(num_classes)}
        )
    if task == "multilabel":
        return MetricCollection(
            {
                "auroc": LabelAUROC(num_classes),
                "average_precision": LabelAveragePrecision(num_classes),
                "f1": LabelF1(num_classes, average="none"),
            }
        )
    pearson = {"pearson": Correlation()} if num_classes == 1 else {}
    return MetricCollection({"mse": MeanSquaredError(), "mae": MeanAbsoluteError(), "r2": VaryingR2(), **pearson})


class ClassAUROC(MulticlassAUROC):
    """One-versus-rest AUROC, the mean over the classes that occur."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """NaN unless two classes occur."""
        scores, targets = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        classes = targets.unique().tolist()
        if len(classes) < 2:
            return _undefined("AUROC", f"all {len(targets)} images are of class {classes[0]}", scores)
        return torch.stack([binary_auroc(scores[:, c], (targets == c).long()) for c in classes]).mean()


class LabelAUROC(MultilabelAUROC):
    """AUROC, the mean over the labels that some images have and some have not."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """NaN where there is no such label."""
        scores, targets = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        telling = (targets == 1).any(0) & (targets == 0).any(0)
        why = f"no label is on some of the {len(targets)} images and not on others"
        return _mean_over(telling, binary_auroc, scores, targets) if telling.any() else _undefined("AUROC", why, scores)


class LabelAveragePrecision(MultilabelAveragePrecision):
    """Average precision, the mean over the labels that occur."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """NaN where no label occurs."""
        scores, targets = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        occurs = (targets == 1).any(0)
        if not occurs.any():
            return _undefined("average precision", f"none of the {len(targets)} images has a label", scores)
        return _mean_over(occurs, binary_average_precision, scores, targets)


class LabelF1(MultilabelF1Score):
    """F1 at a probability of one half, the mean over the labels that occur."""

    def compute(self) -> Tensor:
        """NaN where no label occurs."""
        occurs = torch.add(dim_zero_cat(self.tp), dim_zero_cat(self.fn)) > 0
        scores = super().compute()
        return scores[occurs].mean() if occurs.any() else _undefined("F1", "none of the images has a label", scores)


class VaryingR2(R2Score):
    """R2, the mean over the numbers that vary; `R2Score` gives 0 or 1 for a variance below 1e-4, whatever the unit."""

    low: Tensor
    high: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("low", torch.tensor(torch.inf), dist_reduce_fx="min")
        self.add_state("high", torch.tensor(-torch.inf), dist_reduce_fx="max")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take predictions and targets, (batch,) or (batch, numbers)."""
        super().update(preds, target)
        low, high = target.aminmax(dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def compute(self) -> Tensor:
        """NaN where no number varies."""
        varies = (self.high > self.low).reshape(self.residual.shape)
        total = self.sum_squared_error - self.sum_error.square() / self.total
        if not varies.any():
            return _undefined("R2", f"the numbers of all {int(self.total)} images are the same", total)
        return (1 - self.residual / total)[varies].mean()


class Correlation(PearsonCorrCoef):
    """Pearson's correlation of a single number."""

    def compute(self) -> Tensor:
        """NaN where predictions or numbers do not vary, said in one sentence instead of torchmetrics' own."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            correlation = super().compute()
        why = "the predictions or the numbers of all images are the same"
        return _undefined("correlation", why, correlation) if correlation.isnan() else correlation


def _mean_over(labels: Tensor, measure: Callable[[Tensor, Tensor], Tensor], scores: Tensor, targets: Tensor) -> Tensor:
    columns = labels.nonzero().flatten().tolist()
    return torch.stack([measure(scores[:, column], targets[:, column]) for column in columns]).mean()


def _undefined(metric: str, why: str, like: Tensor) -> Tensor:
    """NaN, on the device of a tensor, and a sentence."""
    rank_zero_warn(f"The {metric} is undefined, NaN: {why}.", UserWarning)
    return like.new_full((), torch.nan, dtype=torch.float32)


def loss_of(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of classes, the mean binary one of labels, or the mean squared error of numbers; a scalar.

    Targets are class indices (batch,), 0 and 1 (batch, labels), or numbers (batch,) or (batch, numbers).
    """
    if task == "multiclass":
        return F.cross_entropy(outputs, targets)
    if task == "multilabel":
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype))
    return F.mse_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype))


def metric_inputs(task: Task, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets as the task's metrics take them; a single number without its dimension of one."""
    predicted = predictions(task, outputs)
    if task == "regression":
        predicted, targets = predicted.float(), targets.reshape(predicted.shape).to(torch.float32)
        return (predicted[:, 0], targets[:, 0]) if predicted.shape[1] == 1 else (predicted, targets)
    return predicted, targets
