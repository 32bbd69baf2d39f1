"""Fragments made fast for inference: BatchNorm folded into the convolution before it, convolutions channels-last."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval

from lightning_stitch.cutting.copies import copy_module

# Of others, as of those that standardise their weights, the layer's weight is not what it multiplies by.
_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, BatchNormAct2d)


@torch.inference_mode(False)
@torch.no_grad()
def fuse(fragment: fx.GraphModule) -> fx.GraphModule:
    """What a fragment computes in eval mode, to rounding, faster: with weights of its own, not to be trained on.

    A BatchNorm that alone reads a convolution is folded into it, and convolutions' weights lie channels-last, which
    what they give then does, too. A fragment without such a pair is returned as it is.
    """
    pairs = _pairs(fragment)
    if not pairs:
        return fragment
    graph = fx.Graph()
    graph.output(graph.graph_copy(fragment.graph, {}))
    fused = fx.GraphModule(fragment, graph, class_name="Fragment")
    for name in _called(fragment):
        layer = fragment.get_submodule(name)
        if type(layer) in _CONVOLUTIONS:
            fused.set_submodule(name, copy_module(layer))
    for convolution, norm in pairs:
        first: Any = fused.get_submodule(convolution)
        second: Any = copy_module(fragment.get_submodule(norm))
        fused.set_submodule(convolution, fuse_conv_bn_eval(first.eval(), second.eval()))
        behind = nn.Sequential(second.drop, second.act) if isinstance(second, BatchNormAct2d) else nn.Identity()
        fused.set_submodule(norm, behind)
    for name in _called(fused):
        layer = fused.get_submodule(name)
        if type(layer) in _CONVOLUTIONS:
            layer.to(memory_format=torch.channels_last).requires_grad_(False)
    return fused


def _called(fragment: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in fragment.graph.nodes if node.op == "call_module"]


def _pairs(fragment: fx.GraphModule) -> list[tuple[str, str]]:
    """Names of convolutions with the BatchNorm that alone reads what they give, each called once."""
    called, pairs = _called(fragment), []
    for node in fragment.graph.nodes:
        if node.op != "call_module" or not isinstance(before := node.args[0] if node.args else None, fx.Node):
            continue
        names = str(before.target), str(node.target)
        if before.op != "call_module" or len(before.users) > 1 or any(called.count(name) > 1 for name in names):
            continue
        first, second = (fragment.get_submodule(name) for name in names)
        kinds = type(first) in _CONVOLUTIONS and type(second) in _NORMS
        if kinds and getattr(second, "running_var", None) is not None and not _has_hooks(first, second):
            pairs.append(names)
    return pairs


def _has_hooks(*layers: nn.Module) -> bool:
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
