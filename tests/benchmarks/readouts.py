"""What readouts are worth: heads on every depth against heads on the last features, over random splits.

    python examples/prepare_solar_cells.py
    python tests/benchmarks/readouts.py elpv solar_cells --image-size 128 --markdown elpv.md
    python tests/benchmarks/readouts.py digits --markdown digits.md

One pool is calibrated on 32 images that are in no split, and searched for candidates; their taps run once over all
other images. Then, for each split and each number of labels, candidates are ranked by leave-one-out on the labelled
images, the search's own rules choose, the head is fitted on the same images, and the others test it. Nothing is chosen
by test images. Differences are against the closed-form head on the last features of the best source, which is chosen by
leave-one-out, too; intervals are 95 % over splits (paired, Student's t). Splits of one data set share images: the
intervals are for this data set, and those of many labels a little too narrow.

With --fine-tuned N the first N splits have full fine-tuning of that source, too (`FineTuning()`, both flips): a quarter
of the labelled images chooses the learning rate, then all of them train it anew. It is compared on these splits alone.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from ranking_tasks import Task, handwritten_digits, solar_cells
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_stitch import Budget, CalibrationSettings, FineTuning, Pool
from lightning_stitch.baselines.finetuning import Classifier, quiet_trainers, train_best
from lightning_stitch.heads import fit_ridge_head
from lightning_stitch.progress import Silent
from lightning_stitch.search.evaluation import Outcome, keys_of_reads
from lightning_stitch.search.ranking import SelectionData
from lightning_stitch.search.results import Ranked, choose, in_order, rank
from lightning_stitch.search.rounds import going_on, rounds_of
from lightning_stitch.search.sides import side_by_side
from lightning_stitch.stitching.candidates import Candidate

LAST = "best source, last features"


def at_rows(outcome: Outcome, rows: Tensor) -> Outcome:
    return dataclasses.replace(outcome, vectors=tuple(x[rows] for x in outcome.vectors))


def last_features(outcome: Outcome) -> Outcome:
    """What heads read before readouts."""
    return dataclasses.replace(outcome, vectors=outcome.vectors[-1:], keys=outcome.keys[-1:], blocks=None)


def scores_of(outcome: Outcome, labels: Tensor, train: Tensor, test: Tensor, num_classes: int) -> tuple[float, float]:
    """Accuracy and AUROC of a closed-form head on the train rows, on the test rows."""
    features = outcome.features
    head, _ = fit_ridge_head(features[train], labels[train], num_classes=num_classes, blocks=outcome.blocks)
    with torch.no_grad():
        return figures_of(head(features[test]).softmax(1), labels[test], num_classes)


def ranked_by_labels(
    candidates: Sequence[Candidate], outcomes: Sequence[Outcome], labels: Tensor, num_classes: int
) -> tuple[list[Ranked], SelectionData, dict[str, Outcome]]:
    """Candidates as the search's default ranks them, what that looked at, and what they gave, by their keys."""
    ranked, selection = rank(candidates, outcomes, labels, ranking="auto", num_classes=num_classes, rejected=Counter())
    return ranked, selection, {c.key: outcome for c, outcome in zip(candidates, outcomes, strict=True)}


def choices(
    pool: Pool, candidates: Sequence[Candidate], outcomes: Sequence[Outcome], labels: Tensor, num_classes: int
) -> dict[str, Ranked]:
    """What is chosen by labelled images alone, by row of the table."""
    ranked, selection, by_key = ranked_by_labels(candidates, outcomes, labels, num_classes)
    cheapest = min(part.cost.macs for part in pool.parts)
    rows: dict[str, Ranked] = {"best source, all depths": next(r for r in ranked if r.candidate.kind == "source")}
    rows["best StitchNet"] = next(r for r in ranked if r.candidate.kind == "stitched")
    for name, limit in (("chosen, no budget", math.inf), ("third", cheapest / 3), ("sixth", cheapest / 6)):
        budget = Budget() if limit == math.inf else Budget(max_macs=limit)
        fitting = [r for r in ranked if limit < math.inf or r.candidate.kind != "smaller image"]
        if not any(budget.allows(r.candidate.cost) for r in fitting):
            continue
        sides = side_by_side(fitting, selection, by_key, pool.all_parts, budget, max_roots=3)
        result = choose(in_order([*fitting, *sides]), budget, rejected={}, seconds={}, num_selection_labels=len(labels))
        rows[name if limit == math.inf else f"chosen, {name} of the cheapest source's MACs"] = result.best
    return rows


