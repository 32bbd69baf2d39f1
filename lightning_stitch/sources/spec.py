"""What a user may say of a source, checked before anything is looked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_stitch.errors import SourceError
from lightning_stitch.recipe import Builder, Preprocessing

SPECS = (
    "a timm name ('resnet50.a1_in1k'), 'torchvision:NAME', 'local-dir:PATH', 'hf-hub:ORG/NAME[@REVISION]', "
    "'python:package.module:factory', or a live torch.nn.Module"
)
# Arguments with which a builder would read files or the network. A recipe may come from a stranger.
RESERVED_ARGUMENTS: Mapping[str, frozenset[str]] = {
    "timm": frozenset({"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}),
    "torchvision": frozenset({"pretrained", "weights", "weights_backbone", "pretrained_backbone"}),
}


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """What a user says of a source; the fields are the arguments of `load_source`."""

    spec: str | nn.Module
    name: str | None = None
    pretrained: bool = True
    licence: str | None = None
    arguments: Mapping[str, Any] | None = None
    preprocessing: Preprocessing | None = None

    @classmethod
    def of(cls, source: str | nn.Module | Mapping[str, Any]) -> SourceSpec:
        """What stands in a list of sources: a spec, or a mapping of the fields, as a YAML file gives it."""
        if not isinstance(source, Mapping):
            return cls(source)
        allowed = [field.name for field in dataclasses.fields(cls)]
        if "spec" not in source or not source.keys() <= set(allowed):
            raise SourceError(f"A source given as a mapping needs 'spec' and may hold {allowed}; found {list(source)}.")
        options = dict(source)
        if isinstance(preprocessing := options.get("preprocessing"), Mapping):
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in preprocessing.items()}
            try:
                options["preprocessing"] = Preprocessing(**values)
            except TypeError as error:
                raise SourceError(
                    f"Source {show_spec(options['spec'])}: preprocessing cannot be read ({error})."
                ) from error
        return cls(**options)

    def check(self) -> None:
        """Refuse, with a SourceError, values of the wrong kind, as a YAML file may hold them."""
        if self.name is not None and not isinstance(self.name, str):
            raise SourceError(f"name must be text; found {self.name!r}. In YAML, put it in quotes.")
        if not isinstance(self.pretrained, bool):
            raise SourceError(f"pretrained must be true or false; found {self.pretrained!r}.")
        if not isinstance(self.spec, nn.Module) and not (isinstance(self.spec, str) and self.spec.strip()):
            raise SourceError(f"expected {SPECS}.")

    def plain_arguments(self, builder: Builder, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The builder's keyword arguments as the recipe will hold them: JSON, tuples turned into lists.

        Raises:
            SourceError: If one is not JSON, or is reserved.
        """
        if self.arguments is not None and not isinstance(self.arguments, Mapping):
            raise SourceError(f"arguments must map the names of arguments to values; found {self.arguments!r}.")
        arguments = {str(key): value for key, value in {**(defaults or {}), **(self.arguments or {})}.items()}
        if reserved := reserved_arguments(builder, arguments):
            raise SourceError(f"arguments may not hold {reserved}: which weights are read is said by the spec alone.")
        try:
            plain: dict[str, Any] = json.loads(json.dumps(arguments))
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"arguments must be plain JSON, because the recipe keeps them; found {arguments} ({error}). Wrap the "
                f"network in a factory of your own and give 'python:your.module:factory'."
            ) from error
        return plain


def show_spec(spec: object) -> str:
    """A spec in an error; a module's own text would be its whole structure."""
    return type(spec).__name__ if isinstance(spec, nn.Module) else repr(spec)


def reserved_arguments(builder: str, arguments: Mapping[str, Any]) -> list[str]:
    """Those of the arguments that would make the builder read files or the network."""
    return sorted(RESERVED_ARGUMENTS.get(builder, frozenset()) & arguments.keys())


def check_preprocessing(preprocessing: Preprocessing) -> Preprocessing:
    """The same, once its parts fit each other.

    Raises:
        SourceError: If a size is not positive, or mean and std have not one positive value for each channel.
    """
    if not isinstance(preprocessing, Preprocessing):
        raise SourceError(f"preprocessing must be a mapping or a Preprocessing(...); found {preprocessing!r}.")
    size, mean, std = preprocessing.input_size, preprocessing.mean, preprocessing.std
    kinds = isinstance(preprocessing.interpolation, str) and isinstance(preprocessing.fixed_size, bool)
    kinds = kinds and _are_numbers(size, int) and _are_numbers(mean, int, float) and _are_numbers(std, int, float)
    if not kinds or len(size) != 3 or min(size) < 1 or {len(mean), len(std)} != {size[0]} or min(std) <= 0:
        raise SourceError(
            f"preprocessing needs input_size (channels, height, width), one mean and one positive std for each "
            f"channel, a word for interpolation, and fixed_size true or false; found input_size={size}, mean={mean}, "
            f"std={std}, interpolation={preprocessing.interpolation!r}, fixed_size={preprocessing.fixed_size!r}."
        )
    return preprocessing


def _are_numbers(values: object, *kinds: type) -> bool:
    return isinstance(values, tuple | list) and all(
        isinstance(value, kinds) and not isinstance(value, bool) for value in values
    )


def check_licence(licence: object) -> str | None:
    """The same, if it is a word; otherwise a SourceError."""
    if licence is None or isinstance(licence, str):
        return licence
    raise SourceError(f"its licence should be one word, such as 'apache-2.0'; found {licence!r}. Give licence='...'.")
