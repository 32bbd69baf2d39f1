"""Callbacks that look at the module in their own `setup` must stand behind the one that puts the network there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_stitch._lightning import pl
from lightning_stitch.errors import StitchError

if TYPE_CHECKING:
    from lightning_stitch.training.fragment_search import FragmentSearch

_LOOK_IN_SETUP = {
    pl.callbacks.WeightAveraging: "copies the module",
    pl.callbacks.StochasticWeightAveraging: "copies the module",
    pl.callbacks.BaseFinetuning: "freezes layers of the module",
    pl.callbacks.ModelPruning: "collects parameters of the module",
}


def check_order(trainer: pl.Trainer, search: FragmentSearch) -> None:
    """Refuse a list of callbacks in which one that needs the network stands before the search.

    Two searches for the same place are refused, too: the first would fill it, the second would do nothing.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    place = search.attribute
    rivals = [callback for callback in callbacks if isinstance(callback, type(search)) and callback.attribute == place]
    if len(rivals) > 1:
        raise StitchError(
            f"{len(rivals)} callbacks of the Trainer ({', '.join(type(rival).__name__ for rival in rivals)}) search "
            f"a network for the same place ({'the whole module' if place is None else f'attribute={place!r}'}). "
            f"Keep one of them, with the sources of all."
        )
    early = [
        callback for callback in callbacks[: callbacks.index(search)] if isinstance(callback, tuple(_LOOK_IN_SETUP))
    ]
    if early:
        looks = next(words for kind, words in _LOOK_IN_SETUP.items() if isinstance(early[0], kind))
        names = [type(callback).__name__ for callback in (search, *early)]
        raise StitchError(
            f"{names[1]} stands before {names[0]} among the Trainer's callbacks, but it {looks} when it is set up, "
            f"before there is a network in it. The order that works is callbacks=[{', '.join(names)}]."
        )
