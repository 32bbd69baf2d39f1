"""Calibrated sources in a directory, to be searched again without running any of them.

One file of tensors for each source (safetensors: sampled rows and prefix tokens of its cuts, its features, and the
activations, portion by portion) and calibration.json, which is written last and says what all of it was made from.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.io import (
    UNFINISHED,
    Carried,
    TensorFile,
    differences,
    in_words,
    versions,
    write_json,
    write_tensors,
)
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.activations import Calibrated, CutStatistics, centred_or_none
from lightning_stitch.stitching.identity import settings_identity, source_identity
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
    for left in directory.glob(f"*{UNFINISHED}"):
        left.unlink()
    sources: dict[str, dict[str, Any]] = {}
    for index, source in enumerate(calibrated):
        # A file's name says what is in it: what the description that is there already names stays as it is.
        unnamed = directory / "source-unnamed.safetensors"
        checksum = write_tensors(unnamed, _tensors(source))
        unnamed.replace(directory / _file_name(index, checksum))
        sources[source.name] = {"identity": source_identity(source.parts), "checksum": checksum}
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
    current = {_file_name(index, source["checksum"]) for index, source in enumerate(sources.values())}
    for file in directory.glob("source-*"):
        if file.name not in current:
            file.unlink()


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
        checksum = int(saved[part.name].get("checksum", 0))
        path = directory / _file_name(list(saved).index(part.name), checksum)
        try:
            tensors = TensorFile(path, checksum)
            calibrated.append(_calibrated(part, tensors, settings, device, description["num_held_out"]))
        except (OSError, ValueError, KeyError) as error:
            raise CalibrationError(
                f"{path}, the saved calibration of source {part.name!r}, cannot be used: {error}. Calibrate and save "
                f"again."
            ) from error
    return calibrated, str(description["images"])


def calibrate_once(
    directory: Path,
    parts: Sequence[Segmented],
    settings: CalibrationSettings,
    device: torch.device,
    images: tuple[int, str],
    run: Callable[[], list[Calibrated]],
) -> list[Calibrated]:
    """The calibration that is saved in a directory; made and saved there if it is not, or cannot be used.

    Args:
        directory: Where.
        parts: As `load_calibration`.
        settings: Likewise.
        device: Likewise.
        images: The number of the calibration images and their hash.
        run: Runs the sources.

    Raises:
        CalibrationError: If the directory cannot be written to, or its disk has no room for the activations; before any
            source runs.
    """
    count, images_hash = images
    try:
        calibrated, found = load_calibration(directory, parts, settings, device)
        if found == images_hash:
            return calibrated
    except CalibrationError:
        # Not there yet, or what was written when the power failed.
        pass
    needed = count * sum(4 * math.prod(cut.shape) for part in parts for cut in part.cuts)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise _unwritable(directory, error) from error
    if free < needed:
        raise _unwritable(directory, f"the activations of {count} images need {needed:,} bytes, and {free:,} are free")
    save_calibration(directory, run(), settings, images_hash)
    return load_calibration(directory, parts, settings, device)[0]


def _unwritable(directory: Path, error: object) -> CalibrationError:
    return CalibrationError(f"The calibration cannot be written to {directory}: {error}. Name another directory.")


def _file_name(index: int, checksum: int) -> str:
    return f"source-{index}-{checksum:08x}.safetensors"


def _tensors(source: Calibrated) -> dict[str, Callable[[], Tensor]]:
    """What gives each tensor of a source, by its name in the file."""
    found: dict[str, Callable[[], Tensor]] = {"features": lambda: source.features}
    for index, (kept, activation) in enumerate(zip(source.statistics, source.activations, strict=True)):
        found[f"rows.{index}"] = partial(torch.Tensor.detach, kept.rows)
        if kept.prefix_rows is not None:
            found[f"prefix.{index}"] = partial(torch.Tensor.detach, kept.prefix_rows)
        for number, portion in enumerate(activation.portions):
            found[f"activation.{index}.{number}"] = portion
    return found


def _calibrated(
    part: Segmented, tensors: TensorFile, settings: CalibrationSettings, device: torch.device, num_held_out: int
) -> Calibrated:
    statistics, activations = [], []
    for index, cut in enumerate(part.cuts):
        rows = tensors.read(f"rows.{index}").to(device)
        prefix = tensors.read(f"prefix.{index}").to(device) if f"prefix.{index}" in tensors else None
        name = f"cut {cut.name!r} of source {part.name!r}"
        centred = centred_or_none(rows, settings, name=name)
        statistics.append(CutStatistics(cut, rows, centred, None if prefix is None else prefix.mean(0), prefix))
        portions = [portion for portion in tensors.names if portion.startswith(f"activation.{index}.")]
        activations.append(Carried([partial(_taken_up, tensors, portion, device) for portion in portions]))
    return Calibrated(part, statistics, activations, tensors.read("features").to(device), num_held_out, stored=True)


def _taken_up(tensors: TensorFile, name: str, device: torch.device) -> Tensor:
    return tensors.read(name).to(device)
