"""Transforms that datasets carry: found in their attributes, left out, or replaced by those without chance."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset
from torchvision import transforms as v1
from torchvision.datasets.vision import StandardTransform
from torchvision.transforms import v2

from lightning_stitch.data.images import image_of, naming_image, spread, to_channels_first

_NAME = re.compile(r"^_?(\w+_)?(transforms?|augment\w*|aug|preprocess\w*)$")
# Of torchvision, what draws at random and does not begin with "Random".
_RANDOM = re.compile("^(Random|ColorJitter|AutoAugment|RandAugment|TrivialAugment|AugMix|Elastic|Gaussian|ScaleJitter)")
# Without these the image would have another size, and nothing says which one.
_SIZED = re.compile("^(RandomResize|RandomShortestSize|RandomIoUCrop|RandomZoomOut|RandomChoice|ScaleJitter)$")
_PROBES = 16  # a flip hard-coded in a dataset escapes them in one case of 65,536


def replace_transforms(dataset: Any, replace: Callable[[Any, str, Any], Any]) -> Any:
    """A shallow copy of a dataset, and of those it holds, with other image transforms; itself where none is replaced.

    `replace(owner, attribute, transform)` gives what takes a transform's place.
    """
    replaced: dict[str, Any] = {}
    for name, value in getattr(dataset, "__dict__", {}).items():
        if isinstance(value, Dataset):
            new = replace_transforms(value, replace)
        elif isinstance(value, list | tuple) and value and all(isinstance(part, Dataset) for part in value):
            parts = [replace_transforms(part, replace) for part in value]
            new = parts if any(a is not b for a, b in zip(parts, value, strict=True)) else value
        elif isinstance(value, StandardTransform):  # what torchvision makes of transform= and target_transform=
            single = value.transform and replace(dataset, "transform", value.transform)
            new = value if single is value.transform else StandardTransform(single, value.target_transform)
        elif _is_transform(name, value):
            new = replace(dataset, name, value)
        else:
            continue
        if new is not value:
            replaced[name] = new
    if not replaced:
        return dataset
    copied = copy.copy(dataset)
    vars(copied).update(replaced)
    return copied


def _is_transform(name: str, value: Any) -> bool:
    if not callable(value) or isinstance(value, type) or "target" in name or "label" in name:
        return False
    return bool(_NAME.match(name)) or type(value).__module__.startswith("torchvision.transforms")


def without_transforms(dataset: Any) -> Any:
    """A dataset that gives its images as they were before its transforms, as far as it keeps those in attributes."""
    return replace_transforms(dataset, lambda owner, name, transform: keep)


def keep(*images: Any, **named: Any) -> Any:
    """Any transform's stand-in that changes nothing, however it is called."""
    if named:
        return named
    return images[0] if len(images) == 1 else images


def without_chance(datasets: Mapping[str, Any]) -> dict[str, Any]:
    """The same datasets, drawing each image alike every time, for what is fitted in closed form or evaluated.

    A random transform is replaced by that which a dataset of the same class has among the others, where that one is not
    random; else torchvision's random steps are left out of it, and random crops become central ones. Where an image is
    drawn anew in each pass all the same, a warning says so.
    """
    plain: dict[str, Any] = {}
    for name, dataset in datasets.items():
        random_steps = [transform for _, _, transform in _walk(dataset) if is_random(transform)]
        if not random_steps and not _varies(dataset, name):
            plain[name] = dataset
            continue
        rest = [dataset for other, dataset in datasets.items() if other != name]
        plain[name] = replace_transforms(dataset, _Calming(rest, unseen=not random_steps))
        if _varies(plain[name], name) or any(is_random(transform) for _, _, transform in _walk(plain[name])):
            warnings.warn(
                f"{name} ({type(dataset).__name__}) gives the same image otherwise each time: it transforms at random, "
                f"also what stitches and heads are fitted on and what is evaluated, which costs accuracy. Keep the "
                f"random transforms in an attribute `transform` of the dataset, and give val=, a dataset of the same "
                f"class with the transform for evaluation.",
                stacklevel=3,
            )
    return plain


class _Calming:
    """Replaces random transforms by those of other datasets of the same class, or by their steps without chance."""

    def __init__(self, others: list[Any], *, unseen: bool) -> None:
        """`unseen`: the images vary, but no step is known to be random, so that any transform may be."""
        self._unseen = unseen
        self._known = [(type(owner), name, step) for part in others for owner, name, step in _walk(part)]

    def __call__(self, owner: Any, name: str, transform: Any) -> Any:
        if not self._unseen and not is_random(transform):
            return transform
        for kind, attribute, step in self._known:
            if kind is type(owner) and attribute == name and step is not transform and not is_random(step):
                return step
        return leave_out_random(transform)


def _walk(dataset: Any) -> Iterator[tuple[Any, str, Any]]:
    """Every transform of a dataset and of those it holds, with its owner and the owner's attribute."""
    seen: list[tuple[Any, str, Any]] = []

    def note(owner: Any, name: str, transform: Any) -> Any:
        seen.append((owner, name, transform))
        return transform

    replace_transforms(dataset, note)
    yield from seen


def _steps(transform: Any) -> list[Any]:
    """What a composed transform is made of."""
    if isinstance(transform, list | tuple):
        return list(transform)
    if isinstance(transform, nn.Module):
        return [*transform.children(), *getattr(transform, "transforms", [])]
    steps = getattr(transform, "transforms", getattr(transform, "transform", []))
    return list(steps) if isinstance(steps, list | tuple) else [steps]


def is_random(transform: Any) -> bool:
    """Whether a transform, or a step of it, is one of torchvision's random ones, by its name."""
    draws = bool(_RANDOM.match(type(transform).__name__))
    if isinstance(transform, v1.GaussianBlur | v2.GaussianBlur):
        draws = transform.sigma[0] < transform.sigma[1]
    return draws or any(is_random(step) for step in _steps(transform))


def leave_out_random(transform: Any) -> Any:
    """A composed transform without its random steps, random crops made central; as it is where that is not possible."""
    kind = type(transform)
    if isinstance(transform, v1.Compose | v2.Compose):
        return kind([leave_out_random(step) for step in transform.transforms])
    if isinstance(transform, nn.Sequential):
        steps = [leave_out_random(step) for step in transform]
        return nn.Sequential(*(step if isinstance(step, nn.Module) else nn.Identity() for step in steps))
    if not is_random(transform) or _SIZED.match(kind.__name__):
        return transform
    module = v2 if kind.__module__.startswith(v2.__name__) else v1
    if kind.__name__ == "RandomResizedCrop":
        # As usual in evaluation: the shorter side is the crop's by 8/7, the crop is central.
        return module.Compose([module.Resize(round(max(transform.size) * 8 / 7)), module.CenterCrop(transform.size)])
    if kind.__name__ == "RandomCrop":
        return module.CenterCrop(transform.size)
    return keep if kind.__module__.startswith("torchvision.transforms") else transform


def _varies(dataset: Any, name: str) -> bool:
    """Whether a few images differ when they are drawn a second time."""
    for index in spread(len(dataset), _PROBES):
        with naming_image(dataset, name, index):
            first, second = (to_channels_first(image_of(dataset[index])).numpy() for _ in range(2))
        if not np.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
            return True
    return False
