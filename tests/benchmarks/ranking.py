"""How well each ranking predicts test accuracy: Spearman over composed networks, beside what noise leaves to predict.

    python examples/prepare_solar_cells.py && python tests/benchmarks/ranking.py [--json ranking.json]

ELPV's solar cells with three EfficientNet-Lites, and scikit-learn's handwritten digits with six small networks that are
trained here: for the same task, and (digits-otherwise) for coarser ones. Each task composes networks that span the
range, ranks them on selection images (256, and four draws of 64 out of these, averaged), fits one closed-form head for
each on other labelled images and tests all of them on images that nothing else has touched. Only composed networks are
correlated, no source and no self-stitched one.

"of ceiling" is relative to what the networks' true accuracies would reach on this test set (`Ceiling.ceiling`), which
is stricter than the Spearman of two halves. "Beam's alone" is the Spearman over what the package's own search found,
which leaves bad networks out and so is harder to order. "first" is the test accuracy of the network that the ranking
puts first. Intervals are over candidates, 95 %; as candidates share fronts, they are a little narrow. What depends on
the head's images is not in the ceiling: all candidates' heads see the same ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranking_statistics import noise_ceiling, spearman, spearman_interval
from ranking_tasks import EveryKind, Task, handwritten_digits, solar_cells
from torch import Tensor

from lightning_stitch import Beam, Pool, fit_ridge_head
from lightning_stitch.progress import Silent
from lightning_stitch.search.evaluation import Outcome
from lightning_stitch.search.ranking import NEED_LABELS, RANKINGS, SelectionData
from lightning_stitch.stitching.candidates import Candidate

FEW = 64
TASKS = ("digits", "digits-otherwise", "solar-cells")


def measure(task: Task, strategy: EveryKind) -> dict[str, Any]:
    """Compose, rank and test; everything that the table says of one task."""
    begun = time.perf_counter()
    seen: dict[str, Any] = {}

    def keep(candidates: Sequence[Candidate], selection: SelectionData) -> list[dict[str, float]]:
        seen.update(candidates=candidates, selection=selection)
        return [{"none": 0.0}] * len(candidates)

    pool = Pool(task.sources, tuple(task.calibration[0][0].shape[1:]))
    pool.search(
        task.calibration,
        task.selection,
        strategy=strategy,
        ranking=keep,
        num_classes=task.num_classes,
        max_candidates=10_000,
    )
    candidates, selection = seen["candidates"], seen["selection"]
    correct = answers(pool, candidates, task)
    stitched = [index for index, candidate in enumerate(candidates) if candidate.kind == "stitched"]
    accuracies = correct[stitched].mean(1)
    ceiling = noise_ceiling(correct[stitched])
    origins = [strategy.origins[candidates[index].recipe.fragments] for index in stitched]
    searched = np.array([origin.startswith("Beam") for origin in origins])
    searched_ceiling = noise_ceiling(correct[stitched][searched])
    draws = {"all": [selection], "few": quarters(selection)}
    rows = []
    for name in [*RANKINGS, "MACs"]:
        row: dict[str, Any] = {"ranking": name, "labels": name in NEED_LABELS}
        for which, parts in draws.items():
            spent = time.perf_counter()
            scores = np.array([decisive(name, candidates, part) for part in parts])[:, stitched]
            row[f"seconds_{which}"] = (time.perf_counter() - spent) / len(parts)
            value, low, high = spearman_interval(scores, accuracies)
            row[f"spearman_{which}"], row[f"interval_{which}"] = value, (low, high)
            row[f"of_ceiling_{which}"] = value / ceiling.ceiling if ceiling.ceiling else 0.0
            row[f"searched_{which}"] = float(spearman(scores[:, searched], accuracies[searched]).mean())
            row[f"first_{which}"] = float(np.mean([accuracies[one.argmax()] for one in scores]))
        rows.append(row)
    return {
        "task": task.name,
        "candidates": len(stitched),
        "origins": dict(Counter(origins)),
        "megamacs": sorted(round(candidates[index].cost.macs / 1e6, 3) for index in stitched)[:: len(stitched) - 1],
        "test_images": correct.shape[1],
        "head_images": sum(len(labels) for _, labels in task.head),
        "selection_images": len(selection.features[0]),
        "accuracies": [float(np.quantile(accuracies, q)) for q in (0, 0.25, 0.5, 0.75, 1)],
        "sources": {
            c.recipe.fragments[0].source: float(correct[i].mean())
            for i, c in enumerate(candidates)
            if c.kind == "source"
        },
        **dataclasses.asdict(ceiling),
        "searched": {"candidates": int(searched.sum()), **dataclasses.asdict(searched_ceiling)},
        "rankings": rows,
        "seconds": time.perf_counter() - begun,
    }


def answers(pool: Pool, candidates: Sequence[Candidate], task: Task) -> np.ndarray:
    """Whether each candidate, with a head of its own, is right about each test image."""
    # One pass for both sets; their order tells them apart.
    outcomes, labels = pool.outcomes(candidates, [*task.head, *task.test], progress=Silent())
    assert labels is not None
    count = sum(len(batch) for _, batch in task.head)
    correct = []
    for outcome in outcomes:
        head, _ = fit_ridge_head(
            outcome.features[:count], labels[:count], num_classes=task.num_classes, blocks=outcome.blocks
        )
        with torch.no_grad():
            correct.append(head(outcome.features[count:]).argmax(1) == labels[count:])
    return torch.stack(correct).numpy()


def quarters(selection: SelectionData) -> list[SelectionData]:
    """Four random draws of 64 images, none in two of them."""
    assert selection.targets is not None
    order = torch.randperm(len(selection.targets), generator=torch.Generator().manual_seed(0))

    def at(outcome: Outcome, chosen: Tensor) -> Outcome:
        return dataclasses.replace(outcome, vectors=tuple(x[chosen] for x in outcome.vectors))

    return [
        SelectionData(
            [at(outcome, chosen) for outcome in selection.outcomes],
            selection.targets[chosen],
            selection.last_sources,
            {name: at(outcome, chosen) for name, outcome in selection.sources.items()},
            selection.num_classes,
        )
        for chosen in order.split(FEW)[:4]
    ]


def decisive(name: str, candidates: Sequence[Candidate], selection: SelectionData) -> list[float]:
    """Each candidate's first score by a ranking, or its size."""
    if name == "MACs":
        return [candidate.cost.macs for candidate in candidates]
    return [next(iter(scores.values())) for scores in RANKINGS[name](candidates, selection)]


