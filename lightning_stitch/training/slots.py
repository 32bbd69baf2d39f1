"""The attribute of a user's own LightningModule that `FragmentSearch` puts a stitched network into."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stitch._lightning import check_same_namespace, pl
from lightning_stitch.cutting import in_eval_mode
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import RecipeError, StitchError, nearest
from lightning_stitch.heads import HeadSettings
from lightning_stitch.maths import AffineMap
from lightning_stitch.networks import (
    HOOK,
    StitchedBackbone,
    StitchedNetwork,
    announce,
    put,
    restore_backbones,
    saved_backbones,
)
from lightning_stitch.recipe import Recipe
from lightning_stitch.stitching import fit_rows
from lightning_stitch.training.head_fitting import shared_head
from lightning_stitch.training.module import StitchedClassifier
from lightning_stitch.training.resuming import resumed_checkpoint


class BackboneSlot:
    """One attribute of a module, by dotted name.

    Args:
        module: The user's module.
        attribute: The attribute's name, as "backbone" or "model.encoder".
        head_attribute: That of the linear layer from the backbone's vectors to the classes; None: it is left alone.

    Attributes:
        head_settings: What networks are ranked for, and the head fitted to: the data's targets, since `check_head`.

    Raises:
        StitchError: If the module has no such submodule, or none that a stitched network can stand in for.
    """

    def __init__(self, module: pl.LightningModule, attribute: str, head_attribute: str | None = None) -> None:
        self.module = module
        self.attribute = attribute
        self.head_attribute = head_attribute
        self.head_settings = HeadSettings.of("none", num_classes=None)
        try:
            found = module.get_submodule(attribute) if attribute else None
        except AttributeError:
            found = None
        if found is None:
            names = [name for name, _ in module.named_modules() if name]
            raise StitchError(
                f"FragmentSearch(attribute={attribute!r}): {type(module).__name__} has no submodule of that name; "
                f"the nearest are {nearest(attribute, names) or 'none'}. Assign a StitchedBackbone to it in __init__."
            )
        self.present: nn.Module = found
        if isinstance(found, StitchedBackbone) and found.announces_width and not hasattr(module, HOOK):
            raise StitchError(
                f"{type(module).__name__}.{attribute} is a StitchedBackbone() of no known width, and the module has no "
                f"{HOOK}(self, backbone) that could be told. Give StitchedBackbone(num_features=...), or define that "
                f"method: it is called before configure_optimizers, and backbone.num_features is the width."
            )

    @property
    def recipe(self) -> dict[str, Any] | None:
        """The recipe of the network that is in it; None: there is none."""
        present = self.present
        if not isinstance(present, StitchedBackbone) or present.recipe is None:
            return None
        return present.recipe.to_dict()

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take the structure that a checkpoint holds.

        Raises:
            RecipeError: If it holds none for this attribute.
        """
        saved = saved_backbones(checkpoint["state_dict"])
        if saved.get(self.attribute, {}).get("recipe") is None:
            raise RecipeError(
                f"This checkpoint holds no stitched network for {self.attribute!r}; it has some for {sorted(saved)}. "
                f"It was saved by a run without FragmentSearch(attribute={self.attribute!r})."
            )
        restore_backbones(self.module, checkpoint)
        self.present = self.module.get_submodule(self.attribute)

    def install(
        self,
        network: StitchedNetwork,
        features: Tensor,
        targets: Tensor | None,
        images: Iterable[Any],
        data: CalibrationDataModule,
        *,
        ridge: float,
    ) -> None:
        """Put a network in, behind it a linear layer to the width that the module expects.

        Where a network is there already, the layer maps, by least squares, onto what that one gives.

        Args:
            network: The network.
            features: Its features of the images, images x width.
            targets: Their targets; read only where a head is fitted.
            images: Batches as `data` gives them; read only where a backbone is imitated.
            data: The data module, which knows what the module's images were normalised with.
            ridge: Relative strength of the fit of that layer.

        Raises:
            StitchError: If the attribute holds a network that does not give vectors for such images, or the head does
                not lead from them to the targets.
        """
        present = self.present
        backbone, projection = present if isinstance(present, StitchedBackbone) else StitchedBackbone(), None
        if isinstance(present, StitchedBackbone) and (present.announces_width or present.network is None):
            projection = None if present.announces_width else resized(features, present.num_features)
        elif backbone is present or not hasattr(self.module, HOOK):
            wanted = self._replaced_features(present, images, data)
            projection, _ = imitation(features, wanted.to(features.device), ridge=ridge)
            backbone = present if isinstance(present, StitchedBackbone) else StitchedBackbone(wanted.shape[1])
        self._warn_of_loading(backbone)
        backbone.to(self.module.device)
        put(self.module, self.attribute, backbone)
        backbone.install(network, projection)
        self.present = backbone
        announce(self.module, backbone)
        if self.head_attribute is not None:
            with torch.no_grad():
                vectors = features if projection is None else projection.cpu()(features.clone())
                backbone.install(network, projection)
                fitted = self.head_settings.fit(vectors, targets)
            head = self._head(self.head_settings.num_classes, backbone.num_features)
            head.load_state_dict({"weight": fitted.weight, "bias": fitted.bias})

    def check_stage(self, stage: str) -> None:
        """A module of the user's own says itself what it can train and evaluate."""

    def check_head(self, data: CalibrationDataModule) -> None:
        """Take the targets from the data; refuse a head that cannot be fitted to them.

        A head that the module builds when it is told of the backbone is not looked at yet.

        Raises:
            StitchError: If it is no linear layer with a bias that leads to as many numbers as the targets have, or
                there are no targets.
        """
        bare = data.task == "none"
        if self.head_attribute is None or not bare:
            self.head_settings = HeadSettings.of(
                "none" if bare else "ridge",
                task="multiclass" if data.task == "none" else data.task,
                num_classes=None if bare else data.num_classes,
            )
        else:
            raise StitchError(
                f"FragmentSearch(head_attribute={self.head_attribute!r}) fits a head on labelled images, but the data "
                f"module has task='none'. Leave head_attribute out, or give it targets."
            )
        if self.head_attribute is not None and not hasattr(self.module, HOOK):
            present = self.present
            width = present.num_features if isinstance(present, StitchedBackbone) else None
            self._head(self.head_settings.num_classes, width)

    def _head(self, num_classes: int, num_features: int | None) -> nn.Linear:
        assert self.head_attribute is not None
        try:
            head = self.module.get_submodule(self.head_attribute)
        except AttributeError:
            head = None
        fits = (
            isinstance(head, nn.Linear)
            and head.bias is not None
            and head.out_features == num_classes
            and num_features in (None, head.in_features)
        )
        if not isinstance(head, nn.Linear) or not fits:
            raise StitchError(
                f"FragmentSearch(head_attribute={self.head_attribute!r}) fits a torch.nn.Linear("
                f"{num_features or '...'}, {num_classes}) with a bias; {type(self.module).__name__} has {head} there. "
                f"Leave head_attribute out to train a head of another kind."
            )
        return head

    def agree(self, trainer: pl.Trainer) -> None:
        """Take rank zero's structure; the strategy copies its weights."""
        assert isinstance(self.present, StitchedBackbone)
        own = self.present.get_extra_state()
        state = trainer.strategy.broadcast(own, src=0)
        if state != own:
            self.present.take_structure(state)

    @torch.no_grad()
    def _replaced_features(self, replaced: nn.Module, images: Iterable[Any], data: CalibrationDataModule) -> Tensor:
        """What the backbone that is there gives for the images, normalised as it is used to."""
        own = (replaced.mean, replaced.std) if isinstance(replaced, StitchedBackbone) else data.normalisation
        mean, std = (None if x is None else x.view(1, -1, 1, 1).to("cpu") for x in own)
        replaced.to(self.module.device)
        found = []
        with in_eval_mode(replaced):
            for images_and_targets in images:
                batch = images_and_targets if isinstance(images_and_targets, Tensor) else images_and_targets[0]
                given = batch if mean is None or std is None else (batch - mean) / std
                try:
                    vectors = replaced(given.to(self.module.device))
                except (RuntimeError, ValueError, TypeError) as error:
                    raise self._no_vectors(f"fails on images of {tuple(given.shape)}: {error}") from error
                if not isinstance(vectors, Tensor) or vectors.ndim != 2:
                    shape = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
                    raise self._no_vectors(f"gives {shape} for images of {tuple(given.shape)}")
                found.append(vectors.float())
        return torch.cat(found)

    def _no_vectors(self, problem: str) -> StitchError:
        return StitchError(
            f"{type(self.module).__name__}.{self.attribute} ({type(self.present).__name__}) {problem}. A stitched "
            f"network stands in for a backbone that takes images and gives vectors (batch, width). Name the attribute "
            f"that does, assign StitchedBackbone(num_features=...) to it, or define {HOOK}(self, backbone)."
        )

    def _warn_of_loading(self, backbone: StitchedBackbone) -> None:
        """Tell before training, not after, that the class cannot load its checkpoints."""
        alone = isinstance(self.present, StitchedBackbone) and not hasattr(self.module, HOOK)
        overridden = type(self.module).on_load_checkpoint is not pl.LightningModule.on_load_checkpoint
        if not alone and not overridden:
            name = type(self.module).__name__
            warnings.warn(
                f"{name}.load_from_checkpoint will not know of the stitched network in {self.attribute!r}. Assign "
                f"StitchedBackbone(num_features={backbone.num_features if not backbone.announces_width else '...'}) "
                f"to it in {name}.__init__, or define on_load_checkpoint(self, checkpoint) with "
                f"lightning_stitch.restore_backbones(self, checkpoint).",
                stacklevel=2,
            )


