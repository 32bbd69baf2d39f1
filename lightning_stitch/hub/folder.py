"""Reading a saved network's config.json, which may come from a stranger or from a newer version."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_stitch.errors import RecipeError, SourceError
from lightning_stitch.recipe import Recipe, SourceRef, known_fields
from lightning_stitch.sources import checked_preprocessing

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ARCHITECTURE = "lightning_stitch"
FORMAT = 2

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
        own.get("kind") in ("network", "classifier")
        and isinstance(weights, dict)
        and isinstance(weights.get("bytes"), int)
        and isinstance(weights.get("sha256"), str)
        and isinstance(shared, dict)
        and all(isinstance(name, str) for name in shared.values())
    ):
        raise RecipeError(f"{CONFIG} of {where!r} is malformed: kind, weights or shared is missing or ill-typed.")
    return own


def read_recipe(own: Mapping[str, Any], where: str) -> Recipe:
    """The recipe in a config.

    Raises:
        RecipeError: If it is malformed, or of another schema.
    """
    try:
        recipe = Recipe.from_dict(_known_recipe(own.get("recipe"), where))
        for ref in recipe.sources:
            checked_preprocessing(ref.preprocessing)
        return recipe
    except (RecipeError, SourceError) as error:
        raise RecipeError(f"The recipe in {CONFIG} of {where!r} cannot be used: {error}") from error


def _known_recipe(plain: Any, where: str) -> Any:
    """The recipe without fields that a newer version of the same schema added; what is ill-typed stays as it is."""
    known, unknown = known_fields(Recipe, plain)
    if unknown:
        _warn_unknown(f"The recipe of {where!r}", sorted(set(unknown)))
    return known


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


def shown_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON for others to read: without the folders of the machine it was made on."""
    plain = recipe.to_dict()
    for entry, ref in zip(plain["sources"], recipe.sources, strict=True):
        entry["spec"] = shown_spec(ref)
    return plain


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors by name: those of the state dict, and buffers that it leaves out."""
    return {**dict(module.named_buffers(remove_duplicate=False)), **module.state_dict(keep_vars=True)}


_LOADERS = {"network": "StitchedNetwork", "classifier": "StitchedClassifier"}
