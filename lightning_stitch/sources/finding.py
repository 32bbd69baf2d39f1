"""From what a user writes to a source that was found, with its configuration but without its weights."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_stitch.errors import SourceError
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources import timm_models as timm_sources
from lightning_stitch.sources.blueprint import Blueprint, checked_licence, checked_preprocessing
from lightning_stitch.sources.other_modules import from_factory, from_module, from_torchvision

SPECS = (
    "a timm name ('resnet50.a1_in1k'), 'torchvision:NAME', 'local-dir:PATH', 'hf-hub:ORG/NAME[@REVISION]', "
    "'python:package.module:factory', or a live torch.nn.Module"
)


def find_source(
    spec: str | nn.Module,
    *,
    name: str | None = None,
    pretrained: bool = True,
    licence: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> Blueprint:
    """Find a source, with the user's overrides; every failure names the spec."""
    try:
        if name is not None and not isinstance(name, str):
            raise SourceError(f"name must be text; found {name!r}. In YAML, put it in quotes.")
        if not isinstance(pretrained, bool):
            raise SourceError(f"pretrained must be true or false; found {pretrained!r}.")
        if isinstance(spec, nn.Module):
            found = from_module(spec, name, preprocessing)
        elif isinstance(spec, str) and spec.strip():
            found = _find_text(spec, pretrained, arguments)
        else:
            raise SourceError(f"expected {SPECS}.")
        chosen = preprocessing or found.preprocessing
        return dataclasses.replace(
            found,
            name=name or found.name,
            licence=checked_licence(licence or found.licence),
            preprocessing=checked_preprocessing(chosen) if chosen else None,
        )
    except SourceError as error:
        raise SourceError(f"Source {_shown(spec)}: {error}") from error


def find_mapping(options: Mapping[str, Any]) -> Blueprint:
    """A source given with options, as a YAML file gives it."""
    allowed = list(inspect.signature(find_source).parameters)
    if "spec" not in options or not options.keys() <= set(allowed):
        raise SourceError(f"A source given as a mapping needs 'spec' and may hold {allowed}; found {list(options)}.")
    chosen = dict(options)
    wanted = chosen.get("preprocessing")
    if isinstance(wanted, Mapping):
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in wanted.items()
        }
        try:
            chosen["preprocessing"] = Preprocessing(**fields)
        except TypeError as error:
            raise SourceError(f"Source {_shown(options['spec'])}: preprocessing cannot be read ({error}).") from error
    return find_source(**chosen)


def _shown(spec: object) -> str:
    """A spec in an error; a module's own text would be its whole structure."""
    return type(spec).__name__ if isinstance(spec, nn.Module) else repr(spec)


def _find_text(spec: str, pretrained: bool, arguments: Mapping[str, Any] | None) -> Blueprint:
    """Dispatch on the prefix."""
    prefix, colon, rest = spec.partition(":")
    if not colon:
        return timm_sources.from_registry(spec, pretrained=pretrained, arguments=arguments)
    finders: dict[str, Callable[..., Blueprint]] = {
        "torchvision": from_torchvision,
        "local-dir": timm_sources.from_folder,
        "hf-hub": timm_sources.from_hub,
        "python": from_factory,
    }
    if prefix not in finders:
        raise SourceError(f"unknown prefix {prefix!r}. Expected {SPECS}.")
    if not rest:
        raise SourceError(f"nothing follows {prefix!r}. Expected {SPECS}.")
    return finders[prefix](spec, rest, pretrained=pretrained, arguments=arguments)


def distinct(names: Sequence[str]) -> list[str]:
    """Names of sources that can be told apart: one that occurs again gets "#2", "#3", ... behind it."""
    taken: dict[str, None] = {}
    for given in names:
        name, count = given, 1
        while name in taken:
            count += 1
            name = f"{given}#{count}"
        taken[name] = None
    return list(taken)
