"""Writing the folder of a stitched network: its config, weights and card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_stitch.errors import RecipeError, StitchError, require_text
from lightning_stitch.hub.card import CardDetails, CardSubject, write_card
from lightning_stitch.hub.folder import (
    ARCHITECTURE,
    CARD,
    FORMAT,
    PICTURE,
    WEIGHTS_NAME,
    public_recipe,
    tensors_of,
)
from lightning_stitch.hub.structure import structure_of
from lightning_stitch.io import CONFIG, UNFINISHED, WEIGHTS, WRITING_MEND, sha256_of, write_json
from lightning_stitch.recipe import Recipe


def check_rebuildable(recipe: Recipe) -> None:
    """Refuse a recipe with a live module, whose structure nobody else could build."""
    live = [ref for ref in recipe.sources if ref.builder == "live"]
    if live:
        raise RecipeError(
            f"Source {live[0].name!r} was given as a live module ({live[0].architecture}), which has no factory that "
            f"could build it elsewhere. Load it as 'python:package.module:factory', with a function that returns such "
            f"a module, and compose again; or share the program itself, which needs no recipe: "
            f"network.export('network.pt2')."
        )


def check_free(directory: str | Path, *, overwrite: bool) -> Path:
    """A folder to save in, which may not be there yet; a StitchError where it is a file or holds a network already."""
    folder = Path(directory).expanduser()
    require_text([str(folder)], "The folder")
    if folder.exists() and not folder.is_dir():
        raise StitchError(f"{folder} is a file; a stitched network is saved in a folder.")
    present = [file for file in (CONFIG, WEIGHTS, CARD, PICTURE) if os.path.lexists(folder / file)]
    if present and not overwrite:
        raise StitchError(f"{folder} already holds {', '.join(present)}. Take another folder, or pass overwrite=True.")
    return folder


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
    """Write config.json, model.safetensors, README.md and, with matplotlib, composition.png; see `save_pretrained`.

    The parts are "network", and "head" where there is one; `num_outputs` is the output's width, `task` a classifier's
    head, task, num_classes and class_names. A file that cannot be overwritten leaves the network that was there.

    Raises:
        RecipeError: If a source is a live module, which cannot be built elsewhere.
        StitchError: If the folder is a file, holds such files already, or cannot be written to.
    """
    check_rebuildable(subject.recipe)
    folder = check_free(directory, overwrite=overwrite)
    weights, config = folder / f"{WEIGHTS}{UNFINISHED}", folder / f"{CONFIG}{UNFINISHED}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_tensors_once(parts), weights, metadata={"format": "pt"})
        # safetensors makes it the owner's alone; whoever may read the folder may read the file.
        weights.chmod(folder.stat().st_mode & 0o666)
        digest = sha256_of(weights)
        # Written over, it is another file than the one that is there: the old config and its weights stay a whole.
        file = f"model-{digest[:16]}.safetensors" if os.path.lexists(folder / WEIGHTS) else WEIGHTS
        facts = {"file": file, "sha256": digest, "bytes": weights.stat().st_size}
        entry = {
            "format": FORMAT,
            "kind": "classifier" if "head" in parts else "network",
            "recipe": public_recipe(subject.recipe),
            **(task or {}),
            "weights": facts,
            **structure_of(parts["network"]),
        }
        write_json(config, _config(entry, subject.recipe.input_size, num_outputs))
        os.replace(weights, folder / file)
        os.replace(config, folder / CONFIG)
        for old in folder.glob("model*.safetensors"):
            if WEIGHTS_NAME.fullmatch(old.name) and old.name != file:
                old.unlink()
    except (OSError, SafetensorError) as error:
        raise StitchError(f"{folder} cannot be written to: {error}. {WRITING_MEND}") from error
    finally:
        with suppress(OSError):
            weights.unlink(missing_ok=True)
            config.unlink(missing_ok=True)
    write_card(subject, folder, details or CardDetails(), name=name or folder.resolve().name)


def _tensors_once(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """All tensors by name, those that have several names once; in memory of their own, as safetensors wants them."""
    tensors = tensors_of(nn.ModuleDict(dict(parts)))
    names = {id(tensor): name for name, tensor in tensors.items()}
    return {name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in names.values()}


def _config(entry: dict[str, Any], input_size: tuple[int, ...], num_outputs: int) -> dict[str, Any]:
    """Our entry, and what `timm.create_model("local-dir:...")` reads."""
    return {
        "architecture": ARCHITECTURE,
        "num_classes": num_outputs,
        **({"label_names": entry["class_names"]} if entry.get("class_names") else {}),
        "pretrained_cfg": {
            "input_size": list(input_size),
            # The network normalises its images itself.
            "mean": [0.0] * input_size[0],
            "std": [1.0] * input_size[0],
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "num_classes": num_outputs,
        },
        ARCHITECTURE: entry,
    }
