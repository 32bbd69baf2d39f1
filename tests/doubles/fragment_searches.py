"""A search by callback on digits, as tests of FragmentSearch run it, and its data and Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from lightning_stitch import Beam, CalibrationDataModule, FragmentSearch
from lightning_stitch.recipe import Recipe

SOURCES = [{"spec": f"test_{name}", "pretrained": False} for name in ("resnet", "efficientnet")]


def digits(**options: Any) -> CalibrationDataModule:
    images, labels = load_digits(n_class=3, return_X_y=True)
    pool = TensorDataset(torch.tensor(images).view(-1, 1, 8, 8).float() / 16, torch.tensor(labels))
    sizes = {"calibration_samples": 16, "train_samples": 90, "selection_samples": 60, "test_samples": 90}
    return CalibrationDataModule(pool, **{"image_size": 32, **sizes, **options})


def search(**options: Any) -> FragmentSearch:
    return FragmentSearch(**{"sources": SOURCES, "strategy": Beam(width=2, max_fragments=2), **options})


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    settings = {"max_epochs": 0, "logger": False, "accelerator": "cpu", "enable_progress_bar": False} | options
    return Trainer(
        **settings,
        callbacks=list(callbacks),
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )


def same_but_for_shares(recipe: Recipe | None, expected: Recipe) -> bool:
    """Whether recipes are equal, but for what a head says of the taps."""
    nothing = [0.0] * len(expected.blocks)
    return recipe is not None and recipe.with_shares(nothing) == expected.with_shares(nothing)
