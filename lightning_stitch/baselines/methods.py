"""The honest comparison: a StitchNet beside what else could be done with the same sources and the same labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_stitch._lightning import isolate_rng, pl
from lightning_stitch.baselines.contenders import (
    COMPOSED,
    METHODS,
    ON_ALL_LABELS,
    SEARCHED,
    Contender,
    Contenders,
    Method,
)
from lightning_stitch.baselines.finetuning import FineTuning, quiet_trainers
from lightning_stitch.baselines.plots import check_can_plot, plot_methods
from lightning_stitch.baselines.tables import COUNTED
from lightning_stitch.cost import Budget, Cost
from lightning_stitch.cutting import network_cost
from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import StitchError
from lightning_stitch.progress import Progress, Silent
from lightning_stitch.report import MARGIN, Evaluation, Verdict, check_margin, in_words, judge, score
from lightning_stitch.search import network_latency
from lightning_stitch.sources import load_sources
from lightning_stitch.tables import Record, write_records
from lightning_stitch.training import FragmentSearch


def compare_methods(
    search: FragmentSearch,
    data: CalibrationDataModule,
    *,
    methods: Sequence[Method] = METHODS,
    finetuning: FineTuning | None = None,
    margin: float = MARGIN,
    directory: str | Path = "methods",
    plot: bool = True,
    seed: int = 0,
    trainer_options: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Record]:
    """Compare a StitchNet with linear probing and fine-tuning: same sources and split; what each took.

    | method | what it is |
    |---|---|
    | linear probe | logistic regression on each source's last features; the best source stays, fitted on all labels |
    | closed-form head | the same with the ridge head of `fit_ridge_head` |
    | head-only fine-tuning | a linear layer, trained through the frozen network |
    | full fine-tuning | network and linear layer; BatchNorm statistics stay |
    | closed-form head, fine-tuned | the same, beginning with the closed-form head |
    | all depths | the best source of the search, with a closed-form head on every depth |
    | early exit, smaller image | likewise the best source that ends early, or sees a smaller image, within the budget |
    | side by side | likewise sources side by side with one head |
    | StitchNet | the best StitchNet of the search, with its closed-form head: no back-propagation |
    | StitchNet, fine-tuned | that trained as a whole by the same recipe |

    The selection images make every choice, test images none (`lightning_stitch.baselines`). Rows are written to
    methods.csv and methods.json after each method, so that a run which is stopped keeps what it has; methods.png shows
    accuracy against training FLOPs.

    What is composed is judged against every other method on the same test images (`report.judge`), at the cost of
    training FLOPs: their rows say in "verdict" whether they were worth it, methods.json has each verdict's figures.

    A row has accuracy, balanced accuracy and AUROC on the test images with 95 % intervals (`report.score`); `seconds`,
    `cpu_seconds` and `flops` of all that the method took (`baselines.tables.COUNTED`); `labels`; the classifier's
    `params`, `macs` and `latency_ms` for one image, head included; and `selection_loss`, `learning_rate` and `penalty`,
    where it has them.

    Args:
        search: The search, with its sources and settings. It is copied, and run without its table and journal.
        data: The images.
        methods: Which methods to compare.
        finetuning: How networks and heads are trained; None: `FineTuning()`.
        margin: The least difference in accuracy that counts in verdicts.
        directory: Where the files go; the search's candidates.csv, too.
        plot: Whether to draw methods.png, with matplotlib.
        seed: Of the heads' first weights and of flips; the data module has its own, for split and order.
        trainer_options: Arguments of the Trainers: accelerator, devices (one) and precision.
        progress: Where to show progress.

    Returns:
        One row for each method, in the order of the table, but for those of which the search found none.

    Raises:
        StitchError: If arguments cannot be used; before any source runs. So do errors of sources, data and budget.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or isinstance(methods, str):
        raise StitchError(f"methods must be some of {list(METHODS)}; found {unknown or methods!r}.")
    if not isinstance(search, FragmentSearch):
        raise StitchError(
            f"compare_methods takes a FragmentSearch, whose sources all use; found {type(search).__name__}."
        )
    if not isinstance(data, CalibrationDataModule):
        raise StitchError(
            f"compare_methods needs train, selection and test images in a CalibrationDataModule; found "
            f"{type(data).__name__}. CalibrationDataModule(datamodule=yours) wraps another one."
        )
    if data.task != "multiclass":
        raise StitchError(
            f"compare_methods tells classes apart, one label for each image; the data have task={data.task!r}."
        )
    check_margin(margin)
    if plot:
        check_can_plot()
    finetuning, progress = finetuning or FineTuning(), progress or Silent()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    place = {"default_root_dir": str(directory), "accelerator": "auto", "devices": 1}
    options = {**quiet, **place, **(trainer_options or {})}
    rows: list[Record] = []
    tested: dict[Method, _Tested] = {}
    verdicts: list[Record] = []
    with isolate_rng(), quiet_trainers():
        device = _one_device(options)
        data.prepare_data()
        data.setup()
        show = not isinstance(progress, Silent)
        sources = load_sources(search.check_sources(lambda: data.image_shape, until="features", show=show))
        contenders = Contenders(search, sources, data, finetuning, seed=seed, trainer_options=options, device=device)
        settings: dict[str, Any] = {
            "not_found": [],
            "sources": [part.name for part in contenders.parts],
            "finetuning": dataclasses.asdict(finetuning),
            "images": data.summary,
            "image_shape": list(data.image_shape),
            "seed": seed,
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
        if SEARCHED.intersection(methods):
            # First of all: it refuses most of what cannot work before it runs a source, and training takes longest.
            progress.start("search", None)
            contenders.make("StitchNet")
        # In the table's order, whatever shares the StitchNet comes before what trains it.
        for method in [name for name in METHODS if name in methods]:
            progress.start(method, None)
            contender = contenders.make(method)
            if contender is None:
                settings["not_found"].append(method)
                pl.utilities.rank_zero_info(f"The search found no {method} within its budget; the table has none.")
                continue
            tested[method] = _test(method, contender, data, device)
            rows.append(_row(tested[method], seed, search.search_settings.limits))
            # The composed ones come last, when all rivals are there.
            if method in COMPOSED and (account := _judge(method, tested, margin)):
                rows[-1]["verdict"] = in_words(account)
                verdicts += [verdict.record() for verdict in account]
            about = {"counted": COUNTED, "verdicts": verdicts, "settings": settings}
            write_records(rows, Path(directory) / "methods", **about)
    if plot:
        plot_methods(rows, Path(directory) / "methods.png")
    return rows


def _one_device(options: dict[str, Any]) -> torch.device:
    trainer = pl.Trainer(max_epochs=0, enable_checkpointing=False, **options)
    if trainer.world_size > 1:
        raise StitchError(
            f"Methods are compared on one device, or their seconds would say little; found {trainer.world_size}. Set "
            f"devices to 1."
        )
    return trainer.strategy.root_device


@dataclass(frozen=True, slots=True)
class _Tested:
    """A contender, what it said of the test images, with their labels, and its latency in milliseconds."""

    contender: Contender
    evaluation: Evaluation
    targets: Tensor
    latency_ms: float


def _test(method: Method, contender: Contender, data: CalibrationDataModule, device: torch.device) -> _Tested:
    classifier = nn.Sequential(contender.network, contender.head).to(device).eval()
    cost = network_cost(classifier, data.image_shape)
    probabilities, labels = [], []
    with torch.inference_mode():
        for images, targets in data.test_dataloader():
            probabilities.append(classifier(images.to(device)).softmax(dim=-1).cpu())
            labels.append(targets)
    parts = ("train", "selection", "calibration") if method in ON_ALL_LABELS else ("train", "selection")
    num_labels = sum(data.summary[part] for part in parts)
    sources = {fragment.source for fragment in getattr(getattr(contender.network, "recipe", None), "fragments", ())}
    evaluation = Evaluation(
        method,
        "method",
        torch.cat(probabilities),
        cost.params,
        cost.macs,
        contender.spent.seconds,
        num_labels,
        label=f"{method} (of one source: {contender.name})" if len(sources) == 1 and method in COMPOSED else None,
    )
    return _Tested(contender, evaluation, torch.cat(labels), network_latency(classifier, data.image_shape, device))


def _judge(method: Method, tested: dict[Method, _Tested], margin: float) -> list[Verdict]:
    """A method against all that are not composed, those first that the selection images say more for."""
    rivals = sorted((name for name in tested if name not in COMPOSED), key=lambda name: _selection_loss(tested[name]))
    judged = tested[method]
    return [
        dataclasses.replace(
            judge(tested[rival].evaluation, judged.evaluation, judged.targets, margin=margin),
            contender_cost=judged.contender.spent.flops,
            rival_cost=tested[rival].contender.spent.flops,
            cost_unit="training FLOPs",
        )
        for rival in rivals
    ]


def _selection_loss(tested: _Tested) -> float:
    loss = tested.contender.selection_loss
    return math.inf if loss is None else loss


def _cost_without_head(tested: _Tested) -> Cost:
    """What a budget counts: of what a search gave as that counted it."""
    evaluation, recipe = tested.evaluation, getattr(tested.contender.network, "recipe", None)
    if recipe is not None and {"params", "macs"} <= recipe.scores.keys():
        return Cost(int(recipe.scores["params"]), int(recipe.scores["macs"]), mean_macs=recipe.scores.get("mean_macs"))
    of_head = sum(parameter.numel() for parameter in tested.contender.head.parameters())
    return Cost(evaluation.params - of_head, evaluation.macs - of_head)


def _row(tested: _Tested, seed: int, limits: Budget) -> Record:
    contender, evaluation = tested.contender, tested.evaluation
    return {
        "method": evaluation.name,
        "network": contender.name,
        **score(evaluation, tested.targets),
        "seconds": contender.spent.seconds,
        "cpu_seconds": contender.spent.cpu_seconds,
        "flops": contender.spent.flops,
        "labels": evaluation.labels,
        "params": evaluation.params,
        "macs": evaluation.macs,
        "latency_ms": tested.latency_ms,
        "selection_loss": contender.selection_loss,
        "learning_rate": contender.learning_rate,
        "penalty": contender.penalty,
        "search_choice": contender.search_choice,
        "seed": seed,
        "over_budget": not limits.allows(_cost_without_head(tested)),
        "verdict": None,
    }
