from __future__ import annotations

import random
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.data import Pairs, drawn, loader_of, numbered, write_folder
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.errors import CalibrationError

AUGMENT = transforms.Compose(
    [transforms.RandomResizedCrop(8), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)
PLAIN = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
PARTS = ("calibration", "train", "selection", "test")


class Files(Dataset):
    """Images of a list of files, as people write it themselves."""

    def __init__(self, root: Path, transform: Any = None) -> None:
        self.image_paths = sorted(root.rglob("*.png"))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.open(self.image_paths[index]).convert("RGB")
        return self.transform(image) if self.transform else image, int(self.image_paths[index].parent.name == "dog")


class Transformed(Dataset):
    """A transform around any dataset."""

    def __init__(self, subset: Dataset, transform: Any) -> None:
        self.subset, self.transform = subset, transform

    def __len__(self) -> int:
        return len(self.subset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.subset[index]
        return self.transform(image), label


class HardCoded(Transformed):
    """Flips that no attribute tells of."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.subset[index]
        image = transforms.functional.to_tensor(image.resize((8, 8)))
        return image.flip(2) if random.random() < 0.5 else image, label


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path / "all", {"cat": 20, "dog": 20}, size=(9, 8))
    return tmp_path / "all"


def check_refused(train: Any, val: Any, words: str) -> None:
    module = CalibrationDataModule(train, val, calibration_samples=4, image_size=8)
    with pytest.raises(CalibrationError, match=words):
        module.setup()


def test_the_same_folder_opened_twice_is_found_whatever_the_transforms(root: Path) -> None:
    augmented, plain = ImageFolder(str(root), AUGMENT), ImageFolder(str(root), PLAIN)
    check_refused(
        augmented, plain, r"train and val share 40 images; .*0\.png\) is image 0 of val \(.*0\.png\).* and 35 more"
    )
    check_refused(Files(root, AUGMENT), plain, "train and val share 40 images")
    check_refused(Subset(augmented, range(10, 40)), Subset(Files(root, PLAIN), [39, 3]), "train and val share 1 images")


def test_copies_and_links_of_files_are_found(root: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).mkdir(parents=True)
        (tmp_path / "copied" / name).mkdir(parents=True)
        (tmp_path / "linked" / name / "a.png").symlink_to(root / name / "3.png")
        shutil.copy(root / name / "5.png", tmp_path / "copied" / name / "b.png")
    (tmp_path / "whole").symlink_to(root, target_is_directory=True)
    for other, count in (("linked", 2), ("copied", 2), ("whole", 40)):
        check_refused(ImageFolder(str(root), PLAIN), ImageFolder(str(tmp_path / other), PLAIN), f"share {count} images")


def test_files_of_one_size_that_differ_are_different_images(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("val", 100)):
        for number in range(20):
            pixels = np.zeros((80, 80, 3), np.uint8)
            pixels[0, 0] = first + number
            (tmp_path / name / str(number % 2)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / name / str(number % 2) / f"{number}.bmp")
    module = CalibrationDataModule(image_folder=str(tmp_path), calibration_samples=4)
    assert module.summary == {"calibration": 4, "train": 13, "selection": 20, "test": 3}


def test_images_in_memory_are_compared_by_their_values() -> None:
    images = torch.rand(60, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    images = (images * 255).round() / 255
    arrays = Pairs(list((images * 255).byte().permute(0, 2, 3, 1).numpy()), [0, 1] * 30)
    pictures = Pairs([Image.fromarray(array) for array in arrays.images], [0, 1] * 30)
    train = TensorDataset(images, torch.arange(60) % 2)
    for val in (TensorDataset(images[50:].clone(), torch.arange(10) % 2), Subset(arrays, range(50, 60))):
        check_refused(train, val, "train and val share 10 images; .*image 50 of train is image 0 of val")
    check_refused(arrays, Subset(pictures, [59]), "train and val share 1 images; .*image 59 of train is image 0 of val")
    check_refused(ConcatDataset([numbered(30), numbered(30, first=50)]), numbered(10, first=75), "share 5 images")


@pytest.mark.parametrize("kind", [Transformed, HardCoded])
def test_the_same_images_behind_a_transform_wrapper_are_found(kind: Any, root: Path) -> None:
    bare = ImageFolder(str(root))
    with pytest.warns(UserWarning, match=r"gives the same image otherwise") if kind is HardCoded else nullcontext():
        val = kind(Subset(ImageFolder(str(root)), range(25, 40)), PLAIN)
        check_refused(kind(Subset(bare, range(30)), AUGMENT), val, "train and val share 5 images")


def test_the_usual_form_of_an_augmented_and_a_plain_object_of_one_folder_is_taken(root: Path) -> None:
    augmented, plain = ImageFolder(str(root), AUGMENT), ImageFolder(str(root), PLAIN)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    module = CalibrationDataModule(Subset(augmented, order[:30]), Subset(plain, order[30:]), calibration_samples=6)
    assert module.summary == {"calibration": 6, "train": 19, "selection": 10, "test": 5}


def test_copies_within_train_come_into_no_two_sets() -> None:
    images = torch.cat([numbered(40).tensors[0]] * 2)
    pool = TensorDataset(images, torch.arange(80) % 2)
    for doubled in (pool, ConcatDataset([numbered(40), numbered(40)])):
        module = CalibrationDataModule(doubled, calibration_samples=8)
        with pytest.warns(
            UserWarning, match="40 of the 80 images of train are copies of others and are left out.*: 40, 41"
        ):
            module.setup()
        indices = [index for part in PARTS for index in drawn(module, part)[0]]
        assert sorted(indices) == list(range(40))


def test_copies_within_an_explicit_set_are_kept() -> None:
    test = ConcatDataset([numbered(5, first=100)] * 2)
    module = CalibrationDataModule(numbered(40), test=test, calibration_samples=8)
    assert module.summary["test"] == 10


def test_images_without_labels_are_compared_too() -> None:
    train = TensorDataset(numbered(40).tensors[0])
    check = CalibrationDataModule(train, test=TensorDataset(numbered(9).tensors[0]), calibration_samples=4, task="none")
    with pytest.raises(CalibrationError, match="train and test share 9 images"):
        check.setup()
    assert len(list(loader_of(CalibrationDataModule(train, calibration_samples=4, task="none"), "train"))) == 1
