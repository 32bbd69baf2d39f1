from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch import Beam, CalibrationDataModule, FragmentSearch, StitchedClassifier, StitchError, fit_head
from lightning_stitch.errors import RecipeError
from lightning_stitch.heads.class_maps import ClassMapHead

SOURCES = [{"spec": f"test_{name}", "pretrained": False} for name in ("resnet", "efficientnet")]
ANIMALS = {"name": "class_map", "classes": {"dog": "151-268", "cat": "281-285", "fox": [277, 278]}}
BEYOND = {"name": "class_map", "classes": {"dog": 1000, "cat": 281, "fox": 277}}
IMAGES, CLASSES = (torch.tensor(array) for array in load_digits(n_class=3, return_X_y=True))
TARGETS = {
    "multiclass": CLASSES,
    "multilabel": torch.stack([CLASSES == 0, CLASSES == 2], 1).long(),
    "regression": CLASSES * 100.0,
    "none": None,
}


def digits(task: str = "multiclass", **options: Any) -> CalibrationDataModule:
    images, targets = IMAGES.view(-1, 1, 8, 8).float() / 16, TARGETS[task]
    pool = TensorDataset(images) if targets is None else TensorDataset(images, targets)
    sizes = {"calibration_samples": 16, "train_samples": 90, "selection_samples": 60, "test_samples": 60}
    return CalibrationDataModule(pool, image_size=32, task=task, **{**sizes, **options})  # type: ignore[arg-type]


def search(**options: Any) -> FragmentSearch:
    return FragmentSearch(
        **{"sources": SOURCES, "strategy": Beam(width=1, max_fragments=2), "max_candidates": 2, **options}
    )


def trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        **{"max_epochs": 0, **options},
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )


def joined(loader: DataLoader) -> tuple[Tensor, Tensor]:
    images, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return images, targets


@pytest.mark.parametrize(
    ("head", "task", "count", "metric"),
    [
        ("ridge", "multilabel", 2, "auroc"),
        ("ridge", "regression", None, "r2"),
        ("knn", "multiclass", 3, "accuracy"),
        ({"name": "knn", "metric": "euclidean", "num_neighbours": 5}, "multilabel", 2, "f1"),
        ("knn", "regression", 1, "pearson"),
        ("ridge", "multiclass", 3, "auroc"),
    ],
)
def test_the_head_that_the_module_asks_for_is_fitted_and_comes_back_from_a_checkpoint(
    tmp_path: Path, head: Any, task: str, count: int | None, metric: str
) -> None:
    model, data, callback = StitchedClassifier(count, head=head, task=task), digits(task), search()
    run = trainer(tmp_path, callback)
    run.fit(model, data)
    assert callback.result is not None
    assert callback.result.num_selection_labels == 150
    (found,) = run.test(model, data, verbose=False)
    assert found[f"test_{metric}"] > 0.65  # 0.5 and less for a guess, 0 for R2 and Pearson's correlation

    assert model.network is not None
    images, targets = joined(labelled(data))
    with torch.no_grad():
        blocks = model.network.recipe.head_blocks
        expected = fit_head(model.network.eval()(images), targets, head, num_classes=count, blocks=blocks)
    assert model.head is not None
    assert expected.state_dict().keys() == model.head.state_dict().keys()
    torch.testing.assert_close(model(images), expected(model.network(images)), rtol=1e-3, atol=1e-3)

    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = StitchedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, strict=True)
    told, again = (torch.cat(run.predict(m, data)) for m in (model, loaded))
    assert torch.equal(told, again)
    outputs = model.eval()(joined(data.test_dataloader())[0]).detach()
    in_words = {"multiclass": outputs.softmax(1), "multilabel": outputs.sigmoid(), "regression": outputs}
    torch.testing.assert_close(told, in_words[task], rtol=1e-3, atol=1e-3)  # predictions fold BatchNorm
    assert loaded.head_settings == model.head_settings
    resumed = StitchedClassifier(count, head=head, task=task)
    run.test(resumed, data, ckpt_path=tmp_path / "model.ckpt", verbose=False, weights_only=True)
    assert torch.equal(torch.cat(run.predict(resumed, data)), told)


