from __future__ import annotations

import numpy as np
import pytest
import torch
from doubles.data import Normalising, Pairs, drawn, numbered, write_folder
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lightning_stitch._lightning import pl
from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.errors import CalibrationError

GOOD = [torch.zeros(3, 4, 4)] * 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of train=, image_folder= and datamodule=; found none"),
        ({"train": numbered(9), "image_folder": "x"}, "found train and image_folder"),
        ({"image_folder": "x", "val": numbered(9)}, "image_folder= brings its own"),
        ({"train": numbered(9), "calibration_samples": 3}, "calibration_samples is 3, .* at least 4"),
        ({"train": numbered(9), "test_samples": 1.5}, "test_samples is 1.5"),
        ({"train": numbered(9), "selection_samples": 0}, "selection_samples is 0"),
        ({"train": numbered(9), "mean": [0.5]}, "belong together"),
        ({"train": numbered(9), "mean": [0.5], "std": [0.0]}, "std above 0"),
    ],
)
def test_contradicting_arguments_are_refused_at_once(arguments, words):
    with pytest.raises(CalibrationError, match=words):
        CalibrationDataModule(**arguments)


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        ([torch.zeros(4, 4, 4)] * 20, [0, 1] * 10, "Image 0 of train: the image has 4 channels"),
        ([np.zeros((3, 8, 8), np.uint8)] * 20, [0, 1] * 10, "8 channels .*numpy arrays as H x W x C"),
        ([torch.full((3, 4, 4), float("nan"))] * 20, [0, 1] * 10, "NaN"),
        ([torch.full((3, 4, 4), float("inf"))] * 20, [0, 1] * 10, "NaN or infinite"),
        ([torch.full((3, 4, 4), -1.5)] * 20, [0, 1] * 10, "give its mean= and std="),
        ([torch.full((3, 4, 4), 200.0)] * 20, [0, 1] * 10, "divide them"),
        ([torch.ones(3, 4, 4, dtype=torch.int64)] * 20, [0, 1] * 10, "found torch.int64"),
        ([torch.zeros(4)] * 20, [0, 1] * 10, r"found shape \(4,\)"),
        (["a.png"] * 20, [0, 1] * 10, "found str"),
        (GOOD[:-1] + [torch.zeros(3, 4, 5)] * 5, [0, 1] * 12, r"\(3, 4, 5\), others are \(3, 4, 4\).*image_size="),
        (GOOD, [0.0, 0.33] * 10, "found 0.33 .float.*target_transform"),
        (GOOD, [b"cat", b"dog"] * 10, "found b'cat'"),
        (GOOD, [torch.tensor([1, 1])] * 20, "one-hot.*task='multilabel'"),
        (GOOD, [[0.5, 0.5]] * 20, "one-hot.*probabilities"),
        (GOOD, [-1, 1] * 10, "found -1"),
        (GOOD, [3] * 20, "All 20 images of train have one label, 3"),
        (GOOD, [3, 5] * 10, r"6 classes, but train has labels of only 2: \[3, 5\]"),
        ([], [], "holds no images"),
    ],
)
def test_images_and_labels_that_cannot_be_used_are_named(images, labels, words):
    with pytest.raises(CalibrationError, match=words):
        CalibrationDataModule(Pairs(images, labels), calibration_samples=4).setup()


def test_bad_stored_labels_are_named_with_their_index():
    pool = TensorDataset(torch.zeros(20, 1, 2, 2), torch.tensor([0, 1] * 9 + [0, -1]))
    with pytest.raises(CalibrationError, match=r"Image 19 of train: labels must be integers from 0, .*found -1"):
        CalibrationDataModule(pool, calibration_samples=4).setup()


def test_uint8_images_with_a_mean_are_refused():
    pool = Pairs([np.zeros((4, 4, 3), np.uint8)] * 20, [0, 1] * 10)
    with pytest.raises(CalibrationError, match=r"undo a normalisation, but torch.uint8"):
        CalibrationDataModule(pool, calibration_samples=4, mean=[0.5], std=[0.5]).setup()


def test_too_few_images_names_every_number():
    words = r"32 calibration \+ 10 test \+ 11 selection \+ 2 train images make 55, but train holds 50"
    with pytest.raises(CalibrationError, match=words):
        CalibrationDataModule(numbered(50), test_samples=10, selection_samples=11).setup()


