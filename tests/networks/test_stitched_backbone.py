from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from doubles.pools import composed
from doubles.tensors import digits
from torch import nn

from lightning_stitch import RecipeError, StitchedBackbone, StitchError
from lightning_stitch.networks import backbone as backbones_module
from lightning_stitch.training.backbone_place import fit_width

MEAN = (0.4, 0.5, 0.6)


@pytest.mark.parametrize("width", [5, 8, 12])
def test_another_width_keeps_what_it_can_of_the_features(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 8, generator=generator) * torch.arange(1, 9) + 3
    layer = fit_width(features, width)
    if width == 8:
        assert layer is None
        return
    assert layer is not None
    with torch.no_grad():
        found = layer(features)
    assert found.shape == (30, width)
    centred = features - features.mean(0)
    kept = torch.linalg.svdvals(centred)[: min(width, 8)].square().sum()
    torch.testing.assert_close((found - found.mean(0)).square().sum(), kept, rtol=1e-4, atol=0)
    if width > 8:
        assert torch.equal(found[:, :8], features)


@pytest.mark.parametrize("train_mode", [False, True])
def test_the_network_stays_in_eval_mode_unless_it_is_to_follow(train_mode: bool) -> None:
    backbone = StitchedBackbone(train_mode=train_mode)
    backbone.install(composed(("test_resnet", None, None)))
    assert backbone.network is not None
    assert [module.training for module in backbone.network.modules()].count(True) > 0 or not train_mode
    assert any(module.training for module in backbone.network.modules()) == train_mode
    nn.ModuleList([backbone]).train()
    assert any(module.training for module in backbone.network.modules()) == train_mode


def test_examples_in_the_documentation_hold() -> None:
    assert doctest.testmod(backbones_module) == (0, 3)


def test_an_empty_backbone_says_how_to_fill_it() -> None:
    backbone = StitchedBackbone()
    with pytest.raises(StitchError, match=r"has no network yet\. Put FragmentSearch"):
        backbone(torch.zeros(1, 3, 32, 32))
    with pytest.raises(StitchError, match="width of this StitchedBackbone is not known"):
        backbone.num_features  # noqa: B018


@pytest.mark.parametrize(
    "options", [{"mean": MEAN}, {"mean": MEAN, "std": (1.0, 0.0, 1.0)}, {"mean": MEAN, "std": (1.0,)}]
)
def test_mean_and_std_belong_together(options: dict[str, Any]) -> None:
    with pytest.raises(StitchError, match="mean and std belong together"):
        StitchedBackbone(**options)


@pytest.mark.parametrize("width", [None, 40])
def test_a_recipe_given_at_the_start_has_the_structure_that_a_state_dict_fills(width: int | None) -> None:
    network = composed(("test_resnet", None, "layer2"), ("test_efficientnet", "blocks.2", None))
    filled = StitchedBackbone(width)
    filled.install(network, fit_width(torch.randn(50, network.num_features), width) if width else None)
    known = StitchedBackbone(width, recipe=network.recipe.to_dict())
    empty = StitchedBackbone(width)
    shown = digits(4, 32)[0]
    for backbone in (known, empty):
        backbone.load_state_dict(filled.state_dict())
        assert torch.equal(backbone.eval()(shown), filled.eval()(shown))


def test_a_state_of_another_width_is_refused() -> None:
    filled = StitchedBackbone(64)
    with pytest.raises(RecipeError, match="has num_features=40, that of the checkpoint 64"):
        StitchedBackbone(40).load_state_dict(filled.state_dict())
