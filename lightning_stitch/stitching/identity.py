"""What a calibration or a search depends on, as plain JSON values, and where two of them differ."""

from __future__ import annotations

import dataclasses
from typing import Any

from lightning_stitch.io import plain
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.segments import Segmented


def source_identity(parts: Segmented) -> dict[str, Any]:
    """What a source's activations depend on: its weights, what is built with them, and where it is cut."""
    ref = parts.source.ref
    identity = {
        "weights": ref.weight_hash,
        "builder": ref.builder,
        "architecture": ref.architecture,
        "arguments": ref.arguments,
        "preprocessing": dataclasses.asdict(ref.preprocessing),
        "cuts": {c.name: [index, c.format, c.shape, c.num_prefix_tokens] for index, c in enumerate(parts.cuts)},
        "end": parts.end,
    }
    return dict(plain(identity))


def settings_identity(settings: CalibrationSettings) -> dict[str, Any]:
    """The settings that change numbers; where activations are kept does not."""
    found = dataclasses.asdict(settings)
    del found["keep_activations"]
    return dict(plain(found))
