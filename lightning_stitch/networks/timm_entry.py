"""A saved network as timm's tools want one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from lightning_stitch.errors import SourceError
from lightning_stitch.hub import open_pretrained
from lightning_stitch.networks.classifier import SavedClassifier, load_with_head

# timm's own tools pass these to every model; a wrong number of channels shows at the first image.
_IGNORED = {"pretrained_cfg_overlay", "cache_dir", "pretrained_model_args", "drop_rate", "drop_path_rate", "in_chans"}


class TimmNetwork(nn.Module):
    """A saved network with its head, with what timm's tools ask a network for.

    `num_classes` is the output's width, `num_features` that of what the head reads.
    """

    def __init__(self, saved: SavedClassifier, pretrained_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.network = saved.network
        self.head = saved.head
        self.num_features = self.head_hidden_size = saved.network.num_features
        self.num_classes: int = saved.arguments["num_classes"] or self.num_features
        self.pretrained_cfg = self.default_cfg = pretrained_cfg
        self.class_names: list[str] | None = saved.arguments["class_names"]

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
        RecipeError: If it was not saved by this package or does not fit itself, or needs a factory.
    """
    config = dict(pretrained_cfg) if isinstance(pretrained_cfg, Mapping) else dict(vars(pretrained_cfg or object))
    place = config.get({"hf-hub": "hf_hub_id", "local-dir": "file"}.get(str(config.get("source")), ""))
    if not place:
        raise SourceError(
            "a stitched network is not built by name and cannot be a source of another search; timm.create_model("
            "'hf-hub:ORG/NAME', pretrained=True), or 'local-dir:FOLDER', loads a saved one."
        )
    if refused := sorted(key for key, value in options.items() if value is not None and key not in _IGNORED):
        raise SourceError(f"A stitched network is fixed; timm.create_model cannot change {', '.join(refused)} of it.")
    folder = open_pretrained(f"{config['source']}:{place}", weights=pretrained)
    network = TimmNetwork(load_with_head(folder), config)
    if num_classes is not None and num_classes != network.num_classes:
        network.reset_classifier(num_classes)
    return network
