"""A finished classifier, out of a checkpoint or a saved folder."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_stitch._lightning import NAMESPACE, pl
from lightning_stitch.errors import StitchError, first_lines
from lightning_stitch.heads import HeadSettings
from lightning_stitch.io import check_content
from lightning_stitch.networks import check_numbers, saved_backbones
from lightning_stitch.recipe import Recipe
from lightning_stitch.sources import check_preprocessing
from lightning_stitch.training.module import StitchedClassifier


def open_classifier(checkpoint: str | Path) -> StitchedClassifier:
    """A classifier from a checkpoint of either Lightning package, on the CPU; nothing in the file is executed.

    Of a module of your own it takes the StitchedBackbone, and the linear layer behind it that `FragmentSearch` fitted.

    Args:
        checkpoint: A checkpoint, or what `StitchedClassifier.from_pretrained` takes: a folder, or "hf-hub:ORG/NAME".

    Raises:
        StitchError: If there is no such file, or it is no checkpoint of a StitchedClassifier with a network, nor of
            a module whose search fitted a head behind a StitchedBackbone (`head_attribute`).
    """
    path = Path(checkpoint)
    if path.is_dir() or str(checkpoint).startswith(("hf-hub:", "local-dir:")):
        return StitchedClassifier.from_pretrained(str(checkpoint))
    if not path.is_file():
        raise StitchError(f"The checkpoint {path} {'is not a file' if path.exists() else 'does not exist'}.")
    check_content(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        numbers = content["state_dict"]
        is_own = isinstance(numbers, dict) and bool(saved_backbones(numbers))
        hparams = {"recipe": {}} if is_own else content[pl.LightningModule.CHECKPOINT_HYPER_PARAMS_KEY]
        plain, head, task = hparams["recipe"], hparams.get("head", "ridge"), hparams.get("task", "multiclass")
    except Exception as error:  # whatever torch's readers find in a file of another kind
        raise StitchError(
            f"{path} is not a checkpoint of a StitchedClassifier that can be read safely: {type(error).__name__}."
        ) from error
    if is_own:
        return _loading(path, lambda: StitchedClassifier.of_state(numbers))
    if plain is None:
        raise StitchError(f"{path} holds no network: it was saved before one was composed.")
    if "_instantiator" in hparams:
        # A command line under the other package wrote it; that package's maker of modules would be refused by this one.
        hparams["_instantiator"] = f"{NAMESPACE}.cli.instantiate_module"
    copy = io.BytesIO()
    torch.save(content, copy)
    copy.seek(0)

    def load() -> StitchedClassifier:
        recipe = Recipe.from_dict(plain)
        for ref in recipe.sources:
            check_preprocessing(ref.preprocessing)
        settings = HeadSettings.of(head, task=task, num_classes=hparams.get("num_classes"))
        # Before there is a module, which is built with memory, as are its metrics for each class.
        check_numbers(recipe, settings, numbers)
        return StitchedClassifier.load_from_checkpoint(copy, map_location="cpu", weights_only=True)

    return _loading(path, load)


def _loading(path: Path, load: Callable[[], StitchedClassifier]) -> StitchedClassifier:
    """What is loaded; errors name the file."""
    try:
        return load()
    except StitchError as error:
        raise type(error)(f"{path} cannot be loaded: {error}") from error
    except Exception as error:  # whatever Lightning and torch meet in values that nobody has tried
        raise StitchError(f"{path} cannot be loaded: {first_lines(error)}") from error
