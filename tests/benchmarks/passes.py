"""How much faster searches run sources, and predictions run finished networks, than as they are (BatchNorm folded).

    python examples/prepare_solar_cells.py && python tests/benchmarks/passes.py solar_cells

Milliseconds for an image, the least of many runs, the ways in turn. Sources run in the portions that a search takes; a
StitchNet runs one image, beside its fragments, each on its own activation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_stitch import CalibrationSettings, Pool, load_sources
from lightning_stitch.stitching.segments import segment


def least_times(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Milliseconds of each way."""
    times = dict.fromkeys(ways, float("inf"))
    with torch.inference_mode():
        for _ in range(rounds):
            for name, way in ways.items():
                begun = time.perf_counter()
                way()
                times[name] = min(times[name], 1000 * (time.perf_counter() - begun))
    return times


def in_a_row(pieces: list[nn.Module] | nn.ModuleList, x: Tensor) -> Tensor:
    for piece in pieces:
        x = piece(x)
    return x


def sources(folder: Path, *, rounds: int) -> list[str]:
    lines = ["| source | pixels | images at once | as it is | folded | share |", "|---|---|---|---|---|---|"]
    for source in load_sources([f"local-dir:{folder}/efficientnet_lite{k}" for k in range(3)]):
        for size in (128, 224):
            part = segment(source, CalibrationSettings(), (3, size, size))
            x = part.preprocess(torch.rand(part.images_at_once, 3, size, size))
            ways = {"as it is": part.pieces, "folded": part.fused}
            found = least_times({name: lambda p=p, x=x: in_a_row([*p], x) for name, p in ways.items()}, rounds=rounds)
            before, after = (found[name] / len(x) for name in ways)
            lines.append(f"| {source.name} | {size} | {len(x)} | {before:.1f} | {after:.1f} | {after / before:.2f} |")
    return lines


def network(folder: Path, *, rounds: int) -> list[str]:
    """A StitchNet of two sources."""
    pool = Pool(load_sources([f"local-dir:{folder}/efficientnet_lite{k}" for k in range(2)]), (3, 128, 128))
    pool.calibrate([torch.rand(32, 3, 128, 128, generator=torch.Generator().manual_seed(0))])
    names = [part.name for part in pool.parts]
    plain = pool.assemble(pool.stitch([(names[0], None, "blocks.2"), (names[1], "blocks.2", None)]))
    fused = plain.fused()
    lines = ["| StitchNet, 128 pixels | as it is | folded | share |", "|---|---|---|---|"]
    for count in (1, 32):
        x = torch.rand(count, 3, 128, 128)
        found = least_times({"plain": lambda x=x: plain(x), "fused": lambda x=x: fused(x)}, rounds=rounds)
        shares = found["fused"] / found["plain"]
        lines.append(
            f"| batch of {count} | {found['plain'] / count:.1f} | {found['fused'] / count:.1f} | {shares:.2f} |"
        )
    x = torch.rand(1, 3, 128, 128)
    activations = [x]
    with torch.inference_mode():
        for entry, fragment in zip(fused.entries, fused.fragments, strict=True):
            activations.append(fragment(entry(activations[-1])))
    ways: dict[str, Callable[[], object]] = {"whole": lambda: fused(x)}
    for index, (entry, fragment) in enumerate(zip(fused.entries, fused.fragments, strict=True)):
        ways[f"fragment {index}"] = lambda e=entry, f=fragment, a=activations[index]: f(e(a))
    for index, tap in enumerate(fused.taps):
        ways[f"tap {index}"] = lambda t=tap, a=activations[fused.recipe.taps[index].fragment + 1]: t(a)
    found = least_times(ways, rounds=rounds)
    together = sum(milliseconds for name, milliseconds in found.items() if name != "whole")
    taps = sum(milliseconds for name, milliseconds in found.items() if name.startswith("tap"))
    lines.append("")
    lines.append(
        f"The folded one takes {found['whole']:.2f} ms for one image, its fragments, stitches and taps alone "
        f"{together:.2f} together ({found['whole'] / together:.2f} times), of which the taps {taps:.2f}."
    )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("solar_cells"))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads\n")
    print("\n".join(sources(options.folder, rounds=options.rounds)))
    print()
    print("\n".join(network(options.folder, rounds=options.rounds)))


if __name__ == "__main__":
    main()