def report(found: dict[str, Any]) -> str:
    """One task as Markdown."""
    origins = ", ".join(f"{count} by {origin}" for origin, count in found["origins"].items())
    least, lower, median, upper, most = found["accuracies"]
    sources = ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in found["sources"].items())
    small, large = found["megamacs"][0], found["megamacs"][-1]
    lines = [
        f"### {found['task']}",
        "",
        f"{found['candidates']} composed networks of {small:g} to {large:g} M MACs: {origins}. Heads on "
        f"{found['head_images']} labelled images; test accuracy on {found['test_images']} others from {least:.3f} to "
        f"{most:.3f} (quartiles {lower:.3f}, {median:.3f}, {upper:.3f}); sources: {sources}.",
        "",
        f"{noise_sentence(found)} {found['seconds']:.0f} s.",
        "",
        f"The {found['searched']['candidates']} that Beam found, by themselves: {noise_sentence(found['searched'])}",
        "",
        f"| ranking | {found['selection_images']} images: Spearman | of ceiling | Beam's alone | first | seconds "
        f"| {FEW} images: Spearman | of ceiling | Beam's alone | first |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found["rankings"], key=lambda row: (not row["labels"], -row["spearman_all"])):
        lines.append(
            f"| {row['ranking']}{' (labels)' if row['labels'] else ''} | {spearman_cell(row, 'all')} "
            f"| {row['seconds_all']:.1f} | {spearman_cell(row, 'few')} |"
        )
    return "\n".join(lines)


def noise_sentence(found: dict[str, Any]) -> str:
    """How far accuracies spread, whether that is noise, and the ceiling."""
    verdict = ": they lie within the noise, and nothing can be ranked." if found["within_noise"] else "."
    return (
        f"Spread of the accuracies {found['spread']:.4f}, standard error of one {found['standard_error']:.4f} "
        f"(binomial; beside others on the same images {found['paired_error']:.4f}){verdict} "
        f"Spearman between halves of the test set {found['halves']:.3f}, between two whole ones {found['full']:.3f} "
        f"(Spearman-Brown); ceiling {found['ceiling']:.3f}."
    )


def spearman_cell(row: dict[str, Any], which: str) -> str:
    low, high = row[f"interval_{which}"]
    return (
        f"{row[f'spearman_{which}']:.2f} ({low:.2f} to {high:.2f}) | {row[f'of_ceiling_{which}']:.2f} "
        f"| {row[f'searched_{which}']:.2f} | {row[f'first_{which}']:.3f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--image-size", type=int, default=128, help="of the solar cells")
    parser.add_argument("--test-images", type=int, default=2080, help="of the solar cells; 2080 are all that are left")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    found = []
    for name in options.tasks:
        if name.startswith("digits"):
            task = handwritten_digits(other_questions=name == "digits-otherwise")
            strategy = EveryKind([Beam(), Beam(2, 5)], walks=12, paths=45)
        else:
            task = solar_cells(options.solar_cells, image_size=options.image_size, test_images=options.test_images)
            strategy = EveryKind([Beam()], walks=6, paths=36)
        found.append(measure(task, strategy))
        print(report(found[-1]), end="\n\n", flush=True)
    print(
        f"{time.perf_counter() - begun:.0f} s in all, {time.process_time():.0f} s of CPU time, "
        f"{torch.get_num_threads()} threads."
    )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