def half_width(differences: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean over splits."""
    count = len(differences)
    return float(student.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)


def fine_tuned(
    pool: Pool, source: str, images: Tensor, labels: Tensor, train: Tensor, test: Tensor, num_classes: int
) -> tuple[float, float]:
    """Accuracy and AUROC on the test rows of a source that is trained as a whole on the train rows."""
    part = next(part for part in pool.parts if part.name == source)
    torch.manual_seed(0)
    network = nn.Sequential(part.preprocess, part.graph.fragment(None, part.end))
    head = nn.Linear(part.graph.find(str(part.end)).channels, num_classes)
    model = Classifier(network, head, head_learning_rate=FineTuning().head_learning_rate)
    quiet: Any = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    settings, start = FineTuning(flips="both"), copy.deepcopy(model.state_dict())
    options: Any = {"seed": 0, "trainer_options": {"accelerator": "cpu", "num_sanity_val_steps": 0, **quiet}}

    def loader(rows: Tensor) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        rows_of = TensorDataset(images[rows], labels[rows])
        return DataLoader(rows_of, batch_size=32, shuffle=True, generator=generator)

    choosing, learning = train[: len(train) // 4], train[len(train) // 4 :]
    with quiet_trainers():
        best = train_best(
            model,
            lambda: loader(learning),
            loader(choosing),
            settings,
            learning_rates=settings.learning_rates,
            **options,
        )
        model.load_state_dict(start)
        rates = [best.learning_rate]
        train_best(model, lambda: loader(train), loader(choosing), settings, learning_rates=rates, **options)
    with torch.inference_mode():
        probabilities = torch.cat([model.eval()(x).softmax(1) for x in images[test].split(32)])
    return figures_of(probabilities, labels[test], num_classes)


def figures_of(probabilities: Tensor, labels: Tensor, num_classes: int) -> tuple[float, float]:
    """Accuracy and AUROC."""
    accuracy = float((probabilities.argmax(1) == labels).float().mean())
    scores = probabilities[:, 1] if num_classes == 2 else probabilities
    return accuracy, float(roc_auc_score(labels, scores, multi_class="ovr"))


def measure(
    task: Task,
    *,
    splits: int,
    labels: Sequence[int],
    sizes: Sequence[int],
    num_fine_tuned: int = 0,
    with_calibration: bool = False,
    with_rounds: bool = False,
) -> list[str]:
    """The table of one task, in Markdown."""
    begun = time.perf_counter()
    pool, candidates, outcomes, targets = read_everything(task, sizes)
    images = torch.cat([x for x, _ in (*task.selection, *task.head, *task.test)])
    taps = time.perf_counter() - begun
    lines = calibration_labels(pool, candidates, outcomes, targets, task, splits) if with_calibration else []
    if with_rounds:
        return [
            line
            for num_labels in labels
            for line in rounds(candidates, outcomes, targets, task, num_labels=num_labels, splits=splits)
        ]
    for num_labels in labels:
        figures: dict[str, list[tuple[float, float, float]]] = {}
        for split in range(splits):
            order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(split))
            train, test = order[:num_labels], order[num_labels:]
            if len(targets[train].unique()) < task.num_classes:
                raise ValueError(f"split {split} of {num_labels} labels lacks a class")

            def score(outcome: Outcome, rows: tuple[Tensor, Tensor] = (train, test)) -> tuple[float, float]:
                return scores_of(outcome, targets, *rows, task.num_classes)

            of_train = [at_rows(outcome, train) for outcome in outcomes]
            chosen = choices(pool, candidates, of_train, targets[train], task.num_classes)
            source, *first = best_last(candidates, outcomes, targets, train, score, task)
            figures.setdefault(LAST, []).append((first[0], first[1], first[2]))
            if split < num_fine_tuned:
                everywhere = fine_tuned(pool, source, images, targets, train, test, task.num_classes)
                figures.setdefault("the same source, fine-tuned", []).append((*everywhere, first[2]))
                print(num_labels, split, source, first[:2], everywhere, flush=True)
            for name, ranked in chosen.items():
                (outcome,) = joined([ranked.candidate], candidates, outcomes)
                figures.setdefault(name, []).append((*score(outcome), ranked.candidate.cost.macs / 1e6))
        lines += table(figures, num_labels, len(targets) - num_labels)
    print(f"{taps:.0f} s for {len(candidates)} candidates' taps, {time.perf_counter() - begun:.0f} s in all")
    return lines


def read_everything(task: Task, sizes: Sequence[int]) -> tuple[Pool, list[Candidate], list[Outcome], Tensor]:
    """A pool, what a search finds in it, and what that gives for all images but the calibration's; their labels."""
    shape = tuple(task.calibration[0][0].shape[1:])
    pool = Pool(task.sources, shape, settings=CalibrationSettings())  # type: ignore[arg-type]
    found = pool.search(
        [images for images, _ in task.calibration], task.selection, sizes=list(sizes), max_roots=1, exits=True
    )
    candidates = [r.candidate for r in found.ranked if r.candidate.kind != "self-stitched"]
    everything = [*task.selection, *task.head, *task.test]
    outcomes, targets = pool.outcomes(candidates, everything, progress=Silent())
    assert targets is not None
    return pool, candidates, outcomes, targets


def calibration_labels(
    pool: Pool, candidates: Sequence[Candidate], outcomes: Sequence[Outcome], targets: Tensor, task: Task, splits: int
) -> list[str]:
    """Heads of StitchNets on 96 labelled images, and with more: others, or those that stitches were fitted on.

    What calibration images' labels are worth less than others' is the optimism of the stitches on them.
    """
    stitched = [number for number, candidate in enumerate(candidates) if candidate.kind == "stitched"]
    fitted_on, labels = pool.outcomes([candidates[n] for n in stitched], task.calibration, progress=Silent())
    assert labels is not None
    ways: dict[str, list[tuple[float, float]]] = {"96": [], "96 and as many more": [], "96 and calibration's": []}
    for split in range(splits):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(split))
        train, more, test = order[:96], order[96 : 96 + len(labels)], order[96 + len(labels) :]
        for number, of_calibration in zip(stitched, fitted_on, strict=True):
            x, blocks = outcomes[number].features, outcomes[number].blocks
            given = [
                (x[train], targets[train]),
                (torch.cat([x[train], x[more]]), torch.cat([targets[train], targets[more]])),
                (torch.cat([x[train], of_calibration.features]), torch.cat([targets[train], labels])),
            ]
            for way, rows in zip(ways.values(), given, strict=True):
                head, _ = fit_ridge_head(*rows, num_classes=task.num_classes, blocks=blocks)
                with torch.no_grad():
                    way.append(figures_of(head(x[test]).softmax(1), targets[test], task.num_classes))
    lines = [
        f"| labels of the heads of {len(stitched)} StitchNets, {splits} splits | accuracy | AUROC |",
        "|---|---|---|",
    ]
    for name, figures in ways.items():
        accuracy, auroc = (statistics.mean(column) for column in zip(*figures, strict=True))
        lines.append(f"| {name} | {accuracy:.4f} | {auroc:.4f} |")
    return [*lines, ""]


