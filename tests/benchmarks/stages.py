"""What stopping when sure is worth: average MACs against accuracy, over random splits; and latency.

    python examples/prepare_solar_cells.py
    python tests/benchmarks/stages.py elpv solar_cells --markdown elpv.md
    python tests/benchmarks/stages.py digits --markdown digits.md
    python tests/benchmarks/stages.py digits-same
    python tests/benchmarks/stages.py elpv-levels solar_cells --labels 512 --splits 5
    OMP_NUM_THREADS=2 python tests/benchmarks/stages.py elpv solar_cells --latency

As in readouts.py: taps run once, then for each split and each number of labels networks are chosen by leave-one-out on
the labelled images, which set the thresholds, too, and the others test. Average MACs are those of the test images, and
"promised" those that leave-one-out expected. Differences are against the head on the last features of the best source,
intervals 95 % over splits. "its full depth" is the network above with every image going all the way. digits-same has
networks trained for the same question, elpv-levels four classes of how probable a defect is.

The last rows say where the unsure are best sent. All begin with the same front, the best early exit within a third of
the cheapest source's MACs, and may spend as much on average: half of that source's MACs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from ranking_tasks import Task
from readouts import (
    LAST,
    at_rows,
    best_last,
    figures_of,
    half_width,
    joined,
    ranked_by_labels,
    read_everything,
    scores_of,
    task_named,
)
from torch import Tensor, nn

from lightning_stitch import Budget, Pool
from lightning_stitch.heads import HeadSettings, StagedHead
from lightning_stitch.report.verdicts import judge_splits
from lightning_stitch.search import latency_per_image
from lightning_stitch.search.evaluation import Outcome, keys_of_reads
from lightning_stitch.search.ranking import SelectionData
from lightning_stitch.search.results import Ranked, in_order, pick
from lightning_stitch.search.staging import Staging, staged
from lightning_stitch.stitching.candidates import Candidate

Figures = tuple[float, float, float, float]  # accuracy, AUROC, average M MACs, promised
DEPTH = ", its full depth"


def choices(
    pool: Pool, candidates: Sequence[Candidate], outcomes: Sequence[Outcome], labels: Tensor, num_classes: int
) -> dict[str, Ranked]:
    """What is chosen by labelled images alone, by row of the table."""
    ranked, selection, by_key = ranked_by_labels(candidates, outcomes, labels, num_classes)
    cheapest = min(part.cost.macs for part in pool.parts)
    rows: dict[str, Ranked] = {"best source, all depths": next(r for r in ranked if r.candidate.kind == "source")}
    for share in (0.4, 0.6, 1.0):
        budget = Budget(mean_macs=share * cheapest)
        fitting = [r for r in ranked if budget.allows(r.candidate.cost)]
        words = f"{share:g} of the cheapest source's MACs"
        rows[f"static, {words}"] = pick(fitting, budget)
        found = staged(ranked, selection, by_key, pool.all_parts, budget, max_stages=3)
        rows[f"stops when sure, {words}"] = found[-1]
        rows[f"chosen of both, {words}"] = pick(in_order([*fitting, *found]), budget)
    return {**rows, **ways_on(ranked, selection, by_key, pool, cheapest)}


def ways_on(
    ranked: Sequence[Ranked], selection: SelectionData, by_key: dict[str, Outcome], pool: Pool, cheapest: int
) -> dict[str, Ranked]:
    """From one front to the rest of its source, through stitches, and to other sources: the best of each by row."""
    staging = Staging(selection, by_key, pool.all_parts, Budget(mean_macs=cheapest / 2), soft=True)
    front = next(r for r in ranked if r.candidate.kind == "early exit" and r.candidate.cost.macs <= cheapest / 3)
    had, own = set(keys_of_reads(front.candidate)), front.candidate.steps[0].source
    ways: dict[str, Callable[[Candidate], bool]] = {
        "the rest of its source": lambda c: c.kind in ("source", "early exit") and c.steps[0].source == own,
        "a stitch into another source": lambda c: c.kind == "stitched" and had <= set(keys_of_reads(c)),
        "another source from the image": lambda c: c.kind == "source" and c.steps[0].source != own,
    }
    rows = {}
    for words, allowed in ways.items():
        trials = [staging.extend(staging.begin(front.candidate), r.candidate) for r in ranked if allowed(r.candidate)]
        found = [trial for trial in trials if trial is not None]
        if found:
            rows[f"front, then {words}"] = staging.ranked(min(found, key=lambda trial: trial.setting.loss))
    return rows


def measure(task: Task, *, splits: int, labels: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """The tables of one task, in Markdown."""
    pool, candidates, outcomes, targets = read_everything(task, sizes)
    lines: list[str] = []
    for num_labels in labels:
        figures: dict[str, list[Figures]] = {}
        for split in range(splits):
            order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(split))
            train, test = order[:num_labels], order[num_labels:]

            def score(outcome: Outcome, rows: tuple[Tensor, Tensor] = (train, test)) -> tuple[float, float]:
                return scores_of(outcome, targets, *rows, task.num_classes)

            _, *first = best_last(candidates, outcomes, targets, train, score, task)
            figures.setdefault(LAST, []).append((first[0], first[1], first[2], first[2]))
            of_train = [at_rows(outcome, train) for outcome in outcomes]
            chosen = choices(pool, candidates, of_train, targets[train], task.num_classes)
            for name, ranked in chosen.items():
                (outcome,) = joined([ranked.candidate], candidates, outcomes)
                mine, whole = figures_of_stages(ranked.candidate, outcome, targets, train, test, task.num_classes)
                figures.setdefault(name, []).append(mine)
                if name.startswith("stops"):
                    figures.setdefault(name + DEPTH, []).append(whole)
            print(num_labels, split, {name: rows[-1][:3] for name, rows in figures.items()}, flush=True)
        lines += table(figures, num_labels, len(targets) - num_labels)
    return lines


def figures_of_stages(
    candidate: Candidate, outcome: Outcome, targets: Tensor, train: Tensor, test: Tensor, num_classes: int
) -> tuple[Figures, Figures]:
    """A network's figures on the test rows, and those of its last stage."""
    features = outcome.features
    head, _ = HeadSettings.of("ridge", num_classes=num_classes).fit_for(
        candidate.recipe, features[train], targets[train]
    )
    macs = candidate.cost.macs / 1e6
    with torch.no_grad():
        mine = figures_of(head(features[test]).softmax(1), targets[test], num_classes)
        if not isinstance(head, StagedHead) or candidate.recipe.stages is None:
            return (*mine, macs, macs), (*mine, macs, macs)
        of_stages = torch.tensor(candidate.recipe.stages.macs, dtype=torch.float64)
        mean = float(of_stages[head.stops(features[test])].mean()) / 1e6
        whole = figures_of(head.heads[-1](features[test]).softmax(1), targets[test], num_classes)
    return (*mine, mean, candidate.cost.expected_macs / 1e6), (*whole, macs, macs)


