"""Reading a saved network's config.json, which may come from a stranger or from a newer version."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_stitch.errors import RecipeError, SourceError
from lightning_stitch.recipe import (
    Branch,
    EnsembleRecipe,
    FragmentRef,
    Member,
    Preprocessing,
    Recipe,
    SourceRef,
    StitchSpec,
    any_recipe,
)
from lightning_stitch.sources import checked_preprocessing

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ARCHITECTURE = "lightning_stitch"
FORMAT = 1

_KNOWN = {"format", "kind", "recipe", "head", "task", "num_classes", "class_names", "weights", "shared", "versions"}
MOST_CONFIG_BYTES = 64 * 2**20


def read_config(path: Path, where: str) -> dict[str, Any]:
    """What a config holds of this package's, the parts that loading needs checked.

    Raises:
        RecipeError: If it is no config of a stitched network, or of another format.
    """
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise RecipeError(f"{CONFIG} of {where!r} has {path.stat().st_size} bytes; that is no recipe.")
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        own = whole[ARCHITECTURE]
        form = own["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"{CONFIG} of {where!r} is not that of a stitched network: it has no readable entry {ARCHITECTURE!r} "
            f"({type(error).__name__}: {error}). For a network of timm's use timm.create_model or load_source."
        ) from error
    if form != FORMAT:
        raise RecipeError(
            f"{where!r} was saved in format {form!r}; this version of lightning_stitch reads format {FORMAT}. Upgrade "
            f"lightning_stitch if it is newer."
        )
    if unknown := sorted(own.keys() - _KNOWN):
        _warn_unknown(f"{CONFIG} of {where!r}", unknown)
    own = {"shared": {}, **own}
    weights = own.get("weights")
    shared = own["shared"]
    if not (
        own.get("kind") in ("network", "ensemble", "classifier")
        and isinstance(weights, dict)
        and isinstance(weights.get("bytes"), int)
        and isinstance(weights.get("sha256"), str)
        and isinstance(shared, dict)
        and all(isinstance(name, str) for name in shared.values())
    ):
        raise RecipeError(f"{CONFIG} of {where!r} is malformed: kind, weights or shared is missing or ill-typed.")
    return own


def read_recipe(own: Mapping[str, Any], where: str) -> Recipe | EnsembleRecipe:
    """The recipe in a config.

    Raises:
        RecipeError: If it is malformed, or of another schema.
    """
    try:
        recipe = any_recipe(_known_recipe(own.get("recipe"), where))
        for ref in recipe.sources:
            checked_preprocessing(ref.preprocessing)
        return recipe
    except (RecipeError, SourceError) as error:
        raise RecipeError(f"The recipe in {CONFIG} of {where!r} cannot be used: {error}") from error


def _known_recipe(plain: Any, where: str) -> Any:
    """The recipe without fields that a newer version of the same schema added; what is ill-typed stays as it is."""
    unknown: list[str] = []

    def known(value: Any, cls: type, inside: Mapping[str, type] | None = None) -> Any:
        if not isinstance(value, dict):
            return value
        names = {field.name for field in fields(cls)}
        unknown.extend(f"{cls.__name__}.{key}" for key in value if key not in names)
        kept = {key: item for key, item in value.items() if key in names}
        for key, part in (inside or {}).items():
            if isinstance(kept.get(key), list):
                kept[key] = [known(item, part, _INSIDE.get(part)) for item in kept[key]]
            elif key in kept:
                kept[key] = known(kept[key], part, _INSIDE.get(part))
        return kept

    ensemble = isinstance(plain, dict) and plain.get("kind") == "ensemble"
    cls: type = EnsembleRecipe if ensemble else Recipe
    found = known(plain, cls, _INSIDE[cls])
    if unknown:
        _warn_unknown(f"The recipe of {where!r}", sorted(set(unknown)))
    return found


_INSIDE: dict[type, dict[str, type]] = {
    Recipe: {"sources": SourceRef, "fragments": FragmentRef, "stitches": StitchSpec},
    EnsembleRecipe: {"sources": SourceRef, "branches": Branch, "members": Member},
    SourceRef: {"preprocessing": Preprocessing},
    Branch: {"fragment": FragmentRef, "stitch": StitchSpec},
}


def _warn_unknown(what: str, names: list[str]) -> None:
    warnings.warn(
        f"{what} has {', '.join(names)}, which this version of lightning_stitch does not know and leaves out; a newer "
        f"one may have written it.",
        stacklevel=5,
    )


BUILDERS = ("lightning_stitch", "torch", "torchvision", "timm")  # what builds a structure
CARD, PICTURE = "README.md", "composition.png"


def shown_spec(ref: SourceRef) -> str:
    """A source's spec without the folders of the machine it was made on."""
    prefix, colon, rest = ref.spec.partition(":")
    return f"local-dir:{Path(rest).name}" if colon and prefix == "local-dir" else ref.spec


def shown_recipe(recipe: Recipe | EnsembleRecipe) -> dict[str, Any]:
    """A recipe as plain JSON for others to read: without the folders of the machine it was made on."""
    plain = recipe.to_dict()
    for entry, ref in zip(plain["sources"], recipe.sources, strict=True):
        entry["spec"] = shown_spec(ref)
    return plain


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors by name: those of the state dict, and buffers that it leaves out."""
    return {**dict(module.named_buffers(remove_duplicate=False)), **module.state_dict(keep_vars=True)}


_LOADERS = {"network": "StitchedNetwork", "ensemble": "Ensemble", "classifier": "StitchedClassifier"}