def place_for_network(
    module: pl.LightningModule, attribute: str | None, head_attribute: str | None = None
) -> StitchedClassifier | BackboneSlot:
    """Where a search puts its network: a `StitchedClassifier` as a whole, or an attribute of another module.

    Raises:
        StitchError: If there is no such place.
    """
    check_same_namespace(module, "module")
    if attribute is not None:
        return BackboneSlot(module, attribute, head_attribute)
    if head_attribute is not None:
        raise StitchError(f"head_attribute={head_attribute!r} needs attribute=, which says where the backbone is.")
    if not isinstance(module, StitchedClassifier):
        raise StitchError(
            f"FragmentSearch fits a StitchedClassifier; found {type(module).__name__}. In a module of your own it "
            f"fills an attribute: FragmentSearch(attribute='backbone', ...)."
        )
    return module


def is_restored(trainer: pl.Trainer, place: StitchedClassifier | BackboneSlot) -> bool:
    """Give a place the structure of the checkpoint that the run is about to restore; says whether there is one.

    Raises:
        RecipeError: If the checkpoint holds no network for it.
    """
    checkpoint = resumed_checkpoint(trainer)
    if checkpoint is None:
        return False
    if isinstance(place, BackboneSlot):
        place.restore(checkpoint)
    else:
        place.on_load_checkpoint(checkpoint)
    return True


