"""From a folder of images to a finished classifier, in one call and one command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from doubles.predictions import write_digits
from doubles.small_sources import write_local
from sklearn.datasets import load_digits
from torchvision.utils import save_image

import lightning_stitch as ls
from lightning_stitch.cli.main import main
from lightning_stitch.training import one_call

SOURCES = [{"spec": name, "pretrained": False} for name in ("test_resnet", "test_efficientnet")]
QUICK = {"granularity": "stages", "max_candidates": 4, "progress": False}


def folder_of_digits(folder: Path, count: int = 90) -> Path:
    digits = load_digits(n_class=3)
    for number, (image, label) in enumerate(zip(digits.images[:count], digits.target, strict=False)):
        place = folder / ("nought", "one", "two")[label]
        place.mkdir(parents=True, exist_ok=True)
        save_image(torch.from_numpy(image / 16.0), place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_digits(tmp_path_factory.mktemp("digits"))


def test_a_folder_becomes_a_classifier_that_predicts_is_saved_and_knows_its_classes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ls.compose_folder(SOURCES, folder, image_size=32, output="mine", budget="60%", **QUICK)
    assert model.class_names == ["nought", "one", "two"]
    assert model.recipe is not None
    cheapest = min(row.macs or 0 for row in ls.preflight(SOURCES, image_shape=(3, 32, 32)).rows)
    assert model.recipe.scores["macs"] <= 0.6 * cheapest
    rows = ls.predict_files(model, [next((folder / "one").iterdir())])
    assert set(rows[0]) >= {"file", "class"}
    loaded = ls.StitchedClassifier.from_pretrained("mine")
    assert loaded.recipe == model.recipe
    table = json.loads(Path("mine/comparison.json").read_text())
    assert any("chosen by the search" in (row["budget"] or "") for row in table["rows"])
    assert table["verdict"][:40] in Path("mine/README.md").read_text().replace("\\", "")
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    with pytest.raises(ls.StitchError, match="already holds"):
        ls.compose_folder(SOURCES, tmp_path / "nothing", output="mine")


def test_without_an_output_nothing_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ls.compose_folder(SOURCES, folder, compare=False, image_size=32, **QUICK)
    assert not list(tmp_path.iterdir())
    assert not model.training
    assert model.recipe is not None
    assert model.recipe.input_size == (3, 32, 32)


def test_images_are_as_large_as_the_largest_that_a_source_was_trained_on() -> None:
    sizes = [load.preprocessing.input_size[1:] for load in ls.load_sources(SOURCES)]
    assert one_call._largest_size(SOURCES) == max(sizes)


def test_what_cannot_be_is_refused_in_a_sentence_before_any_source_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ls.SourceError, match="a list of them"):
        ls.compose_folder("resnet18.a1_in1k", folder)
    with pytest.raises(ls.BudgetError, match="'cheap' is no limit"):
        ls.compose_folder(SOURCES, folder, budget="cheap", image_size=32)
    with pytest.raises(ls.CalibrationError, match="does not exist"):
        ls.compose_folder(SOURCES, tmp_path / "nowhere")
    few = write_digits(tmp_path / "few", 10)
    with pytest.raises(ls.StitchError, match="holds 10 images; compose_folder takes at least 16"):
        ls.compose_folder(SOURCES, few)


def test_the_command_says_what_it_made_and_where_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        saved = ls.load_source({"a": "test_resnet", "b": "test_efficientnet"}[name], pretrained=False)
        write_local(saved, tmp_path / name)
    sources, options = (f"local-dir:{tmp_path / name}" for name in "ab"), ("--image_size", "32", "--budget", "2G")
    main(["compose", str(folder), *sources, "--output", str(tmp_path / "out"), *options])
    said = capsys.readouterr().out
    assert "Stitched network of" in said
    assert f"lightning-stitch predict {tmp_path / 'out'}" in said
    main(["predict", str(tmp_path / "out"), str(folder / "two"), "--output", str(tmp_path / "rows.csv")])
    assert "two" in (tmp_path / "rows.csv").read_text()
