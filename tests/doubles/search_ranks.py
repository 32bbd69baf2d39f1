"""What each of several ranks does of a search: here, where a spawned process can import it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from doubles.small_sources import donor, images_seen
from doubles.tensors import digits
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from lightning_stitch import CalibrationError, CalibrationSettings, Pool, fit_ridge_head
from lightning_stitch.progress import Silent
from lightning_stitch.search import ALONE, DistributedRanks

IMAGES, LABELS = digits(76, 32, first=20, classes=3)


class _Selection(Dataset):
    """Images of which one rank's may be damaged, or fewer."""

    def __init__(self, rank: int, what: str) -> None:
        self._fails = what == "failure" and rank == 1
        self._count = 50 if what == "other images" and rank == 1 else 60

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self._fails and index == 35:
            raise CalibrationError("the images of rank 1 are damaged")
        return IMAGES[16 + index], LABELS[16 + index]


def run_rank(rank: int, world_size: int, folder: str, scenarios: Sequence[str]) -> None:
    """In each of some scenarios search, fit a head, and write down what was found and how much ran."""
    torch.set_num_threads(1)
    if world_size > 1:
        place = f"file://{folder}/meeting"
        distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=world_size)
    records = {what: _run(rank, world_size, folder, what) for what in scenarios}
    Path(folder, f"{rank}.json").write_text(json.dumps(records))
    if world_size > 1:
        distributed.destroy_process_group()


def _run(rank: int, world_size: int, folder: str, what: str) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if what == "journal of which rank 1 lost its own" and rank == 1:
        for file in Path(folder, "journal_1").glob("journal.sqlite*"):
            file.unlink()
    begun = time.perf_counter()
    source = donor("test_resnet")
    pool = Pool([source, donor("test_efficientnet")], (3, 32, 32), settings=CalibrationSettings("stages"))
    pool.ranks = ALONE if world_size == 1 else DistributedRanks(torch.device("cpu"))
    for part in pool.parts:
        part._fused = part.pieces  # which count the images that they see
    with images_seen(source) as seen:
        try:
            with pool.ranks.together():
                for name, value in _search(pool, rank, folder, what, seen):
                    record[name] = value
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"
    return record | {"images": sum(seen), "seconds": time.perf_counter() - begun}


def _search(pool: Pool, rank: int, folder: str, what: str, seen: list[int]) -> Iterator[tuple[str, Any]]:
    pool.calibrate([IMAGES[:16]])
    yield "calibration", sum(seen)
    options: dict[str, Any] = {"journal": Path(folder, f"journal_{rank}")} if what.startswith("journal") else {}
    candidates = 3 if what == "other candidates" and rank == 1 else 6
    loader = DataLoader(_Selection(rank, what), batch_size=9)
    result = pool.search(None, loader, max_candidates=candidates, **options)
    yield "result", [(r.candidate.recipe.path, r.candidate.kind, r.scores) for r in result.ranked]
    (outcome,), labels = pool.outcomes([result.best.candidate], loader, progress=Silent())
    assert labels is not None
    head, _ = fit_ridge_head(outcome.features, labels, num_classes=3, blocks=outcome.blocks)
    yield "head", head.weight.double().sum().item()
