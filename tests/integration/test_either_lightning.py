"""Fitting, testing, resuming and the command line under whichever Lightning package this process uses.

The continuous integration runs this file a second time where `lightning` stands in for `pytorch-lightning`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from doubles.hub import HubDouble
from doubles.predictions import NAMES, quiet_trainer, write_digits

from lightning_stitch import CalibrationDataModule, FragmentSearch, PublishAfterFit, StitchedClassifier, predict_files
from lightning_stitch._lightning import NAMESPACE, pl
from lightning_stitch.cli.main import main

SOURCES = [{"spec": f"test_{name}", "pretrained": False} for name in ("resnet", "efficientnet")]
SEARCH = {"sources": SOURCES, "max_candidates": 2, "compare": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), 150)


def settings(images: Path) -> dict[str, Any]:
    sizes = {"calibration_samples": 16, "train_samples": 48, "selection_samples": 32, "test_samples": 32}
    return {"image_folder": str(images), "image_size": 32, **sizes}


@pytest.fixture(scope="module")
def fitted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A checkpoint of a search without training, and what testing said of it."""
    folder = tmp_path_factory.mktemp("fitted")
    model, data = StitchedClassifier(num_classes=3), CalibrationDataModule(**settings(images))
    trainer = quiet_trainer(folder, callbacks=[FragmentSearch(**SEARCH)])
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    trainer.save_checkpoint(folder / "model.ckpt")
    return folder / "model.ckpt", found


def test_the_package_that_the_environment_names_is_used_and_the_other_one_is_not_loaded() -> None:
    wanted = os.environ.get("LIGHTNING_STITCH_NAMESPACE", "pytorch_lightning")
    assert NAMESPACE.split(".")[0] == wanted
    assert pl.__name__ == NAMESPACE
    assert issubclass(StitchedClassifier, sys.modules[NAMESPACE].LightningModule)
    other = "lightning" if NAMESPACE == "pytorch_lightning" else "pytorch_lightning"
    assert other not in sys.modules


def test_a_search_without_training_then_a_test_from_its_checkpoint(
    fitted: tuple[Path, dict[str, float]], images: Path, tmp_path: Path
) -> None:
    checkpoint, found = fitted
    assert found["test_accuracy"] > 0.6  # three classes, alike in number
    fresh, data = StitchedClassifier(num_classes=3), CalibrationDataModule(**settings(images))
    (again,) = quiet_trainer(tmp_path).test(fresh, data, ckpt_path=checkpoint, verbose=False)
    assert again == pytest.approx(found)
    assert fresh.class_names == NAMES


def test_a_run_that_is_resumed_ends_as_one_that_was_not_stopped(
    fitted: tuple[Path, dict[str, float]], images: Path, tmp_path: Path
) -> None:
    data = CalibrationDataModule(**settings(images))

    def train(epochs: int, ckpt_path: Path | None = None, *, start: StitchedClassifier) -> StitchedClassifier:
        trainer = quiet_trainer(tmp_path, max_epochs=epochs)
        trainer.fit(start, data.head_dataloader(), data.val_dataloader(), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return start

    first = StitchedClassifier.load_from_checkpoint(fitted[0], weights_only=True)
    through = train(2, start=StitchedClassifier.load_from_checkpoint(fitted[0], weights_only=True)).state_dict()
    train(1, start=first)
    resumed = train(2, tmp_path / "1.ckpt", start=StitchedClassifier(num_classes=3)).state_dict()
    torch.testing.assert_close(resumed, through, rtol=0, atol=0)
    assert any(not torch.equal(through[name], value) for name, value in first.state_dict().items())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # ModelCheckpoint's, on every second run
def test_the_command_line_fits_tests_and_predicts_from_yaml(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])
    monkeypatch.chdir(tmp_path)  # without a logger, LightningCLI saves its configuration here
    config = {
        "seed_everything": 0,
        "model": {"class_path": "lightning_stitch.StitchedClassifier", "init_args": {"num_classes": 3}},
        "data": {"class_path": "lightning_stitch.CalibrationDataModule", "init_args": settings(images)},
        "trainer": {
            "max_epochs": 0,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "logger": {
                "class_path": f"{NAMESPACE}.loggers.CSVLogger",
                "init_args": {"save_dir": str(tmp_path), "name": "run"},
            },
            "callbacks": [{"class_path": "lightning_stitch.FragmentSearch", "init_args": SEARCH}],
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(path)])
    checkpoint = tmp_path / "run" / "version_0" / "stitched.ckpt"
    assert f"The stitched network is in {checkpoint}." in capsys.readouterr().out
    main(["test", "--config", str(path), "--ckpt_path", str(checkpoint)])
    assert "test_accuracy" in capsys.readouterr().out

    friendly, lightnings = tmp_path / "friendly.csv", tmp_path / "lightnings.csv"
    main(["predict", str(checkpoint), str(images), "--output", str(friendly)])
    config["data"] = {"class_path": "lightning_stitch.ImageFiles", "init_args": {"paths": [str(images)]}}
    writer = {"class_path": "lightning_stitch.PredictionWriter", "init_args": {"output": str(lightnings)}}
    config["trainer"] |= {"logger": False, "callbacks": [writer]}
    path.write_text(yaml.safe_dump(config))
    main(["predict_data", "--config", str(path), "--ckpt_path", str(checkpoint)])
    assert lightnings.read_text() == friendly.read_text()
    model = StitchedClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    rows = predict_files(model, images)
    assert [line.split(",")[:2] for line in friendly.read_text().splitlines()[1:]] == [
        [row["file"], row["class"]] for row in rows
    ]
    assert sum(row["class"] == Path(row["file"]).parent.name for row in rows) > 0.6 * len(rows)


# The hub's client says this of itself, with newer versions of its HTTP library.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_run_is_published_and_what_is_pulled_tests_alike(
    fitted: tuple[Path, dict[str, float]], images: Path, hub: HubDouble, tmp_path: Path
) -> None:
    data = CalibrationDataModule(**settings(images))
    model = StitchedClassifier.load_from_checkpoint(fitted[0], weights_only=True)
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[PublishAfterFit("me/digits")])
    trainer.fit(model, data)
    (found,) = trainer.test(model, data, verbose=False)
    pulled = StitchedClassifier.from_pretrained("me/digits")
    (again,) = quiet_trainer(tmp_path).test(pulled, data, verbose=False)
    assert again == pytest.approx(found)
