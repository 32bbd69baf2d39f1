from __future__ import annotations

import csv
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from doubles.configs import config_file
from PIL import Image
from sklearn.datasets import load_digits

import lightning_stitch
from lightning_stitch import StitchedClassifier
from lightning_stitch.cli import main as main_module
from lightning_stitch.cli.main import CONFIGURED, FUNCTIONS, main
from lightning_stitch.cli.trainer import StitchCLI


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns where it is given arguments and the process has some, too.
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(n_class=3, return_X_y=True)
    for index, (image, label) in enumerate(zip(images[:240], labels[:240], strict=True)):
        (folder / f"digit_{label}").mkdir(exist_ok=True)
        grey = (image.reshape(8, 8) * 15.9).astype(np.uint8)
        Image.fromarray(grey).save(folder / f"digit_{label}" / f"{index}.png")
    return folder


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    return capsys.readouterr().err


def without_breaks(text: str) -> str:
    """Help texts are wrapped, at hyphens too."""
    return "".join(text.split())


def test_the_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = without_breaks(capsys.readouterr().out)
    assert CONFIGURED.keys() == StitchCLI.subcommands().keys()
    assert not CONFIGURED.keys() & FUNCTIONS.keys()
    summaries = {name: str(function.__doc__).splitlines()[0] for name, function in FUNCTIONS.items()}
    for name, words in (CONFIGURED | summaries).items():
        assert without_breaks(name + words) in printed


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_commands_help_says_what_each_option_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = without_breaks(capsys.readouterr().out)
    assert f"usage:lightning-stitch{name}[" in printed
    lines = str(FUNCTIONS[name].__doc__).splitlines()
    for parameter in signature(FUNCTIONS[name]).parameters:
        (described,) = (line.split(":", 1)[1] for line in lines if line.startswith(f"        {parameter}:"))
        assert without_breaks(described) in printed


