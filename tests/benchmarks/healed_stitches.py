"""What healing gives single stitches and skips of EfficientNet-Lites, and how many bare passes it costs.

    python examples/prepare_solar_cells.py && python tests/benchmarks/healed_stitches.py [--images 16 64]
    python tests/benchmarks/healed_stitches.py --skips 0.42 0.5    # any networks of one stitch in a bracket of MACs

Stitches behind the second and the fifth of seven stages, each from one network to the next, and skips of the two
stages between. R2 is that of the final features against the last source's own on test images. A bare pass is one of
the composed network over the calibration images, timed in the same run; healing includes its guard, which runs the
network with its stitch fitted anew on three quarters of the images, healed and not, and the source's own fragments.

In a bracket of MACs, shares of the cheapest source's, networks of one stitch are drawn at random from all that a search
could make: whether what it goes by, CKA, and the choice of what is healed, held-out R2 as it is, order them as healing
leaves them. Healed or not, with what a ridge regression on the unlabelled images reads (healing.py says what that is).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from healing import Row, read
from healing_tasks import solar_cells
from ranking_statistics import spearman
from ranking_tasks import Task

from lightning_stitch import CalibrationSettings, Pool
from lightning_stitch.healing.healer import Healer
from lightning_stitch.healing.healing import heal
from lightning_stitch.maths.regression import r2
from lightning_stitch.progress import Silent
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.stitching.candidates import Candidate

EARLY, LATE, BEHIND_SKIP = "blocks.1", "blocks.4", "blocks.3"
NEXT = ((0, 1), (2, 0), (1, 2))
SKIPS = ((0, 0), (0, 1), (0, 2))
FORMS = ("stitched", "healed")


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    return function(*arguments), time.perf_counter() - begun


def measure(task: Task) -> None:
    settings = CalibrationSettings(readout="last")
    pool = Pool(task.sources, tuple(task.calibration[0][0].shape[1:]), settings=settings)
    pool.calibrate(task.calibration)
    images = torch.cat([x for x, _ in task.calibration])
    names = [part.name for part in pool.parts]
    joints = [(f"stitch at {at}, {a} -> {b}", a, at, b, at) for at in (EARLY, LATE) for a, b in NEXT]
    joints += [(f"skip to {BEHIND_SKIP}, {a} -> {b}", a, EARLY, b, BEHIND_SKIP) for a, b in SKIPS]
    own = {name: features(pool, pool.stitch([(name, None, None)]), task) for name in names}
    healer = Healer(pool.calibration.sources, settings=pool.settings, ridge=1e-3)
    print(f"\n{len(images)} unlabelled images, {torch.get_num_threads()} threads\n")
    print("| network | M MACs | R2 stitched | R2 healed | s | bare passes |")
    print("|---|---|---|---|---|---|")
    for name, sender, leave, receiver, enter in joints:
        plain = pool.stitch([(names[sender], None, leave), (names[receiver], enter, None)])
        healed, seconds = timed(healer.heal, plain)
        _, bare = timed(partial(pool.outcomes, progress=Silent()), [plain], [images])
        before, after = (r2(features(pool, c, task), own[names[receiver]]) for c in (plain, healed))
        macs = plain.cost.macs / 1e6
        print(
            f"| {name} | {macs:.0f} | {before:.3f} | {after:.3f} | {seconds:.2f} | {seconds / bare:.1f} |", flush=True
        )


def skips(task: Task, low: float, high: float, *, count: int) -> list[Row]:
    """What healing gives networks of one stitch between two shares of the cheapest source's MACs."""
    settings = CalibrationSettings(readout="last")
    pool = Pool(task.sources, tuple(task.calibration[0][0].shape[1:]), settings=settings)
    pool.calibrate(task.calibration)
    parts, cheapest = pool.parts, min(part.cost.macs for part in pool.parts)
    costs = CompositionCosts(parts, bias=True, max_fragments=2)
    pairs = []
    for (a, sender), (b, receiver) in product(enumerate(parts), repeat=2):
        for (i, end), (j, start) in product(enumerate(sender.cuts), enumerate(receiver.cuts)):
            # As in a beam search, nothing is made finer than it was.
            coarser = start.grid is None or (end.grid is not None and start.grid[0] <= end.grid[0])
            macs = costs.run(a, 0, i + 1).macs + costs.run(b, j + 1, len(receiver.pieces)).macs
            if coarser and (a, i) != (b, j) and low * cheapest <= macs <= high * cheapest:
                pairs.append(((sender.name, None, end.name), (receiver.name, start.name, None)))
    own = {part.name: everything(pool, pool.stitch([(part.name, None, None)]), task) for part in parts}
    rows: list[Row] = []
    print("| network | share | cka | held-out R2 | as it is: stitched | healed | read: stitched | healed |")
    print("|---|---|---|---|---|---|---|---|")
    for ends in random.Random(0).sample(pairs, len(pairs)):
        plain = pool.stitch(ends)
        if len(rows) == count or not low <= plain.cost.macs / cheapest <= high:
            continue
        healer = Healer(pool.calibration.sources, settings=pool.settings, ridge=1e-3)
        with torch.inference_mode():
            healed = heal(plain, pool.calibration.sources, pool.settings)
        wanted = own[ends[1][0]]
        given = [everything(pool, candidate, task) for candidate in (plain, healed)]
        row: Row = {"path": plain.recipe.path, "share": plain.cost.macs / cheapest, "cka": plain.cka_product}
        row |= {"held_out": healer.explained(plain)}
        row |= {name: r2(x[2], wanted[2]) for name, x in zip(FORMS, given, strict=True)}
        row |= {f"{name}, read": r2(read(x, wanted), wanted[2]) for name, x in zip(FORMS, given, strict=True)}
        rows.append(row)
        print(
            "| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()) + " |", flush=True
        )
    for name in ("cka", "held_out"):
        orders = [
            spearman(np.array([row[name] for row in rows]), np.array([row[wanted] for row in rows]))
            for wanted in ("healed", "healed, read")
        ]
        print(
            f"Spearman of {name}: {orders[0]:.2f} with R2 as it is, {orders[1]:.2f} with R2 read ({len(rows)} networks)"
        )
    return rows


def everything(pool: Pool, candidate: Candidate, task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the calibration, no and the test images, as `read` takes them."""
    images = [*task.calibration, *task.test]
    outcomes, _ = pool.outcomes([candidate], images, progress=Silent())
    calibrated, tested = outcomes[0].features.split(
        [sum(len(x) for x, _ in part) for part in (task.calibration, task.test)]
    )
    return calibrated, calibrated[:0], tested


def features(pool: Pool, candidate: Candidate, task: Task) -> torch.Tensor:
    outcomes, _ = pool.outcomes([candidate], task.test, progress=Silent())
    return outcomes[0].features


def main() -> None:
    parser = argparse.ArgumentParser(description="What healing gives single stitches, and what it costs.")
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64], help="calibration images, unlabelled")
    parser.add_argument(
        "--skips", type=float, nargs=2, metavar=("LOW", "HIGH"), help="shares of the cheapest source's MACs"
    )
    parser.add_argument("--count", type=int, default=24, help="most networks of a bracket")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--test-images", type=int, default=768)
    options = parser.parse_args()
    for count in options.images:
        task = solar_cells(
            options.solar_cells,
            count=count,
            seed=0,
            image_size=options.image_size,
            test_images=options.test_images,
        )
        if options.skips is None:
            measure(task)
        else:
            skips(task, *options.skips, count=options.count)


if __name__ == "__main__":
    main()
