"""What the calibration images gave at the cuts of all sources, as one value, in memory or saved in a directory.

A saved one is searched again without running any source. It is files of tensors (safetensors), one for each cut of each
source with its sampled rows, prefix tokens and activation, portion by portion, and one for each source's features; and
calibration.json, which is written last and says what all of it was made from. A file bears the hash of what is in it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_stitch.cutting import Cut
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.io import (
    UNFINISHED,
    Carried,
    differences,
    in_words,
    lies_channels_last,
    plain,
    sha256_of,
    versions,
    write_json,
)
from lightning_stitch.progress import Progress, counted
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.activations import Calibrated, CutStatistics, calibrate, centred_or_none
from lightning_stitch.stitching.images import CalibrationImages
from lightning_stitch.stitching.segments import Segmented

SCHEMA_VERSION = 1
_DESCRIPTION = "calibration.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Sources with what one set of calibration images, known by its hash, gave at their cuts, as one value."""

    sources: tuple[Calibrated, ...]
    settings: CalibrationSettings
    images_hash: str

    @classmethod
    def of(
        cls,
        parts: Sequence[Segmented],
        images: CalibrationImages,
        settings: CalibrationSettings,
        *,
        device: torch.device,
        progress: Progress,
        directory: Path | None = None,
    ) -> Calibration:
        """Run each source once over the images, or take up what a directory has of that.

        Where a directory is named and has no such calibration that can be used, it is saved there. Activations are
        taken up on the device.

        Raises:
            CalibrationError: If there are too few images, an activation is not finite, or the directory cannot be
                written to.
        """

        def run() -> Calibration:
            progress.start("calibrating", len(parts))
            sources = [
                calibrate(part, images.images, settings, images.num_held_out) for part in counted(parts, progress)
            ]
            return cls(tuple(sources), settings, images.hash)

        if directory is None:
            return run()
        try:
            saved = cls.open(directory, parts, settings, device)
            if saved.images_hash == images.hash:
                return saved
        except CalibrationError:
            pass  # not there yet, or what was written when the power failed
        run().save(directory)
        return cls.open(directory, parts, settings, device)

    def save(self, directory: Path) -> None:
        """Write it to a directory; one that is there already is replaced when all of this one is written."""
        sources: dict[str, dict[str, Any]] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for index, source in enumerate(self.sources):
                names = [_write(directory, f"source-{index}-{place}", x) for place, x in enumerate(_tensors(source))]
                sources[source.name] = {"identity": source_identity(source.parts), "files": names}
            description = {
                "schema": SCHEMA_VERSION,
                "versions": versions("lightning_stitch", "torch"),
                "image_shape": self.sources[0].parts.image_shape,
                "num_images": len(self.sources[0].features),
                "images": self.images_hash,
                "num_held_out": self.sources[0].num_held_out,
                "settings": settings_identity(self.settings),
                "sources": sources,
            }
            write_json(directory / _DESCRIPTION, description)
            current = set(chain.from_iterable(source["files"] for source in sources.values()))
            for file in (*directory.glob("source-*"), *directory.glob(f"{_DESCRIPTION}.*{UNFINISHED}")):
                if file.name not in current:
                    file.unlink()
        except (OSError, SafetensorError, StitchError) as error:
            raise CalibrationError(
                f"The calibration cannot be written to {directory}: {error}. Name another directory."
            ) from error

    @classmethod
    def open(
        cls, directory: Path, parts: Sequence[Segmented], settings: CalibrationSettings, device: torch.device
    ) -> Calibration:
        """Take up a saved one: rows and features in memory, activations a portion at a time from the files.

        The sources, in any order, are cut alike, and the settings the same; activations are taken up on the device.

        Raises:
            CalibrationError: If the calibration is another one's (what differs is named), cannot be read, or a file is
                cut short or damaged.
        """
        description = _read_description(directory)
        saved = description["sources"]
        differing = differences(
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
        if differing:
            raise CalibrationError(
                f"The calibration in {directory} is another one's: {in_words(differing)}. Use the sources and settings "
                f"that it was made with, or calibrate anew."
            )
        sources = []
        for part in parts:
            try:
                files = [directory / Path(name).name for name in saved[part.name]["files"]]
                sources.append(_open_source(part, files, settings, device, description["num_held_out"]))
            except (OSError, ValueError, LookupError, TypeError, SafetensorError) as error:
                raise CalibrationError(
                    f"The saved calibration of source {part.name!r} in {directory} cannot be used: {error}. Calibrate "
                    f"and save again."
                ) from error
        return cls(tuple(sources), settings, description["images"])

    @property
    def is_whole(self) -> bool:
        """Whether networks can be composed on it: no activation was let go of."""
        return all(len(source.activations) == len(source.statistics) for source in self.sources)

    @property
    def is_stored(self) -> bool:
        """Whether its activations lie in files, where they stay."""
        return all(source.stored for source in self.sources)

    def release(self) -> None:
        """Let go of the activations, unless they are stored; rows and features stay."""
        for source in self.sources:
            source.release()


_NHWC = ".nhwc"  # ends the names of what lies channels-last, and comes back so


def _write(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> str:
    """Write a file of tensors, and give its name, which says what is in it: one that is there already stays good."""
    unnamed = directory / f"{name}{UNFINISHED}"
    save_file({name: x.contiguous().clone() for name, x in tensors.items()}, unnamed)
    name = f"{name}-{sha256_of(unnamed)[:16]}.safetensors"
    unnamed.replace(directory / name)
    return name


def _read_description(directory: Path) -> dict[str, Any]:
    """What a saved calibration was made from."""
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
    wrong = [name for name, kind in needed.items() if not isinstance(description.get(name), kind)]
    if not wrong and not all(isinstance(source, dict) for source in description["sources"].values()):
        wrong = ["sources"]
    if not wrong and not all(isinstance(size, int) and size > 0 for size in description["image_shape"]):
        wrong = ["image_shape"]
    if wrong:
        raise CalibrationError(f"{path} has no {', '.join(wrong)} that can be used. Calibrate and save again.")
    return dict(description)


def saved_settings(directory: Path) -> tuple[tuple[int, int, int], CalibrationSettings]:
    """The image shape and settings of a saved calibration."""
    description = _read_description(directory)
    try:
        channels, height, width = description["image_shape"]
        return (channels, height, width), CalibrationSettings(**description["settings"])
    except (TypeError, ValueError, StitchError) as error:
        raise CalibrationError(f"{directory / _DESCRIPTION} cannot be used ({error}).") from error


def _tensors(source: Calibrated) -> Iterator[dict[str, Tensor]]:
    """What goes into each file of a source, of one cut after the other, and at last its features."""
    for statistics, activation in zip(source.statistics, source.activations, strict=True):
        prefix = {} if statistics.prefix_rows is None else {"prefix": statistics.prefix_rows}
        tensors = {"rows": statistics.rows, **prefix}
        for number, x in enumerate(activation):
            last = lies_channels_last(x)
            tensors[f"activation.{number}{_NHWC * last}"] = x.permute(0, 2, 3, 1) if last else x
        yield tensors
    yield {"features": source.features}


def _open_source(
    part: Segmented, files: Sequence[Path], settings: CalibrationSettings, device: torch.device, num_held_out: int
) -> Calibrated:
    for file in files:
        if not file.stem.endswith(sha256_of(file)[:16]):
            raise ValueError(f"{file.name} is damaged or not the file that was written")
    *of_cuts, of_features = files
    statistics, activations = [], []
    num_images, _ = _shapes(of_features)["features"]
    for cut, file in zip(part.cuts, of_cuts, strict=True):
        names = _check_shapes(file, cut, num_images)
        rows = _read_tensor(file, "rows", device)
        prefix = _read_tensor(file, "prefix", device) if "prefix" in names else None
        centred = centred_or_none(rows, settings, name=f"cut {cut.name!r} of source {part.name!r}")
        statistics.append(CutStatistics(cut, rows, centred, prefix))
        portions = sorted({*names} - {"rows", "prefix"}, key=lambda name: int(name.split(".")[1]))
        activations.append(Carried([partial(_read_tensor, file, portion, device) for portion in portions]))
    features = _read_tensor(of_features, "features", device)
    return Calibrated(part, statistics, activations, features, num_held_out, stored=True)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors; a ValueError where one is not of float32."""
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
    if strangers := [name for name, x in slices.items() if x.get_dtype() != "F32"]:
        raise ValueError(f"{strangers[0]} in {file.name} is no float32")
    return {name: tuple(x.get_shape()) for name, x in slices.items()}


def _check_shapes(file: Path, cut: Cut, num_images: int) -> list[str]:
    """The names of a cut's tensors; a ValueError where they are not those that were written of it."""
    shapes = _shapes(file)
    names = [name for name in shapes if name not in ("rows", "prefix")]
    channels_last = (*cut.shape[1:], cut.shape[0])
    fits = all(shapes[name][1:] == (channels_last if name.endswith(_NHWC) else cut.shape) for name in names)
    fits &= all(re.fullmatch(rf"activation\.\d+({re.escape(_NHWC)})?", name) is not None for name in names)
    fits &= sum(shapes[name][0] for name in names) == num_images
    if not fits or len(shapes["rows"]) != 2 or shapes["rows"][1] != cut.channels:
        raise ValueError(f"{file.name} holds no activations of cut {cut.name!r}")
    return list(shapes)


def _read_tensor(file: Path, name: str, device: torch.device) -> Tensor:
    """A tensor of a file, in memory of its own, aligned as any other: where it lies decides how it is summed up."""
    try:
        with safe_open(file, framework="pt") as tensors:
            x: Tensor = tensors.get_tensor(name)
            x = x.clone().to(device)
            return x.permute(0, 3, 1, 2) if name.endswith(_NHWC) else x
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
