"""A source's own view of an image: its size where that is fixed, its mean and standard deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_stitch.cutting import Cut, CutGraph
from lightning_stitch.errors import CutError, StitchError, require_text
from lightning_stitch.recipe import Preprocessing
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.source import Source

# torch resamples tensors in these; what else a source was trained with (lanczos, random) comes nearest to bicubic.
_MODES = ("bilinear", "bicubic", "nearest")


class Preprocess(nn.Module):
    """Images in [0, 1], (batch, channels, height, width), to what a source was trained on.

    Images keep their size unless another is named or the source accepts only its own; then they are resized with
    anti-aliasing.

    Args:
        preprocessing: How the source wants its images.
        size: (height, width) to resize them to; None: as above.
    """

    traced_whole = True
    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.size = preprocessing.input_size[1:] if preprocessing.fixed_size else size
        self.mode = preprocessing.interpolation if preprocessing.interpolation in _MODES else "bicubic"
        # Not in the state dict: the recipe holds them.
        for name, values in (("mean", preprocessing.mean), ("std", preprocessing.std)):
            # As sources and images, whatever torch's default is.
            x = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            self.register_buffer(name, x, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Resize where there is a size, then normalise."""
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = functional.interpolate(images, self.size, mode=self.mode, antialias=self.mode != "nearest")
        return (images - self.mean) / self.std


def view_size(preprocessing: Preprocessing, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(channels, height, width) in which a source sees images of a shape."""
    return preprocessing.input_size if preprocessing.fixed_size else image_shape


def cut_source(
    source: Source, settings: CalibrationSettings, image_shape: tuple[int, int, int]
) -> tuple[CutGraph, list[Cut], str | None]:
    """Cut a source for images of a shape: its graph, the cuts, and the name of the cut where networks end in it.

    Raises:
        CutError: If it cannot be cut, has no feature vector to end at, or does not take images of that shape.
    """
    if image_shape[0] != source.preprocessing.input_size[0]:
        raise CutError(
            f"Source {source.name!r} takes images of {source.preprocessing.input_size[0]} channels; the calibration "
            f"images have {image_shape[0]}."
        )
    size = view_size(source.preprocessing, image_shape)
    try:
        graph = source.graph_at(size)
        end_cut = graph.feature_cut() if settings.until == "features" else None
        cuts = graph.cuts(settings.granularity_of(source.name))
    except CutError as error:
        raise CutError(
            f"Source {source.name!r} at {size[0]}x{size[1]}x{size[2]}: {error}{_advise_size(source, settings, size)}"
        ) from error
    if end_cut is not None:
        # What lies between a cut and the features must have weights, or there is nothing to stitch to.
        cuts = [cut for cut in cuts if cut.macs < end_cut.macs]
    return graph, cuts, None if end_cut is None else end_cut.name


def check_names(names: Sequence[str], settings: CalibrationSettings) -> None:
    """Refuse, with a StitchError, to have no sources, two of one name, or settings for sources that are not there."""
    if not names:
        raise StitchError("A pool needs at least one source.")
    require_text(names, "The name of a source")
    if len(set(names)) < len(names):
        raise StitchError(f"Sources of a pool need names of their own; found {names}. load_source takes a name=.")
    named = settings.granularity
    if isinstance(named, Mapping) and (strangers := sorted(set(named) - set(names))):
        raise StitchError(f"granularity= names {strangers}, but the sources are {names}.")


def without_strangers(settings: CalibrationSettings, names: Sequence[str]) -> CalibrationSettings:
    """The same settings for those of the sources that are left, where some were rejected."""
    if not isinstance(settings.granularity, Mapping):
        return settings
    return replace(
        settings, granularity={key: settings.granularity[key] for key in names if key in settings.granularity}
    )


def _advise_size(source: Source, settings: CalibrationSettings, size: tuple[int, int, int]) -> str:
    """What to do about a source that takes images of its native size alone."""
    native = source.preprocessing.input_size
    if size == native:
        return ""
    try:
        cut_source(source, settings, native)
    except StitchError:
        return ""
    return (
        f"\nIt does take its native {native[0]}x{native[1]}x{native[2]}: use images of that size, or say "
        f"fixed_size=True in its preprocessing, and it gets them resized."
    )
