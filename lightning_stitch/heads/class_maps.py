"""The class-map head: new classes are groups of the classes that a pre-trained network knows; it needs no labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_stitch.errors import StitchError, nearest

ClassMap = dict[str, list[int]]
"""Each new class's name, and the indices of the source classes that it is made of."""

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
_MOST_CLASSES = 10**7


class ClassMapHead(nn.Module):
    """Sums the probabilities of source classes that make a new class, in logarithms: it has nothing to fit.

    Attributes:
        assignment: Buffer (num_source_classes,), int64: each source class's new class; `num_classes`: it is left out.

    Args:
        classes: The source classes of each new one, in their order.
        num_source_classes: Width of the source's output.
        other: Whether all that nobody maps makes one more class, the last. False: it is left out, and the probabilities
            are those of an image of which one knows that it shows one of the mapped classes.

    Raises:
        StitchError: If a class is empty, or a source class is mapped twice or does not exist.
    """

    assignment: Tensor

    def __init__(self, classes: Sequence[Sequence[int]], num_source_classes: int, *, other: bool = False) -> None:
        super().__init__()
        named = {f"class {index}": list(indices) for index, indices in enumerate(classes)}
        check_class_map(named, num_source_classes=num_source_classes)
        self.num_classes = len(named) + int(other)
        unmapped = len(named)  # the number of the class "other", or of the column that is left out
        assignment = torch.full((num_source_classes,), unmapped)
        for new, indices in enumerate(named.values()):
            assignment[indices] = new
        if other and sum(map(len, named.values())) == num_source_classes:
            raise StitchError(f"All {num_source_classes} source classes are mapped, so none is left for another class.")
        self.register_buffer("assignment", assignment)

    def forward(self, logits: Tensor) -> Tensor:
        """Log-probabilities (n x num_classes), up to a constant, of the source's logits (n x num_source_classes)."""
        log_p = logits.log_softmax(dim=1)
        groups = self.assignment.expand_as(log_p)
        empty = log_p.new_full((log_p.shape[0], self.num_classes + 1), -torch.inf)
        largest = empty.scatter_reduce(1, groups, log_p.detach(), "amax")
        shifted = (log_p - largest.gather(1, groups)).exp()
        sums = torch.zeros_like(empty).scatter_add(1, groups, shifted)
        return (largest + sums.log())[:, : self.num_classes]

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"num_source_classes={len(self.assignment)}, num_classes={self.num_classes}"


def parse_class_map(
    classes: Mapping[str, int | str | Sequence[int | str]], names: Sequence[str] | None = None
) -> ClassMap:
    """A class map from indices, ranges and lists of them: {"dog": "151-268", "cat": [281, 282, "283-285"]}.

    Ranges include both ends. An index that is given twice for one class counts once.

    Args:
        classes: The source classes of each new class.
        names: Each source class's names, which entries may then use (`class_map_from_names`); None: it has none.

    Raises:
        StitchError: If there is no class, one has no source class, something is neither index, range nor name, or a
            source class does not exist or is mapped to two classes.

    Example:
        >>> parse_class_map({"cat": "281-283", "fox": [277, 278]})
        {'cat': [281, 282, 283], 'fox': [277, 278]}
    """
    if not isinstance(classes, Mapping):
        raise StitchError(f"A class map is {{'dog': '151-268', ...}}; found {classes!r}.")
    class_map = {}
    for name, entries in classes.items():
        listed = [entries] if isinstance(entries, int | str) else entries
        indices = {index for entry in listed for index in _indices(str(name), entry, names)}
        class_map[str(name)] = sorted(indices)
    check_class_map(class_map, num_source_classes=None if names is None else len(names))
    return class_map


