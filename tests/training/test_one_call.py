"""From a folder of images to a finished classifier, in one call and one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from doubles.predictions import write_digits
from doubles.small_sources import write_local
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image

import lightning_stitch as ls
from lightning_stitch.cli.main import main
from lightning_stitch.composing import compose_personal
from lightning_stitch.training import one_call

SOURCES = [{"spec": name, "pretrained": False} for name in ("test_resnet", "test_efficientnet")]
TWENTY, LABELS = torch.rand(20, 3, 8, 8), ["a", "b"] * 10
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
    model = ls.compose(SOURCES, folder, image_size=32, output="mine", budget="60%", **QUICK)
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
        ls.compose(SOURCES, tmp_path / "nothing", output="mine")


def test_without_an_output_nothing_is_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ls.compose(SOURCES, folder, compare=False, image_size=32, **QUICK)
    assert not list(tmp_path.iterdir())
    assert not model.training
    assert model.recipe is not None
    assert model.recipe.input_size == (3, 32, 32)


def test_images_are_as_large_as_the_largest_that_a_source_was_trained_on() -> None:
    sizes = [load.preprocessing.input_size[1:] for load in ls.load_sources(SOURCES)]
    assert one_call._largest_size(SOURCES) == max(sizes)


def test_what_cannot_be_is_refused_in_a_sentence_before_any_source_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ls.SourceError, match="takes a list of them"):
        ls.compose("resnet18.a1_in1k", folder)
    with pytest.raises(ls.BudgetError, match="'cheap' is no limit"):
        ls.compose(SOURCES, folder, budget="cheap", image_size=32)
    with pytest.raises(ls.CalibrationError, match="does not exist"):
        ls.compose(SOURCES, tmp_path / "nowhere")
    few = write_digits(tmp_path / "few", 10)
    with pytest.raises(ls.StitchError, match="holds 10 images; compose takes at least 16"):
        ls.compose(SOURCES, few)


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


def test_paths_pictures_and_tensors_with_labels_give_what_their_folder_gives(folder: Path, tmp_path: Path) -> None:
    opened = ImageFolder(str(folder))
    files, labels = [path for path, _ in opened.samples], [opened.classes[n] for n in opened.targets]
    options = {"image_size": 32, "compare": False, **QUICK}
    expected = ls.compose(SOURCES, folder, **options)
    pictures = [Image.open(file) for file in files]
    tensors = torch.stack([pil_to_tensor(Image.open(file)) for file in files])
    for images in (files, pictures, tensors):
        model = ls.compose(SOURCES, images, labels, **options)
        assert model.class_names == expected.class_names
        assert model.predict(files) == expected.predict(files)
    numbers = ls.compose(SOURCES, tensors, torch.tensor(opened.targets) * 2 + 5, **options)
    assert numbers.class_names == ["5", "7", "9"]
    page = expected.report(tmp_path / "page")
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert expected.result is not None
    assert expected.result.summary()[:60] in page.read_text()


@pytest.fixture(scope="module")
def pool() -> ls.Pool:
    return ls.Pool.prepare(ls.load_sources(SOURCES), (3, 32, 32))


def test_on_a_pool_a_few_images_or_a_folder_of_them_give_a_classifier_that_can_be_saved(
    pool: ls.Pool, tmp_path: Path
) -> None:
    few = folder_of_digits(tmp_path / "few", count=18)
    model = ls.compose(pool, few, budget="90%", output=tmp_path / "out")
    assert model.class_names == ["nought", "one", "two"]
    assert model.recipe is not None
    assert model.recipe.scores["macs"] <= 0.9 * min(part.cost.macs for part in pool.parts)
    assert (tmp_path / "out" / "report.html").is_file()
    opened = ImageFolder(str(few))
    files = [path for path, _ in opened.samples]
    mine = ls.compose(pool, files, [opened.classes[n] for n in opened.targets], budget="90%")
    assert mine.predict(files) == model.predict(files)
    assert ls.StitchedClassifier.from_pretrained(tmp_path / "out").predict(files) == model.predict(files)


def test_on_a_pool_classes_of_the_sources_or_none_need_no_labels(pool: ls.Pool) -> None:
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    chosen = ls.compose(pool, images, classes=[281, 7])
    found = compose_personal(pool, images, classes=[281, 7])
    assert chosen.class_names == ["281", "7"]
    probabilities = torch.tensor([list(row["probabilities"].values()) for row in chosen.predict(images)])
    with torch.no_grad():
        torch.testing.assert_close(probabilities, found.network(images).softmax(1), rtol=1e-4, atol=1e-5)
    features = ls.compose(pool, images)
    with torch.no_grad():
        torch.testing.assert_close(features(images), compose_personal(pool, images).network(images))


@pytest.mark.parametrize(
    ("images", "labels", "options", "words"),
    [
        (torch.rand(8, 3, 32, 32), None, {"image_size": 32}, "leave image_size= out"),
        (torch.rand(8, 3, 32, 32), None, {"heal": True}, r"the options classes, effort, ridge; found \['heal'\]"),
        ("folder", ["a"], {}, "leave labels= out"),
    ],
)
def test_what_a_pool_cannot_use_is_refused(
    pool: ls.Pool, images: object, labels: object, options: dict[str, object], words: str
) -> None:
    with pytest.raises(ls.StitchError, match=words):
        ls.compose(pool, images, labels, **options)


def test_images_without_labels_or_files_are_refused_before_sources_are_loaded() -> None:
    unknown = ["no_such_model"]
    with pytest.raises(ls.CalibrationError, match="Give labels="):
        ls.compose(unknown, torch.rand(20, 3, 8, 8), image_size=8)
    with pytest.raises(ls.CalibrationError, match="15 more do not exist"):
        ls.compose(unknown, [f"{n}_missing.png" for n in range(20)], ["a", "b"] * 10, image_size=8)
    with pytest.raises(ls.CalibrationError, match="20 images and 3 labels"):
        ls.compose(unknown, torch.rand(20, 3, 8, 8), ["a", "b", "a"], image_size=8)
    with pytest.raises(ls.CalibrationError, match="holds 5 images; compose takes at least 16 from sources, on a pool"):
        ls.compose(unknown, torch.rand(5, 3, 8, 8), ["a", "b", "a", "b", "a"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ls.compose(SOURCES, 5), "Images are a path, or a sequence of paths"),
        (lambda: ls.compose(None, "folder"), "sources= takes a list of them"),
        (
            lambda: ls.compose(SOURCES, TWENTY, LABELS, budget=5),
            "budget= is a Budget, or words",
        ),
        (
            lambda: ls.compose(SOURCES, TWENTY, LABELS, image_size="32"),
            "An image's size is 96",
        ),
        (lambda: ls.FragmentSearch(SOURCES, budget="25M"), r"found '25M'\. Budget\.of\('25M'\) reads words"),
        (lambda: ls.Pool(["test_resnet"], 32), "A pool takes loaded sources"),
        (lambda: ls.Pool.prepare(["test_resnet"]), "A pool takes loaded sources"),
        (lambda: ls.StitchedClassifier(2).predict(None), "Images are a path, or a sequence of paths"),
    ],
)
def test_what_is_of_another_type_is_told_in_a_sentence(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ls.StitchError, match=words):
        call()
