"""A configuration to begin with, that the other commands take as it stands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from doubles.small_sources import write_local
from torchvision.utils import save_image

from lightning_stitch import load_source
from lightning_stitch.cli.main import main


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns where it is given arguments and the process has some, too.
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])


def folder_of_classes(folder: Path) -> Path:
    images = torch.rand(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for place, name in enumerate(("cat: black", "dog")):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(images):
            save_image((image + place) / 2, folder / name / f"{number}.png")
    return folder


def test_what_is_written_is_taken_by_check_and_knows_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of_classes(tmp_path / "my images")
    for name in ("test_resnet", "test_vit"):
        write_local(load_source(name, pretrained=False), tmp_path / name)
    sources = ["local-dir:test_resnet", "local-dir:test_vit"]
    main(["init", "my images", "--image_size", "160", "--sources", *sources])
    assert "lightning-stitch check --config stitch.yaml" in capsys.readouterr().out
    config = yaml.safe_load(Path("stitch.yaml").read_text())
    assert config["model"] == {"class_path": "lightning_stitch.StitchedClassifier"}
    assert "the data's: cat: black, dog" in Path("stitch.yaml").read_text()
    assert config["data"]["init_args"] == {"image_folder": "my images", "image_size": 160, "calibration_samples": 20}
    assert config["trainer"]["callbacks"][0]["init_args"]["sources"] == sources
    main(["check", "--config", "stitch.yaml"])
    assert "2 of 2 sources fit, for images of 3x160x160" in capsys.readouterr().out


def test_a_file_that_is_there_is_kept_and_a_folder_without_classes_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stitch.yaml").write_text("mine")
    for arguments, words in (
        (["init", str(folder_of_classes(tmp_path / "images"))], "stitch.yaml is there already"),
        (["init", str(tmp_path / "nowhere"), "--output", "new.yaml"], "does not exist"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 1
        assert words in capsys.readouterr().err
    assert Path("stitch.yaml").read_text() == "mine"
    assert not Path("new.yaml").exists()
