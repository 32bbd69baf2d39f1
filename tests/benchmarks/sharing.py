"""What saving and loading a stitched network takes, beside timm's own saving and loading of the same architecture.

    python tests/benchmarks/sharing.py                                  # ViT-B/16, 86 M parameters
    python tests/benchmarks/sharing.py --source vit_large_patch16_224

Both networks have random weights. Each is saved and loaded in processes of their own, in turn, and timed after the
imports; memory is the peak above what the imports hold. timm checks neither hash nor shapes before it allocates.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def peak() -> float:
    """MB that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)


def measured(what: str, source: str, folder: Path) -> None:
    """One step in this process; prints seconds and MB."""
    import timm
    import torch

    from lightning_stitch import FragmentRef, Recipe, StitchedNetwork, load_source

    torch.manual_seed(0)
    steps: dict[str, Callable[[], object]] = {
        "loading, timm": lambda: timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=True),
        "loading, stitched": lambda: StitchedNetwork.from_pretrained(folder / "stitched"),
    }
    if what == "saving, timm":
        model = timm.create_model(source)
        steps[what] = lambda: timm.models.save_for_hf(model, str(folder / "timm"), safe_serialization=True)
    elif what == "saving, stitched":
        loaded = load_source(source, pretrained=False)
        ref, width, size = loaded.ref, loaded.graph.output_features(), loaded.preprocessing.input_size
        whole = (FragmentRef(ref.name, None, None),)
        network = StitchedNetwork.from_recipe(Recipe.chain((ref,), whole, num_features=width, input_size=size))
        steps[what] = lambda: network.save_pretrained(folder / "stitched", overwrite=True)
    before, begun = peak(), time.perf_counter()
    steps[what]()
    print(json.dumps([time.perf_counter() - begun, peak() - before]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of saving and loading.")
    parser.add_argument("--source", default="vit_base_patch16_224", help="a timm architecture")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        measured(options.step, options.source, options.folder)
        return

    with tempfile.TemporaryDirectory() as folder:

        def run(step: str) -> tuple[float, float]:
            command = [sys.executable, __file__, "--source", options.source, "--step", step, "--folder", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, memory = json.loads(done.stdout.splitlines()[-1])
            return seconds, memory

        for action in ("saving", "loading"):
            found = [(run(f"{action}, timm"), run(f"{action}, stitched")) for _ in range(options.repeats)]
            (their_seconds, their_memory), (seconds, memory) = (
                tuple(statistics.median(pair[side][kind] for pair in found) for kind in (0, 1)) for side in (0, 1)
            )
            size = (Path(folder) / "stitched" / "model.safetensors").stat().st_size / 2**20
            print(
                f"{action} {size:.0f} MB: {seconds:.2f} s, timm {their_seconds:.2f} s ({seconds / their_seconds:.2f} "
                f"x); {memory:.0f} MB above the imports, timm {their_memory:.0f} MB ({memory / size:.2f} x the file)"
            )


if __name__ == "__main__":
    main()
