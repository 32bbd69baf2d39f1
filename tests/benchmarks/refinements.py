"""What each refinement of a composed network gives, on agreement and on accuracy, and what it costs.

    python examples/prepare_solar_cells.py && python tests/benchmarks/refinements.py [--json refinements.json]

On ranking.py's tasks the networks that the default beam finds are composed once more along the same paths, each time
with one refinement: kept where the held-out calibration images say so, as a search does it, and for the BatchNorm
statistics also forced on every network. Agreement is CKA and R2 of the final features with the last source's own,
accuracy that of a closed-form head fitted on labelled images; both on test images. +- is the standard error of the mean
over networks. Seconds are for one network, beside the search without refinements.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranking_tasks import Task, handwritten_digits, solar_cells

from lightning_stitch import Beam, FragmentRef, Pool, fit_ridge_head, linear_cka
from lightning_stitch.healing.refinement import refined, with_statistics
from lightning_stitch.maths.regression import r2
from lightning_stitch.progress import Silent
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.paths import follow
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.stitching.candidates import Candidate

WAYS = ("batch_norm", "batch_norm, forced", "open_loop", "row_weights")
Figures = dict[str, Any]


def measure(task: Task) -> list[Figures]:
    """One row for each refinement."""
    pool = Pool(task.sources, tuple(task.calibration[0][0].shape[1:]))
    pool.calibrate(task.calibration)
    costs = CompositionCosts(pool.parts, bias=True, max_fragments=Beam().max_fragments)

    def space(*fits: str) -> SearchSpace:
        return SearchSpace(pool.calibrated, pool.settings, costs=costs, fits=fits)

    paths = [candidate.recipe.fragments for candidate in Beam()(space())]
    plain, plain_seconds = composed(space(), paths)
    rows = []
    networks = [*(space().complete(state, kind="source") for state in space().starts()), *plain]
    for way in WAYS:
        if way.startswith("batch_norm"):
            begun = time.perf_counter()
            found = [
                with_statistics(candidate, pool.calibrated)
                if way.endswith("forced")
                else refined(candidate, pool.calibrated, "batch_norm")
                for candidate in plain
            ]
            seconds = time.perf_counter() - begun
            kept = [candidate is not before for candidate, before in zip(found, plain, strict=True)]
        else:
            found, seconds = composed(space(way), paths)
            seconds -= plain_seconds
            kept = [any(spec is not None and spec.fit == way for spec in c.recipe.stitches) for c in found]
        networks += found
        rows.append(
            {"refinement": way, "networks": len(plain), "kept": kept, "seconds": max(seconds, 0.0) / len(plain)}
        )
    figures = tested(pool, networks, task)
    before = {name: values[: len(plain)] for name, values in figures.items()}
    for index, row in enumerate(rows, start=1):
        kept = np.array(row.pop("kept"))
        row["kept"] = int(kept.sum())
        for name, values in figures.items():
            after = values[index * len(plain) : (index + 1) * len(plain)]
            difference = (after - before[name])[kept]
            row[name] = float(before[name].mean())
            row[f"{name} gain"] = float(difference.mean()) if len(difference) else None
            row[f"{name} error"] = float(difference.std() / len(difference) ** 0.5) if len(difference) else None
    return rows


def composed(space: SearchSpace, paths: Sequence[Sequence[FragmentRef]]) -> tuple[list[Candidate], float]:
    """The networks along these paths, and the seconds that they took."""
    begun = time.perf_counter()
    return [follow(space, path) for path in paths], time.perf_counter() - begun


def tested(pool: Pool, networks: Sequence[Candidate], task: Task) -> dict[str, np.ndarray]:
    """Accuracy and agreement of all networks behind the sources, which come first."""
    outcomes, labels = pool.outcomes(networks, [*task.head, *task.test], progress=Silent())
    assert labels is not None
    count = sum(len(batch) for _, batch in task.head)
    features = [outcome.features for outcome in outcomes]
    own = {c.recipe.fragments[0].source: x[count:] for c, x in zip(networks, features, strict=True) if not c.steps[1:]}
    accuracies, ckas, shares = [], [], []
    for candidate, x in list(zip(networks, features, strict=True))[len(own) :]:
        head, _ = fit_ridge_head(x[:count], labels[:count], num_classes=task.num_classes)
        with torch.no_grad():
            accuracies.append(float((head(x[count:]).argmax(1) == labels[count:]).float().mean()))
        reference = own[candidate.recipe.fragments[-1].source]
        ckas.append(float(linear_cka(x[count:], reference)))
        shares.append(r2(x[count:], reference))
    return {"accuracy": np.array(accuracies), "CKA": np.array(ckas), "R2": np.array(shares)}


def print_rows(rows: Sequence[Figures]) -> None:
    names = ("accuracy", "CKA", "R2")
    print("| refinement | kept | " + " | ".join(f"{name} of all before, gain where kept" for name in names) + " | s |")
    print("|---" * (3 + len(names)) + "|")
    for row in rows:
        gains = [
            f"{row[name]:.3f}, "
            + ("-" if row[f"{name} gain"] is None else f"{row[f'{name} gain']:+.4f} +- {row[f'{name} error']:.4f}")
            for name in names
        ]
        kept = f"{row['kept']} of {row['networks']}"
        print(f"| {row['refinement']} | {kept} | {' | '.join(gains)} | {row['seconds']:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="What each refinement of composed networks gives.")
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--test-images", type=int, default=1024, help="of the solar cells")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    tasks = [
        solar_cells(options.solar_cells, image_size=options.image_size, test_images=options.test_images),
        handwritten_digits(other_questions=False),
    ]
    found = {}
    for task in tasks:
        found[task.name] = measure(task)
        print(f"\n{task.name}\n")
        print_rows(found[task.name])
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
