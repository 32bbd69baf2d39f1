"""From sources and images to a finished classifier, in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_stitch._lightning import pl
from lightning_stitch.composing import Pool, compose_personal
from lightning_stitch.cost import Budget
from lightning_stitch.cutting import reference_tensor
from lightning_stitch.data import (
    CalibrationDataModule,
    LabelledImages,
    calibration_samples_of,
    is_files,
    list_images,
    open_class_folders,
)
from lightning_stitch.errors import BudgetError, CalibrationError, SourceError, StitchError
from lightning_stitch.hub import CardDetails, check_free
from lightning_stitch.progress import Progress
from lightning_stitch.report import read_record, record_of
from lightning_stitch.settings import SearchSettings
from lightning_stitch.sources import find_sources, preflight, require
from lightning_stitch.training.fragment_search import FragmentSearch
from lightning_stitch.training.module import StitchedClassifier

_FEWEST = 16
_CHANNELS = 3


def compose(
    sources: Pool | Sequence[str | dict[str, Any]],
    images: Any,
    labels: Any = None,
    *,
    budget: Budget | str | None = None,
    image_size: int | tuple[int, int] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    compare: bool = True,
    seed: int = 0,
    progress: bool | Progress = True,
    **options: Any,
) -> StitchedClassifier:
    """Compose a classifier for images, without back-propagation, and say whether it was worth it.

    | `sources` | what is done | images |
    |---|---|---|
    | names of sources | the whole search, and a comparison with the sources | 16 or more |
    | a `Pool` (`Pool.prepare`) | in seconds a network for a few images (`composing.personal`) | 4 or more |

    The whole search is what a `CalibrationDataModule`, a `StitchedClassifier`, a `FragmentSearch` and a Trainer with
    max_epochs=0 do together: a fifth of the images (`test`, where a folder has one) are kept apart to tell how good it
    is, beside the sources with heads of their own. On a pool all images choose and fit; there is nothing to `compare`.

    Args:
        sources: What to compose from (`load_source`): timm names, "hf-hub:ORG/NAME", "local-dir:PATH", ...; or a pool.
        images: A folder: class folders of images, or `train`, `val` and `test` with class folders, of which a pool
            takes `train` alone. Or with `labels` paths of files, tensors (channels, height, width), PIL images or
            arrays, float in [0, 1] or uint8.
        labels: The class of each image, where that is no folder's name: integers, names or one-hot rows. On a pool
            they may be left out; the network then gives features.
        budget: Limits that it keeps, also in words (`Budget.of`), as "25M", "50%" (of the MACs of the cheapest
            source), "20 ms" or "mean 10M"; None: none.
        image_size: (height, width) that images are resized to, one number meaning a square; None: the largest that a
            source was trained on. A pool has its own.
        output: A folder for what `StitchedClassifier.save_pretrained` writes, and for the page of the search; None:
            nothing is written.
        overwrite: Replace a classifier that is there.
        compare: Whether to print the table of what was composed beside its rivals on the test images.
        seed: Of the split and the search.
        progress: Whether to show bars; on a pool also what is told of each stage (`progress.Progress`).
        options: Further options of `FragmentSearch`; on a pool `classes`, `effort` and `ridge` of `compose_personal`.

    Returns:
        The classifier, in eval mode, with the classes' names. It has `result`, what was found, and `predict`, `report`,
        `save_pretrained`, `publish` and `export`.

    Raises:
        CalibrationError: If images or labels cannot be used or are too few.
        SourceError: If sources cannot be found or used.
        BudgetError: If the budget's words have no meaning, or no network keeps it.
        StitchError: If a classifier is in `output` already, or an option is none of what is done.

    Example:
        >>> sources = ["resnet18.a1_in1k", "efficientnet_b0.ra_in1k"]
        >>> model = compose(sources, "photographs", budget="50%")  # doctest: +SKIP
        >>> model.predict(["new.jpg"])  # doctest: +SKIP
    """
    if not isinstance(sources, Pool | list | tuple):
        raise SourceError(f"sources= takes a list of them, as ['resnet18.a1_in1k'], or a Pool; found {sources!r}.")
    if not isinstance(budget, Budget | str | None):
        raise BudgetError(f"budget= is a Budget, or words such as '25M' or '50%'; found {budget!r}.")
    is_files(images)  # or they are no images
    if output is not None:
        check_free(output, overwrite=overwrite)
    if labels is not None and isinstance(images, str | Path):
        raise CalibrationError("The folders of images are their labels already; leave labels= out.")
    if isinstance(sources, Pool):
        if image_size is not None:
            raise StitchError(f"The pool is for images of {sources.image_shape}; leave image_size= out.")
        model, details = _on_pool(sources, images, labels, budget, progress, options), CardDetails()
    else:
        settings = {"compare": compare, "seed": seed, **options}
        show = progress is not False
        model, details = _from_sources(sources, images, labels, budget, image_size, output, show, settings)
    if output is not None:
        model.save_pretrained(output, details=details, overwrite=overwrite)
        if isinstance(sources, Pool):
            model.report(output)  # the whole search has written it
    return model.eval()


def _on_pool(
    pool: Pool,
    images: Any,
    labels: Any,
    budget: Budget | str | None,
    progress: bool | Progress,
    options: dict[str, Any],
) -> StitchedClassifier:
    """A network for few images."""
    if isinstance(images, str | Path):
        folder = open_class_folders(Path(images))["train"]
        images = [path for path, _ in folder.samples]
        labels = [folder.classes[number] for number in folder.targets]
    if isinstance(budget, str):
        budget = Budget.of(budget, cheapest_macs=lambda: min(part.cost.macs for part in pool.parts))
    allowed = ("classes", "effort", "ridge")
    if strangers := sorted(set(options) - set(allowed)):
        raise StitchError(f"compose on a pool has the options {', '.join(allowed)}; found {strangers}.")
    told = None if isinstance(progress, bool) else progress
    found = compose_personal(pool, images, labels, budget=budget, progress=told, **options)
    names = [str(name) for name in found.classes]
    if labels is None:
        chosen = {str(index): [index] for index in found.classes}
        model = StitchedClassifier(head={"name": "class_map", "classes": chosen} if names else "none")
    else:
        model = StitchedClassifier(len(names), class_names=names)
    network: Any = found.network[0]
    head = model.head_settings.empty(network.num_features) if labels is None else found.network[1]
    model.install(network, head.to(reference_tensor(network).device))
    model.result = found.result
    model.record = record_of(
        found.result,
        SearchSettings(budget=budget),
        None,
        recipe=network.recipe,
        description=network.describe(),
        class_names=names or None,
    )
    return model


def _from_sources(
    sources: Sequence[str | dict[str, Any]],
    images: Any,
    labels: Any,
    budget: Budget | str | None,
    image_size: int | tuple[int, int] | None,
    output: str | Path | None,
    progress: bool,
    options: dict[str, Any],
) -> tuple[StitchedClassifier, CardDetails]:
    """The whole search, and what its comparison says for a card."""
    num_images = len(list_images([images])) if isinstance(images, str | Path) else len(images)
    if num_images < _FEWEST:
        raise CalibrationError(
            f"{images if isinstance(images, str | Path) else 'images='} holds {num_images} images; compose takes at "
            f"least {_FEWEST} from sources, on a pool (Pool.prepare) 4."
        )
    if not isinstance(images, str | Path):
        if labels is None:
            raise CalibrationError("Give labels=, a class for each image, or a folder of class folders.")
        if is_files(images):
            list_images(images)
    origin: dict[str, Any] = {"image_folder": str(images)}
    if labels is not None:
        origin = {"train": LabelledImages(images, labels)}
    size = _largest_size(sources) if image_size is None else image_size
    shape = (_CHANNELS, size, size) if isinstance(size, int) else (_CHANNELS, *size)
    if isinstance(budget, str):
        budget = Budget.of(budget, cheapest_macs=lambda: _cheapest_macs(sources, shape))
    data = CalibrationDataModule(
        **origin, image_size=size, calibration_samples=calibration_samples_of(num_images), seed=options["seed"]
    )
    data.setup()
    model = StitchedClassifier()
    callback = FragmentSearch(sources, budget=budget, **options)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch if output is None else output)
        trainer = pl.Trainer(
            max_epochs=0,
            num_sanity_val_steps=0,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            callbacks=[callback],
            default_root_dir=directory,
        )
        trainer.fit(model, data)
        model.result, model.record = callback.result, read_record(directory)
    found = callback.comparison
    return model, CardDetails() if found is None else CardDetails(rows=found.rows, verdict=found.words)


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
