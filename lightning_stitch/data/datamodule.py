"""The four disjoint image sets that composing a stitched network takes, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, RandomSampler
from torchvision.datasets import ImageFolder

from lightning_stitch._lightning import SourcePreparer, check_same_namespace, pl
from lightning_stitch.data.images import CheckedImages, Decoder, Items, open_image, probe
from lightning_stitch.data.labels import (
    check_disjoint,
    check_varied,
    count_classes,
    find_class_names,
    mark_stratified,
    read_targets,
    to_count,
)
from lightning_stitch.data.target_values import DataTask, TargetReader
from lightning_stitch.errors import CalibrationError

_DEFAULT_SHARE = 0.2


class CalibrationDataModule(pl.LightningDataModule):
    """Supply the calibration, train, selection and test sets; no image is in two of them.

    Every batch is `(images, targets)`: images float32, N x C x H x W, values in [0, 1], not normalised (a stitched
    network normalises inside), all of one size; targets as `task` says.

    | set | what it is for | how it is drawn |
    |---|---|---|
    | calibration | fit stitches, score CKA, fit the head | at random |
    | train | rank candidates, fit the head, fine-tune | stratified by class where there are classes |
    | selection (= val) | the same; fine-tuning it validates | `val` where given, else stratified out of `train` |
    | test | report, never choose | `test` where given, else stratified out of `train` |

    Exactly one of `train`, `image_folder` and `datamodule` says where the images come from. The draws depend on `seed`
    and the datasets alone.

    Args:
        train: Labelled pool, items `(image, label)`. An image is a PIL image, a tensor (C x H x W or H x W) or a numpy
            array (H x W x C or H x W), of uint8, uint16 or float in [0, 1] (up to 0.1 outside is clamped); a label is
            what `task` says.
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
        task: What labels are. "multiclass": an integer, classes numbered from 0; batches int64, N. "multilabel": a
            vector of 0 and 1; batches int64, N x labels. "regression": a number or a vector of numbers; batches
            float32, N or N x numbers. "none": items are images, or their labels are ignored.

    Raises:
        CalibrationError: From the constructor where the arguments contradict each other; from `setup` where folder,
            images or labels cannot be used or are too few; from a dataloader where an image cannot be used.
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
        task: DataTask = "multiclass",
    ) -> None:
        super().__init__()
        tasks = [name for part in get_args(DataTask) for name in get_args(part)]
        if task not in tasks:
            raise CalibrationError(f"task must be one of {tasks}; found {task!r}.")
        if image_folder is not None and task in ("multilabel", "regression"):
            raise CalibrationError(
                f"image_folder= knows classes alone; for task={task!r} pass datasets as train=, val= and test=."
            )
        origins = {"train": train, "image_folder": image_folder, "datamodule": datamodule}
        passed = [name for name, value in origins.items() if value is not None]
        if len(passed) != 1:
            raise CalibrationError(
                f"Give exactly one of train=, image_folder= and datamodule=; found {' and '.join(passed) or 'none'}."
            )
        if train is None and (val is not None or test is not None):
            raise CalibrationError(f"val= and test= belong to train=; {passed[0]}= brings its own.")
        if calibration_samples < 4:
            raise CalibrationError(f"calibration_samples is {calibration_samples}, but stitches need at least 4.")
        samples = {"train": train_samples, "selection": selection_samples, "test": test_samples}
        for part, size in samples.items():
            if isinstance(size, float) and size > 1 and size.is_integer():
                samples[part] = int(size)  # a YAML parser reads the 256 of an "int or float" as 256.0
            elif size is not None and (size <= 0 or (isinstance(size, float) and size > 1)):
                raise CalibrationError(f"{part}_samples is {size}; give a number from 1, a share up to 1.0, or None.")
        if datamodule is not None:
            check_same_namespace(datamodule, "datamodule")
            self.prepare_data_per_node = datamodule.prepare_data_per_node
        self.batch_size = batch_size
        self.task: DataTask = task
        self._decoder = Decoder(num_channels, image_size, mean, std)
        self._passed = {"train": train, "val": val, "test": test}
        self._image_folder = image_folder
        self._datamodule = datamodule
        self._calibration_samples = calibration_samples
        self._samples = samples
        self._loader_options: dict[str, Any] = {"num_workers": num_workers, "pin_memory": pin_memory}
        self._seed = seed
        self._parts: dict[str, CheckedImages] = {}

    def prepare_data(self) -> None:
        """Let a given datamodule download what it needs, and then a Trainer's searches fetch their sources."""
        trainer: Any = self.trainer  # None where no Trainer runs it
        searches = [] if trainer is None else [c for c in trainer.callbacks if isinstance(c, SourcePreparer)]
        if self._datamodule is not None:
            for search in searches:
                search.look_up_sources(trainer)
            self._datamodule.prepare_data()
        for search in searches:
            search.prepare_sources(trainer)

    def setup(self, stage: str | None = None) -> None:
        """Check images and labels and draw all four sets together, whatever the stage; later calls do nothing."""
        if self._parts:
            return
        datasets = self._collect_datasets()
        check_disjoint(datasets)
        self._reader = TargetReader(self.task)
        self._image_shape = probe(datasets, self._decoder, self._reader)
        labels = self._read_labels(datasets["train"])
        explicit = {part: name for part, name in (("selection", "val"), ("test", "test")) if name in datasets}
        indices = self._split(labels, [part for part in ("test", "selection") if part not in explicit])
        indices |= {part: self._draw_subset(datasets[name], part) for part, name in explicit.items()}
        self._parts = {
            part: CheckedImages(datasets[name], name, indices[part], self._decoder, self._image_shape, self._reader)
            for part in ("calibration", "train", "selection", "test")
            for name in [explicit.get(part, "train")]
        }

    def train_dataloader(self) -> DataLoader:
        """The train set, shuffled anew in every epoch, alike in a resumed run."""
        return self._make_loader("train", shuffle=True)

    def head_dataloader(self) -> DataLoader:
        """The train set in a fixed order, for a head that is solved rather than trained."""
        return self._make_loader("train")

    def labelled_dataloader(self, *parts: str) -> DataLoader:
        """The images of some sets ("calibration", "train", "selection") in a row, in a fixed order."""
        return self._make_loader(*parts)

    def calibration_dataloader(self) -> DataLoader:
        """The calibration set in a fixed order; labels come along and are not to be used."""
        return self._make_loader("calibration")

    def selection_dataloader(self) -> DataLoader:
        """The selection set in a fixed order."""
        return self._make_loader("selection")

    def test_dataloader(self) -> DataLoader:
        """The test set in a fixed order."""
        return self._make_loader("test")

    val_dataloader = selection_dataloader  # a Trainer's validation chooses, too
    predict_dataloader = test_dataloader

    @property
    def num_classes(self) -> int:
        """Number of classes, labels or numbers; 0 without targets."""
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
    def is_wrapper(self) -> bool:
        """Whether the images come from another datamodule, whose setup may wait for other ranks."""
        return self._datamodule is not None

    @property
    def normalisation(self) -> tuple[Tensor | None, Tensor | None]:
        """The mean and std that the given tensors were normalised with, (channels, 1, 1); None where they were not."""
        return self._decoder.mean, self._decoder.std

    @property
    def summary(self) -> dict[str, int]:
        """Number of images in each set."""
        self.setup()
        return {part: len(images) for part, images in self._parts.items()}

    def _make_loader(self, *parts: str, shuffle: bool = False) -> DataLoader:
        self.setup()
        # A generator of its own: without one, iterating a DataLoader draws a seed from the global random state.
        generator = torch.Generator().manual_seed(self._seed)
        images: Any = self._parts[parts[0]] if len(parts) == 1 else ConcatDataset([self._parts[part] for part in parts])
        sampler = EpochShuffle(images, self._seed) if shuffle else None
        return DataLoader(
            images, batch_size=self.batch_size, sampler=sampler, generator=generator, **self._loader_options
        )

    def _collect_datasets(self) -> dict[str, Items]:
        """The datasets: "train" and, where there are such, "val" and "test"."""
        sets: Mapping[str, Any] = self._passed
        if self._image_folder is not None:
            sets = _open_class_folders(Path(self._image_folder))
        elif self._datamodule is not None:
            if self.trainer is not None:
                self._datamodule.trainer = self.trainer
            sets = _borrow_datasets(self._datamodule)
        datasets = {name: dataset for name, dataset in sets.items() if dataset is not None}
        for name, dataset in datasets.items():
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
                raise CalibrationError(
                    f"{name} is a {type(dataset).__name__}, which cannot be split; give a dataset with __len__ and "
                    f"__getitem__."
                )
            if len(dataset) == 0:
                raise CalibrationError(f"{name} ({type(dataset).__name__}) holds no images.")
        return datasets

    def _read_labels(self, train: Items) -> Tensor:
        """What the draws go by, an integer for each image of train: its class, or 0 where there are no classes."""
        self._class_names, self._num_classes = None, 0
        if self.task == "none":
            return torch.zeros(len(train), dtype=torch.int64)
        targets = read_targets(train, "train", self._reader)
        if self.task == "multiclass":
            self._class_names = find_class_names(train)
            self._num_classes = count_classes(targets, self._class_names)
            self._reader = TargetReader("multiclass", self._num_classes)
            return targets
        check_varied(targets)
        self._num_classes = targets.shape[1] if targets.ndim == 2 else 1
        self._reader = TargetReader(self.task, self._num_classes, targets.ndim == 1)
        return torch.zeros(len(train), dtype=torch.int64)

    def _split(self, labels: Tensor, drawn: list[str]) -> dict[str, Tensor]:
        """Indices into the train pool of its disjoint parts: calibration, those `drawn`, train."""
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self._seed))
        # At random, not by class: the method claims to need no labels here, so labels must not choose these images.
        indices = {"calibration": order[: self._calibration_samples]}
        rest = order[self._calibration_samples :]
        counts = {part: to_count(self._samples[part] or _DEFAULT_SHARE, len(rest)) for part in drawn}
        # Two images at least, or one of each class: less cannot be told apart.
        fewest = self._num_classes if self.task == "multiclass" else 2
        least = to_count(self._samples["train"] or fewest, len(rest))
        need = {"calibration": self._calibration_samples, **counts, "train": least}
        if sum(need.values()) > len(labels):
            raise CalibrationError(
                f"{' + '.join(f'{count} {part}' for part, count in need.items())} images make {sum(need.values())}, "
                f"but train holds {len(labels)}. Give more, or lower {', '.join(f'{part}_samples' for part in need)}."
            )
        for part, count in counts.items():
            taken = mark_stratified(labels[rest], count, leave=1)
            indices[part], rest = rest[taken], rest[~taken]
        if self._samples["train"] is not None:
            rest = rest[mark_stratified(labels[rest], least, leave=0)]
        missing = sorted(set(labels.tolist()) - set(labels[rest].tolist()))[:10]
        if missing:
            raise CalibrationError(
                f"The train set has no image of the classes {missing}, of which there are "
                f"{[int((labels == label).sum()) for label in missing]} images in all. Give more of them, lower "
                f"calibration_samples, raise train_samples or set another seed."
            )
        return {**indices, "train": rest}

    def _draw_subset(self, dataset: Items, part: str) -> Tensor:
        """Indices into an explicit val or test set: all, or a stratified draw of the size asked for."""
        size, length = self._samples[part], len(dataset)
        count = length if size is None else to_count(size, length)
        if count > length:
            raise CalibrationError(f"{part}_samples is {count}, but the {part} set given holds {length} images.")
        if count == length:
            return torch.arange(length)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(self._seed))
        if self.task != "multiclass":
            return order[:count]
        return order[mark_stratified(read_targets(dataset, part, self._reader)[order], count, leave=0)]


