"""Two processes that draw their images each by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doubles.data import numbered
from torch.utils.data import TensorDataset

from lightning_stitch import CalibrationDataModule
from lightning_stitch.errors import CalibrationError

WORDS = "The 2 processes have drawn different images"


def rank_of_two(module: CalibrationDataModule, fingerprint_of_rank_zero: str) -> CalibrationDataModule:
    strategy = SimpleNamespace(
        broadcast=lambda value, src: fingerprint_of_rank_zero, reduce_boolean_decision=lambda decision, all: decision
    )
    module.trainer = SimpleNamespace(world_size=2, strategy=strategy)  # type: ignore[assignment]
    return module


def fingerprint_of(pool: TensorDataset, **options: Any) -> str:
    module = CalibrationDataModule(pool, calibration_samples=8, **options)
    module.setup()
    return module._fingerprint


def test_ranks_that_draw_the_same_images_go_on_and_others_are_refused() -> None:
    for pool, seed in ((numbered(60), 0), (numbered(60), 1), (numbered(60, first=1), 0)):
        fingerprint = fingerprint_of(pool, seed=seed)
        alike = seed == 0 and pool.tensors[0][0, 0, 0, 0] == 0
        module = rank_of_two(CalibrationDataModule(numbered(60), calibration_samples=8), fingerprint)
        module.setup()  # may come on one rank alone, before the others are there
        if alike:
            module.setup("fit")
            continue
        with pytest.raises(CalibrationError, match=WORDS):
            module.setup("fit")


SCRIPT = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from doubles.data import numbered
from torch.utils.data import DataLoader, random_split
from lightning_stitch import CalibrationDataModule
from lightning_stitch._lightning import pl


class Splitting(pl.LightningDataModule):
    def setup(self, stage):
        seed = torch.Generator().manual_seed(3) if "seeded" in sys.argv else None
        self.train, self.test = random_split(numbered(60), [45, 15], generator=seed)

    def train_dataloader(self):
        return DataLoader(self.train)

    def test_dataloader(self):
        return DataLoader(self.test)


class Silent(pl.LightningModule):
    def test_step(self, batch, batch_idx):
        return None


if __name__ == "__main__":
    torch.seed()
    data = CalibrationDataModule(datamodule=Splitting(), calibration_samples=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", **quiet).test(Silent(), data)
    print("both tested")
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["seeded", "unseeded"])
def test_a_data_module_that_splits_otherwise_in_each_process_is_refused(tmp_path: Path, seed: str) -> None:
    script = tmp_path / "split.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(Path(__file__).parents[1]), seed]
    # A seed that an earlier test set everywhere would reach both processes.
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    if seed == "seeded":
        assert done.returncode == 0, done.stderr[-3000:]
        assert "both tested" in done.stdout
    else:
        assert done.returncode != 0
        assert WORDS in done.stderr
        assert "random_split a generator with a seed" in done.stderr
