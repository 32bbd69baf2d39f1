"""A saved network as timm's tools want one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_stitch.classifier_files import read_classifier
from lightning_stitch.ensembles import Ensemble
from lightning_stitch.hub.loading import open_pretrained
from lightning_stitch.network import StitchedNetwork
from lightning_stitch.recipe import EnsembleRecipe


class TimmNetwork(nn.Module):
    """A saved network with its head, with what timm's tools ask a network for.

    Attributes:
        network: The stitched network.
        head: Its head, or a linear layer or nothing instead.
        num_classes: Width of the output; 0: features.
        num_features: Width of what the head reads.
        pretrained_cfg: What timm knows of it.
        class_names: Names of the outputs, where they are known.
    """

    def __init__(
        self,
        network: StitchedNetwork | Ensemble,
        head: nn.Module,
        *,
        num_features: int,
        num_classes: int,
        pretrained_cfg: dict[str, Any],
        class_names: list[str] | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.num_features = self.head_hidden_size = num_features
        self.num_classes = num_classes
        self.pretrained_cfg = self.default_cfg = pretrained_cfg
        self.class_names = class_names

    def forward_features(self, images: Tensor) -> Tensor:
        """What the head reads, for images in [0, 1]."""
        features: Tensor = self.network(images)
        return features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Outputs of features; `pre_logits`: the features themselves."""
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs for images in [0, 1]."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new linear head; 0: none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def timm_network(where: str, *, pretrained: bool, num_classes: int | None, config: dict[str, Any]) -> TimmNetwork:
    """A saved network of any kind, for `timm.create_model`.

    Args:
        where: "hf-hub:..." or "local-dir:...".
        pretrained: Whether to read the weights.
        num_classes: Of the output; None: as saved.
        config: timm's pretrained_cfg.

    Raises:
        RecipeError: If it was not saved by this package or does not fit itself, or needs a factory.
    """
    folder = open_pretrained(where, weights=pretrained)
    names, outputs = None, None
    network: Any
    head: nn.Module
    if folder.kind == "classifier":
        saved = read_classifier(folder)
        network, head, outputs = saved.network, saved.head, saved.num_outputs
        names = saved.arguments["class_names"]
    else:
        kind: Any = Ensemble if isinstance(folder.recipe, EnsembleRecipe) else StitchedNetwork
        parts = folder.load(lambda: nn.ModuleDict({"network": kind.from_recipe(folder.recipe)}))
        network, head = parts.get_submodule("network"), nn.Identity()
    width = network.num_features if isinstance(network, StitchedNetwork) else network.recipe.num_classes
    outputs = outputs or width
    found = TimmNetwork(
        network, head, num_features=width, num_classes=outputs, pretrained_cfg=config, class_names=names
    )
    if num_classes is not None and num_classes != outputs:
        found.reset_classifier(num_classes)
    return found
