from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch import (
    CutGraph,
    Recipe,
    RecipeError,
    RidgeHead,
    StitchedClassifier,
    StitchedNetwork,
    StitchError,
    load_source,
)
from lightning_stitch._lightning import pl
from lightning_stitch.networks.network import assemble
from lightning_stitch.recipe import FragmentRef

SIZE = (3, 64, 64)


def network_up_to(cut: str | None, name: str = "test_resnet") -> StitchedNetwork:
    source = load_source(name, pretrained=False)
    graph = CutGraph(source.module, SIZE)
    width = graph.output_features() if cut is None else graph.find(cut).channels
    recipe = Recipe.chain((source.ref,), (FragmentRef(source.name, None, cut),), num_features=width, input_size=SIZE)
    return assemble(recipe, {source.name: graph})


def classifier(name: str = "test_resnet", **options: Any) -> StitchedClassifier:
    model = StitchedClassifier(num_classes=3, **options)
    network = network_up_to("global_pool", name)
    head = RidgeHead(network.num_features, 3)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    model.install(network, head)
    return model


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(12, *SIZE, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(12) % 3), batch_size=6)


def quiet_trainer(folder: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{"max_epochs": 1, "logger": False, "accelerator": "cpu", "enable_progress_bar": False, **options},
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )


def logits(model: StitchedClassifier) -> Tensor:
    with torch.no_grad():
        return model.eval()(next(iter(loader()))[0])


def test_forward_is_the_head_on_the_networks_features() -> None:
    model = classifier()
    images = next(iter(loader()))[0]
    assert model.network is not None
    assert model.head is not None
    torch.testing.assert_close(logits(model), model.head(model.network(images)).detach())


def test_num_features_is_the_width_of_the_features() -> None:
    model = classifier()
    assert model.network is not None
    assert model.network.num_features == model.network(next(iter(loader()))[0]).shape[1]


@pytest.mark.parametrize("call", ["forward", "configure_optimizers"])
def test_without_a_network_says_how_to_get_one(call: str) -> None:
    model = StitchedClassifier(num_classes=3)
    arguments = (torch.rand(1, *SIZE),) if call == "forward" else ()
    with pytest.raises(StitchError, match=r"no network yet. Put a FragmentSearch among the Trainer's callbacks"):
        getattr(model, call)(*arguments)


def test_recipe_given_at_construction_is_built_by_configure_model_once() -> None:
    model = StitchedClassifier(num_classes=3, recipe=network_up_to("global_pool").recipe.to_dict())
    assert model.network is None
    model.configure_model()
    first = model.network
    model.configure_model()
    assert first is not None
    assert model.network is first
    assert logits(model).shape == (6, 3)


def test_malformed_recipe_is_refused_at_construction() -> None:
    with pytest.raises(RecipeError, match="schema 7"):
        StitchedClassifier(num_classes=3, recipe={"schema": 7})


def test_checkpoint_loads_without_callback_or_sources_and_with_weights_only(tmp_path: Path) -> None:
    model = classifier()
    trainer = quiet_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(model, loader(), loader())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = StitchedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.recipe == model.recipe


def test_checkpoint_of_a_module_without_a_network_is_refused(tmp_path: Path) -> None:
    model = StitchedClassifier(num_classes=3)
    with pytest.raises(RecipeError, match="holds no recipe"):
        model.on_load_checkpoint({"hyper_parameters": {"num_classes": 3, "recipe": None}})


@pytest.mark.parametrize("found_before", [None, "test_efficientnet"])
def test_fit_from_a_checkpoint_replaces_whatever_network_is_there(tmp_path: Path, found_before: str | None) -> None:
    first = classifier()
    trainer = quiet_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(first, loader(), loader())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    expected = copy.deepcopy(first.state_dict())

    fresh = StitchedClassifier(num_classes=3) if found_before is None else classifier(found_before)
    resumed = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    resumed.fit(fresh, loader(), loader(), ckpt_path=tmp_path / "first.ckpt")
    assert fresh.recipe == first.recipe
    torch.testing.assert_close(fresh.state_dict(), expected, rtol=0, atol=0)

    again = quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    again.fit(fresh, loader(), loader(), ckpt_path=tmp_path / "first.ckpt")
    trained = {id(parameter) for group in again.optimizers[0].param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in fresh.parameters()}
    assert any(not torch.equal(expected[key], value) for key, value in fresh.state_dict().items())


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    model = classifier(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    batch = next(iter(loader()))
    before = torch.nn.functional.cross_entropy(logits(model), batch[1])
    quiet_trainer(tmp_path, max_epochs=10, enable_checkpointing=False).fit(model, loader(), loader())
    assert torch.nn.functional.cross_entropy(logits(model), batch[1]) < before


def test_test_reports_accuracy_and_auroc_of_the_logits(tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, roc_auc_score

    model = classifier()
    (found,) = quiet_trainer(tmp_path).test(model, loader(), verbose=False)
    images, labels = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    probabilities = model.eval()(images).softmax(1).detach().numpy()
    assert found["test_accuracy"] == pytest.approx(accuracy_score(labels, probabilities.argmax(1)))
    assert found["test_auroc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"), abs=1e-6)


def test_predict_gives_class_probabilities_for_images_with_and_without_labels(tmp_path: Path) -> None:
    model = classifier()
    images = torch.cat([batch[0] for batch in loader()])
    trainer = quiet_trainer(tmp_path)
    labelled = torch.cat(trainer.predict(model, loader()))
    bare = torch.cat(trainer.predict(model, DataLoader(images, batch_size=6)))
    assert torch.equal(labelled, bare)
    torch.testing.assert_close(labelled.sum(1), torch.ones(12))


def test_a_test_set_of_one_class_says_that_its_auroc_is_undefined(tmp_path: Path) -> None:
    one_class = DataLoader(TensorDataset(next(iter(loader()))[0], torch.ones(6, dtype=torch.long)), batch_size=4)
    with pytest.warns(UserWarning, match="The AUROC is undefined, NaN: all 6 images are of class 1"):
        (scores,) = quiet_trainer(tmp_path).test(classifier(), one_class, verbose=False)
    assert math.isnan(scores["test_auroc"])
    assert 0 <= scores["test_accuracy"] <= 1


def test_the_few_images_of_a_sanity_check_are_not_said_to_be_of_one_class(tmp_path: Path) -> None:
    images, labels = (torch.cat(column) for column in zip(*loader(), strict=True))
    by_class = DataLoader(TensorDataset(images, labels.sort().values), batch_size=2)
    trainer = quiet_trainer(tmp_path, enable_checkpointing=False)
    trainer.fit(classifier(), loader(), by_class)  # a warning is an error here
    assert math.isfinite(trainer.callback_metrics["val_auroc"])
    assert trainer.callback_metrics["val_accuracy"] == pytest.approx(_accuracy(trainer.lightning_module, by_class))


def _accuracy(model: pl.LightningModule, batches: DataLoader) -> float:
    with torch.no_grad():
        right = [model.eval()(images).argmax(1) == labels for images, labels in batches]
    return float(torch.cat(right).float().mean())
