"""Images and batches that a module of the package refuses or skips, whatever loop runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.predictions import NAMES, SIZE, classifier, quiet_trainer, small_source
from doubles.small_sources import live
from doubles.tensors import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_stitch import CalibrationError, StitchedBackbone, StitchedClassifier
from lightning_stitch._lightning import pl
from lightning_stitch.networks import network as network_file

IMAGES, LABELS = digits(12, SIZE, classes=len(NAMES))
NORMALISED, BYTES = (IMAGES - 0.5) / 0.5, (IMAGES * 255).byte()


class Batches:
    """A loader of these batches, as they are."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


GOOD = (IMAGES, LABELS)


def run(stage: str, model: pl.LightningModule, loader: Any, folder: Path) -> Any:
    if stage == "fit":
        return quiet_trainer(folder, max_epochs=1).fit(model, loader, Batches(GOOD))
    if stage == "sanity":
        return quiet_trainer(folder, max_epochs=1).fit(model, Batches(GOOD), loader)
    return getattr(quiet_trainer(folder), stage)(model, loader)


STAGES = ["fit", "sanity", "validate", "test", "predict"]
WRONG: list[tuple[Callable[[Tensor], Tensor], str]] = [
    (lambda images: (images - 0.5) / 0.5, r"torch.float32 .* from -1 to 1: they look normalised. Leave Normalize out"),
    (lambda images: (images * 255).byte(), r"found torch.uint8 .* from 0 to 25\d: divide them"),
    (lambda images: images * 255, r"found torch.float32 .* from 0 to 25\d: divide them"),
    (lambda images: images.permute(0, 2, 3, 1), "put the channels first"),
    (lambda images: images / 0, "NaN or infinite values"),
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("spoil", "words"), WRONG, ids=["normalised", "bytes", "255", "last", "nan"])
def test_every_step_refuses_images_that_the_network_was_not_made_for(
    stage: str, spoil: Callable[[Tensor], Tensor], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match=words):
        run(stage, classifier(small_source(3)), Batches((spoil(IMAGES), LABELS)), tmp_path)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_later_batch_is_checked_where_a_module_is_evaluated(stage: str, tmp_path: Path) -> None:
    dark = (IMAGES * 0, LABELS)  # the first one looks like any other
    with pytest.raises(CalibrationError, match="they look normalised"):
        run(stage, classifier(small_source(3)), Batches(dark, GOOD, (NORMALISED, LABELS)), tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_dict_batches_are_refused_in_words_that_help(stage: str, tmp_path: Path) -> None:
    batch = {"image": IMAGES, "label": LABELS}
    with pytest.raises(
        CalibrationError, match=r"a dict with the keys \['image', 'label'\]. Let the dataset give pairs"
    ):
        run(stage, classifier(small_source(3)), Batches(batch), tmp_path)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")  # Lightning's, once in a process
@pytest.mark.parametrize("empty", [(IMAGES[:0], LABELS[:0]), [IMAGES[:0], LABELS[:0]]], ids=["tuple", "list"])
def test_empty_batches_change_nothing(empty: Any, tmp_path: Path) -> None:
    model = classifier(small_source(3))
    for stage in ("validate", "test"):
        assert run(stage, model, Batches(empty, GOOD, empty), tmp_path) == run(stage, model, Batches(GOOD), tmp_path)
    with_empty = torch.cat(run("predict", model, Batches(empty, GOOD, empty), tmp_path))
    torch.testing.assert_close(with_empty, torch.cat(run("predict", model, Batches(GOOD), tmp_path)))
    before = model.head.weight.detach().clone()  # type: ignore[union-attr]
    run("fit", model, Batches(empty, GOOD), tmp_path)
    assert not torch.equal(model.head.weight, before)  # type: ignore[union-attr, arg-type]


def test_a_headless_module_predicts_nothing_of_an_empty_batch(tmp_path: Path) -> None:
    model = StitchedClassifier(head="none")
    network = classifier(small_source(3)).network
    assert network is not None
    model.install(network, nn.Identity())
    assert run("predict", model, Batches(IMAGES[:0]), tmp_path)[0].shape == (0, network.num_features)


class Own(pl.LightningModule):
    """Somebody's module around a stitched network; it counts nothing and checks nothing itself."""

    def __init__(self, mean: list[float] | None = None, std: list[float] | None = None) -> None:
        super().__init__()
        self.backbone = StitchedBackbone(num_features=8, mean=mean, std=std)
        network = classifier(small_source(3)).network
        assert network is not None
        self.backbone.install(network)
        self.head = nn.Linear(8, len(NAMES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone(batch[0])

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.backbone(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_a_backbone_in_a_module_of_ones_own_refuses_the_first_batch_of_each_loop(stage: str, tmp_path: Path) -> None:
    module = Own()
    for images in (NORMALISED, BYTES, IMAGES[:, :1]):
        with pytest.raises(CalibrationError, match="images must be float in"):
            run(stage, module, Batches((images, LABELS)), tmp_path)
        if stage != "fit":  # another loop after one that went well
            run(stage, module, Batches(GOOD), tmp_path)


def test_a_backbone_that_knows_mean_and_std_takes_normalised_images_and_refuses_others(tmp_path: Path) -> None:
    module = Own([0.5] * 3, [0.5] * 3)
    run("test", module, Batches((NORMALISED, LABELS)), tmp_path)
    with pytest.raises(CalibrationError, match=r"found torch.float32 .* divide them"):
        run("test", module, Batches((IMAGES * 255, LABELS)), tmp_path)


def test_training_batches_after_the_first_are_free_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Own().train()
    seen: list[Tensor] = []
    check = network_file.check_images
    monkeypatch.setattr(network_file, "check_images", lambda images, shape: (seen.append(images), check(images, shape)))
    optimizer = module.configure_optimizers()
    for _ in range(4):
        optimizer.zero_grad()
        module.training_step(GOOD, 0).backward()
        optimizer.step()
    assert len(seen) == 1
    for _ in range(2):  # evaluation in between, as every epoch has it
        module.eval()
        with torch.no_grad():
            module.backbone(IMAGES)
            module.backbone(IMAGES)
        module.train()
        module.training_step(GOOD, 0)
    assert len(seen) == 3


def test_recording_a_graph_of_the_network_is_free_of_the_check() -> None:
    network = classifier(small_source(3)).network
    assert network is not None
    exported = torch.export.export(network, (IMAGES,)).module()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES), network(IMAGES))
        expected = network(IMAGES)
        torch.testing.assert_close(exported(IMAGES), expected)
    assert network.to("meta")(IMAGES.to("meta")).is_meta


def test_loaders_are_as_ever_where_images_are_right(tmp_path: Path) -> None:
    loader = DataLoader(list(zip(IMAGES, LABELS, strict=True)), batch_size=5)
    model = classifier(small_source(3))
    for stage in STAGES:
        run(stage, model, loader, tmp_path)
    assert model.network is not None


def trained_on_single_images(folder: Path, model: StitchedClassifier) -> StitchedClassifier:
    train = Batches((IMAGES[:4], LABELS[:4]), (IMAGES[4:5], LABELS[4:5]))
    quiet_trainer(folder, max_epochs=1).fit(model, train, Batches(GOOD))
    return model


def test_a_batch_of_one_image_does_not_end_training_in_train_mode(tmp_path: Path) -> None:
    layers = [nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 6)]
    found = classifier(live(nn.Sequential(*layers), "normalised", size=SIZE))
    assert found.network is not None
    model = StitchedClassifier(len(NAMES), train_mode=True)
    model.install(found.network, found.head)  # type: ignore[arg-type]
    norm = next(module for module in model.network.modules() if isinstance(module, nn.BatchNorm1d))  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="A batch of one image is trained on in eval mode"):
        trained_on_single_images(tmp_path, model)
    assert norm.training
    assert int(norm.num_batches_tracked) == 1  # the single image moves no statistics
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_batch_of_one_image_is_nothing_special_in_eval_mode(tmp_path: Path) -> None:
    trained_on_single_images(tmp_path, classifier(small_source(3)))  # a warning is an error here


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_training_in_half_precision_leaves_numbers(optimizer: Any, tmp_path: Path) -> None:
    found = classifier(small_source(3))
    model = StitchedClassifier(len(NAMES), optimizer=None if optimizer is torch.optim.AdamW else optimizer, lr=1e-3)
    model.install(found.network, found.head)  # type: ignore[arg-type]
    before = model.head.weight.detach().clone()  # type: ignore[union-attr, operator]
    trainer = quiet_trainer(tmp_path, max_epochs=3, precision="16-true")
    with pytest.warns(UserWarning, match=r"eps=1e-\d+ is 0 in torch.float16, .* raised to 6.1e-05"):
        trainer.fit(model, Batches(GOOD), Batches(GOOD))
    for parameter in model.parameters():
        assert parameter.dtype == torch.float16
        assert bool(parameter.isfinite().all())
    assert not torch.equal(model.head.weight.cpu(), before.half())  # type: ignore[union-attr, arg-type, operator]


def test_an_eps_that_a_dtype_has_is_left_alone(tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-true"):
        trainer = quiet_trainer(tmp_path, max_epochs=1, precision=precision)
        trainer.fit(classifier(small_source(3)), Batches(GOOD), Batches(GOOD))
        assert {group["eps"] for group in trainer.optimizers[0].param_groups} == {1e-8}
