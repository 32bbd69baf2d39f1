"""What a personal network costs beyond the sources' passes over its images, and whether requests leave memory behind.

    python examples/prepare_solar_cells.py && python tests/benchmarks/personal.py        # time
    python tests/benchmarks/personal.py --requests 50 --image-size 128    # memory over 50 requests

The bare passes are the three sources' own modules over the same images, in the batch size that is fastest of several,
in eval and inference mode. Each request is timed between two of them, and its ratio is to the mean of both: the machine
may do other things besides. Every request has images of its own.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from lightning_stitch import Pool, Source, load_sources
from lightning_stitch.composing import compose_personal


def bare_pass(sources: list[Source], images: torch.Tensor, batch_size: int) -> float:
    """Seconds of one pass of every source over the images."""
    begun = time.perf_counter()
    with torch.inference_mode():
        for source in sources:
            for batch in images.split(batch_size):
                source.module(batch)
    return time.perf_counter() - begun


def resident() -> float:
    """MB that the process holds now; its peak where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak()
    return int(status.read_text().split("VmRSS:")[1].split()[0]) / 2**10


def peak() -> float:
    """MB that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of personal networks.")
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=32, help="of each request")
    parser.add_argument("--requests", type=int, default=7)
    options = parser.parse_args()

    sources = load_sources([f"local-dir:{options.solar_cells}/efficientnet_lite{k}" for k in range(3)])
    size, count = options.image_size, options.images
    begun = time.perf_counter()
    pool = Pool.prepare(sources, (3, size, size))
    print(f"preparing the pool: {time.perf_counter() - begun:.2f} s; {torch.get_num_threads()} threads")
    files = {
        kind: sorted((options.solar_cells / "images" / kind).glob("*.png")) for kind in ("functional", "defective")
    }

    def request(number: int) -> tuple[torch.Tensor, list[str]]:
        own = [(file, kind) for kind, found in files.items() for file in found[number :: options.requests]]
        own = [own[index] for index in torch.randperm(len(own))[: count - 2].tolist()] + [own[0], own[-1]]
        images = torch.stack([to_tensor(Image.open(file).convert("RGB").resize((size, size))) for file, _ in own])
        return images, [kind for _, kind in own]

    torch.manual_seed(0)
    images, labels = request(0)
    batch_size = min((2, 4, 8, 16, 32), key=lambda batch: min(bare_pass(sources, images, batch) for _ in range(2)))
    compose_personal(pool, images, labels)
    ratios, kinds, memory = [], [], []
    before = bare_pass(sources, images, batch_size)
    for number in range(options.requests):
        images, labels = request(number)
        begun = time.perf_counter()
        found = compose_personal(pool, images, labels)
        seconds = time.perf_counter() - begun
        kinds.append(found.result.best.candidate.kind)
        stages = ", ".join(f"{stage} {spent:.2f}" for stage, spent in found.result.seconds.items())
        del found
        gc.collect()
        memory.append((resident(), peak()))
        after = bare_pass(sources, images, batch_size)
        bare, before = (before + after) / 2, after
        ratios.append(seconds / bare)
        print(
            f"{number}: bare {bare:.2f} s, compose {seconds:.2f} s ({stages}), {seconds / bare:.2f} x; {kinds[-1]}; "
            f"{memory[-1][0]:.0f} MB, at most {memory[-1][1]:.0f}"
        )
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{count} images at {size} pixels, batches of {batch_size}: {statistics.median(ratios):.2f} x ({spread})")
    tenth = max(1, len(memory) // 10)
    first, last = (statistics.mean(held for held, _ in part) for part in (memory[:tenth], memory[-tenth:]))
    print(
        f"resident: {first:.0f} MB after the first requests, {last:.0f} MB after the last; peak {memory[0][1]:.0f} MB"
    )
    print(f"after the first request, {memory[-1][1]:.0f} MB after {len(memory)}. Chosen: {', '.join(kinds)}")


if __name__ == "__main__":
    main()
