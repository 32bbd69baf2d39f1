"""A saved network as timm's tools want one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lightning_stitch.hub import open_pretrained
from lightning_stitch.networks.classifier import read_classifier
from lightning_stitch.networks.network import StitchedNetwork


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
        network: StitchedNetwork,
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
        parts = folder.load(lambda: nn.ModuleDict({"network": StitchedNetwork.from_recipe(folder.recipe)}))
        network, head = parts.get_submodule("network"), nn.Identity()
    width = folder.recipe.num_features
    outputs = outputs or width
    found = TimmNetwork(
        network, head, num_features=width, num_classes=outputs, pretrained_cfg=config, class_names=names
    )
    if num_classes is not None and num_classes != outputs:
        found.reset_classifier(num_classes)
    return found


def register() -> None:
    """Put it into timm's registry, once."""
    registry = import_module("timm.models")
    if not registry.is_model("lightning_stitch"):
        registry.register_model(lightning_stitch)


def lightning_stitch(
    pretrained: bool = False, pretrained_cfg: Any = None, num_classes: int | None = None, **options: Any
) -> nn.Module:
    """A network that `save_pretrained` or `publish` wrote, for `timm.create_model`.

    It takes images in [0, 1], as `timm.data.create_transform` makes them with its own `pretrained_cfg` (mean 0, std 1).

    Args:
        pretrained: Load the weights; False: the same structure with random ones.
        pretrained_cfg: Where it is, from "hf-hub:ORG/NAME[@REVISION]" or "local-dir:FOLDER".
        num_classes: 0: no head, features; another number than the saved one's: a new linear head.
        options: Others of timm's; none that changes the structure can be used.

    Raises:
        SourceError: If it is asked for in another way.
    """
    from lightning_stitch.errors import SourceError

    config = dict(pretrained_cfg) if isinstance(pretrained_cfg, Mapping) else dict(vars(pretrained_cfg or object))
    place = {"hf-hub": "hf_hub_id", "local-dir": "file"}.get(str(config.get("source")))
    if place is None or not config.get(place):
        raise SourceError(
            "a stitched network is not built by name and cannot be a source of another search; timm.create_model("
            "'hf-hub:ORG/NAME', pretrained=True), or 'local-dir:FOLDER', loads a saved one."
        )
    known = {"pretrained_cfg_overlay", "cache_dir", "pretrained_model_args", "drop_rate", "drop_path_rate", "in_chans"}
    # timm's own tools pass these to every model; a wrong number of channels shows at the first image.
    if refused := sorted(key for key, value in options.items() if value is not None and key not in known):
        raise SourceError(f"A stitched network is fixed; timm.create_model cannot change {', '.join(refused)} of it.")
    spec = f"{config['source']}:{config[place]}"
    return timm_network(spec, pretrained=pretrained, num_classes=num_classes, config=config)
