from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from doubles.data import Loaders, drawn, numbered
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.data.samplers import select_drawn
from lightning_stitch.errors import CalibrationError

PARTS = ("calibration", "train", "selection", "test")


class Balanced(Sampler):
    """Draws of its images, as many of each class as of the others, otherwise in each pass."""

    def __init__(self, indices: Any = None) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randint(0, 20, (12,)).tolist())

    def __len__(self) -> int:
        return 12


class Shuffled(Sampler):
    """The same images in each pass, in another order."""

    def __iter__(self) -> Iterator[Any]:
        return iter((torch.randperm(20) + 5).view(4, 5).tolist())

    def __len__(self) -> int:
        return 4


def weights(chosen: Any) -> torch.Tensor:
    return torch.tensor([float(index in chosen) for index in range(60)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": SubsetRandomSampler(range(5, 25))}, range(5, 25)),
        ({"sampler": SubsetRandomSampler(np.arange(5, 25))}, range(5, 25)),
        ({"sampler": SubsetRandomSampler(torch.arange(-20, 0))}, range(40, 60)),
        ({"sampler": WeightedRandomSampler(weights(range(7)), 100)}, range(7)),
        ({"sampler": WeightedRandomSampler(weights(range(7))[:9], 3, replacement=False)}, range(7)),
        ({"sampler": list(range(30, 40)) * 2}, range(30, 40)),
        ({"sampler": range(0, 60, 2)}, range(0, 60, 2)),
        ({"sampler": torch.arange(9)}, range(9)),
        ({"sampler": [np.int64(3), torch.tensor(4), 5]}, range(3, 6)),
        ({"sampler": RandomSampler(numbered(60), num_samples=5)}, range(60)),
        ({"sampler": RandomSampler(range(12), replacement=True)}, range(12)),
        ({"sampler": DistributedSampler(numbered(60), num_replicas=4, rank=1)}, range(60)),
        ({"sampler": Balanced(indices=list(range(20)))}, range(20)),
        ({"batch_sampler": BatchSampler(SubsetRandomSampler(range(11)), 4, drop_last=True)}, range(11)),
        ({"batch_sampler": BatchSampler(SequentialSampler(range(60)), 4, drop_last=False)}, range(60)),
        ({"batch_sampler": [[1, 2], [3], [2, 9]]}, (1, 2, 3, 9)),
        ({"batch_sampler": Shuffled()}, range(5, 25)),
        ({"batch_size": None, "sampler": range(8)}, range(8)),
        ({"shuffle": True}, range(60)),
    ],
)
def test_the_images_that_a_loader_draws_are_read_off_its_sampler(options: Any, expected: Any) -> None:
    pool = numbered(60)
    before = torch.get_rng_state()
    chosen = select_drawn(DataLoader(pool, **options), "train")
    assert torch.equal(torch.get_rng_state(), before)
    indices = chosen.indices if isinstance(chosen, Subset) else range(len(chosen))
    assert sorted(indices) == list(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": Balanced()}, "The Balanced of train draws other images in each pass .* give|Give .*Subset"),
        ({"sampler": Balanced(indices=[0, 1])}, "draws other images in each pass"),
        ({"sampler": [0, 60]}, "The sampler of train draws image 60, but its dataset holds 60"),
        ({"sampler": [{"index": 3}]}, "which is no index of an image"),
    ],
)
def test_a_sampler_that_does_not_tell_is_refused(options: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        select_drawn(DataLoader(numbered(60), **options), "train")


def split_by(make: Callable[[Any], dict[str, Any]], pools: Callable[[], Dataset]) -> CalibrationDataModule:
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    parts = order[:40], order[40:50], order[50:]
    return CalibrationDataModule(
        datamodule=Loaders(*(DataLoader(pools(), **make(part)) for part in parts)), calibration_samples=8
    )


@pytest.mark.parametrize("objects", ["one", "each its own"])
@pytest.mark.parametrize(
    "make",
    [
        lambda part: {"sampler": SubsetRandomSampler(part)},
        lambda part: {"sampler": WeightedRandomSampler(weights(part), len(part))},
        lambda part: {"batch_sampler": BatchSampler(SubsetRandomSampler(part), 7, drop_last=False)},
        lambda part: {"sampler": part},
    ],
)
def test_a_data_module_that_splits_by_samplers_gives_disjoint_sets(make: Any, objects: str) -> None:
    whole = numbered(60)
    module = split_by(make, (lambda: whole) if objects == "one" else (lambda: numbered(60)))
    assert module.summary == {"calibration": 8, "train": 32, "selection": 10, "test": 10}
    assert sorted(itertools.chain(*(drawn(module, part)[0] for part in PARTS))) == list(range(60))


@pytest.mark.parametrize(
    "pools",
    [
        lambda whole: (whole, whole),
        lambda whole: (whole, numbered(60)),
        lambda whole: (whole, Subset(Subset(whole, range(30)), range(5))),
        lambda whole: (ConcatDataset([numbered(20, first=500), whole]), Subset(whole, [3])),
    ],
)
def test_loaders_whose_samplers_do_not_keep_sets_apart_are_refused(pools: Any) -> None:
    train, val = (DataLoader(pool, batch_size=4) for pool in pools(numbered(60)))
    with pytest.raises(CalibrationError, match=r"train and val share \d+ images; .*image \d+ of train is image \d+ of"):
        CalibrationDataModule(datamodule=Loaders(train, val)).setup()
