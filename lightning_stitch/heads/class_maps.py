"""The class-map head: new classes are groups of the classes that a pre-trained network knows; it needs no labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_stitch.errors import StitchError

ClassMap = dict[str, list[int]]
"""Each new class's name, and the indices of the source classes that it is made of."""

Match = Literal["name", "words", "definition"]

_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")
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
        if other and not (assignment == unmapped).any():
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


def parse_class_map(classes: Mapping[str, int | str | Sequence[int | str]]) -> ClassMap:
    """A class map from indices, ranges and lists of them: {"dog": "151-268", "cat": [281, 282, "283-285"]}.

    Ranges include both ends. An index that is given twice for one class counts once.

    Raises:
        StitchError: If there is no class, one has no source class, something is neither index nor range, or a source
            class is mapped to two classes.

    Example:
        >>> parse_class_map({"cat": "281-283", "fox": [277, 278]})
        {'cat': [281, 282, 283], 'fox': [277, 278]}
    """
    if not isinstance(classes, Mapping):
        raise StitchError(f"A class map is {{'dog': '151-268', ...}}; found {classes!r}.")
    found = {}
    for name, given in classes.items():
        entries = [given] if isinstance(given, int | str) else list(given)
        indices = [index for entry in entries for index in _indices(str(name), entry)]
        found[str(name)] = list(dict.fromkeys(indices))
    check_class_map(found)
    return found


def check_class_map(classes: Mapping[str, Sequence[int]], *, num_source_classes: int | None = None) -> None:
    """Refuse a class map that says nothing, says it twice, or speaks of classes that the source does not have.

    Args:
        classes: Indices of source classes for each new class.
        num_source_classes: Width of the source's output; None: not known yet.

    Raises:
        StitchError: Naming the classes.
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
    classes: Mapping[str, str | int | Sequence[str | int]],
    names: str | Sequence[str] = "imagenet-1k",
    *,
    match: Match = "name",
) -> ClassMap:
    """A class map from the names of source classes, for `StitchedClassifier(head={"name": "class_map", ...})`.

    A source class may have several names, separated by commas ("tabby, tabby cat"); case does not matter. "A .. B"
    means all source classes from the one named A to the one named B: ImageNet's 118 breeds of dogs are "Chihuahua ..
    Mexican hairless". A name is never found inside of another word.

    Args:
        classes: Names of source classes for each new class; a number is a source class's index.
        names: Each source class's names, in the order of the source's outputs; or "imagenet-1k", "imagenet-12k",
            "imagenet-21k", "imagenet-22k", ..., whose WordNet names and definitions timm carries.
        match: "name": a name must be the whole of one of a source class's names. "words": it may also be some whole
            words of one, so that "cat" finds "Persian cat", and "Madagascar cat", a lemur, as well. "definition": or
            whole words of the definition.

    Raises:
        StitchError: If a name is not found (with the nearest ones), with match="name" one name is that of several
            source classes, a source class is mapped to two classes, or the names or the kind of match are unknown.

    Example:
        >>> class_map_from_names({"cat": "tabby .. Egyptian cat", "fox": ["red fox", "kit fox"]})
        {'cat': [281, 282, 283, 284, 285], 'fox': [277, 278]}
    """
    if match not in get_args(Match):
        raise StitchError(f"match must be one of {get_args(Match)}; found {match!r}.")
    known, definitions = _imagenet(names) if isinstance(names, str) else (list(names), None)
    if match == "definition" and definitions is None:
        raise StitchError("match='definition' needs the definitions that belong to ImageNet's names; yours have none.")
    found = {}
    for name, given in classes.items():
        wanted = [given] if isinstance(given, str | int) else list(given)
        indices = [index for one in wanted for index in _named(one, known, definitions, match)]
        found[str(name)] = sorted(set(indices))
    try:
        check_class_map(found)
    except StitchError as error:
        twice = {i for one in found for other in found if one < other for i in {*found[one]} & {*found[other]}}
        raise StitchError(" ".join([str(error), *(f"{i} is {known[i]!r}." for i in sorted(twice)[:5])])) from error
    return found


def _indices(name: str, entry: int | str) -> list[int]:
    if isinstance(entry, int) and not isinstance(entry, bool):
        return [entry]
    text = str(entry).strip()
    if text.isdecimal():
        return [int(text)]
    ends = _RANGE.fullmatch(text)
    if ends is None or int(ends[1]) > int(ends[2]):
        raise StitchError(
            f"The class {name!r} has {entry!r}, which is no index and no range like '151-268'. For names of classes "
            f"use class_map_from_names, or say names: imagenet-1k beside the classes."
        )
    if int(ends[2]) >= _MOST_CLASSES:
        raise StitchError(f"The class {name!r} has {entry!r}; no network has so many classes.")
    return list(range(int(ends[1]), int(ends[2]) + 1))


def _named(wanted: str | int, names: Sequence[str], definitions: Sequence[str] | None, match: Match) -> list[int]:
    if isinstance(wanted, int):
        if not 0 <= wanted < len(names):
            raise StitchError(f"There is no source class {wanted}; those there are go from 0 to {len(names) - 1}.")
        return [wanted]
    if " .. " in wanted:
        first, last = (_single(end.strip(), names) for end in wanted.split(" .. ", 1))
        if first > last:
            raise StitchError(f"{wanted!r} runs backwards: from {first} to {last}.")
        return list(range(first, last + 1))
    if match == "name":
        return [_single(wanted, names)]
    pattern = re.compile(rf"(?<!\w){re.escape(wanted.strip())}(?!\w)", re.IGNORECASE)
    texts = list(names)
    if match == "definition" and definitions is not None:
        texts = [f"{name}: {definition}" for name, definition in zip(names, definitions, strict=True)]
    found = [index for index, text in enumerate(texts) if pattern.search(text)]
    if not found or not wanted.strip():
        raise StitchError(f"No source class has the words {wanted!r}. {_nearest(wanted, names)}")
    return found


def _single(wanted: str, names: Sequence[str]) -> int:
    """The one source class that has a name."""
    found = [index for index, given in enumerate(names) if _folded(wanted) in map(_folded, given.split(","))]
    if not found:
        raise StitchError(f"No source class is named {wanted!r}. {_nearest(wanted, names)}")
    if len(found) > 1:
        several = "; ".join(f"{index} ({names[index]})" for index in found)
        raise StitchError(
            f"{wanted!r} names several source classes: {several}. Say which by another of their names, or by number."
        )
    return found[0]


def _nearest(wanted: str, names: Sequence[str]) -> str:
    single = [name.strip() for given in names for name in given.split(",")]
    lowered = {_folded(name): name for name in single}
    near = [lowered[name] for name in get_close_matches(_folded(wanted), lowered, n=3)]
    words = [name for name in single if _folded(wanted) in _folded(name).split()]
    offered = list(dict.fromkeys([*words[:5], *near]))
    return f"The nearest are {offered}." if offered else "match='words' and match='definition' look further."


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _imagenet(subset: str) -> tuple[list[str], list[str]]:
    from timm.data import ImageNetInfo

    try:
        known = ImageNetInfo(subset)
    except AssertionError as error:
        raise StitchError(
            f"Unknown names {subset!r}: say 'imagenet-1k', 'imagenet-12k', 'imagenet-21k', 'imagenet-22k', or give a "
            f"list of names, one for each output of the source."
        ) from error
    names = list(known.label_descriptions())
    detailed = known.label_descriptions(detailed=True)
    return names, [text[len(name) + 2 :] for name, text in zip(names, detailed, strict=True)]
