"""What healing gives single stitches and skips of EfficientNet-Lites, and how many bare passes it costs.

    python examples/prepare_solar_cells.py && python tests/benchmarks/healed_stitches.py [--images 16 64]

Stitches behind the second and the fifth of seven stages, each from one network to the next, and skips of the two
stages between. R2 is that of the final features against the last source's own on test images. A bare pass is one of
the composed network over the calibration images, timed in the same run; healing includes its guard, which runs the
network with its stitch fitted anew on three quarters of the images, healed and not, and the source's own fragments.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from healing_tasks import solar_cells
from ranking_tasks import Task

from lightning_stitch import Pool
from lightning_stitch.candidates import Candidate
from lightning_stitch.prefix_tree import PrefixTree
from lightning_stitch.progress import Silent
from lightning_stitch.refinement import refined
from lightning_stitch.regression import r2

EARLY, LATE, BEHIND_SKIP = "blocks.1", "blocks.4", "blocks.3"
NEXT = ((0, 1), (2, 0), (1, 2))
SKIPS = ((0, 0), (0, 1), (0, 2))


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    return function(*arguments), time.perf_counter() - begun


def measure(task: Task) -> None:
    pool = Pool(task.sources, tuple(task.calibration[0][0].shape[1:]))
    pool.calibrate(task.calibration)
    images = torch.cat([x for x, _ in task.calibration])
    names = [part.name for part in pool.parts]
    joints = [(f"stitch at {at}, {a} -> {b}", a, at, b, at) for at in (EARLY, LATE) for a, b in NEXT]
    joints += [(f"skip to {BEHIND_SKIP}, {a} -> {b}", a, EARLY, b, BEHIND_SKIP) for a, b in SKIPS]
    own = {name: features(pool, pool.stitch([(name, None, None)]), task) for name in names}
    print(f"\n{len(images)} unlabelled images, {torch.get_num_threads()} threads\n")
    print("| network | M MACs | R2 stitched | R2 healed | s | bare passes |")
    print("|---|---|---|---|---|---|")
    for name, sender, leave, receiver, enter in joints:
        plain = pool.stitch([(names[sender], None, leave), (names[receiver], enter, None)])
        healed, seconds = timed(refined, plain, pool.calibrated, "healing")
        _, bare = timed(PrefixTree([plain], pool.parts).run, [images])
        before, after = (r2(features(pool, c, task), own[names[receiver]]) for c in (plain, healed))
        macs = plain.cost.macs / 1e6
        print(
            f"| {name} | {macs:.0f} | {before:.3f} | {after:.3f} | {seconds:.2f} | {seconds / bare:.1f} |", flush=True
        )


def features(pool: Pool, candidate: Candidate, task: Task) -> torch.Tensor:
    outcomes, _ = pool.outcomes([candidate], task.test, progress=Silent())
    return outcomes[0].features


def main() -> None:
    parser = argparse.ArgumentParser(description="What healing gives single stitches, and what it costs.")
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64], help="calibration images, unlabelled")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--test-images", type=int, default=768)
    options = parser.parse_args()
    for count in options.images:
        measure(
            solar_cells(
                options.solar_cells,
                count=count,
                seed=0,
                image_size=options.image_size,
                test_images=options.test_images,
            )
        )


if __name__ == "__main__":
    main()
