"""The tasks of healing.py: sources, a head's labels, and images to calibrate on, select by and test on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from ranking_tasks import Batches, Task, handwritten_digits
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, resize

from lightning_stitch import CalibrationDataModule, load_sources

# Photographs that the wheels of scikit-image and scikit-learn carry. No crop of one is both calibrated and tested on.
CALIBRATED_ON = ("skimage/astronaut.png", "skimage/coffee.png", "skimage/motorcycle_left.png", "sklearn/china.jpg")
TESTED_ON = ("skimage/chelsea.png", "skimage/rocket.jpg", "sklearn/flower.jpg")


def solar_cells(folder: Path, *, count: int, seed: int, image_size: int, test_images: int) -> Task:
    """ELPV's solar cells and three EfficientNet-Lites; the seed draws all images."""
    data = CalibrationDataModule(
        image_folder=str(folder / "images"),
        image_size=image_size,
        calibration_samples=count,
        selection_samples=64,
        train_samples=384,
        test_samples=test_images,
        seed=seed,
    )
    loaders = (data.calibration_dataloader, data.selection_dataloader, data.head_dataloader, data.test_dataloader)
    return Task(f"ELPV at {image_size} pixels", lites(folder), *(list(load()) for load in loaders), data.num_classes)


def digits(*, count: int, seed: int) -> Task:
    """scikit-learn's digits and six small networks trained on others; the seed draws calibration and head."""
    task = handwritten_digits(other_questions=False)
    order = torch.randperm(len(task.selection) * 64 + 160, generator=torch.Generator().manual_seed(seed))
    sets = [*task.calibration, *task.selection, *task.head]
    x, y = (torch.cat([batch[place] for batch in sets])[order] for place in (0, 1))
    first, second, third = count, count + 64, count + 64 + 96

    def part(begin: int, end: int) -> Batches:
        return list(zip(x[begin:end].split(64), y[begin:end].split(64), strict=True))

    parts = part(0, first), part(first, second), part(second, third)
    return Task("digits, six small networks", task.sources, *parts, task.test, task.num_classes)


def photographs(folder: Path, *, count: int, seed: int, image_size: int, test_images: int) -> tuple[Task, list[str]]:
    """Crops of photographs and three EfficientNet-Lites with their 1000 classes; also each crop's photograph."""
    generator = random.Random(seed)
    names = [CALIBRATED_ON[i % len(CALIBRATED_ON)] for i in range(count)]
    calibration = [crop(name, image_size, generator) for name in names]
    selection = [crop(generator.choice(CALIBRATED_ON), image_size, generator) for _ in range(64)]
    test = [crop(TESTED_ON[i % len(TESTED_ON)], image_size, generator) for i in range(test_images)]
    images = [batches(calibration), batches(selection), [], batches(test)]
    return Task(f"photographs at {image_size} pixels", lites(folder), *images, 1000), names


def lites(folder: Path) -> list:
    """The sources as the example prepared them."""
    return load_sources([f"local-dir:{folder}/efficientnet_lite{k}" for k in range(3)])


def batches(images: Sequence[Tensor]) -> Batches:
    """With labels that say nothing."""
    return [(part, torch.zeros(len(part), dtype=torch.long)) for part in torch.stack(list(images)).split(64)]


def crop(name: str, size: int, generator: random.Random) -> Tensor:
    """A random square of a photograph, of a third of its shorter side to all of it."""
    package, _, file = name.partition("/")
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    home = Path(spec.submodule_search_locations[0])
    image = pil_to_tensor(
        Image.open(home / ("data" if package == "skimage" else "datasets/images") / file).convert("RGB")
    )
    side = generator.randint(min(image.shape[1:]) // 3, min(image.shape[1:]))
    top, left = (generator.randint(0, length - side) for length in image.shape[1:])
    return resize(image[:, top : top + side, left : left + side] / 255, [size, size], antialias=True).clamp(0, 1)
