"""What a module or data module does for searches where waiting has no time limit: in its `prepare_data`."""

from __future__ import annotations

from lightning_stitch._lightning import pl


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
