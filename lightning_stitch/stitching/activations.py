"""Run a source once over the calibration images and keep what the search needs of every cut.

Of each cut are kept: sampled rows (at most a fixed number for each image, so that memory is rows x channels whatever
the image size), and, while the search lasts, the activation itself on disk, to be carried on from there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from lightning_stitch.cutting import Cut
from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import Carried, Portion, Spool
from lightning_stitch.maths import CentredRows, centre_rows
from lightning_stitch.recipe import StitchSpec
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import images as held_out
from lightning_stitch.stitching.segments import Segmented, chunks
from lightning_stitch.stitching.stitches import resample, to_map

Grid = tuple[int, int] | None


@dataclass(slots=True)
class CutStatistics:
    """What the search keeps of one cut of one source.

    Attributes:
        cut: The cut.
        rows: Sampled rows x channels, float32, in the order of the images; uncentred.
        centred: The same made ready for CKA; None where the activation does not vary.
        prefix_rows: The prefix tokens of every image (images x tokens x channels), float32; None where there are none.
    """

    cut: Cut
    rows: Tensor
    centred: CentredRows | None
    prefix_rows: Tensor | None = None

    @property
    def prefix(self) -> Tensor | None:
        """Mean of each prefix token (tokens x channels)."""
        return None if self.prefix_rows is None else self.prefix_rows.mean(0)


@dataclass(slots=True)
class Calibrated:
    """A source with what the calibration images gave at its cuts.

    Attributes:
        parts: The source taken apart.
        statistics: One entry for each cut.
        activations: What is live at each cut, for all images, to be carried on; emptied by `release`.
        features: What the source gives at its end (images x features), float32.
        num_held_out: How many of the images, the last ones, judge stitches and healing.
        stored: Whether the activations lie in files of their own, where they cost nothing and stay.
    """

    parts: Segmented
    statistics: list[CutStatistics]
    activations: list[Carried]
    features: Tensor = field(repr=False)
    num_held_out: int
    stored: bool = False

    @property
    def name(self) -> str:
        """The source's name."""
        return self.parts.name

    def release(self) -> None:
        """Let go of the carried activations, unless they are stored; rows and features stay."""
        if not self.stored:
            self.activations.clear()


@lru_cache(maxsize=4096)
def _positions_of(grid: tuple[int, int], image: int, rows_per_image: int, seed: int) -> Tensor:
    # Seeded by image and grid too, so that the draw does not depend on batches or on which cuts were met before.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {grid[0]}x{grid[1]} {image}".encode()))
    return torch.randperm(grid[0] * grid[1], generator=generator)[:rows_per_image].sort().values


def positions(grid: tuple[int, int], images: range, rows_per_image: int, seed: int) -> Tensor | None:
    """Which grid positions are sampled of each of these images (images x rows), the same for all cuts of a grid.

    None where the grid has no more than `rows_per_image` positions, and all are taken.
    """
    if grid[0] * grid[1] <= rows_per_image:
        return None
    return torch.stack([_positions_of(grid, image, rows_per_image, seed) for image in images])


def sampled_rows(x: Tensor, grid: Grid, settings: CalibrationSettings, *, first_image: int = 0) -> Tensor:
    """Rows x channels of an activation on a receiver's grid; on None, that of a vector, a map is averaged.

    It is (images, channels, height, width), or (images, channels) for a vector; `first_image` says which of the
    calibration images its first one is.
    """
    if grid is None:
        return x.mean((2, 3)) if x.ndim == 4 else x
    sampled = positions(grid, range(first_image, first_image + len(x)), settings.rows_per_image, settings.seed)
    if sampled is not None and grid[0] * grid[1] > x.shape[-2] * x.shape[-1]:
        x = _upsample_at(x, grid, sampled.to(x.device))
    else:
        x = resample(x, grid).flatten(2)
        if sampled is not None:
            x = x.gather(2, sampled.to(x.device)[:, None].expand(-1, x.shape[1], -1))
    return x.transpose(1, 2).reshape(-1, x.shape[1])


def rows_on_grids(
    activation: Iterable[Tensor], cut: Cut, grids: Iterable[Grid], settings: CalibrationSettings
) -> dict[Grid, Tensor] | None:
    """Rows x channels of a cut's activation on several receivers' grids, read once; None where it is not finite."""
    rows: dict[Grid, list[Tensor]] = {grid: [] for grid in grids}
    first = 0
    for portion in activation:
        x = to_map(portion, cut)
        if not is_finite(x):
            return None
        for grid, portions in rows.items():
            portions.append(sampled_rows(x, grid, settings, first_image=first))
        first += len(x)
    return {grid: torch.cat(portions) for grid, portions in rows.items()}


