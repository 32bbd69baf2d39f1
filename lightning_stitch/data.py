"""The four disjoint image sets that composing a stitched network takes, as a LightningDataModule."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import DatasetFolder, ImageFolder

from lightning_stitch._lightning import check_same_namespace, pl
from lightning_stitch.errors import CalibrationError

_DEFAULT_SHARE = 0.2
_PROBES = 8
# A bicubic resize overshoots by up to this much at sharp edges; a normalised image leaves [0, 1] by far more.
_OVERSHOOT = 0.1


class CalibrationDataModule(pl.LightningDataModule):
    """Supply the calibration, train, selection and test sets; no image is in two of them.

    Every batch is `(images, targets)`: images float32, N x C x H x W, values in [0, 1], not normalised (a stitched
    network normalises inside), all of one size; targets int64, N, classes numbered from 0.

    | set | what it is for | how it is drawn |
    |---|---|---|
    | calibration | fit stitches, score CKA; labels unused | at random |
    | train | fit the head, fine-tune | stratified by label |
    | selection (= val) | rank candidates | `val` where given, else stratified out of `train` |
    | test | report, never choose | `test` where given, else stratified out of `train` |

    Exactly one of `train`, `image_folder` and `datamodule` says where the images come from. The draws depend on `seed`
    and the datasets alone: they repeat, agree on every rank and leave the global random state untouched.

    Args:
        train: Labelled pool, items `(image, label)`. An image is a PIL image, a tensor (C x H x W or H x W) or a numpy
            array (H x W x C or H x W), of uint8, uint16 or float in [0, 1] (up to 0.1 outside is clamped); a label is
            an integer.
        val: Selection set of the same kind.
        test: Test set of the same kind.
        image_folder: A folder that holds `train` and, optionally, `val` (`valid`, `validation`) and `test`, each with
            one folder of images per class; or that holds the class folders themselves.
        datamodule: Another LightningDataModule; the datasets of its train, val and test dataloaders are used with
            their transforms, its samplers and collate functions are not.
        image_size: Every image is resized to exactly this (height, width), one number meaning a square, by bilinear
            interpolation with antialiasing; the aspect ratio is not kept. None: the images are of one size already.
        calibration_samples: Images in the calibration set, at least 4.
        train_samples: Images in the train set; None: all that are left.
        selection_samples: Images in the selection set, or their share of those left after calibration (of `val` where
            given). None: all of `val`, or a share of 0.2 of the rest.
        test_samples: Likewise for the test set.
        num_channels: Channels of the images supplied. Grey images are repeated to three; other mismatches are errors.
        mean: What the given float tensors were normalised with, per channel; undone here.
        std: Likewise.
        batch_size: Images in a batch.
        num_workers: Worker processes of each dataloader.
        pin_memory: Whether batches are put in page-locked memory.
        seed: Seed of the split and of the shuffling of `train_dataloader`.

    Raises:
        CalibrationError: From the constructor where the arguments contradict each other; from `setup` where folder,
            images or labels cannot be used or are too few; from a dataloader where an image is unreadable, of another
            size, NaN or out of range, with its index and, where known, its file.

    Example:
        >>> digits = TensorDataset(torch.rand(100, 1, 8, 8), torch.arange(100) % 10)
        >>> CalibrationDataModule(digits, calibration_samples=20).summary
        {'calibration': 20, 'train': 48, 'selection': 16, 'test': 16}
    """

    def __init__(
        self,
        train: Dataset | None = None,
        val: Dataset | None = None,
        test: Dataset | None = None,
        *,
        image_folder: str | None = None,
        datamodule: pl.LightningDataModule | None = None,
        image_size: int | tuple[int, int] | None = None,
        calibration_samples: int = 32,
        train_samples: int | None = None,
        selection_samples: int | float | None = None,
        test_samples: int | float | None = None,
        num_channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int = 32,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        origins = {"train": train, "image_folder": image_folder, "datamodule": datamodule}
        given = [name for name, value in origins.items() if value is not None]
        if len(given) != 1:
            raise CalibrationError(
                f"Give exactly one of train=, image_folder= and datamodule=; found {' and '.join(given) or 'none'}."
            )
        if train is None and (val is not None or test is not None):
            raise CalibrationError(f"val= and test= belong to train=; {given[0]}= brings its own.")
        if calibration_samples < 4:
            raise CalibrationError(
                f"calibration_samples is {calibration_samples}, but stitches need at least 4; 32 is a good start."
            )
        samples = {"train": train_samples, "selection": selection_samples, "test": test_samples}
        for part, size in samples.items():
            if size is not None and (size <= 0 or (isinstance(size, float) and size > 1)):
                raise CalibrationError(f"{part}_samples is {size}; give a number from 1, a share up to 1.0, or None.")
        if datamodule is not None:
            check_same_namespace(datamodule, "datamodule")
            self.prepare_data_per_node = datamodule.prepare_data_per_node
        self.batch_size = batch_size
        self._decoder = _Decoder.of(num_channels, image_size, mean, std)
        self._given = {"train": train, "val": val, "test": test}
        self._image_folder = image_folder
        self._datamodule = datamodule
        self._calibration_samples = calibration_samples
        self._samples = samples
        self._loader_options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._seed = seed
        self._parts: dict[str, _Images] = {}

    def prepare_data(self) -> None:
        """Let a given datamodule download what it needs; otherwise there is nothing to do."""
        if self._datamodule is not None:
            self._datamodule.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Check images and labels and draw all four sets, once; later calls do nothing.

        Args:
            stage: Ignored: the sets are disjoint only if they are drawn together.

        Raises:
            CalibrationError: See the class.
        """
        if self._parts:
            return
        given = self._datasets()
        _check_disjoint(given)
        self._image_shape = _probe(given, self._decoder)
        train = given["train"]
        labels = _labels(train, "train")
        self._class_names = _class_names(train)
        self._num_classes = _count_classes(labels, self._class_names)
        explicit = {part: name for part, name in (("selection", "val"), ("test", "test")) if name in given}
        chosen = self._split(labels, [part for part in ("test", "selection") if part not in explicit])
        chosen |= {part: self._subset(given[name], part) for part, name in explicit.items()}
        self._parts = {
            part: _Images(given[name], name, chosen[part], self._decoder, self._image_shape, self._num_classes)
            for part in ("calibration", "train", "selection", "test")
            for name in [explicit.get(part, "train")]
        }

    def train_dataloader(self) -> DataLoader:
        """The train set, shuffled anew in every epoch."""
        return self._loader("train", shuffle=True)

    def head_dataloader(self) -> DataLoader:
        """The train set in a fixed order, for a head that is solved rather than trained."""
        return self._loader("train")

    def calibration_dataloader(self) -> DataLoader:
        """The calibration set in a fixed order; labels come along and are not to be used."""
        return self._loader("calibration")

    def selection_dataloader(self) -> DataLoader:
        """The selection set in a fixed order."""
        return self._loader("selection")

    def val_dataloader(self) -> DataLoader:
        """The selection set: a Trainer's validation chooses, too."""
        return self._loader("selection")

    def test_dataloader(self) -> DataLoader:
        """The test set in a fixed order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test set in a fixed order."""
        return self._loader("test")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        self.setup()
        return self._num_classes

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their labels; None where the dataset does not tell."""
        self.setup()
        return self._class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images supplied."""
        self.setup()
        return self._image_shape

    @property
    def summary(self) -> dict[str, int]:
        """Number of images in each set."""
        self.setup()
        return {part: len(images) for part, images in self._parts.items()}

    def _loader(self, part: str, *, shuffle: bool = False) -> DataLoader:
        self.setup()
        # A generator of its own: without one, iterating a DataLoader draws a seed from the global random state.
        generator = torch.Generator().manual_seed(self._seed)
        return DataLoader(
            self._parts[part], batch_size=self.batch_size, shuffle=shuffle, generator=generator, **self._loader_options
        )

    def _datasets(self) -> dict[str, _Items]:
        """The datasets given: "train" and, where there are such, "val" and "test"."""
        found: Mapping[str, Any] = self._given
        if self._image_folder is not None:
            found = _class_folders(Path(self._image_folder))
        elif self._datamodule is not None:
            if self.trainer is not None:
                self._datamodule.trainer = self.trainer
            found = _borrowed(self._datamodule)
        given = {name: dataset for name, dataset in found.items() if dataset is not None}
        for name, dataset in given.items():
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
                raise CalibrationError(
                    f"{name} is a {type(dataset).__name__}, which cannot be split into disjoint sets; that takes a "
                    f"dataset with __len__ and __getitem__."
                )
            if len(dataset) == 0:
                raise CalibrationError(f"{name} ({type(dataset).__name__}) holds no images.")
        return given

    def _split(self, labels: Tensor, drawn: list[str]) -> dict[str, Tensor]:
        """Indices into the train pool of its disjoint parts: calibration, those `drawn`, train."""
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self._seed))
        # At random, not by class: the method claims to need no labels here, so labels must not choose these images.
        chosen = {"calibration": order[: self._calibration_samples]}
        rest = order[self._calibration_samples :]
        counts = {part: _count(self._samples[part] or _DEFAULT_SHARE, len(rest)) for part in drawn}
        least = _count(self._samples["train"] or self._num_classes, len(rest))
        need = {"calibration": self._calibration_samples, **counts, "train": least}
        if sum(need.values()) > len(labels):
            raise CalibrationError(
                f"{' + '.join(f'{count} {part}' for part, count in need.items())} images make {sum(need.values())}, "
                f"but train holds {len(labels)}. Give more images, or lower "
                f"{', '.join(f'{part}_samples' for part in need)}."
            )
        for part, count in counts.items():
            taken = _stratified(labels[rest], count, leave=1)
            chosen[part], rest = rest[taken], rest[~taken]
        if self._samples["train"] is not None:
            rest = rest[_stratified(labels[rest], least, leave=0)]
        missing = sorted(set(labels.tolist()) - set(labels[rest].tolist()))[:10]
        if missing:
            raise CalibrationError(
                f"The train set has no image of the classes {missing}, of which there are "
                f"{[int((labels == label).sum()) for label in missing]} images in all. The calibration set took them, "
                f"or train_samples={self._samples['train']} is too few: give more of them, lower calibration_samples, "
                f"raise train_samples or set another seed."
            )
        return {**chosen, "train": rest}

    def _subset(self, dataset: _Items, part: str) -> Tensor:
        """Indices into an explicit val or test set: all, or a stratified draw of the size asked for."""
        size, length = self._samples[part], len(dataset)
        count = length if size is None else _count(size, length)
        if count > length:
            raise CalibrationError(f"{part}_samples is {count}, but the {part} set given holds {length} images.")
        if count == length:
            return torch.arange(length)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(self._seed))
        return order[_stratified(_labels(dataset, part)[order], count, leave=0)]


