"""What the solar-cell example's cutting, statistics, search and ranking cost: seconds, their ratios, peak memory.

    python examples/prepare_solar_cells.py && python tests/benchmarks/search_cost.py --image-size 128

Each stage is also given as a multiple of one bare pass of the three networks over the 32 calibration images, timed in
the same run: these seconds depend on the machine, the multiples much less. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytorch_lightning  # noqa: F401 - imported now, so that its memory counts as an import's
import timm  # noqa: F401
import torch
from reference_side import peak_gigabytes

from lightning_stitch import CalibrationDataModule, Pool, load_sources


def bare_pass(pool: Pool, images: torch.Tensor) -> float:
    """Seconds of one pass of every source over the images, the faster of two, in the pool's own portions."""
    seconds = []
    for _ in range(2):
        begun = time.perf_counter()
        with torch.inference_mode():
            for part in pool.parts:
                for chunk in images.split(part.images_at_once):
                    part.source.module(part.preprocess(chunk))
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the search of the solar-cell example.")
    parser.add_argument(
        "--image-size", type=int, default=128, help="128 as in solar_cells.yaml, 224 as in the full one"
    )
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--labelled", type=int, default=256, help="images to choose by")
    parser.add_argument("--journal", type=Path, help="keep a journal there; run twice to see what going on costs")
    options = parser.parse_args()
    imports = peak_gigabytes()

    data = CalibrationDataModule(
        image_folder=str(options.solar_cells / "images"),
        image_size=options.image_size,
        calibration_samples=32,
        train_samples=256,
        selection_samples=options.labelled,
        test_samples=512,
    )
    sources = load_sources([f"local-dir:{options.solar_cells}/efficientnet_lite{k}" for k in range(3)])
    begun = time.perf_counter()
    pool = Pool(sources, data.image_shape)
    result = pool.search(
        data.calibration_dataloader(),
        data.selection_dataloader(),
        num_classes=data.num_classes,
        journal=options.journal,
    )
    total = time.perf_counter() - begun
    peak = peak_gigabytes()

    images = torch.cat([batch[0] for batch in data.calibration_dataloader()])
    bare = bare_pass(pool, images)
    print(f"{len(result.ranked)} candidates at {options.image_size} pixels, {torch.get_num_threads()} threads")
    print(f"bare pass of the sources over {len(images)} images: {bare:.2f} s")
    for stage, seconds in [*result.seconds.items(), ("all", total)]:
        print(f"{stage:<10} {seconds:7.2f} s {seconds / bare:7.1f} x")
    if options.journal is not None:
        sizes = [file.stat().st_size for file in options.journal.rglob("*") if file.is_file()]
        print(f"journal: {len(sizes)} files, {sum(sizes) / 1e6:.0f} MB")
    searched = total - result.seconds["rank"]
    print(
        f"cutting, statistics and search together {searched:.1f} s; peak memory of the process {peak:.2f} GB, "
        f"{1000 * (peak - imports):.0f} MB beyond what its imports hold"
    )


if __name__ == "__main__":
    main()
