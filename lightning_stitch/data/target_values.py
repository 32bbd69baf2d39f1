"""Targets as datasets give them, one for each image, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

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
        """Check a target and bring it into its form; a CalibrationError does not name the image yet."""
        if self.task == "multiclass":
            return self._read_class(value)
        try:
            values = torch.as_tensor(np.asarray(value.tolist() if hasattr(value, "tolist") else value))
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"targets for task={self.task!r} are numbers; found {value!r}") from error
        return self._read_labels(values) if self.task == "multilabel" else self._read_numbers(values)

    def _read_class(self, value: Any) -> int:
        label = value.tolist() if isinstance(value, Tensor | np.generic | np.ndarray) else value
        if not isinstance(label, int) or label < 0:
            raise CalibrationError(
                f"labels must be integers from 0; found {label!r} ({type(label).__name__}). Turn probabilities or "
                f"names into class numbers first (target_transform)"
            )
        if self.num_classes is not None and label >= self.num_classes:
            raise CalibrationError(f"it has label {label}, but the labels of train go from 0 to {self.num_classes - 1}")
        return int(label)

    def _read_labels(self, values: Tensor) -> Tensor:
        if values.ndim != 1 or not ((values == 0) | (values == 1)).all():
            raise CalibrationError(
                f"labels must be a vector of 0 and 1, one for each label; found {values.tolist()!r}. Turn lists of the "
                f"labels that are there into such vectors first (target_transform)"
            )
        return self._check_length(values.long())

    def _read_numbers(self, values: Tensor) -> Tensor:
        if values.ndim > 1 or values.dtype == torch.bool or values.is_complex():
            raise CalibrationError(
                f"a number or a vector of numbers was expected; found {values.dtype} of shape {tuple(values.shape)}"
            )
        if not all(math.isfinite(number) for number in values.flatten().tolist()):
            raise CalibrationError(f"targets must be finite; found {values.tolist()!r}")
        if self.scalar is not None and (values.ndim == 0) != self.scalar:
            raise CalibrationError("some targets are single numbers and others vectors")
        return self._check_length(values.float())

    def _check_length(self, values: Tensor) -> Tensor:
        if self.num_classes not in (None, max(values.numel(), 1)):
            raise CalibrationError(f"its target has {values.numel()} numbers, others have {self.num_classes}")
        return values
