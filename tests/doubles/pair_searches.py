"""Searches of two small sources, and the images that they calibrate and choose by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from doubles.small_sources import plain
from doubles.tensors import digits, noise
from torch import Tensor

from lightning_stitch import CalibrationSettings, Pool
from lightning_stitch.search.results import SearchResult
from lightning_stitch.search.strategies import Beam
from lightning_stitch.sources.source import Source

SHAPE = (3, 16, 16)
CALIBRATION = 0.7 * digits(12, 16)[0] + 0.3 * noise(12, *SHAPE)
IMAGES, LABELS = digits(40, 16, first=20, classes=3)
SELECTION = list(zip(IMAGES.split(16), LABELS.split(16), strict=True))


def pair(seed: int = 1) -> list[Source]:
    return [plain("a", (8, 9, 10), seed=0), plain("b", (4, 7, 12), seed=seed, strides=(2, 2, 1))]


def new_pool(sources: list[Source] | None = None, **settings: Any) -> Pool:
    return Pool(sources or pair(), SHAPE, settings=CalibrationSettings(**{"readout": "last", **settings}))


BEAM = Beam(max_upsampling=math.inf)


def search(pool: Pool, **options: Any) -> SearchResult:
    return pool.search(
        **{
            "calibration": [CALIBRATION],
            "selection": SELECTION,
            "strategy": BEAM,
            "max_candidates": 12,
            "max_roots": 1,
            **options,
        }
    )


def never() -> Iterator[Tensor]:
    raise AssertionError("an image was read")
    yield
