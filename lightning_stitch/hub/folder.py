"""What a saved folder holds, and reading its config.json, which may come from a stranger or from a newer version."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_stitch.errors import RecipeError, SourceError
from lightning_stitch.io import CONFIG
from lightning_stitch.recipe import Recipe, SourceRef
from lightning_stitch.sources import check_preprocessing

ARCHITECTURE = "lightning_stitch"
FORMAT = 2
BUILDERS = ("lightning_stitch", "torch", "torchvision", "timm")  # what builds a structure
CARD, PICTURE = "README.md", "composition.png"

# Another file than the one that is there, so that a folder is written over by one rename, that of its config.
WEIGHTS_NAME = re.compile(r"model(-[0-9a-f]{16})?\.safetensors")
_KEYS = {"format", "kind", "recipe", "head", "task", "num_classes", "class_names", "weights", "nodes", "versions"}


def read_config(path: Path, where: str) -> tuple[dict[str, Any], Recipe]:
    """What a config holds of this package's, once the parts that loading needs are checked, and its recipe."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))[ARCHITECTURE]
        config_format = config["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RecipeError(
            f"{CONFIG} of {where!r} is not that of a stitched network: it has no readable entry {ARCHITECTURE!r} "
            f"({type(error).__name__}: {error}). For a network of timm's use timm.create_model or load_source."
        ) from error
    if config_format != FORMAT:
        raise RecipeError(
            f"{where!r} was saved in format {config_format!r}; this version of lightning_stitch reads format {FORMAT}. "
            f"Upgrade lightning_stitch if it is newer."
        )
    if unknown := sorted(config.keys() - _KEYS):
        raise RecipeError(
            f"{CONFIG} of {where!r} has {', '.join(unknown)}, which this version of lightning_stitch does not know. "
            f"Upgrade lightning_stitch if a newer one wrote it."
        )
    match config:
        case {"kind": "network" | "classifier", "weights": {"file": str(file), "bytes": int(), "sha256": str()}} if (
            WEIGHTS_NAME.fullmatch(file)
        ):
            pass
        case _:
            raise RecipeError(f"{CONFIG} of {where!r} is malformed: kind or weights is missing or ill-typed.")
    try:
        recipe = Recipe.from_dict(config.get("recipe", {}))
        for ref in recipe.sources:
            check_preprocessing(ref.preprocessing)
    except (RecipeError, SourceError) as error:
        raise RecipeError(f"The recipe in {CONFIG} of {where!r} cannot be used: {error}") from error
    return config, recipe


def public_spec(ref: SourceRef) -> str:
    """A source's spec without the folders of the machine it was made on."""
    prefix, colon, rest = ref.spec.partition(":")
    return f"local-dir:{Path(rest).name}" if colon and prefix == "local-dir" else ref.spec


def public_recipe(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON for others to read: without the folders of the machine it was made on."""
    plain = recipe.to_dict()
    for entry, ref in zip(plain["sources"], recipe.sources, strict=True):
        entry["spec"] = public_spec(ref)
    return plain


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors by name: those of the state dict, and buffers that it leaves out."""
    return {**dict(module.named_buffers(remove_duplicate=False)), **module.state_dict(keep_vars=True)}
