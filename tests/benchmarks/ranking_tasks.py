"""The tasks of ranking.py, and the candidates that are ranked on each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_stitch import (
    Beam,
    CalibrationDataModule,
    CalibrationError,
    DepthFirst,
    FragmentRef,
    Preprocessing,
    Source,
    StitchError,
    load_source,
    load_sources,
)
from lightning_stitch.search.paths import follow
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.sources.views import Preprocess
from lightning_stitch.stitching.candidates import Candidate

Batches = Sequence[tuple[Tensor, Tensor]]

_TRIES = 100  # a third of a very short network may hold nothing but a vector, from which no stitch leads to a map

DIGIT_PREPROCESSING = Preprocessing((3, 16, 16), mean=(0.3,) * 3, std=(0.35,) * 3, fixed_size=True)


@dataclass(frozen=True, slots=True)
class Task:
    """Sources and disjoint sets of images."""

    name: str
    sources: list[Source]
    calibration: Batches
    selection: Batches
    head: Batches
    test: Batches
    num_classes: int


def solar_cells(folder: Path, *, image_size: int, test_images: int, images: Path | None = None) -> Task:
    """ELPV's solar cells, functional or defective, and three EfficientNet-Lites, as the example prepared them.

    `images`: the same cells in a folder for each of other classes.
    """
    data = CalibrationDataModule(
        image_folder=str(images or folder / "images"),
        image_size=image_size,
        calibration_samples=32,
        selection_samples=256,
        train_samples=256,
        test_samples=test_images,
    )
    return Task(
        f"ELPV, three EfficientNet-Lites, {image_size} pixels",
        load_sources([f"local-dir:{folder}/efficientnet_lite{k}" for k in range(3)]),
        list(data.calibration_dataloader()),
        list(data.selection_dataloader()),
        list(data.head_dataloader()),
        list(data.test_dataloader()),
        data.num_classes,
    )


def handwritten_digits(*, other_questions: bool) -> Task:
    """scikit-learn's digits, and six small networks trained here: three architectures, two seeds each.

    Args:
        other_questions: Whether the networks were trained for something else than the task, the ten digits: one of each
            pair to tell odd from even, the other to tell digits above 4 from those below.
    """
    found = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(images, size=(16, 16), mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    sizes = {"networks": 400, "calibration": 32, "selection": 256, "head": 128, "test": len(images) - 816}
    x, y = (
        dict(zip(sizes, part[order].contiguous().split(list(sizes.values())), strict=True))
        for part in (images, torch.tensor(found.target))
    )
    sources = []
    for build, seed in itertools.product((plain, residual, separable), range(2)):
        answers = y["networks"]
        if other_questions:
            answers = answers % 2 if seed else (answers > 4).long()
        network = trained(build, seed, x["networks"], answers)
        sources.append(load_source(network, name=f"{build.__name__}{seed}", preprocessing=DIGIT_PREPROCESSING))

    def batches(name: str) -> Batches:
        return list(zip(x[name].split(64), y[name].split(64), strict=True))

    parts = (batches(name) for name in ("calibration", "selection", "head", "test"))
    trained_for = "odd or even, above 4 or not" if other_questions else "the same task"
    return Task(f"digits, six small networks trained for {trained_for}", sources, *parts, num_classes=10)


def trained(build: type[nn.Module], seed: int, images: Tensor, labels: Tensor, *, epochs: int = 12) -> nn.Module:
    """A network after a few epochs, which take seconds."""
    torch.manual_seed(seed)
    network, normalise = build(), Preprocess(DIGIT_PREPROCESSING)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(normalise(images[chosen])), labels[chosen]).backward()
            optimizer.step()
    return network.eval()


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            convolution(width, width), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def convolution(inputs: int, outputs: int, stride: int = 1, *, kernel: int = 3, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def pair(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """A convolution within channels and one across them."""
    return nn.Sequential(convolution(inputs, inputs, stride, groups=inputs), convolution(inputs, outputs, kernel=1))


def classifier(*layers: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def plain() -> nn.Sequential:
    shapes = [(3, 16, 1), (16, 24, 2), (24, 32, 1), (32, 48, 2), (48, 48, 1)]
    return classifier(*(convolution(*shape) for shape in shapes), width=48)


def residual() -> nn.Sequential:
    shapes = [(3, 16, 1), (16, 32, 2), (32, 64, 2)]
    blocks = [layer for shape in shapes for layer in (convolution(*shape), Residual(shape[1]))]
    return classifier(*blocks, width=64)


def separable() -> nn.Sequential:
    shapes = [(16, 24, 1), (24, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 1)]
    return classifier(convolution(3, 16), *(pair(*shape) for shape in shapes), width=64)


@dataclass(frozen=True, slots=True)
class EveryKind:
    """A search strategy that spans the range: the package's searches, random walks of the paper's, random paths.

    The paths are stratified: leaving a third of a source's depth and entering a third of another's, all nine pairs of
    thirds (skips and repeats among them), with one to three stitches.

    Attributes:
        beams: The searches.
        walks: Random paths of the depth-first search, whose fragments are single blocks.
        paths: Random paths of long fragments.
        origins: Which of them gave each candidate first, by its fragments.
    """

    beams: Sequence[Beam]
    walks: int
    paths: int
    origins: dict[tuple[FragmentRef, ...], str] = field(default_factory=dict)

    def __call__(self, space: SearchSpace) -> Iterator[Candidate]:
        """Give all of them, each once."""
        for origin, candidate in self._all(space):
            if candidate.recipe.fragments not in self.origins:
                self.origins[candidate.recipe.fragments] = origin
                yield candidate

    def _all(self, space: SearchSpace) -> Iterator[tuple[str, Candidate]]:
        for beam in self.beams:
            yield from ((f"Beam(width={beam.width}, max_fragments={beam.max_fragments})", c) for c in beam(space))
        for seed in range(self.walks):
            walk = DepthFirst(sample=True, seed=seed, threshold=0, edge_threshold=0)
            yield from (("random walks of DepthFirst", c) for c in walk(space))
        strata = itertools.cycle(itertools.product(range(1, 4), range(3), range(3)))
        generator = random.Random(0)
        for stitches, leave, enter in itertools.islice(strata, self.paths):
            origin = f"random paths with {stitches} stitch{'es' * (stitches > 1)}"
            for _ in range(_TRIES):
                try:
                    found = follow(space, random_path(space, generator, stitches, leave, enter))
                except (StitchError, CalibrationError):
                    continue  # from a vector to a map, or an activation that does not vary
                yield origin, found
                break


def random_path(
    space: SearchSpace, generator: random.Random, stitches: int, leave: int, enter: int
) -> list[FragmentRef]:
    """Random fragments whose first stitch leads from one third of a source's depth to one third of another's."""
    sources = [generator.choice(space.sources) for _ in range(stitches + 1)]
    path, start, first = [], None, 0
    for stitch, (sender, receiver) in enumerate(itertools.pairwise(sources)):
        ends, entries = ([cut.name for cut in source.parts.cuts] for source in (sender, receiver))
        leaving = third(leave, len(ends)) if stitch == 0 else range(first, len(ends))
        entering = third(enter, len(entries)) if stitch == 0 else range(len(entries))
        if stitch + 1 < stitches:  # then a cut must follow, to leave by
            entering = [min(entry, len(entries) - 2) for entry in entering]
        path.append(FragmentRef(sender.name, start, ends[generator.choice(leaving)]))
        entry = generator.choice(entering)
        start, first = entries[entry], entry + 1
    return [*path, FragmentRef(sources[-1].name, start, None)]


def third(which: int, count: int) -> range:
    """The first, second or last third of so many cuts, never empty."""
    first = which * count // 3
    return range(first, max(first + 1, (which + 1) * count // 3))
