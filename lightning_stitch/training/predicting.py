"""Predictions for image files: a data module of files, a writer of predictions, and both in one call."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_stitch._lightning import NAMESPACE, check_same_namespace, pl
from lightning_stitch.data import ImageFileSet, list_images, select_readable
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.heads import predictions
from lightning_stitch.networks import StitchedBackbone
from lightning_stitch.report import check_output, prediction_rows, write_predictions


class ImageFiles(pl.LightningDataModule):
    """Images to predict, from files and folders of them.

    Size and channels come from the recipe of the module that predicts, resized as `CalibrationDataModule` does it.
    Batches are `(images, indices)`: images float32, N x C x H x W, in [0, 1]; indices int64, N, the images' places in
    `files`.

    Args:
        paths: Files, which are taken whatever their suffix, and folders, of which the images are taken, those in
            folders inside and behind links too, sorted by name. A name that is given twice is taken once; two names of
            one file are two rows.
        batch_size: Images in a batch.
        num_workers: Worker processes of the dataloader.
        skip_unreadable: Leave out files that cannot be decoded; each is decoded twice for that. Otherwise they are
            errors.

    Attributes:
        files: The images, in the order of the rows; after `setup`.
        skipped: What was left out, with the reason; after `setup`.

    Raises:
        CalibrationError: From `setup` where a path names no images; from `predict_dataloader` where the images do not
            suit the module.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        batch_size: int = 32,
        num_workers: int = 0,
        skip_unreadable: bool = False,
    ) -> None:
        super().__init__()
        self.paths = [paths] if isinstance(paths, str | Path) else list(paths)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.skip_unreadable = skip_unreadable
        self.files: list[Path] = []
        self.skipped: dict[Path, str] = {}

    def setup(self, stage: str | None = None) -> None:
        """List the files and check that they are images, once; later calls do nothing."""
        if not self.files:
            self.files, self.skipped = select_readable(list_images(self.paths), skip_unreadable=self.skip_unreadable)

    def predict_dataloader(self) -> DataLoader:
        """All images in the order of `files`."""
        self.setup()
        assert self.trainer is not None
        ranks = self.trainer.world_size
        if len(self.files) < ranks:
            raise CalibrationError(
                f"{len(self.files)} images cannot be shared by {ranks} processes; use fewer devices."
            )
        images = ImageFileSet(self.files, _find_image_shape(self.trainer.lightning_module))
        # A generator of its own: without one, iterating a DataLoader draws a seed from the global random state.
        generator = torch.Generator().manual_seed(0)
        return DataLoader(images, batch_size=self.batch_size, num_workers=self.num_workers, generator=generator)


