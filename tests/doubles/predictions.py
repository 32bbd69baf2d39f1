"""Classifiers that need no search, and image files for them, for tests of predictions."""

from __future__ import annotations

from pathlib import Path

import torch
from doubles.small_sources import live, shake
from doubles.tensors import digits
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from lightning_stitch import CutGraph, FragmentRef, Recipe, RidgeHead, StitchedClassifier, load_source
from lightning_stitch._lightning import pl
from lightning_stitch.networks.network import assemble
from lightning_stitch.sources.source import Source

SIZE = 16
NAMES = ["digit_0", "digit_1", "digit_2"]


def classifier(source: Source | None = None, *, names: list[str] | None = NAMES) -> StitchedClassifier:
    """A network that tells digits apart, at random; of a source that checkpoints can hold unless one is given."""
    source = source or load_source("test_resnet", pretrained=False)
    shake(source.module, 0)
    shape = (source.preprocessing.input_size[0], SIZE, SIZE)
    graph = CutGraph(source.module, shape)
    whole = FragmentRef(source.name, None, None)
    recipe = Recipe.chain((source.ref,), (whole,), num_features=graph.output_features(), input_size=shape)
    network = assemble(recipe, {source.name: graph})
    head = RidgeHead(network.num_features, len(NAMES))
    with torch.no_grad():
        features = network(digits(30, SIZE, classes=len(NAMES))[0][:, : shape[0]])
        nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
        head.weight /= (features.std(0) + 1e-3) * network.num_features**0.5
        head.bias.copy_(-head.weight @ features.mean(0))
    model = StitchedClassifier(num_classes=len(NAMES), class_names=names)
    model.install(network, head)
    return model


def small_source(channels: int) -> Source:
    parts = [nn.Conv2d(channels, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return live(nn.Sequential(*parts), "small", size=SIZE, channels=channels)


def save_checkpoint(model: StitchedClassifier, path: Path) -> Path:
    trainer = quiet_trainer(path.parent)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return path


def quiet_trainer(folder: Path, **options: object) -> pl.Trainer:
    settings = {"max_epochs": 0, "logger": False, "accelerator": "cpu", "enable_checkpointing": False} | options
    return pl.Trainer(
        **settings,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )


def write_digits(folder: Path, count: int, *, first: int = 0) -> Path:
    """Grey 8 x 8 PNG files of handwritten digits, one folder for each of the classes in NAMES."""
    images, labels = load_digits(n_class=len(NAMES), return_X_y=True)
    for index, (image, label) in enumerate(zip(images[first : first + count], labels[first:], strict=False)):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray((image.reshape(8, 8) * 15.9).astype("uint8")).save(folder / NAMES[label] / f"{index:03}.png")
    return folder
