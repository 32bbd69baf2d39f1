"""Whether the smallest member of every timm family gives the same outputs when it is saved and loaded again.

    python tests/benchmarks/saved_survey.py                        # every family, a quarter of an hour of one core
    python tests/benchmarks/saved_survey.py swin_tiny_patch4_window7_224 torchvision:regnet_x_400mf

Weights are random. Each network is one fragment of one source, saved by `save_pretrained` and loaded by
`from_pretrained`, where nothing but the folder is there; the largest difference of outputs for one random image in the
source's own size is printed. Families without a cut (CrossViT) say so.
"""

from __future__ import annotations

import sys
import tempfile
import warnings

import timm
import torch
from cut_survey import smallest_member

from lightning_stitch import FragmentRef, Recipe, StitchedNetwork, StitchError, load_source


def difference(spec: str) -> float:
    """The largest difference between a network's outputs and those of its saved copy."""
    source = load_source(spec, pretrained=False)
    size = source.preprocessing.input_size
    whole, width = FragmentRef(source.name, None, None), source.graph.output_features()
    recipe = Recipe.chain((source.ref,), (whole,), num_features=width, input_size=size)
    network = StitchedNetwork.from_recipe(recipe).eval()
    images = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(folder)
        return float((StitchedNetwork.from_pretrained(folder)(images) - network(images)).abs().max())


def main() -> None:
    warnings.simplefilter("ignore")
    others = ("test_", "lightning_stitch")  # timm's own for tests, and what this package adds
    families = [f for f in timm.list_modules() if not all(n.startswith(others) for n in timm.list_models(module=f))]
    for spec in sys.argv[1:] or map(smallest_member, families):
        try:
            print(f"{spec}: {difference(spec)}", flush=True)
        except StitchError as error:
            print(f"{spec}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


if __name__ == "__main__":
    main()
