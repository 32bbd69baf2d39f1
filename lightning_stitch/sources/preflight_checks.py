"""Before any weights are fetched: which sources can be used for images of a shape, and what it takes to get them.

Every source is found, and its network built on the meta device, where tensors have shapes and nothing else. The tensors
of a weight file are compared with it by the file's first bytes.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_stitch.errors import SourceError, StitchError, first_lines
from lightning_stitch.io import WeightFile, tensor_shapes
from lightning_stitch.settings import CalibrationSettings, image_shape_of
from lightning_stitch.sources.blueprint import Blueprint
from lightning_stitch.sources.finding import AnySource, check_list, find_source, make_distinct
from lightning_stitch.sources.licences import forbidden_by
from lightning_stitch.sources.source import outline
from lightning_stitch.sources.spec import SourceSpec, show_spec
from lightning_stitch.sources.views import check_names, cut_source

_SECONDS_TO_ANSWER = 10


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """What is known of one source before its weights are there; None: not known.

    `view_size` is the (channels, height, width) at which it would see the images, `input_size` what it was trained on,
    `formats` the number of cuts of each format, `macs` the multiply-accumulates for one image of `view_size`, and
    `download` the bytes of its weights that are not on disk yet. `problem` says why it cannot be used; None: it can.
    """

    name: str
    spec: str
    architecture: str | None = None
    revision: str | None = None
    licence: str | None = None
    input_size: tuple[int, int, int] | None = None
    view_size: tuple[int, int, int] | None = None
    formats: Mapping[str, int] | None = None
    params: int | None = None
    macs: int | None = None
    output_features: int | None = None
    download: int | None = None
    problem: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it can be used."""
        return self.problem is None


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system, by its cache, that weights would be downloaded to: bytes to come, and free ones.

    Weights of unknown size, and of sources that do not fit, do not count.
    """

    folder: str
    download: int
    free: int


@dataclass(frozen=True, slots=True)
class Preflight:
    """What `preflight` found: a row for each source, in the order given, and what stands against all together.

    `image_shape` is (channels, height, width); None: each source was looked at in its own size. `notes` say what could
    not be checked. `blueprints` are the sources that fit, under the names of the rows, as they were found and traced;
    `load_sources` takes them without doing either again.
    """

    image_shape: tuple[int, int, int] | None
    rows: tuple[SourceCheck, ...]
    disks: tuple[Disk, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    blueprints: tuple[Blueprint, ...] = field(default=(), repr=False, compare=False)

    @property
    def fits(self) -> bool:
        """Whether every source can be used, and all of them together."""
        return not self.problems and all(row.fits for row in self.rows)

    def __repr__(self) -> str:
        fitting = sum(row.fits for row in self.rows)
        return f"Preflight({fitting} of {len(self.rows)} sources fit, {len(self.problems)} problems)"

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, without blueprints, with `fits` for the whole and for each source."""
        rows = [{**asdict(row), "fits": row.fits} for row in self.rows]
        plain = {**asdict(replace(self, blueprints=())), "rows": rows, "fits": self.fits}
        del plain["blueprints"]
        return plain


def preflight(
    sources: Sequence[AnySource],
    *,
    image_shape: int | tuple[int, ...] | Callable[[], tuple[int, int, int] | None] | None = None,
    settings: CalibrationSettings | None = None,
    regardless: bool = False,
) -> Preflight:
    """Check sources without their weights: names, files, shapes, formats, input sizes, licences and disk space.

    No weights are fetched and no factory is called. Each source's row has the first reason against it; one that is
    accepted can still fail to load where a download breaks or weights hold NaN.

    Args:
        sources: What `load_sources` takes.
        image_shape: (channels, height, width) of the images to compose for; 96 means (3, 96, 96). Or a function that
            finds it out, which is called only if every source was found; None: each source's own size.
        settings: How the sources will be cut, and where networks end; None: the defaults.
        regardless: Whether to call that function where some sources were not found, too, for those that were.

    Raises:
        SourceError: If `sources` is no list, or empty.
        StitchError: What `image_shape` raises, unless sources have problems too; then it is one of the `problems`.

    Example:
        >>> checked = preflight([{"spec": "test_resnet", "pretrained": False}], image_shape=(3, 64, 64))
        >>> checked.fits, checked.rows[0].formats
        (True, {'NCHW': 6})
    """
    check_list(sources)
    began = time.monotonic()
    settings = settings or CalibrationSettings()
    findings = [_find(source) for source in sources]
    missing = [isinstance(finding, SourceCheck) for finding in findings]
    problems: list[str] = []
    shape = None
    if callable(image_shape):
        try:
            shape = None if all(missing) or (any(missing) and not regardless) else image_shape()
        except StitchError as error:
            if not any(missing):
                raise
            problems = [f"The images cannot be used: {error}"]
    elif image_shape is not None:
        shape = image_shape_of(image_shape)
    rows, blueprints = [], []
    for finding, name in zip(findings, make_distinct([finding.name for finding in findings]), strict=True):
        finding = replace(finding, name=name)
        if isinstance(finding, SourceCheck):
            rows.append(finding)
            continue
        row, blueprint = _check(finding, settings, shape)
        rows.append(row)
        if row.fits:
            blueprints.append(blueprint)
    files = [blueprint.weights for blueprint in blueprints if blueprint.weights is not None]
    disks = _disks(files)
    problems += [_describe_shortage(disk) for disk in disks if disk.download > disk.free]
    problems += _joint_problems(rows, settings, shape)
    notes = tuple(
        f"{reason}: for {count} of {len(rows)} sources the cache was taken."
        for reason, count in Counter(file.unreachable for file in files if file.unreachable).items()
    )
    seconds = time.monotonic() - began
    return Preflight(shape, tuple(rows), disks, tuple(problems), notes, seconds, tuple(blueprints))


