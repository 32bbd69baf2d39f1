"""Deep copies of networks that have run already."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

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


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
