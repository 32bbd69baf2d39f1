"""What a search inside a Trainer writes, logs and prints when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_stitch._lightning import pl
from lightning_stitch.report import Comparison, print_comparison, write_candidates, write_comparison
from lightning_stitch.search import SearchResult


def report_search(
    trainer: pl.Trainer, result: SearchResult, comparison: Comparison | None, settings: Mapping[str, Any]
) -> None:
    """Write the candidates and the table in the log directory, log the best one's figures, and print the summary.

    Args:
        trainer: The trainer; call this on every rank, rank zero alone writes.
        result: What the search found.
        comparison: The table, if there is one.
        settings: The search's settings, plain JSON; they go into the table's file.
    """
    log_dir = trainer.log_dir or trainer.default_root_dir  # asks rank zero, so that every rank must be here
    if not trainer.is_global_zero:
        return
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_candidates(result, log_dir)
    best = result.best
    metrics = {f"search/{name}": value for name, value in best.scores.items()}
    metrics |= {f"search/{stage}_seconds": seconds for stage, seconds in result.seconds.items()}
    metrics |= {"search/params": best.candidate.cost.params, "search/macs": best.candidate.cost.macs}
    measured = {"search/activation_bytes": best.activation_bytes, "search/latency_ms": best.latency_ms}
    metrics |= {name: value for name, value in measured.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=0)
    lines = [result.summary()]
    if comparison is not None:
        title = "Test images: sources as they are, self-stitched and ended early, and StitchNets, with the same head"
        sentence = " ".join([comparison.sentence, *(f"No StitchNet fits {budget}." for budget in comparison.unmet)])
        print_comparison(comparison.rows, sentence, title=title)
        outcome = {
            "recipe": best.candidate.recipe.to_dict(),
            "seconds": result.seconds,
            "rejected": result.rejected,
            "num_candidates": len(result.ranked),
        }
        paths = write_comparison(comparison.rows, sentence, Path(log_dir), settings={**settings, **outcome})
        lines.append(f"The table is in {paths[0]} and {paths[1]}.")
    if trainer.progress_bar_callback is not None or comparison is not None:
        for line in lines:
            print(line)
