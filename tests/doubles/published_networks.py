"""Small networks of every kind that can be saved and published, and images for them."""

from __future__ import annotations

import copy
from functools import cache

import torch
from doubles.pools import calibrated_pool, composed
from doubles.small_sources import shake
from doubles.tensors import digits, noise
from torch import Tensor, nn

from lightning_stitch import CutGraph, FragmentRef, Recipe, StitchedClassifier, StitchedNetwork, ensemble
from lightning_stitch.heads.head_settings import HeadSettings
from lightning_stitch.networks.network import assemble
from lightning_stitch.sources.source import Source

SIZE = 32
IMAGES = noise(2, 3, SIZE, SIZE, seed=5)
NAMES = ["zero", "one", "two"]
STITCHED = (("test_resnet", None, "layer1"), ("test_convnext", "stages.0", None))
# one fragment twice, each with weights of its own
TWICE = (("test_resnet", None, "layer2"), ("test_resnet", "layer1", None))


@cache
def network(*, twice: bool = False, share_weights: bool = False) -> StitchedNetwork:
    """A stitched network; nothing in it is to be changed."""
    if twice or share_weights:
        return composed(*TWICE, share_weights=share_weights)
    calibrated_pool("test_convnext", "test_resnet")
    return composed(*STITCHED)


def together() -> StitchedNetwork:
    """An ensemble of two networks that begin alike."""
    pool = calibrated_pool("test_convnext", "test_resnet")
    members = [pool.stitch(STITCHED), pool.stitch([STITCHED[0], ("test_convnext", "stages.1", None)])]
    return ensemble(pool, members, [digits(30, SIZE, classes=3)], num_classes=3)


def classifier(head: str = "ridge", task: str = "multiclass", *, kind: str = "network") -> StitchedClassifier:
    """A classifier with a head fitted on a few digits."""
    names = None if head in ("class_map", "none") or task == "regression" else NAMES
    if kind == "ensemble":
        model = StitchedClassifier(num_classes=3, class_names=NAMES)
        model.install(together(), nn.Identity())
        return model.eval()
    images, labels = digits(30, SIZE, classes=3)
    targets = {
        "multiclass": labels,
        "multilabel": nn.functional.one_hot(labels, 3),
        "regression": labels.float(),
    }[task]
    settings = {"name": head, "classes": {"few": [0], "many": "1-9"}} if head == "class_map" else head
    num_classes = {"class_map": None, "none": None}.get(head, 1 if task == "regression" else 3)
    model = StitchedClassifier(num_classes=num_classes, head=settings, task=task, class_names=names)
    with torch.no_grad():
        features = network()(images)
    model.install(
        copy.deepcopy(network()),
        HeadSettings.of(settings, task=task, num_classes=num_classes).fit(features, targets)[0],
    )
    return model.eval()


def outputs(module: nn.Module) -> Tensor:
    """What it gives for `IMAGES`."""
    with torch.no_grad():
        return module(IMAGES)


def own_factory(width: int = 8) -> nn.Module:
    """A network that neither timm nor torchvision has, random each time."""
    layers = [nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    return shake(nn.Sequential(*layers), int(torch.randint(1000, ()).item()))


def source_network(source: Source) -> StitchedNetwork:
    """A network of one whole source."""
    size = source.preprocessing.input_size
    graph = CutGraph(source.module, size)
    whole = FragmentRef(source.name, None, None)
    recipe = Recipe.chain((source.ref,), (whole,), num_features=graph.output_features(), input_size=size)
    return assemble(recipe, {source.name: graph})
