"""Which of the two Lightning packages this process uses; both hold classes of the same names that do not mix."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING

from lightning_stitch.errors import StitchError

_PACKAGES = ("pytorch_lightning", "lightning.pytorch")
_VARIABLE = "LIGHTNING_STITCH_NAMESPACE"


def _choose(wanted: str | None, loaded: Iterable[str]) -> str:
    """The package that the environment variable names; without it the one imported first; else pytorch_lightning."""
    if wanted:
        for package in _PACKAGES:
            if wanted in (package, package.split(".")[0]):
                return package
        raise StitchError(f"{_VARIABLE} is {wanted!r}; set it to 'pytorch_lightning' or 'lightning', or unset it.")
    return next((name for name in loaded if name in _PACKAGES), _PACKAGES[0])


# sys.modules keeps the order of import.
NAMESPACE = _choose(os.environ.get(_VARIABLE), list(sys.modules))

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    try:
        pl = import_module(NAMESPACE)
    except ModuleNotFoundError as error:
        raise StitchError(
            f"lightning_stitch should use {NAMESPACE!r}, but it cannot be imported: {error}. Install it, or set "
            f"{_VARIABLE} to the Lightning package that is installed."
        ) from error


def isolate_rng() -> AbstractContextManager[None]:
    """Lightning's context that restores the global random states of Python, NumPy and torch at its end."""
    context: AbstractContextManager[None] = import_module(f"{NAMESPACE}.utilities.seed").isolate_rng()
    return context


def check_same_namespace(obj: object, what: str) -> None:
    """Refuse a Trainer, LightningModule or LightningDataModule of the other Lightning package.

    Args:
        obj: The object; one that belongs to neither package passes.
        what: What the user calls it ("datamodule", "Trainer").

    Raises:
        StitchError: If it comes from the other package; the message names both.
    """
    homes = {base.__module__.split(".")[0] for base in type(obj).__mro__}
    other = next(package for package in _PACKAGES if package != NAMESPACE)
    if other.split(".")[0] in homes and NAMESPACE.split(".")[0] not in homes:
        raise StitchError(
            f"The {what} ({type(obj).__name__}) comes from {other!r}, but lightning_stitch uses {NAMESPACE!r} in this "
            f"process, and the two do not mix. Import everything from {NAMESPACE!r}; or import {other!r} before "
            f"lightning_stitch, or set {_VARIABLE}={other.split('.')[0]}."
        )
