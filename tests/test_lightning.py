from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from doubles.predictions import quiet_trainer
from torch.utils.data import TensorDataset

from lightning_stitch import _lightning
from lightning_stitch._lightning import NAMESPACE, pl
from lightning_stitch.cli.main import main
from lightning_stitch.data.datamodule import CalibrationDataModule
from lightning_stitch.errors import StitchError
from lightning_stitch.training.fragment_search import FragmentSearch
from lightning_stitch.training.module import StitchedClassifier
from lightning_stitch.training.predicting import ImageFiles, predict_files

OTHER = next(name for name in ("pytorch_lightning", "lightning.pytorch") if name != NAMESPACE)
SEARCH = {"sources": [{"spec": "test_resnet", "pretrained": False}]}
# Both packages by name, and the variable that mends it.
WORDS = rf"comes from '{OTHER}', but lightning_stitch uses '{NAMESPACE}' .* LIGHTNING_STITCH_NAMESPACE={OTHER[:9]}"


def foreign(kind: str, **attributes: Any) -> Any:
    """An object of a user's class that inherits from a class of the other package, which is not installed."""
    base = type(kind, (), {"__module__": f"{OTHER}.core"})
    return type("Mine", (base,), {"__module__": "mine", **attributes})()


def images() -> CalibrationDataModule:
    pool = TensorDataset(torch.rand(40, 1, 8, 8), torch.arange(40) % 3)
    return CalibrationDataModule(pool, image_size=32, calibration_samples=8)


@pytest.mark.parametrize(
    ("wanted", "loaded", "installed", "chosen"),
    [
        (None, [], ["pytorch_lightning"], "pytorch_lightning"),
        (None, [], ["lightning", "pytorch_lightning"], "pytorch_lightning"),
        (None, [], ["lightning"], "lightning.pytorch"),
        (None, [], [], "pytorch_lightning"),
        ("", ["sys", "lightning", "lightning.pytorch"], [], "lightning.pytorch"),
        (None, ["lightning.pytorch", "pytorch_lightning"], [], "lightning.pytorch"),
        (None, ["pytorch_lightning", "lightning.pytorch"], [], "pytorch_lightning"),
        (None, ["lightning", "lightning.fabric"], ["lightning", "pytorch_lightning"], "pytorch_lightning"),
        ("lightning", ["pytorch_lightning"], ["pytorch_lightning"], "lightning.pytorch"),
        ("lightning.pytorch", [], [], "lightning.pytorch"),
        ("pytorch_lightning", ["lightning.pytorch"], ["lightning"], "pytorch_lightning"),
    ],
)
def test_the_package_imported_first_is_used_unless_the_environment_names_one_or_only_one_is_installed(
    wanted: str | None, loaded: list[str], installed: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_lightning, "find_spec", lambda name: name if name in installed else None)
    assert _lightning._choose(wanted, loaded) == chosen


def test_a_package_that_does_not_exist_is_refused() -> None:
    with pytest.raises(StitchError, match="LIGHTNING_STITCH_NAMESPACE is 'torch'"):
        _lightning._choose("torch", [])


def test_objects_of_the_other_package_are_refused_by_both_names() -> None:
    with pytest.raises(StitchError, match=rf"datamodule \(Mine\) {WORDS}"):
        CalibrationDataModule(datamodule=foreign("LightningDataModule"))
    with pytest.raises(StitchError, match=rf"module \(Mine\) {WORDS}"):
        predict_files(foreign("LightningModule"), "images")
    both = type("Both", (pl.LightningDataModule, type(foreign("LightningDataModule"))), {"__module__": "mine"})
    for accepted in (both(), pl.LightningDataModule(), object()):
        _lightning.check_same_namespace(accepted, "datamodule")


@pytest.mark.parametrize("by_name", [True, False])
def test_a_data_module_of_the_other_package_is_refused_before_sources_are_fetched(
    tmp_path: Path, by_name: bool
) -> None:
    search = FragmentSearch(["no such source"])
    run = quiet_trainer(tmp_path, callbacks=[search])
    data = foreign("LightningDataModule", on_exception=lambda self, error: None)
    given = {"datamodule": data} if by_name else {"train_dataloaders": data}
    with pytest.raises(StitchError, match=rf"data module \(Mine\) {WORDS}"):
        run.fit(StitchedClassifier(num_classes=3), **given)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_no_stage_takes_a_data_module_of_the_other_package(tmp_path: Path, stage: str) -> None:
    with pytest.raises(StitchError, match=rf"data module \(Mine\) {WORDS}"):
        getattr(quiet_trainer(tmp_path), stage)(StitchedClassifier(num_classes=3), foreign("LightningDataModule"))


@pytest.mark.parametrize("data", [images(), ImageFiles("images")], ids=["CalibrationDataModule", "ImageFiles"])
def test_a_trainer_of_the_other_package_is_refused_by_data_modules(data: Any) -> None:
    with pytest.raises(StitchError, match=rf"Trainer \(Mine\) {WORDS}"):
        data.trainer = foreign("Trainer")
    with pytest.raises(StitchError, match=f"data module, not a dataloader. It belongs to '{NAMESPACE}', .*'{OTHER}'"):
        iter(data)


def test_a_trainer_of_the_other_package_is_refused_by_the_callback_and_the_module() -> None:
    trainer = foreign("Trainer", datamodule=None)
    with pytest.raises(StitchError, match=rf"Trainer \(Mine\) {WORDS}"):
        FragmentSearch(**SEARCH).setup(trainer, StitchedClassifier(num_classes=3), "fit")
    with pytest.raises(StitchError, match=rf"Trainer \(Mine\) {WORDS}"):
        StitchedClassifier(num_classes=3).trainer = trainer


def test_a_module_is_attached_to_its_trainer_and_says_where_it_is_not(tmp_path: Path) -> None:
    model, data, run = StitchedClassifier(num_classes=3), images(), quiet_trainer(tmp_path)
    with pytest.raises(RuntimeError, match="StitchedClassifier is not attached to a `Trainer`"):
        model.trainer  # noqa: B018
    model.trainer, data.trainer = run, run
    assert model.trainer is data.trainer is run


@pytest.mark.parametrize("make", [lambda: StitchedClassifier(num_classes=3), lambda: FragmentSearch(**SEARCH)])
def test_where_both_are_loaded_and_none_is_named_a_warning_says_whose_classes_these_are(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LIGHTNING_STITCH_NAMESPACE", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()
    monkeypatch.setitem(sys.modules, OTHER, ModuleType(OTHER))
    with pytest.warns(
        UserWarning, match=f"are both loaded, .* uses '{NAMESPACE}' .*, or set LIGHTNING_STITCH_NAMESPACE"
    ):
        make()
    monkeypatch.setenv("LIGHTNING_STITCH_NAMESPACE", NAMESPACE.split(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()


def test_a_class_that_the_command_line_refuses_comes_with_a_hint_where_both_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])
    printed = []
    for both in (False, True):
        if both:
            monkeypatch.setitem(sys.modules, OTHER, ModuleType(OTHER))
        with pytest.raises(SystemExit, match="2"):
            main(["fit", "--model", "torch.nn.Linear"])
        printed.append(capsys.readouterr().err)
    assert "note: " not in printed[0]
    assert f"note: lightning_stitch uses '{NAMESPACE}' in this process, and '{OTHER}' is loaded, too." in printed[1]
