"""Sources that torchvision, a factory of the user's, or a live module bring."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from lightning_stitch.cutting import copied
from lightning_stitch.errors import SourceError, first_lines, nearest
from lightning_stitch.io import download_of
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources.blueprint import Blueprint, plain_arguments, preprocessing_from


def from_torchvision(
    spec: str, architecture: str, *, pretrained: bool, arguments: Mapping[str, Any] | None
) -> Blueprint:
    """A classifier of torchvision, with its DEFAULT weights."""
    from torchvision import models

    _check_classifier(architecture)
    weights = models.get_model_weights(architecture).DEFAULT
    file = download_of(weights.url) if pretrained else None
    given = plain_arguments(arguments, builder="torchvision")
    transforms = weights.transforms()
    fixed = architecture.startswith(("vit_", "maxvit"))
    # torchvision switches these by itself when it loads weights; without weights they must be said.
    switched: dict[str, Any] = {
        "googlenet": {"transform_input": True, "aux_logits": False, "init_weights": False},
        "inception_v3": {"transform_input": True, "init_weights": False},
    }.get(architecture, {"image_size": transforms.crop_size[0]} if architecture.startswith("vit_") else {})
    rebuilt = {**switched, **given}
    size = rebuilt.get("image_size", transforms.crop_size[0])
    return Blueprint(
        spec=spec,
        name=architecture,
        builder="torchvision",
        architecture=architecture,
        build=partial(create_torchvision, architecture, given if pretrained else rebuilt, pretrained=pretrained),
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

    known = models.list_models(module=models)
    if architecture not in known:
        raise SourceError(
            f"torchvision has no classifier {architecture!r}. Nearest: {nearest(architecture, known)}. "
            f"torchvision.models.list_models(module=torchvision.models) lists all."
        )


def from_factory(spec: str, path: str, *, pretrained: bool, arguments: Mapping[str, Any] | None) -> Blueprint:
    """A callable that returns a module with the weights it wants; `pretrained` is not its business."""
    _import_factory(path)
    given = plain_arguments(arguments, builder="python")
    return Blueprint(
        spec=spec,
        name=path.rpartition(":")[2],
        builder="python",
        architecture=path,
        build=partial(call_factory, path, given),
        arguments=given,
    )


def _import_factory(path: str) -> Callable[..., nn.Module]:
    """The callable behind "package.module:factory"."""
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise SourceError(f"expected 'python:package.module:factory'; found 'python:{path}'.")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise SourceError(
            f"{path!r} cannot be imported ({error}). Check the spelling, and that its folder is on PYTHONPATH."
        ) from error
    except Exception as error:  # the user's module may raise anything
        raise SourceError(
            f"{path!r} cannot be imported: {module_name} raises {first_lines(error)}. Mend what it does when imported."
        ) from error
    if not callable(factory):
        raise SourceError(
            f"{path!r} is no callable but a {type(factory).__name__}; expected one that returns a module."
        )
    return factory


def call_factory(path: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network with the user's code."""
    factory = _import_factory(path)
    try:
        module = factory(**arguments)
    except Exception as error:  # the user's code may raise anything
        raise SourceError(f"{path!r} raised {first_lines(error)} when called with {dict(arguments)}.") from error
    if not isinstance(module, nn.Module):
        raise SourceError(f"{path!r} returned a {type(module).__name__}; expected a torch.nn.Module.")
    return module


def from_module(module: nn.Module, name: str | None, preprocessing: Preprocessing | None) -> Blueprint:
    """A live module, copied so that neither eval mode here nor training there touches the other."""
    if not name:
        raise SourceError("a live module needs a name: load_source(module, name=...).")
    qualified = f"{type(module).__module__}.{type(module).__qualname__}"
    return Blueprint(
        spec=f"live:{qualified}",
        name=name,
        builder="live",
        architecture=qualified,
        build=partial(_copied, module),
        preprocessing=preprocessing or declared_preprocessing(module),
        licence=declared_config(module).get("license"),
        outline=lambda _: _copied(module),
    )


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copied(module)
    except Exception as error:  # a module may hold anything
        raise SourceError(
            f"{type(module).__name__} cannot be copied: {first_lines(error)}. Remove what cannot be (open files, "
            f"locks), or load it as 'python:package.module:factory'."
        ) from error


def declared_config(module: nn.Module) -> dict[str, Any]:
    """What a module of timm's kind says of its weights; empty for others."""
    config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
    return dict(config) if isinstance(config, Mapping) else dict(vars(config))


def declared_preprocessing(module: nn.Module) -> Preprocessing:
    """The module's own word: timm's pretrained_cfg, or attributes of the same names."""
    keys = ("input_size", "mean", "std", "interpolation")
    config = declared_config(module) or {key: getattr(module, key) for key in keys if hasattr(module, key)}
    preprocessing = preprocessing_from(config)
    if preprocessing is None:
        raise SourceError(
            f"{type(module).__name__} does not say how it wants its images. Give preprocessing=Preprocessing("
            f"input_size=(channels, height, width), mean=(...), std=(...)), from lightning_stitch.recipe."
        )
    return preprocessing
