"""Exported networks beside PyTorch: milliseconds an image, and how far their answers are apart.

    lightning-stitch compose solar_cells/images local-dir:solar_cells/efficientnet_lite0 \\
        local-dir:solar_cells/efficientnet_lite1 --image_size 128 --output solar
    OMP_NUM_THREADS=2 python tests/benchmarks/exports.py solar solar_cells/images/defective

PyTorch runs the network folded (`StitchedNetwork.fused`), onnxruntime and `torch.export` the files. Files and PyTorch
take turns, five rounds after one that does not count; the medians are told.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from lightning_stitch import StitchedClassifier
from lightning_stitch.data import ImageFileSet, list_images
from lightning_stitch.search import latency_per_image

ROUNDS = 5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saved", help="a saved classifier")
    parser.add_argument("images", type=Path)
    parser.add_argument("--count", type=int, default=128)
    options = parser.parse_args()
    model = StitchedClassifier.from_pretrained(options.saved)
    assert model.network is not None
    assert model.head is not None
    assert model.recipe is not None
    files = ImageFileSet(list_images([options.images])[: options.count], model.recipe.input_size)
    images = torch.stack([files[index][0] for index in range(len(files))])
    folded = nn.Sequential(model.network.fused(), model.head)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        (onnx,), (pt2,) = model.export(f"{scratch}/a.onnx"), model.export(f"{scratch}/a.pt2")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        session = onnxruntime.InferenceSession(onnx, settings)
        program = torch.export.load(pt2).module()
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "PyTorch, folded": lambda x: folded(x).softmax(1),
            "PyTorch, as it is": lambda x: model.head(model.network(x)).softmax(1),
            "onnxruntime": lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]),
            "torch.export": lambda x: program(x)[0],
        }
        expected = ways["PyTorch, as it is"](images)
        apart = {name: float((run(images) - expected).abs().max()) for name, run in ways.items()}
        cost = f"{model.recipe.scores['macs'] / 1e6:.0f} M MACs"
        print(f"{len(images)} images, {settings.intra_op_num_threads} threads, {cost}\n")
        print("| | ms an image alone | against PyTorch, folded | in batches of 32 | against it | furthest answer |")
        print("|---|---|---|---|---|---|")
        times = {name: {1: list[float](), 32: list[float]()} for name in ways}
        for turn in range(ROUNDS + 1):
            for name, run in ways.items():
                for batch, measured in times[name].items():
                    spent = latency_per_image(run, images, batch_size=batch)
                    measured += [spent] if turn else []
        base = {batch: statistics.median(measured) for batch, measured in times["PyTorch, folded"].items()}
        for name, by_batch in times.items():
            words = " | ".join(
                f"{statistics.median(measured):.2f} | {statistics.median(measured) / base[batch]:.2f}"
                for batch, measured in by_batch.items()
            )
            print(f"| {name} | {words} | {apart[name]:.1g} |")


if __name__ == "__main__":
    main()
