from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from doubles.data import Pairs, drawn, loader_of, numbered, write_folder
from torch.utils.data import Dataset, TensorDataset

from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.data.labels import mark_stratified
from lightning_stitch.errors import CalibrationError

PARTS = ("calibration", "train", "selection", "test")
IMAGES = numbered(80).tensors[0]
LABELS = (torch.rand(80, 3, generator=torch.Generator().manual_seed(0)) < 0.4).long()
NUMBERS = torch.randn(80, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("task", "targets", "count"),
    [
        ("multilabel", LABELS, 3),
        ("regression", NUMBERS, 2),
        ("regression", NUMBERS[:, 0], 1),
        ("regression", NUMBERS[:, :1], 1),
        ("regression", NUMBERS[:, 0].double(), 1),
        ("regression", (NUMBERS[:, 0] * 10).long(), 1),
    ],
)
def test_every_image_keeps_its_own_targets(task: Any, targets: torch.Tensor, count: int) -> None:
    module = CalibrationDataModule(TensorDataset(IMAGES, targets), calibration_samples=8, task=task)
    found = [drawn(module, part) for part in PARTS]
    assert sorted(itertools.chain(*(indices for indices, _ in found))) == list(range(80))
    for indices, given in found:
        assert given.dtype == (torch.int64 if task == "multilabel" else torch.float32)
        assert torch.equal(given, targets[indices].to(given.dtype))
    assert (module.task, module.num_classes, module.class_names) == (task, count, None)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_targets_of_items_may_be_lists_arrays_and_tensors(kind: Any) -> None:
    for task, targets in (("multilabel", LABELS), ("regression", NUMBERS)):
        pool = Pairs(list(IMAGES), [kind(row) for row in targets.tolist()])
        module = CalibrationDataModule(pool, calibration_samples=8, task=task)
        indices, given = drawn(module, "train")
        torch.testing.assert_close(given, targets[indices])
    singles = Pairs(list(IMAGES), NUMBERS[:, 0].tolist())
    assert drawn(CalibrationDataModule(singles, calibration_samples=8, task="regression"), "test")[1].ndim == 1


def test_draws_without_classes_do_not_look_at_the_targets() -> None:
    pools = [TensorDataset(IMAGES, LABELS), TensorDataset(IMAGES, 1 - LABELS), TensorDataset(IMAGES, NUMBERS)]
    modules = [
        CalibrationDataModule(
            pool,
            test=numbered(30, labels=kept, first=100),
            calibration_samples=8,
            train_samples=20,
            test_samples=10,
            task=task,
        )
        for pool, kept, task in (
            (pools[0], LABELS[:30], "multilabel"),
            (pools[1], LABELS[30:60], "multilabel"),
            (pools[2], NUMBERS[:30], "regression"),
        )
    ]
    for part in PARTS:
        one, *others = [drawn(module, part)[0] for module in modules]
        assert all(other == one for other in others)
    assert modules[0].summary == {"calibration": 8, "train": 20, "selection": 14, "test": 10}