def _open_class_folders(root: Path) -> dict[str, ImageFolder]:
    """Open the sets of an image folder, their labels numbered alike."""
    if not root.is_dir():
        raise CalibrationError(f"image_folder: {root} {'is not a folder' if root.exists() else 'does not exist'}.")
    names = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
    parts = {name: root / folder for folder, name in names.items() if (root / folder).is_dir()}
    nested = [name for name, path in parts.items() if any(child.is_dir() for child in path.iterdir())]
    if nested and "train" not in nested:
        raise CalibrationError(f"image_folder: {root} has class folders in {nested}, but none in train.")
    folders = {}
    for name, path in (parts if nested else {"train": root}).items():
        try:
            folders[name] = ImageFolder(str(path), loader=open_image)
        except FileNotFoundError as error:
            inside = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
            raise CalibrationError(
                f"image_folder: {path} should hold one folder of images for each class; it holds {len(inside)} "
                f"entries {inside[:8]}. {error}"
            ) from error
    classes = folders["train"].class_to_idx
    for name, folder in folders.items():
        unknown = sorted(set(folder.classes) - set(classes))
        if unknown:
            raise CalibrationError(f"image_folder: {name} has the classes {unknown}, which train does not have.")
        # ImageFolder numbers the classes of each folder on its own, so a class missing from val would shift the rest.
        folder.samples = [(file, classes[folder.classes[label]]) for file, label in folder.samples]
        folder.targets = [label for _, label in folder.samples]
    return folders


