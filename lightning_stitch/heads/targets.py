"""What images are to be told apart by: classes, several labels at once, or numbers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_stitch.errors import CalibrationError

Task = Literal["multiclass", "multilabel", "regression"]
"""One class of several; any of several labels, each there or not; or one or more numbers."""


def task_of(targets: Tensor) -> Task:
    """The task that targets are of, by their dtype and shape.

    Integers (rows,) are class indices, integers or booleans (rows x labels) are labels, floats are numbers.
    """
    if targets.is_floating_point():
        return "regression"
    return "multiclass" if targets.ndim == 1 else "multilabel"


def target_columns(targets: Tensor, *, task: Task, num_classes: int, varied: bool = True) -> Tensor:
    """Targets as what a regression predicts: rows x columns, float64; one-hot, 0 and 1, or the numbers themselves.

    They are `num_classes` classes by their indices (rows,), labels, 0 and 1 (rows x labels), or numbers (rows,) or
    (rows x numbers).

    Raises:
        CalibrationError: If there are none, they are of another dtype or shape, or out of range; likewise, if they must
            be varied, if all rows have the same class, the same labels, or a number that does not vary; or if a number
            is not finite.
    """
    if task == "multiclass":
        columns = F.one_hot(_class_indices(targets, num_classes), num_classes).double()
    else:
        columns = _numbers(targets, task, num_classes)
    if varied:
        _require_variety(columns, task)
    return columns


def _require_variety(columns: Tensor, task: Task) -> None:
    vary, num_rows = (columns != columns[0]).any(0), len(columns)
    if task == "regression":
        constant = (~vary).nonzero().flatten().tolist()
        if constant:
            raise CalibrationError(
                f"A head needs numbers that vary; over {num_rows} rows those of the columns {constant[:10]} do not."
            )
    elif not vary.any():
        if task == "multilabel":
            raise CalibrationError(f"A head needs rows that differ; all {num_rows} rows have the same labels.")
        raise CalibrationError(
            f"A head needs rows of at least two classes; all {num_rows} targets are {int(columns[0].argmax())}. "
            f"Shuffle before taking a part of the images, or take more of them."
        )


def standardised(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of mean 0 and standard deviation 1, and the means and deviations; what does not vary has deviation 1."""
    mean, deviation = columns.mean(0), columns.std(0, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    return (columns - mean) / deviation, mean, deviation


def comparable_columns(targets: Tensor, *, num_classes: int | None) -> Tensor:
    """Targets of any task as columns whose R2 says something: numbers are standardised, so that each counts alike.

    `task_of` says what they are; `num_classes` None: as many as they say. CalibrationError as `target_columns`.
    """
    task = task_of(targets)
    count = num_classes if num_classes is not None else count_of(targets)
    columns = target_columns(targets, task=task, num_classes=count)
    return standardised(columns)[0] if task == "regression" else columns


def count_of(targets: Tensor) -> int:
    """How many classes, labels or numbers targets have."""
    if task_of(targets) == "multiclass":
        return int(targets.max()) + 1 if len(targets) else 0
    return 1 if targets.ndim == 1 else targets.shape[1]


def _class_indices(targets: Tensor, num_classes: int) -> Tensor:
    if targets.ndim != 1 or targets.is_floating_point():
        raise CalibrationError(
            f"Targets must be class indices, one integer for each row; found {targets.dtype} of shape "
            f"{tuple(targets.shape)}."
        )
    _require_rows(targets)
    classes = targets.unique().tolist()
    if classes[0] < 0 or classes[-1] >= num_classes:
        raise CalibrationError(
            f"Targets must lie from 0 to {num_classes - 1} (num_classes={num_classes}); found {classes[0]} to "
            f"{classes[-1]}."
        )
    return targets.long()


def _numbers(targets: Tensor, task: Task, num_classes: int) -> Tensor:
    columns = targets[:, None] if task == "regression" and targets.ndim == 1 else targets
    if columns.ndim != 2 or columns.shape[1] != num_classes:
        what = "labels, 0 or 1" if task == "multilabel" else "numbers"
        raise CalibrationError(
            f"Targets must be {num_classes} {what}, for each row (num_classes={num_classes}, task={task!r}); found "
            f"{targets.dtype} of shape {tuple(targets.shape)}."
        )
    _require_rows(targets)
    columns = columns.double()
    if task == "multilabel" and not ((columns == 0) | (columns == 1)).all():
        raise CalibrationError("Labels must be 0 or 1, one column for each label; found other numbers.")
    if not columns.isfinite().all():
        bad = int((~columns.isfinite()).any(1).sum())
        raise CalibrationError(f"Targets must be finite numbers; {bad} of {len(columns)} rows have NaN or infinity.")
    return columns


def _require_rows(targets: Tensor) -> None:
    if not len(targets):
        raise CalibrationError("A head needs labelled rows to be fitted; found none.")


def predictions(task: Task, outputs: Tensor) -> Tensor:
    """Probabilities of classes, probabilities of labels, or the numbers themselves, of logits (batch, classes)."""
    if task == "regression":
        return outputs
    return outputs.softmax(dim=-1) if task == "multiclass" else outputs.sigmoid()
