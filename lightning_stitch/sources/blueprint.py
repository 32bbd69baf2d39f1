"""A source that was found but not loaded: all that is known of it before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_stitch.cutting import CutGraph
from lightning_stitch.errors import SourceError
from lightning_stitch.io import WeightFile
from lightning_stitch.recipe import Builder, Preprocessing


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A source that was found but not built; further fields are those of SourceRef.

    Attributes:
        build: Makes the network with its weights; this is where the slow work is.
        preprocessing: None where only the built network can tell.
        weights: The file of weights that `build` will read; None: none, or only it knows.
        outline: Makes the network without reading weights, of tensors of these names and shapes, if any, loaded as
            `build` would load them. None: only `build` can make it.
        graphs: By input size, the outline as it was traced; what `build` makes goes on with them.
    """

    spec: str
    name: str
    builder: Builder
    architecture: str
    build: Callable[[], nn.Module]
    arguments: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    licence: str | None = None
    revision: str | None = None
    weights: WeightFile | None = None
    outline: Callable[[Mapping[str, Tensor] | None], nn.Module] | None = None
    graphs: Mapping[tuple[int, int, int], CutGraph] = field(default_factory=dict)


def preprocessing_from(config: Mapping[str, Any]) -> Preprocessing | None:
    """Preprocessing out of timm's words for it; None where input_size, mean or std is missing.

    Raises:
        SourceError: If the values are of another kind.
    """
    if any(config.get(key) is None for key in ("input_size", "mean", "std")):
        return None
    try:
        channels, height, width = (int(size) for size in config["input_size"])
        return Preprocessing(
            input_size=(channels, height, width),
            mean=tuple(float(value) for value in config["mean"]),
            std=tuple(float(value) for value in config["std"]),
            interpolation=str(config.get("interpolation") or "bilinear"),
            fixed_size=bool(config.get("fixed_input_size", False)),
        )
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"its preprocessing cannot be read ({error}). Give preprocessing=Preprocessing(...)."
        ) from error
