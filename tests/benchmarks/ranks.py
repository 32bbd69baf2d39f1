"""How much faster several ranks search than one, one thread each; and whether they find the same.

    python examples/prepare_solar_cells.py && python tests/benchmarks/ranks.py solar_cells

The search of examples/solar_cells.yaml, without its comparison, in a Trainer with `strategy="ddp"` on the CPU (gloo),
ranks started side by side as torchrun does. Seconds are of `fit`, from its call to its end, sources loaded and data set
up inside, Python's start and imports outside. The numbers of ranks take turns; of each the fastest run counts, as the
machine may do other things besides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytorch_lightning as pl
import torch

import lightning_stitch as ls


def fit(folder: Path, count: int, image_size: int) -> None:
    """One rank of a search; the first prints what it took and found."""
    torch.set_num_threads(1)
    data = ls.CalibrationDataModule(
        image_folder=str(folder / "images"),
        image_size=image_size,
        calibration_samples=32,
        train_samples=256,
        selection_samples=256,
        test_samples=512,
    )
    model = ls.StitchedClassifier(num_classes=2)
    search = ls.FragmentSearch([f"local-dir:{folder}/efficientnet_lite{size}" for size in range(3)])
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(
        max_epochs=0,
        accelerator="cpu",
        devices=count,
        strategy="ddp" if count > 1 else "auto",
        callbacks=[search],
        **quiet,  # type: ignore[arg-type]
    )
    begun = time.perf_counter()
    trainer.fit(model, data)
    seconds = time.perf_counter() - begun
    if trainer.is_global_zero:
        assert search.result is not None
        recipe = model.hparams["recipe"]
        stages = {name: round(value, 1) for name, value in search.result.seconds.items()}
        print("RESULT", json.dumps({"seconds": seconds, "stages": stages, "recipe": recipe}), flush=True)


def run(folder: Path, count: int, image_size: int) -> dict:
    """A search of so many ranks in processes of their own."""
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += [__file__, str(folder), "--image-size", str(image_size), "--rank-of", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(lines[0].removeprefix("RESULT"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("solar_cells"))
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rank-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        fit(options.folder, options.rank_of, options.image_size)
        return
    found = [
        {count: run(options.folder, count, options.image_size) for count in options.ranks} for _ in range(options.turns)
    ]
    print("| ranks | seconds of fit | times as fast as one | same recipe | stages |\n|---|---|---|---|---|")
    best = {
        count: min((turn[count] for turn in found), key=lambda record: record["seconds"]) for count in options.ranks
    }
    for count, record in best.items():
        ratio = best[options.ranks[0]]["seconds"] / record["seconds"]
        same = record["recipe"] == best[options.ranks[0]]["recipe"]
        print(f"| {count} | {record['seconds']:.1f} | {ratio:.2f} | {'yes' if same else 'no'} | {record['stages']} |")


if __name__ == "__main__":
    main()
