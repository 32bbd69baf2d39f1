"""What a large pile of small sources costs: cutting, calibrating, a step of the search, memory; what a sketch loses.

    python tests/benchmarks/piles.py --sources 200

The sources are timm's `test_*` models with random weights. A step scores one cut against all receivers; of more than
1,024 the best 256 by every eighth row are scored on all rows. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import timm
import torch

from lightning_stitch import Pool, StitchError, load_source
from lightning_stitch.search import SearchSpace, scoring
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.space import Edge, Filters

_FILTERS = Filters(max_upsampling=2.0)  # as Beam's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=int, default=200)
    parser.add_argument("--image-size", type=int, default=64)
    options = parser.parse_args()
    names = timm.list_models("test_*")
    sources = []
    for number in range(2 * options.sources):
        torch.manual_seed(number)
        name = names[number % len(names)]
        source = load_source(name, pretrained=False, name=f"{name}-{number}")
        try:
            Pool([source], options.image_size)
        except StitchError:
            continue  # of another image size, or without a cut
        sources.append(source)
        if len(sources) == options.sources:
            break
    imports = _megabytes()
    begun = time.perf_counter()
    pool = Pool(sources, options.image_size)
    cut = time.perf_counter() - begun
    begun = time.perf_counter()
    pool.calibrate([torch.rand(32, 3, options.image_size, options.image_size)])
    calibrated = time.perf_counter() - begun
    assert pool.calibration is not None
    costs = CompositionCosts(pool.parts, bias=True, max_fragments=3)
    space = SearchSpace(pool.calibration.sources, pool.settings, costs=costs)
    seconds, kept, best = [], [], []
    for state in space.starts()[:: max(1, len(sources) // 16)]:
        for place, (at, activation) in enumerate(space.walk(state)):
            begun = time.perf_counter()
            edges = space.edges(state, at, activation, _FILTERS)
            seconds.append(time.perf_counter() - begun)
            if place % 3 == 0:
                many, scoring.MANY = scoring.MANY, 10**9
                exact = sorted(space.edges(state, at, activation, _FILTERS), key=lambda edge: -edge.cka)
                scoring.MANY = many
                if len(exact) > many:
                    found = set(map(_receiver, edges))
                    kept.append(sum(_receiver(edge) in found for edge in exact[:8]) / 8)
                    best.append(_receiver(exact[0]) in found)
    print(f"{len(sources)} sources, {len(costs.receivers)} receivers at {options.image_size} pixels, 32 images")
    print(f"cutting {cut:.1f} s, calibrating {calibrated:.1f} s")
    print(f"a step: median {1e3 * statistics.median(seconds):.0f} ms, mean {1e3 * statistics.fmean(seconds):.0f} ms")
    if kept:
        print(f"a sketch keeps {statistics.fmean(kept):.3f} of the 8 best, and the best in {sum(best)} of {len(best)}")
    print(f"memory: {_megabytes() - imports:.0f} MB more than the sources themselves")


def _receiver(edge: Edge) -> tuple[int, int]:
    return edge.source, edge.receiver


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
