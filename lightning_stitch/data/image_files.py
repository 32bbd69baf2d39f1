"""Image files and folders of them as a dataset, decoded to what a network was calibrated on."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_stitch.data.folders import image_suffixes, is_hidden, list_first
from lightning_stitch.data.images import Decoder, open_image
from lightning_stitch.data.labels import number_labels
from lightning_stitch.errors import CalibrationError


def list_images(paths: Sequence[str | Path]) -> list[Path]:
    """List the image files that paths name, each name once, where it first stood.

    Files are taken whatever their suffix; of folders the files with a suffix of an image, those in folders inside too,
    also behind links, sorted by name, without hidden and system folders. Two names of one file are two. Other files are
    left out with a warning. A path that does not exist or names no image is an error.
    """
    if not paths:
        raise CalibrationError("No images were named; give image files, or folders of them.")
    missing = [str(path) for path in paths if not Path(path).exists()]
    if missing:
        raise CalibrationError(f"{list_first(missing)} {'does' if len(missing) == 1 else 'do'} not exist.")
    files: dict[str, Path] = {}
    left_out: list[str] = []
    for path in map(Path, paths):
        for file in _find_images(path, left_out) if path.is_dir() else [path]:
            files.setdefault(os.path.abspath(file), file)
    if left_out:
        warnings.warn(f"{len(left_out)} files that are no images are left out: {list_first(left_out)}.", stacklevel=2)
    return list(files.values())


def _find_images(folder: Path, left_out: list[str]) -> list[Path]:
    """The images in a folder; what else is there, and not hidden, is added to a list."""
    files: list[Path] = []
    others: list[str] = []
    suffixes = image_suffixes()
    for parent, names in _walk(folder):
        images = [name for name in names if name.lower().endswith(suffixes) and not is_hidden(name)]
        files += [parent / name for name in images]
        others += [os.path.join(parent, name) for name in names if name not in images and not is_hidden(name)]
    if not files:
        raise CalibrationError(
            f"The folder {folder} holds no images that Pillow reads; it holds {len(others)} other files. A file "
            f"with another suffix can be named itself."
        )
    left_out += sorted(others)
    return sorted(files, key=lambda file: file.parts)


def _walk(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[tuple[Path, list[str]]]:
    """Each folder, links followed, with the names of its files; a link to a folder that it lies in is not."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise CalibrationError(f"The folder {folder} cannot be listed: {error.strerror}.") from error
    inside = [entry.name for entry in entries if entry.is_dir()]
    yield folder, [entry.name for entry in entries if entry.name not in inside]
    for name in inside:
        if not is_hidden(name):
            yield from _walk(folder / name, above | {real})


def select_readable(files: Sequence[Path], *, skip_unreadable: bool) -> tuple[list[Path], dict[Path, str]]:
    """Select the files that are images, and say of the rest why they are none.

    To skip unreadable files each of them is decoded. Otherwise only their first bytes are read: most of what is no
    image is found before the long work, at no cost.
    """
    reasons: dict[Path, str] = {}
    for file in files:
        try:
            (open_image(str(file)) if skip_unreadable else Image.open(file)).close()
        except Exception as error:  # a broken file ends in whatever its decoder happens to stumble over
            reasons[file] = f"{file}: {error}"
    listed = list_first(list(reasons.values()))
    if reasons and not skip_unreadable:
        raise CalibrationError(
            f"{len(reasons)} of {len(files)} files cannot be read as images: {listed}. Mend, remove or skip them "
            f"(skip_unreadable)."
        )
    if len(reasons) == len(files):
        raise CalibrationError(f"None of {len(files)} files can be read as an image: {listed}.")
    return [file for file in files if file not in reasons], reasons


class ImageFileSet(Dataset):
    """Images of files, each with its number.

    An item is `(image, index)`: the image float32, channels x height x width, in [0, 1], resized as
    `CalibrationDataModule` resizes (bilinear with antialiasing, aspect ratio not kept); its place in `files`.

    Args:
        files: The files.
        image_shape: (channels, height, width) that the network was calibrated on.
    """

    def __init__(self, files: Sequence[Path], image_shape: tuple[int, int, int]) -> None:
        if image_shape[0] not in (1, 3):
            raise CalibrationError(
                f"The network takes images of {image_shape[0]} channels, and image files hold 1 or 3. Predict with a "
                f"dataloader of your own: trainer.predict(model, dataloader)."
            )
        self.files = [str(file) for file in files]
        self._decoder = Decoder(image_shape[0], image_shape[1:])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        try:
            image = open_image(file)
            if image.mode == "RGB" and self._decoder.num_channels == 1:
                raise CalibrationError("it is in colour, the network takes grey images; convert it to grey")
            return self._decoder(image), index
        except Exception as error:  # a broken file ends in whatever its decoder happens to stumble over
            raise CalibrationError(f"The image {file} cannot be used: {error}.") from error


class LabelledImages(Dataset):
    """Images in memory or in files, each with its label, as `CalibrationDataModule(train=)` takes a dataset.

    An item is `(image, number)`: files are opened upright, as grey or RGB; the number is the place in `classes`.

    Args:
        images: Tensors, PIL images, arrays, or paths of files.
        labels: The class of each: integers, names or one-hot rows. At least two occur.

    Attributes:
        classes: Names of the classes, sorted by their labels.
        targets: The number of each image's class.

    Raises:
        CalibrationError: If labels cannot be used or are not as many as images.
    """

    def __init__(self, images: Sequence[Any] | Tensor, labels: Sequence[Any] | Tensor) -> None:
        numbers, names = number_labels(labels, len(images))
        self.files = images
        self.targets, self.classes = numbers.tolist(), [str(name) for name in names]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return _opened(self.files[index]), self.targets[index]


def is_files(images: Any) -> bool:
    """Whether images are named by their files or folders, instead of being in memory.

    Raises:
        CalibrationError: If they are neither.
    """
    if isinstance(images, str | Path):
        return True
    if not hasattr(images, "__len__") or not hasattr(images, "__getitem__"):
        raise CalibrationError(
            f"Images are a path, or a sequence of paths, tensors, PIL images, arrays; found {images!r}."
        )
    return len(images) > 0 and isinstance(images[0], str | Path)


def decode_images(images: Sequence[Any] | Tensor, image_shape: tuple[int, int, int]) -> Tensor:
    """Images (images, *image_shape), float32 in [0, 1], of tensors, PIL images, arrays or paths of files, resized.

    Raises:
        CalibrationError: If one cannot be used; the message names it by its place.
    """
    decode, decoded = Decoder(image_shape[0], image_shape[1:]), []
    for index, image in enumerate(images):
        try:
            decoded.append(decode(_opened(image)))
        except (CalibrationError, OSError) as error:
            named = f" ({image})" if isinstance(image, str | Path) else ""
            raise CalibrationError(f"Image {index}{named}: {error}.") from error
    return torch.stack(decoded)


def _opened(image: Any) -> Any:
    return open_image(str(image)) if isinstance(image, str | Path) else image