def rounds(
    candidates: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    targets: Tensor,
    task: Task,
    *,
    num_labels: int,
    splits: int,
) -> list[str]:
    """Whether the stitched network that is best after rounds is the one that is best without, or as good."""
    same = alike = 0
    behind: list[float] = []
    passes: list[float] = []
    stitched = ("stitched", "shortened")
    for split in range(splits):
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(split))[:num_labels]

        def judge(some: Sequence[Candidate], given: Sequence[Outcome], order: Tensor = order) -> list[Ranked]:
            labels = targets[order[: len(given[0].vectors[0])]]
            options: Any = {"ranking": "auto", "num_classes": task.num_classes, "rejected": Counter()}
            return rank(some, given, labels, **options)[0]

        def best(some: Sequence[Candidate], order: Tensor = order) -> Ranked:
            number = {candidate.key: place for place, candidate in enumerate(candidates)}
            ranked = judge(some, [at_rows(outcomes[number[candidate.key]], order) for candidate in some])
            return next(r for r in ranked if r.candidate.kind in stitched)

        alive, spent = list(candidates), 0.0
        for before, count in pairwise([0, *rounds_of(num_labels), num_labels]):
            spent += sum(c.kind in stitched for c in alive) * (count - before) / num_labels
            if count < num_labels:
                number = {candidate.key: place for place, candidate in enumerate(candidates)}
                given = [at_rows(outcomes[number[candidate.key]], order[:count]) for candidate in alive]
                alive = going_on(alive, given, judge)
        passes.append(spent / sum(c.kind in stitched for c in candidates))
        without, with_rounds = best(candidates), best(alive)
        same += without.candidate.key == with_rounds.candidate.key
        gain, error = without.gain_over(with_rounds)
        alike += gain <= error
        behind.append(gain)
    return [
        f"Rounds, {num_labels} labels, {splits} splits: {statistics.mean(passes):.2f} of stitched networks' passes; "
        f"the same winner in {same}, one within a standard error of it in {alike}; R2 behind it "
        f"{statistics.mean(behind):.4f} on average, {max(behind):.4f} at most.",
        "",
    ]


