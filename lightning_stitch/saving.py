"""Saving a network for others: config, weights and card in one folder; what all kinds of networks share in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lightning_stitch.errors import RecipeError
from lightning_stitch.model_card import CardDetails, CardSubject, write_card
from lightning_stitch.pretrained_files import check_rebuildable, check_writable, write_pretrained
from lightning_stitch.pretrained_reading import PretrainedFolder, open_pretrained

_LOADERS = {"network": "StitchedNetwork", "ensemble": "Ensemble", "classifier": "StitchedClassifier"}


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


def open_folder(where: str | Path, *, loader: str, also: str | None = None) -> PretrainedFolder:
    """Find a saved network of one kind.

    Args:
        where: As for `open_pretrained`.
        loader: The class that is to load it.
        also: Another kind that it can take its part from.

    Raises:
        RecipeError: If it is of another kind; the message names the class that loads it.
    """
    folder = open_pretrained(where)
    if _LOADERS[folder.kind] != loader and folder.kind != also:
        raise RecipeError(
            f"{str(where)!r} holds what {_LOADERS[folder.kind]}.from_pretrained loads, not {loader}.from_pretrained."
        )
    return folder
