from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.fragment_searches import SOURCES, digits, same_but_for_shares, search, trainer
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch import (
    Budget,
    BudgetError,
    CalibrationDataModule,
    DepthFirst,
    FragmentSearch,
    SourceError,
    StitchedClassifier,
    StitchError,
    fit_ridge_head,
    network_cost,
)
from lightning_stitch._lightning import pl


def test_no_epoch_at_all_gives_a_usable_classifier_and_with_bars_off_says_the_summary_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, callback = StitchedClassifier(num_classes=3), digits(), search()
    run = trainer(tmp_path, callback)
    run.fit(model, data)
    assert run.global_step == 0
    assert callback.result is not None
    assert same_but_for_shares(model.recipe, callback.result.best.candidate.recipe)
    said = capsys.readouterr().out
    assert said.startswith(callback.result.summary())
    assert "calibrating" not in said
    (found,) = run.test(model, data, verbose=False)
    assert found["test_accuracy"] > 0.6  # three classes, alike in number


def test_a_bar_shows_each_stage_and_the_summary_says_whether_it_was_worth_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tmp_path, search(), enable_progress_bar=True).fit(StitchedClassifier(num_classes=3), digits())
    printed = capsys.readouterr().out
    for word in ("calibrating", "composing", "ranking", "on the selection images"):
        assert word in printed


def test_what_a_search_made_is_the_best_checkpoint_where_nothing_trained(tmp_path: Path) -> None:
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    run = pl.Trainer(max_epochs=0, callbacks=[search()], default_root_dir=tmp_path, **options)
    data = digits()
    model = StitchedClassifier(num_classes=3)
    run.fit(model, data)
    assert run.checkpoint_callback is not None
    assert Path(run.checkpoint_callback.best_model_path) == tmp_path / "stitched.ckpt"
    (expected,) = run.test(model, data)
    (found,) = run.test(datamodule=data, ckpt_path="best", weights_only=True)
    assert found == expected
    again = pl.Trainer(max_epochs=0, callbacks=run.callbacks[:1], default_root_dir=tmp_path / "other", **options)
    before = (tmp_path / "stitched.ckpt").stat().st_mtime_ns
    again.fit(model, data)  # which has a network, so that nothing is searched or left
    assert (tmp_path / "stitched.ckpt").stat().st_mtime_ns == before
    assert run.callbacks[0].checkpoint is None


@pytest.mark.figures
def test_without_a_logger_each_run_writes_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        callback = search()
        trainer(tmp_path, callback).fit(StitchedClassifier(num_classes=3), digits())
        assert {path.name for path in tmp_path.iterdir()} == {"stitch_logs"}
        folder = tmp_path / "stitch_logs" / f"version_{number}"
        assert {path.name for path in folder.iterdir()} == {"candidates.csv", "report.html", "report.json", "figures"}


def test_the_optimizer_of_a_training_run_holds_the_found_network(tmp_path: Path) -> None:
    model = StitchedClassifier(num_classes=3)
    run = trainer(tmp_path, search(), max_epochs=1)
    run.fit(model, digits())
    assert model.network is not None
    trained = {id(parameter) for group in run.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in model.network.parameters()} < trained
    assert run.global_step > 0


def test_the_search_runs_only_where_the_module_has_no_recipe_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = StitchedClassifier(num_classes=3), digits()
    run = trainer(tmp_path, search())
    run.fit(model, data)
    network = model.network
    run.save_checkpoint(tmp_path / "model.ckpt")
    run.fit(model, data)
    assert model.network is network
    assert "FragmentSearch does nothing" not in caplog.text  # of its own network it goes on with, too

    loaded = StitchedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    later = search()
    trainer(tmp_path, later).fit(loaded, data)
    assert later.result is None
    assert loaded.recipe == model.recipe
    assert "FragmentSearch does nothing: the module has a network already" in caplog.text


