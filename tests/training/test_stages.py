"""Networks that stop when they are sure, inside Lightning: fitted, tested, trained on, saved, set cheap or careful."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from doubles.fragment_searches import digits, search, trainer
from torch import Tensor, nn

from lightning_stitch import Budget, BudgetError, CalibrationError, FragmentSearch, StitchedClassifier, StitchError
from lightning_stitch.heads import StagedHead
from lightning_stitch.networks.timm_entry import TimmNetwork

MEAN = 60e3


def fitted(folder: Path, **options: object) -> tuple[StitchedClassifier, FragmentSearch]:
    """A classifier with a network of stages, whether or not the search would have chosen it."""
    model, callback = StitchedClassifier(num_classes=3, **options), search(budget=Budget(mean_macs=1e9))
    data, run = digits(), trainer(folder, callback)
    run.fit(model, data)
    assert callback.result is not None
    callback.install_within(run, Budget(), kind="staged")
    assert isinstance(model.head, StagedHead)
    return model.eval(), callback


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    fitted(folder)[0].save_pretrained(folder / "saved")
    return folder / "saved"


@pytest.fixture
def model(saved: Path) -> StitchedClassifier:
    return StitchedClassifier.from_pretrained(saved)


def images() -> Tensor:
    data = digits()
    data.setup("test")
    return torch.cat([batch[0] for batch in data.test_dataloader()])


def whole(model: StitchedClassifier, x: Tensor) -> Tensor:
    """What running every stage and choosing gives."""
    assert model.network is not None
    assert model.head is not None
    with torch.no_grad():
        return model.head(model.network(x))


def runs_of_last_fragment(model: StitchedClassifier) -> list[int]:
    assert model.network is not None
    seen: list[int] = []
    model.network.fragments[-1].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    return seen


def test_testing_and_predicting_let_sure_images_stop(tmp_path: Path, model: StitchedClassifier) -> None:
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(model(x), whole(model, x), rtol=1e-4, atol=1e-5)
    seen = runs_of_last_fragment(model)
    run, data = trainer(tmp_path), digits()
    (metrics,) = run.test(model, data, verbose=False)
    assert 0 <= sum(seen) < len(x)
    assert metrics["test_accuracy"] > 0.5
    predicted = torch.cat(run.predict(model, data.test_dataloader()))
    torch.testing.assert_close(predicted, whole(model, x).softmax(1), rtol=1e-2, atol=1e-2)


def test_one_network_is_set_from_cheap_to_careful_without_a_search(model: StitchedClassifier) -> None:
    stages = model.recipe.stages
    assert stages is not None
    x, seen = images(), runs_of_last_fragment(model)
    counts = []
    for point in (stages.points[0], stages.points[-1]):
        seen.clear()
        assert model.at(mean_macs=point.mean_macs) is model
        with torch.no_grad():
            model(x)
        counts.append(sum(seen))
        assert model.recipe == model.network.recipe
        assert model.recipe.stages.chosen.mean_macs == model.recipe.scores["mean_macs"] == point.mean_macs
        assert model.recipe.scores["neg_loo_loss"] == point.scores["neg_loo_loss"]
        assert "loo_soft_r2" not in model.recipe.scores
        assert "loo_accuracy" not in model.recipe.scores
        assert f"{point.mean_macs / 1e6:.1f} M MACs on average" in model.network.describe()
    assert counts[0] < counts[1]
    with pytest.raises(BudgetError, match=r"takes at least .* M MACs on average; 1e-06 M were asked for"):
        model.at(mean_macs=1)


def test_a_saved_network_keeps_its_thresholds_and_every_setting(tmp_path: Path, model: StitchedClassifier) -> None:
    x, stages = images(), model.recipe.stages
    assert stages is not None
    model.at(mean_macs=stages.points[-1].mean_macs)
    model.save_pretrained(tmp_path / "saved")
    loaded = StitchedClassifier.from_pretrained(tmp_path / "saved")
    assert loaded.recipe == model.recipe
    assert torch.equal(loaded.head.settings, model.head.settings)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
        least = stages.points[0].mean_macs
        torch.testing.assert_close(loaded.at(mean_macs=least)(x), model.at(mean_macs=least)(x))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "stops when sure" in card
    (least,) = re.findall(r"network\.at\(mean_macs=(\d+)\)", card)
    assert loaded.at(mean_macs=int(least)).recipe.stages.point == 0  # as the card says it


def test_timm_gets_the_answers_of_running_every_stage(tmp_path: Path, model: StitchedClassifier) -> None:
    import timm

    import lightning_stitch.timm  # noqa: F401

    model.save_pretrained(tmp_path / "saved")
    network = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert isinstance(network, TimmNetwork)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(network(x), whole(model, x))


def test_a_checkpoint_brings_stages_and_thresholds_back(tmp_path: Path, model: StitchedClassifier) -> None:
    run = trainer(tmp_path)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "staged.ckpt")
    loaded = StitchedClassifier.load_from_checkpoint(tmp_path / "staged.ckpt", map_location="cpu").eval()
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x))
    assert torch.equal(loaded.head.settings, model.head.settings)


def test_training_moves_every_stage_s_head_and_keeps_thresholds_until_they_are_fitted(
    tmp_path: Path, model: StitchedClassifier
) -> None:
    head = model.head
    assert isinstance(head, StagedHead)
    before, settings = [part.weight.detach().clone() for part in head.heads], head.settings.clone()
    data = digits()
    trainer(tmp_path, max_epochs=2).fit(model, data)
    assert all(not torch.equal(part.weight, old) for part, old in zip(head.heads, before, strict=True))
    assert torch.equal(head.settings, settings)
    model.fit_thresholds(data.test_dataloader())
    assert not torch.equal(head.settings, settings)
    stages = model.recipe.stages
    assert stages is not None
    x = images()
    with torch.no_grad():
        _, stops = model.network.in_stages(x, head)
    assert abs(float((stops > 0).float().mean()) - stages.chosen.goes_on[0]) < 0.05


def test_the_loss_is_the_sum_over_stages(model: StitchedClassifier) -> None:
    x, labels = images()[:12], torch.arange(12) % 3
    model.train()
    outputs = model.head.outputs(model.network(x))
    expected = sum(nn.functional.cross_entropy(output, labels) for output in outputs)
    model.log = lambda *args, **options: None
    torch.testing.assert_close(model.training_step((x, labels), 1), expected)


def test_a_network_without_stages_says_so(tmp_path: Path) -> None:
    model, data = StitchedClassifier(num_classes=3), digits()
    trainer(tmp_path, search()).fit(model, data)
    for call in (lambda: model.at(mean_macs=1e9), lambda: model.fit_thresholds([])):
        with pytest.raises(StitchError, match="This network has no stages: search with Budget"):
            call()


def test_thresholds_need_images(model: StitchedClassifier) -> None:
    with pytest.raises(CalibrationError, match="no images to set thresholds by"):
        model.fit_thresholds([])


@pytest.mark.parametrize("head", ["knn", "none"])
def test_stages_of_other_heads_than_ridge_are_refused_before_a_search(tmp_path: Path, head: str) -> None:
    model = StitchedClassifier(num_classes=3, head=head)
    with pytest.raises(StitchError, match="it takes a StitchedClassifier with head='ridge'"):
        trainer(tmp_path, search(budget=Budget(mean_macs=MEAN))).fit(model, digits())


def test_a_comparison_shows_what_stops_when_sure_beside_static_networks_of_as_many_macs(tmp_path: Path) -> None:
    model, callback = StitchedClassifier(num_classes=3), search(budget=Budget(mean_macs=3e6), compare=True)
    trainer(tmp_path, callback).fit(model, digits())
    rows = callback.comparison.rows
    (staged,) = [row for row in rows if row["kind"] == "staged"]
    assert staged["mean_macs"] < staged["macs"]
    assert all(row["mean_macs"] is None for row in rows if row["kind"] != "staged")
