"""The attribute of a user's own LightningModule that a search puts a stitched network into."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_stitch._lightning import pl
from lightning_stitch.cutting import in_eval_mode
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import RecipeError, StitchError, nearest
from lightning_stitch.heads import DEFAULT_STRENGTHS, HeadSettings
from lightning_stitch.maths import loo_ridge, ridge_weights, scale_of
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
from lightning_stitch.search import Ranking
from lightning_stitch.training.data_checks import check_targets


class BackbonePlace:
    """One attribute of a module, by dotted name.

    Args:
        module: The user's module.
        attribute: The attribute's name, as "backbone" or "model.encoder".
        head_attribute: That of the linear layer from the backbone's vectors to the classes; None: it is left alone.

    Attributes:
        head_settings: What candidates are ranked for, and the head that is fitted: the data's targets, since `check`.

    Raises:
        StitchError: If the module has no such submodule, or none that a stitched network can stand in for.
    """

    def __init__(self, module: pl.LightningModule, attribute: str, head_attribute: str | None = None) -> None:
        self.module = module
        self.attribute = attribute
        self.head_attribute = head_attribute
        self.head_settings = HeadSettings.of("none", num_classes=None)
        names = [name for name, _ in module.named_modules(remove_duplicate=False) if name]
        if attribute not in names:
            raise StitchError(
                f"FragmentSearch(attribute={attribute!r}): {type(module).__name__} has no submodule of that name; "
                f"the nearest are {nearest(attribute, names) or 'none'}. Assign a StitchedBackbone to it in __init__."
            )
        present = self.present
        if isinstance(present, StitchedBackbone) and present.announces_width and not hasattr(module, HOOK):
            raise StitchError(
                f"{type(module).__name__}.{attribute} is a StitchedBackbone() of no known width, and the module has no "
                f"{HOOK}(self, backbone) that could be told. Give StitchedBackbone(num_features=...), or define that "
                f"method: it is called before configure_optimizers, and backbone.num_features is the width."
            )

    @property
    def present(self) -> nn.Module:
        """What the attribute holds."""
        return self.module.get_submodule(self.attribute)

    @property
    def recipe(self) -> Recipe | None:
        """The structure of the network that is there; None: there is none yet."""
        return self.present.recipe if isinstance(self.present, StitchedBackbone) else None

    @property
    def readout(self) -> str:
        """What is read of a network by default: all depths where a closed-form map stands behind it, else the last."""
        present = self.present
        if isinstance(present, StitchedBackbone) and present.announces_width:
            return "all" if self.head_attribute is not None else "last"
        is_empty = isinstance(present, StitchedBackbone) and present.network is None
        return "last" if is_empty or hasattr(self.module, HOOK) else "all"

    @property
    def train_mode(self) -> bool:
        """Whether the network follows `train()` while it is trained."""
        return isinstance(self.present, StitchedBackbone) and self.present.train_mode

    def check(self, data: CalibrationDataModule, *, ranking: str | Ranking, compare: bool) -> None:
        """Take the targets from the data; refuse what cannot be used with them.

        A head that the module builds when it is told of the backbone is not looked at yet.
        """
        if data.task != "none":
            self.head_settings = HeadSettings.of("ridge", task=data.task, num_classes=data.num_classes)
        elif self.head_attribute is not None:
            raise StitchError(
                f"FragmentSearch(head_attribute={self.head_attribute!r}) needs labelled images, but the data module "
                f"has task='none'."
            )
        if self.head_attribute is not None and not hasattr(self.module, HOOK):
            self._find_head(self.present.num_features if isinstance(self.present, StitchedBackbone) else None)
        check_targets(self.head_settings, data, ranking=ranking, compare=compare)

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Build the structure that a checkpoint holds; a `RecipeError` if it holds none for this attribute."""
        _build_from(self.attribute, self.module, checkpoint["state_dict"])

    def install(
        self,
        network: StitchedNetwork,
        features: Tensor,
        targets: Tensor | None,
        data: CalibrationDataModule,
        batches: Any,
    ) -> None:
        """Put a network in, behind it a linear layer to the width that the module expects, and fit the head.

        Where a network is there already, the layer maps, by least squares, onto what that one gives. The features
        (images x width) are the network's for the head images, in `batches` as `data` gives them.

        Raises:
            StitchError: If what the attribute holds gives no vectors for such images, or the head does not fit them.
        """
        blocks = network.recipe.head_blocks
        backbone, projection = self._prepare_backbone(features, blocks, batches, data)
        with torch.no_grad():
            vectors = features if projection is None else projection(features.clone())
        self._warn_of_loading(backbone)
        backbone.to(self.module.device)
        put(self.module, self.attribute, backbone)
        backbone.install(network, projection)
        announce(self.module, backbone)
        if self.head_attribute is not None:
            fitted, _ = self.head_settings.fit(vectors, targets, blocks if projection is None else None)
            self._find_head(backbone.num_features).load_state_dict({"weight": fitted.weight, "bias": fitted.bias})
            backbone.head_attribute = self.head_attribute

    def agree(self, strategy: Any) -> None:
        """Take rank zero's structure; the strategy copies its weights."""
        backbone = self.present
        assert isinstance(backbone, StitchedBackbone)
        backbone.take_structure(strategy.broadcast(backbone.get_extra_state(), src=0))

    def _find_head(self, num_features: int | None) -> nn.Linear:
        """The linear layer to fit, from that many features (None: not known yet) to the targets."""
        num_classes = self.head_settings.num_classes
        head = dict(self.module.named_modules(remove_duplicate=False)).get(self.head_attribute or "")
        if (
            isinstance(head, nn.Linear)
            and head.bias is not None
            and head.out_features == num_classes
            and num_features in (None, head.in_features)
        ):
            return head
        raise StitchError(
            f"FragmentSearch(head_attribute={self.head_attribute!r}) fits a torch.nn.Linear("
            f"{num_features or '...'}, {num_classes}) with a bias; {type(self.module).__name__} has {head} there. "
            f"Leave head_attribute out to train a head of another kind."
        )

    def _prepare_backbone(
        self, features: Tensor, blocks: Sequence[int] | None, batches: Iterable[Any], data: CalibrationDataModule
    ) -> tuple[StitchedBackbone, nn.Linear | None]:
        """The backbone to fill, and the layer from the features to its width; None: their width is right."""
        present = self.present
        if isinstance(present, StitchedBackbone):
            if present.announces_width:
                return present, None
            if present.network is None:
                return present, fit_width(features, present.num_features, blocks)
        elif hasattr(self.module, HOOK):
            return StitchedBackbone(), None
        vectors = self._present_features(batches, data)
        fit = loo_ridge(features, vectors.to(features.device), strengths=DEFAULT_STRENGTHS, blocks=blocks)
        imitation = ridge_weights(fit, strength=fit.best_strength)
        assert imitation.bias is not None
        backbone = present if isinstance(present, StitchedBackbone) else StitchedBackbone(vectors.shape[1])
        return backbone, _make_linear(imitation.weight, imitation.bias)

    @torch.no_grad()
    def _present_features(self, batches: Iterable[Any], data: CalibrationDataModule) -> Tensor:
        """What the backbone that is there gives for the images, normalised as it is used to; images x width."""
        present, device = self.present, self.module.device
        statistics = (present.mean, present.std) if isinstance(present, StitchedBackbone) else data.normalisation
        mean, std = (None if x is None else x.view(1, -1, 1, 1).to("cpu") for x in statistics)
        rows = []
        with in_eval_mode(present.to(device)):
            for batch in batches:
                images = batch if isinstance(batch, Tensor) else batch[0]
                images = images if mean is None or std is None else (images - mean) / std
                try:
                    vectors = present(images.to(device))
                except (RuntimeError, ValueError, TypeError) as error:
                    raise self._refuse_present(f"fails on images of {tuple(images.shape)}: {error}") from error
                if not isinstance(vectors, Tensor) or vectors.ndim != 2:
                    shape = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
                    raise self._refuse_present(f"gives {shape} for images of {tuple(images.shape)}")
                rows.append(vectors.float())
        return torch.cat(rows)

    def _refuse_present(self, problem: str) -> StitchError:
        return StitchError(
            f"{type(self.module).__name__}.{self.attribute} ({type(self.present).__name__}) {problem}. A stitched "
            f"network stands in for a backbone that takes images and gives vectors (batch, width). Name the attribute "
            f"that does, assign StitchedBackbone(num_features=...) to it, or define {HOOK}(self, backbone)."
        )

    def _warn_of_loading(self, backbone: StitchedBackbone) -> None:
        """Tell before training, not after, that the class cannot load its checkpoints."""
        loads_itself = isinstance(self.present, StitchedBackbone) and not hasattr(self.module, HOOK)
        overridden = type(self.module).on_load_checkpoint is not pl.LightningModule.on_load_checkpoint
        if not loads_itself and not overridden:
            name = type(self.module).__name__
            warnings.warn(
                f"{name}.load_from_checkpoint will not know of the stitched network in {self.attribute!r}. Assign "
                f"StitchedBackbone(num_features={backbone.num_features if not backbone.announces_width else '...'}) "
                f"to it in {name}.__init__, or define on_load_checkpoint(self, checkpoint) with "
                f"lightning_stitch.restore_backbones(self, checkpoint).",
                stacklevel=2,
            )


