from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from doubles.hub import HubDouble
from doubles.small_sources import assert_same_weights
from doubles.tensors import digits
from pytorch_lightning import LightningDataModule, Trainer
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch import (
    Beam,
    CalibrationDataModule,
    CalibrationError,
    CalibrationSettings,
    FineTuning,
    FragmentSearch,
    SourceError,
    StitchedClassifier,
    StitchError,
    compare_methods,
    load_source,
    load_sources,
    preflight,
)
from lightning_stitch.cli.main import main
from lightning_stitch.cutting import graph
from lightning_stitch.cutting.tracing import trace_somehow

RANDOM = {"spec": "test_resnet", "pretrained": False}


def images() -> TensorDataset:
    return TensorDataset(*digits(90, 32, classes=3))


def data(**options: Any) -> CalibrationDataModule:
    return CalibrationDataModule(images(), calibration_samples=16, **options)


def search(sources: list[Any], **options: Any) -> FragmentSearch:
    return FragmentSearch(sources, strategy=Beam(width=1, max_fragments=2), exits=False, **options)


def trainer(folder: Path, callback: FragmentSearch, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"max_epochs": 0, "accelerator": "cpu", "enable_progress_bar": False, **quiet, **options}
    return Trainer(**settings, callbacks=[callback], default_root_dir=folder)


def test_a_search_begins_with_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = search([RANDOM])
    trainer(tmp_path, callback, enable_progress_bar=True, fast_dev_run=True).fit(StitchedClassifier(3), data())
    printed = capsys.readouterr().out
    assert "1 of 1 sources fit, for images of 3x32x32" in printed
    assert printed.index("sources fit") < printed.index("calibrating")


def test_a_rejected_source_stops_the_search_before_any_weights_are_fetched(
    hub: HubDouble, folder: Path, tmp_path: Path
) -> None:
    hub.publish("org/mine", folder)
    callback = search(["hf-hub:org/mine", "hf-hub:org/none", {**RANDOM, "arguments": {"in_chans": 1}}])
    with pytest.raises(SourceError, match=r"(?s)^2 of 3 sources cannot be used. No weights were downloaded.\n") as told:
        trainer(tmp_path, callback).fit(StitchedClassifier(3), data())
    lines = [line.split() for line in str(told.value).splitlines()]
    fits = {words[0]: words[1] for words in reversed(lines) if len(words) > 1}  # the table stands before the reasons
    assert [fits[name] for name in ("mine", "hf-hub:org/none", "test_resnet")] == ["yes", "no", "no"]
    assert "no repository 'org/none'" in str(told.value)
    assert hub.downloads("model.safetensors") == 0


def test_a_search_may_go_on_without_what_is_rejected(hub: HubDouble, folder: Path, tmp_path: Path) -> None:
    hub.publish("org/mine", folder)
    model, callback = StitchedClassifier(3), search(["hf-hub:org/mine", "hf-hub:org/none"], skip_rejected=True)
    trainer(tmp_path, callback).fit(model, data())
    assert callback.pool is not None
    assert [part.name for part in callback.pool.parts] == ["mine"]
    assert model.recipe is not None
    assert [source.revision for source in model.recipe.sources] == [hub.commit("org/mine")]


def test_a_comparison_begins_with_the_check_too(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"(?s)^1 of 2 sources cannot be used.*no model 'test_resnt'"):
        compare_methods(
            search([RANDOM, "test_resnt"]), data(), finetuning=FineTuning(epochs=1), directory=tmp_path, plot=False
        )


def test_a_module_with_a_recipe_needs_no_sources(tmp_path: Path) -> None:
    model, first = StitchedClassifier(3), search([RANDOM])
    trainer(tmp_path, first).fit(model, data())
    trainer(tmp_path, search(["test_resnt"])).fit(model, data())
    trainer(tmp_path, search(["test_resnt"])).test(model, data(), verbose=False)


# Once for a fit


