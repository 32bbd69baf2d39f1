"""The checkpoint that a Trainer is about to restore, read before the module is built."""

from __future__ import annotations

import inspect
from typing import Any

from lightning_stitch._lightning import pl


def is_resumed(trainer: pl.Trainer) -> bool:
    """Whether this run is known to restore a checkpoint."""
    return bool(_arguments(trainer).get("ckpt_path"))


def resumed_checkpoint(trainer: pl.Trainer) -> dict[str, Any] | None:
    """The checkpoint that this run will restore, tensors on the CPU; None: none, or it cannot be known."""
    arguments = _arguments(trainer)
    path = arguments.get("ckpt_path")
    if not path:
        return None
    options = {"weights_only": arguments.get("weights_only")}
    found: dict[str, Any] = trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="cpu", **options)
    return found


def _arguments(trainer: pl.Trainer) -> dict[str, Any]:
    """The arguments of `Trainer._run`, where a run is on its way.

    While callbacks are set up, Lightning (2.6) has the path there alone; `trainer.ckpt_path` is that of the run before.
    Where this stops being so, a search runs for nothing before the module takes the checkpoint's structure.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}