class PredictionWriter(pl.callbacks.BasePredictionWriter):
    """Writes what `trainer.predict` predicts into one file, a row for each image, in the order of the dataset.

    It takes any module whose `predict_step` gives a row of numbers for each image; the module's `class_names` and
    `task` say what the columns are. The dataset's `files` name the rows; without, their numbers do. Under several
    processes rank zero writes the rows of all, in the same order. A run that fails leaves no file, and a fast_dev_run
    writes nothing.

    Args:
        output: A .csv or .jsonl file, see `write_predictions`; None: nothing is written, `rows` has it.
        overwrite: Replace a file that is there.

    Attributes:
        rows: The last run's rows (`prediction_rows`), on every rank.

    Raises:
        StitchError: Before the run if the file cannot be written or there are several dataloaders; after it if the
            module gives anything but one row of numbers for each image.
    """

    def __init__(self, output: str | Path | None = None, overwrite: bool = False) -> None:
        super().__init__("epoch")
        self.output = output
        self.overwrite = overwrite
        self.rows: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a file that cannot be written, before the run."""
        super().setup(trainer, pl_module, stage)
        check_same_namespace(trainer, "Trainer")
        if stage == "predict" and self.output is not None:
            check_output(self.output, overwrite=self.overwrite)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse several dataloaders, before the run."""
        if isinstance(trainer.predict_dataloaders, list | tuple | dict):
            raise StitchError("Predictions are written for one dataloader; predict_dataloader gives several.")

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Gather the rows of all ranks and write them."""
        for batch in predictions:
            if not isinstance(batch, Tensor):
                raise StitchError(
                    f"predict_step should give a tensor, a row for each image; found a {type(batch).__name__}."
                )
        outputs = torch.cat([batch.cpu() for batch in predictions])
        indices = [index for batch in batch_indices[0] for index in batch]
        if len(indices) != len(outputs):
            raise StitchError(
                f"There are {len(outputs)} predictions of {len(indices)} images. predict_step should give one row of "
                f"numbers for each image, and the dataloader a batch sampler that tells their indices."
            )
        parts: list[Any] = [
            trainer.strategy.broadcast((indices, outputs) if rank == trainer.global_rank else None, src=rank)
            for rank in range(trainer.world_size)
        ]
        places = torch.tensor([index for part, _ in parts for index in part])
        order = places.argsort(stable=True)
        files = getattr(trainer.predict_dataloaders.dataset, "files", None)  # type: ignore[union-attr]
        self.rows = prediction_rows(
            [str(index) if files is None else files[index] for index in places[order].tolist()],
            torch.cat([part for _, part in parts])[order],
            getattr(pl_module, "class_names", None),
            task=getattr(pl_module, "task", "multiclass"),
        )
        if self.output is not None and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_predictions(self.rows, self.output)


def predict_files(
    module: pl.LightningModule,
    paths: str | Path | Sequence[str | Path] | ImageFiles,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
    skip_unreadable: bool = False,
    device: str = "auto",
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Predict image files with a trained module, and write the predictions if asked to.

    A file gets the same prediction as in the data module that the network was composed with, if that resized it
    (`image_size`).

    Args:
        module: A `StitchedClassifier` with a network; a LightningModule of your own that holds a `StitchedBackbone` and
            whose `forward` gives logits (or values, if its attribute `task` is "regression"), of which its attribute
            `class_names` says what they are of; or one with a `recipe` whose `predict_step` takes `(images, indices)`.
            It comes back on the CPU.
        paths: Files and folders, as for `ImageFiles`; or an `ImageFiles`, which says afterwards what it skipped, and
            takes the place of `batch_size`, `num_workers` and `skip_unreadable`.
        output: As for `PredictionWriter`, like `overwrite`.
        overwrite: Replace a file that is there.
        batch_size: As for `ImageFiles`, like `num_workers` and `skip_unreadable`.
        num_workers: Worker processes that read images.
        skip_unreadable: Leave out files that cannot be decoded.
        device: An accelerator of Lightning's ("auto", "cpu", "cuda", "mps", ...), or one device of it ("cuda:1").
        progress: Show Lightning's progress bar.

    Returns:
        A row for each image, in the order of the files (see `prediction_rows`).

    Raises:
        CalibrationError: If an image cannot be used; nothing is written then.
        StitchError: If the module has no network, the device is not there, or the output file cannot be written.
    """
    check_same_namespace(module, "module")
    module = _with_steps(module)
    _find_image_shape(module)
    if output is not None:
        check_output(output, overwrite=overwrite)
    files = paths if isinstance(paths, ImageFiles) else ImageFiles(paths, batch_size, num_workers, skip_unreadable)
    files.setup()
    writer = PredictionWriter(output, overwrite)
    accelerator, _, index = device.partition(":")
    try:
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=[int(index)] if index else 1,
            callbacks=[writer],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
        )
    except (import_module(f"{NAMESPACE}.utilities.exceptions").MisconfigurationException, ValueError) as error:
        raise StitchError(f"The device {device!r} cannot be used: {error}") from error
    trainer.predict(module, datamodule=files, return_predictions=False)
    return writer.rows


class _OfBackbone(pl.LightningModule):
    """A module of one's own around a `StitchedBackbone`, as one that predicts images in [0, 1]."""

    def __init__(self, module: pl.LightningModule, backbone: StitchedBackbone) -> None:
        super().__init__()
        self.module, self.recipe = module, backbone.recipe
        self.class_names = getattr(module, "class_names", None)
        self.task: Any = getattr(module, "task", "multiclass")
        self.mean, self.std = backbone.mean, backbone.std  # which the module's images are normalised with

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = (batch[0] - self.mean.to(self.device)) / self.std.to(self.device)
        return predictions(self.task, self.module(images))


def _with_steps(module: pl.LightningModule) -> pl.LightningModule:
    """The module, or around one that has no recipe but holds one backbone with a network, one that predicts by it."""
    backbones = [part for part in module.modules() if isinstance(part, StitchedBackbone) and part.recipe is not None]
    is_own = getattr(module, "recipe", None) is None and len(backbones) == 1
    return _OfBackbone(module, backbones[0]) if is_own else module


def _find_image_shape(module: Any) -> tuple[int, int, int]:
    """Read off a module's recipe the (channels, height, width) that its network was calibrated on."""
    recipe = getattr(module, "recipe", None)
    if recipe is None:
        raise StitchError(
            f"{type(module).__name__} has no recipe, so the size of its images is not known: give a "
            f"StitchedClassifier with a network, from fit or load_from_checkpoint, or a module with a StitchedBackbone "
            f"that has one."
        )
    shape: tuple[int, int, int] = recipe.input_size
    return shape
