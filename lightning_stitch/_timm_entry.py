"""The architecture "lightning_stitch" of timm's registry: a saved network as `timm.create_model` gives it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


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
    from lightning_stitch.timm_network import timm_network

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
