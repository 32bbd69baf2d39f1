from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.methods import QUIET, bright_halves, half_blind, search_of, three_digits, two_sources
from doubles.progress import Recorder
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch import Budget, CalibrationDataModule, FineTuning, FragmentSearch, compare_methods, network_cost
from lightning_stitch._lightning import pl
from lightning_stitch.baselines import plots
from lightning_stitch.baselines.contenders import COMPOSED, METHODS, ON_ALL_LABELS
from lightning_stitch.errors import BudgetError, CalibrationError, SourceError, StitchError

TINY = FineTuning(epochs=2, learning_rates=(1e-4,))
FOUND = [method for method in METHODS if method != "smaller image"]  # no limit on MACs asks for smaller ones
MEASURED = ("seconds", "cpu_seconds", "latency_ms")


def compared(folder: Path, **options: Any) -> list[dict[str, Any]]:
    search, data = options.pop("search", None) or search_of(), options.pop("data", None) or three_digits()
    options = {"finetuning": TINY, "directory": folder, "plot": False, "trainer_options": QUIET, **options}
    return compare_methods(search, data, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, Any]]:
    return compared(folder, plot=True)


def test_every_method_has_a_complete_row_and_counts_its_labels(rows: list[dict[str, Any]]) -> None:
    assert [row["method"] for row in rows] == FOUND
    assert {(row["method"] in ON_ALL_LABELS, row["labels"]) for row in rows} == {(False, 40 + 20), (True, 40 + 20 + 12)}
    for row in rows:
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        assert all(row[name] > 0 for name in (*MEASURED, "flops", "params", "macs"))
        assert (row["learning_rate"] is not None) is ("fine-tun" in row["method"])
        assert (row["penalty"] is not None) is (row["method"] == "linear probe")
        assert (row["verdict"] is not None) is (row["method"] in COMPOSED)
        if row["method"] != "side by side":  # which may be one source's, at several depths
            assert (" | " in row["network"]) is row["method"].startswith("StitchNet")


def test_a_row_has_the_costs_of_the_whole_classifier(rows: list[dict[str, Any]]) -> None:
    # Blocks of 3 -> 6 -> 8 -> 10 or 3 -> 4 -> 12 -> 12 channels on 16x16, then 8x8 and 8x8 places.
    for row in rows[:5]:
        one, two, three = {"a": (6, 8, 10), "b": (4, 12, 12)}[row["network"]]
        pairs = ((3, one), (one, two), (two, three))
        assert row["params"] == sum(9 * i * o + o for i, o in pairs) + 3 * three + 3
        assert row["macs"] == sum(9 * i * o * n for (i, o), n in zip(pairs, (256, 64, 64), strict=True)) + 3 * three


def test_training_takes_more_than_solving_and_what_builds_on_another_takes_more(rows: list[dict[str, Any]]) -> None:
    flops = {row["method"]: row["flops"] for row in rows}
    assert flops["closed-form head"] < flops["head-only fine-tuning"] < flops["full fine-tuning"]
    assert flops["StitchNet"] < flops["StitchNet, fine-tuned"]
    assert flops["all depths"] == pytest.approx(flops["early exit"], rel=0.1)  # of one search
    assert flops["closed-form head, fine-tuned"] == flops["full fine-tuning"]


def test_csv_and_json_hold_the_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "methods.csv").open() as file:
        found = list(csv.DictReader(file))
    assert found == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    record = json.loads((folder / "methods.json").read_text())
    assert record["rows"] == rows
    assert record["settings"]["sources"] == ["a", "b"]
    assert record["settings"]["not_found"] == ["smaller image"]
    rivals = [method for method in FOUND if method not in COMPOSED]
    for method in COMPOSED:
        (row,) = (row for row in rows if row["method"] == method)
        # What is made of one source alone is called that.
        names = (method, f"{method} (of one source: {row['network']})")
        account = {verdict["rival"]: verdict for verdict in record["verdicts"] if verdict["contender"] in names}
        assert sorted(account) == sorted(rivals)
        for rival in rivals:
            (other,) = (row for row in rows if row["method"] == rival)
            verdict = account[rival]
            assert verdict["difference"] == pytest.approx(row["accuracy"] - other["accuracy"])
            assert (verdict["contender_cost"], verdict["rival_cost"]) == (row["flops"], other["flops"])
            assert verdict["cost_unit"] == "training FLOPs"
        assert row["verdict"].startswith(f"{method} (")
        assert "orth it" in row["verdict"]
    assert record["settings"]["finetuning"]["epochs"] == 2
    assert record["settings"]["images"] == {"calibration": 12, "train": 40, "selection": 20, "test": 60}


def test_rows_over_the_budget_say_so(tmp_path: Path) -> None:
    macs = {source.name: network_cost(source.module, three_digits().image_shape).macs for source in two_sources()}
    search = search_of(budget=Budget(max_macs=min(macs.values())))
    found = compared(tmp_path, search=search, methods=["closed-form head", "all depths", "early exit", "StitchNet"])
    marked = {row["method"]: row["over_budget"] for row in found}
    assert not marked["early exit"]
    assert not marked["StitchNet"]
    for row in found[:2]:
        assert row["over_budget"] is (macs[row["network"].split(":")[0]] > min(macs.values()))


