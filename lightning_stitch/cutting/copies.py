"""Copies of networks: deep ones of what has run already, and ones that share all but some tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from itertools import chain
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

_Module = TypeVar("_Module", bound=nn.Module)


def copy_module(module: _Module, memo: dict[int, Any] | None = None) -> _Module:
    """A deep copy of a module.

    What it has computed and kept with its history of gradients (a cache of LeViT's, a weight of the older
    `torch.nn.utils.weight_norm`), which `copy.deepcopy` refuses, is copied without that history.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        for x in tree_leaves(vars(part)):
            if isinstance(x, Tensor) and not x.is_leaf and id(x) not in memo:
                memo[id(x)] = x.detach().clone()
    return copy.deepcopy(module, memo)


def copy_structure(module: _Module, parameters: Mapping[int, nn.Parameter] | None = None) -> _Module:
    """A copy of modules, their buffers and the containers in their attributes, to run them as if nobody had.

    Parameters are shared, or those that `parameters` has by the id of the module's own; so is what cannot be copied (a
    lock, an open file).
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for x in tree_leaves(vars(part)):
            if isinstance(x, nn.Parameter) or not isinstance(x, nn.Module | Tensor | set | partial | MethodType):
                memo[id(x)] = x
    return copy_module(module, {**memo, **(parameters or {})})


def reference_tensor(module: nn.Module) -> Tensor:
    """A tensor of the device and dtype that a module computes in: its first parameter or buffer, if it has any."""
    return next(chain(module.parameters(), module.buffers()), torch.empty(()))


def with_tensors(fragment: fx.GraphModule, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """A fragment with some tensors of its own, by name; it shares all layers that have none of them.

    Names that the fragment does not have are left out.
    """
    called = {str(node.target) for node in fragment.graph.nodes if node.op == "call_module"}
    changed = {name: owner for name in tensors if (owner := _find_caller(name, called)) is not None}
    if not changed:
        return fragment
    graph = fx.Graph()
    graph.output(graph.graph_copy(fragment.graph, {}))
    variant = fx.GraphModule(fragment, graph, class_name="Fragment")
    for owner in dict.fromkeys(changed.values()):
        variant.add_submodule(owner, copy_module(fragment.get_submodule(owner)))
    for name in changed:
        layer, _, last = name.rpartition(".")
        _set_tensor(variant.get_submodule(layer), last, tensors[name])
    return variant.train(fragment.training)


def _find_caller(name: str, called: set[str]) -> str | None:
    owner = name.rpartition(".")[0]
    while owner and owner not in called:
        owner = owner.rpartition(".")[0]
    return owner or None


def _set_tensor(layer: nn.Module, name: str, x: Tensor) -> None:
    old = getattr(layer, name)
    new = x.detach().to(old.device if old is not None else x.device).clone()
    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad) if name in layer._parameters else new)
