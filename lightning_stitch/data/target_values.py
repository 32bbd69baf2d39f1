"""Targets as datasets give them, one for each image, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.heads import Task

DataTask = Task | Literal["none"]
TargetValue = int | Tensor | None


@dataclass(frozen=True, slots=True)
class TargetReader:
    """Turns the target of an image, as a dataset gives it, into an integer or a vector of a fixed length.

    Attributes:
        task: What targets are: classes become integers, labels int64 vectors of 0 and 1, numbers float32 vectors, or
            single float32 numbers where a dataset gives such; "none": there are none.
        num_classes: How many classes, labels or numbers there are; None: not known yet.
        scalar: Whether numbers come singly; None: not known yet.
    """

    task: DataTask
    num_classes: int | None = None
    scalar: bool | None = None

    def __call__(self, value: Any) -> TargetValue:
        """The target, checked.

        Raises:
            CalibrationError: If it is of another kind, or of another length than the others; without the image's name.
        """
        if self.task == "multiclass":
            return self._class(value)
        if isinstance(value, str | bytes | dict) or value is None:
            raise CalibrationError(f"targets for task={self.task!r} are numbers; found {value!r}")
        try:
            given = torch.as_tensor(np.asarray(value.tolist() if hasattr(value, "tolist") else value))
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"targets for task={self.task!r} are numbers; found {value!r}") from error
        return self._labels(given) if self.task == "multilabel" else self._numbers(given)

    def _class(self, value: Any) -> int:
        label = checked_label(value)
        if self.num_classes is not None and label >= self.num_classes:
            raise CalibrationError(f"it has label {label}, but the labels of train go from 0 to {self.num_classes - 1}")
        return label

    def _labels(self, given: Tensor) -> Tensor:
        if given.ndim != 1 or not ((given == 0) | (given == 1)).all():
            raise CalibrationError(
                f"labels must be a vector of 0 and 1, one for each label; found {given.tolist()!r}. Turn lists of the "
                f"labels that are there into such vectors first (target_transform)"
            )
        return self._of_same_length(given.long())

    def _numbers(self, given: Tensor) -> Tensor:
        if given.ndim > 1 or given.dtype == torch.bool or given.is_complex():
            raise CalibrationError(
                f"a number or a vector of numbers was expected; found {given.dtype} of shape {tuple(given.shape)}"
            )
        if not all(math.isfinite(number) for number in given.flatten().tolist()):
            raise CalibrationError(f"targets must be finite; found {given.tolist()!r}")
        if self.scalar is not None and (given.ndim == 0) != self.scalar:
            raise CalibrationError("some targets are single numbers and others vectors")
        return self._of_same_length(given.float())

    def _of_same_length(self, given: Tensor) -> Tensor:
        if self.num_classes not in (None, max(given.numel(), 1)):
            raise CalibrationError(f"its target has {given.numel()} numbers, others have {self.num_classes}")
        return given

    def knowing(self, targets: Tensor) -> TargetReader:
        """The same, that refuses what does not fit all the targets of train."""
        if self.task == "none":
            return self
        return TargetReader(self.task, targets.shape[1] if targets.ndim == 2 else 1, targets.ndim == 1)


def checked_label(value: Any) -> int:
    """A label as an integer from 0."""
    if isinstance(value, Tensor | np.generic | np.ndarray):
        value = value.tolist()
    if not isinstance(value, int) or value < 0:
        raise CalibrationError(
            f"labels must be integers from 0; found {value!r} ({type(value).__name__}). Turn probabilities or names "
            f"into class numbers first (target_transform)"
        )
    return int(value)


def stacked(values: list[TargetValue]) -> Tensor:
    """Targets of one kind as one tensor: int64 (images,) or (images x labels), float32 (images,) or (images x n)."""
    if isinstance(values[0], int):
        return torch.tensor(values)
    return torch.stack(cast("list[Tensor]", values))
