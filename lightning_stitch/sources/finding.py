"""From what a user says to a source that was found: its configuration and its files are known, no weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_stitch.errors import SourceError
from lightning_stitch.sources.blueprint import Blueprint
from lightning_stitch.sources.python_modules import find_factory, find_module
from lightning_stitch.sources.spec import SPECS, SourceSpec, check_licence, check_preprocessing, show_spec
from lightning_stitch.sources.timm_models import find_in_folder, find_in_registry, find_on_hub
from lightning_stitch.sources.torchvision_models import find_in_torchvision

AnySource = str | nn.Module | Mapping[str, Any] | Blueprint
"""What a list of sources may hold: specs, mappings of the fields of `SourceSpec`, and what was found already."""

_FINDERS: dict[str, Callable[[SourceSpec, str], Blueprint]] = {
    "torchvision": find_in_torchvision,
    "local-dir": find_in_folder,
    "hf-hub": find_on_hub,
    "python": find_factory,
}


def find_source(spec: SourceSpec) -> Blueprint:
    """Find a source; what the user says of it holds before what it says of itself.

    Raises:
        SourceError: If the source cannot be found or reached; names the spec.
    """
    try:
        spec.check()
        blueprint = find_module(spec) if isinstance(spec.spec, nn.Module) else _find_by_prefix(spec, spec.spec)
        preprocessing = spec.preprocessing or blueprint.preprocessing
        return dataclasses.replace(
            blueprint,
            name=spec.name or blueprint.name,
            licence=check_licence(spec.licence or blueprint.licence),
            preprocessing=check_preprocessing(preprocessing) if preprocessing else None,
        )
    except SourceError as error:
        raise SourceError(f"Source {show_spec(spec.spec)}: {error}") from error


def find_sources(sources: Sequence[AnySource]) -> list[Blueprint]:
    """Find several sources, without their weights; those that were found already are taken as they are.

    Raises:
        SourceError: If there are none, or some cannot be found; all of those are named.
    """
    check_list(sources)
    blueprints, failures = [], []
    for source in sources:
        try:
            blueprints.append(source if isinstance(source, Blueprint) else find_source(SourceSpec.of(source)))
        except SourceError as error:
            failures.append(str(error))
    if failures:
        listed = "\n".join(f"- {failure}" for failure in failures)
        raise SourceError(f"{len(failures)} of {len(sources)} sources cannot be had; nothing was loaded.\n{listed}")
    return blueprints


def check_list(sources: object) -> None:
    """Refuse, with a SourceError, one source alone and an empty list."""
    if isinstance(sources, str | nn.Module | Mapping) or not sources:
        raise SourceError(f"Expected a list of sources, each {SPECS}, or a mapping; found {sources!r}.")


def make_distinct(names: Sequence[str]) -> list[str]:
    """Names of sources that can be told apart: one that occurs again gets "#2", "#3", ... behind it."""
    taken: list[str] = []
    for name in names:
        numbered = (f"{name}#{count}" for count in range(2, len(names) + 1))
        taken.append(next(candidate for candidate in (name, *numbered) if candidate not in taken))
    return taken


def _find_by_prefix(spec: SourceSpec, text: str) -> Blueprint:
    prefix, colon, rest = text.partition(":")
    if not colon:
        return find_in_registry(spec, text)
    if prefix not in _FINDERS:
        raise SourceError(f"unknown prefix {prefix!r}. Expected {SPECS}.")
    if not rest:
        raise SourceError(f"nothing follows {prefix!r}. Expected {SPECS}.")
    return _FINDERS[prefix](spec, rest)
