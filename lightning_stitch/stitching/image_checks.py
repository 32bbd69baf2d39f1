"""Whether what a loader gives is images that a network can take: one check, in one text, for every entrance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError

Batch = Tensor | Sequence[Tensor]
Shape = tuple[int, int | None, int | None]
"""(channels, height, width); None: any."""

# A bicubic resize overshoots by up to this much at sharp edges; a normalised image mostly leaves [0, 1] by far more.
_OVERSHOOT = 0.1
# What overshoots are at most of the sum of absolute values: the negative lobes of the usual kernels around a single
# white pixel on black have a fifth of it. Of normalised images about half is negative.
_NEGATIVE_SHARE = 0.25
_ROUNDING = 1e-3


def images_of(batch: Any) -> Tensor:
    """The images of a batch of images, or of images and targets; a CalibrationError where it is neither."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Sequence) and len(batch) and isinstance(batch[0], Tensor):
        return batch[0]
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        kind += f" with the keys {sorted(map(str, batch))}"
    elif isinstance(batch, Sequence) and len(batch):
        kind += f" that begins with a {type(batch[0]).__name__}"
    raise CalibrationError(
        f"A batch must be a tensor of images, or (images, targets) in this order; found a {kind}. Let the dataset give "
        f"pairs (image, target), or the loader a collate_fn that makes them of it."
    )


def is_empty(batch: Any) -> bool:
    """Whether a batch holds no images; a collate function that leaves out what is broken may give None."""
    return batch is None or (isinstance(batch, Tensor | Sequence) and not len(batch)) or not len(images_of(batch))


def check_images(images: Any, shape: Shape) -> None:
    """Refuse (CalibrationError) what is not images of a shape, finite floats in [0, 1], (batch, *shape)."""
    if (objection := object_to(images, shape)) is not None:
        raise CalibrationError(f"{objection}.")


def object_to(images: Any, shape: Shape) -> str | None:
    """Why images cannot be used: what was found, what is expected and how to mend it; None: they can.

    Values are read once, for the least and the largest. Those of an image in [0, 1] may leave it a little, as a bicubic
    resize overshoots, unless so much of them is negative that they were normalised to a mean of about 0.
    """
    if not isinstance(images, Tensor):
        return _say(type(images).__name__, shape, "torch.stack(list_of_images) makes one tensor of several")
    kind, values = str(images.dtype), images.detach()
    if not images.numel() or images.is_complex():
        return _say(f"{kind} of shape {tuple(images.shape)}", shape, "look at what the loader gives")
    low, high = (float(value) for value in (values if values.is_floating_point() else values.float()).aminmax())
    mend = _mend_shape(tuple(images.shape), shape) or _mend_values(values, low, high)
    if mend is None:
        return None
    return _say(f"{kind} of shape {tuple(images.shape)} from {low:.3g} to {high:.3g}", shape, mend)


def _say(what: str, shape: Shape, mend: str) -> str:
    sizes = [name if size is None else str(size) for name, size in zip(("height", "width"), shape[1:], strict=True)]
    return (
        f"images must be float in [0, 1], (batch, {', '.join([str(shape[0]), *sizes])}), channels first; found {what}: "
        f"{mend}"
    )


def _mend_shape(size: tuple[int, ...], shape: Shape) -> str | None:
    channels = shape[0]
    if len(size) != 4:
        return "images[None] makes a batch of one image, images[:, None] gives grey ones their channel"
    if size[1] != channels:
        if size[3] == channels:
            return "put the channels first, images.permute(0, 3, 1, 2)"
        if size[1] == 1:
            return f"repeat the grey channel, images.expand(-1, {channels}, -1, -1)"
        if (size[1], channels) == (4, 3):
            return "leave the fourth channel (transparency?) out, images[:, :3]"
        if (size[1], channels) == (3, 1):
            return "make them grey, torchvision.transforms.Grayscale()"
        return f"the network was made for {channels} channels"
    if any(wanted not in (None, there) for wanted, there in zip(shape[1:], size[2:], strict=True)):
        return f"resize them, torchvision.transforms.Resize({shape[1:]})"
    return None


def _mend_values(values: Tensor, low: float, high: float) -> str | None:
    whole = f"divide them, images.float() / {255 if high <= 300 else 'the largest value of their format, as 65535'}"
    if not values.is_floating_point():
        return "make them float, images.float()" if values.dtype == torch.bool else whole
    if not math.isfinite(low + high):
        num_bad = int((~values.isfinite().flatten(1).all(1)).sum())
        return f"{num_bad} of the {len(values)} images have NaN or infinite values; look for a division by zero"
    is_centred = low < -_ROUNDING and _lies_around_zero(values)
    if low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT and not is_centred:
        return None
    if high > 5 and low > -0.3 * high:  # less where a mean was taken off
        return whole
    may_overshoot = low > -5 * _OVERSHOOT and high < 1 + 5 * _OVERSHOOT and not is_centred
    return (
        ("if a resize overshoots, images.clamp(0, 1) mends that; else " if may_overshoot else "")
        + "they look normalised. Leave Normalize out, the network normalises itself; or give its mean= and std= to "
        "CalibrationDataModule or StitchedBackbone, which undo it"
    )


def _lies_around_zero(values: Tensor) -> bool:
    values = values.float()
    return bool(-values.clamp(max=0).sum() > _NEGATIVE_SHARE * values.abs().sum())
