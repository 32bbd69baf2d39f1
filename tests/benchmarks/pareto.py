"""The best network of any size from one search, beside the sources and their early exits, at ten budgets of MACs.

    python examples/prepare_solar_cells.py && python tests/benchmarks/pareto.py --solar-cells solar_cells

One search of the solar-cell example for each of two strategies, without a budget. Then ten budgets, in equal ratios
from a third of the cheapest source's MACs to the dearest's: for each the best candidate within it by the selection
images, the best unmodified source and the best early exit, all with the same closed-form head on the same labels. The
test images choose nothing; +- is one standard error, of an accuracy or of the difference of two on the same images.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_stitch import Beam, Budget, CalibrationDataModule, Pool, SearchResult, fit_ridge_head, load_sources
from lightning_stitch.progress import Silent
from lightning_stitch.search.results import Ranked

STRATEGIES = {
    "Beam()": (Beam(), 64),
    "a wider beam": (Beam(width=12, fractions=(1.0, 0.75, 0.5, 1 / 3, 0.2)), 256),
}
NUM_BUDGETS = 10
CONTENDERS = ("best", "source", "early exit")


def budgets_of(result: SearchResult) -> list[float]:
    """From a third of the cheapest source's MACs to the dearest source's, each the same ratio above the last."""
    macs = [r.candidate.cost.macs for r in result.ranked if r.candidate.kind == "source"]
    low, high = min(macs) / 3, max(macs)
    # Rounded up, so that the dearest source keeps the last one.
    return [math.ceil(low * (high / low) ** (step / (NUM_BUDGETS - 1))) for step in range(NUM_BUDGETS)]


def answers(pool: Pool, chosen: list[Ranked], train: DataLoader, test: DataLoader, num_classes: int) -> list[Tensor]:
    """On which test images each network is right (1, else 0), with a closed-form head of its own."""
    candidates = [r.candidate for r in chosen]
    fitted, labels = pool.outcomes(candidates, train, progress=Silent())
    seen, targets = pool.outcomes(candidates, test, progress=Silent())
    found = []
    with torch.no_grad():
        for one, other in zip(fitted, seen, strict=True):
            head, _ = fit_ridge_head(one.features, labels, num_classes=num_classes, blocks=one.blocks)
            found.append((head(other.features).argmax(1) == targets).double())
    return found


def rows_of(pool: Pool, result: SearchResult, data: CalibrationDataModule) -> list[dict[str, Any]]:
    """One row for each budget: its limit, and each contender's network and figures; None where none fits."""
    contenders = []
    for limit in budgets_of(result):
        budget = Budget(max_macs=limit)
        kept = [result.within(budget), *(result.within(budget, kind=kind) for kind in ("source", "early exit"))]
        contenders.append((limit, kept))
    chosen = {id(r): r for _, kept in contenders for r in kept if r is not None}
    loaders = data.head_dataloader(), data.test_dataloader()
    found = answers(pool, list(chosen.values()), *loaders, data.num_classes)
    right = dict(zip(chosen, found, strict=True))
    rows = []
    for limit, (best, *others) in contenders:
        row: dict[str, Any] = {"max_macs": limit, **dict.fromkeys(CONTENDERS)}
        for name, r in zip(CONTENDERS, (best, *others), strict=True):
            if best is not None and r is not None:
                row[name] = figures(r, right[id(r)], right[id(best)])
        rows.append(row)
    return rows


def figures(r: Ranked, right: Tensor, best: Tensor) -> dict[str, Any]:
    """A network in words, its costs, its score on the selection images and its accuracy on the test images.

    Beside that stands how much more accurate the best within the budget is, on the same images.
    """
    cost, (accuracy, error) = r.candidate.cost, with_error(right)
    ahead, ahead_error = with_error(best - right)
    return {
        "kind": r.candidate.kind,
        "path": r.candidate.recipe.path,
        "params": cost.params,
        "macs": cost.macs,
        "selection": r.score,
        "test_accuracy": accuracy,
        "test_error": error,
        "best_ahead": ahead,
        "best_ahead_error": ahead_error,
    }


def with_error(values: Tensor) -> tuple[float, float]:
    """A mean over images and its standard error."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = ["M MACs at most", "best", "M MACs", "selection", "test"]
    for words in ("best source", "best early exit"):
        columns += [words, "M MACs", "selection", "test", "the best is ahead by"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        cells = [f"{row['max_macs'] / 1e6:.1f}"]
        for name in CONTENDERS:
            found, is_best = row[name], name == "best"
            if found is None:
                cells += ["none fits", *[""] * (3 if is_best else 4)]
                continue
            kind = f"{found['kind']}, " if is_best else ""
            cells += [f"{kind}{found['path'].replace('efficientnet_', '')}", f"{found['macs'] / 1e6:.1f}"]
            cells += [f"{found['selection']:.3f}", f"{found['test_accuracy']:.3f} +- {found['test_error']:.3f}"]
            if not is_best:
                cells.append(f"{found['best_ahead']:+.3f} +- {found['best_ahead_error']:.3f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare one search's networks of all sizes with their sources.")
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--image-size", type=int, default=128, help="in pixels")
    parser.add_argument("--test-samples", type=int, default=1024, help="images that report")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    options = parser.parse_args()

    data = CalibrationDataModule(
        image_folder=str(options.solar_cells / "images"),
        image_size=options.image_size,
        calibration_samples=32,
        train_samples=256,
        selection_samples=256,
        test_samples=options.test_samples,
    )
    pool = Pool(
        load_sources([f"local-dir:{options.solar_cells}/efficientnet_lite{k}" for k in range(3)]), data.image_shape
    )
    record = {}
    for name, (strategy, max_candidates) in STRATEGIES.items():
        result = pool.search(
            data.calibration_dataloader(),
            data.selection_dataloader(),
            strategy=strategy,
            num_classes=data.num_classes,
            max_candidates=max_candidates,
        )
        kinds = [r.candidate.kind for r in result.ranked]
        counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        front = [r.candidate.kind for r in result.pareto("macs")]
        pareto = {kind: front.count(kind) for kind in dict.fromkeys(front)}
        rows = rows_of(pool, result, data)
        record[name] = {"candidates": counts, "pareto": pareto, "seconds": result.seconds, "rows": rows}
        if not options.json:
            words = [", ".join(f"{count} {kind}" for kind, count in found.items()) for found in (counts, pareto)]
            seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in result.seconds.items())
            print(f"{name}: {words[0]}; on the Pareto set in MACs: {words[1]}; {seconds}\n")
            print(markdown(rows) + "\n", flush=True)
    if options.json:
        print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
