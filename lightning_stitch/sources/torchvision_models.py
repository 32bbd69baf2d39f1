"""Sources that torchvision builds: its classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_stitch.errors import SourceError, first_lines, nearest
from lightning_stitch.io import download_of
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources.blueprint import Blueprint
from lightning_stitch.sources.spec import SourceSpec


def find_in_torchvision(spec: SourceSpec, architecture: str) -> Blueprint:
    """A classifier of torchvision, with its DEFAULT weights."""
    from torchvision import models

    _check_classifier(architecture)
    weights = models.get_model_weights(architecture).DEFAULT
    file = download_of(weights.url) if spec.pretrained else None
    arguments = spec.plain_arguments("torchvision")
    transforms = weights.transforms()
    fixed = architecture.startswith(("vit_", "maxvit"))
    # torchvision switches these by itself when it loads weights; without weights they must be said.
    switched: dict[str, Any] = {
        "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
        "inception_v3": {"transform_input": True, "init_weights": False},
    }.get(architecture, {"image_size": transforms.crop_size[0]} if architecture.startswith("vit_") else {})
    rebuilt = {**switched, **arguments}
    size = rebuilt.get("image_size", transforms.crop_size[0])
    return Blueprint(
        spec=f"torchvision:{architecture}",
        name=architecture,
        builder="torchvision",
        architecture=architecture,
        build=partial(
            create_torchvision, architecture, arguments if spec.pretrained else rebuilt, pretrained=spec.pretrained
        ),
        arguments=rebuilt,
        preprocessing=Preprocessing(
            input_size=(3, size, size),
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            interpolation=transforms.interpolation.value,
            fixed_size=fixed,
        ),
        licence=weights.meta.get("license"),
        weights=file,
        outline=lambda _: create_torchvision(architecture, rebuilt),
    )


def create_torchvision(architecture: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Let torchvision build a classifier; the first use of weights downloads them.

    Raises:
        SourceError: If torchvision has no such classifier, does not take the arguments, or the weights fail.
    """
    from torchvision import models

    _check_classifier(architecture)
    try:
        return models.get_model(architecture, weights="DEFAULT" if pretrained else None, **arguments)
    except Exception as error:  # network, cache, hash, arguments: each has a type of its own
        raise SourceError(
            f"torchvision could not build {architecture!r} with arguments {dict(arguments)}: {first_lines(error)}"
        ) from error


def _check_classifier(architecture: str) -> None:
    """Classifiers alone: detectors give no single tensor, and fetch a backbone's weights unasked."""
    from torchvision import models

    names = models.list_models(module=models)
    if architecture not in names:
        raise SourceError(
            f"torchvision has no classifier {architecture!r}. Nearest: {nearest(architecture, names)}. "
            f"torchvision.models.list_models(module=torchvision.models) lists all."
        )