def _find(source: AnySource) -> Blueprint | SourceCheck:
    if isinstance(source, Blueprint):
        return source
    try:
        return find_source(SourceSpec.of(source))
    except SourceError as error:
        options = source if isinstance(source, Mapping) else {"spec": source}
        spec = options.get("spec")
        text = show_spec(spec) if isinstance(spec, nn.Module) else str(spec)
        problem = str(error).removeprefix(f"Source {show_spec(spec)}: ")
        return SourceCheck(str(options.get("name") or text), text, problem=problem)


def _check(
    blueprint: Blueprint, settings: CalibrationSettings, image_shape: tuple[int, int, int] | None
) -> tuple[SourceCheck, Blueprint]:
    """A source that was found, and its blueprint with what was traced."""
    file, notes = blueprint.weights, _licence_notes(blueprint.licence)
    row = SourceCheck(
        name=blueprint.name,
        spec=blueprint.spec,
        architecture=blueprint.architecture,
        revision=blueprint.revision,
        licence=blueprint.licence,
        download=0 if file is None or file.file is not None else file.size,
    )
    try:
        if file is not None and file.file is None and file.url is not None:
            file = replace(file, size=_ask_size(file.url, file.folder))
            blueprint, row = replace(blueprint, weights=file), replace(row, download=file.size)
        shapes = None if file is None else tensor_shapes(file)
        if shapes is None and file is not None and file.hub is not None:
            notes.append("its weights' shapes could not be read yet: whether they fit is checked when they are loaded")
        source = outline(blueprint, shapes)
        if source is None:
            notes.append("the factory is not called yet: shapes and sizes are checked when it is")
        else:
            row = replace(
                row,
                input_size=source.preprocessing.input_size,
                params=sum(parameter.numel() for parameter in source.module.parameters()),
            )
            graph, cuts, end = cut_source(source, settings, image_shape or source.preprocessing.input_size)
            row = replace(
                row,
                view_size=graph.input_size,
                formats=dict(Counter(str(cut.format) for cut in cuts)),
                macs=graph.macs(None, end),
                output_features=graph.output_features(),
            )
            blueprint = replace(blueprint, graphs=source.graphs)
    except StitchError as error:
        row = replace(row, problem=str(error).removeprefix(f"Source {blueprint.spec!r}: "))
    return replace(row, notes=tuple(notes)), blueprint


def _ask_size(url: str, folder: Path) -> int | None:
    """The bytes of a file, if its server tells them."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_SECONDS_TO_ANSWER) as response:
            length = response.headers.get("Content-Length")
            return None if length is None else int(length)
    except (OSError, ValueError) as error:
        raise SourceError(f"{url} cannot be reached ({first_lines(error)}), and {folder} does not hold it.") from error


def _licence_notes(licence: str | None) -> list[str]:
    if licence is None:
        return ["its licence is unknown"]
    forbidden = forbidden_by(licence)
    return [f"its licence ({licence}) forbids {' and '.join(forbidden)}"] if forbidden else []


def _disks(files: Sequence[WeightFile]) -> tuple[Disk, ...]:
    """What is to be downloaded to each file system, each file once."""
    by_device: dict[int, list[WeightFile]] = {}
    for file in {file.hub or file.url: file for file in files if file.file is None}.values():
        by_device.setdefault(os.stat(_existing_part(file.folder)).st_dev, []).append(file)
    return tuple(
        Disk(
            folder=str(group[0].folder),
            download=sum(file.size or 0 for file in group),
            free=shutil.disk_usage(_existing_part(group[0].folder)).free,
        )
        for group in by_device.values()
    )


def _existing_part(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _describe_shortage(disk: Disk) -> str:
    unit, name = (1e9, "GB") if disk.download >= 1e9 else (1e6, "MB")
    need, free = disk.download / unit, disk.free / unit
    return (
        f"The weights need {need:.2f} {name} more in {disk.folder}, where {free:.2f} {name} are free. Free "
        f"{math.ceil(100 * (need - free)) / 100:.2f} {name}, take fewer sources, or let HF_HOME and TORCH_HOME name "
        f"folders with more room."
    )


def _joint_problems(
    rows: Sequence[SourceCheck], settings: CalibrationSettings, image_shape: tuple[int, int, int] | None
) -> list[str]:
    problems = []
    try:
        check_names([row.name for row in rows], settings)
    except StitchError as error:
        problems.append(str(error))
    usable = [row for row in rows if row.fits]
    if not usable:
        problems.append("No source is left to compose from.")
    channels = {row.name: row.input_size[0] for row in usable if row.input_size}
    if image_shape is None and len(set(channels.values())) > 1:
        problems.append(f"The sources take images of different numbers of channels: {channels}.")
    widths = {row.name: row.output_features for row in usable if row.output_features}
    if settings.until == "output" and len(set(widths.values())) > 1:
        problems.append(f"Networks that end at a source's output need outputs of one width; found {widths}.")
    return problems
