"""Writing the folder of a stitched network: config.json and model.safetensors, for `pretrained_reading`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_stitch.errors import RecipeError, StitchError
from lightning_stitch.hub.card import CardDetails, CardSubject, write_card
from lightning_stitch.hub.folder import (
    _LOADERS,
    ARCHITECTURE,
    BUILDERS,
    CARD,
    CONFIG,
    FORMAT,
    PICTURE,
    WEIGHTS,
    shown_recipe,
    tensors_of,
)
from lightning_stitch.io import UNFINISHED, raw_bytes, sha256_of, versions, write_json
from lightning_stitch.recipe import Recipe

# Smaller tensors that happen to be alike (counters, zeros) are not worth an entry.
_LEAST_SHARED_BYTES = 1024


def check_rebuildable(recipe: Recipe) -> None:
    """Refuse a recipe whose structure nobody else could build.

    Raises:
        RecipeError: If a source is a live module.
    """
    live = [ref for ref in recipe.sources if ref.builder == "live"]
    if live:
        raise RecipeError(
            f"Source {live[0].name!r} was given as a live module ({live[0].architecture}), which has no factory that "
            f"could build it elsewhere. Load it as 'python:package.module:factory', with a function that returns such "
            f"a module, and compose again; or share the program itself, which needs no recipe: "
            f"torch.export.save(torch.export.export(network.eval(), (images,)), 'network.pt2')."
        )


def check_writable(directory: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds what would be written.

    Raises:
        StitchError: If it does, or is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise StitchError(f"{directory} is a file; a stitched network is saved in a folder.")
    there = [name for name in (CONFIG, WEIGHTS, CARD, PICTURE) if os.path.lexists(directory / name)]
    if there and not overwrite:
        raise StitchError(f"{directory} already holds {', '.join(there)}. Take another folder, or pass overwrite=True.")


def write_pretrained(
    parts: Mapping[str, nn.Module],
    directory: Path,
    *,
    recipe: Recipe,
    kind: str,
    num_outputs: int,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors; weights that are alike are there once.

    Args:
        parts: "network", and "head" where there is one.
        directory: The folder; made if it does not exist.
        recipe: The structure of the network.
        kind: "network" or "classifier".
        num_outputs: Width of the output.
        task: For a classifier its head, task, num_classes and class_names.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors, shared = _without_doubles(_state_of(parts))
    weights, written = directory / f"{WEIGHTS}{UNFINISHED}", directory / f"{CONFIG}.new"
    try:
        save_file(tensors, weights, metadata={"format": "pt"})
        # safetensors makes it the owner's alone; whoever may read the folder may read the file.
        weights.chmod(directory.stat().st_mode & 0o666)
        facts = {"sha256": sha256_of(weights), "bytes": weights.stat().st_size}
        write_json(written, _config(recipe, kind, num_outputs, {**(task or {}), "weights": facts, "shared": shared}))
        # Both are complete: a folder that is written over is one network or the other.
        os.replace(weights, directory / WEIGHTS)
        os.replace(written, directory / CONFIG)
    finally:
        weights.unlink(missing_ok=True)
        written.unlink(missing_ok=True)


def _config(recipe: Recipe, kind: str, num_outputs: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    own = {"format": FORMAT, "kind": kind, "recipe": shown_recipe(recipe), **facts, "versions": versions(*BUILDERS)}
    names = own.get("class_names")
    return {
        # What timm.create_model("local-dir:...") reads. The network normalises its images itself: mean 0, std 1.
        "architecture": ARCHITECTURE,
        "num_classes": num_outputs,
        **({"label_names": names} if names else {}),
        "pretrained_cfg": {
            "input_size": list(recipe.input_size or ()),
            "mean": [0.0] * (recipe.input_size or (3,))[0],
            "std": [1.0] * (recipe.input_size or (3,))[0],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "num_classes": num_outputs,
        },
        ARCHITECTURE: own,
    }


def _state_of(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor.detach()
        for part, module in parts.items()
        for name, tensor in tensors_of(module).items()
    }


def _without_doubles(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of different numbers, and of the others by which name they are to be found."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    memories: set[int] = set()
    for name, tensor in state.items():
        numbers = tensor.contiguous().cpu()
        key = (numbers.dtype, tuple(numbers.shape), hashlib.sha256(raw_bytes(numbers)).digest())
        if numbers.nbytes >= _LEAST_SHARED_BYTES and key in seen:
            shared[name] = seen[key]
            continue
        seen[key] = name
        memory = numbers.untyped_storage()
        if memory.data_ptr() in memories or memory.nbytes() != numbers.nbytes:
            # Two small tensors may be one and the same, or parts of one, which safetensors refuses.
            numbers = numbers.clone()
        memories.add(memory.data_ptr())
        tensors[name] = numbers
    return tensors, shared


def save_folder(
    parts: Mapping[str, nn.Module],
    directory: str | Path,
    subject: CardSubject,
    *,
    num_outputs: int,
    task: Mapping[str, Any] | None = None,
    details: CardDetails | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write config.json, model.safetensors, README.md and, with matplotlib, composition.png.

    Args:
        parts: "network", and "head" where there is one.
        directory: The folder; made if it does not exist.
        subject: What is saved.
        num_outputs: Width of the output.
        task: For a classifier its head, task, num_classes and class_names.
        details: What the author says; None: nothing.
        name: For the card; None: the folder's.
        overwrite: Replace files of these names.

    Raises:
        RecipeError: If a source is a live module, which cannot be built elsewhere.
        StitchError: If the folder holds such files already.
    """
    folder = Path(directory).expanduser()
    check_rebuildable(subject.recipe)
    check_writable(folder, overwrite=overwrite)
    kind = next(kind for kind, loader in _LOADERS.items() if loader == subject.loader)
    write_pretrained(parts, folder, recipe=subject.recipe, kind=kind, num_outputs=num_outputs, task=task)
    write_card(subject, folder, details or CardDetails(), name=name or folder.resolve().name)
