"""What a search inside a Trainer writes, logs and prints when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_stitch._lightning import pl
from lightning_stitch.report import print_comparison, write_candidates, write_comparison
from lightning_stitch.search import SearchResult

if TYPE_CHECKING:
    from lightning_stitch.training.fragment_search import FragmentSearch


def report_search(trainer: pl.Trainer, search: FragmentSearch, result: SearchResult) -> None:
    """Write the candidates and the table in the log directory, log the best one's figures, and print the summary.

    Call it on every rank; rank zero alone writes.
    """
    log_dir = trainer.log_dir or trainer.default_root_dir  # asks rank zero, so that every rank must be here
    if not trainer.is_global_zero:
        return
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_candidates(result, log_dir)
    best, comparison = result.best, search.comparison
    figures = {**best.scores, **{f"{stage}_seconds": seconds for stage, seconds in result.seconds.items()}}
    figures |= {"params": best.candidate.cost.params, "macs": best.candidate.cost.macs}
    measured = {"activation_bytes": best.activation_bytes, "latency_ms": best.latency_ms}
    measured |= {"mean_macs": best.candidate.cost.mean_macs}
    figures |= {name: value for name, value in measured.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics({f"search/{name}": value for name, value in figures.items()}, step=0)
    if trainer.progress_bar_callback is not None or comparison is not None:
        print(result.summary())
    if comparison is not None:
        title = "Test images: sources as they are, self-stitched and ended early, and StitchNets, with the same head"
        sentence = " ".join([comparison.sentence, *(f"No StitchNet fits {budget}." for budget in comparison.unmet)])
        print_comparison(comparison.rows, sentence, title=title)
        settings = {
            "sources": [str(source) for source in search.sources],
            "granularity": search.calibration_settings.granularity,
            "estimator": search.calibration_settings.estimator,
            **{name: getattr(search.search_settings, name) for name in ("ranking", "exits", "heal")},
            "recipe": best.candidate.recipe.to_dict(),
            "seconds": result.seconds,
            "rejected": result.rejected,
            "num_candidates": len(result.ranked),
        }
        paths = write_comparison(
            comparison.rows, sentence, Path(log_dir), verdicts=comparison.verdicts, settings=settings
        )
        print(f"The table is in {paths[0]} and {paths[1]}.")
