"""Random transforms of the train set, and what is drawn of it for closed-form fits and evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.data import Loaders, loader_of, numbered
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.data.images import Decoder
from lightning_stitch.data.transforms import is_random, keep, leave_out_random

AUGMENT = v1.Compose([v1.RandomResizedCrop(12), v1.RandomHorizontalFlip(), v1.ColorJitter(0.3), v1.ToTensor()])
PLAIN = v1.Compose([v1.Resize((12, 12)), v1.ToTensor()])
PARTS = ("calibration", "train", "selection", "test")


class Wrapper(Dataset):
    """A transform around any dataset."""

    def __init__(self, data: Dataset, transform: Callable[[Any], Any] | None) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.data[index]
        return self.transform(image) if self.transform else image, label


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Noise of 16 x 16, which no flip and no crop leaves alike."""
    rng = np.random.default_rng(0)
    for index in range(48):
        path = tmp_path / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return tmp_path


def check_drawn_as(module: CalibrationDataModule, pool: Any, *, augmented: bool = True) -> None:
    """All sets give what the pool's items are, in the evaluation transform; training alone goes on augmenting."""
    decode = Decoder(3)
    for part in PARTS:
        drawn = loader_of(module, part).dataset
        for place in range(0, len(drawn), 5):
            index = int(drawn.indices[place])
            assert torch.equal(drawn[place][0], decode(pool[index][0])), part
            assert drawn[place][1] == pool[index][1]
    train = module.train_dataloader().dataset
    pairs = [(train[place][0], train[place][0]) for place in range(8)]
    assert any(not torch.equal(*pair) for pair in pairs) == augmented


SETS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "folders": lambda make, wrap: (make(AUGMENT), make(PLAIN)),
    "wrappers": lambda make, wrap: (wrap(make(None), AUGMENT), wrap(make(None), PLAIN)),
    "functions": lambda make, wrap: (wrap(make(None), flipped), wrap(make(None), plainly)),
    "joined": lambda make, wrap: (ConcatDataset([make(AUGMENT)]), ConcatDataset([make(PLAIN)])),
}


def plainly(image: Any) -> Tensor:
    return v1.functional.to_tensor(image)


def flipped(image: Any) -> Tensor:
    return plainly(image).flip(2) if random.random() < 0.5 else plainly(image)


@pytest.mark.parametrize("sets", SETS.values(), ids=SETS)
@pytest.mark.parametrize("entrance", ["val", "test", "datamodule"])
def test_the_evaluation_transform_of_a_set_of_the_same_kind_is_used(root: Path, sets: Any, entrance: str) -> None:
    augmented, plain = sets(lambda transform: ImageFolder(str(root), transform), Wrapper)
    train, rest = Subset(augmented, range(36)), Subset(plain, range(36, 48))
    if entrance == "datamodule":
        given: dict[str, Any] = {"datamodule": Loaders(DataLoader(train, shuffle=True), DataLoader(rest))}
    else:
        given = {"train": train, entrance: rest}
    module = CalibrationDataModule(**given, calibration_samples=8)
    train_like = {part: plain for part in PARTS}
    explicit = "test" if entrance == "test" else "selection"
    train_like[explicit] = Subset(plain, range(36, 48))
    decode = Decoder(3)
    for part, pool in train_like.items():
        drawn = loader_of(module, part).dataset
        for place in range(0, len(drawn), 3):
            assert torch.equal(drawn[place][0], decode(pool[int(drawn.indices[place])][0]))
    train_set = module.train_dataloader().dataset
    assert any(not torch.equal(train_set[place][0], train_set[place][0]) for place in range(8))


