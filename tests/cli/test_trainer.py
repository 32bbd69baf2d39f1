from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from doubles.methods import search_of, three_digits
from torchvision.transforms.functional import to_pil_image

from lightning_stitch import StitchedClassifier
from lightning_stitch._lightning import pl
from lightning_stitch.baselines.contenders import METHODS, ON_ALL_LABELS
from lightning_stitch.cli.main import main
from lightning_stitch.cli.trainer import StitchTrainer
from lightning_stitch.errors import StitchError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns where it is given arguments and the process has some, too.
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    data = three_digits(batch_size=999)
    for part in ("calibration", "train", "selection", "test"):
        ((images, labels),) = getattr(data, f"{'head' if part == 'train' else part}_dataloader")()
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            (folder / f"digit_{label}").mkdir(exist_ok=True)
            to_pil_image(image).save(folder / f"digit_{label}" / f"{part}_{index}.png")
    return folder


def from_example(name: str, folder: Path, images: Path) -> Path:
    """An example's configuration on small images, sources and sets; all else is left as it is."""
    config = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    config["data"]["init_args"] |= {"image_folder": str(images), "image_size": 32, "calibration_samples": 12}
    config["data"]["init_args"] |= {"train_samples": 40, "selection_samples": 20, "test_samples": 60}
    search = config["trainer"]["callbacks"][0]["init_args"]
    search["sources"] = [{"spec": f"test_{name}", "pretrained": False} for name in ("resnet", "efficientnet")]
    search["max_candidates"] = 4
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(folder)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


SMALL = ["--finetuning.epochs", "1", "--finetuning.probe_penalties", "[2]"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compare_solar_cells", "solar_cells"])
def test_compare_takes_the_configuration_of_fit(
    name: str, tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_example(name, tmp_path, image_folder)
    main(["compare", "--config", str(config), *SMALL, "--trainer.enable_progress_bar=false"])
    printed = capsys.readouterr().out
    folder = tmp_path / name / "version_0"
    with (folder / "methods.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [method for method in METHODS if method != "smaller image"]
    assert all(row["method"] in printed for row in rows)
    assert {row["labels"] for row in rows if row["method"] not in ON_ALL_LABELS} == {"60"}
    assert {row["labels"] for row in rows if row["method"] in ON_ALL_LABELS} == {"72"}  # the calibration images', too
    assert f"{folder / 'methods.csv'}" in printed.replace("\n", "")
    assert (folder / "methods.png").stat().st_size > 10_000
    recipe = json.loads((folder / "methods.json").read_text())["settings"]["finetuning"]
    assert (recipe["epochs"], recipe["probe_penalties"]) == (1, [2])
    assert recipe["learning_rates"] == ([1e-4, 1e-3] if name == "compare_solar_cells" else [1e-4, 3e-4, 1e-3])
    assert all(" ".join(row["verdict"].split()) in " ".join(printed.split()) for row in rows if row["verdict"])
    assert [row["method"] for row in rows if row["verdict"]] == ["side by side", "StitchNet", "StitchNet, fine-tuned"]


def test_methods_and_the_plot_can_be_chosen_on_the_command_line(tmp_path: Path, image_folder: Path) -> None:
    config = from_example("solar_cells", tmp_path, image_folder)
    options = ["--methods", '["closed-form head", "linear probe"]', "--plot", "false", "--seed", "3"]
    main(["compare", "--config", str(config), *SMALL, *options])
    folder = tmp_path / "solar_cells" / "version_0"
    with (folder / "methods.csv").open() as file:
        found = [(row["method"], row["seed"]) for row in csv.DictReader(file)]
    assert found == [("linear probe", "3"), ("closed-form head", "3")]
    assert not (folder / "methods.png").exists()


def test_the_help_lists_compare_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in ((["--help"], "compare"), (["compare", "--help"], "--finetuning.learning_rates")):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.init_args.image_folder=/nowhere"], "error: image_folder: /nowhere does not exist."),
        (["--finetuning.epochs=0"], "FineTuning: epochs must be at least 1; found 0."),
        (["--trainer.callbacks=[]"], "error: compare needs one FragmentSearch among trainer.callbacks; found 0."),
        (["--model.init_args.num_classes=4"], "error: The data have 3 classes, StitchedClassifier has num_classes=4."),
    ],
)
def test_wrong_input_ends_with_one_plain_sentence(
    tmp_path: Path, image_folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = from_example("solar_cells", tmp_path, image_folder)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--config", str(config), *options])
    assert stopped.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        ({}, pl.LightningModule(), "compare takes a StitchedClassifier; found LightningModule"),
        ({"fast_dev_run": True}, StitchedClassifier(3), "compare has no fast_dev_run; lower finetuning.epochs"),
        ({"devices": 2}, StitchedClassifier(3), "Methods are compared on one device.*found 2"),
    ],
)
def test_a_trainer_that_cannot_compare_says_why(
    tmp_path: Path, options: dict[str, Any], model: pl.LightningModule, message: str
) -> None:
    options = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path, **options}
    trainer = StitchTrainer(callbacks=[search_of()], enable_progress_bar=False, **options)
    with pytest.raises(StitchError, match=message):
        trainer.compare(model, three_digits())
