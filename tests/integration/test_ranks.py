from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.fragment_searches import digits, search, trainer
from doubles.small_sources import donor, write_local
from pytorch_lightning.strategies import SingleDeviceStrategy

from lightning_stitch import Budget, StitchedClassifier


def test_a_network_that_differs_from_rank_zeros_only_in_its_latency_is_kept(tmp_path: Path) -> None:
    class SecondRank(SingleDeviceStrategy):
        def broadcast(self, obj: Any, src: int = 0) -> Any:
            is_recipe = isinstance(obj, dict) and "scores" in obj
            return {**obj, "scores": {**obj["scores"], "latency_ms": 1.5}} if is_recipe else obj

    found = []
    for options in ({}, {"strategy": SecondRank(device=torch.device("cpu")), "accelerator": "auto"}):
        found.append(StitchedClassifier(num_classes=3))
        trainer(tmp_path, search(budget=Budget(max_latency_ms=1e6)), **options).fit(found[-1], digits())
    own, second = found
    assert second.recipe is not None
    assert second.recipe.scores["latency_ms"] == 1.5
    assert second.network is not None
    assert second.network.recipe == second.recipe
    torch.testing.assert_close(second.state_dict(), own.state_dict(), rtol=0, atol=0)


FAILING = """
import os, sys
from dataclasses import dataclass
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from lightning_stitch import Beam, StitchedClassifier
from doubles.fragment_searches import SOURCES, digits, search, trainer

IS_SECOND = os.environ.get("LOCAL_RANK") == "1"

@dataclass(frozen=True)
class Full(Beam):
    def __call__(self, space):
        if IS_SECOND:
            raise OSError("the disk of the second rank is full")
        return super().__call__(space)

if __name__ == "__main__":
    options = {"strategy": Full()}
    if sys.argv[3] == "loading":
        options = {"sources": [*SOURCES, "local-dir:" + sys.argv[1] + ("/nothing" if IS_SECOND else "/source")]}
    run = trainer(Path(sys.argv[1]), search(**options), strategy="ddp", devices=2)
    try:
        run.fit(StitchedClassifier(num_classes=3), digits())
    except Exception as error:
        Path(sys.argv[1], f"error{run.global_rank}.txt").write_text(f"{type(error).__name__}: {error}")
        raise
"""


@pytest.mark.slow
@pytest.mark.parametrize("when", ["loading", "composing"])
def test_where_one_rank_fails_the_other_says_so_in_its_words_and_does_not_wait(tmp_path: Path, when: str) -> None:
    write_local(donor("test_vit"), tmp_path / "source")
    script = tmp_path / "fit.py"
    script.write_text(FAILING)
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parents[1]), when]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    told = (tmp_path / "error0.txt").read_text()
    assert told.startswith("OtherRankFailed: Rank 1 of 2 failed, and with it this one.")
    words = "the disk of the second rank is full" if when == "composing" else str(tmp_path / "nothing")
    assert words in told
    assert "Connection closed by peer" not in told


SCRIPT = """
import json, os, sys
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from lightning_stitch import Budget, StitchedClassifier
from doubles.fragment_searches import digits, search, trainer
from doubles.small_sources import donor, write_local
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
    model = StitchedClassifier(num_classes=3)
    budget = Budget(max_latency_ms=float(sys.argv[3])) if len(sys.argv) > 3 else None
    nodes = int(os.environ.get("NODES", 1))
    settings = {"max_epochs": 1, "strategy": "ddp", "devices": 2 // nodes, "num_nodes": nodes}
    run = trainer(folder, search(budget=budget), **settings)
    run.fit(model, digits())
    total = sum(p.double().sum().item() for p in model.parameters())
    record = {"recipe": model.hparams["recipe"], "total": total, "world": run.world_size}
    (folder / f"rank{run.global_rank}.json").write_text(json.dumps(record))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limits", [[], ["1e6"]], ids=["no budget", "latencies that each rank measures"])
def test_two_ranks_end_with_the_same_recipe_and_weights(tmp_path: Path, limits: list[str]) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parents[1]), *limits]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["world"] == 2
    assert ("latency_ms" in first["recipe"]["scores"]) == bool(limits)


@pytest.mark.slow
def test_two_nodes_that_torchrun_starts_do_so_too(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [str(script), str(tmp_path), str(Path(__file__).parents[1])]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "NODES": "2"}
    nodes = [
        subprocess.Popen([*torchrun, f"--node-rank={node}", *command], env=environment, **options) for node in range(2)
    ]
    told = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told[0][-2000:] + told[1][-2000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["world"] == 2
