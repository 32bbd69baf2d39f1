"""Configuration files for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SOURCES = [{"spec": f"test_{name}", "pretrained": False} for name in ("resnet", "efficientnet")]


def config_file(folder: Path, images: Path, **changes: Any) -> Path:
    """A search on small images; changes are to the trainer, but for those under "data" and "search"."""
    search = {"sources": SOURCES, "strategy": {"class_path": "lightning_stitch.Beam", "init_args": {"width": 1}}}
    data = {"image_folder": str(images), "image_size": 32, "calibration_samples": 16, "train_samples": 60}
    config = {
        "seed_everything": 0,
        "model": {"class_path": "lightning_stitch.StitchedClassifier", "init_args": {"num_classes": 3}},
        "data": {
            "class_path": "lightning_stitch.CalibrationDataModule",
            "init_args": {**data, "selection_samples": 48, "test_samples": 60, **changes.pop("data", {})},
        },
        "trainer": {
            "max_epochs": 0,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "logger": {
                "class_path": "pytorch_lightning.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "run"},
            },
            "callbacks": [
                {"class_path": "lightning_stitch.FragmentSearch", "init_args": {**search, **changes.pop("search", {})}}
            ],
            **changes,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
