"""What a search's page is made of, as plain JSON values: `report.json` in the log directory."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_stitch.errors import StitchError
from lightning_stitch.recipe import Recipe
from lightning_stitch.report.comparison import Comparison
from lightning_stitch.search import SearchResult, candidate_in_words
from lightning_stitch.settings import SearchSettings
from lightning_stitch.tables import Record

_THUMBNAIL = 96  # pixels
_WRONG, _RIGHT = 16, 8  # images shown
FILE = "report.json"


def record_of(
    result: SearchResult,
    settings: SearchSettings,
    comparison: Comparison | None,
    *,
    recipe: Recipe,
    description: str,
    class_names: Sequence[str] | None = None,
    thumbnails: Sequence[str] = (),
    latency: str = "",
) -> Record:
    """What `report.page.page_of` shows.

    Args:
        result: What the search found.
        settings: What was asked for.
        comparison: On test images, where there is one.
        recipe: The network that was chosen, as it was fitted.
        description: The same in words.
        class_names: Of the classes, in their order; None: they are numbered.
        thumbnails: Of the test images that `images_to_show` names, in that order.
        latency: How long an image takes, in words.
    """
    predictions: Record = {}
    if comparison is not None:
        shown = zip(images_to_show(comparison), thumbnails, strict=False)
        predictions = _predictions(comparison, class_names)
        predictions["shown"] = [_shown(comparison, index) | {"image": image} for index, image in shown]
    first = next(iter(result.best.scores))
    return {
        "summary": result.summary(),
        "verdict": None if comparison is None else comparison.words,
        "verdicts": [] if comparison is None else [verdict.record() for verdict in comparison.verdicts],
        "description": description,
        "latency": latency,
        "decided_by": first,
        "score": "loo_accuracy" if "loo_accuracy" in result.best.scores else first,
        "best": result.ranked.index(result.best) + 1,
        "budget": {k: v for k, v in dataclasses.asdict(settings.limits).items() if v is not None},
        "candidates": [
            {**row, "fragments": candidate_in_words(r.candidate)}
            for row, r in zip(result.to_records(), result.ranked, strict=True)
        ],
        "comparison": [] if comparison is None else comparison.rows,
        "rejected": dict(result.rejected),
        "seconds": dict(result.seconds),
        "peaks": dict(result.peaks),
        "similarities": [] if comparison is None else comparison.similarities,
        "predictions": predictions,
        "recipe": recipe.to_dict(),
    }


def read_record(directory: Path) -> Record:
    """The record that a search wrote in a log directory.

    Raises:
        StitchError: If there is none, or it is no record.
    """
    path = directory / FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "candidates" not in record:
            raise ValueError("it has no candidates")
    except (OSError, ValueError) as error:
        raise StitchError(
            f"{directory} holds no {FILE} of a search ({error}). Name the log directory of a `fit`, or the output of "
            f"`compose`."
        ) from error
    return record


def images_to_show(comparison: Comparison) -> list[int]:
    """Test images, by number: the wrong ones first, the surest of them before others, then right ones."""
    sure, predicted = comparison.probabilities.max(1)
    wrong = predicted != comparison.targets
    order = sure.argsort(descending=True)
    wrongs, rights = order[wrong[order]].tolist()[:_WRONG], order[~wrong[order]].tolist()
    step = max(1, len(rights) // _RIGHT)
    return [*wrongs, *rights[::step][:_RIGHT]]


def thumbnail(image: Tensor) -> str:
    """An image (channels, height, width) in [0, 1] as the base64 of a small PNG file."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).cpu().numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _predictions(comparison: Comparison, class_names: Sequence[str] | None) -> Record:
    num_classes = comparison.probabilities.shape[1]
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    pairs = torch.stack([comparison.targets, comparison.probabilities.argmax(1)])
    counts.index_put_(tuple(pairs), torch.ones(len(comparison.targets), dtype=torch.int64), accumulate=True)
    return {"class_names": list(class_names or map(str, range(num_classes))), "confusion": counts.tolist()}


def _shown(comparison: Comparison, index: int) -> dict[str, Any]:
    probability, predicted = comparison.probabilities[index].max(0)
    return {"is": int(comparison.targets[index]), "predicted": int(predicted), "probability": float(probability)}
