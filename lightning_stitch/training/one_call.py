"""From a folder of images to a finished classifier, in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_stitch._lightning import pl
from lightning_stitch.cost import Budget
from lightning_stitch.data import CalibrationDataModule, calibration_samples_of, list_images
from lightning_stitch.errors import SourceError, StitchError
from lightning_stitch.hub import CardDetails, check_free
from lightning_stitch.sources import find_sources, preflight, require
from lightning_stitch.training.fragment_search import FragmentSearch
from lightning_stitch.training.module import StitchedClassifier

_FEWEST = 16
_CHANNELS = 3


def compose_folder(
    sources: Sequence[str | dict[str, Any]],
    folder: str | Path,
    *,
    budget: Budget | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    compare: bool = True,
    seed: int = 0,
    progress: bool = True,
    **search: Any,
) -> StitchedClassifier:
    """Compose a classifier for a folder of images, without back-propagation, and say whether it was worth it.

    A fifth of the images (`test`, where the folder has one) are kept apart to tell how good it is, beside the sources
    with heads of their own; all others choose and fit. It is what a `CalibrationDataModule`, a `StitchedClassifier`, a
    `FragmentSearch` and a Trainer with max_epochs=0 do together.

    Args:
        sources: What to compose from (`load_source`): timm names, "hf-hub:ORG/NAME", "local-dir:PATH", ...
        folder: Class folders of images, or `train`, `val` and `test` with class folders (`CalibrationDataModule`).
        budget: Limits that it keeps, also in words (`Budget.of`), as "25M", "50%" (of the MACs of the cheapest
            source), "20 ms" or "mean 10M"; None: none.
        image_size: (height, width) that images are resized to, one number meaning a square; None: the largest that a
            source was trained on.
        output: A folder for what `StitchedClassifier.save_pretrained` writes, for candidates.csv and the comparison;
            None: nothing is written.
        overwrite: Replace a classifier that is there.
        compare: Whether to print the table of what was composed beside its rivals on the test images.
        seed: Of the split and the search.
        progress: Whether to show bars.
        search: Further options of `FragmentSearch`.

    Returns:
        The classifier, in eval mode, with the folder's class names: `predict_files(classifier, paths)`,
        `save_pretrained`, `publish` and `export` take it from there.

    Raises:
        CalibrationError: If the folder's images cannot be used or are too few.
        SourceError: If sources cannot be found or used.
        BudgetError: If the budget's words have no meaning, or no network keeps it.
        StitchError: If a classifier is in `output` already.

    Example:
        >>> sources = ["resnet18.a1_in1k", "efficientnet_b0.ra_in1k"]
        >>> model = compose_folder(sources, "photographs", budget="50%")  # doctest: +SKIP
        >>> predict_files(model, ["new.jpg"])  # doctest: +SKIP
    """
    if isinstance(sources, str):
        raise SourceError(f"sources= takes a list of them: [{sources!r}].")
    if output is not None:
        check_free(output, overwrite=overwrite)
    num_images = len(list_images([folder]))
    if num_images < _FEWEST:
        raise StitchError(f"{folder} holds {num_images} images; compose_folder takes at least {_FEWEST}.")
    size = _largest_size(sources) if image_size is None else image_size
    shape = (_CHANNELS, size, size) if isinstance(size, int) else (_CHANNELS, *size)
    if isinstance(budget, str):
        budget = Budget.of(budget, cheapest_macs=lambda: _cheapest_macs(sources, shape))
    data = CalibrationDataModule(
        image_folder=str(folder),
        image_size=size,
        calibration_samples=calibration_samples_of(num_images),
        seed=seed,
    )
    data.setup()
    model = StitchedClassifier(data.num_classes)
    callback = FragmentSearch(sources, budget=budget, compare=compare, seed=seed, **search)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = pl.Trainer(
            max_epochs=0,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            callbacks=[callback],
            default_root_dir=scratch if output is None else output,
        )
        trainer.fit(model, data)
    if output is not None:
        found = callback.comparison
        details = CardDetails() if found is None else CardDetails(rows=found.rows, verdict=found.sentence)
        model.save_pretrained(output, details=details, overwrite=overwrite)
    return model.eval()


def _largest_size(sources: Sequence[str | dict[str, Any]]) -> tuple[int, int]:
    """The largest (height, width) that a source was trained on."""
    sizes = [b.preprocessing.input_size[1:] for b in find_sources(sources) if b.preprocessing is not None]
    if not sizes:
        raise SourceError("No source says which images it was trained on; give image_size=.")
    return max(sizes, key=lambda size: size[0] * size[1])


def _cheapest_macs(sources: Sequence[str | dict[str, Any]], shape: tuple[int, int, int]) -> float:
    """The fewest multiply-accumulates of a source."""
    checked = preflight(sources, image_shape=shape)
    require(checked)
    return min(row.macs for row in checked.rows if row.macs is not None)
