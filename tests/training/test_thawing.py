from __future__ import annotations

from typing import Any

import pytest
import torch
from doubles.pools import composed
from torch import nn

from lightning_stitch import StitchedNetwork, StitchError
from lightning_stitch.training.thawing import (
    STAGES,
    copy_eval_buffers,
    parameter_groups,
    parse_schedule,
    put_back,
    thaw,
)

CNN, NET = "test_resnet", "test_efficientnet"
# By where the stitch's numbers are: the fragments, what holds it, and what is next to it.
EXPLICIT = [(CNN, None, "conv1.1"), (NET, "blocks.0.0.bn1", None)]
PRODUCER = [(CNN, None, "conv1.3"), (NET, "blocks.0.0.bn1", None)]
CONSUMER = [(CNN, None, "conv1.1"), (NET, "blocks.1.0.se", None)]
RESIDUAL = [(CNN, None, "layer1"), (CNN, "layer2", None)]
STITCHES = {
    "explicit": (
        EXPLICIT,
        {"entries.1.weight", "entries.1.bias"},
        {"fragments.0.conv1.0", "fragments.0.conv1.1", "fragments.1.blocks.1.0.conv_exp"},
    ),
    "folded into the layer before": (PRODUCER, {"fragments.0.conv1.3.weight", "fragments.0.conv1.3.bias"}, None),
    "folded into the layer behind": (
        CONSUMER,
        {"fragments.1.blocks.1.0.conv_pwl.weight", "fragments.1.blocks.1.0.conv_pwl.bias"},
        {"fragments.0.conv1.0", "fragments.0.conv1.1"},
    ),
    "between residual blocks": (
        RESIDUAL,
        {"entries.1.weight", "entries.1.bias"},
        # the skip of layer1 holds no layer, that of layer3 does
        {"fragments.0.layer1.0.conv2", "fragments.0.layer1.0.bn2"}
        | {"fragments.1.layer3.0.conv1", "fragments.1.layer3.0.downsample.1"},
    ),
}


