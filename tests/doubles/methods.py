"""Two small sources, digits and a search that tests of the comparison of methods share."""

from __future__ import annotations

from typing import Any

import torch
from doubles.small_sources import plain
from doubles.tensors import digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_stitch import CalibrationDataModule, FragmentSearch
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources.source import Source

QUIET = {"accelerator": "cpu"}


def spec_of(source: Source) -> dict[str, Any]:
    """A source as FragmentSearch takes a live one."""
    return {"spec": source.module, "name": source.name, "preprocessing": source.preprocessing}


def two_sources() -> list[Source]:
    return [plain("a", (6, 8, 10), seed=0, classes=3), plain("b", (4, 12, 12), seed=1, classes=3)]


def search_of(*sources: Source, **options: Any) -> FragmentSearch:
    return FragmentSearch([spec_of(source) for source in sources or two_sources()], max_candidates=4, **options)


def three_digits(**options: Any) -> CalibrationDataModule:
    """40 images to train with, 20 to choose by and 60 to report on."""
    sizes = {"calibration_samples": 12, "train_samples": 40, "selection_samples": 20, "test_samples": 60}
    return CalibrationDataModule(TensorDataset(*digits(300, 16, classes=3)), **{**sizes, **options})


class Half(nn.Module):
    """Sees the left half of an image, or the right."""

    def __init__(self, side: str) -> None:
        super().__init__()
        self.start = 0 if side == "left" else 8

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.start : self.start + 8]


def half_blind(side: str) -> dict[str, Any]:
    """A source that tells bright halves from dark ones, on one side."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()]
    generator = torch.Generator().manual_seed(0)
    for layer in layers[::2]:
        layer.weight.data.uniform_(0, 0.3, generator=generator)
        layer.bias.data.zero_()
    module = nn.Sequential(Half(side), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    preprocessing = Preprocessing((3, 16, 16), (0.0,) * 3, (1.0,) * 3, fixed_size=True)
    return {"spec": module, "name": side, "preprocessing": preprocessing}


def bright_halves(count: int, *, left: float, right: float, seed: int) -> TensorDataset:
    """Images of two classes: each half is brighter in class 1, by so much."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.4 + 0.1 * torch.rand(count, 3, 16, 16, generator=generator)
    level = 0.1 * torch.rand(2, count, 1, 1, 1, generator=generator)  # what hides a small difference
    images[..., :8] += level[0] + left * labels[:, None, None, None]
    images[..., 8:] += level[1] + right * labels[:, None, None, None]
    return TensorDataset(images, labels)


def row_of(
    method: str, *, accuracy: float = 0.8, flops: int = 10**12, labels: int = 32, **changes: Any
) -> dict[str, Any]:
    """A row of a comparison of methods."""
    interval = {f"{m}{end}": accuracy for m in ("accuracy", "auroc") for end in ("", "_low", "_high")}
    costs = {"seconds": 12.34, "cpu_seconds": 11.0, "params": 3_400_000, "macs": 125_400_000, "latency_ms": 5.5}
    row = {"method": method, "network": "resnet", **interval, **costs, "flops": flops, "labels": labels}
    return {**row, "over_budget": False, "verdict": None, **changes}
