"""Where the items of a dataset come from: the datasets at the bottom, the files they read, what a wrapper wraps."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision.datasets import DatasetFolder
from torchvision.datasets.folder import default_loader

_FILE_LIST = re.compile("image|img|sample|file|path|^items$")
_NUM_LOOKED_AT = 64
_NO_FILE_LIST = re.compile("mask|label|target|annot|depth")


@dataclass(frozen=True, slots=True, eq=False)
class Origins:
    """The items of a dataset, taken apart through every `Subset` and `ConcatDataset`.

    Attributes:
        datasets: Those at the bottom of which there are items, each once.
        which: For each item the place of its dataset among them, int64.
        indices: For each item its index in that dataset, int64.
    """

    datasets: tuple[Any, ...]
    which: Tensor
    indices: Tensor

    def __getitem__(self, item: int) -> tuple[Any, int]:
        """An item's dataset at the bottom, and its index there."""
        return self.datasets[self.which[item]], int(self.indices[item])


def find_origins(dataset: Any) -> Origins:
    """Take a dataset apart."""
    if isinstance(dataset, ConcatDataset):
        parts = [find_origins(part) for part in dataset.datasets if len(part)]  # type: ignore[arg-type]
        bottom = list({id(base): base for part in parts for base in part.datasets}.values())
        place = {id(base): number for number, base in enumerate(bottom)}
        renumbered = [torch.tensor([place[id(base)] for base in part.datasets])[part.which] for part in parts]
        return Origins(tuple(bottom), torch.cat(renumbered), torch.cat([part.indices for part in parts]))
    if isinstance(dataset, Subset):
        origins = find_origins(dataset.dataset)
        chosen = torch.as_tensor(dataset.indices, dtype=torch.int64)
        used, which = origins.which[chosen].unique(return_inverse=True)
        return Origins(tuple(origins.datasets[place] for place in used), which, origins.indices[chosen])
    return Origins((dataset,), torch.zeros(len(dataset), dtype=torch.int64), torch.arange(len(dataset)))


def find_wrapped(dataset: Any) -> tuple[Any, Sequence[int]] | None:
    """The dataset that another one holds in an attribute, and which of its items they seem to be; None without.

    A wrapper of the same length is taken to give the same items, one with an attribute `indices` those. Whoever relies
    on that checks a few items.
    """
    attributes = getattr(dataset, "__dict__", {})
    inner = [value for value in attributes.values() if _is_dataset(value)]
    if len(inner) != 1:
        return None
    indices = attributes.get("indices", attributes.get("_indices"))
    if indices is None or not hasattr(indices, "__len__") or len(indices) != len(dataset):
        indices = range(len(dataset))
    return (inner[0], indices) if len(inner[0]) >= len(dataset) else None


def _is_dataset(value: Any) -> bool:
    """Also those of libraries that do not inherit from torch's."""
    return isinstance(value, Dataset) or all(hasattr(value, name) for name in ("features", "column_names", "__len__"))


def list_files(dataset: Any) -> list[str] | None:
    """Paths of the files that a dataset at the bottom reads, one for each item; None where it does not tell.

    A list of files in which one occurs twice does not: its items may be parts of a file.
    """
    if isinstance(dataset, DatasetFolder):
        return [path for path, _ in dataset.samples]
    for name, entries in getattr(dataset, "__dict__", {}).items():
        if _NO_FILE_LIST.search(name.lower()) or not _FILE_LIST.search(name.lower()):
            continue
        if not isinstance(entries, list | tuple | np.ndarray) or len(entries) != len(dataset) or not len(entries):
            continue
        firsts = [entry[0] if isinstance(entry, list | tuple) and entry else entry for entry in entries]
        if not all(isinstance(path, str | os.PathLike) for path in firsts) or len(set(firsts)) < len(firsts):
            continue
        for root in ("", getattr(dataset, "root", None)):
            if isinstance(root, str | os.PathLike):
                paths = [os.path.join(root, path) for path in firsts]
                if all(os.path.isfile(path) for path in (paths[0], paths[-1])):
                    return paths
    return None


def warn_of_turned_images(datasets: Mapping[str, Any]) -> None:
    """Warn of datasets whose loader ignores the files' EXIF orientation, as torchvision's does, where that can be seen.

    An image that comes as a PIL image tells its orientation still.
    """
    for name, dataset in datasets.items():
        origins = find_origins(dataset)
        for item in {len(dataset) * k // _NUM_LOOKED_AT for k in range(_NUM_LOOKED_AT)}:
            base, index = origins[item]
            if not isinstance(base, DatasetFolder) or base.loader is not default_loader or base.transform is None:
                continue
            path = base.samples[index][0]
            with Image.open(path) as image:
                is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if is_turned and not isinstance(base[index][0], Image.Image):
                warnings.warn(
                    f"{name} gives images turned as the camera was held, such as {path}, whereas predictions of files "
                    f"are turned upright. Open them with ImageFolder(..., loader=lambda path: "
                    f"ImageOps.exif_transpose(Image.open(path)).convert('RGB')), or without a transform.",
                    stacklevel=3,
                )
                break


def find_file(dataset: Any, item: int) -> str | None:
    """The file of an item, through wrappers too; None where it is not known."""
    base, index = find_origins(dataset)[item]
    files = list_files(base)
    if files is not None:
        return files[index]
    wrapped = find_wrapped(base)
    return None if wrapped is None else find_file(wrapped[0], int(wrapped[1][index]))
