"""Exported networks: files that give what the network gives, with any number of images, without this package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import pytest
import torch
from doubles.small_sources import donor, live
from doubles.tensors import digits
from torch import Tensor

from lightning_stitch import (
    Budget,
    CalibrationSettings,
    Pool,
    SearchResult,
    StitchedClassifier,
    StitchError,
    ensemble,
)
from lightning_stitch.cli.main import main
from lightning_stitch.heads import HeadSettings, StagedHead
from lightning_stitch.stitching import Candidate

SHAPE = (3, 64, 64)
IMAGES, LABELS = digits(160, 64, first=20, classes=4)
NEW = digits(30, 64, first=300, classes=4)[0]
NAMES = ["nought", "one", "two", "three"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "run_stages.py"


@cache
def searched(*names: str) -> tuple[Pool, SearchResult]:
    pool = Pool([donor(name) for name in names], SHAPE, settings=CalibrationSettings(granularity="stages"))
    budget = Budget(mean_macs=1.5 * min(part.cost.macs for part in pool.parts))
    return pool, pool.search([IMAGES[:16]], [(IMAGES, LABELS)], max_candidates=6, budget=budget, sizes=[32])


def classifier(
    pool: Pool, candidate: Candidate, *, head: str = "ridge", task: str = "multiclass"
) -> StitchedClassifier:
    model = StitchedClassifier(4, head=head, task=task, class_names=NAMES)
    network = pool.assemble(candidate)
    targets = {
        "multiclass": LABELS,
        "multilabel": torch.nn.functional.one_hot(LABELS, 4),
        "regression": torch.stack([LABELS * n for n in (1.0, 2.0, 3.0, 4.0)], 1),
    }[task]
    with torch.no_grad():
        settings = HeadSettings.of(head, task=task, num_classes=4)
        fitted, _ = settings.fit_for(network.recipe, network(IMAGES), targets)
    model.install(network, fitted)
    return model.eval()


def cheapest(result: SearchResult) -> Candidate:
    return min((r.candidate for r in result.ranked), key=lambda candidate: candidate.cost.macs)


def of_kind(result: SearchResult, kind: str) -> Candidate:
    return next(r.candidate for r in result.ranked if r.candidate.kind == kind)


def run(file: Path, images: Tensor) -> Tensor:
    """What a file says of images."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()(images)[0]
    session = onnxruntime.InferenceSession(file)
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def stages_of(files: list[Path]) -> Any:
    """The driver of the example."""
    spec = importlib.util.spec_from_file_location("run_stages", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sessions = [onnxruntime.InferenceSession(file) for file in files]
    return lambda images: module.predict(sessions, images.numpy())


CASES = [
    (("test_resnet", "test_efficientnet"), "source", "ridge", "multiclass", ".pt2"),
    (("test_resnet", "test_efficientnet"), "stitched", "ridge", "multilabel", ".onnx"),
    (("test_resnet", "test_efficientnet"), "smaller image", "knn", "multiclass", ".onnx"),
    (("test_resnet", "test_efficientnet"), "staged", "ridge", "multiclass", ".onnx"),
    (("test_resnet", "test_efficientnet"), "staged", "ridge", "multiclass", ".pt2"),
    (("test_vit", "test_resnet"), "source", "ridge", "regression", ".onnx"),
]


@pytest.mark.parametrize(("names", "kind", "head", "task", "suffix"), CASES)
def test_a_file_says_of_any_number_of_images_what_the_network_says(
    names: tuple[str, ...], kind: str, head: str, task: str, suffix: str, tmp_path: Path
) -> None:
    pool, result = searched(*names)
    model = classifier(pool, of_kind(result, kind), head=head, task=task)
    (file,) = model.export(tmp_path / f"network{suffix}")
    with torch.no_grad():
        expected = model.predict_step(NEW, 0)
    for count in (1, len(NEW)):
        torch.testing.assert_close(run(file, NEW[:count]), expected[:count], rtol=1e-3, atol=1e-4)


def test_what_is_written_knows_its_classes_size_and_recipe(tmp_path: Path) -> None:
    pool, result = searched("test_resnet", "test_efficientnet")
    model = classifier(pool, cheapest(result))
    (onnx,), (pt2,) = model.export(tmp_path / "a.onnx"), model.export(tmp_path / "a.pt2")
    kept = dict.fromkeys(("class_names", "task", "input_size", "recipe"), "")
    torch.export.load(pt2, extra_files=kept)
    session = onnxruntime.InferenceSession(onnx)
    for facts in (kept, session.get_modelmeta().custom_metadata_map):
        assert json.loads(facts["class_names"]) == NAMES
        assert json.loads(facts["input_size"]) == list(SHAPE)
        assert json.loads(facts["recipe"]) == json.loads(json.dumps(model.hparams["recipe"]))
    assert [(node.name, node.shape[0]) for node in session.get_inputs()] == [("images", "batch")]
    assert [node.name for node in session.get_outputs()] == ["probabilities"]


def test_a_file_for_each_stage_runs_each_image_as_far_as_the_network_does(tmp_path: Path) -> None:
    pool, result = searched("test_resnet", "test_efficientnet")
    staged = [r.candidate for r in result.ranked if r.candidate.kind == "staged"]
    model = classifier(pool, max(staged, key=lambda candidate: len(candidate.recipe.stages.taps)))
    assert isinstance(model.head, StagedHead)
    files = model.export(tmp_path / "network.onnx", per_stage=True)
    assert [file.name for file in files] == [f"network.stage{n + 1}.onnx" for n in range(len(model.head.heads))]
    with torch.no_grad():
        probabilities, stops = stages_of(files)(NEW)
        assert model.network is not None
        logits, expected = model.network.in_stages(NEW, model.head)
    assert 0 < sum(stop > 0 for stop in stops) < len(NEW)
    assert stops == expected.tolist()
    numpy.testing.assert_allclose(probabilities, logits.softmax(1), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_network_alone_and_an_ensemble_are_exported_with_their_features(tmp_path: Path) -> None:
    pool, result = searched("test_resnet", "test_efficientnet")
    networks = [pool.assemble(cheapest(result)), ensemble(pool, result, [(IMAGES, LABELS)], top=2)]
    for number, network in enumerate(networks):
        (file,) = network.export(tmp_path / f"{number}.onnx")
        with torch.no_grad():
            torch.testing.assert_close(run(file, NEW), network(NEW), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_command_writes_a_saved_folder_and_the_example_runs_it_without_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision.utils import save_image

    pool, result = searched("test_resnet", "test_efficientnet")
    model = classifier(pool, of_kind(result, "staged"))
    model.save_pretrained(tmp_path / "saved")
    main(["export", str(tmp_path / "saved"), str(tmp_path / "net.onnx"), "--per_stage"])
    assert "net.stage1.onnx" in capsys.readouterr().out
    files = sorted(map(str, tmp_path.glob("net.stage*.onnx")))
    save_image(NEW[0], tmp_path / "image.png")
    command = [sys.executable, str(EXAMPLE), *files, "--", str(tmp_path / "image.png")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert any(name in said for name in NAMES)
    assert "behind stage" in said


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path) -> None:
    pool, result = searched("test_resnet", "test_efficientnet")
    model = classifier(pool, cheapest(result))
    with pytest.raises(StitchError, match=r"end in .onnx or .pt2"):
        model.export(tmp_path / "network.pth")
    with pytest.raises(StitchError, match="no stages"):
        model.export(tmp_path / "network.onnx", per_stage=True)
    (tmp_path / "network.onnx").write_text("mine")
    with pytest.raises(StitchError, match="is there already"):
        model.export(tmp_path / "network.onnx")
    assert (tmp_path / "network.onnx").read_text() == "mine"
    assert model.export(tmp_path / "network.onnx", overwrite=True)
    with pytest.raises(StitchError, match="no network yet"):
        StitchedClassifier(2).export(tmp_path / "empty.onnx")


def test_what_onnx_has_no_word_for_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j1(self.layer(x)).mean((2, 3))

    pool = Pool([live(Strange(), "strange")], SHAPE)
    network = pool.assemble(pool.search([IMAGES[:16]], [IMAGES[16:48]]).best.candidate)
    with pytest.raises(StitchError, match=r"cannot be exported as .onnx: .*bessel"):
        network.export(tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())
