"""Callbacks that look at the module in their own `setup` must stand behind the one that puts the network there."""

from __future__ import annotations

from typing import Any

from lightning_stitch._lightning import SourcePreparer, pl, source_preparers
from lightning_stitch.errors import StitchError

_LOOK_IN_SETUP = {
    "WeightAveraging": "copies the module",
    "StochasticWeightAveraging": "copies the module",
    "BaseFinetuning": "freezes layers of the module",
    "ModelPruning": "collects parameters of the module",
}


def check_order(trainer: pl.Trainer, search: SourcePreparer) -> None:
    """Refuse a list of callbacks in which one that needs the network stands before the search.

    Two searches for the same place are refused, too: the first would fill it, the second would do nothing.

    Raises:
        StitchError: If there is one; it has the order that works.
    """
    place = search.attribute
    rivals = [preparer for preparer in source_preparers(trainer) if preparer.attribute == place]
    if len(rivals) > 1:
        raise StitchError(
            f"{len(rivals)} callbacks of the Trainer ({', '.join(type(rival).__name__ for rival in rivals)}) search "
            f"a network for the same place ({'the whole module' if place is None else f'attribute={place!r}'}). "
            f"Keep one of them, with the sources of all."
        )
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    before = callbacks[: callbacks.index(search)]
    for kind, does in _LOOK_IN_SETUP.items():
        for callback in before:
            if isinstance(callback, getattr(pl.callbacks, kind)):
                names = [type(search).__name__, *(type(early).__name__ for early in before if _needs_network(early))]
                raise StitchError(
                    f"{type(callback).__name__} stands before {type(search).__name__} among the Trainer's callbacks, "
                    f"but it {does} when it is set up, before there is a network in it. The order that works is "
                    f"callbacks=[{', '.join(names)}]."
                )


def _needs_network(callback: pl.Callback) -> bool:
    return any(isinstance(callback, getattr(pl.callbacks, kind)) for kind in _LOOK_IN_SETUP)
