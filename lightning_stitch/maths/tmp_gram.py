"""Temporary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def block_gram(x: Tensor) -> Tensor:
    """Temporary."""
    x = x.double()
    x = x - x.mean(0)
    s = x.std(0, correction=0)
    x = torch.where(s > 1e-6, x / s.clamp_min(1e-30), torch.zeros_like(x))
    return x @ x.T / x.shape[1]


class _Fit(NamedTuple):
    strengths: tuple
    predictions: Tensor


def loo_ridge_of_gram(gram: Tensor, targets: Tensor, *, strengths) -> _Fit:
    """Temporary."""
    n = len(gram)
    gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    s, u = torch.linalg.eigh(gram)
    keep = s > s[-1] * n * 2.2e-16
    s, u = s[keep], u[:, keep]
    scale = s.sum().item() / min(n - 1, max(len(s), 1))
    mean = targets.mean(0)
    uy = u.T @ (targets - mean)
    pen = scale * targets.new_tensor(list(strengths))[:, None]
    shr = pen / (s + pen)
    res = targets - mean - u @ uy + torch.einsum("nr,grk->gnk", u, shr[:, :, None] * uy)
    slack = (1 - 1 / n - u.square().sum(1)).clamp_min(0) + shr @ u.square().T
    return _Fit(tuple(strengths), targets - res / slack[:, :, None])
