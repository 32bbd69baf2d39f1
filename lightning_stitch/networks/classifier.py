"""A classifier's folder: its network with head, task and class names, with and without Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lightning_stitch.errors import RecipeError, StitchError, first_lines
from lightning_stitch.heads import HeadSettings, NearestNeighbourHead
from lightning_stitch.hub import CardSubject, PretrainedFolder, open_pretrained, save_folder
from lightning_stitch.networks.network import StitchedNetwork
from lightning_stitch.recipe import Recipe
from lightning_stitch.sources import build_on_meta


@dataclass(frozen=True, slots=True)
class SavedClassifier:
    """A network with its head (`nn.Identity` where there is none) as a folder holds them.

    The arguments are head, task, num_classes and class_names, as `StitchedClassifier` takes them.
    """

    network: StitchedNetwork
    head: nn.Module
    arguments: dict[str, Any]


def save_classifier(model: Any, directory: str | Path, **options: Any) -> None:
    """Write a `StitchedClassifier`'s folder, with the options of `save_folder`; it must have a network."""
    network, settings, names = model.network, model.head_settings, model.class_names
    if network is None or model.head is None:
        raise StitchError(
            "This StitchedClassifier has no network yet, so there is nothing to save. Call fit with a FragmentSearch "
            "among the Trainer's callbacks, or load a checkpoint."
        )
    is_headless = settings.name == "none"
    task = None if is_headless else settings.task
    subject = CardSubject(network.recipe, network.describe(), "StitchedClassifier", task, settings.name, names)
    save_folder(
        {"network": network, "head": model.head},
        directory,
        subject,
        num_outputs=network.num_features if is_headless else settings.num_classes,
        task={
            "head": settings.plain,
            "task": settings.task,
            "num_classes": None if is_headless else settings.num_classes,
            "class_names": names,
        },
        **options,
    )


def load_classifier(where: str | Path, *, trust_factory: bool = False) -> SavedClassifier:
    """Read a classifier's folder, as `StitchedNetwork.from_pretrained` does."""
    folder = open_pretrained(where)
    if folder.kind != "classifier":
        raise RecipeError(
            f"{str(where)!r} holds what StitchedNetwork.from_pretrained loads, not StitchedClassifier.from_pretrained."
        )
    return load_with_head(folder, trust_factory=trust_factory)


def load_with_head(folder: PretrainedFolder, *, trust_factory: bool = False) -> SavedClassifier:
    """The network of a folder of either kind with its head, if it has one."""
    recipe, config = folder.recipe, folder.config
    head, names = config.get("head") or "none", config.get("class_names")
    try:
        _check_indices(head)
        settings = HeadSettings.of(head, task=config.get("task", "multiclass"), num_classes=config.get("num_classes"))
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise StitchError(f"class_names should be a list of names; found {names!r}.")
    except (StitchError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"The head in the config of {folder.where!r} cannot be read: {error}") from error

    def build() -> nn.Module:
        network = StitchedNetwork.from_recipe(recipe, trust_factory=trust_factory)
        return nn.ModuleDict({"network": network, "head": settings.empty_for(recipe)})

    check_classes(recipe, settings)
    parts: Any = folder.load(build, trust_factory=trust_factory)
    network, module = parts["network"], parts["head"]
    if isinstance(module, NearestNeighbourHead) and folder.weights is not None:
        images, targets, voters = len(module.rows), len(module.targets), int(module.num_neighbours)
        if not (images == targets and 1 <= voters <= images):
            raise RecipeError(
                f"The head of {folder.where!r} does not fit itself: {images} images, {targets} targets, {voters} "
                f"neighbours."
            )
    arguments = {"head": settings.plain, "task": settings.task, "num_classes": settings.num_classes or None}
    return SavedClassifier(network, module, {**arguments, "class_names": names})


def check_numbers(recipe: Recipe, settings: HeadSettings, numbers: Mapping[str, Any]) -> None:
    """Refuse tensors ("network. ..." and "head. ...") that are not those of a recipe's network with a head.

    What the recipe asks for is built without memory, since it may come from a stranger. A source that only the user's
    own code can build is left to the loading itself.

    Raises:
        RecipeError: If the structure cannot be built, or a tensor is missing, has no place or another shape.
    """
    check_classes(recipe, settings)
    _check_part("head", lambda: settings.empty_for(recipe), numbers)
    if not any(ref.builder == "python" for ref in recipe.sources):
        _check_part("network", lambda: StitchedNetwork.from_recipe(recipe), numbers)


def check_classes(recipe: Recipe, settings: HeadSettings) -> None:
    """Refuse another number of classes than that of the members whose probabilities a recipe averages."""
    average = recipe.average
    if average is not None and settings.num_classes not in (0, average.num_classes):
        raise RecipeError(
            f"The recipe's members have {average.num_classes} classes, but num_classes={settings.num_classes}."
        )


def _check_part(name: str, build: Callable[[], nn.Module], numbers: Mapping[str, Any]) -> None:
    try:
        part = build_on_meta(build)
    except RecipeError:
        raise
    except Exception as error:  # whatever timm, torchvision or torch meet in a recipe that nobody has tried
        raise RecipeError(f"The {name} that the recipe asks for cannot be built: {first_lines(error)}") from error
    try:
        own = {key.removeprefix(f"{name}."): x for key, x in numbers.items() if key.startswith(f"{name}.")}
        # Assigned, nothing is copied.
        part.load_state_dict(own, strict=True, assign=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise RecipeError(f"The weights do not fit the recipe: {first_lines(error)}") from error


def _check_indices(head: Any) -> None:
    """A saved class map holds indices; ranges in words would be as long as a stranger likes."""
    classes = head.get("classes", {}) if isinstance(head, dict) else {}
    if not all(isinstance(index, int) for indices in classes.values() for index in indices):
        raise StitchError("a saved class map has indices, not words.")