@pytest.mark.slow
def test_a_checkpoint_replaces_what_a_search_found_while_nobody_had_named_the_checkpoint(tmp_path: Path) -> None:
    run, model, data, callback = searched(tmp_path)
    assert callback.result is not None
    callback.install_within(run, Budget(max_macs=min(r.candidate.cost.macs for r in callback.result.ranked)))
    run.fit(model, data)  # for an optimizer of what was installed
    run.save_checkpoint(tmp_path / "cheapest.ckpt")
    assert model.recipe != callback.result.best.candidate.recipe

    fresh, in_vain, spared = StitchedClassifier(num_classes=3), search(), search()
    trainer(tmp_path, in_vain, max_epochs=1).fit(fresh, data, ckpt_path=tmp_path / "cheapest.ckpt")
    assert in_vain.result is not None
    assert fresh.recipe == model.recipe
    fresh = StitchedClassifier(num_classes=3)
    spared.ckpt_path = tmp_path / "cheapest.ckpt"
    trainer(tmp_path, spared).fit(fresh, data, ckpt_path=tmp_path / "cheapest.ckpt")
    assert spared.result is None
    assert fresh.recipe == model.recipe
    torch.testing.assert_close(dict(fresh.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.slow
def test_same_seed_same_network_and_the_global_random_state_is_left_alone(tmp_path: Path) -> None:
    found = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        model = StitchedClassifier(num_classes=3)
        trainer(tmp_path, search()).fit(model, digits())
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model)
    assert found[0].recipe == found[1].recipe
    torch.testing.assert_close(found[0].state_dict(), found[1].state_dict(), rtol=0, atol=0)


def test_comparison_is_printed_and_written_in_the_log_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = search(compare=True, fractions=[0.75, 1e-9], margin=0.05)
    trainer(tmp_path, callback).fit(StitchedClassifier(num_classes=3), digits())
    assert callback.comparison is not None
    assert callback.comparison.unmet == ("<= 0% of MACs",)
    printed = " ".join(capsys.readouterr().out.split())
    assert "No StitchNet fits <= 0% of MACs." in printed
    assert {verdict.margin for verdict in callback.comparison.verdicts} == {0.05}
    with pytest.raises(StitchError, match="margin is a difference in accuracy, from 0 to 1"):
        search(compare=True, margin=5)
    assert "McNemar" in printed
    with (tmp_path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows].count("source") == 2
    assert [row["kind"] for row in rows].count("self-stitched") == 2
    assert next(row["budget"] for row in rows if row["kind"] == "stitched").startswith("no budget")
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert record["verdict"].startswith(callback.comparison.words)
    assert record["rows"] == callback.comparison.rows
    assert record["verdicts"] == [verdict.record() for verdict in callback.comparison.verdicts]
    assert callback.comparison.verdicts
    assert record["settings"]["seconds"].keys() == {"cut", "calibrate", "search", "rank"}


def test_scores_and_seconds_reach_the_logger(tmp_path: Path) -> None:
    callback = search()
    run = trainer(tmp_path, callback, logger=CSVLogger(tmp_path))
    run.fit(StitchedClassifier(num_classes=3), digits())
    assert callback.result is not None
    run.logger.save()
    with (Path(run.log_dir) / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["search/macs"]) == callback.result.best.candidate.cost.macs
    assert float(row["search/loo_accuracy"]) == pytest.approx(callback.result.best.scores["loo_accuracy"])
    assert float(row["search/search_seconds"]) > 0
    assert float(row["search/latency_ms_batch_1"]) > 0
    assert float(row["search/latency_ms_batch_32"]) > 0


@pytest.mark.parametrize("logged", [True, False])
def test_every_candidate_is_written_in_the_log_directory(tmp_path: Path, logged: bool) -> None:
    callback = search(max_candidates=4)
    run = trainer(tmp_path, callback, logger=CSVLogger(tmp_path / "logs") if logged else False)
    run.fit(StitchedClassifier(num_classes=3), digits())
    assert callback.result is not None
    with (Path(run.log_dir or "") / "candidates.csv" if logged else tmp_path / "candidates.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = callback.result.to_records()
    assert [(row["place"], row["path"]) for row in rows] == [(str(row["place"]), row["path"]) for row in expected]
    assert {row["kind"] for row in rows} >= {"source", "self-stitched", "early exit", "stitched"}


def test_early_exits_can_be_left_out(tmp_path: Path) -> None:
    callback = search(exits=False, max_candidates=2)
    trainer(tmp_path, callback).fit(StitchedClassifier(num_classes=3), digits())
    assert callback.result is not None
    assert {r.candidate.kind for r in callback.result.ranked} <= {"source", "self-stitched", "stitched", "shortened"}


def test_networks_are_healed_where_that_is_asked_for(tmp_path: Path) -> None:
    callback = search(heal=True, max_candidates=2)
    trainer(tmp_path, callback).fit(StitchedClassifier(num_classes=3), digits())
    assert callback.result is not None
    assert callback.result.seconds["heal"] > 0


def test_the_papers_method_can_be_asked_for(tmp_path: Path) -> None:
    callback = search(
        strategy=DepthFirst(span=2, threshold=0.0, edge_threshold=0.0, max_networks=3),
        estimator="biased",
        bias=False,
        ridge=0.0,
        granularity="reference",
        ranking="cka_product",
    )
    trainer(tmp_path, callback).fit(StitchedClassifier(num_classes=3), digits())
    assert callback.result is not None
    stitched = [r.candidate.recipe for r in callback.result.ranked if r.candidate.kind == "stitched"]
    assert len(stitched) == 3
    assert all(stitch is not None and not stitch.bias for recipe in stitched for stitch in recipe.stitches)


def test_cuts_can_be_named_for_each_source(tmp_path: Path) -> None:
    callback = search(granularity={"test_resnet": ["layer2"]})
    trainer(tmp_path, callback).fit(StitchedClassifier(num_classes=3), digits())
    assert callback.result is not None
    fragments = [f for r in callback.result.ranked for f in r.candidate.recipe.fragments]
    ends = {f.end for f in fragments if f.source == "test_resnet"}
    assert ends == {"layer2", "global_pool"}
    with pytest.raises(StitchError, match=r"granularity= names \['resnet'\], but the sources are"):
        trainer(tmp_path, search(granularity={"resnet": "all"})).fit(StitchedClassifier(num_classes=3), digits())


def test_fast_dev_run_searches_a_little(tmp_path: Path) -> None:
    callback = search(compare=True)
    trainer(tmp_path, callback, fast_dev_run=True).fit(StitchedClassifier(num_classes=3), digits())
    assert callback.result is not None
    assert callback.comparison is None
    assert not list(tmp_path.rglob("candidates.csv"))
    assert sum(r.candidate.kind in ("stitched", "shortened") for r in callback.result.ranked) <= 2


def test_a_source_that_cannot_be_had_fails_before_any_image_is_read(tmp_path: Path) -> None:
    class Unread(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            raise AssertionError("an image was read")

    data = CalibrationDataModule(Unread(torch.rand(90, 1, 8, 8), torch.arange(90) % 3), calibration_samples=16)
    with pytest.raises(SourceError, match=r"(?s)1 of 2 sources cannot be used. No weights.*test_resnte"):
        trainer(tmp_path, search(sources=[*SOURCES[:1], "test_resnte"])).fit(StitchedClassifier(num_classes=3), data)


def test_an_impossible_budget_names_the_cheapest_composition(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"at most 1e-06 M MACs: the cheapest composition has [0-9.]+ M \(test_"):
        trainer(tmp_path, search(budget=Budget(max_macs=1))).fit(StitchedClassifier(num_classes=3), digits())


def test_the_chosen_network_keeps_the_budget(tmp_path: Path) -> None:
    free = search()
    trainer(tmp_path, free).fit(StitchedClassifier(num_classes=3), digits())
    assert free.result is not None
    limit = 0.9 * min(r.candidate.cost.macs for r in free.result.ranked if r.candidate.kind == "source")
    model = StitchedClassifier(num_classes=3)
    trainer(tmp_path, search(budget=Budget(max_macs=limit))).fit(model, digits())
    assert model.recipe is not None
    assert model.recipe.scores["macs"] <= limit


def searched(folder: Path) -> tuple[Trainer, StitchedClassifier, CalibrationDataModule, FragmentSearch]:
    callback, model, data = search(max_candidates=6), StitchedClassifier(num_classes=3), digits()
    run = trainer(folder, callback)
    run.fit(model, data)
    return run, model, data, callback


def test_another_budget_afterwards_takes_the_best_within_it_and_fits_its_head(tmp_path: Path) -> None:
    run, model, data, callback = searched(tmp_path)
    assert callback.pool is not None
    assert callback.result is not None
    first = model.recipe
    # Above it is the best; the sources are, too.
    budget = Budget(max_macs=0.9 * callback.result.best.candidate.cost.macs)
    before = torch.get_rng_state()
    chosen = callback.install_within(run, budget)
    assert torch.equal(torch.get_rng_state(), before)
    assert chosen is next(r for r in callback.result.ranked if budget.allows(r.candidate.cost))
    assert same_but_for_shares(model.recipe, chosen.candidate.recipe)
    assert model.recipe != first
    assert model.network is not None
    assert budget.allows(network_cost(model.network, data.image_shape))

    (found,) = run.test(model, data, verbose=False)
    network, right = callback.pool.assemble(chosen.candidate), []
    with torch.no_grad():
        labelled = data.labelled_dataloader("train", "selection", "calibration")
        features, labels = zip(*((network(images), labels) for images, labels in labelled), strict=True)
        blocks = chosen.candidate.recipe.head_blocks
        head, _ = fit_ridge_head(torch.cat(features), torch.cat(labels), num_classes=3, blocks=blocks)
        for images, labels in data.test_dataloader():
            right.append(head(network(images)).argmax(1) == labels)
    assert found["test_accuracy"] == pytest.approx(torch.cat(right).double().mean().item(), abs=1.5 / 90)
    assert found["test_accuracy"] > 0.5


def test_without_a_limit_what_the_search_installed_comes_back(tmp_path: Path) -> None:
    run, model, _, callback = searched(tmp_path)
    recipe, state = model.recipe, {name: value.clone() for name, value in model.state_dict().items()}
    assert callback.result is not None
    callback.install_within(run, Budget(max_macs=min(r.candidate.cost.macs for r in callback.result.ranked)))
    assert model.recipe != recipe
    assert callback.install_within(run, Budget()) is callback.result.best
    assert model.recipe == recipe
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_an_early_exit_taken_afterwards_is_trained_and_loaded_like_any_other(tmp_path: Path) -> None:
    run, model, data, callback = searched(tmp_path)
    assert callback.result is not None
    cheapest = min((r.candidate for r in callback.result.ranked), key=lambda candidate: candidate.cost.macs)
    assert cheapest.kind == "early exit"
    callback.install_within(run, Budget(max_macs=cheapest.cost.macs))
    assert model.network is not None
    assert "    read at " in model.network.describe()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    later = trainer(tmp_path, max_epochs=1)
    later.fit(model, data)
    assert same_but_for_shares(model.recipe, cheapest.recipe)
    assert any(not torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    later.save_checkpoint(tmp_path / "model.ckpt")
    loaded = StitchedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))


def test_the_best_of_one_kind_can_be_installed_afterwards(tmp_path: Path) -> None:
    run, model, _, callback = searched(tmp_path)
    assert callback.result is not None
    assert callback.install_within(run, Budget(), kind="source") is callback.result.best_source
    assert same_but_for_shares(model.recipe, callback.result.best_source.candidate.recipe)


def test_a_budget_afterwards_that_nothing_keeps_names_the_cheapest_and_changes_nothing(tmp_path: Path) -> None:
    run, model, _, callback = searched(tmp_path)
    network = model.network
    with pytest.raises(
        BudgetError, match=r"\(at most 1e-06 M MACs\); the cheapest it found has .* \(test_.* \(ends early\)"
    ):
        callback.install_within(run, Budget(max_macs=1))
    with pytest.raises(BudgetError, match="The search found no stitched network within the budget"):
        callback.install_within(run, Budget(max_macs=1), kind="stitched")
    with pytest.raises(BudgetError, match="This search measured no latencies"):
        callback.install_within(run, Budget(max_latency_ms=5))
    assert model.network is network


def test_a_budget_afterwards_needs_a_search_before(tmp_path: Path) -> None:
    with pytest.raises(StitchError, match=r"No search has run, so there is nothing to choose from: call trainer\.fit"):
        search().install_within(trainer(tmp_path), Budget())


def test_an_unknown_cut_offers_the_nearest_and_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"Source 'test_resnet.*No cut is named 'layr2'. Nearest: 'layer"):
        trainer(tmp_path, search(granularity=["layr2"])).fit(StitchedClassifier(num_classes=3), digits())


def test_needs_a_calibration_data_module(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 32, 32), torch.arange(4) % 3), batch_size=2)
    with pytest.raises(StitchError, match=r"needs a CalibrationDataModule.*found none"):
        trainer(tmp_path, search()).fit(StitchedClassifier(num_classes=3), loader, loader)