def test_the_same_call_gives_the_same_rows_whatever_the_order_of_methods(
    tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    search, data, state = search_of(), three_digits(), torch.get_rng_state()
    again = compared(tmp_path, search=search, data=data, methods=METHODS[::-1])
    assert torch.equal(torch.get_rng_state(), state)
    for row, other in zip(rows, again, strict=True):
        same = [name for name in row if name not in MEASURED]
        assert {name: row[name] for name in same} == {name: other[name] for name in same}


def test_a_method_on_its_own_takes_what_it_takes_among_others(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for method in ("full fine-tuning", "StitchNet, fine-tuned"):
        (alone,) = compared(tmp_path, methods=[method])
        (among,) = [row for row in rows if row["method"] == method]
        assert (alone["flops"], alone["accuracy"]) == (among["flops"], among["accuracy"])


def test_test_images_choose_nothing(tmp_path: Path) -> None:
    train = bright_halves(120, left=0.2, right=0.5, seed=0)
    choosing = bright_halves(40, left=0.5, right=0.0, seed=1)
    tests = [bright_halves(60, left=left, right=0.5 - left, seed=2) for left in (0.0, 0.5)]
    search = FragmentSearch([half_blind("right"), half_blind("left")], max_candidates=4, exits=False)
    data = [CalibrationDataModule(train, choosing, test, calibration_samples=12) for test in tests]
    recipe = FineTuning(epochs=1, learning_rates=(1e-4,))
    found = [compared(tmp_path, search=search, data=one, finetuning=recipe) for one in data]
    for unlike, like in zip(*found, strict=True):
        for name in ("method", "network", "selection_loss", "penalty", "flops"):
            assert unlike[name] == like[name]
    closed_form = METHODS.index("closed-form head")
    assert found[0][closed_form]["accuracy"] < found[1][closed_form]["accuracy"] - 0.2
    assert {row["network"] for row in found[0][:5]} == {"left"}


class Stopping(Recorder):
    """Ctrl-C when a stage begins."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def start(self, stage: str, total: int | None) -> None:
        super().start(stage, total)
        if stage == self.stage:
            raise KeyboardInterrupt


def test_a_run_that_is_stopped_keeps_the_rows_that_it_has(tmp_path: Path) -> None:
    progress = Stopping("full fine-tuning")
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path, progress=progress)
    stages = [stage for stage, _, _ in progress.stages]
    assert stages == ["search", "linear probe", "closed-form head", "head-only fine-tuning", "full fine-tuning"]
    with (tmp_path / "methods.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == stages[1:4]
    assert len(json.loads((tmp_path / "methods.json").read_text())["rows"]) == 3


def test_learning_rates_reach_training(tmp_path: Path) -> None:
    method = ["full fine-tuning"]
    alone = {}
    for rates in ((1e-6,), (1e-2,), (1e-6, 1e-2)):
        (row,) = compared(tmp_path, methods=method, finetuning=FineTuning(epochs=2, learning_rates=rates))
        alone[rates] = (row["selection_loss"], row["learning_rate"])
    assert alone[(1e-6, 1e-2)] == min(alone[(1e-6,)], alone[(1e-2,)])
    assert alone[(1e-6,)] != alone[(1e-2,)]


class Plain(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["linear prob"]}, StitchError, r"methods must be some of .*; found \['linear prob'\]"),
        ({"methods": []}, StitchError, r"methods must be some of .*; found \[\]"),
        ({"methods": "StitchNet"}, StitchError, "methods must be some of"),
        ({"data": Plain()}, StitchError, "needs train, selection and test images in a CalibrationDataModule; found P"),
        ({"data": three_digits(task="none")}, StitchError, "tells classes apart, one label for each image"),
        ({"margin": -1}, StitchError, "margin is a difference in accuracy, from 0 to 1"),
        ({"search": "resnet18"}, StitchError, "takes a FragmentSearch, whose sources all use; found str"),
        ({"search": FragmentSearch([])}, SourceError, "Expected a list of sources"),
        ({"search": FragmentSearch(["test_resnte"])}, SourceError, "1 of 1 sources cannot be used"),
        ({"data": three_digits(train_samples=2)}, CalibrationError, "The train set has no image of the classes"),
        ({"search": search_of(budget=Budget(max_macs=1))}, BudgetError, "the cheapest composition has"),
        ({"trainer_options": {"accelerator": "cpu", "devices": 2}}, StitchError, "on one device.*found 2. Set devices"),
    ],
)
def test_a_bad_argument_is_an_error_before_a_source_runs(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a source ran")

    with monkeypatch.context() as patched:
        patched.setattr("lightning_stitch.stitching.calibration.calibrate", refuse)
        patched.setattr("lightning_stitch.baselines.contenders.chunks", refuse)
        with pytest.raises(error, match=message):
            compared(tmp_path, **options)
    assert not (tmp_path / "methods.csv").exists()


def test_a_plot_that_cannot_be_drawn_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(StitchError, match="The plot needs matplotlib"):
        compared(tmp_path, plot=True)
    assert not list(tmp_path.iterdir())