def best_last(
    candidates: Sequence[Candidate],
    outcomes: Sequence[Outcome],
    targets: Tensor,
    train: Tensor,
    score: Callable[[Outcome], tuple[float, float]],
    task: Task,
) -> tuple[str, float, float, float]:
    """The source that is best by leave-one-out of heads on last features: its name, and that head's figures."""
    sources = [(c, last_features(o)) for c, o in zip(candidates, outcomes, strict=True) if c.kind == "source"]
    fits = [fit_ridge_head(o.features[train], targets[train], num_classes=task.num_classes)[1] for _, o in sources]
    best = max(range(len(sources)), key=lambda number: fits[number].loo_r2)
    candidate, outcome = sources[best]
    return (candidate.recipe.sources[0].name, *score(outcome), candidate.cost.macs / 1e6)


def joined(chosen: Sequence[Candidate], candidates: Sequence[Candidate], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """What candidates gave, of which some stand side by side."""
    vectors = {key: x for outcome in outcomes for key, x in zip(outcome.keys, outcome.vectors, strict=True)}
    results = []
    for candidate in chosen:
        keys = keys_of_reads(candidate)
        results.append(Outcome(tuple(vectors[key] for key in keys), keys, candidate.recipe.head_blocks, 0.0))
    return results


def table(figures: dict[str, list[tuple[float, float, float]]], num_labels: int, num_test: int) -> list[str]:
    lines = [
        f"**{num_labels} labels**, {len(figures[LAST])} splits, {num_test} test images",
        "",
        "| | M MACs | accuracy | AUROC | difference in accuracy, points | in AUROC |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in figures.items():
        accuracy, auroc, macs = (statistics.mean(column) for column in zip(*rows, strict=True))
        few = "" if len(rows) == len(figures[LAST]) else f" ({len(rows)} splits)"
        words = f"| {name}{few} | {macs:.0f} | {accuracy:.3f} | {auroc:.3f} |"
        for column, factor in ((0, 100), (1, 1)):
            # Of as many splits as the row has.
            pairs = zip(rows, figures[LAST], strict=False)
            differences = [factor * (row[column] - base[column]) for row, base in pairs]
            half = half_width(differences) if len(differences) > 1 else math.nan
            digits = 1 if factor == 100 else 3
            words += f" {statistics.mean(differences):+.{digits}f} +- {half:.{digits}f} |" if name != LAST else " |"
        lines.append(words)
    return [*lines, ""]


def task_named(name: str, folder: Path, image_size: int, test_images: int) -> tuple[Task, list[int]]:
    """A task, and the smaller images that are candidates on it: "elpv", "elpv-levels", "digits" or "digits-same"."""
    if name == "elpv":
        task = solar_cells(folder, image_size=image_size, test_images=test_images)
        return task, [size for size in (160, 128, 96, 64) if size < image_size]
    if name == "elpv-levels":
        with tempfile.TemporaryDirectory() as levels:
            by_level(folder / "images", Path(levels) / "images")
            task = solar_cells(folder, image_size=image_size, test_images=test_images, images=Path(levels) / "images")
        return task, [size for size in (96, 64) if size < image_size]
    return handwritten_digits(other_questions=name == "digits"), []


def by_level(images: Path, target: Path) -> None:
    """ELPV's cells in four classes, by how probable a defect is, as their names say ("..._p033.png")."""
    for file in sorted(images.rglob("*.png")):
        level = target / file.stem.rpartition("_")[2]
        level.mkdir(parents=True, exist_ok=True)
        (level / file.name).symlink_to(file.resolve())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["elpv", "digits"])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("solar_cells"))
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--labels", type=int, nargs="*")
    parser.add_argument("--test-images", type=int, default=2080)
    parser.add_argument("--fine-tuned", type=int, default=0, help="splits that fine-tune, too: minutes each")
    parser.add_argument("--calibration-labels", action="store_true", help="what labels of calibration images are worth")
    parser.add_argument("--rounds", action="store_true", help="only whether rounds find what is best without")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    task, sizes = task_named(options.task, options.folder, options.image_size, options.test_images)
    labels = options.labels or ([32, 128, 512] if options.task == "elpv" else [128, 384])
    lines = measure(
        task,
        splits=options.splits,
        labels=labels,
        sizes=sizes,
        num_fine_tuned=options.fine_tuned,
        with_calibration=options.calibration_labels,
        with_rounds=options.rounds,
    )
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
