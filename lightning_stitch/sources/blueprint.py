"""What a spec turns out to mean before any weight is read, and what all kinds of sources share in finding it out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_stitch.errors import SourceError
from lightning_stitch.io import WeightFile
from lightning_stitch.recipe import Builder, Preprocessing

# Arguments with which a builder would read files or the network. A recipe may come from a stranger.
RESERVED_ARGUMENTS: Mapping[str, frozenset[str]] = {
    "timm": frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}),
    "torchvision": frozenset({"pretrained", "weights", "weights_backbone", "pretrained_backbone"}),
}


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A source that was found but not built; the fields are those of SourceRef.

    Attributes:
        spec: What the user wrote.
        name: The short name.
        builder: Which library builds the architecture.
        architecture: The builder's own name for it.
        build: Makes the network with its weights; this is where the slow work is.
        arguments: Keyword arguments that rebuild the architecture without weights; plain JSON.
        preprocessing: None where only the built network can tell.
        licence: None where unknown.
        revision: Commit hash of the weights, where there is one.
        weights: The file of weights that `build` will read; None: none, or only it knows.
        outline: Makes the network without reading weights, of tensors of these names and shapes, if any, loaded as
            `build` would load them. None: only `build` can make it.
    """

    spec: str
    name: str
    builder: Builder
    architecture: str
    build: Callable[[], nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    licence: str | None = None
    revision: str | None = None
    weights: WeightFile | None = None
    outline: Callable[[Mapping[str, Tensor] | None], nn.Module] | None = None


def reserved_arguments(builder: str, arguments: Mapping[str, Any]) -> list[str]:
    """Those of the arguments that would make the builder read files or the network."""
    return sorted(RESERVED_ARGUMENTS.get(builder, frozenset()) & arguments.keys())


def plain_arguments(arguments: Mapping[str, Any] | None, *, builder: Builder) -> dict[str, Any]:
    """The builder's keyword arguments as the recipe will hold them: JSON, tuples turned into lists.

    Raises:
        SourceError: If one is not JSON, or is not the caller's to set.
    """
    if arguments is not None and not isinstance(arguments, Mapping):
        raise SourceError(f"arguments must map the names of the builder's arguments to values; found {arguments!r}.")
    arguments = {str(key): value for key, value in (arguments or {}).items()}
    if reserved := reserved_arguments(builder, arguments):
        raise SourceError(f"arguments may not hold {reserved}: which weights are read is said by the spec alone.")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(arguments))
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"arguments must be plain JSON (numbers, strings, lists, dicts), because the recipe keeps them to rebuild "
            f"the architecture; found {arguments} ({error}). Wrap the network in a factory of your own and give "
            f"'python:your.module:factory'."
        ) from error
    return plain


def preprocessing_from(config: Mapping[str, Any]) -> Preprocessing | None:
    """Preprocessing out of timm's words for it; None where input_size, mean or std is missing.

    Raises:
        SourceError: If the values are of another kind.
    """
    if any(config.get(key) is None for key in ("input_size", "mean", "std")):
        return None
    try:
        channels, height, width = (int(size) for size in config["input_size"])
        return Preprocessing(
            input_size=(channels, height, width),
            mean=tuple(float(value) for value in config["mean"]),
            std=tuple(float(value) for value in config["std"]),
            interpolation=str(config.get("interpolation") or "bilinear"),
            fixed_size=bool(config.get("fixed_input_size", False)),
        )
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"its preprocessing cannot be read ({error}). Give preprocessing=Preprocessing(...)."
        ) from error


def checked_preprocessing(preprocessing: Preprocessing) -> Preprocessing:
    """The same, once its parts fit each other.

    Raises:
        SourceError: If a size is not positive, or mean and std have not one positive value for each channel.
    """
    if not isinstance(preprocessing, Preprocessing):
        raise SourceError(
            f"preprocessing must be a mapping of input_size, mean, std and more, or a Preprocessing(...); found "
            f"{preprocessing!r}."
        )
    size, mean, std = preprocessing.input_size, preprocessing.mean, preprocessing.std
    kinds = isinstance(preprocessing.interpolation, str) and isinstance(preprocessing.fixed_size, bool)
    kinds = kinds and _numbers(size, int) and _numbers(mean, int, float) and _numbers(std, int, float)
    if not kinds or len(size) != 3 or min(size) < 1 or {len(mean), len(std)} != {size[0]} or min(std) <= 0:
        raise SourceError(
            f"preprocessing needs input_size (channels, height, width) and one mean and one positive std for each "
            f"channel, a word for interpolation, and fixed_size true or false; found input_size={size}, mean={mean}, "
            f"std={std}, interpolation={preprocessing.interpolation!r}, fixed_size={preprocessing.fixed_size!r}. Give "
            f"preprocessing=Preprocessing(...)."
        )
    return preprocessing


def _numbers(values: object, *kinds: type) -> bool:
    return isinstance(values, tuple | list) and all(
        isinstance(value, kinds) and not isinstance(value, bool) for value in values
    )


def checked_licence(licence: object) -> str | None:
    """The same, if it is a word.

    Raises:
        SourceError: If it is of another kind.
    """
    if licence is None or isinstance(licence, str):
        return licence
    raise SourceError(f"its licence should be one word, such as 'apache-2.0'; found {licence!r}. Give licence='...'.")