def agree(trainer: pl.Trainer, module: StitchedClassifier) -> None:
    """Take rank zero's recipe on every rank; the strategy copies rank zero's weights."""
    own = module.hparams["recipe"]
    recipe = trainer.strategy.broadcast(own, src=0)
    if recipe != own:
        module.hparams["recipe"] = recipe
        if module.network is not None and {**recipe, "scores": own["scores"]} == own:
            # The same network, of which each rank has measured the latency itself.
            module.network.recipe = Recipe.from_dict(recipe)
        module.configure_model()
    assert module.head is not None
    shared_head(module.head, trainer.strategy)


@contextmanager
def one_rank_first(trainer: pl.Trainer, place: StitchedClassifier | BackboneSlot) -> Iterator[None]:
    """Let the first rank of each node do something before the others; a `StitchedClassifier` has done so already."""
    waits = isinstance(place, BackboneSlot)
    if waits and trainer.local_rank != 0:
        trainer.strategy.barrier("one_rank_first")
    yield
    if waits and trainer.local_rank == 0:
        trainer.strategy.barrier("one_rank_first")


@torch.no_grad()
def imitation(features: Tensor, wanted: Tensor, *, ridge: float) -> tuple[nn.Linear, float | None]:
    """The linear layer from features (images x width) to another network's, and its R2 on images held out of the fit.

    Raises:
        CalibrationError: If they have NaN or infinite values.
    """
    affine, explained, _ = fit_rows(features, wanted, num_images=len(features), ridge=ridge, bias=True)
    return _linear(affine), explained


@torch.no_grad()
def resized(features: Tensor, width: int) -> nn.Linear | None:
    """The linear layer that brings features (images x their width) to another width; None where they have it.

    Fewer: the first principal components, not scaled. More: all features, and zeros.
    """
    given = features.shape[1]
    if width == given:
        return None
    if width > given:
        return _linear(AffineMap(torch.eye(width, given), torch.zeros(width), given, 1.0, 0.0))
    rows = features.double()
    mean = rows.mean(0)
    directions = torch.linalg.eigh((rows - mean).T @ (rows - mean)).eigenvectors.flip(1)[:, :width].T
    return _linear(AffineMap(directions, -directions @ mean, width, 1.0, 0.0))


def _linear(affine: AffineMap) -> nn.Linear:
    with torch.inference_mode(False), torch.no_grad():
        layer = nn.Linear(affine.weight.shape[1], affine.weight.shape[0])
        layer.weight.copy_(affine.weight)
        if affine.bias is not None:
            layer.bias.copy_(affine.bias)
    return layer
