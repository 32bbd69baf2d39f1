"""A stitched classifier that thaws by a schedule, its images and Trainer, and a callback that watches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from doubles.pools import composed
from doubles.tensors import digits
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import TensorDataset

from lightning_stitch import CalibrationDataModule, RidgeHead, StitchedClassifier

SCHEDULE = {0: "head", 1: "stitches"}


def classifier(**options: Any) -> StitchedClassifier:
    model = StitchedClassifier(num_classes=3, **{"lr": 1e-3, "thaw": SCHEDULE, **options})
    network = composed(("test_resnet", None, "conv1.1"), ("test_efficientnet", "blocks.0.0.bn1", None))
    head = RidgeHead(network.num_features, 3)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    model.install(network, head)
    return model


def images(**options: Any) -> CalibrationDataModule:
    pool = TensorDataset(*digits(88, 32, classes=3))
    sizes = {"calibration_samples": 8, "train_samples": 48, "selection_samples": 16, "test_samples": 16}
    return CalibrationDataModule(pool, batch_size=8, **{**sizes, **options})


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings = {"max_epochs": 3, "logger": False, "enable_checkpointing": False, **options}
    return Trainer(
        **settings,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )


class Watch(Callback):
    """The parameters that train in each epoch, and a crash at the beginning of one."""

    def __init__(self, crash_at: int | None = None) -> None:
        self.crash_at = crash_at
        self.trained: dict[int, set[str]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.trained[trainer.current_epoch] = {n for n, p in pl_module.named_parameters() if p.requires_grad}
        if trainer.current_epoch == self.crash_at:
            raise KeyError("crash")
