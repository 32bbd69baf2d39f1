"""What a search inside a Trainer writes, logs and prints when it is done."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from PIL import Image
from torch import nn

from lightning_stitch._lightning import pl
from lightning_stitch.heads import StagedHead
from lightning_stitch.io import write_json
from lightning_stitch.progress import say
from lightning_stitch.report import (
    FILE,
    figure_files,
    images_to_show,
    print_comparison,
    record_of,
    thumbnail,
    write_candidates,
    write_comparison,
    write_page,
)
from lightning_stitch.search import SearchResult, latency_per_image
from lightning_stitch.stitching import images_of
from lightning_stitch.training.module import StitchedClassifier

if TYPE_CHECKING:
    from lightning_stitch.training.fragment_search import FragmentSearch

_LATENCY_BATCHES = (1, 32)


def report_search(trainer: pl.Trainer, search: FragmentSearch, result: SearchResult) -> Path:
    """Write candidates, table and page, log the best one's figures, and print the summary; returns where it wrote.

    Call it on every rank; rank zero alone writes.
    """
    log_dir = _directory(trainer)
    if trainer.is_global_zero:
        _report(trainer, search, result, log_dir)
    return log_dir


def _directory(trainer: pl.Trainer) -> Path:
    """The log directory; without a logger the Trainer's own, or where that is the working directory a new one in it."""
    log_dir = trainer.log_dir or trainer.default_root_dir  # asks rank zero, so that every rank must be here
    if trainer.loggers or Path(log_dir).resolve() != Path.cwd():
        return Path(log_dir)
    folder = Path(trainer.default_root_dir) / "stitch_logs"
    version = next(n for n in count() if not (folder / f"version_{n}").exists())
    return Path(trainer.strategy.broadcast(str(folder / f"version_{version}"), src=0))


def _report(trainer: pl.Trainer, search: FragmentSearch, result: SearchResult, log_dir: Path) -> None:
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_candidates(result, log_dir)
    best, comparison = result.best, search.comparison
    figures = {**best.scores, **{f"{stage}_seconds": seconds for stage, seconds in result.seconds.items()}}
    figures |= {"params": best.candidate.cost.params, "macs": best.candidate.cost.macs}
    measured = {"activation_bytes": best.activation_bytes, "latency_ms": best.latency_ms}
    measured |= {"mean_macs": best.candidate.cost.mean_macs}
    figures |= {name: value for name, value in measured.items() if value is not None}
    latency = _latency(trainer)
    figures |= {f"latency_ms_batch_{size}": value for size, value in latency.items()}
    for logger in trainer.loggers:
        logger.log_metrics({f"search/{name}": value for name, value in figures.items()}, step=0)
    say(result.summary())
    if latency:
        say(_latency_in_words(latency, trainer.strategy.root_device))
    if comparison is not None:
        title = "Test images: sources as they are, self-stitched and ended early, and StitchNets, with the same head"
        words = "\n".join([comparison.words, *(f"No StitchNet fits {budget}." for budget in comparison.unmet)])
        print_comparison(comparison.rows, words, title=title)
        settings = {
            "sources": [str(source) for source in search.sources],
            "granularity": search.calibration_settings.granularity,
            "estimator": search.calibration_settings.estimator,
            **{name: getattr(search.search_settings, name) for name in ("ranking", "exits", "heal")},
            "recipe": best.candidate.recipe.to_dict(),
            "seconds": result.seconds,
            "rejected": result.rejected,
            "num_candidates": len(result.ranked),
            "latency_ms": latency,
        }
        paths = write_comparison(comparison.rows, words, log_dir, verdicts=comparison.verdicts, settings=settings)
        say(f"The table is in {paths[0]} and {paths[1]}.")
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        say(f"All of it is shown in {_write_page(trainer, search, result, log_dir, latency)}.")


def _write_page(
    trainer: pl.Trainer, search: FragmentSearch, result: SearchResult, log_dir: Path, latency: dict[int, float]
) -> Path:
    """The page of the search, and what it is made of; loggers that take images get its figures."""
    module, comparison, data = trainer.lightning_module, search.comparison, trainer.datamodule  # type: ignore[attr-defined]
    network = module.network if isinstance(module, StitchedClassifier) else None  # a module's own may be another width
    best = result.best.candidate
    shown = [] if comparison is None else images_to_show(comparison)
    tested = data.test_dataloader().dataset if shown else ()
    record = record_of(
        result,
        search.search_settings,
        comparison,
        recipe=best.recipe if network is None else network.recipe,
        description=f"{best.recipe.path}: {best.cost}" if network is None else network.describe(),
        class_names=data.class_names,
        thumbnails=[thumbnail(tested[index][0]) for index in shown],
        latency=_latency_in_words(latency, trainer.strategy.root_device) if latency else "",
    )
    write_json(log_dir / FILE, record)
    page = write_page(record, log_dir)
    for logger in trainer.loggers:
        _log_figures(logger, figure_files(log_dir))
    return page


def _log_figures(logger: Any, files: Sequence[Path]) -> None:
    """As Weights & Biases and TensorBoard take them; others keep numbers alone."""
    for file in files:
        if hasattr(logger, "log_image"):
            logger.log_image(f"search/{file.stem}", [str(file)])
        elif hasattr(logger.experiment, "add_image"):
            pixels = numpy.asarray(Image.open(file).convert("RGB"))
            logger.experiment.add_image(f"search/{file.stem}", pixels, dataformats="HWC")


def _latency(trainer: pl.Trainer) -> dict[int, float]:
    """Milliseconds of an image of the finished network, folded, by batch size; of calibration images, at most 32."""
    module = trainer.lightning_module
    if not isinstance(module, StitchedClassifier) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return {}
    batches = map(images_of, trainer.datamodule.calibration_dataloader())  # type: ignore[attr-defined]
    images = torch.stack(list(islice((image for batch in batches for image in batch), max(_LATENCY_BATCHES))))
    device, network, head = trainer.strategy.root_device, module.network, module.head
    assert network is not None
    assert head is not None
    network, head = network.fused().to(device), copy.deepcopy(head).to(device).eval()
    run = partial(network.in_stages, head=head) if isinstance(head, StagedHead) else nn.Sequential(network, head)
    return {size: latency_per_image(run, images.to(device), batch_size=size) for size in _LATENCY_BATCHES}


def _latency_in_words(latency: dict[int, float], device: torch.device) -> str:
    words = [f"{value:.2f} ms {'alone' if size == 1 else f'in batches of {size}'}" for size, value in latency.items()]
    where = str(device) if device.type != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    return f"An image takes {', '.join(words)} ({where})."
