from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.fragment_searches import digits, search, trainer
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


SCRIPT = """
import json, os, sys
import torch
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from lightning_stitch import Budget, StitchedClassifier
from doubles.fragment_searches import digits, search, trainer
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", 0)))
    model = StitchedClassifier(num_classes=3)
    budget = Budget(max_latency_ms=float(sys.argv[3])) if len(sys.argv) > 3 else None
    settings = {"max_epochs": 1, "strategy": "ddp", "devices": 2, "use_distributed_sampler": True}
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
