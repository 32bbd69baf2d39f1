"""Small networks composed and healed, beside early exits, the same networks unhealed, and distillation.

    python examples/prepare_solar_cells.py && python tests/benchmarks/healing.py --solar-cells solar_cells
    python tests/benchmarks/healing.py --tasks digits --seeds 0 --images 64 --no-distillation    # a part of it

For each seed and number of unlabelled images one search with healing; under each share of the cheapest source's MACs
the StitchNet that ranks first, as it is healed, as it is without healing (within one network that is ReplaceMe's
method), and distilled: 100 steps of AdamW on what lies behind its stitch, towards its last source's own features of the
same images. Like healing it sees three quarters of these, and the others choose its learning rate. Beside it the early
exit that ranks first within the share. All have the same closed-form head on the same labels; test images choose
nothing.

Fidelity is R2 on the test images against the last source's own features: "as it is", of what the network gives, and
"read", of a ridge regression on that, fitted on the unlabelled images: what a linear head can read of the source's
features. An early exit has features of its own, so it can only be read. Photographs have no labels: networks end at
1000 classes, the early exit is the one whose regression explains most with each calibration image left out in turn, and
agreement is the share of test crops with the last source's own top prediction. +- is the standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from healing_tasks import digits, photographs, solar_cells
from ranking_tasks import Task
from torch import Tensor

from lightning_stitch import Beam, Budget, CalibrationSettings, Pool, SearchResult, fit_ridge_head
from lightning_stitch.composing.shrinking import by_fidelity
from lightning_stitch.heads.ridge import DEFAULT_STRENGTHS
from lightning_stitch.healing.trials import divided, entered, held_out_r2
from lightning_stitch.maths import loo_ridge, r2, ridge_weights
from lightning_stitch.progress import Silent
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.paths import early_exits
from lightning_stitch.search.space import SearchSpace
from lightning_stitch.stitching.candidates import Candidate

STEPS, BATCH, LEARNING_RATES, MAX_HEALED = 100, 16, (1e-3, 1e-4), 24
METHODS = ("unhealed", "healed", "distilled", "early exit")
Row = dict[str, Any]


def measure(
    task: Task, shares: Sequence[float], *, groups: Sequence[str] | None, distil: bool, ranking: str
) -> list[Row]:
    """One row for each share and method."""
    labelled = bool(task.head)
    settings = CalibrationSettings(until="features" if labelled else "output", readout="last")
    pool = Pool(task.sources, tuple(task.calibration[0][0].shape[1:]), settings=settings)
    fractions = tuple(sorted({1.0, *shares}, reverse=True))
    result = pool.search(
        task.calibration,
        task.selection,
        strategy=Beam(max_fragments=2, fractions=fractions, deep=4),
        ranking=ranking if labelled else by_fidelity,
        num_classes=task.num_classes if labelled else None,
        heal=True,
        max_healed=MAX_HEALED,
        groups=groups,
    )
    pool.calibrate(task.calibration, groups=groups)
    sources = {
        r.candidate.recipe.fragments[0].source: r.candidate for r in result.ranked if r.candidate.kind == "source"
    }
    cheapest = min(sources.values(), key=lambda c: c.cost.macs)
    chosen: dict[tuple[float, str], Candidate] = {}
    seconds: dict[tuple[float, str], float] = {}
    for share in shares:
        chosen |= contenders(pool, result, share, share * cheapest.cost.macs, seconds)
        if distil and (share, "unhealed") in chosen:
            tried = [distilled(pool, chosen[share, "unhealed"], rate) for rate in LEARNING_RATES]
            _, seconds[share, "distilled"], chosen[share, "distilled"] = max(tried, key=lambda found: found[0])
    if not labelled:
        chosen |= exits_without_labels(pool, task, shares, cheapest.cost.macs)
    everything = [*sources.values(), *chosen.values()]
    given = dict(zip(map(id, everything), features(pool, everything, task), strict=True))
    cheap = accuracy(given[id(cheapest)], task) if labelled else None
    rows = []
    for (share, method), candidate in chosen.items():
        own = given[id(sources[candidate.recipe.fragments[-1].source])]
        mine = given[id(candidate)]
        rows.append(
            {
                "share": share,
                "method": method,
                "path": candidate.recipe.path,
                "megamacs": candidate.cost.macs / 1e6,
                "fidelity": None if method == "early exit" else r2(mine[2], own[2]),
                "read": r2(read(mine, own), own[2]),
                "accuracy": accuracy(mine, task) if labelled else None,
                "agreement": None if labelled else agreement(mine, own, as_it_is=method != "early exit"),
                "cheapest": cheap,
                "seconds": seconds.get((share, method)),
            }
        )
    return rows


def contenders(
    pool: Pool, result: SearchResult, share: float, macs: float, seconds: dict[tuple[float, str], float]
) -> dict[tuple[float, str], Candidate]:
    """What ranks first within a share, composed anew with and without healing."""
    found: dict[tuple[float, str], Candidate] = {}
    best = result.within(Budget(max_macs=macs), kind="stitched")
    if best is not None:
        fragments = best.candidate.recipe.fragments
        ends = [dataclasses.replace(f, end=None) if f is fragments[-1] else f for f in fragments]
        begun = time.perf_counter()
        found[share, "unhealed"] = pool.stitch(ends)
        middle = time.perf_counter()
        found[share, "healed"] = pool.stitch(ends, heal=True)
        seconds[share, "healed"] = time.perf_counter() - middle - (middle - begun)
    early = result.within(Budget(max_macs=macs), kind="early exit")
    return found if early is None else {**found, (share, "early exit"): early.candidate}


def exits_without_labels(
    pool: Pool, task: Task, shares: Sequence[float], macs: int
) -> dict[tuple[float, str], Candidate]:
    """Under each share the early exit from which most of its source's outputs can be read."""
    costs = CompositionCosts(pool.parts, bias=True, max_fragments=1, early_exits=True)
    exits = early_exits(SearchSpace(pool.calibration.sources, pool.settings, costs=costs))
    explained = {}
    for candidate, (calibrated, *_) in zip(exits, features(pool, exits, task), strict=True):
        own = pool.calibration.sources[candidate.steps[-1].source].features
        fit = loo_ridge(calibrated, own, strengths=DEFAULT_STRENGTHS)
        explained[id(candidate)] = (
            -(fit.predictions - own).square().sum((1, 2)).min() / (own - own.mean(0)).square().sum()
        )
    found = {}
    for share in shares:
        within = [candidate for candidate in exits if candidate.cost.macs <= share * macs]
        if within:
            found[share, "early exit"] = max(within, key=lambda candidate: explained[id(candidate)])
    return found


