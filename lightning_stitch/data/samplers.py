"""The datasets of another data module: which images its loaders draw is read off their samplers, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_stitch._lightning import isolate_rng, pl
from lightning_stitch.errors import CalibrationError


def borrow_datasets(datamodule: pl.LightningDataModule) -> dict[str, Any]:
    """Take the datasets behind another datamodule's train, val and test dataloaders."""
    overridden = [
        name
        for name in ("train", "val", "test")
        if getattr(type(datamodule), f"{name}_dataloader") is not getattr(pl.LightningDataModule, f"{name}_dataloader")
    ]
    # All setups come before the first dataset is taken: one that splits at random splits anew in each.
    datamodule.setup("fit")
    if "test" in overridden:
        datamodule.setup("test")
    datasets: dict[str, Any] = {}
    for name in overridden:
        loaders = getattr(datamodule, f"{name}_dataloader")()
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        if loaders in ([], [None]):
            continue
        if len(loaders) > 1 or not isinstance(loaders[0], DataLoader):
            raise CalibrationError(
                f"{type(datamodule).__name__}.{name}_dataloader() should return one DataLoader; found "
                f"{[type(loader).__name__ for loader in loaders]}. Pass its datasets as train=, val= and test=."
            )
        datasets[name] = select_drawn(loaders[0], f"{type(datamodule).__name__}.{name}_dataloader()")
    if "train" not in datasets:
        raise CalibrationError(f"{type(datamodule).__name__} has no train_dataloader; pass its datasets as train=.")
    return datasets


def select_drawn(loader: DataLoader, name: str) -> Any:
    """The images that a loader draws sooner or later, each once, as a dataset: its own, or a Subset of it.

    Samplers of torch say which these are. One of another kind, or a list, is read twice: where both passes have the
    same images, those are meant; where they differ, it draws at random out of more than it tells, and is refused.

    Raises:
        CalibrationError: If a sampler does not tell, or gives anything but indices of the dataset.
    """
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return dataset  # refused later, in words of its own
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    length = len(dataset)
    indices = _read_indices(sampler, name, most=100 * length)
    out_of_range = next((index for index in indices if not -length <= index < length), None)
    if out_of_range is not None:
        raise CalibrationError(f"The sampler of {name} draws image {out_of_range}, but its dataset holds {length}.")
    unique = list(dict.fromkeys(index % length for index in indices))
    return dataset if sorted(unique) == list(range(length)) else Subset(dataset, unique)


def _read_indices(sampler: Any, name: str, *, most: int) -> Iterable[int]:
    """Indices that a sampler or a batch sampler may draw; of an endless one the first `most` entries are read."""
    kind = type(sampler)
    if isinstance(sampler, BatchSampler) and kind.__iter__ is BatchSampler.__iter__:
        return _read_indices(sampler.sampler, name, most=most)
    if isinstance(sampler, SequentialSampler | RandomSampler) and _draws_as(kind, SequentialSampler, RandomSampler):
        return range(len(sampler.data_source))
    if isinstance(sampler, DistributedSampler) and _draws_as(kind, DistributedSampler):
        return range(len(sampler.dataset))  # type: ignore[arg-type]
    if isinstance(sampler, SubsetRandomSampler) and _draws_as(kind, SubsetRandomSampler):
        return _to_numbers(sampler.indices, sampler, name)
    if isinstance(sampler, WeightedRandomSampler) and _draws_as(kind, WeightedRandomSampler):
        return sampler.weights.nonzero().flatten().tolist()
    with isolate_rng():
        passes = [_to_numbers(islice(sampler, most), sampler, name) for _ in range(2)]
    if set(passes[0]) == set(passes[1]):
        return passes[0]
    allowed = getattr(sampler, "indices", None)  # the usual attribute of samplers that balance classes
    if hasattr(allowed, "__len__"):
        indices = _to_numbers(allowed, sampler, name)
        if set(indices) >= {*passes[0], *passes[1]}:
            return indices
    raise CalibrationError(
        f"The {kind.__name__} of {name} draws other images in each pass and does not tell out of which, so the sets "
        f"cannot be kept apart. Give CalibrationDataModule the datasets as train=, val= and test=, each a "
        f"torch.utils.data.Subset of the images that belong to it."
    )


def _draws_as(kind: type, *known: type) -> bool:
    """Whether a class draws as one of the known ones does, not in a way of its own."""
    return any(kind.__iter__ is base.__iter__ for base in known)  # type: ignore[attr-defined]


def _to_numbers(entries: Any, sampler: Any, name: str) -> list[int]:
    """The indices that a sampler gives one by one or in batches."""
    numbers: list[int] = []
    for entry in entries:
        entry = entry.tolist() if hasattr(entry, "tolist") else entry
        numbers += entry if isinstance(entry, list | tuple) else [entry]
    strange = next((number for number in numbers if not isinstance(number, int)), None)
    if strange is not None:
        raise CalibrationError(
            f"The {type(sampler).__name__} of {name} gives {strange!r}, which is no index of an image. Give "
            f"CalibrationDataModule the datasets as train=, val= and test=."
        )
    return numbers
