"""Targets of datasets, and draws that are stratified by classes."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_stitch.data.images import Items, find_origin
from lightning_stitch.data.target_values import TargetReader
from lightning_stitch.errors import CalibrationError


def check_disjoint(datasets: dict[str, Items]) -> None:
    """Refuse the same images under two names, as far as it can be seen without decoding them."""
    for (name, dataset), (second_name, second) in combinations(datasets.items(), 2):
        (base, indices), (second_base, second_indices) = find_origin(dataset), find_origin(second)
        shared = int(torch.isin(indices, second_indices).sum()) if base is second_base else 0
        if shared:
            raise CalibrationError(f"{name} and {second_name} share {shared} images; they must be disjoint.")


def read_targets(dataset: Items, name: str, reader: TargetReader) -> Tensor:
    """Read every target of a dataset, images first: from its attributes if possible, else in a pass over its items."""
    base, indices = find_origin(dataset)
    attributes: list[Any] = [getattr(base, attribute, None) for attribute in ("targets", "labels")]
    if isinstance(base, TensorDataset):
        attributes = list(base.tensors[1:2])
    stored = next((a for a in attributes if hasattr(a, "__len__") and len(a) == len(base)), None)
    if stored is None:
        values = (dataset[index][1] for index in range(len(dataset)))
    else:
        entries = stored.tolist() if hasattr(stored, "tolist") else stored
        transform = getattr(base, "target_transform", None) or (lambda label: label)
        values = (transform(entries[index]) for index in indices.tolist())
    targets: list[Tensor] = []
    for index, value in enumerate(values):
        try:
            target = torch.as_tensor(reader(value))
            if targets and target.shape != targets[0].shape:
                shapes = tuple(target.shape), tuple(targets[0].shape)
                raise CalibrationError(f"its target is of shape {shapes[0]}, that of image 0 is {shapes[1]}")
        except CalibrationError as error:
            raise CalibrationError(f"Image {index} of {name}: {error}.") from error
        targets.append(target)
    return torch.stack(targets)


def find_class_names(dataset: Items) -> list[str] | None:
    """Names of the classes in the order of their labels; None where the dataset does not tell."""
    base, _ = find_origin(dataset)
    names = getattr(base, "classes", None)
    if not names or not isinstance(names, list | tuple) or getattr(base, "target_transform", None) is not None:
        return None
    return [str(name) for name in names]


def count_classes(labels: Tensor, class_names: list[str] | None) -> int:
    """Count the classes; refuse a single one, and numbers with gaps."""
    present = labels.unique().tolist()
    num_classes = max(len(class_names or ()), present[-1] + 1)
    if len(present) < 2:
        raise CalibrationError(
            f"All {len(labels)} images of train have one label, {present[0]}; two classes are needed."
        )
    if len(present) < num_classes:
        raise CalibrationError(
            f"There are {num_classes} classes, but train has labels of only {len(present)}: {present[:10]}. Give "
            f"images of each, numbered from 0 without gaps."
        )
    return num_classes


def check_varied(targets: Tensor) -> None:
    """Refuse labels that no image of train has or that all have, and numbers that are the same for all."""
    columns = targets if targets.ndim == 2 else targets[:, None]
    constant = (columns == columns[0]).all(0).nonzero().flatten().tolist()
    if constant:
        raise CalibrationError(
            f"The targets of all {len(targets)} images of train are the same in the columns {constant[:10]} "
            f"(those start with {columns[0, constant[0]].item():g}); nothing can be learnt there, so leave them out."
        )


def to_count(size: int | float, available: int) -> int:
    """A number of images from a number or a share."""
    return max(1, round(size * available)) if isinstance(size, float) else size


def mark_stratified(labels: Tensor, count: int, *, leave: int) -> Tensor:
    """Mark `count` items, in the proportions of their labels, the first ones of each class.

    At least `leave` items of each class stay unmarked, and every class gets one item if it can. Otherwise whole
    numbers come by largest remainder.
    """
    sizes = torch.bincount(labels)
    room = (sizes - leave).clamp(min=0)
    total = max(int(room.sum()), 1)
    quota, remainder = count * room // total, count * room % total
    take = quota.maximum((room > 0).long())
    most_due = (remainder * (quota > 0)).argsort(descending=True, stable=True)
    take[most_due[: max(count - int(take.sum()), 0)]] += 1
    while int(take.sum()) > count:
        take[take.argmax()] -= 1
    by_class = labels.argsort(stable=True)
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    return rank < take[labels]
