"""Batches of images as a search reads them: checked, hashed, put down to be read again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from lightning_stitch._identity import tensors_hash
from lightning_stitch._spool import Carried, Portion, Spool
from lightning_stitch.errors import CalibrationError
from lightning_stitch.ranking import MISSING_LABELS

Batch = Tensor | Sequence[Tensor]


def images_of(batch: Batch) -> Tensor:
    """The images of a batch of images, or of images and labels."""
    return batch if isinstance(batch, Tensor) else batch[0]


def check_images(images: Tensor, image_shape: tuple[int, int, int]) -> None:
    """Refuse images of another shape, dtype or range.

    Raises:
        CalibrationError: If they are not finite floats (batch, *image_shape).
    """
    if tuple(images.shape[1:]) != image_shape:
        raise CalibrationError(
            f"Images must come in batches of (batch, {', '.join(map(str, image_shape))}), channels first; found "
            f"{tuple(images.shape)}."
        )
    if not images.is_floating_point() or not torch.isfinite(images).all():
        raise CalibrationError("Images must be finite floats in [0, 1]; found NaN, infinity or another dtype.")


def read_again(
    batches: Iterable[Batch], image_shape: tuple[int, int, int], device: torch.device, labels: list[Tensor]
) -> Iterator[Tensor]:
    """The images of batches in float32, one batch after the other; labels beside them go into a list.

    Args:
        batches: Batches of images, or of images and labels.
        image_shape: Their (channels, height, width).
        device: Where to.
        labels: What gets the labels of each batch.

    Raises:
        CalibrationError: If an image cannot be used.
    """
    for batch in batches:
        images = images_of(batch)
        if not isinstance(batch, Tensor) and len(batch) > 1:
            labels.append(torch.as_tensor(batch[1]).cpu())
        check_images(images, image_shape)
        yield images.to(device, torch.float32)


def put_down(
    batches: Iterable[Batch], image_shape: tuple[int, int, int], spool: Spool, device: torch.device
) -> tuple[Carried, int, str]:
    """Read calibration images once.

    Args:
        batches: Batches of them; labels beside them are not looked at.
        image_shape: Their (channels, height, width).
        spool: Where to put them down.
        device: Where to take them up again.

    Returns:
        The images in float32, their number, and their hash, whatever batches they came in.

    Raises:
        CalibrationError: If they are fewer than 4, or one cannot be used.
    """
    kept: list[Portion] = []
    counts: list[int] = []

    def read() -> Iterator[Tensor]:
        for images in map(images_of, batches):
            check_images(images, image_shape)
            kept.append(spool.put(images.to(device, torch.float32)))
            counts.append(len(images))
            yield images.to(torch.float32)

    images_hash = tensors_hash(read())
    if sum(counts) < 4:
        raise CalibrationError(f"Calibration needs at least 4 images; found {sum(counts)}.")
    return Carried(kept), sum(counts), images_hash


def labelled(batches: Iterable[Batch]) -> Iterable[Batch]:
    """The same batches, once the first is seen to have labels.

    Raises:
        CalibrationError: If it has none.
    """
    iterator = iter(batches)
    first = next(iterator, None)
    if isinstance(first, Tensor) or (first is not None and len(first) < 2):
        raise CalibrationError(MISSING_LABELS)
    if iterator is not batches:
        # What can be read anew is: a loader's workers would wait through the whole search, and Ctrl-C would end them.
        return batches
    return chain([] if first is None else [first], iterator)
