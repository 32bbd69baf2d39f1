"""A network stitched to itself at each of its cuts, with rows enough, gives back its own logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from doubles.pools import references
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from lightning_stitch import CalibrationSettings, Pool, Preprocessing, Source, load_source
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.space import SearchSpace


def live(network: nn.Module, size: int, *, fixed_size: bool = False) -> Source:
    preprocessing = Preprocessing((3, size, size), (0.5,) * 3, (0.25,) * 3, fixed_size=fixed_size)
    return load_source(network, name="live", preprocessing=preprocessing)


def swin() -> Source:
    network = SwinTransformer(img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=9)
    return live(network, 64, fixed_size=True)


SOURCES: dict[str, tuple[Callable[[], Source], int]] = {
    "CNN": (lambda: load_source("test_resnet", pretrained=False), 128),
    "ViT": (lambda: load_source("test_vit", pretrained=False), 96),
    "ViT with registers": (lambda: load_source("test_vit4", pretrained=False), 128),
    "Swin": (swin, 96),
    "hybrid": (lambda: live(timm.create_model("mobilevit_xxs", num_classes=9), 64), 400),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_network_stitched_to_itself_everywhere_reproduces_its_logits(kind: str) -> None:
    make, num_images = SOURCES[kind]
    torch.manual_seed(0)
    source = make()
    _, *size = source.preprocessing.input_size
    settings = CalibrationSettings(rows_per_image=64, until="output")
    pool = Pool([source], (3, *size), settings=settings)
    pool.calibrate(torch.rand(num_images, 3, *size).split(32))
    costs = CompositionCosts(pool.parts, bias=True, max_fragments=2)
    _, stitched = references(SearchSpace(pool.calibration.sources, settings, costs=costs, ridge=0.0))
    assert len(stitched.recipe.stitches) == len(pool.parts[0].cuts) >= 5
    network, images = pool.assemble(stitched), torch.rand(8, 3, *size)
    with torch.inference_mode():
        expected = source.module(pool.parts[0].preprocess(images))
        error = (network(images) - expected).norm()
    assert error < 1e-3 * expected.norm()
    # Random networks say much the same of every image; what differs is to be reproduced, too.
    assert error < 1e-2 * (expected - expected.mean(0)).norm()
