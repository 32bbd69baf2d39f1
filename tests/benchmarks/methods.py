"""StitchNets beside linear probing and fine-tuning on ELPV, by number of labels, over several seeds.

    python examples/prepare_solar_cells.py && python tests/benchmarks/methods.py --solar-cells solar_cells

Labels are in all: three quarters train, one quarter chooses (source, StitchNet, penalty, learning rate), for every
method alike. A seed draws the split, the heads' first weights and the order of the batches. Prints mean and standard
deviation over the seeds as Markdown, and the StitchNets' verdicts over the splits; writes each run's rows (methods.csv
in a folder of its own, after each method), all of them (all.csv) and the figure (methods.png). Started again with the
same options and output, it reads the runs that are complete and goes on with the next one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_stitch import CalibrationDataModule, FineTuning, FragmentSearch, Verdict, compare_methods, judge_splits
from lightning_stitch.baselines.contenders import COMPOSED, METHODS
from lightning_stitch.baselines.plots import plot_methods
from lightning_stitch.tables import write_csv

FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], float], int]] = {
    "accuracy": ("accuracy", lambda row: row["accuracy"], 3),
    "AUROC": ("AUROC", lambda row: row["auroc"], 3),
    "seconds": ("seconds", lambda row: row["seconds"], 1),
    "cpu": ("CPU seconds", lambda row: row["cpu_seconds"], 1),
    "flops": ("training TFLOPs", lambda row: row["flops"] / 1e12, 2),
    "params": ("M params", lambda row: row["params"] / 1e6, 2),
    "macs": ("M MACs", lambda row: row["macs"] / 1e6, 1),
    "latency": ("ms", lambda row: row["latency_ms"], 1),
}


def run(options: argparse.Namespace, labels: int, seed: int) -> list[dict[str, Any]]:
    """One split and seed: a row for each method."""
    data = CalibrationDataModule(
        image_folder=str(options.solar_cells / "images"),
        image_size=options.image_size,
        calibration_samples=32,
        train_samples=labels * 3 // 4,
        selection_samples=labels // 4,
        test_samples=options.test_samples,
        seed=seed,
    )
    finetuning = FineTuning(
        epochs=options.epochs,
        learning_rates=options.learning_rates,
        flips="both",  # solar cells have no up and no left
    )
    directory = options.output / f"{labels}_labels_seed_{seed}"
    record = directory / "methods.json"
    if record.exists():
        found = json.loads(record.read_text())
        same = found["settings"]["finetuning"] == json.loads(json.dumps(dataclasses.asdict(finetuning)))
        same &= found["settings"]["images"] == data.summary and found["settings"]["image_shape"] == [*data.image_shape]
        if same and len(found["rows"]) == len(METHODS):
            return found["rows"]
    search = FragmentSearch([f"local-dir:{options.solar_cells}/efficientnet_lite{size}" for size in range(3)])
    return compare_methods(search, data, finetuning=finetuning, directory=directory, plot=False, seed=seed)


def spread_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean +- standard deviation over the seeds, for each number of labels and method."""
    lines = [["labels", "method", *(name for name, _, _ in FIGURES.values())]]
    lines.append(["---"] * len(lines[0]))
    for labels in sorted({row["labels"] for row in rows}):
        for method in dict.fromkeys(row["method"] for row in rows):
            found = [row for row in rows if (row["labels"], row["method"]) == (labels, method)]
            if found:
                lines.append([str(labels), method, *(_spread(found, *figure[1:]) for figure in FIGURES.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts(rows: Sequence[dict[str, Any]], *, num_test: int) -> list[Verdict]:
    """Of every composed method against every other, by number of labels, where there are two splits or more."""
    told = []
    for labels in sorted({row["labels"] for row in rows}):
        runs = {
            method: [row for row in rows if (row["labels"], row["method"]) == (labels, method)] for method in METHODS
        }
        for contender in (method for method in METHODS if method in COMPOSED):
            for rival in (method for method in METHODS if method not in COMPOSED):
                pairs = list(zip(runs[contender], runs[rival], strict=True))
                if len(pairs) > 1:
                    told.append(
                        judge_splits(
                            [ours["accuracy"] - theirs["accuracy"] for ours, theirs in pairs],
                            num_train=labels,
                            num_test=num_test,
                            rival=rival,
                            contender=f"{labels} labels: {contender}",
                            contender_cost=statistics.fmean(ours["flops"] for ours, _ in pairs),
                            rival_cost=statistics.fmean(theirs["flops"] for _, theirs in pairs),
                            cost_unit="training FLOPs",
                        )
                    )
    return told


def _spread(rows: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float], digits: int) -> str:
    values = [value(row) for row in rows]
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} +- {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else mean


def main() -> None:
    recipe = FineTuning()
    parser = argparse.ArgumentParser(description="Compare methods by number of labels, over several seeds.")
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--output", type=Path, default=Path("methods"), help="where rows and figure go")
    parser.add_argument("--labels", type=int, nargs="+", default=[32, 128, 512], help="labels in all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=recipe.epochs, help="of fine-tuning")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=recipe.learning_rates, help="of a network")
    parser.add_argument("--image-size", type=int, default=128, help="in pixels")
    parser.add_argument("--test-samples", type=int, default=512, help="images that report")
    options = parser.parse_args()

    rows: list[dict[str, Any]] = []
    options.output.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for labels in options.labels:
            begun = time.perf_counter()
            rows += run(options, labels, seed)
            write_csv(rows, options.output / "all.csv")
            print(f"{labels} labels, seed {seed}: {time.perf_counter() - begun:.0f} s", flush=True)
    plot_methods(rows, options.output / "methods.png")
    print("\n" + spread_table(rows) + "\n")
    print("\n".join(f"- {verdict}" for verdict in verdicts(rows, num_test=options.test_samples)))


if __name__ == "__main__":
    main()
