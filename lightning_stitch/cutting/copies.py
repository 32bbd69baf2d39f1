"""Copies of networks: deep ones of what has run already, ones that share all but some tensors, graphs of twins."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

_Module = TypeVar("_Module", bound=nn.Module)


def copied(module: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """A deep copy of a module.

    What it has computed and kept with its history of gradients (a cache of LeViT's, a weight of the older
    `torch.nn.utils.weight_norm`), which `copy.deepcopy` refuses, is copied without that history.

    Args:
        module: What to copy.
        memo: As for `copy.deepcopy`: what several copies have in common is copied once if they get the same memo.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        for x in _tensors(vars(part)):
            if not x.is_leaf and id(x) not in memo:
                memo[id(x)] = x.detach().clone()
    return copy.deepcopy(module, memo)


def reference_tensor(module: nn.Module) -> Tensor:
    """A tensor of the device and dtype that a module computes in: its first parameter or buffer, if it has any."""
    return next(chain(module.parameters(), module.buffers()), torch.empty(()))


def with_tensors(fragment: fx.GraphModule, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The fragment with some tensors of its own; it shares all layers that have none of them.

    Args:
        fragment: The fragment, which stays as it is.
        tensors: By name ("blocks.2.bn1.running_mean"); names that the fragment does not have are left out.
    """
    called = {str(node.target) for node in fragment.graph.nodes if node.op == "call_module"}
    owners = {name: _caller(name, called) for name in tensors}
    changed = {name: owner for name, owner in owners.items() if owner is not None}
    if not changed:
        return fragment
    graph = fx.Graph()
    graph.output(graph.graph_copy(fragment.graph, {}))
    variant = fx.GraphModule(fragment, graph, class_name="Fragment")
    for owner in dict.fromkeys(changed.values()):
        variant.add_submodule(owner, copied(fragment.get_submodule(owner)))
    for name in changed:
        layer, _, last = name.rpartition(".")
        _set_tensor(variant.get_submodule(layer), last, tensors[name])
    return variant.train(fragment.training)


def with_network(traced: fx.GraphModule, network: nn.Module, twin: nn.Module) -> fx.GraphModule | None:
    """The graph of a network over another one that only has other weights.

    Args:
        traced: The trace of `network`; the graph itself, which is not copied, is from now on the result's.
        network: The network that was traced; on the meta device, its weights stand for any.
        twin: The other network.

    Returns:
        None where the trace may depend on more than both have in common.
    """
    if not _are_twins(network, twin) or _holds_meta_device(traced.graph):
        return None
    root = copy.copy(twin)
    root._modules = dict(twin._modules)
    for node in traced.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        try:
            operator.attrgetter(str(node.target))(root)
        except AttributeError:
            if node.op == "get_attr":
                return None  # a tensor that was made while the network was traced
            # A function that stands for a module: it has no weights.
            root.add_module(str(node.target), traced.get_submodule(str(node.target)))
    return fx.GraphModule(root, traced.graph, class_name=type(twin).__name__)


def _are_twins(network: nn.Module, twin: nn.Module) -> bool:
    """Whether two networks are the same to a trace but for the values of tensors that are on the meta device in one."""
    parts, counterparts = dict(network.named_modules()), dict(twin.named_modules())
    if parts.keys() != counterparts.keys():
        return False
    for path, part in parts.items():
        counterpart = counterparts[path]
        if type(part) is not type(counterpart) or _plain_attributes(part) != _plain_attributes(counterpart):
            return False
        tensors, twins = ({**x._parameters, **x._buffers} for x in (part, counterpart))
        if tensors.keys() != twins.keys():
            return False
        if not all(_may_be_same(x, twins[name]) for name, x in tensors.items()):
            return False
    return True


def _may_be_same(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    return (x.shape, x.dtype) == (y.shape, y.dtype) and (x.is_meta or (x.device == y.device and torch.equal(x, y)))


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module's Python may decide by: its attributes that are numbers, words, or tuples and lists of such."""
    return {name: value for name, value in vars(module).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _holds_meta_device(graph: fx.Graph) -> bool:
    """Whether a trace was told the device of an outline, where what it outlines will be elsewhere."""
    devices: list[torch.device] = []
    for node in graph.nodes:
        for value in (*node.args, *node.kwargs.values()):
            map_aggregate(value, lambda x: devices.append(x) if isinstance(x, torch.device) else None)
    return any(device.type == "meta" for device in devices)


def _caller(name: str, called: set[str]) -> str | None:
    """The layer that a fragment calls and that a tensor is part of, perhaps of a layer inside of it."""
    owner = name.rpartition(".")[0]
    while owner and owner not in called:
        owner = owner.rpartition(".")[0]
    return owner or None


def _set_tensor(layer: nn.Module, name: str, x: Tensor) -> None:
    old = getattr(layer, name)
    new = x.detach().to(old.device if old is not None else x.device).clone()
    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad) if name in layer._parameters else new)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
