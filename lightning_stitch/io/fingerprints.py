"""Hashes of tensors and settings, and how two descriptions differ, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from lightning_stitch.io.tensor_files import raw_bytes


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def tensors_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors in a row, wherever one ends and the next begins, so that batches do not matter."""
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(raw_bytes(x))
    return f"sha256:{digest.hexdigest()}"


def key_of(*parts: Any) -> str:
    """A short name for some plain values, the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def differences(there: Any, here: Any, path: str = "") -> list[str]:
    """Where two plain values differ, in words, by the dotted names of their entries."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        found = []
        for key in dict.fromkeys([*there, *here]):
            found += differences(there.get(key), here.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if there == here else [f"{path}: {_shown(there)} there, {_shown(here)} here"]


def in_words(found: Sequence[str], most: int = 5) -> str:
    """The first few differences."""
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


def _shown(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages, by name; without those that are not installed."""
    installed = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