def mobile(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def head_of(network: StitchedNetwork) -> nn.Linear:
    return nn.Linear(network.num_features, 3)


@pytest.mark.parametrize("thawed", ["head", {0: "head", 3: "stitches", 6: "all"}, {"6": "all", "0": "neighbours"}])
def test_a_schedule_is_in_the_order_of_its_epochs(thawed: Any) -> None:
    schedule = parse_schedule(thawed)
    assert list(schedule) == sorted(schedule)
    assert schedule[0] == {"head": "head", 2: "neighbours", 3: "head"}[thawed if thawed == "head" else len(thawed)]


@pytest.mark.parametrize(
    ("thawed", "words"),
    [
        ("heads", r"thaw names \['heads'\]; what can be thawed is \['head', 'stitches', 'neighbours', 'all'\]"),
        ({0: "head", 2: "tail"}, r"thaw names \['tail'\]"),
        ({1: "head"}, r"does not say what trains in epoch 0; begin with \{0: 'head', ...\}"),
        ({}, "does not say what trains in epoch 0"),
        ({-1: "head"}, "give one of"),
        ({0.5: "head"}, "give one of"),
        (["head"], r"thaw is \['head'\]; give one of"),
    ],
)
def test_what_is_no_schedule_is_refused(thawed: Any, words: str) -> None:
    with pytest.raises(StitchError, match=words):
        parse_schedule(thawed)


@pytest.mark.parametrize("case", STITCHES)
def test_each_stage_thaws_the_layers_of_the_one_before_and_its_own(case: str) -> None:
    fragments, holders, neighbours = STITCHES[case]
    network = composed(*fragments)
    head = head_of(network)
    found = {}
    for stage in STAGES:
        thaw(network, head, stage)
        found[stage] = mobile(network)
        assert mobile(head) == {"weight", "bias"}
    assert found["head"] == set()
    assert found["stitches"] == holders
    assert found["all"] == {name for name, _ in network.named_parameters()}
    assert found["stitches"] < found["neighbours"] < found["all"]
    if neighbours is not None:
        assert {name.rpartition(".")[0] for name in found["neighbours"] - holders} == neighbours


def test_a_position_embedding_next_to_a_stitch_is_thawed_with_it() -> None:
    network = composed((CNN, None, "layer1"), ("test_vit", "patch_embed", None))
    thaw(network, head_of(network), "neighbours")
    thawed = {name for name in mobile(network) if name.startswith("fragments.1")}
    assert thawed >= {
        "fragments.1.pos_embed",
        "fragments.1.blocks.0.attn.qkv.weight",
        "fragments.1.blocks.0.norm1.bias",
    }
    assert not any("mlp" in name or "blocks.1" in name for name in thawed)


def test_a_sum_of_two_branches_has_two_last_layers() -> None:
    network = composed((CNN, None, "layer2"), (NET, "blocks.2", None))
    thaw(network, head_of(network), "neighbours")
    before = {name.rpartition(".")[0] for name in mobile(network) if name.startswith("fragments.0")}
    assert before == {f"fragments.0.layer2.0.{name}" for name in ("conv2", "bn2", "downsample.1", "downsample.2")}


def test_a_network_without_stitches_has_nothing_between_head_and_all() -> None:
    network = composed((CNN, None, None))
    for stage in ("stitches", "neighbours"):
        thaw(network, head_of(network), stage)
        assert mobile(network) == set()


def test_thawing_says_whether_anything_changed_and_leaves_no_gradient_behind() -> None:
    network = composed(*EXPLICIT)
    head = head_of(network)
    assert not thaw(network, head, "all")
    head(network(torch.rand(2, 3, 32, 32))).sum().backward()
    assert thaw(network, head, "stitches")
    assert not thaw(network, head, "stitches")
    assert all(parameter.grad is None for parameter in network.fragments.parameters())
    assert head.weight.grad is not None


@pytest.mark.parametrize("train_mode", [True, False])
def test_frozen_layers_are_in_eval_mode_and_thawed_ones_in_train_mode_only_if_asked(train_mode: bool) -> None:
    network = composed(*EXPLICIT)
    head = head_of(network)
    network.train()
    thaw(network, head, "head", train_mode=train_mode)
    assert not any(module.training for module in network.modules())
    thaw(network, head, "neighbours", train_mode=train_mode)
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert {name for name, norm in norms.items() if norm.training} == ({"fragments.0.conv1.1"} if train_mode else set())
    thaw(network, head, "all", train_mode=train_mode)
    assert all(norm.training == train_mode for norm in norms.values())


def test_thawed_layers_that_the_user_put_in_train_mode_stay_there() -> None:
    network = composed(*EXPLICIT)
    network.train()
    thaw(network, head_of(network), "all")
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize("case", STITCHES)
def test_groups_hold_every_parameter_once_whatever_is_thawed(case: str) -> None:
    network = composed(*STITCHES[case][0])
    head = head_of(network)
    thaw(network, head, "head")
    groups = parameter_groups(network, head, backbone_lr_factor=0.1, fragment_lr_decay=0.5)
    assert [group["name"] for group in groups] == ["head", "stitch_2", "fragment_1", "fragment_2"]
    assert [group["lr_factor"] for group in groups] == [1, 1, pytest.approx(0.05), pytest.approx(0.1)]
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len({*grouped})
    assert {*grouped} == {*head.parameters(), *network.parameters()}
    named = dict(network.named_parameters())
    assert {*groups[1]["params"]} == {named[name] for name in STITCHES[case][1]}


def test_what_fragments_share_is_in_the_first_ones_group() -> None:
    network = composed((CNN, None, "layer2"), (CNN, "layer1", None), share_weights=True)
    groups = {group["name"]: group["params"] for group in parameter_groups(network, nn.Identity())}
    first, second = ({*fragment.parameters()} for fragment in network.fragments)
    assert first & second
    assert first & second <= {*groups["fragment_1"]}
    assert {*groups["fragment_2"]} == second - first
    assert "head" not in groups


@pytest.mark.parametrize("options", [{"backbone_lr_factor": -1.0}, {"fragment_lr_decay": float("nan")}])
def test_a_factor_that_is_none_is_refused(options: dict[str, float]) -> None:
    network = composed(*EXPLICIT)
    with pytest.raises(StitchError, match=f"{next(iter(options))} is .*; give a finite number of at least 0"):
        parameter_groups(network, head_of(network), **options)


def test_buffers_of_layers_in_eval_mode_come_back_and_those_in_train_mode_stay_moved() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2))
    copies = copy_eval_buffers(network)
    for norm in network:
        assert isinstance(norm, nn.BatchNorm1d)
        norm.running_mean = torch.full((2,), 7.0)
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 5
    put_back(network, copies)
    eval_norm, train_norm = network
    assert eval_norm.running_mean.tolist() == [0, 0]
    assert eval_norm.num_batches_tracked == 0
    assert train_norm.running_mean.tolist() == [7, 7]
    assert train_norm.num_batches_tracked == 5
