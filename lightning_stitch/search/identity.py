"""What a search depends on, as plain values: where two differ, one's journal is not the other's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from lightning_stitch.io import versions
from lightning_stitch.search.strategies import Beam
from lightning_stitch.settings import CalibrationSettings, SearchSettings
from lightning_stitch.stitching import Segmented, settings_identity, source_identity


def search_identity(
    parts: Sequence[Segmented], calibration: CalibrationSettings, settings: SearchSettings, device: torch.device
) -> dict[str, Any]:
    """All that decides what a search finds, but for the images.

    A strategy of this package is known by its arguments, a user's own by its name, as it may not say more.
    """
    strategy = settings.strategy or Beam()
    ours = type(strategy).__module__.startswith("lightning_stitch.")
    name = getattr(strategy, "__qualname__", type(strategy).__qualname__)
    return {
        "versions": versions("lightning_stitch", "torch"),
        "device": device.type,
        "image_shape": parts[0].image_shape,
        "settings": settings_identity(calibration),
        "order": [part.name for part in parts],
        "sources": {part.name: source_identity(part) for part in parts},
        "strategy": repr(strategy) if ours else name,
        "budget": dataclasses.asdict(settings.limits),
        "sizes": settings.smaller_shapes(parts[0].image_shape),
        "ridge": settings.ridge,
        "bias": settings.bias,
    }
