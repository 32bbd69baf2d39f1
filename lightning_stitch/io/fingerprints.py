"""Hashes of tensors and settings, and how two descriptions differ, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def tensors_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors in a row, wherever one ends and the next begins, so that batches do not matter."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def key_of(*parts: Any) -> str:
    """A short name for some plain values, the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Where two plain values differ, in words, by the dotted names of their entries."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        keys = dict.fromkeys([*before, *now])
        nested = (differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key)) for key in keys)
        return list(chain.from_iterable(nested))
    return [] if before == now else [f"{path}: {_shorten(before)} there, {_shorten(now)} here"]


def in_words(changes: Sequence[str], most: int = 5) -> str:
    """The first few differences."""
    more = f"; and {len(changes) - most} more" if len(changes) > most else ""
    return "; ".join(changes[:most]) + more


def _shorten(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages, by name; without those that are not installed."""
    installed = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
