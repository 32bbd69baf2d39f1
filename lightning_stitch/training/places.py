"""Where a search puts the network that it chose: a StitchedClassifier's own, or an attribute of another module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_stitch._lightning import check_same_namespace, pl
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import StitchError
from lightning_stitch.heads import HeadSettings
from lightning_stitch.networks import StitchedNetwork
from lightning_stitch.recipe import Recipe
from lightning_stitch.search import Ranking
from lightning_stitch.training.backbone_place import BackbonePlace
from lightning_stitch.training.data_checks import check_targets
from lightning_stitch.training.module import StitchedClassifier


class ClassifierPlace:
    """The network of a `StitchedClassifier`; `BackbonePlace` has the same methods and says what they do."""

    def __init__(self, module: StitchedClassifier) -> None:
        self.module = module

    @property
    def head_settings(self) -> HeadSettings:
        """The classifier's."""
        return self.module.head_settings

    @property
    def recipe(self) -> Recipe | None:
        """The classifier's."""
        return self.module.recipe

    @property
    def readout(self) -> str:
        """All depths; where there is no head the last, which is what others take for a network's features."""
        return "last" if self.head_settings.name == "none" else "all"

    @property
    def train_mode(self) -> bool:
        """The classifier's."""
        return self.module.train_mode

    def check(self, data: CalibrationDataModule, *, ranking: str | Ranking, compare: bool) -> None:
        """Take the number of classes where it was left open; refuse data with other targets or class names."""
        if data.task == self.head_settings.task:
            self.module.take_classes(data.num_classes)
        check_targets(self.head_settings, data, ranking=ranking, compare=compare)
        names = self.module.class_names
        if None not in (names, data.class_names) and names != data.class_names:
            raise StitchError(
                f"StitchedClassifier has class_names={names}, the data have {data.class_names}; the order is that of "
                f"the labels. Leave class_names out to take the data's."
            )

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Build the structure that a checkpoint holds."""
        self.module.on_load_checkpoint(dict(checkpoint))

    def install(
        self,
        network: StitchedNetwork,
        features: Tensor,
        targets: Tensor | None,
        data: CalibrationDataModule,
        batches: Any,
    ) -> None:
        """Give the classifier the network, a head that is fitted to its features, and the data's class names."""
        module = self.module
        with torch.inference_mode(False):
            head, fit = self.head_settings.fit_for(network.recipe, features, targets)
            if fit is not None and fit.block_shares:
                network.recipe = network.recipe.with_shares(fit.block_shares)
        module.install(network.to(module.device), head.to(module.device))
        if module.class_names is None and self.head_settings.name != "none":
            module.class_names = data.class_names

    def agree(self, strategy: Any) -> None:
        """Take rank zero's structure and head."""
        module = self.module
        local = module.hparams["recipe"]
        recipe = strategy.broadcast(local, src=0)
        if recipe != local:
            module.hparams["recipe"] = recipe
            if module.network is not None and {**recipe, "scores": local["scores"]} == local:
                # The same network, of which each rank has measured the latency itself.
                module.network.recipe = Recipe.from_dict(recipe)
            module.configure_model()
        assert module.head is not None
        # A head that holds labelled images has as many rows on every rank as rank zero's.
        numbers = {name: tensor.cpu() for name, tensor in module.head.state_dict().items()}
        module.head.load_state_dict(strategy.broadcast(numbers, src=0))


Place: TypeAlias = ClassifierPlace | BackbonePlace


def place_for_network(module: pl.LightningModule, attribute: str | None, head_attribute: str | None = None) -> Place:
    """Where a search puts its network: a `StitchedClassifier` as a whole, or an attribute of another module."""
    check_same_namespace(module, "module")
    if attribute is not None:
        return BackbonePlace(module, attribute, head_attribute)
    if head_attribute is not None:
        raise StitchError(f"head_attribute={head_attribute!r} needs attribute=, which says where the backbone is.")
    if not isinstance(module, StitchedClassifier):
        raise StitchError(
            f"FragmentSearch fits a StitchedClassifier; found {type(module).__name__}. In a module of your own it "
            f"fills an attribute: FragmentSearch(attribute='backbone', ...)."
        )
    return ClassifierPlace(module)