def check_class_map(classes: Mapping[str, Sequence[int]], *, num_source_classes: int | None = None) -> None:
    """Refuse a class map that says nothing, says it twice, or speaks of classes that the source does not have.

    The StitchError names the classes. `num_source_classes` is the width of the source's output; None: not known yet.
    """
    if not classes:
        raise StitchError("A class map needs at least one class; this one is empty.")
    owners: dict[int, str] = {}
    for name, indices in classes.items():
        if not len(indices):
            raise StitchError(f"The class {name!r} has no source classes.")
        for index in indices:
            if index < 0 or (num_source_classes is not None and index >= num_source_classes):
                last = "" if num_source_classes is None else f" to {num_source_classes - 1}"
                raise StitchError(f"The class {name!r} has the source class {index}; those there are go from 0{last}.")
            if owners.setdefault(index, name) != name:
                raise StitchError(
                    f"The source class {index} is mapped to both {owners[index]!r} and {name!r}; it can be part of one."
                )


def class_map_from_names(
    classes: Mapping[str, str | int | Sequence[str | int]], names: str | Sequence[str] = "imagenet-1k"
) -> ClassMap:
    """A class map from the names of source classes, for `StitchedClassifier(head={"name": "class_map", ...})`.

    A source class may have several names, separated by commas ("tabby, tabby cat"); a name must be the whole of one of
    them, but for case. "A .. B" means all source classes from the one named A to the one named B: ImageNet's 118 breeds
    of dogs are "Chihuahua .. Mexican hairless".

    Args:
        classes: Names of source classes for each new class; indices and ranges of them do as well.
        names: Each source class's names, in the order of the source's outputs; or "imagenet-1k", "imagenet-12k",
            "imagenet-21k", "imagenet-22k", ..., whose WordNet names timm carries.

    Raises:
        StitchError: If a name is not found (with the nearest ones) or is that of several source classes, a source class
            is mapped to two classes, or the names are unknown.

    Example:
        >>> class_map_from_names({"cat": "tabby .. Egyptian cat", "fox": ["red fox", "kit fox"]})
        {'cat': [281, 282, 283, 284, 285], 'fox': [277, 278]}
    """
    if isinstance(names, str):
        from timm.data import ImageNetInfo

        try:
            names = list(ImageNetInfo(names).label_descriptions())
        except AssertionError as error:
            raise StitchError(
                f"Unknown names {names!r}: say 'imagenet-1k', 'imagenet-12k', 'imagenet-21k', 'imagenet-22k', or give "
                f"a list of names, one for each output of the source."
            ) from error
    return parse_class_map(classes, names)


def _indices(name: str, entry: int | str, names: Sequence[str] | None) -> Sequence[int]:
    if isinstance(entry, int) and not isinstance(entry, bool):
        return [entry]
    numbers = _RANGE.fullmatch(str(entry).strip())
    if numbers is not None:
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    elif names is not None:
        ends = str(entry).split(" .. ", 1)
        first, last = _index_of(ends[0], names), _index_of(ends[-1], names)
    else:
        raise StitchError(
            f"The class {name!r} has {entry!r}, which is no index and no range like '151-268'. For names of classes "
            f"use class_map_from_names, or say names: imagenet-1k beside the classes."
        )
    if not first <= last < _MOST_CLASSES:
        raise StitchError(f"The class {name!r} has {entry!r}, which runs backwards or too far: from {first} to {last}.")
    return range(first, last + 1)


def _index_of(wanted: str, names: Sequence[str]) -> int:
    """The one source class that has a name."""
    folded = _folded(wanted)
    indices = [index for index, several in enumerate(names) if folded in map(_folded, several.split(","))]
    if not indices:
        single = [name.strip() for several in names for name in several.split(",")]
        containing = [repr(name) for name in single if folded in _folded(name).split()]
        offered = ", ".join([*containing[:5], nearest(wanted, single)])
        raise StitchError(f"No source class is named {wanted!r}. The nearest are {offered}.")
    if len(indices) > 1:
        several = "; ".join(f"{index} ({names[index]})" for index in indices)
        raise StitchError(
            f"{wanted!r} names several source classes: {several}. Say which by another of their names, or by number."
        )
    return indices[0]


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())