def table(figures: dict[str, list[Figures]], num_labels: int, num_test: int) -> list[str]:
    lines = [
        f"**{num_labels} labels**, {len(figures[LAST])} splits, {num_test} test images",
        "",
        "| | M MACs on average | promised | accuracy | AUROC | difference in accuracy, points | in AUROC |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in figures.items():
        accuracy, auroc, macs, promised = (statistics.mean(column) for column in zip(*rows, strict=True))
        few = "" if len(rows) == len(figures[LAST]) else f" ({len(rows)} splits)"
        words = f"| {name}{few} | {macs:.3g} | {promised:.3g} | {accuracy:.3f} | {auroc:.3f} |"
        for column, factor, digits in ((0, 100, 1), (1, 1, 3)):
            pairs = zip(rows, figures[LAST], strict=False)
            differences = [factor * (row[column] - base[column]) for row, base in pairs]
            half = half_width(differences) if len(differences) > 1 else float("nan")
            words += f" {statistics.mean(differences):+.{digits}f} +- {half:.{digits}f} |" if name != LAST else " |"
        lines.append(words)
    lines.append("")
    for name, rows in figures.items():
        if name.endswith(DEPTH):
            mine = figures[name.removesuffix(DEPTH)]
            ratio = statistics.mean(a[2] for a in mine) / statistics.mean(b[2] for b in rows)
            verdict = judge_splits(
                [a[0] - b[0] for a, b in zip(mine, rows, strict=True)],
                num_train=num_labels,
                num_test=num_test,
                rival="its full depth",
                contender=name.removesuffix(DEPTH),
            )
            lines.append(f"- {ratio:.0%} of its full depth's MACs. {verdict.sentence()}")
    return [*lines, ""]


def latency(task: Task, sizes: Sequence[int], num_labels: int = 512) -> list[str]:
    """Milliseconds an image of a network that stops when sure against its full depth, both folded."""
    pool, candidates, outcomes, targets = read_everything(task, sizes)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    train, test = order[:num_labels], order[num_labels : num_labels + 256]
    of_train = [at_rows(outcome, train) for outcome in outcomes]
    images = torch.cat([x for x, _ in (*task.selection, *task.head, *task.test)])[test]
    lines = [
        "| network | M MACs, average / most | batch | ms an image | full depth | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, ranked in choices(pool, candidates, of_train, targets[train], task.num_classes).items():
        if not name.startswith("stops"):
            continue
        candidate = ranked.candidate
        (outcome,) = joined([candidate], candidates, outcomes)
        head, _ = HeadSettings.of("ridge", num_classes=task.num_classes).fit_for(
            candidate.recipe, outcome.features[train], targets[train]
        )
        assert isinstance(head, StagedHead)
        network = pool.assemble(candidate).fused()
        ways = (partial(network.in_stages, head=head), nn.Sequential(network, head.heads[-1]))
        for batch in (1, 32):
            times = [[latency_per_image(run, images, batch_size=batch) for run in ways] for _ in range(6)][1:]
            mine, whole = (statistics.median(column) for column in zip(*times, strict=True))
            macs = f"{candidate.cost.expected_macs / 1e6:.3g} / {candidate.cost.macs / 1e6:.3g}"
            lines.append(f"| {name} | {macs} | {batch} | {mine:.2f} | {whole:.2f} | {mine / whole:.2f} |")
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["elpv", "elpv-levels", "digits", "digits-same"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("solar_cells"))
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--labels", type=int, nargs="*")
    parser.add_argument("--test-images", type=int, default=2080)
    parser.add_argument("--latency", action="store_true", help="only the latency of networks that stop when sure")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    task, sizes = task_named(options.task, options.folder, options.image_size, options.test_images)
    if options.latency:
        lines = latency(task, sizes)
    else:
        labels = options.labels or ([32, 128, 512] if options.task.startswith("elpv") else [128, 384])
        lines = measure(task, splits=options.splits, labels=labels, sizes=sizes)
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
