"""Ten people, each with a few images of their own: what does a network of their own give them?

    python examples/personal.py                                        # handwritten digits, half a minute
    python examples/prepare_solar_cells.py && python examples/personal.py --task solar-cells     # some minutes

Each person has a few classes of a larger task and a few labelled images. With digits, the sources are three small
networks that this script trains, each to tell five of the ten digits apart, and a person has any three digits. With
solar cells, the sources are three EfficientNet-Lites, and a person has cells of one kind of module, monocrystalline or
polycrystalline, functional and defective. Beside each other, on the person's own test images:

- chosen: what `compose` makes of the person's images, out of a pool that was prepared once; a source where no other
  candidate is clearly better;
- StitchNet: the best stitched one among its candidates, chosen or not;
- ensemble: the arithmetic mean of its three best candidates;
- general: what `compose` makes, once, of all people's images; it chooses among the person's classes only;
- source: the best unmodified source by the person's images.

All have heads fitted in closed form, on the person's images but for the general one.

Seconds are those from the images to a network that can be used; the general network's are for all people together.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

import lightning_stitch as ls
from lightning_stitch.stitching.candidates import Candidate


@dataclass
class Person:
    """Images of one person, and their labels: those that are given, and those that test."""

    name: str
    images: Tensor
    labels: list[str]
    test_images: Tensor
    test_labels: list[str]


def small_network(widths: Sequence[int]) -> nn.Sequential:
    """Blocks of convolution, BatchNorm and ReLU, every other one of stride 2, for five classes."""
    layers: list[nn.Module] = []
    for number, (before, behind) in enumerate(zip((3, *widths), widths, strict=False)):
        convolution = nn.Conv2d(before, behind, 3, stride=1 + number % 2, padding=1, bias=False)
        layers.append(nn.Sequential(convolution, nn.BatchNorm2d(behind), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5))


def trained(network: nn.Sequential, images: Tensor, labels: Tensor, *, epochs: int) -> nn.Sequential:
    """The network after some epochs of AdamW with one cycle of learning rates."""
    optimizer = torch.optim.AdamW(network.parameters())
    steps = epochs * math.ceil(len(images) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(network((images[chosen] - 0.5) / 0.5), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def digits(people: int, count: int, *, epochs: int) -> tuple[list[ls.Source], list[Person]]:
    """Three sources trained on a third of the images, and people with three digits each out of the others."""
    found = load_digits()
    images = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    images = nn.functional.interpolate(images, size=(16, 16), mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1)
    labels, order = torch.tensor(found.target), torch.randperm(len(images))
    preprocessing = ls.Preprocessing((3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3)
    seen, unseen = order[:600], order[600:]
    sources = []
    kinds = {"low": (0, (12, 24, 24, 32)), "middle": (3, (16, 32, 32, 48)), "high": (5, (12, 16, 24, 24, 32, 32))}
    for name, (first, widths) in kinds.items():
        own = seen[(labels[seen] >= first) & (labels[seen] < first + 5)]
        network = trained(small_network(widths), images[own], labels[own] - first, epochs=epochs)
        sources.append(ls.load_source(network, name=name, preprocessing=preprocessing))
    persons = []
    for number in range(people):
        classes = torch.randperm(10)[:3]
        own = unseen[torch.isin(labels[unseen], classes)]
        own = own[torch.randperm(len(own))]
        words = [str(label) for label in labels[own].tolist()]
        name = "digits " + ", ".join(map(str, sorted(classes.tolist())))
        persons.append(
            Person(f"{number}: {name}", images[own[:count]], words[:count], images[own[count:]], words[count:])
        )
    return sources, persons


def solar_cells(
    people: int, count: int, folder: Path, *, image_size: int, test_count: int
) -> tuple[list[ls.Source], list[Person]]:
    """Three EfficientNet-Lites, and people who share nothing, with cells of one kind of module each."""
    sources = ls.load_sources([f"local-dir:{folder}/efficientnet_lite{size}" for size in range(3)])
    files = sorted((folder / "images").glob("*/*.png"))
    shuffled = [files[index] for index in torch.randperm(len(files)).tolist()]
    persons = []
    for number in range(people):
        kind = ("mono", "poly")[number % 2]
        own = [file for file in shuffled if file.name.startswith(kind)][: count + test_count]
        shuffled = [file for file in shuffled if file not in own]
        images = torch.stack([to_tensor(Image.open(file).convert("RGB")) for file in own])
        images = nn.functional.interpolate(images, size=(image_size, image_size), mode="bilinear", antialias=True)
        images, words = images.clamp(0, 1), [file.parent.name for file in own]
        persons.append(Person(f"{number}: {kind}", images[:count], words[:count], images[count:], words[count:]))
    return sources, persons


@torch.inference_mode()
def accuracy(network: nn.Module, classes: Sequence[str], person: Person) -> float:
    """Share of the person's test images that a network gets right, choosing among the person's classes only."""
    wanted = [index for index, name in enumerate(classes) if name in person.labels]
    logits = torch.cat([network(images) for images in person.test_images.split(4)])[:, wanted]
    said = [classes[wanted[index]] for index in logits.argmax(1).tolist()]
    return sum(a == b for a, b in zip(said, person.test_labels, strict=True)) / len(said)


def with_head(pool: ls.Pool, candidate: Candidate, found: ls.StitchedClassifier, person: Person) -> nn.Module:
    """A candidate with a head fitted on the person's images."""
    body = pool.assemble(candidate)
    with torch.no_grad():
        features = torch.cat([body(images) for images in person.images.split(4)])
    targets, blocks = numbers(found, person), body.recipe.head_blocks  # each depth as loud as another
    head, _ = ls.fit_ridge_head(features, targets, num_classes=len(found.class_names), blocks=blocks)
    return nn.Sequential(body, head).eval()


