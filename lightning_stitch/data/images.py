"""Images as datasets give them, checked and decoded to float tensors in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from lightning_stitch.data.origins import find_file
from lightning_stitch.data.target_values import TargetReaders, TargetValue
from lightning_stitch.errors import CalibrationError
from lightning_stitch.stitching import object_to


class Items(Protocol):
    """A map-style dataset of (image, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class CheckedImages(Dataset):
    """Checked (image, target) pairs of a dataset at the chosen indices; images alone where there are no targets."""

    dataset: Items
    name: str
    indices: Tensor
    decoder: Decoder
    image_shape: tuple[int, ...] | None
    targets: TargetReaders | None
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, TargetValue] | Tensor:
        """Read one image and its target, checked; an error names the image by its index and, where known, its file."""
        index = int(self.indices[position])
        with naming_image(self.dataset, self.name, index):
            item = self.dataset[index]
            image = self.decoder(image_of(item))
            target = None if self.targets is None else self.targets(index, target_of(item))
            if self.image_shape is not None and image.shape != self.image_shape:
                raise CalibrationError(
                    f"it is {tuple(image.shape)}, others are {self.image_shape} (channels, height, width); pass "
                    f"image_size= to resize all of them"
                )
        return image if target is None else (image, target)


@contextmanager
def naming_image(dataset: Any, name: str, index: int) -> Iterator[None]:
    """Make any error of reading an image, whatever its decoder stumbles over, one that names image and file."""
    try:
        yield
    except Exception as error:
        file = find_file(dataset, index)
        kind = "" if isinstance(error, CalibrationError | OSError) else f"{type(error).__name__}: "
        raise CalibrationError(
            f"Image {index} of {name}{'' if file is None else f' ({file})'}: {kind}{error}."
        ) from error


def image_of(item: Any) -> Any:
    """The image in a dataset's item: the first of several values, or all of it."""
    if isinstance(item, Mapping):
        raise _no_pair(item)
    return item[0] if isinstance(item, tuple | list) and item else item


def target_of(item: Any) -> Any:
    """The target in a dataset's item."""
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise _no_pair(item)
    return item[1]


def _no_pair(item: Any) -> CalibrationError:
    keys = f" with the keys {sorted(map(str, item))}" if isinstance(item, Mapping) else ""
    return CalibrationError(
        f"an item is a pair (image, label); found a {type(item).__name__}{keys}. Wrap the dataset in one whose "
        f"__getitem__ returns such pairs, or pass task='none' for images without labels"
    )


class Decoder:
    """Turns an image as a dataset gives it into a float32 tensor, channels x height x width, in [0, 1]."""

    def __init__(
        self,
        num_channels: int,
        image_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()) or min(std or (1.0,)) <= 0:
            raise CalibrationError(
                f"mean= and std= belong together, one number per channel, std above 0; found mean={mean}, std={std}."
            )
        self.num_channels = num_channels
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.mean = None if mean is None else torch.tensor(mean).view(-1, 1, 1)
        self.std = None if std is None else torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Any) -> Tensor:
        """An image as it is read: float32 in [0, 1], channels x height x width."""
        pixels = self.scale(image)
        if len(pixels) == 1 and self.num_channels == 3:
            pixels = pixels.expand(3, -1, -1)
        if len(pixels) != self.num_channels:
            raise CalibrationError(
                f"the image has {len(pixels)} channels (channels first: {tuple(pixels.shape)}), num_channels is "
                f"{self.num_channels}; tensors are read as C x H x W, numpy arrays as H x W x C"
            )
        if (objection := object_to(pixels[None], (self.num_channels, None, None))) is not None:
            raise CalibrationError(objection)
        if self.image_size is not None and pixels.shape[1:] != self.image_size:
            pixels = interpolate(pixels[None], self.image_size, mode="bilinear", antialias=True)[0]
        return pixels.clamp(0, 1)

    def scale(self, image: Any) -> Tensor:
        """An image in its own size and channels, float32, channels x height x width, a normalisation undone."""
        if isinstance(image, Image.Image) and not len(image.getbands()) == self.num_channels == 4:
            image = convert_upright(image)
        pixels = to_channels_first(image)
        if pixels.dtype in (torch.uint8, torch.uint16):
            if self.mean is not None:
                raise CalibrationError(f"mean= and std= undo a normalisation, but {pixels.dtype} images have none")
            return pixels.float() / torch.iinfo(pixels.dtype).max
        if not pixels.is_floating_point():
            raise CalibrationError(f"an image is uint8, uint16 or float in [0, 1]; found {pixels.dtype}")
        if self.mean is None or self.std is None:
            return pixels.float()
        if len(self.mean) not in (1, len(pixels)):
            raise CalibrationError(f"mean= has {len(self.mean)} numbers, the image has {len(pixels)} channels")
        return pixels.float() * self.std + self.mean


def to_channels_first(image: Any) -> Tensor:
    """Bring a PIL image, an array (H x W x C or H x W) or a tensor (C x H x W or H x W) to C x H x W, dtype kept."""
    if isinstance(image, Image.Image):
        image = np.array(image)
    if isinstance(image, np.ndarray):
        # The copy is writable, of positive strides and of native byte order, as torch wants it.
        pixels = torch.from_numpy(np.array(image, dtype=image.dtype.newbyteorder("=")))
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels
    elif isinstance(image, Tensor):
        pixels = image
    else:
        raise CalibrationError(f"an image is a PIL image, a tensor or a numpy array; found {type(image).__name__}")
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or not pixels.numel():
        raise CalibrationError(f"an image has a height, a width and channels; found shape {tuple(pixels.shape)}")
    return pixels


def probe(
    datasets: Mapping[str, Items],
    decoder: Decoder,
    readers: Mapping[str, TargetReaders],
    shape: tuple[int, ...] | None = None,
) -> tuple[int, int, int]:
    """Read a few items of each dataset, so that most errors come before the long work; return their images' shape."""
    for name, dataset in datasets.items():
        for index in spread(len(dataset)):
            item = CheckedImages(dataset, name, torch.tensor([index]), decoder, shape, readers.get(name))[0]
            shape = tuple((item if isinstance(item, Tensor) else item[0]).shape)
    return cast("tuple[int, int, int]", shape)


def spread(length: int, count: int = 8) -> list[int]:
    """Up to `count` indices, spread evenly over so many items."""
    return sorted({length * k // count for k in range(count)}) if length else []


def open_image(path: str) -> Image.Image:
    """Open an image file upright, as grey (8 or 16 bits) or RGB.

    torchvision's own loader makes 16-bit grey images white, and leaves them turned as the camera was held.
    """
    with Image.open(path) as image:
        image.load()
        return convert_upright(image)


def convert_upright(image: Image.Image) -> Image.Image:
    """An image of any mode as grey (8 or 16 bits) or RGB, turned as its EXIF orientation says."""
    if image.mode in ("I", "F"):
        raise CalibrationError(
            f"its pixels are 32-bit numbers (mode {image.mode!r}), whose black and white are not known; scale them to "
            f"0..255 and call .convert('L')"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    return image if image.mode == "L" or image.mode.startswith("I;16") else image.convert("RGB")