def _borrow_datasets(datamodule: pl.LightningDataModule) -> dict[str, Any]:
    """Take the datasets behind another datamodule's train, val and test dataloaders."""
    overridden = [
        name
        for name in ("train", "val", "test")
        if getattr(type(datamodule), f"{name}_dataloader") is not getattr(pl.LightningDataModule, f"{name}_dataloader")
    ]
    # All setups come before the first dataset is taken: one that splits at random splits anew in each.
    datamodule.setup("fit")
    if "test" in overridden:
        datamodule.setup("test")
    datasets: dict[str, Any] = {}
    for name in overridden:
        loaders = getattr(datamodule, f"{name}_dataloader")()
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        if loaders in ([], [None]):
            continue
        if len(loaders) > 1 or not isinstance(loaders[0], DataLoader):
            raise CalibrationError(
                f"{type(datamodule).__name__}.{name}_dataloader() should return one DataLoader; found "
                f"{[type(loader).__name__ for loader in loaders]}. Pass its datasets as train=, val= and test=."
            )
        datasets[name] = loaders[0].dataset
    if "train" not in datasets:
        raise CalibrationError(f"{type(datamodule).__name__} has no train_dataloader; pass its datasets as train=.")
    return datasets


_STRIDE = 1_000_003  # Keeps the epochs of one seed apart from those of its neighbours.


class EpochShuffle(RandomSampler):
    """Random order, another one in each epoch.

    A Trainer tells it the epoch; without that every pass is the next epoch. It is a `RandomSampler` because that is how
    Lightning knows that a loader shuffles.
    """

    def __init__(self, dataset: Sized, seed: int) -> None:
        super().__init__(dataset)
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of an epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The order; the epoch is read when the first index is taken, which may be after `set_epoch`."""
        generator = torch.Generator().manual_seed(self._seed + _STRIDE * self._epoch)
        self._epoch += 1
        yield from torch.randperm(len(self), generator=generator).tolist()
