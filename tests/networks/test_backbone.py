from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from doubles.own_modules import Classifier
from doubles.pools import composed
from doubles.small_sources import shake
from doubles.tensors import digits
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import BackboneFinetuning, LearningRateFinder, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_stitch import (
    Beam,
    Budget,
    CalibrationDataModule,
    FragmentSearch,
    RecipeError,
    StitchedBackbone,
    StitchError,
    fit_ridge_head,
    restore_backbones,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def own_backbone() -> nn.Module:
    return shake(timm.create_model("test_resnet", num_classes=0), 7)


class Told(Classifier):
    """Builds its head when it is told of the backbone."""

    def build(self) -> None:
        self.backbone = StitchedBackbone()
        self.head = nn.Identity()

    def on_backbone_stitched(self, backbone: StitchedBackbone) -> None:
        self.head = nn.Linear(backbone.num_features, 3)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_backbones(self, checkpoint)


class Own(Classifier):
    """Brings a backbone of its own, under a dotted name."""

    def build(self) -> None:
        self.model = nn.ModuleDict({"encoder": own_backbone()})
        self.head = nn.Linear(96, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.model["encoder"](images))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        restore_backbones(self, checkpoint)


KINDS: dict[type[Classifier], str] = {Classifier: "backbone", Told: "backbone", Own: "model.encoder"}


def images(**options: Any) -> CalibrationDataModule:
    pool = TensorDataset(*digits(180, 32, classes=3))
    sizes = {"calibration_samples": 16, "train_samples": 60, "selection_samples": 40, "test_samples": 60}
    return CalibrationDataModule(pool, batch_size=20, **{**sizes, **options})


def search(attribute: str = "backbone", **options: Any) -> FragmentSearch:
    sources = [{"spec": f"test_{name}", "pretrained": False} for name in ("resnet", "efficientnet")]
    settings = {
        "strategy": Beam(width=2, max_fragments=2),
        "granularity": "stages",
        "max_candidates": 2,
        "exits": False,
    }
    return FragmentSearch(sources, attribute=attribute, **{**settings, **options})


def no_search(attribute: str = "backbone") -> FragmentSearch:
    return FragmentSearch(["there is no such source"], attribute=attribute)


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        **{"max_epochs": 0, "logger": False, "enable_checkpointing": False, **options},
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )


def outputs(model: LightningModule) -> Tensor:
    with torch.no_grad():
        return model.eval()(digits(100, 32)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_of_ones_own_is_stitched_trained_saved_resumed_and_loaded(
    kind: type[Classifier], tmp_path: Path
) -> None:
    attribute = KINDS[kind]
    torch.manual_seed(0)
    model = kind()
    callback = search(attribute)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(model, images())
    backbone = model.get_submodule(attribute)
    assert isinstance(backbone, StitchedBackbone)
    assert callback.result is not None
    assert backbone.recipe == callback.result.best.candidate.recipe
    assert backbone(digits(2, 32)[0]).shape == (2, backbone.num_features)
    trained = {parameter for group in run.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {*model.parameters()}
    run.save_checkpoint(tmp_path / "model.ckpt")

    loaded = kind.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert torch.equal(outputs(loaded), outputs(model))
    tested = kind()
    trainer(tmp_path, no_search(attribute)).validate(tested, images(), ckpt_path=tmp_path / "model.ckpt", verbose=False)
    assert torch.equal(outputs(tested), outputs(model))

    more = trainer(tmp_path, max_epochs=2)
    more.fit(copy.deepcopy(model), images(), ckpt_path=tmp_path / "model.ckpt")
    resumed = kind()
    unneeded = no_search(attribute)
    unneeded.ckpt_path = tmp_path / "model.ckpt"
    again = trainer(tmp_path, unneeded, max_epochs=2)
    again.fit(resumed, images(), ckpt_path=tmp_path / "model.ckpt")
    assert again.global_step == 6
    assert torch.equal(outputs(resumed), outputs(more.lightning_module))
    assert not torch.equal(outputs(resumed), outputs(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_replaces_what_a_search_found_while_nobody_had_named_the_checkpoint(
    kind: type[Classifier], tmp_path: Path
) -> None:
    class Unprepared(kind):  # type: ignore[misc, valid-type]
        on_load_checkpoint = LightningModule.on_load_checkpoint

    attribute = KINDS[kind]
    torch.manual_seed(0)
    model, callback, fresh = Unprepared(), search(attribute, max_candidates=6), Unprepared()
    run = trainer(tmp_path, callback)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*load_from_checkpoint will not know")
        run.fit(model, images())
        assert callback.result is not None
        callback.install_within(run, Budget(max_macs=min(r.candidate.cost.macs for r in callback.result.ranked)))
        run.fit(model, images())  # for an optimizer of what was installed
        run.save_checkpoint(tmp_path / "cheapest.ckpt")
        again = search(attribute, max_candidates=6)
        trainer(tmp_path, again, max_epochs=1).fit(fresh, images(), ckpt_path=tmp_path / "cheapest.ckpt")
    assert again.result is not None
    assert again.result.best.candidate.recipe == callback.result.best.candidate.recipe
    assert fresh.get_submodule(attribute).recipe == model.get_submodule(attribute).recipe
    assert fresh.get_submodule(attribute).recipe != again.result.best.candidate.recipe
    assert fresh(digits(2, 32)[0]).shape == (2, 3)
    assert not fresh._load_state_dict_pre_hooks


def test_a_network_that_is_there_is_not_searched_again(tmp_path: Path) -> None:
    model = Classifier()
    trainer(tmp_path, search()).fit(model, images())
    backbone = model.backbone
    trainer(tmp_path, no_search()).fit(model, images())
    assert model.backbone is backbone


def test_a_backbone_of_ones_own_is_imitated_so_that_a_trained_head_goes_on_working(tmp_path: Path) -> None:
    data, model = images(), Own()
    features, labels = (torch.cat(parts) for parts in zip(*data.head_dataloader(), strict=True))
    with torch.no_grad():
        trained, _ = fit_ridge_head(model.model["encoder"].eval()(features), labels, num_classes=3)
        model.head.load_state_dict(trained.state_dict())
        before = outputs(model)
    trainer(tmp_path, search("model.encoder")).fit(model, data)
    assert (outputs(model).argmax(1) == before.argmax(1)).float().mean() >= 0.6  # a third by chance
    with torch.no_grad():
        model.model["encoder"] = own_backbone().requires_grad_(False)
    # what comes out is what the replaced backbone gave, not any other vectors of its width
    torch.testing.assert_close(outputs(model), before)


def test_the_replaced_backbone_sees_images_as_it_is_used_to(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watched(Own):
        def build(self) -> None:
            super().build()
            self.model["encoder"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pool = digits(180, 32, classes=3)
    data = images()
    normalised = CalibrationDataModule(
        TensorDataset((pool[0] - mean) / std, pool[1]),
        **{"calibration_samples": 16, "train_samples": 60, "selection_samples": 40, "test_samples": 60},
        batch_size=20,
        mean=MEAN,
        std=STD,
    )
    trainer(tmp_path, search("model.encoder")).fit(Watched(), normalised)
    labelled = data.labelled_dataloader("train", "selection", "calibration")
    expected = (torch.cat([batch for batch, _ in labelled]) - mean) / std
    torch.testing.assert_close(torch.cat(seen), expected)


def test_images_that_come_in_normalised_are_brought_back() -> None:
    network = composed(("test_resnet", None, None))
    plain, undone = StitchedBackbone(), StitchedBackbone(mean=MEAN, std=STD)
    plain.install(network)
    undone.install(network)
    shown = digits(4, 32)[0]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(undone((shown - mean) / std), plain(shown))
    again = StitchedBackbone()
    again.load_state_dict(undone.state_dict())
    assert torch.equal(again((shown - mean) / std), undone((shown - mean) / std))


def test_the_head_can_be_fitted_with_no_step_of_training(tmp_path: Path) -> None:
    model, data = Classifier(), images()
    run = trainer(tmp_path, search(head_attribute="head"))
    run.fit(model, data)
    assert run.global_step == 0
    backbone = model.backbone.eval()
    with torch.no_grad():
        labelled = data.labelled_dataloader("train", "selection", "calibration")
        features, labels = zip(*((backbone(batch), labels) for batch, labels in labelled), strict=True)
        fitted, _ = fit_ridge_head(torch.cat(features), torch.cat(labels), num_classes=3)
    torch.testing.assert_close(model.head.weight, fitted.weight, rtol=1e-3, atol=1e-4)
    assert run.validate(model, data, verbose=False)[0]["val_accuracy"] > 0.6


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # a finder's own checkpoint
@pytest.mark.parametrize("kind", KINDS)
def test_lightnings_own_callbacks_work_with_it(kind: type[Classifier], tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
    model = kind()
    run = trainer(tmp_path, finder, search(KINDS[kind]), WeightAveraging(), max_epochs=2)
    run.fit(model, images())
    trained = {parameter for group in run.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {*model.parameters()}
    assert run.global_step == 6


def test_backbone_finetuning_freezes_the_stitched_network_until_its_epoch(tmp_path: Path) -> None:
    states = []

    def kernels(network: nn.Module) -> list[Tensor]:
        """Lightning's callback leaves batch norms alone."""
        return [parameter.clone() for parameter in network.parameters() if parameter.ndim == 4]

    class Thaw(BackboneFinetuning):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            states.append(kernels(pl_module.backbone.network))

    model, callback = Classifier(), search()
    thaw = Thaw(unfreeze_backbone_at_epoch=1, train_bn=False)
    trainer(tmp_path, callback, thaw, max_epochs=2).fit(model, images())
    assert callback.pool is not None
    assert callback.result is not None
    found = kernels(callback.pool.assemble(callback.result.best.candidate))
    assert all(map(torch.equal, states[0], found))
    assert not all(map(torch.equal, states[1], found))


def test_another_budget_afterwards_imitates_the_network_that_is_there(tmp_path: Path) -> None:
    model, data, callback = Classifier(), images(), search(head_attribute="head", max_candidates=6)
    run = trainer(tmp_path, callback)
    run.fit(model, data)
    before = model.backbone.recipe
    assert callback.result is not None
    cheapest = min(ranked.candidate.cost.macs for ranked in callback.result.ranked)
    callback.install_within(run, Budget(max_macs=cheapest))
    assert model.backbone.recipe != before
    assert model.backbone.num_features == 40
    assert run.validate(model, data, verbose=False)[0]["val_accuracy"] > 0.5


def test_a_class_that_could_not_load_its_checkpoints_is_told_before_training(tmp_path: Path) -> None:
    class Unprepared(Own):
        on_load_checkpoint = LightningModule.on_load_checkpoint

    with pytest.warns(
        UserWarning, match=r"Unprepared.load_from_checkpoint will not know .*'model.encoder'.*\(num_features=96"
    ):
        trainer(tmp_path, search("model.encoder")).fit(Unprepared(), images())


class Maps(Classifier):
    def build(self) -> None:
        self.backbone = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)


class Failing(Classifier):
    def build(self) -> None:
        self.backbone = nn.Linear(7, 40)
        self.head = nn.Linear(40, 3)


class Untold(Classifier):
    def build(self) -> None:
        self.backbone = StitchedBackbone()
        self.head = nn.Linear(40, 3)


@pytest.mark.filterwarnings("ignore:.*load_from_checkpoint will not know")
@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Classifier, {"attribute": "backbon"}, r"Classifier has no submodule of that name; the nearest are 'backbone'"),
        (Classifier, {"attribute": ""}, "has no submodule of that name"),
        (
            Maps,
            {},
            r"Maps.backbone \(Conv2d\) gives \(20, 4, 30, 30\) for images of \(20, 3, 32, 32\).*\(batch, width\)",
        ),
        (Failing, {}, r"Failing.backbone \(Linear\) fails on images of \(20, 3, 32, 32\)"),
        (Untold, {}, r"Untold.backbone is a StitchedBackbone\(\) of no known width.*num_features=...\), or define"),
        (Classifier, {"head_attribute": "hed"}, r"fits a torch.nn.Linear\(40, 3\) .*Classifier has None there"),
        (Classifier, {"head_attribute": "backbone"}, r"fits a torch.nn.Linear\(40, 3\)"),
    ],
)
def test_what_cannot_be_filled_is_refused_with_the_mend(
    kind: type[Classifier], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    callback = (
        search(**options)
        if kind in (Maps, Failing)
        else FragmentSearch([{"spec": "test_resnet", "pretrained": False}], **{"attribute": "backbone", **options})
    )
    with pytest.raises(StitchError, match=words):
        trainer(tmp_path, callback).fit(kind(), images())


def test_a_head_attribute_needs_a_backbones(tmp_path: Path) -> None:
    with pytest.raises(StitchError, match="head_attribute='head' needs attribute="):
        trainer(tmp_path, FragmentSearch(["no source"], head_attribute="head")).fit(Classifier(), images())


def test_a_checkpoint_without_a_stitched_network_is_refused_before_a_search(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Own(), images())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    callback = no_search("model.encoder")
    callback.ckpt_path = tmp_path / "plain.ckpt"
    with pytest.raises(RecipeError, match=r"holds no stitched network for 'model.encoder'; it has some for \[\]"):
        trainer(tmp_path, callback).fit(Own(), images(), ckpt_path=callback.ckpt_path)
