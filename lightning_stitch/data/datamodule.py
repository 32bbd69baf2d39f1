"""The four disjoint image sets that composing a stitched network takes, as a LightningDataModule."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, RandomSampler

from lightning_stitch._lightning import SourcePreparer, check_same_namespace, isolate_rng, pl
from lightning_stitch.data.class_names import number_classes
from lightning_stitch.data.folders import list_first, open_class_folders
from lightning_stitch.data.images import CheckedImages, Decoder, Items, probe
from lightning_stitch.data.labels import check_varied, mark_stratified, read_targets, to_count
from lightning_stitch.data.origins import warn_of_turned_images
from lightning_stitch.data.overlaps import Keys, check_disjoint, find_copies, fingerprint, image_keys
from lightning_stitch.data.samplers import borrow_datasets
from lightning_stitch.data.target_values import DataTask, TargetReader, TargetReaders
from lightning_stitch.data.transforms import without_chance
from lightning_stitch.errors import CalibrationError
from lightning_stitch.settings import image_shape_of

_DEFAULT_SHARE = 0.2
_CALIBRATION, _FEWEST_CALIBRATION = 32, 4


def calibration_samples_of(num_images: int) -> int:
    """How many of few images to calibrate on: a quarter, at least as many as stitches need, at most the default."""
    return max(_FEWEST_CALIBRATION, min(_CALIBRATION, num_images // 4))


class CalibrationDataModule(pl.LightningDataModule):
    """Supply the calibration, train, selection and test sets; no image is in two of them, as a copy either.

    Every batch is `(images, targets)`: images float32, N x C x H x W, values in [0, 1], not normalised (a stitched
    network normalises inside), all of one size; targets as `task` says.

    | set | what it is for | how it is drawn |
    |---|---|---|
    | calibration | fit stitches, score CKA, fit the head | at random |
    | train | rank candidates, fit the head, fine-tune | stratified by class where there are classes |
    | selection (= val) | the same; fine-tuning it validates | `val` where given, else stratified out of `train` |
    | test | report, never choose | `test` where given, else stratified out of `train` |

    Exactly one of `train`, `image_folder` and `datamodule` says where the images come from. The draws depend on `seed`
    and the datasets alone. Copies of an image in `train` are left out, with a warning; random transforms act in
    `train_dataloader` alone.

    Args:
        train: Labelled pool, items `(image, label)`. An image is a PIL image, a tensor (C x H x W or H x W) or a numpy
            array (H x W x C or H x W), of uint8, uint16 or float in [0, 1] (up to 0.1 outside is clamped); a label is
            what `task` says.
        val: Selection set of the same kind.
        test: Test set of the same kind.
        image_folder: A folder that holds `train` and, optionally, `val` and `test`, under their usual names in any case
            (`Training`, `train_set`, `valid`, `dev`, `testing`, ...), each with one folder of images per class; or that
            holds the class folders themselves. Files are upright as their EXIF orientation says.
        datamodule: Another LightningDataModule; the datasets of its train, val and test dataloaders are used with
            their transforms. Of its samplers only which images they choose counts; its collate functions are not used.
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
        task: What labels are. "multiclass": an integer from 0, a name, or a one-hot vector; batches int64, N, numbered
            as train has the classes, by name where datasets know names. "multilabel": a vector of 0 and 1; batches
            int64, N x labels. "regression": a number or a vector of numbers; batches float32, N or N x numbers.
            "none": items are images, or their labels are ignored.

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
        calibration_samples: int = _CALIBRATION,
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
        if calibration_samples < _FEWEST_CALIBRATION:
            raise CalibrationError(
                f"calibration_samples is {calibration_samples}, but stitches need at least {_FEWEST_CALIBRATION}."
            )
        samples = {"train": train_samples, "selection": selection_samples, "test": test_samples}
        for part, size in samples.items():
            if isinstance(size, float) and size > 1 and size.is_integer():
                samples[part] = int(size)  # a YAML parser reads the 256 of an "int or float" as 256.0
            elif size is not None and (size <= 0 or (isinstance(size, float) and size > 1)):
                raise CalibrationError(f"{part}_samples is {size}; give a number from 1, a share up to 1.0, or None.")
        if image_size is not None:
            image_shape_of(image_size)  # or it is none
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
        if not self._parts:
            datasets = self._collect_datasets()
            with isolate_rng():  # items may be drawn at random
                self._draw_parts(datasets)
        if stage is not None:
            self._compare_ranks()

    def _draw_parts(self, datasets: dict[str, Items]) -> None:
        """Read labels, compare images, draw."""
        self._image_shape = probe(datasets, self._decoder, {})
        labels = self._read_labels(datasets)
        warn_of_turned_images(datasets)
        plain = without_chance(datasets)
        probe(plain, self._decoder, self._readers, self._image_shape)
        explicit = {part: name for part, name in (("selection", "val"), ("test", "test")) if name in datasets}
        indices = {part: self._draw_subset(datasets[name], name, part) for part, name in explicit.items()}
        keys = image_keys(datasets, self._decoder)
        check_disjoint(datasets, keys)
        indices |= self._split(labels, [part for part in ("test", "selection") if part not in explicit], keys["train"])
        drawn_keys = []
        for part in ("calibration", "train", "selection", "test"):
            name = explicit.get(part, "train")
            rest = (indices[part], self._decoder, self._image_shape, self._readers.get(name), self._class_names)
            self._parts[part] = CheckedImages(plain[name], name, *rest)
            if part == "train":
                self._augmented = CheckedImages(datasets[name], name, *rest)
            drawn_keys.append([keys[name][index] for index in indices[part].tolist()])
        self._fingerprint = fingerprint(drawn_keys)

    def _compare_ranks(self) -> None:
        """Refuse sets that differ from rank to rank, once all of them have drawn theirs."""
        trainer: Any = self.trainer
        if trainer is None or trainer.world_size < 2:
            return
        alike = trainer.strategy.broadcast(self._fingerprint, src=0) == self._fingerprint
        if not trainer.strategy.reduce_boolean_decision(alike, all=True):
            raise CalibrationError(
                f"The {trainer.world_size} processes have drawn different images, so that one of them tests on "
                f"what another one trains on: the data are split or listed at random without a fixed seed. Give "
                f"random_split a generator with a seed, or call seed_everything(seed) before anything is drawn."
            )

    def train_dataloader(self) -> DataLoader:
        """The train set, shuffled anew in every epoch, alike in a resumed run, with its random transforms.

        Where the last batch would be of one image, which BatchNorm cannot train on, each epoch leaves out its last one.
        """
        self.setup()
        shuffle = EpochShuffle(self._augmented, self._seed)
        ranks = 1 if self.trainer is None else self.trainer.world_size
        share = -(-len(self._augmented) // ranks)
        if is_left_alone := share > self.batch_size > 1 == share % self.batch_size:
            pl.utilities.rank_zero_info(
                "Of the train images, one would be alone in the last batch, where BatchNorm has no statistics: each "
                "epoch leaves out the one that comes last."
            )
        return self._make_loader(self._augmented, shuffle, drop_last=is_left_alone)

    def head_dataloader(self) -> DataLoader:
        """The train set in a fixed order, for a head that is solved rather than trained."""
        return self._load_part("train")

    def labelled_dataloader(self, *parts: str) -> DataLoader:
        """The images of some sets ("calibration", "train", "selection") in a row, in a fixed order."""
        self.setup()
        return self._make_loader(ConcatDataset([self._parts[part] for part in parts]))

    def calibration_dataloader(self) -> DataLoader:
        """The calibration set in a fixed order; labels come along and are not to be used."""
        return self._load_part("calibration")

    def selection_dataloader(self) -> DataLoader:
        """The selection set in a fixed order."""
        return self._load_part("selection")

    def test_dataloader(self) -> DataLoader:
        """The test set in a fixed order."""
        return self._load_part("test")

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

    def _load_part(self, part: str) -> DataLoader:
        self.setup()
        return self._make_loader(self._parts[part])

    def _make_loader(
        self, images: Dataset[Any], sampler: EpochShuffle | None = None, *, drop_last: bool = False
    ) -> DataLoader:
        # A generator of its own: without one, iterating a DataLoader draws a seed from the global random state.
        generator = torch.Generator().manual_seed(self._seed)
        return DataLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            generator=generator,
            drop_last=drop_last,
            **self._loader_options,
        )

    def _collect_datasets(self) -> dict[str, Items]:
        """The datasets: "train" and, where there are such, "val" and "test"."""
        sets: Mapping[str, Any] = self._passed
        if self._image_folder is not None:
            sets = open_class_folders(Path(self._image_folder))
        elif self._datamodule is not None:
            if self.trainer is not None:
                self._datamodule.trainer = self.trainer
            sets = borrow_datasets(self._datamodule)
        datasets = {name: sets[name] for name in ("train", "val", "test") if sets.get(name) is not None}
        for name, dataset in datasets.items():
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
                raise CalibrationError(
                    f"{name} is a {type(dataset).__name__}, which cannot be split; give a dataset with __len__ and "
                    f"__getitem__."
                )
            if len(dataset) == 0:
                raise CalibrationError(f"{name} ({type(dataset).__name__}) holds no images.")
        return datasets

    def _read_labels(self, datasets: Mapping[str, Items]) -> Tensor:
        """What the draws go by, an integer for each image of train: its class, or 0 where there are no classes.

        The readers of all datasets' targets are made on the way.
        """
        train = datasets["train"]
        self._class_names, self._num_classes, self._readers = None, 0, {}
        if self.task == "multiclass":
            classes = number_classes(datasets)
            self._class_names, self._num_classes, self._readers = classes.names, classes.count, classes.readers
            return classes.labels
        if self.task != "none":
            values = read_targets(train, "train", TargetReaders.alike(TargetReader(self.task), train))
            targets = torch.stack(cast("list[Tensor]", values))
            check_varied(targets)
            self._num_classes = targets.shape[1] if targets.ndim == 2 else 1
            reader = TargetReader(self.task, self._num_classes, targets.ndim == 1)
            self._readers = {name: TargetReaders.alike(reader, dataset) for name, dataset in datasets.items()}
        return torch.zeros(len(train), dtype=torch.int64)

    def _split(self, labels: Tensor, drawn: list[str], keys: Keys) -> dict[str, Tensor]:
        """Indices into the train pool of its disjoint parts: calibration, those `drawn`, train."""
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self._seed))
        copies = find_copies(keys)
        if copies:
            warnings.warn(
                f"{len(copies)} of the {len(labels)} images of train are copies of others and are left out, so that no "
                f"image is in two sets: {list_first([str(copy) for copy in copies])}.",
                stacklevel=3,
            )
            order = order[~torch.isin(order, torch.tensor(copies))]
        # At random, not by class: the method claims to need no labels here, so labels must not choose these images.
        indices = {"calibration": order[: self._calibration_samples]}
        rest = order[self._calibration_samples :]
        counts = {part: to_count(self._samples[part] or _DEFAULT_SHARE, len(rest)) for part in drawn}
        # Two images at least, or one of each class: less cannot be told apart.
        fewest = self._num_classes if self.task == "multiclass" else 2
        least = to_count(self._samples["train"] or fewest, len(rest))
        need = {"calibration": self._calibration_samples, **counts, "train": least}
        if sum(need.values()) > len(order):
            raise CalibrationError(
                f"{' + '.join(f'{count} {part}' for part, count in need.items())} images make {sum(need.values())}, "
                f"but train holds {len(order)}. Give more, or lower {', '.join(f'{part}_samples' for part in need)}."
            )
        for part, count in counts.items():
            taken = mark_stratified(labels[rest], count, leave=1)
            indices[part], rest = rest[taken], rest[~taken]
        if self._samples["train"] is not None:
            rest = rest[mark_stratified(labels[rest], least, leave=0)]
        missing = sorted(set(labels.tolist()) - set(labels[rest].tolist()))[:10]
        if missing:
            named = missing if self._class_names is None else [self._class_names[label] for label in missing]
            raise CalibrationError(
                f"The train set has no image of the classes {named}, of which there are "
                f"{[int((labels[order] == label).sum()) for label in missing]} images in all. Give more of them, lower "
                f"calibration_samples, raise train_samples or set another seed."
            )
        return {**indices, "train": rest}

    def _draw_subset(self, dataset: Items, name: str, part: str) -> Tensor:
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
        labels = torch.tensor(cast("list[int]", read_targets(dataset, name, self._readers[name])))
        return order[mark_stratified(labels[order], count, leave=0)]


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
