"""Outlines, which are built without weights: the trace of one serves the network itself."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, fx, nn

from lightning_stitch.cutting.tracing import FUNCTIONAL_DROPOUT, names_device


def with_network(traced: fx.GraphModule, outline: nn.Module, network: nn.Module) -> fx.GraphModule | None:
    """The trace of an outline over the network that it outlines, built alike but with weights; they share the graph.

    None where the trace may hold what the network has otherwise: another structure, a number, a device.
    """
    tensors, counterparts = (
        dict(chain(x.named_parameters(remove_duplicate=False), x.named_buffers(remove_duplicate=False)))
        for x in (outline, network)
    )
    alike = str(outline) == str(network) and tensors.keys() == counterparts.keys()
    if not alike or not all(_stands_for(x, counterparts[name]) for name, x in tensors.items()):
        return None
    if any(map(names_device, traced.graph.nodes)):
        return None
    root = copy.copy(network)
    dropouts = {name: part for name, part in traced.named_children() if name.startswith(FUNCTIONAL_DROPOUT)}
    root._modules = {**network._modules, **dropouts}
    try:
        return fx.GraphModule(root, traced.graph, class_name=type(network).__name__)
    except AttributeError:
        return None  # it reads a tensor that was made while the outline was traced


def _stands_for(x: Tensor, y: Tensor) -> bool:
    """Whether a trace with one tensor is one with the other: a trace may read the numbers of what has any."""
    return (x.shape, x.dtype) == (y.shape, y.dtype) and (x.is_meta or (x.device == y.device and torch.equal(x, y)))
