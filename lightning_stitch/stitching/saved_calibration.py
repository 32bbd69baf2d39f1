"""Calibrated sources in a directory, to be searched again without running any of them.

Files of tensors (safetensors), one for each cut of each source with its sampled rows, prefix tokens and activation,
portion by portion, and one for each source's features; and calibration.json, which is written last and says what all of
it was made from. A file bears the hash of what is in it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import UNFINISHED, Carried, differences, in_words, plain, sha256_of, versions, write_json
from lightning_stitch.progress import Progress
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.activations import Calibrated, CutStatistics, calibrate_all, centred_or_none
from lightning_stitch.stitching.images import CalibrationImages
from lightning_stitch.stitching.segments import Segmented

SCHEMA_VERSION = 1
_DESCRIPTION = "calibration.json"


def save_calibration(
    directory: Path, calibrated: Sequence[Calibrated], settings: CalibrationSettings, images_hash: str
) -> None:
    """Write calibrated sources; a calibration that is there already is replaced when all of this one is written.

    Args:
        directory: Where to; made if it is not there.
        calibrated: The sources, their activations not released.
        settings: What they were calibrated with.
        images_hash: Of the calibration images.

    Raises:
        CalibrationError: If the directory cannot be written to.
    """
    try:
        _save(directory, calibrated, settings, images_hash)
    except OSError as error:
        raise _unwritable(directory, error) from error


def _save(directory: Path, calibrated: Sequence[Calibrated], settings: CalibrationSettings, images_hash: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    sources: dict[str, dict[str, Any]] = {}
    for index, source in enumerate(calibrated):
        names = [_write(directory, f"source-{index}-{place}", x) for place, x in enumerate(_tensors(source))]
        sources[source.name] = {"identity": source_identity(source.parts), "files": names}
    description = {
        "schema": SCHEMA_VERSION,
        "versions": versions("lightning_stitch", "torch"),
        "image_shape": calibrated[0].parts.image_shape,
        "num_images": len(calibrated[0].features),
        "images": images_hash,
        "num_held_out": calibrated[0].num_held_out,
        "settings": settings_identity(settings),
        "sources": sources,
    }
    write_json(directory / _DESCRIPTION, description)
    current = set(chain.from_iterable(source["files"] for source in sources.values()))
    for file in (*directory.glob("source-*"), *directory.glob(f"{_DESCRIPTION}.*{UNFINISHED}")):
        if file.name not in current:
            file.unlink()


def _write(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write a file of tensors, and give its name, which says what is in it: one that is there already stays good."""
    unnamed = directory / f"{name}{UNFINISHED}"
    try:
        save_file({name: x.contiguous().clone() for name, x in tensors.items()}, unnamed)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    name = f"{name}-{sha256_of(unnamed)[:16]}.safetensors"
    unnamed.replace(directory / name)
    return name


def read_description(directory: Path) -> dict[str, Any]:
    """What a saved calibration was made from.

    Raises:
        CalibrationError: If there is none, it cannot be read, or a newer version wrote it.
    """
    path = directory / _DESCRIPTION
    try:
        description = json.loads(path.read_text())
    except FileNotFoundError:
        raise CalibrationError(
            f"There is no saved calibration in {directory} (no {_DESCRIPTION}); Pool.save writes one."
        ) from None
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}). Calibrate and save again.") from error
    schema = description.get("schema") if isinstance(description, dict) else None
    if schema != SCHEMA_VERSION:
        raise CalibrationError(
            f"{path} has schema {schema!r}; this version of lightning_stitch reads schema {SCHEMA_VERSION}. Upgrade "
            f"lightning_stitch if it is newer, else calibrate and save again."
        )
    needed = {"image_shape": list, "images": str, "num_held_out": int, "settings": dict, "sources": dict}
    if wrong := [name for name, kind in needed.items() if not isinstance(description.get(name), kind)]:
        raise CalibrationError(f"{path} has no {', '.join(wrong)} that can be used. Calibrate and save again.")
    return dict(description)


def saved_settings(directory: Path) -> tuple[tuple[int, int, int], CalibrationSettings]:
    """The image shape and settings of a saved calibration.

    Raises:
        CalibrationError: As `read_description`.
    """
    description = read_description(directory)
    try:
        channels, height, width = description["image_shape"]
        return (channels, height, width), CalibrationSettings(**description["settings"])
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"{directory / _DESCRIPTION} cannot be used ({error}).") from error