def rows_to_fit(
    spec: StitchSpec, activation: Iterable[Tensor], sender: Cut, receiver: CutStatistics, settings: CalibrationSettings
) -> tuple[Tensor, Tensor] | None:
    """The rows of a sender's activation and of the receiver that a stitch is fitted on; None where any is not finite.

    Prefix tokens that go through the stitch, too, are rows of their image each.
    """
    portions = list(activation) if spec.carries_prefix else activation
    rows = rows_on_grids(portions, sender, [receiver.cut.grid], settings)
    if rows is None:
        return None
    x = rows[receiver.cut.grid]
    if not spec.carries_prefix or receiver.prefix_rows is None:
        return x, receiver.rows
    prefix = torch.cat([portion[:, : spec.in_prefix_tokens] for portion in portions])
    return _append_prefix(x, prefix), _append_prefix(receiver.rows, receiver.prefix_rows)


def _append_prefix(rows: Tensor, prefix: Tensor) -> Tensor:
    """Rows and prefix tokens (images x tokens x channels) in one, image by image."""
    by_image = rows.view(len(prefix), -1, rows.shape[1])
    return torch.cat([by_image, prefix.to(rows.dtype)], dim=1).flatten(0, 1)


def _upsample_at(x: Tensor, grid: tuple[int, int], places: Tensor) -> Tensor:
    """What `resample` gives at some positions of a larger grid (images x positions), without the rest of it.

    Resampling is linear and separable, so that each value is a weighted sum over the small grid.
    """
    down, across = (
        resample(torch.eye(n, device=x.device, dtype=x.dtype)[None, None], (m, n))[0, 0]
        for n, m in zip(x.shape[-2:], grid, strict=True)
    )
    weights = down[places // grid[1], :, None] * across[places % grid[1], None, :]
    return x.flatten(2) @ weights.flatten(2).transpose(1, 2)


def centred_or_none(rows: Tensor, settings: CalibrationSettings, *, name: str) -> CentredRows | None:
    """The rows made ready for CKA; None where they do not vary, so that the cut is no candidate.

    Too few rows for the estimator, and rows that are not finite, are a CalibrationError.
    """
    needed = 4 if settings.estimator == "debiased" else 2
    if len(rows) >= needed and is_finite(rows):
        low, high = rows.aminmax(dim=0)
        if not (high - low > 1e-6 * torch.maximum(high, -low).clamp(min=1e-30)).any():
            return None
    return centre_rows(rows, estimator=settings.estimator, name=name)


def is_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; its sum tells most often, in a fortieth of the time."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


@torch.inference_mode()
def calibrate(
    parts: Segmented, images: Iterable[Tensor], settings: CalibrationSettings, num_held_out: int | None = None
) -> Calibrated:
    """Run a source once over batches (batch, channels, height, width) in [0, 1] of calibration images.

    The last `num_held_out` of the images judge stitches and healing; None: a quarter.

    Raises:
        CalibrationError: If there are too few images, or an activation is not finite.
    """
    keepers = [_Keeper(cut, settings) for cut in parts.cuts]
    spool, features = Spool(settings.keep_activations), []
    for batch in images:
        for chunk in chunks(batch, parts.images_at_once):
            x = parts.preprocess(chunk)
            for keeper, piece in zip(keepers, parts.fused, strict=False):
                x = piece(x)
                keeper.add(x, spool)
            features.append(parts.fused[-1](x).float())
    if not features:
        raise CalibrationError("There are no calibration images.")
    joined = torch.cat(features)
    return Calibrated(
        parts,
        [keeper.statistics(f"cut {keeper.cut.name!r} of source {parts.name!r}") for keeper in keepers],
        [Carried(keeper.portions) for keeper in keepers],
        joined,
        held_out.num_held_out(len(joined)) if num_held_out is None else num_held_out,
    )


class _Keeper:
    """Gathers what is kept of one cut, a few images at a time."""

    def __init__(self, cut: Cut, settings: CalibrationSettings) -> None:
        self.cut = cut
        self.portions: list[Portion] = []
        self._settings = settings
        self._num_images = 0
        self._rows: list[Tensor] = []
        self._prefixes: list[Tensor] = []

    def add(self, x: Tensor, spool: Spool) -> None:
        self.portions.append(spool.put(x))
        rows = sampled_rows(to_map(x, self.cut), self.cut.grid, self._settings, first_image=self._num_images)
        self._rows.append(rows.float())
        if self.cut.num_prefix_tokens:
            self._prefixes.append(x[:, : self.cut.num_prefix_tokens].float())
        self._num_images += len(x)

    def statistics(self, name: str) -> CutStatistics:
        rows = torch.cat(self._rows)
        prefix = torch.cat(self._prefixes) if self._prefixes else None
        return CutStatistics(self.cut, rows, centred_or_none(rows, self._settings, name=name), prefix)