def test_too_large_a_draw_from_an_explicit_set_is_refused():
    module = CalibrationDataModule(numbered(50), val=numbered(5, first=50), selection_samples=6)
    with pytest.raises(CalibrationError, match="selection_samples is 6, but the selection set given holds 5"):
        module.setup()


def test_a_class_that_calibration_used_up_is_named():
    balanced = CalibrationDataModule(numbered(40), calibration_samples=32)
    rare = drawn(balanced, "calibration")[0][0]
    module = CalibrationDataModule(numbered(40, labels=[int(i == rare) for i in range(40)]), calibration_samples=32)
    with pytest.raises(CalibrationError, match=r"no image of the classes \[1\], of which there are \[1\]"):
        module.setup()


def test_a_nan_image_later_on_is_reported_with_its_index():
    pool = numbered(60)
    pool.tensors[0][41, 0, 2, 2] = float("nan")
    module = CalibrationDataModule(pool, calibration_samples=10)
    with pytest.raises(CalibrationError, match=r"Image 41 of train: images must .* NaN or infinite"):
        [drawn(module, part) for part in ("calibration", "train", "selection", "test")]


def test_a_label_that_train_does_not_know_is_reported():
    module = CalibrationDataModule(numbered(60), test=numbered(20, 4, first=60), calibration_samples=10)
    with pytest.raises(CalibrationError, match=r"Image 2 of test: it has label 2, but the labels of train .* 0 to 1"):
        drawn(module, "test")


def test_the_same_images_under_two_names_are_refused():
    pool = numbered(60)
    with pytest.raises(CalibrationError, match="train and val share 60 images"):
        CalibrationDataModule(pool, pool).setup()
    overlapping = CalibrationDataModule(Subset(pool, range(40)), test=Subset(pool, range(35, 60)))
    with pytest.raises(CalibrationError, match="train and test share 5 images"):
        overlapping.setup()
    disjoint = CalibrationDataModule(Subset(pool, range(40)), test=Subset(pool, range(40, 60)), calibration_samples=4)
    assert disjoint.summary["test"] == 20


def test_an_iterable_dataset_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(CalibrationError, match="train is a Stream, which cannot be split"):
        CalibrationDataModule(Stream()).setup()


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({}, "does not exist"),
        ({".": 3}, "one folder of images for each class; it holds 3 entries .*0.png"),
        ({"cat": 3, "dog": 0}, "'cat/', 'dog/'.*no valid file for the classes dog"),
        ({"val/cat": 3, "val/dog": 3}, r"class folders in \['val'\], but none in train"),
        (
            {"train/cat": 3, "train/dog": 3, "test/fox": 3},
            r"Image 0 of test \(.*its class is 'fox', which train does not have: that has \['cat', 'dog'\]",
        ),
        ({"cat": 9}, "one label, 'cat'"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(tmp_path, folders, words):
    write_folder(tmp_path / "images", folders)
    with pytest.raises(CalibrationError, match=words):
        CalibrationDataModule(image_folder=str(tmp_path / "images"), calibration_samples=4).setup()


def test_a_file_that_cannot_be_used_is_named(tmp_path):
    module = CalibrationDataModule(image_folder=write_folder(tmp_path, {"cat": 9, "dog": 9}), calibration_samples=4)
    write_folder(tmp_path, {"dog": 9}, size=(7, 7))
    with pytest.raises(CalibrationError, match=r"dog.*png\): it is \(3, 7, 7\), others are \(3, 5, 6\)"):
        module.setup()
    broken = tmp_path / "cat" / "0.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(CalibrationError, match=r"Image 0 of train \(.*0.png\): cannot identify image file"):
        module.setup()
    with pytest.raises(CalibrationError, match=r"0.png is not a folder"):
        CalibrationDataModule(image_folder=str(broken)).setup()


def test_a_datamodule_without_train_or_with_several_loaders_is_refused():
    class Several(Normalising):
        def train_dataloader(self):
            return [DataLoader(self.train), DataLoader(self.test)]

    with pytest.raises(CalibrationError, match=r"Several.train_dataloader\(\) should return one DataLoader"):
        CalibrationDataModule(datamodule=Several()).setup()
    with pytest.raises(CalibrationError, match="has no train_dataloader"):
        CalibrationDataModule(datamodule=pl.LightningDataModule()).setup()
