"""Tells timm of this package's architecture when timm is imported, be that before or after; imports nothing itself.

timm looks architectures up in its registry and has no entry points, so something must put the name there. Importing
timm for that would make `import lightning_stitch` slow for everyone; so the import of `timm.models` is watched for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_WATCHED = "timm.models"


def install() -> None:
    """Register the architecture now if timm is there, else as soon as it is."""
    if _WATCHED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Finds nothing itself; of `timm.models`, found by the others, it has the registration follow the import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The others' word, for the one module that is watched for."""
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            run = loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            loader.exec_module = run_and_register
        return spec


def _register() -> None:
    import_module("lightning_stitch.networks.timm_entry").register()