HEAVY = {"torch", "torchvision", "timm", "pytorch_lightning", "lightning", "torchmetrics"}
HEAVY |= {"huggingface_hub", "safetensors", "numpy", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["inspct"], 1),
        (["--hepl"], 2),
        *(([name, "--help"], 0) for name in FUNCTIONS),
    ],
)
def test_what_needs_no_network_loads_none(arguments: list[str], code: int) -> None:
    script = f"""
import sys
from lightning_stitch.cli.main import main
try:
    main({arguments})
finally:
    print("loaded:", {HEAVY} & sys.modules.keys() or None)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "loaded: None" in done.stdout
    assert done.returncode == code


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"lightning-stitch {lightning_stitch.__version__}\n"


def test_a_misspelt_command_is_told_the_nearest_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    printed = error_of(["inspct", "resnet50"], capsys)
    assert printed.startswith("error: There is no command 'inspct'. Nearest: 'inspect', ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict"], "the following arguments are required: checkpoint, images"),
        (["inspect", "test_resnet", "--pretrained", "perhaps"], "Expected a <class 'bool'>. Got value: perhaps"),
        (["publish", "a.ckpt", "me/a", "--existing_card=burn"], "existing_card"),
        (["publish", "a.ckpt", "me/a", "--metrics.accuracy=high"], "Expected a <class 'float'>. Got value: high"),
        (["predict", "--config", "config.yaml", "--ckpt_path=a.ckpt"], "unrecognized arguments: --config"),
        (["inspect", "test_resnet", "--config", "config.yaml"], "unrecognized arguments: --config config.yaml"),
    ],
)
def test_options_that_do_not_fit_a_commands_signature_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_configuration_may_stand_before_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump({"check": {"model": "lightning_stitch.StitchedClassifier"}}))
    with pytest.raises(SystemExit, match="2"):
        main([f"--config={path}", "check", "--model.num_classes=3", "--trainer.callbacks=7"])
    assert "callbacks" in capsys.readouterr().err


def test_inspect_lists_cuts_with_formats_shapes_and_costs(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "test_resnet", "--pretrained", "false", "--granularity", "stages"])
    printed = capsys.readouterr().out
    for words in (
        "licence   apache-2.0",
        "input     3x160x160",
        "M MACs, 1.64 MB of activations",
        "cuts (stages)",
        "layer2",
        "48x20x20",
        "NCHW",
    ):
        assert words in printed


def test_inspect_gives_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "torchvision:resnet50", "--pretrained", "false", "--granularity", "reference", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert [cut["shape"] for cut in report["cuts"]] == [
        [64, 56, 56],
        [256, 56, 56],
        [512, 28, 28],
        [1024, 14, 14],
        [2048],
    ]
    assert report["params"] == 25_557_032
    assert report["macs"] == pytest.approx(4.09e9, rel=0.01)
    assert report["activation_bytes"] == 4 * 3 * 256 * 56 * 56  # a residual sum
    assert [cut["macs_before"] for cut in report["cuts"]] == sorted(cut["macs_before"] for cut in report["cuts"])


class ScalesInTrainMode(torch.nn.Sequential):
    input_size, mean, std = (3, 8, 8), (0.5,) * 3, (0.5,) * 3

    def __init__(self) -> None:
        deep = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1)))
        super().__init__(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), deep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2 if self.training else 1)


def test_inspect_tells_what_train_mode_does_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", f"python:{__name__}:ScalesInTrainMode"])
    words = "training  mul where eval mode has other arguments; fragments do what eval mode does"
    assert words in capsys.readouterr().out
    main(["inspect", "test_resnet", "--pretrained", "false"])
    assert "training" not in capsys.readouterr().out


@torch.library.custom_op("test_cli::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


doubled.register_fake(torch.empty_like)


class Doubling(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return doubled(x)


class WithWorkOfItsOwn(torch.nn.Sequential):
    input_size, mean, std = (3, 8, 8), (0.5,) * 3, (0.5,) * 3

    def __init__(self) -> None:
        super().__init__(torch.nn.Conv2d(3, 4, 1), Doubling(), torch.nn.Flatten())


def test_inspect_lists_the_work_that_cannot_be_counted_where_there_is_some(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = f"python:{__name__}:WithWorkOfItsOwn"
    printed = {}
    for source in (spec, "test_resnet"):
        for option in ([], ["--json"]):
            main(["inspect", source, "--pretrained", "false", *option])
            printed[source, bool(option)] = capsys.readouterr().out
    assert "  uncounted 1: test_cli.doubled\n" in printed[spec, False]
    assert "uncounted" not in printed["test_resnet", False]
    assert json.loads(printed[spec, True])["uncounted"] == ["1: test_cli.doubled"]
    assert json.loads(printed["test_resnet", True])["uncounted"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_resnt"], "error: Source 'test_resnt': timm [^ ]+ knows no model 'test_resnt'. Nearest: 'test_resnet'"),
        (["test_resnet", "--granularity", "block"], "error: Unknown granularity 'block'; choose from"),
        (["local-dir:/nowhere"], "error: Source 'local-dir:/nowhere': "),
    ],
)
def test_inspect_says_what_is_wrong_without_a_traceback(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.match(message, error_of(["inspect", "--pretrained", "false", *arguments], capsys))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # ModelCheckpoint's, on every second run
def test_fit_then_test_validate_and_predict_from_yaml(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(tmp_path, image_folder)
    main(["fit", "--config", str(config)])
    checkpoint = tmp_path / "run" / "version_0" / "stitched.ckpt"
    assert f"The stitched network is in {checkpoint}." in capsys.readouterr().out
    model = StitchedClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 3)

    for command, metric in (("test", "test_accuracy"), ("validate", "val_accuracy"), ("predict_data", "")):
        main([command, "--config", str(config), "--ckpt_path", str(checkpoint)])
        assert metric in capsys.readouterr().out

    # What goes on from it trains nothing either, and is saved where it ran, not where the checkpoint says the best is.
    content = torch.load(checkpoint, weights_only=True)
    (saver,) = (state for name, state in content["callbacks"].items() if name.startswith("ModelCheckpoint"))
    saver["best_model_path"] = str(checkpoint)
    torch.save(content, checkpoint)
    main(["fit", "--config", str(config), "--ckpt_path", str(checkpoint)])
    assert f"The stitched network is in {checkpoint}." not in capsys.readouterr().out
    assert len(list(tmp_path.rglob("stitched.ckpt"))) == 2


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_fit_that_goes_on_from_a_checkpoint_needs_no_sources_in_a_module_of_ones_own(
    tmp_path: Path, image_folder: Path
) -> None:
    config = config_file(tmp_path, image_folder, search={"attribute": "backbone", "exits": False})
    written = yaml.safe_load(config.read_text())
    written["model"] = {"class_path": "networks.test_backbone.Classifier"}
    config.write_text(yaml.safe_dump(written))
    main(["fit", "--config", str(config)])
    (checkpoint,) = tmp_path.rglob("stitched.ckpt")
    written["trainer"]["callbacks"][0]["init_args"]["sources"] = ["there is no such source"]
    written["trainer"]["max_epochs"] = 1
    config.write_text(yaml.safe_dump(written))
    main(["fit", "--config", str(config), "--ckpt_path", str(checkpoint)])
    (trained,) = tmp_path.rglob("epoch=*.ckpt")
    recipes = [
        torch.load(path, weights_only=True)["state_dict"]["backbone._extra_state"]["recipe"]
        for path in (checkpoint, trained)
    ]
    assert recipes[0] == recipes[1] is not None


def test_an_option_on_the_command_line_overrides_the_file(tmp_path: Path, image_folder: Path) -> None:
    config = config_file(tmp_path, image_folder)
    option = "--trainer.callbacks.init_args.budget.max_macs=1.0e7"
    main(["fit", "--config", str(config), option])
    saved = yaml.safe_load((tmp_path / "run" / "version_0" / "config.yaml").read_text())
    others = dict.fromkeys(["max_params", "max_latency_ms", "max_activation_bytes", "min_score", "mean_macs"])
    assert saved["trainer"]["callbacks"][0]["init_args"]["budget"] == {"max_macs": 1.0e7, **others}


BUDGET = {
    "max_params": 1.0e7,
    "max_macs": 1.0e9,
    "max_latency_ms": 1.0e6,
    "max_activation_bytes": 1.0e8,
    "min_score": 0.4,
}


@pytest.mark.slow
@pytest.mark.parametrize("written", [BUDGET, {"class_path": "lightning_stitch.Budget", "init_args": BUDGET}])
def test_every_limit_of_a_budget_can_be_written_in_yaml(
    tmp_path: Path, image_folder: Path, written: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--config", str(config_file(tmp_path, image_folder, search={"budget": written}))])
    checkpoint = tmp_path / "run" / "version_0" / "stitched.ckpt"
    recipe = StitchedClassifier.load_from_checkpoint(checkpoint, weights_only=True).recipe
    assert recipe is not None
    for measure in ("params", "macs", "activation_bytes", "latency_ms"):
        assert 0 < recipe.scores[measure] <= BUDGET[f"max_{measure}"]
    assert recipe.scores["loo_accuracy"] >= 0.4
    with (tmp_path / "run" / "version_0" / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    for measure in ("params", "macs", "activation_bytes", "latency_ms", "loo_accuracy"):
        assert float(row[f"search/{measure}"]) == pytest.approx(recipe.scores[measure])


def test_training_from_yaml_keeps_lightnings_own_checkpoint(tmp_path: Path, image_folder: Path) -> None:
    config = config_file(tmp_path, image_folder, max_epochs=1)
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}
    main(["fit", "--config", str(config), "--model.init_args.optimizer", json.dumps(optimizer)])
    (checkpoint,) = (tmp_path / "run" / "version_0" / "checkpoints").glob("*.ckpt")
    assert not (tmp_path / "run" / "version_0" / "stitched.ckpt").exists()
    StitchedClassifier.load_from_checkpoint(checkpoint, weights_only=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"sources": ["test_resnte"]}}, "error: 1 of 1 sources cannot be used"),
        ({"search": {"budget": {"max_macs": 1}}}, "the cheapest composition has"),
        ({"search": {"budget": {"max_activation_bytes": 1}}}, "the cheapest composition has at least"),
        ({"search": {"budget": {"max_latency_ms": -5}}}, "max_latency_ms must be positive or None; found -5"),
        ({"search": {"budget": {"min_score": 2}}}, "the highest loo_accuracy is"),
        ({"data": {"image_folder": "/nowhere"}}, "error: image_folder: /nowhere does not exist."),
        ({"data": {"calibration_samples": 2}}, "error: calibration_samples is 2, but stitches need at least 4"),
    ],
)
def test_wrong_input_ends_with_one_plain_sentence(
    tmp_path: Path, image_folder: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = error_of(["fit", "--config", str(config_file(tmp_path, image_folder, **changes))], capsys)
    assert message in printed
    assert "Traceback" not in printed


def test_an_image_folder_of_one_class_is_refused(
    tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(image_folder / "digit_0", tmp_path / "images" / "digit_0")
    printed = error_of(["fit", "--config", str(config_file(tmp_path, tmp_path / "images"))], capsys)
    assert "two classes are needed" in printed


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m lightning_stitch.cli inspect test_resnet --pretrained false --json | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("head", "task", "then"),
    [
        ({"name": "knn", "num_neighbours": 3, "metric": "euclidean"}, "multiclass", "test"),
        ({"name": "class_map", "classes": {"a": "0-9", "b": [20, "30-39"]}, "other": True}, "none", "predict_data"),
    ],
)
def test_heads_with_options_and_tasks_come_from_yaml(
    tmp_path: Path, image_folder: Path, head: dict[str, Any], task: str, then: str
) -> None:
    config = config_file(tmp_path, image_folder, enable_checkpointing=False, data={"task": task})
    written = yaml.safe_load(config.read_text())
    written["model"]["init_args"]["head"] = head
    config.write_text(yaml.safe_dump(written))
    main(["fit", "--config", str(config)])
    (checkpoint,) = tmp_path.rglob("stitched.ckpt")
    loaded = StitchedClassifier.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.head_settings.name == head["name"]
    assert loaded(torch.rand(2, 3, 32, 32)).shape == (2, 3)
    main([then, "--config", str(config), "--ckpt_path", str(checkpoint)])


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict_data"])
def test_a_checkpoint_that_is_not_there_is_one_line_before_anything_else(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(tmp_path, tmp_path / "no_images_either")
    missing = tmp_path / "missing.ckpt"
    error = error_of([command, "--config", str(config), "--ckpt_path", str(missing)], capsys)
    assert error == f"error: The checkpoint {missing} (--ckpt_path) does not exist.\n"
    missing.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    error = error_of([command, "--config", str(config), "--ckpt_path", str(missing)], capsys)
    assert error.startswith(f"error: {missing} is a Git LFS pointer")
    assert error.count("\n") == 1


def test_lightnings_advertisements_are_kept_back_and_what_it_says_of_the_run_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")

    def run(*_: Any, **__: Any) -> None:
        logger.warning("\N{ELECTRIC LIGHT BULB} Tip: try another product")
        logger.warning("`Trainer.fit` stopped")
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated", FutureWarning, stacklevel=1)

    monkeypatch.setattr(main_module, "_run", run)
    before = list(logger.filters)
    with caplog.at_level(logging.WARNING, logger=logger.name):
        logger.addHandler(caplog.handler)
        try:
            main([])
        finally:
            logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"`Trainer.fit` stopped"}
    assert logger.filters == before
