"""Labels of classes as the items of a dataset give them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from doubles.data import Pairs, drawn, numbered
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_stitch.data import labels as labels_module
from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.data.labels import read_targets
from lightning_stitch.data.origins import find_origins
from lightning_stitch.data.target_values import TargetReader, TargetReaders
from lightning_stitch.errors import CalibrationError

IMAGES = list(numbered(60).tensors[0])
CLASSES = [0, 1, 2] * 20


class Table:
    """As a DataFrame: a length, names of columns, rows by `to_numpy`, none by a number."""

    def __init__(self, rows: Any) -> None:
        self.rows = np.array(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(["label"])

    def __getitem__(self, column: Any) -> Any:
        raise KeyError(column)

    def to_numpy(self) -> Any:
        return self.rows


class Unlucky(Dataset):
    """Pairs whose items are counted as they are drawn."""

    def __init__(self, answers: Any, **attributes: Any) -> None:
        self.pool, self.reads = Pairs(IMAGES, answers), 0
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.pool)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.pool[index]


def read(dataset: Any) -> list[Any]:
    return read_targets(dataset, "train", TargetReaders.alike(TargetReader("multiclass"), dataset), most=60)


@pytest.mark.parametrize(
    "labels",
    [
        CLASSES,
        [np.int64(label) for label in CLASSES],
        [np.uint8(label) for label in CLASSES],
        [torch.tensor(label) for label in CLASSES],
        [torch.tensor([label]) for label in CLASSES],
        [np.array([label]) for label in CLASSES],
        [float(label) for label in CLASSES],
        [np.float32(label) for label in CLASSES],
        list(torch.eye(3).repeat(20, 1)),
        list(np.eye(3, dtype=np.int64)[CLASSES]),
        [[int(label == column) for column in range(3)] for label in CLASSES],
    ],
)
def test_labels_of_any_kind_are_taken_for_what_they_are(labels: list[Any]) -> None:
    module = CalibrationDataModule(Pairs(IMAGES, labels), calibration_samples=6)
    indices, found = drawn(module, "train")
    assert found.tolist() == [CLASSES[index] for index in indices]
    assert (module.num_classes, module.class_names) == (3, None)


@pytest.mark.parametrize("attribute", ["targets", "labels"])
@pytest.mark.parametrize(
    ("stored", "reads"),
    [
        (CLASSES, 8),
        (np.array(CLASSES), 8),
        (torch.tensor(CLASSES), 8),
        ([torch.tensor(label) for label in CLASSES], 8),
        (dict(enumerate(CLASSES)), 8),
        (Table(CLASSES), 8),
        (Table([[label] for label in CLASSES]), 8),
        (Table(np.eye(3)[CLASSES]), 8),
        ({f"{index}.png": label for index, label in enumerate(CLASSES)}, 60),
        ([f"class {label}" for label in CLASSES], 61),
        ([2 - label for label in CLASSES], 61),
        ([0.5] * 60, 60),
        ([None] * 60, 60),
        (["name"] * 3, 60),
        (7, 60),
    ],
)
def test_stored_labels_are_a_shortcut_that_items_must_agree_with(attribute: str, stored: Any, reads: int) -> None:
    dataset = Unlucky(CLASSES, **{attribute: stored})
    assert read(dataset) == CLASSES
    assert dataset.reads == reads


def test_a_stored_list_that_only_some_items_agree_with_is_not_used() -> None:
    dataset = Unlucky(CLASSES, targets=[*CLASSES[:37], 1, *CLASSES[38:]])
    assert read(dataset)[:30] == CLASSES[:30]  # one wrong label escapes eight probes
    dataset = Unlucky(CLASSES, targets=[*CLASSES[:30], *CLASSES[31:], 0])
    assert read(dataset) == CLASSES


def test_joined_and_chosen_datasets_are_taken_apart_instead_of_decoded() -> None:
    parts = [Unlucky(CLASSES, targets=CLASSES), Unlucky(CLASSES[::-1], targets=CLASSES[::-1])]
    joined = Subset(ConcatDataset([Subset(parts[0], range(40)), parts[1], numbered(9, 3)]), range(5, 100))
    assert read(joined) == [*CLASSES[5:40], *CLASSES[::-1]]
    assert [part.reads for part in parts] == [8, 8]
    assert len(find_origins(joined).datasets) == 2


def test_a_wrapper_uses_what_the_wrapped_dataset_stores_if_it_agrees() -> None:
    class Wrapper(Dataset):
        def __init__(self, inner: Any, flip: bool = False) -> None:
            self.inner, self.flip = inner, flip

        def __len__(self) -> int:
            return len(self.inner)

        def __getitem__(self, index: int) -> Any:
            image, label = self.inner[index]
            return image, 2 - label if self.flip else label

    inner = Unlucky(CLASSES, targets=CLASSES)
    assert read(Wrapper(Subset(inner, range(30)))) == CLASSES[:30]
    assert inner.reads == 8
    assert read(Wrapper(inner, flip=True)) == [2 - label for label in CLASSES]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 1_000_000] * 20, "Image 2 of train: it has label 1000000, but 60 images cannot be of 1000001 classes"),
        ([10**12 + index for index in range(60)], "Image 0 of train: it has label 1000000000000"),
        ([1, 2, 3] * 20, r"go from 1 to 3, but classes are numbered from 0. Subtract 1 \(target_transform"),
        ([0, 2] * 30, r"3 classes, but train has labels of only 2: \[0, 2\]"),
        ([0.5, 1.0] * 30, "Image 0 of train: labels must be integers from 0, names, or one-hot .*found 0.5"),
        ([float("nan")] * 60, "found nan"),
        ([None, 1] * 30, r"found None \(NoneType\)"),
        ([{"label": 1}] * 60, "found {'label': 1}"),
        ([[1, 1, 0]] * 60, "one-hot, a single 1 among 0s; found .1, 1, 0.. Several labels .*multilabel"),
        ([[0.7, 0.3]] * 60, "of probabilities give the largest"),
        (["cat", 1] * 30, r"Some labels of train are names \(\['cat'\]\) and some are numbers \(\[1\]\)"),
        (["cat"] * 60, "All 60 images of train have one label, 'cat'"),
        ([-1, 1] * 30, "found -1"),
    ],
)
def test_labels_that_are_no_classes_are_refused_in_true_words(labels: list[Any], words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        CalibrationDataModule(Pairs(IMAGES, labels), calibration_samples=4).setup()


def test_identifiers_as_labels_are_refused_at_the_first() -> None:
    dataset = Unlucky([10**6 + index for index in range(60)])
    with pytest.raises(CalibrationError, match="Image 0 of train: it has label 1000000"):
        read(dataset)
    assert dataset.reads == 1


def test_a_class_of_which_train_has_no_image_is_named() -> None:
    pool = TensorDataset(torch.stack(IMAGES), torch.tensor([0, 2] * 30))
    pool.classes = ["apple", "bird", "cup"]  # type: ignore[attr-defined]
    with pytest.raises(CalibrationError, match=r"train has 3 classes, but no image of \['bird'\]"):
        CalibrationDataModule(pool, calibration_samples=4).setup()


def test_long_passes_show_how_far_they_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(labels_module, "_LONG", 10)
    assert read(Pairs(IMAGES, CLASSES)) == CLASSES
    shown = capsys.readouterr()
    assert "labels of" in shown.err
    assert "60/60" in shown.err
    assert shown.out == ""


def test_labels_of_the_test_set_are_tried_before_the_long_work() -> None:
    test = Pairs(list(numbered(20, first=100).tensors[0]), [0] * 10 + [3] * 10)
    pool = Pairs(IMAGES, CLASSES)
    with pytest.raises(
        CalibrationError, match="Image 10 of test: it has label 3, but the labels of train go from 0 to 2"
    ):
        CalibrationDataModule(pool, test=test, calibration_samples=4).setup()