def labelled(data: Any) -> Any:
    """All images that a head is fitted on where no training follows."""
    return data.labelled_dataloader("train", "selection", "calibration")


def test_a_class_map_sums_the_sources_own_classes_and_uses_no_label_at_all(tmp_path: Path) -> None:
    found = []
    for data in (digits(), digits("none")):
        model, callback = StitchedClassifier(head=ANIMALS), search()
        run = trainer(tmp_path, callback)
        run.fit(model, data)
        assert callback.result is not None
        assert callback.result.num_selection_labels == 0
        assert "consensus" in callback.result.best.scores
        assert model.num_classes == 3
        found.append((model, run))
    model, run = found[0]
    (measured,) = run.test(model, digits(), verbose=False)
    images, targets = joined(digits().test_dataloader())
    assert model.network is not None
    p = model.network.eval()(images).detach().softmax(1)
    sums = torch.stack([p[:, 151:269].sum(1), p[:, 281:286].sum(1), p[:, 277:279].sum(1)], 1)
    assert measured["test_accuracy"] == pytest.approx(float((sums.argmax(1) == targets).double().mean()))

    unlabelled, run = found[1]
    told = torch.cat(run.predict(unlabelled, digits("none")))
    assert told.shape == (60, 3)
    torch.testing.assert_close(told.sum(1), torch.ones(60))
    run.save_checkpoint(tmp_path / "model.ckpt")
    loaded = StitchedClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert isinstance(loaded.head, ClassMapHead)
    assert torch.equal(torch.cat(run.predict(loaded, digits("none"))), told)


def test_a_ranking_by_labels_can_be_asked_for_with_a_class_map(tmp_path: Path) -> None:
    callback = search(ranking="loo_r2")
    trainer(tmp_path, callback).fit(StitchedClassifier(head=ANIMALS), digits())
    assert callback.result is not None
    assert callback.result.num_selection_labels == 150
    assert next(iter(callback.result.best.scores)) == "loo_r2"


@pytest.mark.parametrize("task", ["multiclass", "none"])
def test_without_a_head_the_module_gives_the_networks_features(tmp_path: Path, task: str) -> None:
    model, data = StitchedClassifier(head="none"), digits(task)
    run = trainer(tmp_path, search())
    run.fit(model, data)
    assert model.network is not None
    told = torch.cat(run.predict(model, data))
    first = next(iter(data.test_dataloader()))
    images = first if isinstance(first, Tensor) else first[0]
    torch.testing.assert_close(told[: len(images)], model.network.eval()(images).detach())
    assert told.shape == (60, model.network.num_features)


@pytest.mark.parametrize("stage", ["test", "validate", "fit"])
@pytest.mark.parametrize(
    ("head", "task", "words"),
    [
        ("none", "multiclass", "head='none': it gives features, and there is nothing to train or evaluate"),
        (ANIMALS, "none", "There is nothing to train on or to evaluate: the images have no targets"),
    ],
)
def test_training_and_evaluating_without_a_head_or_targets_is_refused_before_the_search(
    tmp_path: Path, stage: str, head: Any, task: str, words: str
) -> None:
    callback = search()
    run = trainer(tmp_path, callback, max_epochs=1)
    with pytest.raises(StitchError, match=words):
        getattr(run, stage)(StitchedClassifier(head=head), datamodule=digits(task))
    assert callback.pool is None