class Bare(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return IMAGES[index]


def test_without_targets_batches_are_images_alone(tmp_path: Any) -> None:
    for pool in (Bare(), TensorDataset(IMAGES[:40]), Pairs(list(IMAGES[:40]), ["?"] * 40)):
        module = CalibrationDataModule(pool, calibration_samples=8, task="none")
        seen = torch.cat([batch for part in PARTS for batch in loader_of(module, part)])
        assert sorted((seen[:, 0, 0, 0] * 1000).round().long().tolist()) == list(range(40))
        assert (module.num_classes, module.class_names) == (0, None)
    folder = write_folder(tmp_path, {"a": 9, "b": 9})
    module = CalibrationDataModule(image_folder=folder, calibration_samples=4, task="none")
    assert isinstance(next(iter(module.train_dataloader())), torch.Tensor)


@pytest.mark.parametrize(
    ("task", "targets", "words"),
    [
        (
            "multilabel",
            [1, 0] * 40,
            "Image 0 of train: labels must be a vector of 0 and 1, one for each label; found 1",
        ),
        (
            "multilabel",
            [[0, 1]] * 79 + [[0, 2]],
            r"Image 79 of train: labels must be .*found \[0, 2\].*target_transform",
        ),
        ("multilabel", [[0, 1]] * 79 + [[0]], r"Image 79 of train: its target is of shape \(1,\), that of others is"),
        ("multilabel", ["cat"] * 80, "targets for task='multilabel' are numbers; found 'cat'"),
        ("multilabel", [[0, 1], [1, 1]] * 40, r"same in the columns \[1\] \(those start with 1\)"),
        ("multilabel", [[0, 1], [0, 1, 1]] * 40, "Image [0-9]+ of train: its target is of shape"),
        ("regression", [0.5, float("nan")] * 40, "Image [0-9]+ of train: targets must be finite; found nan"),
        ("regression", [[[0.5]], [[0.6]]] * 40, r"number or a vector of numbers was expected.*shape \(1, 1\)"),
        ("regression", [[0.5], [0.6, 1.0]] * 40, "its target is of shape"),
        ("regression", [None] * 80, "are numbers; found None"),
        ("regression", [[0.5, "x"]] * 80, "was expected|are numbers"),
        ("regression", [3.0] * 80, r"The targets of all 80 images of train are the same in the columns \[0\]"),
    ],
)
def test_targets_that_cannot_be_used_are_named(task: Any, targets: list[Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        CalibrationDataModule(Pairs(list(IMAGES), targets), calibration_samples=4, task=task).setup()


@pytest.mark.parametrize(
    ("task", "train", "test", "words"),
    [
        ("multilabel", LABELS, LABELS[:20, :2], "Image 0 of test: its target has 2 numbers, others have 3"),
        ("regression", NUMBERS, NUMBERS[:20, :1], "Image 0 of test: its target has 1 numbers, others have 2"),
        ("regression", NUMBERS[:, 0], NUMBERS[:20, :1], "some targets are single numbers and others vectors"),
    ],
)
def test_test_images_with_targets_of_another_length_are_named(
    task: Any, train: torch.Tensor, test: torch.Tensor, words: str
) -> None:
    other = TensorDataset(IMAGES[:20].clone(), test)
    module = CalibrationDataModule(TensorDataset(IMAGES, train), test=other, calibration_samples=4, task=task)
    with pytest.raises(CalibrationError, match=words):
        drawn(module, "test")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"train": Bare(), "task": "tagging"},
            r"task must be one of \['multiclass', 'multilabel', 'regression', 'none'",
        ),
        ({"image_folder": "x", "task": "regression"}, "image_folder= knows classes alone; for task='regression' pass"),
    ],
)
def test_tasks_that_cannot_be_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        CalibrationDataModule(**options)


def test_fewer_images_than_classes_are_of_classes_at_random_by_seed() -> None:
    labels = torch.arange(26).repeat_interleave(4)
    drawn = []
    for seed in range(40):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        chosen = labels[order][mark_stratified(labels[order], 5, leave=0)]
        assert len(chosen.unique()) == len(chosen) == 5
        drawn.append(chosen)
    counts = torch.bincount(torch.cat(drawn), minlength=26)  # 7.7 on average
    assert int(counts.min()) >= 1
    assert int(counts.max()) <= 20
    assert torch.equal(mark_stratified(labels, 5, leave=0), mark_stratified(labels, 5, leave=0))


def test_every_class_has_an_image_where_there_are_enough() -> None:
    labels = torch.tensor([0] * 50 + [4] * 3 + [9] * 2)
    chosen = labels[mark_stratified(labels, 11, leave=1)]
    assert torch.bincount(chosen, minlength=10)[[0, 4, 9]].tolist() == [9, 1, 1]