def numbers(found: ls.StitchedClassifier, person: Person) -> Tensor:
    """The person's labels as a network's outputs stand for them."""
    return torch.tensor([found.class_names.index(label) for label in person.labels])


def mean_and_error(values: Sequence[float]) -> str:
    """The mean over people and its standard error."""
    x = torch.tensor(values, dtype=torch.float64)
    return f"{x.mean():.3f} +- {x.std() / math.sqrt(len(x)):.3f}" if len(x) > 1 else f"{x.mean():.3f}"


def main(arguments: list[str] | None = None) -> None:
    """Compose everyone's networks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["digits", "solar-cells"], default="digits")
    parser.add_argument("--people", type=int, default=10)
    parser.add_argument("--images", type=int, default=24, help="labelled images of each person")
    parser.add_argument("--epochs", type=int, default=12, help="of training the sources of the digits")
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the other script prepared")
    parser.add_argument("--image-size", type=int, default=128, help="of the solar cells")
    parser.add_argument("--test-images", type=int, default=128, help="of each person, of the solar cells")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    if options.task == "digits":
        sources, people = digits(options.people, options.images, epochs=options.epochs)
    else:
        size, count = options.image_size, options.test_images
        sources, people = solar_cells(
            options.people, options.images, options.solar_cells, image_size=size, test_count=count
        )

    begun = time.perf_counter()
    pool = ls.Pool.prepare(sources, tuple(people[0].images.shape[1:]))
    prepared = time.perf_counter() - begun
    everyone = torch.cat([person.images for person in people])
    begun = time.perf_counter()
    general = ls.compose(pool, everyone, [label for person in people for label in person.labels])
    general_seconds = time.perf_counter() - begun

    kinds = ("chosen", "StitchNet", "ensemble", "general", "source")
    table = Table(title=f"{options.task}: {options.images} labelled images of each person", title_justify="left")
    for column in ("person", "chosen is", *kinds, "s chosen", "s source"):
        table.add_column(column, justify="left" if column in ("person", "chosen is") else "right")
    scores: list[list[float]] = []
    for person in people:
        begun = time.perf_counter()
        own = ls.compose(pool, person.images, person.labels)
        seconds, result = time.perf_counter() - begun, own.result
        begun = time.perf_counter()
        source = with_head(pool, result.best_source.candidate, own, person)
        source_seconds = time.perf_counter() - begun + result.seconds["sources"]
        assert result.best_stitched is not None
        stitched = with_head(pool, result.best_stitched.candidate, own, person)
        together = ls.ensemble(pool, result, [(person.images, numbers(own, person))], top=3)
        networks = (own, stitched, together, source)
        found = [accuracy(network, own.class_names, person) for network in networks]
        scores.append([*found[:3], accuracy(general, general.class_names, person), found[3]])
        figures = [f"{score:.3f}" for score in scores[-1]] + [f"{seconds:.2f}", f"{source_seconds:.2f}"]
        table.add_row(person.name, result.best.candidate.kind, *figures)
    console = Console(width=130)
    console.print(table)
    for kind, values in zip(kinds, zip(*scores, strict=True), strict=True):
        ahead = [score - row[-1] for score, row in zip(values, scores, strict=True)]
        console.print(f"{kind}: accuracy {mean_and_error(values)}; ahead of the source {mean_and_error(ahead)}")
    console.print(f"Preparing the pool: {prepared:.2f} s. The general network: {general_seconds:.2f} s.")
    console.print(f"It is: {general.result.summary()}")


if __name__ == "__main__":
    main()