class _Items(Protocol):
    """A map-style dataset of (image, label)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Images(Dataset):
    """Checked (image, label) pairs of a dataset at the chosen indices."""

    dataset: _Items
    name: str
    indices: Tensor
    decoder: _Decoder
    image_shape: tuple[int, int, int]
    num_classes: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        index = int(self.indices[position])
        image, label = _read(self.dataset, self.name, index, self.decoder, self.image_shape)
        if label >= self.num_classes:
            raise CalibrationError(
                f"Image {index} of {self.name} has label {label}, but the labels of train go from 0 to "
                f"{self.num_classes - 1}."
            )
        return image, label


@dataclass(frozen=True, slots=True, eq=False)
class _Decoder:
    """Turns an image as a dataset gives it into a float32 tensor, channels x height x width, in [0, 1]."""

    num_channels: int
    image_size: tuple[int, int] | None
    mean: Tensor | None
    std: Tensor | None

    @classmethod
    def of(
        cls,
        num_channels: int,
        image_size: int | tuple[int, int] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> _Decoder:
        """Check the user's options."""
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        if mean is None and std is None:
            return cls(num_channels, size, None, None)
        if mean is None or std is None or len(mean) != len(std) or min(std) <= 0:
            raise CalibrationError(
                f"mean= and std= belong together, one number per channel, std above 0; found mean={mean}, std={std}."
            )
        return cls(num_channels, size, torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1))

    def __call__(self, image: Any) -> Tensor:
        pixels = self._scaled(_channels_first(image))
        low, high = (float(value) for value in pixels.aminmax())
        if not math.isfinite(low + high):
            raise CalibrationError("the image holds NaN or infinite values")
        if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
            raise CalibrationError(
                f"values must lie in [0, 1], these go from {low:.3g} to {high:.3g}; if the dataset normalises its "
                f"images, pass the mean= and std= it uses; if they go from 0 to 255, give them as uint8"
            )
        if len(pixels) == 1 and self.num_channels == 3:
            pixels = pixels.expand(3, -1, -1)
        if len(pixels) != self.num_channels:
            raise CalibrationError(
                f"the image has {len(pixels)} channels (channels first: {tuple(pixels.shape)}), num_channels is "
                f"{self.num_channels}; tensors are read as C x H x W, numpy arrays as H x W x C"
            )
        if self.image_size is not None and pixels.shape[1:] != self.image_size:
            pixels = interpolate(pixels[None], self.image_size, mode="bilinear", antialias=True)[0]
        return pixels.clamp(0, 1)

    def _scaled(self, pixels: Tensor) -> Tensor:
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