def test_numbers_of_classes_must_agree(tmp_path: Path) -> None:
    with pytest.raises(StitchError, match="data have 3 classes, StitchedClassifier has num_classes=4"):
        trainer(tmp_path, search()).fit(StitchedClassifier(num_classes=4), digits())


def test_strategies_that_restore_after_building_optimizers_need_the_recipe_first(tmp_path: Path) -> None:
    class Sharded(SingleDeviceStrategy):
        restore_checkpoint_after_setup = True

    run = trainer(tmp_path, search(), strategy=Sharded(device=torch.device("cpu")), accelerator="auto")
    with pytest.raises(StitchError, match="Sharded builds optimizers before checkpoints are restored"):
        run.fit(StitchedClassifier(num_classes=3), digits())


class ScalesInTrainMode(nn.Sequential):
    input_size, mean, std = (3, 32, 32), (0.5,) * 3, (0.5,) * 3

    def __init__(self) -> None:
        deep = nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()))
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), deep, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if self.training else x)


@pytest.mark.parametrize(("train_mode", "max_epochs", "warned"), [(True, 1, True), (True, 0, False), (False, 1, False)])
def test_what_fragments_will_not_do_in_train_mode_is_told_where_they_are_trained_in_it(
    train_mode: bool, max_epochs: int, warned: bool, tmp_path: Path
) -> None:
    callback = search(sources=[f"python:{__name__}:ScalesInTrainMode"])
    model = StitchedClassifier(num_classes=3, train_mode=train_mode)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer(tmp_path, callback, max_epochs=max_epochs).fit(model, digits())
    told = [str(warning.message) for warning in seen if "train mode" in str(warning.message)]
    expected = "Source 'ScalesInTrainMode' does something else in train mode than in eval mode: mul where eval mode"
    assert [message.startswith(expected) for message in told] == [True] * warned


def test_classes_that_were_left_open_are_the_datas_and_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    model, data = StitchedClassifier(), digits()
    assert model.num_classes == 0
    run = trainer(tmp_path, search())
    run.fit(model, data)
    assert model.num_classes == 3
    (found,) = run.test(model, data, verbose=False)
    run.save_checkpoint(tmp_path / "model.ckpt")
    assert StitchedClassifier.load_from_checkpoint(tmp_path / "model.ckpt").num_classes == 3
    other = StitchedClassifier()
    (again,) = trainer(tmp_path).test(other, digits(), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert again == found
    assert other.num_classes == 3
    assert StitchedClassifier(class_names=["a", "b"]).num_classes == 2
    with pytest.raises(StitchError, match="num_classes must be an integer, at least 2"):
        StitchedClassifier(1)