def load_calibration(
    directory: Path, parts: Sequence[Segmented], settings: CalibrationSettings, device: torch.device
) -> tuple[list[Calibrated], str]:
    """Take up a saved calibration: rows and features in memory, activations a portion at a time from the files.

    Args:
        directory: Where it was saved.
        parts: The same sources, cut alike, in any order.
        settings: The same settings.
        device: Where activations are to be taken up.

    Returns:
        The calibrated sources in the order of `parts`, and the hash of the calibration images.

    Raises:
        CalibrationError: If the calibration is another one's (what differs is named), cannot be read, or a file is cut
            short or damaged.
    """
    description = read_description(directory)
    saved = description["sources"]
    found = differences(
        {
            "image_shape": description["image_shape"],
            "settings": description["settings"],
            "sources": {name: source.get("identity") for name, source in saved.items()},
        },
        {
            "image_shape": list(parts[0].image_shape),
            "settings": settings_identity(settings),
            "sources": {part.name: source_identity(part) for part in parts},
        },
    )
    if found:
        raise CalibrationError(
            f"The calibration in {directory} is another one's: {in_words(found)}. Use the sources and settings that it "
            f"was made with, or calibrate anew."
        )
    calibrated = []
    for part in parts:
        try:
            files = [directory / Path(name).name for name in saved[part.name]["files"]]
            for file in files:
                if not file.stem.endswith(sha256_of(file)[:16]):
                    raise ValueError(f"{file.name} is damaged or not the file that was written")
            calibrated.append(_calibrated(part, files, settings, device, description["num_held_out"]))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CalibrationError(
                f"The saved calibration of source {part.name!r} in {directory} cannot be used: {error}. Calibrate and "
                f"save again."
            ) from error
    return calibrated, str(description["images"])


def calibrate_once(
    directory: Path | None,
    parts: Sequence[Segmented],
    images: CalibrationImages,
    settings: CalibrationSettings,
    device: torch.device,
    progress: Progress,
) -> list[Calibrated]:
    """The calibration that is saved in a directory; made and saved there if it is not, or cannot be used.

    Args:
        directory: Where; None: nowhere, so that it is made.
        parts: The sources.
        images: The calibration images.
        settings: What to keep, and where.
        device: Where activations are to be taken up.
        progress: Where to show progress.

    Raises:
        CalibrationError: If the directory cannot be written to, or its disk has no room for the activations; before any
            source runs.
    """
    run = partial(calibrate_all, parts, images.images, settings, images.num_held_out, progress)
    if directory is None:
        return run()
    try:
        calibrated, images_hash = load_calibration(directory, parts, settings, device)
        if images_hash == images.hash:
            return calibrated
    except CalibrationError:
        # Not there yet, or what was written when the power failed.
        pass
    needed = images.count * sum(4 * math.prod(cut.shape) for part in parts for cut in part.cuts)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise _unwritable(directory, error) from error
    if free < needed:
        raise _unwritable(
            directory, f"the activations of {images.count} images need {needed:,} bytes, and {free:,} are free"
        )
    save_calibration(directory, run(), settings, images.hash)
    return load_calibration(directory, parts, settings, device)[0]


def _unwritable(directory: Path, error: object) -> CalibrationError:
    return CalibrationError(f"The calibration cannot be written to {directory}: {error}. Name another directory.")


def _tensors(source: Calibrated) -> Iterator[dict[str, Tensor]]:
    """What goes into each file of a source, of one cut after the other, and at last its features."""
    for kept, activation in zip(source.statistics, source.activations, strict=True):
        prefix = {} if kept.prefix_rows is None else {"prefix": kept.prefix_rows}
        portions = {f"activation.{number}": portion for number, portion in enumerate(activation)}
        yield {"rows": kept.rows, **prefix, **portions}
    yield {"features": source.features}


def _calibrated(
    part: Segmented, files: Sequence[Path], settings: CalibrationSettings, device: torch.device, num_held_out: int
) -> Calibrated:
    *of_cuts, of_features = files
    statistics, activations = [], []
    for cut, file in zip(part.cuts, of_cuts, strict=True):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
        rows = _taken_up(file, "rows", device)
        prefix = _taken_up(file, "prefix", device) if "prefix" in names else None
        centred = centred_or_none(rows, settings, name=f"cut {cut.name!r} of source {part.name!r}")
        statistics.append(CutStatistics(cut, rows, centred, None if prefix is None else prefix.mean(0), prefix))
        portions = [f"activation.{number}" for number in range(len(names - {"rows", "prefix"}))]
        activations.append(Carried([partial(_taken_up, file, portion, device) for portion in portions]))
    features = _taken_up(of_features, "features", device)
    return Calibrated(part, statistics, activations, features, num_held_out, stored=True)


def _taken_up(file: Path, name: str, device: torch.device) -> Tensor:
    """A tensor of a file, in memory of its own, aligned as any other: where it lies decides how it is summed up."""
    try:
        with safe_open(file, framework="pt") as tensors:
            x: Tensor = tensors.get_tensor(name)
            return x.clone().to(device)
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{file} cannot be read any more: {error}. Keep it as long as it is used.") from error


def source_identity(parts: Segmented) -> dict[str, Any]:
    """What a source's activations depend on: its weights, what is built with them, and where it is cut; plain."""
    ref = parts.source.ref
    identity = {
        "weights": ref.weight_hash,
        "builder": ref.builder,
        "architecture": ref.architecture,
        "arguments": ref.arguments,
        "preprocessing": dataclasses.asdict(ref.preprocessing),
        "cuts": {c.name: [index, c.format, c.shape, c.num_prefix_tokens] for index, c in enumerate(parts.cuts)},
        "end": parts.end,
    }
    return dict(plain(identity))


def settings_identity(settings: CalibrationSettings) -> dict[str, Any]:
    """The settings that change numbers, plain; where activations are kept does not."""
    identity = dataclasses.asdict(settings)
    del identity["keep_activations"]
    return dict(plain(identity))
