"""A classifier's folder: its network with head, task and class names, with and without Lightning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lightning_stitch.errors import RecipeError, StitchError
from lightning_stitch.heads import HeadSettings, NearestNeighbourHead
from lightning_stitch.hub import CardDetails, CardSubject, PretrainedFolder, open_folder, save_folder
from lightning_stitch.networks.network import StitchedNetwork
from lightning_stitch.recipe import Recipe


class Classifier(Protocol):
    """What is saved of a classifier."""

    network: StitchedNetwork | None
    head: nn.Module | None
    head_settings: HeadSettings

    @property
    def class_names(self) -> list[str] | None:
        """Names of the outputs, where they are known."""
        ...


@dataclass(frozen=True, slots=True)
class SavedClassifier:
    """A classifier as a folder holds it.

    Attributes:
        network: The network.
        head: What reads its output.
        arguments: head, task, num_classes and class_names, as `StitchedClassifier` takes them.
        num_outputs: Width of the head's output; None: that of the network, which has no head.
    """

    network: StitchedNetwork
    head: nn.Module
    arguments: dict[str, Any]
    num_outputs: int | None


def save_classifier(
    model: Classifier,
    directory: str | Path,
    *,
    details: CardDetails | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a classifier's folder.

    Raises:
        StitchError: If it has no network yet, or as `save_folder`.
    """
    network, head, settings = model.network, model.head, model.head_settings
    if network is None or head is None:
        raise StitchError(
            "This StitchedClassifier has no network yet, so there is nothing to save. Call fit with a FragmentSearch "
            "among the Trainer's callbacks, or load a checkpoint."
        )
    silent = settings.name == "none"
    subject = CardSubject(
        network.recipe,
        network.describe(),
        "StitchedClassifier",
        None if silent else settings.task,
        settings.name,
        model.class_names,
    )
    task = {
        "head": settings.plain,
        "task": settings.task,
        "num_classes": None if silent else settings.num_classes,
        "class_names": model.class_names,
    }
    width = network.num_features if silent else settings.num_classes
    save_folder(
        {"network": network, "head": head},
        directory,
        subject,
        num_outputs=width,
        task=task,
        details=details,
        name=name,
        overwrite=overwrite,
    )


def load_classifier(where: str | Path, *, trust_factory: bool = False) -> SavedClassifier:
    """Read a classifier's folder, as `StitchedNetwork.from_pretrained` does.

    Raises:
        RecipeError: If it is no classifier's, or its head cannot be read, or as there.
    """
    return read_classifier(open_folder(where, loader="StitchedClassifier"), trust_factory=trust_factory)


def read_classifier(folder: PretrainedFolder, *, trust_factory: bool = False) -> SavedClassifier:
    """The same of a folder that was found."""
    recipe = folder.recipe
    arguments = {key: folder.config.get(key) for key in ("head", "task", "num_classes", "class_names")}
    names = arguments["class_names"]
    try:
        _check_written_out(arguments["head"])
        settings = HeadSettings.of(
            arguments["head"] or "none", task=str(arguments["task"]), num_classes=arguments["num_classes"]
        )
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise StitchError(f"class_names should be a list of names; found {names!r}.")
    except (StitchError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"The head in the config of {folder.where!r} cannot be read: {error}") from error

    def build() -> nn.Module:
        network = StitchedNetwork.from_recipe(recipe, trust_factory=trust_factory)
        return nn.ModuleDict({"network": network, "head": empty_head(settings, recipe)})

    parts = folder.load(build, trust_factory=trust_factory)
    network: Any = parts.get_submodule("network")
    head = parts.get_submodule("head")
    if isinstance(head, NearestNeighbourHead) and folder.weights is not None:
        _check_neighbours(head, folder.where)
    outputs = None if settings.name == "none" else settings.num_classes
    return SavedClassifier(network, head, {**arguments, "head": settings.plain}, outputs)


def empty_head(settings: HeadSettings, recipe: Recipe) -> nn.Module:
    """The head of a composition, without numbers; `nn.Identity` where the composition averages heads of its own."""
    return settings.empty(recipe.num_features) if recipe.average is None else nn.Identity()


def _check_written_out(head: Any) -> None:
    """A saved class map holds indices; ranges in words would be as long as a stranger likes."""
    classes = head.get("classes") if isinstance(head, dict) else None
    if isinstance(classes, dict) and any(isinstance(i, str) for found in classes.values() for i in _listed(found)):
        raise StitchError("a saved class map has indices, not words.")


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


def _check_neighbours(head: NearestNeighbourHead, where: str) -> None:
    images, targets, voters = len(head.rows), len(head.targets), int(head.num_neighbours)
    if not (images == targets and 1 <= voters <= images):
        raise RecipeError(
            f"The head of {where!r} does not fit itself: {images} images, {targets} targets, {voters} neighbours."
        )
