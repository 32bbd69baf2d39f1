"""Which of the two Lightning packages this process uses; both hold classes of the same names that do not mix."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning_stitch.errors import StitchError

_PACKAGES = ("pytorch_lightning", "lightning.pytorch")
_VARIABLE = "LIGHTNING_STITCH_NAMESPACE"


def _choose(wanted: str | None, loaded: Iterable[str]) -> str:
    """The package that the environment variable names; else the one imported first; else the first one installed."""
    if wanted:
        for package in _PACKAGES:
            if wanted in (package, package.split(".")[0]):
                return package
        raise StitchError(f"{_VARIABLE} is {wanted!r}; set it to 'pytorch_lightning' or 'lightning', or unset it.")
    imported = (name for name in loaded if name in _PACKAGES)
    return next(imported, None) or next((name for name in _PACKAGES if find_spec(name.split(".")[0])), _PACKAGES[0])


# sys.modules keeps the order of import.
NAMESPACE = _choose(os.environ.get(_VARIABLE), list(sys.modules))
_OTHER = next(name for name in _PACKAGES if name != NAMESPACE)
_MEND = (
    f"Import everything from {NAMESPACE!r}; or import {_OTHER!r} before lightning_stitch, or set "
    f"{_VARIABLE}={_OTHER.split('.')[0]}."
)

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


def check_same_namespace(part: object, what: str) -> None:
    """Refuse a Trainer, LightningModule or LightningDataModule of the other Lightning package; others pass.

    Callbacks ask it in their `setup`, as a Trainer takes callbacks of either package. `what` is the user's word for it.

    Raises:
        StitchError: If it comes from the other package; the message names both.
    """
    homes = {base.__module__.split(".")[0] for base in type(part).__mro__}
    if _OTHER.split(".")[0] in homes and NAMESPACE.split(".")[0] not in homes:
        raise StitchError(
            f"The {what} ({type(part).__name__}) comes from {_OTHER!r}, but lightning_stitch uses {NAMESPACE!r} in "
            f"this process, and the two do not mix. {_MEND}"
        )


def explain_both_loaded() -> str | None:
    """Whose classes this library's are, where both packages are loaded; None: only one is."""
    if _OTHER not in sys.modules:
        return None
    return (
        f"{' and '.join(map(repr, _PACKAGES))} are both loaded, and each refuses the other's modules and data modules. "
        f"lightning_stitch uses {NAMESPACE!r} in this process. {_MEND}"
    )


def warn_where_both_are_loaded() -> None:
    """Say whose classes this library's are, where both packages are loaded and nothing says which one is meant."""
    if (explanation := explain_both_loaded()) is not None and not os.environ.get(_VARIABLE):
        warnings.warn(f"{explanation} Setting the variable ends this warning.", stacklevel=3)


@runtime_checkable
class SourcePreparer(Protocol):
    """A callback that composes a network out of sources, which are fetched while Lightning prepares the data."""

    def look_up_sources(self, trainer: pl.Trainer) -> None:
        """Refuse sources that cannot be found, before images are downloaded."""

    def prepare_sources(self, trainer: pl.Trainer) -> None:
        """Check and fetch the sources; called once for each node."""