def _channels_first(image: Any) -> Tensor:
    """A PIL image, a numpy array (H x W x C or H x W) or a tensor (C x H x W or H x W) as C x H x W, dtype kept."""
    if isinstance(image, Image.Image):
        image = np.array(image.convert({"P": "RGB", "1": "L"}.get(image.mode, image.mode)))
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


def _read(
    dataset: _Items, name: str, index: int, decoder: _Decoder, image_shape: tuple[int, ...] | None
) -> tuple[Tensor, int]:
    """One checked pair; an error names the image by its index and, where known, its file."""
    try:
        item = dataset[index]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise CalibrationError(f"an item is a pair (image, label); found a {type(item).__name__}")
        image, label = decoder(item[0]), _label(item[1])
        if image_shape is not None and image.shape != image_shape:
            raise CalibrationError(
                f"it is {tuple(image.shape)}, others are {tuple(image_shape)} (channels, height, width); pass "
                f"image_size= to resize all of them"
            )
    except (CalibrationError, OSError) as error:
        base, indices = _origin(dataset)
        file = f" ({base.samples[int(indices[index])][0]})" if isinstance(base, DatasetFolder) else ""
        raise CalibrationError(f"Image {index} of {name}{file}: {error}.") from error
    return image, label


def _probe(given: dict[str, _Items], decoder: _Decoder) -> tuple[int, int, int]:
    """Read a few images of each dataset, so that most errors come before the long work; return their shape."""
    shape: tuple[int, ...] | None = None
    for name, dataset in given.items():
        for index in sorted({len(dataset) * k // _PROBES for k in range(_PROBES)}):
            shape = tuple(_read(dataset, name, index, decoder, shape)[0].shape)
    return cast("tuple[int, int, int]", shape)


def _origin(dataset: Any) -> tuple[Any, Tensor]:
    """The dataset under nested Subsets, and which of its items they keep."""
    if not isinstance(dataset, Subset):
        return dataset, torch.arange(len(dataset))
    base, indices = _origin(dataset.dataset)
    return base, indices[torch.as_tensor(dataset.indices, dtype=torch.long)]


def _check_disjoint(given: dict[str, _Items]) -> None:
    """Refuse the same images under two names, as far as it can be seen without decoding them."""
    for (one, first), (two, second) in combinations(given.items(), 2):
        (base, indices), (other, others) = _origin(first), _origin(second)
        shared = int(torch.isin(indices, others).sum()) if base is other else 0
        if shared:
            raise CalibrationError(f"{one} and {two} share {shared} images; they must be disjoint.")


def _label(value: Any) -> int:
    if isinstance(value, Tensor | np.generic | np.ndarray):
        value = value.tolist()
    if not isinstance(value, int) or value < 0:
        raise CalibrationError(
            f"labels must be integers from 0; found {value!r} ({type(value).__name__}). Turn probabilities or names "
            f"into class numbers first (target_transform)"
        )
    return int(value)


def _labels(dataset: _Items, name: str) -> Tensor:
    """Every label of a dataset, int64: from its attributes where that is possible, else in one pass over its items."""
    base, indices = _origin(dataset)
    attributes: list[Any] = [getattr(base, attribute, None) for attribute in ("targets", "labels")]
    if isinstance(base, TensorDataset):
        attributes = list(base.tensors[1:2])
    stored = next((a for a in attributes if hasattr(a, "__len__") and len(a) == len(base)), None)
    if stored is None:
        found = (dataset[index][1] for index in range(len(dataset)))
    else:
        values = stored.tolist() if hasattr(stored, "tolist") else stored
        transform = getattr(base, "target_transform", None) or (lambda label: label)
        found = (transform(values[index]) for index in indices.tolist())
    labels = []
    for index, value in enumerate(found):
        try:
            labels.append(_label(value))
        except CalibrationError as error:
            raise CalibrationError(f"Image {index} of {name}: {error}.") from error
    return torch.tensor(labels)


def _class_names(dataset: _Items) -> list[str] | None:
    base, _ = _origin(dataset)
    names = getattr(base, "classes", None)
    known = isinstance(names, list | tuple) and getattr(base, "target_transform", None) is None
    return [str(name) for name in names] if known and names else None


def _count_classes(labels: Tensor, class_names: list[str] | None) -> int:
    """Number of classes; refuses a single one and numbers with gaps."""
    found = labels.unique().tolist()
    num_classes = max(len(class_names or ()), found[-1] + 1)
    if len(found) < 2:
        raise CalibrationError(f"All {len(labels)} images of train have one label, {found[0]}; two classes are needed.")
    if len(found) < num_classes:
        raise CalibrationError(
            f"There are {num_classes} classes, but train has labels of only {len(found)}: {found[:10]}. Number the "
            f"classes from 0 without gaps, and give images of each."
        )
    return num_classes


def _count(size: int | float, available: int) -> int:
    """A number of images from a number or a share."""
    return max(1, round(size * available)) if isinstance(size, float) else size


def _stratified(labels: Tensor, count: int, *, leave: int) -> Tensor:
    """Mark `count` items, in the proportions of their labels, the first ones of each class.

    At least `leave` items of each class stay unmarked, and every class gets one item if it can. Otherwise whole
    numbers come by largest remainder.
    """
    sizes = torch.bincount(labels)
    room = (sizes - leave).clamp(min=0)
    total = max(int(room.sum()), 1)
    quota, remainder = count * room // total, count * room % total
    take = quota.maximum((room > 0).long())
    most_due = (remainder * (quota > 0)).argsort(descending=True, stable=True)
    take[most_due[: max(count - int(take.sum()), 0)]] += 1
    while int(take.sum()) > count:
        take[take.argmax()] -= 1
    by_class = labels.argsort(stable=True)
    rank = torch.empty_like(labels)
    rank[by_class] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    return rank < take[labels]


def _open(path: str) -> Image.Image:
    """An image file as grey (8 or 16 bits) or RGB; torchvision's own loader makes 16-bit grey images white."""
    with Image.open(path) as image:
        image.load()
        return image if image.mode in ("L", "I;16") else image.convert("RGB")


def _class_folders(root: Path) -> dict[str, ImageFolder]:
    """The sets of an image folder, labels numbered alike."""
    if not root.is_dir():
        raise CalibrationError(f"image_folder: {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    names = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    parts = {name: root / folder for folder, name in names.items() if (root / folder).is_dir()}
    nested = [name for name, path in parts.items() if any(child.is_dir() for child in path.iterdir())]
    if nested and "train" not in nested:
        raise CalibrationError(f"image_folder: {root} has class folders in {nested}, but none in train.")
    found = {}
    for name, path in (parts if nested else {"train": root}).items():
        try:
            found[name] = ImageFolder(str(path), loader=_open)
        except FileNotFoundError as error:
            inside = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
            raise CalibrationError(
                f"image_folder: {path} should hold one folder of images for each class; it holds {len(inside)} "
                f"entries {inside[:8]}. {error}"
            ) from error
    classes = found["train"].class_to_idx
    for name, folder in found.items():
        unknown = sorted(set(folder.classes) - set(classes))
        if unknown:
            raise CalibrationError(f"image_folder: {name} has the classes {unknown}, which train does not have.")
        # ImageFolder numbers the classes of each folder on its own, so a class missing from val would shift the rest.
        folder.samples = [(file, classes[folder.classes[label]]) for file, label in folder.samples]
        folder.targets = [label for _, label in folder.samples]
    return found


def _borrowed(datamodule: pl.LightningDataModule) -> dict[str, Any]:
    """The datasets behind another datamodule's train, val and test dataloaders."""
    own = [
        name
        for name in ("train", "val", "test")
        if getattr(type(datamodule), f"{name}_dataloader") is not getattr(pl.LightningDataModule, f"{name}_dataloader")
    ]
    # All setups come before the first dataset is taken: one that splits at random splits anew in each.
    datamodule.setup("fit")
    if "test" in own:
        datamodule.setup("test")
    found: dict[str, Any] = {}
    for name in own:
        loaders = getattr(datamodule, f"{name}_dataloader")()
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        if loaders in ([], [None]):
            continue
        if len(loaders) > 1 or not isinstance(loaders[0], DataLoader):
            raise CalibrationError(
                f"{type(datamodule).__name__}.{name}_dataloader() should return one DataLoader; found "
                f"{[type(loader).__name__ for loader in loaders]}. Pass its datasets as train=, val= and test=."
            )
        found[name] = loaders[0].dataset
    if "train" not in found:
        raise CalibrationError(f"{type(datamodule).__name__} has no train_dataloader; pass its datasets as train=.")
    return found
