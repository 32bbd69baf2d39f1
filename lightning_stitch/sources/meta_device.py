"""Building networks on the meta device, where tensors have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_READ_WHILE_BUILDING = frozenset({torch.arange, torch.linspace, torch.tensor})


class _ListsInMemory(TorchFunctionMode):
    """Keeps short lists of numbers on the CPU: networks like torchvision's RegNets read them to know their widths."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in _READ_WHILE_BUILDING:
            options.setdefault("device", "cpu")
        return func(*args, **options)


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, without memory for its tensors.

    Args:
        build: Makes a network; it is called again where it wanted to read numbers.

    Raises:
        Exception: Whatever `build` raises.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception as error:
        # Torch's words where a number is read that is not there; who builds the network may have wrapped the error.
        if "meta tensor" not in str(error):
            raise
        with torch.device("meta"), _ListsInMemory():
            return build()
