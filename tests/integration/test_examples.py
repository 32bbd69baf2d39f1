from __future__ import annotations

import csv
import difflib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from lightning_stitch import StitchedClassifier, load_source
from lightning_stitch.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"image_size": 64, "train_samples": 48, "selection_samples": 32, "test_samples": 64}


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_example("prepare_solar_cells")


@pytest.fixture(scope="module")
def workplace(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    script.main(["--output", str(folder / "solar_cells")])
    return folder


@pytest.mark.slow
def test_prepared_images_are_elpv_in_two_classes(workplace: Path) -> None:
    images = workplace / "solar_cells" / "images"
    assert {folder.name: len(list(folder.glob("*.png"))) for folder in images.iterdir()} == {
        "functional": 1803,
        "defective": 821,
    }
    # the probability in a file's name decides its folder
    shares = {folder.name: {file.stem[-3:] for file in folder.iterdir()} for folder in images.iterdir()}
    assert shares == {"functional": {"000", "033"}, "defective": {"067", "100"}}


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 2])
def test_prepared_sources_are_trained_networks_with_identity(workplace: Path, size: int) -> None:
    source = load_source(f"local-dir:{workplace}/solar_cells/efficientnet_lite{size}")
    assert source.ref.architecture == f"tf_efficientnet_lite{size}"
    assert source.licence == "apache-2.0"
    assert (source.preprocessing.mean, source.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    # BatchNorm statistics of a trained network fit what reaches them: activations neither die out nor explode
    with torch.no_grad():
        features = source.module.forward_head(
            source.module.forward_features(torch.randn(2, 3, 224, 224)), pre_logits=True
        )
    assert 0.01 < features.mean() < 10


@pytest.mark.slow
def test_a_second_run_leaves_everything_alone(
    script: ModuleType, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((workplace / "solar_cells").rglob("*.safetensors"))
    before = [file.stat().st_mtime_ns for file in files]
    script.main(["--output", str(workplace / "solar_cells")])
    assert "Nothing to do" in capsys.readouterr().out
    assert [file.stat().st_mtime_ns for file in files] == before


def test_weights_of_another_hash_are_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    wrong = dataclasses.replace(script.WEIGHTS["efficientnet_lite0"], sha256="0" * 64)
    monkeypatch.setitem(script.WEIGHTS, "efficientnet_lite0", wrong)
    with pytest.raises(SystemExit, match="is not the file this script knows: sha256 5793"):
        script.main(["--output", str(tmp_path)])
    assert not (tmp_path / "efficientnet_lite0").exists()


def test_a_folder_of_someone_elses_is_not_touched(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="not as this script writes it"):
        script.make_once(tmp_path / "images", script.is_complete, script.write_images)
    assert (tmp_path / "images" / "mine.txt").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["solar_cells", "solar_cells_full", "stitchnet_paper"])
def test_the_configuration_runs_and_writes_its_table(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])
    options = [f"--data.init_args.{key}={value}" for key, value in SMALL.items()]
    options += ["--trainer.callbacks.init_args.max_candidates=6", "--trainer.enable_model_summary=false"]
    main(["fit", "--config", str(EXAMPLES / f"{name}.yaml"), *options])
    printed = capsys.readouterr().out
    folder = workplace / "logs" / name / "version_0"
    assert f"The stitched network is in {folder.relative_to(workplace)}/stitched.ckpt." in " ".join(printed.split())
    with (folder / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    sources = {f"efficientnet_lite{size}" for size in range(3)}
    for kind in ("source", "self-stitched"):
        assert {row["name"] for row in rows if row["kind"] == kind} == sources
    kinds = {row["kind"] for row in rows}
    assert kinds - {"stitched", "shortened", "side by side"} == {"source", "self-stitched", "early exit"}
    assert kinds & {"stitched", "shortened"}
    record = json.loads((folder / "comparison.json").read_text())
    assert all(verdict["sentence"] for verdict in record["verdicts"])
    assert "orth it" in record["verdict"]
    with (folder / "candidates.csv").open() as file:
        assert len(list(csv.DictReader(file))) > len(rows)
    assert all(float(row["auroc_low"]) <= float(row["auroc"]) <= float(row["auroc_high"]) for row in rows)
    model = StitchedClassifier.load_from_checkpoint(folder / "stitched.ckpt", weights_only=True)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.slow
def test_photographs_are_sorted_into_mapped_classes_without_labels(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "solar_cells").symlink_to(workplace / "solar_cells")
    (tmp_path / "photos" / "all").mkdir(parents=True)
    for photograph, pixels in enumerate(load_sample_images().images):
        for crop in range(32):
            x, y = 12 * crop, 6 * crop
            Image.fromarray(pixels[y : y + 200, x : x + 200]).save(
                tmp_path / "photos" / "all" / f"{photograph}_{crop}.png"
            )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])
    options = ["--data.init_args.image_size=64", "--trainer.callbacks.init_args.max_candidates=4"]
    main(["fit", "--config", str(EXAMPLES / "class_map.yaml"), *options])
    capsys.readouterr()
    main(["predict", "logs/class_map/version_0/stitched.ckpt", "photos/all"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 64
    # A temple and a dahlia: neither dogs, cats nor cups.
    assert {row["class"] for row in rows} == {"other"}
    assert {name for name in rows[0] if name.startswith("probability_")} == {
        f"probability_{name}" for name in ("dog", "cat", "cup", "other")
    }


@pytest.mark.slow
def test_cnn_fronts_are_stitched_to_vit_tails_on_real_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_example("cnn_to_vit").main(["--epochs", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    joints = re.findall(r"(\S+) +│ (\S+) +│ NCHW \d+ -> (tokens|NHWC) 64, explicit", printed)
    fronts = {"conv1.2", "conv1.5", "maxpool", "layer1", "layer2", "layer3"}
    tails = {"patch_embed", "norm_pre", "blocks.0", "blocks.1", "blocks.2"}
    assert {(front, tail) for front, tail, _ in joints} == {(front, tail) for front in fronts for tail in tails}
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["kind"]) for row in rows[-1:]] == [("StitchNet", "stitched")]
    assert {row["name"] for row in rows[:-1]} == {"cnn", "vit"}
    assert rows[-1]["labels"] == "384"


def accuracies(printed: str) -> dict[str, float]:
    """The mean accuracy of each kind of network, as examples/personal.py prints them."""
    return {kind: float(mean) for kind, mean in re.findall(r"^(\w+): accuracy ([\d.]+)", printed, flags=re.MULTILINE)}


PERSONAL = {"chosen", "StitchNet", "ensemble", "general", "source"}


def test_people_get_networks_for_their_own_digits(capsys: pytest.CaptureFixture[str]) -> None:
    load_example("personal").main(["--people", "3", "--images", "15", "--epochs", "4"])
    printed = capsys.readouterr().out
    people = re.findall(r"\d: digits (\d), (\d), (\d) ", printed)
    assert len(people) == 3
    assert all(len(set(classes)) == 3 for classes in people)
    # Of three digits one in three is right by chance.
    assert {kind for kind, mean in accuracies(printed).items() if mean > 0.6} == PERSONAL


@pytest.mark.slow
def test_people_get_networks_for_their_own_solar_cells(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--people", "2", "--images", "16", "--image-size", "64", "--test-images", "24"]
    load_example("personal").main(["--task", "solar-cells", "--solar-cells", str(workplace / "solar_cells"), *small])
    printed = capsys.readouterr().out
    assert re.findall(r"\d: (mono|poly) ", printed) == ["mono", "poly"]
    assert accuracies(printed).keys() == PERSONAL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "finetune_stitched"])
def test_the_fine_tuning_scripts_run_on_real_images(
    name: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "solar_cells").symlink_to(workplace / "solar_cells")
    monkeypatch.chdir(tmp_path)
    options = "--size 32 --labels 96 --epochs 1"
    load_example(name).main(options.split())
    accuracy, *_ = re.findall(r"test_accuracy\W+([0-9.]+)", capsys.readouterr().out)
    assert 0.5 < float(accuracy) <= 1


def test_an_ordinary_script_is_stitched_by_a_few_lines() -> None:
    plain, stitched = ((EXAMPLES / f"{name}.py").read_text().splitlines() for name in ("finetune", "finetune_stitched"))
    changed = [line for line in difflib.ndiff(plain[1:], stitched[1:]) if line[:2] in ("+ ", "- ") and line[2:].strip()]
    assert len([line for line in changed if line.startswith("+")]) <= 6
    assert len([line for line in changed if line.startswith("-")]) <= 4


def blocks_of_readme(language: str) -> list[str]:
    text = (EXAMPLES.parent / "README.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_the_readmes_first_commands_are_one_line_each_and_ci_runs_the_second() -> None:
    first, second = (block.strip() for block in blocks_of_readme("bash")[:2])
    assert "\n" not in first + second
    assert re.search(r"install .+ && .+", first)
    assert re.search(r"install .+ && .+", second)
    assert second in (EXAMPLES.parent / ".ci" / "run").read_text()
    named = re.findall(r"examples/[\w.]+", " ".join(blocks_of_readme("bash")))
    assert named
    assert all((EXAMPLES.parent / name).is_file() for name in named)


def run_on_few_images(code: str, workplace: Path, folder: Path) -> None:
    """Run a script in a folder of its own with the sources and a few images, and these smaller."""
    for size in range(3):
        name = f"solar_cells/efficientnet_lite{size}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(workplace / name)
    for name, count in (("functional", 100), ("defective", 50)):
        images = folder / "solar_cells" / "images" / name
        images.mkdir(parents=True)
        for file in sorted((workplace / "solar_cells" / "images" / name).iterdir())[:count]:
            (images / file.name).symlink_to(file)
    assert "128" in code
    assert "512" in code
    (folder / "script.py").write_text(code.replace("128", "64").replace("512", "60"))
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_the_readmes_blocks_run_in_their_order_on_fewer_and_smaller_images(workplace: Path, tmp_path: Path) -> None:
    blocks = blocks_of_readme("python")
    assert len(blocks) >= 4
    run_on_few_images("\n".join(blocks), workplace, tmp_path)
    assert {"solar", "solar.onnx", "predictions.csv", "cells_journal"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
def test_the_notebooks_cells_run_in_their_order_on_fewer_and_smaller_images(workplace: Path, tmp_path: Path) -> None:
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) >= 6
    run_on_few_images("\n".join(code), workplace, tmp_path)
    assert (tmp_path / "solar" / "config.json").is_file()
    assert (tmp_path / "stitch_logs" / "version_0" / "report.html").is_file()
