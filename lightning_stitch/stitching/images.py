"""Batches of images as a search reads them: hashed, put down to be read again, some of them held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import Carried, Portion, Spool, key_of, tensors_hash
from lightning_stitch.stitching.image_checks import Batch, check_images, images_of, is_empty


def read_images(
    batches: Iterable[Batch], image_shape: tuple[int, int, int], device: torch.device, labels: list[Tensor]
) -> Iterator[Tensor]:
    """The images of batches, checked, in float32 on a device; the labels beside them are put into a list.

    Empty batches are skipped.
    """
    for batch in batches:
        if is_empty(batch):
            continue
        images = images_of(batch)
        if not isinstance(batch, Tensor) and len(batch) > 1:
            labels.append(torch.as_tensor(batch[1]).cpu())
        check_images(images, image_shape)
        yield images.to(device, torch.float32)


@dataclass(frozen=True, slots=True)
class CalibrationImages:
    """Calibration images, put down in float32, those that are held out last.

    The hash is of them as they came, whatever batches they came in, and of which are held out.
    """

    images: Carried
    num_held_out: int
    hash: str


def store_images(
    batches: Iterable[Batch],
    image_shape: tuple[int, int, int],
    spool: Spool,
    device: torch.device,
    groups: Sequence[Hashable] | None = None,
) -> CalibrationImages:
    """Read calibration images once, and put them down in a spool, to be taken up again on a device.

    Labels beside them are not looked at. `groups` has the label of each image's group, which is held out as a whole or
    not at all; without, each image is by itself.

    Raises:
        CalibrationError: If they are fewer than 4, one cannot be used, or the groups cannot (`held_out_groups`).
    """
    held_out = None if groups is None else held_out_groups(groups)
    fitted: list[Portion] = []
    judging: list[Portion] = []
    counts: list[int] = []

    def read() -> Iterator[Tensor]:
        for images in (images_of(batch) for batch in batches if not is_empty(batch)):
            check_images(images, image_shape)
            begun = sum(counts)
            judges = [] if held_out is None else held_out[begun : begun + len(images)]
            is_judge = torch.tensor(judges + [False] * (len(images) - len(judges)), device=images.device)
            for portions, part in ((fitted, images[~is_judge]), (judging, images[is_judge])):
                if len(part):
                    portions.append(spool.put(part.to(device, torch.float32)))
            counts.append(len(images))
            yield images.to(torch.float32)

    images_hash, count = tensors_hash(read()), sum(counts)
    if count < 4:
        raise CalibrationError(f"Calibration needs at least 4 images; found {count}.")
    if held_out is None:
        return CalibrationImages(Carried(fitted), num_held_out(count), images_hash)
    if len(held_out) != count:
        raise CalibrationError(
            f"groups= needs one label for each calibration image; found {len(held_out)} for {count}."
        )
    images_hash = f"{images_hash}, held out {key_of(held_out)}"
    return CalibrationImages(Carried([*fitted, *judging]), sum(held_out), images_hash)


@dataclass(frozen=True, slots=True)
class WithoutLabels:
    """The images alone of batches that may have labels."""

    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Tensor]:
        return (images_of(batch) for batch in self.batches if not is_empty(batch))

    @property
    def dataset(self) -> object:
        """What the batches are of, whose length a progress bar shows."""
        return getattr(self.batches, "dataset", None)


def num_held_out(num_images: int) -> int:
    """How many images are held out of so many."""
    return num_images // 4


def held_out_groups(groups: Sequence[Hashable]) -> list[bool]:
    """Which images are held out where groups must not be split, for each image.

    Whole groups, those met last first, as long as they hold no more than a quarter of the images; the smallest group
    where each holds more. One group alone is a CalibrationError.
    """
    members = Counter(groups)
    if len(members) < 2:
        raise CalibrationError(
            f"Holding out whole groups needs images of at least 2 groups; found {list(members) or 'no images'}. Leave "
            f"groups= out, and the last quarter of the images is held out."
        )
    judging: set[Hashable] = set()
    count = 0
    for group in reversed(members):
        if count + members[group] <= num_held_out(len(groups)):
            judging.add(group)
            count += members[group]
    judging = judging or {min(reversed(members), key=members.__getitem__)}
    return [group in judging for group in groups]