STEPS = {
    "flip": (v1.Compose([v1.RandomHorizontalFlip(), v1.ToTensor()]), v1.ToTensor()),
    "padded crop": (v1.Compose([v1.RandomCrop(16, padding=4), v1.ToTensor()]), v1.ToTensor()),
    "resized crop": (AUGMENT, v1.Compose([v1.Resize(14), v1.CenterCrop(12), v1.ToTensor()])),
    "v2": (
        v2.Compose(
            [v2.ToImage(), v2.RandomResizedCrop(12), v2.TrivialAugmentWide(), v2.ToDtype(torch.float32, scale=True)]
        ),
        v2.Compose([v2.ToImage(), v2.Resize(14), v2.CenterCrop(12), v2.ToDtype(torch.float32, scale=True)]),
    ),
    "nested": (
        v1.Compose([v1.Compose([v1.RandomApply([v1.ColorJitter(0.5)], p=0.9)]), v1.ToTensor(), v1.RandomErasing(p=1)]),
        v1.ToTensor(),
    ),
    "sequential": (
        v1.Compose([v1.ToTensor(), nn.Sequential(v1.RandomVerticalFlip(), v1.RandomRotation(40), v1.Resize(12))]),
        v1.Compose([v1.ToTensor(), v1.Resize(12)]),
    ),
    "alone": (v2.RandomHorizontalFlip(), keep),
}


@pytest.mark.parametrize(("augment", "plain"), STEPS.values(), ids=STEPS)
def test_without_such_a_set_random_steps_are_left_out(root: Path, augment: Any, plain: Any) -> None:
    assert is_random(augment)
    assert not is_random(leave_out_random(augment))
    module = CalibrationDataModule(ImageFolder(str(root), augment), calibration_samples=8)
    check_drawn_as(module, ImageFolder(str(root), plain))
    wrapped = Wrapper(Subset(ImageFolder(str(root)), range(48)), augment)
    check_drawn_as(CalibrationDataModule(wrapped, calibration_samples=8), ImageFolder(str(root), plain))


def test_sets_that_were_split_off_an_augmented_one_are_evaluated_without_chance(root: Path) -> None:
    augmented = ImageFolder(str(root), AUGMENT)
    sets = (Subset(augmented, range(30)), Subset(augmented, range(30, 40)), Subset(augmented, range(40, 48)))
    module = CalibrationDataModule(*sets, calibration_samples=8)
    for part in PARTS:
        first, second = (torch.cat([images for images, _ in loader_of(module, part)]) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("chance", [random.random, lambda: np.random.rand(), lambda: torch.rand(()).item()])
def test_chance_that_cannot_be_taken_out_is_warned_of_with_the_mend(root: Path, chance: Callable[[], float]) -> None:
    class HardCoded(Wrapper):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            image, label = self.data[index]
            return image.transpose(Image.Transpose.ROTATE_180) if chance() < 0.5 else image, label

    before = random.getstate(), torch.get_rng_state()
    module = CalibrationDataModule(HardCoded(ImageFolder(str(root)), None), calibration_samples=8)
    with pytest.warns(
        UserWarning, match=r"train \(HardCoded\) gives the same image otherwise each time.*`transform`.*val="
    ):
        module.setup()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    sized = v1.Compose(
        [v1.RandomChoice([v1.Resize(12), v1.Resize((12, 12))]), v1.RandomHorizontalFlip(), v1.ToTensor()]
    )
    with pytest.warns(UserWarning, match=r"train \(ImageFolder\) gives the same image otherwise"):
        CalibrationDataModule(ImageFolder(str(root), sized), calibration_samples=8).setup()


def test_datasets_without_chance_are_used_as_they_are(root: Path) -> None:
    plain = ImageFolder(str(root), v1.Compose([v1.GaussianBlur(3, 1.0), PLAIN]))
    module = CalibrationDataModule(plain, calibration_samples=8)
    assert module.calibration_dataloader().dataset.dataset is plain
    check_drawn_as(module, plain, augmented=False)
    tensors = numbered(40)
    module = CalibrationDataModule(tensors, calibration_samples=8)
    assert module.calibration_dataloader().dataset.dataset is tensors


def test_the_users_datasets_keep_their_transforms(root: Path) -> None:
    augmented = ImageFolder(str(root), AUGMENT)
    CalibrationDataModule(augmented, calibration_samples=8).setup()
    assert augmented.transform is AUGMENT
    assert augmented.transforms.transform is AUGMENT


def test_target_transforms_are_kept(root: Path) -> None:
    augmented = ImageFolder(str(root), AUGMENT, target_transform=lambda label: 1 - label)
    check_drawn_as(
        CalibrationDataModule(augmented, calibration_samples=8),
        ImageFolder(str(root), leave_out_random(AUGMENT), target_transform=lambda label: 1 - label),
    )
