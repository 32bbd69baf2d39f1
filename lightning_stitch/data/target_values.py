"""Targets as datasets give them, one for each image, checked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_stitch.data.origins import find_origins
from lightning_stitch.errors import CalibrationError
from lightning_stitch.heads import Task

DataTask = Task | Literal["none"]
_MOST_CLASSES = 50_000  # more are identifiers of images rather than classes, of which each would take a column
Label = int | str
TargetValue = Label | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TargetReader:
    """Turns the target of an image, as a dataset gives it, into an integer or a vector of a fixed length.

    A class may come as an integer, as a whole float, a name, or a one-hot vector, in Python, NumPy or torch.

    Attributes:
        task: What targets are: classes become integers, labels int64 vectors of 0 and 1, numbers float32 vectors, or
            single float32 numbers where a dataset gives such; "none": there are none.
        num_classes: How many classes, labels or numbers there are; None: not known yet.
        scalar: Whether numbers come singly; None: not known yet.
        names: Name of each label that the dataset gives, in its own order; None: it does not tell.
        class_numbers: Number of each class of train by its name; None: they have none.
    """

    task: DataTask
    num_classes: int | None = None
    scalar: bool | None = None
    names: Sequence[str] | None = None
    class_numbers: Mapping[str, int] | None = None

    def __call__(self, value: Any) -> TargetValue:
        """Check a target and bring it into its form; a CalibrationError does not name the image yet."""
        if self.task == "multiclass":
            return self._read_class(value)
        try:
            values = torch.as_tensor(np.asarray(value.tolist() if hasattr(value, "tolist") else value))
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"targets for task={self.task!r} are numbers; found {value!r}") from error
        return self._read_labels(values) if self.task == "multilabel" else self._read_numbers(values)

    def _read_class(self, value: Any) -> Label:
        label = read_label(value)
        if self.names is not None and not isinstance(label, str):
            if label >= len(self.names):
                raise CalibrationError(f"it has label {label}, but its dataset names {len(self.names)} classes")
            label = self.names[label]
        if isinstance(label, str) and self.class_numbers is not None:
            if label not in self.class_numbers:
                known = list(self.class_numbers)
                rest = f" and {len(known) - 10} more" if len(known) > 10 else ""
                raise CalibrationError(
                    f"its class is {label!r}, which train does not have: that has {known[:10]}{rest}"
                )
            return self.class_numbers[label]
        if self.num_classes is None:
            return label
        if isinstance(label, str):
            raise CalibrationError(f"its label is the name {label!r}, but the labels of train are numbers")
        if label >= self.num_classes:
            raise CalibrationError(f"it has label {label}, but the labels of train go from 0 to {self.num_classes - 1}")
        return label

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


def read_label(value: Any) -> Label:
    """The class of one image: an integer from 0, or a name; a CalibrationError where it is none."""
    label = value.tolist() if hasattr(value, "tolist") else value
    while isinstance(label, list | tuple) and len(label) == 1:
        label = label[0]
    if isinstance(label, list | tuple) and all(isinstance(entry, int | float) for entry in label):
        if sorted(label) == [0] * (len(label) - 1) + [1]:
            return label.index(1)
        raise CalibrationError(
            f"a vector as a label must be one-hot, a single 1 among 0s; found {list(label)!r}. Several labels for an "
            f"image are task='multilabel'; of probabilities give the largest's index (target_transform)"
        )
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, str):
        return label
    if not isinstance(label, int) or label < 0:
        raise CalibrationError(
            f"labels must be integers from 0, names, or one-hot vectors; found {label!r} ({type(label).__name__}). "
            f"Turn them into class numbers first (target_transform); numbers to predict are task='regression'"
        )
    return int(label)


def read_labels(labels: Any) -> list[Label]:
    """The classes of several images, as `read_label` for each; integers may be any.

    Raises:
        CalibrationError: If they are a mapping, or one is no class; the message names it by its place.
    """
    if isinstance(labels, Mapping):
        raise CalibrationError("Labels are a sequence, in the order of the images; found a mapping.")
    values = labels.to_numpy() if hasattr(labels, "to_numpy") else labels
    classes: list[Label] = []
    for place, value in enumerate(values.tolist() if hasattr(values, "tolist") else values):
        try:
            classes.append(value if type(value) is int else read_label(value))
        except CalibrationError as error:
            raise CalibrationError(f"The label of image {place}: {error}.") from error
    return classes


def check_batch_labels(batches: Iterable[Any], num_classes: int | None) -> Iterator[Any]:
    """The same batches, unless one has labels that are no tensor or class numbers that are too large to be such.

    Raises:
        CalibrationError: At the first such batch.
    """
    most = num_classes or _MOST_CLASSES
    for batch in batches:
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else torch.zeros(0)
        if not isinstance(labels, Tensor | np.ndarray):
            first = labels[0] if isinstance(labels, list | tuple) and labels else labels
            raise CalibrationError(
                f"The labels of a batch are a tensor of class numbers; found {type(labels).__name__} ({first!r}). "
                f"Number the classes in the dataset, or give it to CalibrationDataModule, which numbers them by name."
            )
        values = torch.as_tensor(labels)
        if values.ndim == 1 and len(values) and not values.is_floating_point() and int(values.max()) >= most:
            raise CalibrationError(
                f"A batch has the label {int(values.max())}, but "
                f"{'there are' if num_classes else 'there can hardly be more than'} {most} classes. Number them from 0 "
                f"without gaps."
            )
        yield batch


@dataclass(frozen=True, slots=True, eq=False)
class TargetReaders:
    """Reads the targets of a dataset whose parts may number the same classes differently.

    Attributes:
        readers: One for each dataset at the bottom.
        which: For each item the place of its dataset among them.
    """

    readers: tuple[TargetReader, ...]
    which: Tensor

    @classmethod
    def alike(cls, reader: TargetReader, dataset: Any) -> TargetReaders:
        """The same reader for all of a dataset."""
        origins = find_origins(dataset)
        return cls((reader,) * len(origins.datasets), origins.which)

    def __call__(self, index: int, value: Any) -> TargetValue:
        """Check the target of an item and bring it into its form."""
        return self.readers[self.which[index]](value)