@pytest.mark.parametrize(
    ("head", "count", "task", "data", "options", "error", "words"),
    [
        ("knn", 3, "multiclass", "none", {}, StitchError, "head='knn' is fitted on labelled images, but the data"),
        (ANIMALS, None, "multiclass", "none", {"ranking": "loo_r2"}, StitchError, "ranking='loo_r2' needs labels, but"),
        (
            "ridge",
            3,
            "multiclass",
            "regression",
            {},
            StitchError,
            "task='regression', StitchedClassifier has task='mul",
        ),
        ("ridge", 3, "multilabel", "multilabel", {}, StitchError, "The data have 2 labels, .* num_classes=3"),
        ("ridge", 2, "regression", "regression", {}, StitchError, "data have 1 numbers for each image, .*classes=2"),
        ("ridge", 1, "regression", "regression", {"compare": True}, StitchError, "compare=True tells accuracies of cl"),
        (
            "none",
            0,
            "multiclass",
            "multiclass",
            {"compare": True},
            StitchError,
            "compare=True tells accuracies of clas",
        ),
        (BEYOND, 3, "multiclass", "multiclass", {}, StitchError, "'dog' has the source class 1000; .* from 0 to 999"),
    ],
)
def test_data_heads_and_rankings_that_do_not_fit_are_refused_before_any_source_runs(
    tmp_path: Path,
    head: Any,
    count: int | None,
    task: str,
    data: str,
    options: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    callback = search(**options)
    with pytest.raises(error, match=words):
        trainer(tmp_path, callback).fit(StitchedClassifier(count, head=head, task=task), digits(data))
    assert callback.pool is None or callback.pool.calibration is None


def test_a_class_map_in_another_order_than_the_datas_classes_is_refused(tmp_path: Path) -> None:
    class Named(TensorDataset):
        classes = ("dog", "cat", "fox")

    pool = Named(IMAGES.view(-1, 1, 8, 8).float() / 16, CLASSES)
    data = CalibrationDataModule(pool, image_size=32, calibration_samples=16, test_samples=60)
    classes = {name: ANIMALS["classes"][name] for name in ("cat", "dog", "fox")}  # type: ignore[index]
    with pytest.raises(StitchError, match=r"in another order: \['cat', 'dog', 'fox'\] instead of \['dog', 'cat', 'fox"):
        trainer(tmp_path, search()).fit(StitchedClassifier(head={**ANIMALS, "classes": classes}), data)


@pytest.mark.parametrize(("head", "labels"), [("knn", 166), (ANIMALS, 0)])
def test_a_comparison_gives_all_networks_the_modules_head(tmp_path: Path, head: Any, labels: int) -> None:
    model, data, callback = StitchedClassifier(3, head=head), digits(), search(compare=True)
    run = trainer(tmp_path, callback)
    run.fit(model, data)
    assert callback.comparison is not None
    assert callback.result is not None
    sources = [row for row in callback.comparison.rows if row["kind"] == "source"]
    assert [row["labels"] for row in sources] == [labels] * 2
    best = callback.result.best_source.candidate
    (own,) = (row for row in sources if row["name"] == best.recipe.fragments[0].source)
    assert callback.pool is not None
    network = callback.pool.assemble(best).eval()
    (images, targets), (test_images, test_targets) = joined(labelled(data)), joined(data.test_dataloader())
    with torch.no_grad():
        fitted = fit_head(network(images), targets, head, num_classes=3, blocks=best.recipe.head_blocks)
        right = (fitted(network(test_images)).argmax(1) == test_targets).double().mean()
    assert own["accuracy"] == pytest.approx(float(right))


def test_a_checkpoint_of_another_head_is_refused_in_words(tmp_path: Path) -> None:
    run = trainer(tmp_path, search())
    run.fit(StitchedClassifier(3, head="knn"), digits())
    run.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(RecipeError, match=r"The checkpoint's module has \{'head': 'knn', .*this one \{'head': 'ridge'"):
        run.test(StitchedClassifier(3), digits(), ckpt_path=tmp_path / "model.ckpt", weights_only=True)


@pytest.mark.parametrize(("head", "task", "count"), [("knn", "multiclass", 3), ("ridge", "regression", 1)])
def test_training_goes_on_from_any_head_by_the_tasks_loss(tmp_path: Path, head: str, task: str, count: int) -> None:
    model, data = StitchedClassifier(count, head=head, task=task), digits(task)
    run = trainer(tmp_path, search(), max_epochs=1)
    run.fit(model, data)
    assert run.global_step == 3
    assert run.callback_metrics["train_loss"].isfinite()
    assert run.callback_metrics["val_loss"].isfinite()
