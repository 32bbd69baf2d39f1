"""Building networks on the meta device, where tensors have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext  # has no public home

_READ_WHILE_BUILDING = frozenset({torch.arange, torch.linspace, torch.tensor})


class _OnMeta(DeviceContext):
    """`torch.device("meta")` in this thread alone; entered as torch's own it would be noted for the whole process."""

    def __init__(self) -> None:
        super().__init__("meta")

    __enter__, __exit__ = TorchFunctionMode.__enter__, TorchFunctionMode.__exit__


class _ListsInMemory(TorchFunctionMode):
    """Keeps short lists of numbers on the CPU: networks like torchvision's RegNets read them to know their widths."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = {"device": "cpu"} if func in _READ_WHILE_BUILDING else {}
        return func(*args, **{**options, **(kwargs or {})})


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, without memory for its tensors; it is called again where it wants to read numbers."""
    try:
        with _OnMeta():
            return build()
    except Exception as error:
        # Torch's words where a number is read that is not there; who builds the network may have wrapped the error.
        if "meta tensor" not in str(error):
            raise
        with _OnMeta(), _ListsInMemory():
            return build()