def distilled(pool: Pool, candidate: Candidate, learning_rate: float) -> tuple[float, float, Candidate]:
    """What lies behind the stitch trained towards its last source's features; held-out R2, seconds, and the network."""
    begun = time.perf_counter()
    first, last = candidate.steps
    source = pool.calibration.sources[last.source]
    # From what the stitch gives: the receiver's own layers are what healing changes, too.
    fragment = candidate.recipe.fragments[-1]
    receiver = source.parts.graph.fragment(fragment.start, fragment.end)
    portions = pool.calibration.sources[first.source].activations[first.last - 1]
    fitted, held_out = divided(portions, source.num_held_out)
    with torch.no_grad():
        fed = torch.cat(entered(fitted, last, source)).clone()
    wanted = source.features[: len(fed)].clone()
    optimizer = torch.optim.AdamW(receiver.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    receiver.eval()
    for _ in range(STEPS):
        index = torch.randperm(len(fed), generator=generator)[:BATCH]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(receiver(fed[index]), wanted[index]).backward()
        optimizer.step()
    tensors = {name: x.detach() for name, x in receiver.named_parameters()}
    found = candidate.with_steps((first, dataclasses.replace(last, tensors=tensors)))
    seconds = time.perf_counter() - begun
    return held_out_r2(found, pool.calibration.sources, held_out), seconds, found


def features(pool: Pool, candidates: Sequence[Candidate], task: Task) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each gives of the calibration, the head's and the test images."""
    sizes = [sum(len(x) for x, _ in part) for part in (task.calibration, task.head, task.test)]
    outcomes, _ = pool.outcomes(candidates, [*task.calibration, *task.head, *task.test], progress=Silent())
    return [tuple(outcome.features.split(sizes)) for outcome in outcomes]  # type: ignore[misc]


def read(mine: tuple[Tensor, Tensor, Tensor], own: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The source's features of the test images as a regression on the calibration images reads them."""
    fit = loo_ridge(mine[0], own[0], strengths=DEFAULT_STRENGTHS)
    affine = ridge_weights(fit, strength=fit.best_strength)
    return mine[2].double() @ affine.weight.T + affine.bias


def agreement(mine: tuple[Tensor, Tensor, Tensor], own: tuple[Tensor, Tensor, Tensor], *, as_it_is: bool) -> float:
    """Share of the test images with the source's own top prediction."""
    logits = mine[2] if as_it_is else read(mine, own)
    return (logits.argmax(1) == own[2].argmax(1)).float().mean().item()


def accuracy(mine: tuple[Tensor, Tensor, Tensor], task: Task) -> float:
    """Test accuracy of a closed-form head."""
    labels, wanted = (torch.cat([y for _, y in part]) for part in (task.head, task.test))
    head, _ = fit_ridge_head(mine[1], labels, num_classes=task.num_classes)
    with torch.no_grad():
        return (head(mine[2]).argmax(1) == wanted).float().mean().item()


def markdown(rows: Sequence[Row]) -> str:
    """Means over seeds, one line for each number of images and share."""
    labelled = rows[0]["accuracy"] is not None
    judged = "accuracy" if labelled else "agreement"
    header = ["images", "% of MACs", *(f"R2 {m}: as it is / read" for m in METHODS[:3]), "R2 early exit: read"]
    header += [*(f"{judged} {m}" for m in METHODS)] + ["cheapest source"] * labelled + ["s healing", "s distilling"]
    lines = [header, ["---"] * len(header)]
    for images, share in sorted({(row["images"], -row["share"]) for row in rows}):
        among = [row for row in rows if (row["images"], -row["share"]) == (images, share)]
        by_method = {m: [row for row in among if row["method"] == m] for m in METHODS}
        cells = [str(images), f"{-100 * share:.0f}"]
        cells += [f"{mean(by_method[m], 'fidelity')} / {mean(by_method[m], 'read')}" for m in METHODS[:3]]
        cells += [mean(by_method["early exit"], "read")]
        cells += [mean(by_method[m], judged, spread=True) for m in METHODS]
        cells += [mean([row for row in among if row["method"] == among[0]["method"]], "cheapest")] * labelled
        cells += [mean(by_method[m], "seconds", 2) for m in ("healed", "distilled")]
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean(rows: Sequence[Row], name: str, places: int = 3, *, spread: bool = False) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    if not values:
        return ""
    deviation = f" +- {statistics.stdev(values):.{places}f}" if spread and len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{deviation}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--tasks", nargs="+", choices=("solar-cells", "digits", "photographs"), default=["solar-cells"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", nargs="+", type=int, default=[16, 32, 64, 256], help="unlabelled ones")
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.75, 0.66, 0.5, 1 / 3])
    parser.add_argument("--image-size", type=int, default=128, help="of all but digits")
    parser.add_argument("--test-images", type=int, default=768, help="of all but digits")
    parser.add_argument("--ranking", default="auto", help='"auto" looks at 64 labels, "consensus" at none')
    parser.add_argument("--no-distillation", action="store_true")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args(arguments)
    record = {}
    sizes = {"image_size": options.image_size, "test_images": options.test_images}
    for name in options.tasks:
        rows, begun = [], time.perf_counter()
        for count in options.images:
            for seed in options.seeds:
                groups = None
                if name == "digits":
                    task = digits(count=count, seed=seed)
                elif name == "solar-cells":
                    task = solar_cells(options.solar_cells, count=count, seed=seed, **sizes)
                else:
                    task, groups = photographs(options.solar_cells, count=count, seed=seed, **sizes)
                found = measure(
                    task, options.shares, groups=groups, distil=not options.no_distillation, ranking=options.ranking
                )
                rows += [{"images": count, "seed": seed, **row} for row in found]
                record[name] = rows
                if options.json is not None:
                    options.json.write_text(json.dumps(record, indent=1))
        print(f"### {task.name}, {len(options.seeds)} seeds\n\n{markdown(rows)}\n", flush=True)
        print(f"{time.perf_counter() - begun:.0f} s, {torch.get_num_threads()} threads.\n", flush=True)


if __name__ == "__main__":
    main()
