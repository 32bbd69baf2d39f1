from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.heads.targets import Task, comparable_columns, count_of, target_columns, task_of

CLASSES = torch.tensor([0, 2, 1, 2])
LABELS = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1]])
NUMBERS = torch.tensor([[1.0, 300.0], [2.0, 100.0], [3.0, 500.0], [6.0, 300.0]])


@pytest.mark.parametrize(
    ("targets", "task", "count"),
    [
        (CLASSES, "multiclass", 3),
        (CLASSES.to(torch.uint8), "multiclass", 3),
        (LABELS, "multilabel", 3),
        (LABELS.bool(), "multilabel", 3),
        (NUMBERS, "regression", 2),
        (NUMBERS[:, 0].half(), "regression", 1),
    ],
)
def test_dtype_and_shape_say_what_targets_are(targets: Tensor, task: str, count: int) -> None:
    assert task_of(targets) == task
    assert count_of(targets) == count


def test_columns_are_one_hot_classes_labels_and_numbers_as_they_are() -> None:
    one_hot = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0]]).double()
    assert torch.equal(target_columns(CLASSES, task="multiclass", num_classes=4), one_hot)
    assert torch.equal(target_columns(LABELS.bool(), task="multilabel", num_classes=3), LABELS.double())
    assert torch.equal(target_columns(NUMBERS, task="regression", num_classes=2), NUMBERS.double())
    assert torch.equal(target_columns(NUMBERS[:, 0], task="regression", num_classes=1), NUMBERS[:, :1].double())


def test_numbers_are_compared_in_units_of_their_own_deviation() -> None:
    found = comparable_columns(NUMBERS, num_classes=None)
    torch.testing.assert_close(found.mean(0), torch.zeros(2).double())
    torch.testing.assert_close(found.std(0, correction=0), torch.ones(2).double())
    torch.testing.assert_close(comparable_columns(NUMBERS * torch.tensor([5, 0.1]) - 3, num_classes=2), found)
    assert torch.equal(comparable_columns(LABELS, num_classes=3), LABELS.double())


@pytest.mark.parametrize(
    ("targets", "task", "words"),
    [
        (LABELS, "multilabel", r"Targets must be 2 labels, 0 or 1, for each row \(num_classes=2.*shape \(4, 3\)"),
        (CLASSES, "multilabel", r"Targets must be 2 labels.*found torch.int64 of shape \(4,\)"),
        (LABELS[:, :2] * 2, "multilabel", "Labels must be 0 or 1, one column for each label"),
        (LABELS[[1, 1], :2], "multilabel", "all 2 rows have the same labels"),
        (LABELS[:0, :2], "multilabel", "needs labelled rows to be fitted; found none"),
        (NUMBERS[:, 0], "regression", r"Targets must be 2 numbers, for each row \(num_classes=2.*shape \(4,\)"),
        (NUMBERS.where(NUMBERS < 400, torch.inf), "regression", "1 of 4 rows have NaN or infinity"),
        (NUMBERS * torch.tensor([1, 0]), "regression", r"over 4 rows those of the columns \[1\] do not"),
        (NUMBERS, "multiclass", "Targets must be class indices"),
    ],
)
def test_targets_that_say_nothing_or_something_else_are_refused(targets: Tensor, task: Task, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        target_columns(targets, task=task, num_classes=2)
