"""Images and rows that tests compute with, and how far one tensor is from another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Images that share nothing: uniform in [0, 1]."""
    return torch.rand(*shape, generator=seeded(seed))


def digits(count: int, size: int, *, first: int = 0, classes: int = 10) -> tuple[Tensor, Tensor]:
    """Handwritten digits as (count, 3, size, size) in [0, 1], and their labels."""
    found = load_digits()
    chosen = torch.tensor(found.target < classes).nonzero().flatten()[first : first + count]
    images = torch.tensor(found.images[chosen.numpy()] / 16, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    resized = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return resized.clamp(0, 1), torch.tensor(found.target[chosen.numpy()])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(x: Tensor, y: Tensor) -> float:
    """Relative to the second."""
    return float((x - y).detach().norm() / y.detach().norm())


def related(n: int, cx: int, cy: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two activations that share part of what they say."""
    common = normal(n, 3, seed=seed)
    x = common @ normal(3, cx, seed=seed + 1) + 0.5 * normal(n, cx, seed=seed + 2)
    y = common @ normal(3, cy, seed=seed + 3) + 0.5 * normal(n, cy, seed=seed + 4)
    return x, y


@contextmanager
def largest_made() -> Iterator[list[int]]:
    """Numbers of each tensor that is made meanwhile."""
    sizes: list[int] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            tensors = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            # A view makes nothing.
            sizes.extend(x.numel() for x in tensors if x.untyped_storage().data_ptr() not in given)
            return result

    with Recorder():
        yield sizes