class Wrapped(LightningDataModule):
    """A data module whose wrapper looks sources up before it downloads images."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(), batch_size=8)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_fit_finds_and_traces_each_source_once(
    hub: HubDouble, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool, cached: bool
) -> None:
    for repo in ("org/mine", "org/twin"):
        hub.publish(repo, folder)
        if cached:
            load_source(f"hf-hub:{repo}")
    hub.requests.clear()
    load_source("hf-hub:org/twin")
    expected = [request.replace("org/twin", "org/mine") for request in hub.requests]
    hub.requests.clear()

    traced: list[str] = []

    def count(network: torch.nn.Module, *args: Any) -> Any:
        traced.append(type(network).__name__)
        return trace_somehow(network, *args)

    monkeypatch.setattr(graph, "trace_somehow", count)
    callback = search(["hf-hub:org/mine", {"spec": "test_vit", "pretrained": False}])
    given = CalibrationDataModule(datamodule=Wrapped(), calibration_samples=16) if wrapped else data()
    trainer(tmp_path, callback).fit(StitchedClassifier(3), given)
    # The first bytes of the weights, which tell their shapes, are all that the check itself asks for.
    asked = [request for request in hub.requests if request.startswith("HEAD")]
    assert asked == [request for request in expected if request.startswith("HEAD")]
    assert len(asked) == (2 if cached else 5)
    assert sorted(traced) == ["ResNet", "VisionTransformer"]


@pytest.mark.parametrize("spec", ["hf-hub:org/mine", "test_resnet"])
def test_what_was_checked_is_what_is_loaded_though_the_repository_moves_on(
    hub: HubDouble, folder: Path, tmp_path: Path, spec: str
) -> None:
    repo = "org/mine" if spec != "test_resnet" else "timm/test_resnet.r160_in1k"
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "first"), safe_serialization=True)
    timm.models.save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "second"), safe_serialization=True)
    hub.publish(repo, tmp_path / "first")
    checked, commit = preflight([spec]), hub.commit(repo)
    hub.publish(repo, tmp_path / "second")
    (source,) = load_sources(checked.blueprints)
    assert source.ref.revision == commit != hub.commit(repo)
    assert_same_weights(source.module, load_file(tmp_path / "first" / "model.safetensors"))
    assert load_source(spec).ref.revision == hub.commit(repo)


# What is left when some are rejected


ALEXNET = {"spec": "torchvision:alexnet", "pretrained": False}  # takes no images of 32 pixels


def test_sizes_are_checked_where_another_source_is_not_found(tmp_path: Path) -> None:
    callback = search(["resnt", ALEXNET, RANDOM], skip_rejected=True)
    trainer(tmp_path, callback).fit(StitchedClassifier(3), data())
    assert callback.pool is not None
    assert [part.name for part in callback.pool.parts] == ["test_resnet"]


def test_where_sources_are_missing_images_are_read_only_if_others_shall_do() -> None:
    def image_shape() -> None:
        raise AssertionError("the images were asked for")

    assert not preflight(["resnt", "alexnt"], image_shape=image_shape, regardless=True).fits
    assert not preflight(["resnt", RANDOM], image_shape=image_shape).fits


def test_images_that_cannot_be_used_are_told_beside_sources_that_cannot(tmp_path: Path) -> None:
    missing = CalibrationDataModule(image_folder=str(tmp_path / "nowhere"))
    with pytest.raises(SourceError, match=r"(?s)no model 'resnt'.*nowhere does not exist"):
        trainer(tmp_path, search(["resnt", RANDOM], skip_rejected=True)).fit(StitchedClassifier(3), missing)
    with pytest.raises(CalibrationError, match="nowhere does not exist"):
        trainer(tmp_path, search([RANDOM])).fit(StitchedClassifier(3), missing)


def test_names_of_sources_are_looked_up_before_images_are_downloaded(tmp_path: Path) -> None:
    class Downloading(LightningDataModule):
        def prepare_data(self) -> None:
            raise AssertionError("images were downloaded")

    wrapper = CalibrationDataModule(datamodule=Downloading())
    with pytest.raises(SourceError, match=r"(?s)1 of 2 sources cannot be had; nothing was loaded.*no model 'resnt'"):
        trainer(tmp_path, search(["resnt", RANDOM])).fit(StitchedClassifier(3), wrapper)


@pytest.mark.parametrize(
    ("sources", "granularity", "kept"),
    [
        (["resnt", RANDOM], {"resnt": "stages", "test_resnet": "stages"}, ["test_resnet"]),
        ([ALEXNET, RANDOM], {"alexnet": "all", "test_resnet": "stages"}, ["test_resnet"]),
        (
            [{**RANDOM, "arguments": {"in_chans": 1}}, RANDOM],
            {"test_resnet": "all", "test_resnet#2": "stages"},
            ["test_resnet#2"],
        ),
    ],
)
def test_names_of_sources_stay_what_the_table_says(
    sources: list[Any], granularity: dict[str, Any], kept: list[str], tmp_path: Path
) -> None:
    callback = search(sources, skip_rejected=True, granularity=granularity)
    trainer(tmp_path, callback).fit(StitchedClassifier(3), data())
    assert callback.pool is not None
    (row,) = preflight([RANDOM], image_shape=(3, 32, 32), settings=CalibrationSettings(granularity="stages")).rows
    assert [part.name for part in callback.pool.parts] == kept
    assert row.formats is not None
    assert len(callback.pool.parts[0].cuts) == sum(row.formats.values())


def test_a_stranger_in_the_granularity_is_an_error_all_the_same(tmp_path: Path) -> None:
    callback = search(["resnt", RANDOM], skip_rejected=True, granularity={"other": "stages"})
    with pytest.raises(SourceError, match=r"granularity= names \['other'\]"):
        trainer(tmp_path, callback).fit(StitchedClassifier(3), data())


def test_two_searches_for_the_same_place_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, search([RANDOM]))
    run.callbacks.append(search([ALEXNET]))  # type: ignore[attr-defined]
    with pytest.raises(StitchError, match=r"2 callbacks .* \(FragmentSearch, FragmentSearch\) .*the whole module"):
        run.fit(StitchedClassifier(3), data())


# Once for each node

SCRIPT = """
import sys
from pathlib import Path
folder, tests = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, tests)
from doubles.fragment_searches import trainer
from doubles.own_modules import Classifier
from doubles.tensors import digits
from pytorch_lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset
from lightning_stitch import Beam, CalibrationDataModule, FragmentSearch

