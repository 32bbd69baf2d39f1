"""Names of classes: found behind wrappers, and labels numbered by them, whatever number each dataset gives a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import DatasetFolder

from lightning_stitch.data.folders import is_hidden
from lightning_stitch.data.images import Items, image_of, spread, target_of
from lightning_stitch.data.labels import count_classes, read_targets
from lightning_stitch.data.origins import find_origins, find_wrapped
from lightning_stitch.data.target_values import Label, TargetReader, TargetReaders, read_label
from lightning_stitch.errors import CalibrationError, require_text


def find_class_names(dataset: Any) -> list[str] | None:
    """Names of a dataset's classes in the order of its labels; None where it does not tell, or its parts differ."""
    return _agreed([_names_at_bottom(base) for base in find_origins(dataset).datasets])


def _agreed(names: Sequence[list[str] | None]) -> list[str] | None:
    return names[0] if all(part == names[0] for part in names) else None


def _names_at_bottom(dataset: Any) -> list[str] | None:
    """The names in attributes of a dataset, or of one that it wraps and whose labels it gives as they are."""
    if getattr(dataset, "target_transform", None) is not None:
        return None
    names = getattr(dataset, "classes", None)
    numbers = getattr(dataset, "class_to_idx", None)
    if names is None and isinstance(numbers, Mapping) and sorted(numbers.values()) == list(range(len(numbers))):
        names = sorted(numbers, key=numbers.__getitem__)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping):
        names = getattr(features.get("label", features.get("labels")), "names", None)
    if isinstance(names, list | tuple | np.ndarray) and len(names):
        listed = [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]
        if isinstance(dataset, DatasetFolder) and any(map(is_hidden, listed)):
            raise CalibrationError(
                f"{dataset.root} has hidden or system folders among its classes: {list(filter(is_hidden, listed))}. "
                f"Remove them, or give image_folder=, which leaves them out."
            )
        require_text(listed, "The class name")
        return listed if len(set(listed)) == len(listed) else None
    wrapped = find_wrapped(dataset)
    if wrapped is None:
        return None
    inner, indices = wrapped
    parts = [_names_at_bottom(base) for base in find_origins(inner).datasets]
    if _agreed(parts) is None and any(parts):
        raise CalibrationError(
            f"A {type(dataset).__name__} wraps datasets that number their classes differently: {parts}. Wrap each of "
            f"them, and put the ConcatDataset around the wrappers."
        )
    same = all(_same_label(dataset[item], inner[int(indices[item])]) for item in spread(len(dataset)))
    return _agreed(parts) if same else None


def _same_label(item: Any, wrapped: Any) -> bool:
    if isinstance(wrapped, Mapping):
        wrapped = (image_of(item), wrapped.get("label", wrapped.get("labels")))
    try:
        return read_label(target_of(item)) == read_label(target_of(wrapped))
    except CalibrationError:
        return False  # a vector or a number, which has no name


@dataclass(frozen=True, slots=True, eq=False)
class Numbering:
    """How the classes of several datasets are numbered.

    Attributes:
        names: Of the classes in the order of their numbers; None: labels are numbers without names.
        count: How many classes there are.
        labels: The numbers of train's images, int64.
        readers: What reads the targets of each dataset.
    """

    names: list[str] | None
    count: int
    labels: Tensor
    readers: dict[str, TargetReaders]


def number_classes(datasets: Mapping[str, Items]) -> Numbering:
    """Number the classes of datasets as train has them, by name where names are known.

    The names are in the order of the labels of train's first part, then any more as they come; labels that are names
    themselves are sorted.

    Raises:
        CalibrationError: If labels cannot be used, or another dataset has a class that train has not.
    """
    origins = {name: find_origins(dataset) for name, dataset in datasets.items()}
    parts = {name: [_names_at_bottom(base) for base in origin.datasets] for name, origin in origins.items()}
    readers = TargetReaders(
        tuple(TargetReader("multiclass", names=part) for part in parts["train"]), origins["train"].which
    )
    labels = cast("list[Label]", read_targets(datasets["train"], "train", readers, most=len(datasets["train"])))
    names = _order_names(parts["train"], labels)
    numbers = None if names is None else {name: number for number, name in enumerate(names)}
    if names is not None:
        labels = [label if isinstance(label, str) else names[label] for label in labels]
    count = count_classes(labels, names)
    all_readers = {}
    for name, origin in origins.items():
        # Where train has no names, those of other datasets say nothing.
        known = [part if names is not None else None for part in parts[name]]
        of_parts = (TargetReader("multiclass", count, names=part, class_numbers=numbers) for part in known)
        all_readers[name] = TargetReaders(tuple(of_parts), origin.which)
        if any(set(part or ()) - set(names or ()) for part in known):
            read_targets(datasets[name], name, all_readers[name])  # an error names the first image of such a class
    numbered = [label if numbers is None else numbers[cast("str", label)] for label in labels]
    return Numbering(names, count, torch.tensor(numbered), all_readers)


def _order_names(parts: Sequence[list[str] | None], labels: Sequence[Label]) -> list[str] | None:
    """The names of train's classes in the order of their numbers; None where no label has a name."""
    named = {label for label in labels if isinstance(label, str)}
    if not named:
        return None
    unnamed = sorted({label for label in labels if not isinstance(label, str)})
    declared = list(dict.fromkeys(name for part in parts for name in part or ()))
    names = declared + sorted(named - set(declared))
    if unnamed and (any(part not in (None, names) for part in parts) or unnamed[-1] >= len(names)):
        raise CalibrationError(
            f"Some labels of train are names ({names[:5]}) and some are numbers ({unnamed[:5]}), and which number is "
            f"which name is not told. Give all of them as names, or all as numbers."
        )
    return names


def look_up_classes(dataset: Any, class_names: Sequence[str] | None) -> Tensor | None:
    """Numbers that a model gives the classes of a dataset, by the dataset's labels, int64; None where they are alike.

    They are alike where names are not known on either side, too. A class that the model does not know, and that is not
    seen to have no images, is an error.

    Raises:
        CalibrationError: If there is such a class, or the dataset's parts number classes differently.
    """
    if class_names is None or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    origins = find_origins(dataset)
    parts = [_names_at_bottom(base) for base in origins.datasets]
    if all(part is None or part == list(class_names) for part in parts):
        return None
    names = _agreed(parts)
    if names is None:
        raise CalibrationError(
            f"The dataset's parts number their classes differently: {parts}; the model has {list(class_names)}. Give "
            f"them to the Trainer one by one, or as test= of a CalibrationDataModule, which sorts them by name."
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = [name for name in names if name not in numbers]
    if unknown:
        readers = TargetReaders((TargetReader("multiclass", names=names),) * len(parts), origins.which)
        present = set(read_targets(dataset, "the dataset", readers))
        unknown = [name for name in unknown if name in present]
    if unknown:
        raise CalibrationError(
            f"The dataset has the classes {unknown[:10]}, which the model does not know; it knows "
            f"{list(class_names)[:10]}."
        )
    return torch.tensor([numbers.get(name, -1) for name in names])
