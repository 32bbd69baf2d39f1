"""Targets of whole datasets, and draws that are stratified by classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_stitch.data.images import Items, naming_image, spread, target_of
from lightning_stitch.data.origins import find_origins, find_wrapped
from lightning_stitch.data.target_values import Label, TargetReaders, TargetValue, read_labels
from lightning_stitch.errors import CalibrationError
from lightning_stitch.progress import Bar, Silent, counted

_LONG = 2000  # images that take seconds to decode


def show_progress(items: Sequence[int], stage: str) -> Iterator[int]:
    """The same items, with a progress bar where they are many."""
    with Bar(Console(stderr=True)) if len(items) > _LONG else Silent() as bar:
        bar.start(stage, len(items))
        yield from counted(items, bar)


def read_targets(dataset: Items, name: str, readers: TargetReaders, *, most: int | None = None) -> list[TargetValue]:
    """Read every target of a dataset: from what its parts store, where a few items agree with that, else from items.

    `most` is how many classes there can be; a larger number is refused as soon as it is met.
    """
    origins = find_origins(dataset)
    targets: dict[int, TargetValue] = {}
    for number, base in enumerate(origins.datasets):
        items = (origins.which == number).nonzero().flatten().tolist()
        stored = _read_stored(base, origins.indices[origins.which == number].tolist(), readers.readers[number])
        if stored is None:
            continue
        for place in spread(len(items)):
            with naming_image(dataset, name, items[place]):
                value = readers(items[place], target_of(dataset[items[place]]))
            if not _same(value, stored[place]):
                break
        else:
            targets |= dict(zip(items, stored, strict=True))
    unread = [item for item in range(len(dataset)) if item not in targets]
    first: Tensor | None = None
    for item in [*targets, *show_progress(unread, f"labels of {name}")]:
        with naming_image(dataset, name, item):
            value = targets[item] if item in targets else readers(item, target_of(dataset[item]))
            targets[item] = value
            if isinstance(value, Tensor):
                first = value if first is None else first
                if value.shape != first.shape:
                    shapes = tuple(value.shape), tuple(first.shape)
                    raise CalibrationError(f"its target is of shape {shapes[0]}, that of others is {shapes[1]}")
            elif most is not None and isinstance(value, int) and value >= most:
                raise CalibrationError(
                    f"it has label {value}, but {len(dataset)} images cannot be of {value + 1} classes. Number the "
                    f"classes from 0 without gaps (target_transform), or give their names"
                )
    return [targets[item] for item in range(len(dataset))]


def _read_stored(base: Any, indices: Sequence[int], reader: Callable[[Any], TargetValue]) -> list[TargetValue] | None:
    """Read targets from an attribute of a dataset at the bottom, or of what it wraps; None where there are none."""
    stored: list[Any] = [getattr(base, attribute, None) for attribute in ("targets", "labels")]
    if isinstance(base, TensorDataset):
        stored = list(base.tensors[1:2])
    transform = getattr(base, "target_transform", None) or (lambda target: target)
    for entries in stored:
        if not hasattr(entries, "__len__") or len(entries) != len(base):
            continue
        table = entries.to_numpy() if hasattr(entries, "to_numpy") else entries
        table = table.tolist() if hasattr(table, "tolist") else table
        try:
            return [reader(transform(table[index])) for index in indices]
        except (CalibrationError, LookupError, TypeError, ValueError):
            continue  # no targets, or other ones than the items have, which say themselves what is wrong
    wrapped = find_wrapped(base)
    if wrapped is None or getattr(base, "target_transform", None) is not None:
        return None
    inner, inside = wrapped
    origins = find_origins(inner)
    if len(origins.datasets) > 1:
        return None
    return _read_stored(origins.datasets[0], [int(origins.indices[int(inside[index])]) for index in indices], reader)


def _same(first: TargetValue, second: TargetValue) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return type(first) is type(second) and first == second


def number_labels(labels: Sequence[Any] | Tensor, num_images: int) -> tuple[Tensor, tuple[Label, ...]]:
    """The class numbers of images from 0, int64, and the label of each class, sorted.

    Raises:
        CalibrationError: If labels cannot be used, are not as many as images, of several kinds, or all the same.
    """
    values = read_labels(labels)
    if len(values) != num_images:
        raise CalibrationError(f"Each image needs one label; found {num_images} images and {len(values)} labels.")
    kinds = {type(value).__name__ for value in values}
    if len(kinds) > 1:
        raise CalibrationError(f"labels= are all integers or all names; found {sorted(kinds)}.")
    classes = tuple(sorted(set(values)))
    if len(classes) < 2:
        raise CalibrationError(f"A classifier needs images of at least two classes; all labels are {classes[0]!r}.")
    return torch.tensor([classes.index(value) for value in values]), classes


def count_classes(labels: Sequence[Any], class_names: list[str] | None) -> int:
    """Count the classes; refuse a single one, and classes without an image or numbers with gaps."""
    present = sorted(set(labels))
    if len(present) < 2:
        raise CalibrationError(
            f"All {len(labels)} images of train have one label, {present[0]!r}; two classes are needed."
        )
    if class_names is not None:
        missing = [name for name in class_names if name not in present]
        if missing:
            raise CalibrationError(
                f"train has {len(class_names)} classes, but no image of {missing[:10]}. Give images of each, or leave "
                f"those classes out of the dataset."
            )
        return len(class_names)
    num_classes = present[-1] + 1
    if present == list(range(1, num_classes)):
        raise CalibrationError(
            f"The labels of train go from 1 to {present[-1]}, but classes are numbered from 0. Subtract 1 "
            f"(target_transform=lambda label: label - 1), here and in val and test."
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
    numbers come by largest remainder. Where that leaves a choice of classes, it is by the order of the items: of fewer
    items than classes those have one that come first.
    """
    _, labels = labels.unique(return_inverse=True)
    first = torch.full((int(labels.max()) + 1,), len(labels))
    first = first.scatter_reduce(0, labels, torch.arange(len(labels)), "amin")
    labels = first.argsort(descending=True).argsort()[labels]
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