def restore_when_loaded(module: nn.Module, attribute: str) -> RemovableHandle:
    """Let a module build the stitched network of every state dict that it loads, until the handle is removed.

    Lightning loads a checkpoint's tensors between the module's hook and the callbacks'; a class that does not define
    `on_load_checkpoint` would have no place for them. A state dict without a network there is a `RecipeError`.
    """
    return module.register_load_state_dict_pre_hook(partial(_build_from, attribute))


def _build_from(attribute: str, module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "", *_: object) -> None:
    """Build the stitched backbones of a state dict in a module whose keys begin with a prefix."""
    state = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    saved = saved_backbones(state)
    if saved.get(attribute, {}).get("recipe") is None:
        raise RecipeError(
            f"This checkpoint holds no stitched network for {attribute!r}; it has some for {sorted(saved)}. "
            f"It was saved by a run without FragmentSearch(attribute={attribute!r})."
        )
    restore_backbones(module, {"state_dict": state})


@torch.no_grad()
def fit_width(features: Tensor, width: int, blocks: Sequence[int] | None = None) -> nn.Linear | None:
    """The linear layer that brings features (images x their width) to another width; None where they have it.

    Fewer: the first principal components, not scaled, of the features as a head weighs them in blocks. More: all
    features, and zeros.
    """
    num_features = features.shape[1]
    if width == num_features:
        return None
    if width > num_features:
        return _make_linear(torch.eye(width, num_features), torch.zeros(width))
    scaling = scale_of(features, blocks)
    directions = torch.linalg.svd(scaling(features), full_matrices=False).Vh[:width] * scaling.factor
    # Of fewer images than components there are no more directions.
    weight = torch.cat([directions, directions.new_zeros(width - len(directions), num_features)])
    return _make_linear(weight, -weight @ scaling.mean)


def _make_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    with torch.inference_mode(False), torch.no_grad():
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
