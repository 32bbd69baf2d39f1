"""A source's own view of an image: its size where that is fixed, its mean and standard deviation."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_stitch.recipe import Preprocessing

# torch resamples tensors in these; what else a source was trained with (lanczos, random) comes nearest to bicubic.
_MODES = {"bilinear": "bilinear", "bicubic": "bicubic", "nearest": "nearest"}


class Preprocess(nn.Module):
    """Images in [0, 1], (batch, channels, height, width), to what a source was trained on.

    Images keep their size unless the source accepts only its own; then they are resized with anti-aliasing.

    Args:
        preprocessing: The source's preprocessing.
    """

    traced_whole = True
    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size = preprocessing.input_size[1:] if preprocessing.fixed_size else None
        self.mode = _MODES.get(preprocessing.interpolation, "bicubic")
        # Not in the state dict: the recipe holds them.
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Resize where the size is fixed, then normalise."""
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            antialias = self.mode != "nearest"
            align = None if self.mode == "nearest" else False
            images = functional.interpolate(
                images, size=self.size, mode=self.mode, align_corners=align, antialias=antialias
            )
        return (images - self.mean) / self.std

    def activation_bytes(self, image_shape: tuple[int, int, int]) -> int:
        """Most bytes alive at once while one image of a shape goes through: it, its view, and what is subtracted."""
        given, viewed = math.prod(image_shape), math.prod((image_shape[0], *(self.size or image_shape[1:])))
        resized = viewed if self.size not in (None, tuple(image_shape[1:])) else 0
        return 4 * (given + resized + 2 * viewed)


def view_size(preprocessing: Preprocessing, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """(channels, height, width) in which a source sees images of a shape."""
    return preprocessing.input_size if preprocessing.fixed_size else image_shape
