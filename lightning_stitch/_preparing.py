"""What a module or data module does for searches where waiting has no time limit: in its `prepare_data`."""

from __future__ import annotations

from lightning_stitch._lightning import pl


def prepare_searches(trainer: pl.Trainer) -> None:
    """Let the callbacks that search check and fetch their sources; Lightning calls this once for each node."""
    for callback in getattr(trainer, "callbacks", []):
        prepare = getattr(callback, "prepare_sources", None)
        if prepare is not None:
            prepare(trainer)