class Waiting(LightningDataModule):
    "A data module that waits for the other ranks when it is set up."
    def setup(self, stage):
        self.trainer.strategy.barrier("setup")

    def train_dataloader(self):
        return DataLoader(TensorDataset(*digits(90, 32, classes=3)), batch_size=8)

class Watched(FragmentSearch):
    def setup(self, trainer, pl_module, stage):
        (folder / f"rank{trainer.global_rank}").write_text(str(self._fetched is not None))
        super().setup(trainer, pl_module, stage)

if __name__ == "__main__":
    beam = Beam(width=1, max_fragments=2)
    callback = Watched(["hf-hub:org/mine"], attribute="backbone", strategy=beam, exits=False)
    run = trainer(folder, callback, strategy="ddp", devices=2)
    run.fit(Classifier(), CalibrationDataModule(datamodule=Waiting(), calibration_samples=16))
"""


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_ranks_reject_sizes_as_one_process_does(skip: bool, tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(
        SCRIPT.replace(
            '["hf-hub:org/mine"], ', f"['resnt', {ALEXNET}, {RANDOM}][{int(not skip)}:], skip_rejected={skip}, "
        )
        + "    print(f'[{run.global_rank}: {[part.name for part in callback.pool.parts]}]')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if skip:
        assert done.returncode == 0, done.stderr[-3000:]
        assert [f"[{rank}: ['test_resnet']]" in done.stdout for rank in (0, 1)] == [True, True]
    else:
        assert done.returncode != 0
        assert "1 of 2 sources cannot be used." in done.stderr
        assert "alexnet is rejected: " in done.stderr


@pytest.mark.slow
def test_ranks_of_a_node_download_once_and_before_any_collective_of_theirs(
    hub: HubDouble, folder: Path, tmp_path: Path
) -> None:
    hub.publish("org/mine", folder)
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(Path(__file__).parents[1])],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.downloads("model.safetensors") == 1
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["True", "False"]


# The command


def config_file(folder: Path, sources: list[Any], **options: Any) -> Path:
    images = f"{__name__}.Digits"
    config = {
        "seed_everything": 0,
        "model": {"class_path": "lightning_stitch.StitchedClassifier", "init_args": {"num_classes": 3}},
        "data": {"class_path": images},
        "trainer": {
            "accelerator": "cpu",
            "logger": {
                "class_path": "pytorch_lightning.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder / "logs")},
            },
            "callbacks": [
                {"class_path": "lightning_stitch.FragmentSearch", "init_args": {"sources": sources, **options}}
            ],
        },
        "ckpt_path": None,  # a configuration that `fit` saved has it
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Digits(CalibrationDataModule):
    def __init__(self) -> None:
        super().__init__(images(), calibration_samples=16)


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns where it is given arguments and the process has some, too.
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])


def test_check_checks_the_sources_of_a_configuration(
    hub: HubDouble, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.publish("org/mine", folder)
    config = str(config_file(tmp_path, ["hf-hub:org/mine", RANDOM]))
    main(["check", "--config", config])
    printed = capsys.readouterr().out
    assert "2 of 2 sources fit, for images of 3x32x32" in printed
    assert "MB to download to" in printed

    main(["check", f"--config={config}", "--json=true", "--trainer.callbacks.granularity=stages"])
    told = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in told["rows"]] == ["mine", "test_resnet"]
    assert told["rows"][0]["download"] == len(hub.files("org/mine")["model.safetensors"])
    blocks, stages = (
        preflight([RANDOM], image_shape=(3, 32, 32), settings=CalibrationSettings(granularity=granularity))
        for granularity in ("blocks", "stages")
    )
    assert told["rows"][1]["formats"] == stages.rows[0].formats != blocks.rows[0].formats
    assert hub.downloads("model.safetensors") == 0
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("json_option", [[], ["--json", "true"]])
def test_check_fails_where_the_search_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], json_option: list[str]
) -> None:
    config = str(config_file(tmp_path, [RANDOM, "test_resnt"]))
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--config", config, *json_option])
    printed = capsys.readouterr()
    assert stopped.value.code == 1
    assert "knows no model 'test_resnt'" in printed.out
    assert printed.err.endswith("error: 1 of 2 sources cannot be used.\n")
    main(["check", "--config", config, "--trainer.callbacks.skip_rejected=true", *json_option])
    assert "knows no model 'test_resnt'" in capsys.readouterr().out


class Missing(CalibrationDataModule):
    def __init__(self) -> None:
        super().__init__(image_folder="nowhere")


class Foreign(LightningDataModule):
    """What the search would refuse, because it is no CalibrationDataModule."""


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": f"{__name__}.Missing"}, "nowhere does not exist"),
        ({"data": f"{__name__}.Foreign"}, "needs a CalibrationDataModule, .* found Foreign"),
        ({"model.num_classes": "5"}, "The data have 3 classes, StitchedClassifier has num_classes=5"),
        ({"trainer.callbacks.ranking": "foo"}, "Unknown ranking 'foo'"),
    ],
)
def test_check_tells_of_sources_and_of_what_else_the_search_would_refuse(
    options: dict[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(config_file(tmp_path, ["resnt", RANDOM], skip_rejected=True))
    with pytest.raises(SystemExit):
        main(["check", "--config", config, *(f"--{key}={value}" for key, value in options.items())])
    printed = capsys.readouterr()
    assert "knows no model 'resnt'" in printed.out
    assert re.search(words, printed.out)
    assert re.search(f"^error: .*{words}", printed.err)
