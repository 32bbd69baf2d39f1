"""Sources that the user's own Python makes: factories, and live modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_stitch.cutting import copy_module
from lightning_stitch.errors import SourceError, first_lines
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources.blueprint import Blueprint, preprocessing_from
from lightning_stitch.sources.spec import SourceSpec


def find_factory(spec: SourceSpec, path: str) -> Blueprint:
    """A callable that returns a module with the weights it wants; `pretrained` is not its business."""
    _import_factory(path)
    arguments = spec.plain_arguments("python")
    return Blueprint(
        spec=f"python:{path}",
        name=path.rpartition(":")[2],
        builder="python",
        architecture=path,
        build=partial(call_factory, path, arguments),
        arguments=arguments,
    )


def _import_factory(path: str) -> Callable[..., nn.Module]:
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise SourceError(f"expected 'python:package.module:factory'; found 'python:{path}'.")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the user's module may raise anything
        raise SourceError(
            f"{path!r} cannot be imported: {module_name} raises {first_lines(error)}. Check the spelling, what it does "
            f"when imported, and that its folder is on PYTHONPATH."
        ) from error
    if not callable(factory):
        raise SourceError(f"{path!r} is no callable but a {type(factory).__name__}; expected a factory of modules.")
    return factory


def call_factory(path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network with the user's code."""
    factory = _import_factory(path)
    try:
        module = factory(**arguments)
    except Exception as error:  # the user's code may raise anything
        raise SourceError(f"{path!r} raised {first_lines(error)} when called with {dict(arguments)}.") from error
    if not isinstance(module, nn.Module):
        raise SourceError(f"{path!r} returned a {type(module).__name__}; expected a torch.nn.Module.")
    return module


def find_module(spec: SourceSpec) -> Blueprint:
    """A live module, copied so that neither eval mode here nor training there touches the other."""
    module = spec.spec
    assert isinstance(module, nn.Module)
    if not spec.name:
        raise SourceError("a live module needs a name: load_source(module, name=...).")
    qualified = f"{type(module).__module__}.{type(module).__qualname__}"
    return Blueprint(
        spec=f"live:{qualified}",
        name=spec.name,
        builder="live",
        architecture=qualified,
        build=partial(_copy, module),
        preprocessing=spec.preprocessing or declared_preprocessing(module),
        licence=declared_config(module).get("license"),
        outline=lambda _: _copy(module),
    )


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy_module(module)
    except Exception as error:  # a module may hold anything
        raise SourceError(
            f"{type(module).__name__} cannot be copied: {first_lines(error)}. Remove what cannot be (open files, "
            f"locks), or load it as 'python:package.module:factory'."
        ) from error


def declared_config(module: nn.Module) -> dict[str, Any]:
    """What a module of timm's kind says of its weights; empty for others."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    return dict(config) if isinstance(config, Mapping) else dict(vars(config))


def declared_preprocessing(module: nn.Module) -> Preprocessing:
    """The module's own word: timm's pretrained_cfg, or attributes of the same names."""
    keys = ("input_size", "mean", "std", "interpolation")
    config = declared_config(module) or {key: getattr(module, key) for key in keys if hasattr(module, key)}
    preprocessing = preprocessing_from(config)
    if preprocessing is None:
        raise SourceError(
            f"{type(module).__name__} does not say how it wants its images. Give preprocessing=Preprocessing("
            f"input_size=(channels, height, width), mean=(...), std=(...)), from lightning_stitch.recipe."
        )
    return preprocessing
