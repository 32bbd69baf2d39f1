"""Peak memory of calibrating and searching one source at two image sizes, beyond the bare forward pass.

    python tests/benchmarks/memory.py                                   # EfficientNet-Lite0 at 224 and 448 pixels
    python tests/benchmarks/memory.py resnet50 --sizes 160 320 --keep-activations memory

Every figure comes from a process of its own. "forward" loads the source, cuts it and runs it over the calibration
images, a few at a time; "search" calibrates and searches besides. The difference is what a search holds: it should not
depend on the image size. Weights are random, which changes no tensor's size. glibc is told to give freed memory back at
once: what it would keep otherwise differs by tens of megabytes from run to run.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import torch

from lightning_stitch import Beam, CalibrationSettings, Pool, load_source
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.paths import self_stitched, unmodified
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.stitching.segments import chunks


def images(size: int, count: int) -> Iterator[torch.Tensor]:
    """Images that are made as they are asked for, so that none are held."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(4, 3, size, size, generator=generator) for _ in range(count // 4))


def run(stage: str, source: str, size: int, count: int, keep_activations: str) -> None:
    """One process's work; prints its peak memory in MB."""
    torch.manual_seed(0)
    settings = CalibrationSettings(keep_activations=keep_activations)  # type: ignore[arg-type]
    pool = Pool([load_source(source, pretrained=False)], (3, size, size), settings=settings)
    part = pool.parts[0]
    costs = CompositionCosts(pool.parts, bias=True, max_fragments=3)
    with torch.inference_mode():
        for batch in images(size, count):
            for x in chunks(batch, part.images_at_once):
                x = part.preprocess(x)
                for piece in part.pieces:
                    x = piece(x)
    if stage == "search":
        pool.calibrate(images(size, count))
        space = SearchSpace(pool.calibration.sources, settings, costs=costs)
        found = [*unmodified(space), *self_stitched(space), *Beam(threshold=-1.0)(space)]
        assert len(found) > 2
    unit = 2**10 if sys.platform == "linux" else 2**20
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def peak(*arguments: object) -> float:
    """Peak memory in MB of this script run with these arguments."""
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a search at two image sizes.")
    parser.add_argument("source", nargs="?", default="tf_efficientnet_lite0", help="a timm name")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--keep-activations", choices=["disk", "memory"], default="disk")
    parser.add_argument("--stage", choices=["forward", "search"], help="run in this process instead of comparing")
    options = parser.parse_args()
    if options.stage:
        run(options.stage, options.source, options.sizes[0], options.images, options.keep_activations)
        return
    beyond = []
    for size in options.sizes:
        common = (options.source, "--sizes", size, "--images", options.images)
        forward = peak(*common, "--stage", "forward")
        search = peak(*common, "--stage", "search", "--keep-activations", options.keep_activations)
        beyond.append(search - forward)
        print(f"{size} pixels: forward {forward:.0f} MB, search {search:.0f} MB, beyond {beyond[-1]:.0f} MB")
    print(f"{options.source}, {options.images} images: beyond the forward pass x {beyond[-1] / beyond[0]:.2f}")


if __name__ == "__main__":
    main()
