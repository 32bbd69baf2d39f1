"""Which of the two Lightning packages this process uses; both hold classes of the same names that do not mix."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NoReturn

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
    found = (name for name in loaded if name in _PACKAGES)
    return next(found, None) or next((name for name in _PACKAGES if find_spec(name.split(".")[0])), _PACKAGES[0])


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
    if _other().split(".")[0] in homes and NAMESPACE.split(".")[0] not in homes:
        raise StitchError(
            f"The {what} ({type(obj).__name__}) comes from {_other()!r}, but lightning_stitch uses {NAMESPACE!r} in "
            f"this process, and the two do not mix. {_mend()}"
        )


def check_parts(trainer: Any) -> None:
    """Refuse a Trainer of the other package, and one that was given the other package's data module.

    A data module of the other package that is handed over by its place, `trainer.fit(model, data)`, is taken by
    Lightning for a dataloader, so this looks there as well.

    Raises:
        StitchError: As `check_same_namespace`.
    """
    check_same_namespace(trainer, "Trainer")
    check_same_namespace(getattr(trainer, "datamodule", None), "data module")
    for loop in ("fit_loop", "validate_loop", "test_loop", "predict_loop"):
        given = getattr(getattr(getattr(trainer, loop, None), "_data_source", None), "instance", None)
        check_same_namespace(given, "data module")


class CheckedDataModule(pl.LightningDataModule):
    """A data module that says so where a Trainer of the other package is given it."""

    @property
    def trainer(self) -> pl.Trainer | None:
        """The Trainer that this data module is attached to."""
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: pl.Trainer | None) -> None:
        # The first that a data module sees of a run.
        check_same_namespace(trainer, "Trainer")
        self._trainer = trainer

    def __iter__(self) -> NoReturn:
        """Refuse to be taken for a dataloader, as the other package's Trainer does."""
        raise StitchError(
            f"A {type(self).__name__} is a data module, not a dataloader. It belongs to {NAMESPACE!r}, and a Trainer "
            f"of {_other()!r} takes it for one. {_mend()}"
        )


def warn_where_both_are_loaded() -> None:
    """Say whose classes this library's are, where both packages are loaded and nothing says which one is meant.

    A Trainer that is given a module of the other package refuses it before anything of this library runs, and its
    message does not tell why.
    """
    if _other() in sys.modules and NAMESPACE in sys.modules and not os.environ.get(_VARIABLE):
        warnings.warn(
            f"{' and '.join(map(repr, _PACKAGES))} are both loaded, and their Trainers refuse each other's modules. "
            f"lightning_stitch uses {NAMESPACE!r} in this process. {_mend()} Setting the variable ends this warning.",
            stacklevel=3,
        )


def mixture() -> str | None:
    """A hint for an import that was refused on the command line: whose classes it takes; None: only one is loaded."""
    if _other() not in sys.modules:
        return None
    return (
        f"lightning_stitch uses {NAMESPACE!r} in this process, and {_other()!r} is loaded, too. A class of the latter "
        f"is refused. {_mend()}"
    )


def _other() -> str:
    return next(package for package in _PACKAGES if package != NAMESPACE)


def _mend() -> str:
    return (
        f"Import everything from {NAMESPACE!r}; or import {_other()!r} before lightning_stitch, or set "
        f"{_VARIABLE}={_other().split('.')[0]}."
    )


def find_sources_of_searches(trainer: pl.Trainer) -> None:
    """Let the callbacks that search look up the names of their sources, before a data module downloads its images."""
    for callback in getattr(trainer, "callbacks", []):
        find = getattr(callback, "look_up_sources", None)
        if find is not None:
            find(trainer)


def prepare_searches(trainer: pl.Trainer) -> None:
    """Let the callbacks that search check and fetch their sources; Lightning calls this once for each node."""
    for callback in getattr(trainer, "callbacks", []):
        prepare = getattr(callback, "prepare_sources", None)
        if prepare is not None:
            prepare(trainer)
