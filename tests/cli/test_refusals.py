from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from doubles.configs import config_file

from lightning_stitch import Budget, CalibrationDataModule, FragmentSearch
from lightning_stitch.cli.main import main
from lightning_stitch.cli.options_page import options_page
from lightning_stitch.cli.refusals import say_once


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns where it is given arguments and the process has some, too.
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])


def refusal(folder: Path, change: Callable[[dict[str, Any]], object], capsys: pytest.CaptureFixture[str]) -> str:
    path = config_file(folder, folder / "images")
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", str(path)])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("error: ").strip()


def options_of_search(config: dict[str, Any]) -> dict[str, Any]:
    return config["trainer"]["callbacks"][0]["init_args"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda config: options_of_search(config).update(compar=True),
            "trainer.callbacks: lightning_stitch.FragmentSearch has no option 'compar'. Nearest: 'compare', ",
        ),
        (
            lambda config: options_of_search(config)["strategy"]["init_args"].update(widht=1),
            "trainer.callbacks.strategy: lightning_stitch.Beam has no option 'widht'. Nearest: 'width', ",
        ),
        (
            lambda config: options_of_search(config)["strategy"].update(class_path="lightning_stitch.Bem"),
            "trainer.callbacks.strategy: there is no class 'lightning_stitch.Bem'. Nearest: 'Beam', ",
        ),
        (
            lambda config: options_of_search(config).update(budget={"max_mac": 1}),
            "trainer.callbacks.budget: lightning_stitch.Budget has no option 'max_mac'. Nearest: 'max_macs', ",
        ),
        (
            lambda config: options_of_search(config).update(budget={"max_macs": "lots"}),
            "trainer.callbacks.budget.max_macs: expected float or null; found 'lots'.",
        ),
        (
            lambda config: options_of_search(config).update(estimator="biasd"),
            "trainer.callbacks.estimator: expected 'debiased' or 'biased'; found 'biasd'.",
        ),
        (
            lambda config: options_of_search(config).pop("sources"),
            "trainer.callbacks: lightning_stitch.FragmentSearch: the following arguments are required: sources.",
        ),
        (
            lambda config: config["trainer"].update(max_epoch=0),
            "there is no option 'trainer.max_epoch'. Nearest: 'trainer.max_epochs', ",
        ),
        (
            lambda config: config.update(triner=config.pop("trainer")),
            "there is no option 'triner'. Nearest: 'trainer', ",
        ),
        (
            lambda config: config["trainer"]["logger"].update(class_path="CSVLoger"),
            "trainer.logger: there is no class 'CSVLoger'.",
        ),
        (
            lambda config: config["model"].update(class_path="lightning_stich.StitchedClassifier"),
            "model: there is no class 'lightning_stich.StitchedClassifier'.",
        ),
        (
            lambda config: config["data"].update(image_size=32),
            "data: beside class_path there may only be init_args, with the options of the class; found 'image_size'.",
        ),
        (
            lambda config: config["data"]["init_args"].update(image_size="big"),
            "data.image_size: expected int or tuple[int, int] or null; found 'big'.",
        ),
    ],
)
def test_what_is_wrong_with_a_configuration_is_one_sentence(
    change: Callable[[dict[str, Any]], object], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(tmp_path, change, capsys).startswith(sentence)


def test_a_message_of_another_form_is_told_as_it_is() -> None:
    assert say_once("Problems parsing config: while parsing\n  in line 1", []) == (
        "Problems parsing config: while parsing in line 1"
    )
    new = 'Parser key "trainer":\n  The moon is full'
    assert say_once(new, []) == "trainer: The moon is full."


def test_the_help_of_fit_begins_with_this_packages_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    before, _, lightnings = capsys.readouterr().out.partition("What follows are Lightning's.")
    assert "--trainer.max_epochs" in lightnings
    places = [before.index(f": {cls.__name__}\n") for cls in (FragmentSearch, Budget, CalibrationDataModule)]
    assert places == sorted(places)
    for option in ("max_macs=null", "calibration_samples=32", "compare=false", "sources  ", "num_classes"):
        assert f"\n  {option}" in before


def test_a_page_of_options_is_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = options_page("fit").splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 80
