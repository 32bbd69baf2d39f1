"""Searches in one process leave nothing behind: memory, files, threads, hooks, flags and random numbers."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doubles.fragment_searches import digits, search, trainer
from torch import Tensor
from torch.nn.modules import module as modules

from lightning_stitch import StitchedClassifier

SEARCHES = 20
SETTLED = 3  # by then what is imported or cached once is there
MOST_GROWTH = 64 << 20  # bytes of the process's peak over the searches behind these; the allocator keeps some, in steps


def settings_of_the_process() -> dict[str, Any]:
    return {
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "hooks": [
            len(x) for name, x in sorted(vars(modules).items()) if name.startswith("_global_") and isinstance(x, dict)
        ],
        "call": torch.nn.Module.__call__,
        "getattr": torch.nn.Module.__getattr__,
        "filters": len(logging.getLogger("torch._subclasses.fake_tensor").filters),
        "warnings": list(warnings.filters),
        "directory": os.getcwd(),
    }


def random_numbers() -> tuple[int, ...]:
    """A digest of each generator's state."""
    return (
        hash(random.getstate()),
        hash(np.random.get_state()[1].tobytes()),
        hash(torch.get_rng_state().numpy().tobytes()),
    )


def held() -> dict[str, int]:
    while gc.collect():  # what a finalizer let go of is found by the next one
        pass
    return {
        "tensors": sum(issubclass(type(x), Tensor) for x in gc.get_objects()),
        "modules": sum(issubclass(type(x), torch.nn.Module) for x in gc.get_objects()),
        "descriptors": len(os.listdir("/dev/fd")),
        "threads": threading.active_count(),
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def search_once(folder: Path, number: int) -> None:
    callback = search(compare=number % 2 == 0, journal=folder / "journal" if number % 3 == 0 else None)
    data = digits(train_samples=30, selection_samples=30, test_samples=30)
    trainer(folder, callback).fit(StitchedClassifier(num_classes=3), data)
    assert callback.result is not None


def soak(folder: Path) -> dict[str, Any]:
    """What is other after twenty searches than before, or than after the first few."""
    first, numbers = settings_of_the_process(), random_numbers()
    settled, memory, moved = held(), 0, 0
    for number in range(SEARCHES):
        search_once(folder, number)
        moved += random_numbers() != numbers
        if number == SETTLED:
            settled, memory = held(), peak_bytes()
    last = settings_of_the_process()
    return {
        "settings": [name for name, value in last.items() if value != first[name]],
        "held": {name: count - settled[name] for name, count in held().items() if count != settled[name]},
        "grown": peak_bytes() - memory,
        "moved": moved,
    }


@pytest.mark.slow
def test_twenty_searches_leave_nothing_behind(tmp_path: Path) -> None:
    # In a process of its own: pytest keeps what is logged.
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, environment = [sys.executable, __file__, str(tmp_path)], {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    grown = found.pop("grown")
    assert found == {"settings": [], "held": {}, "moved": 0}
    assert grown < MOST_GROWTH


if __name__ == "__main__":
    found_here = soak(Path(sys.argv[1]))
    Path(sys.argv[1], "found.json").write_text(json.dumps(found_here))
