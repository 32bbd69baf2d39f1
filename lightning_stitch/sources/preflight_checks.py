"""Before any weights are fetched: which sources can be used for images of a shape, and what it takes to get them.

Every source is found (names, revisions, files), and its network built from its configuration on the meta device, where
tensors have shapes and nothing else. The tensors of a weight file are compared with it by the file's first bytes. What
is asked of the hub are a few small requests for each source.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from lightning_stitch.errors import SourceError, StitchError, first_lines
from lightning_stitch.io import WeightFile, tensor_shapes
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.blueprint import Blueprint
from lightning_stitch.sources.finding import AnySource, check_list, distinct, find_source
from lightning_stitch.sources.licences import forbidden_by
from lightning_stitch.sources.source import Source, outline
from lightning_stitch.sources.spec import SourceSpec
from lightning_stitch.sources.views import check_names, opened, view_size

_SECONDS_TO_ANSWER = 10


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """What is known of one source before its weights are there.

    Attributes:
        name: Its short name.
        spec: What the user wrote.
        architecture: The builder's own name for it; None where that could not be found out.
        revision: The commit that its weights would be taken at; None where it has none.
        licence: None where unknown.
        input_size: (channels, height, width) that it was trained on.
        view_size: The size at which it would see the images.
        formats: Number of cuts of each format.
        params: Number of parameters.
        macs: Multiply-accumulates for one image of `view_size`.
        output_features: Width of its output.
        weights: Bytes of its weight file; None where unknown.
        download: Bytes of it that are not on disk yet; None where unknown.
        problems: Why it cannot be used; empty where it can.
        notes: What else to know.
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
    weights: int | None = None
    download: int | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether it can be used."""
        return not self.problems


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system that weights would be downloaded to.

    Attributes:
        folder: The cache.
        download: Bytes to come, as far as they are known; those of sources that do not fit are left out.
        free: Free bytes.
    """

    folder: str
    download: int
    free: int


@dataclass(frozen=True, slots=True)
class Preflight:
    """What `preflight` found.

    Attributes:
        image_shape: (channels, height, width) of the images; None: each source was looked at in its own size.
        rows: One for each source, in the order given.
        disks: The file systems that weights would be downloaded to.
        problems: What stands against all sources together.
        notes: What could not be checked.
        seconds: What it took.
        blueprints: The sources that fit, under the names of the rows, as they were found and traced; `load_sources`
            takes them without doing either again.
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

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values, without blueprints, with `fits` for the whole and for each source."""
        plain = asdict(replace(self, blueprints=()))
        del plain["blueprints"]
        rows = [{**asdict(row), "fits": row.fits} for row in self.rows]
        return {**plain, "rows": rows, "fits": self.fits}


def preflight(
    sources: Sequence[AnySource],
    *,
    image_shape: tuple[int, int, int] | Callable[[], tuple[int, int, int] | None] | None = None,
    settings: CalibrationSettings | None = None,
    regardless: bool = False,
) -> Preflight:
    """Check sources without their weights: names, files, shapes, formats, input sizes, licences and disk space.

    No weights are fetched and no factory is called. Without a network, what is cached is checked, and the result says
    so. A source that `preflight` accepts can still fail to load where a download breaks or weights hold NaN.

    Args:
        sources: What `load_sources` takes.
        image_shape: (channels, height, width) of the images to compose for, or a function that finds it out, which is
            called only if every source was found; None: each source's own size.
        settings: How the sources will be cut, and where networks end; None: the defaults.
        regardless: Whether to call that function where some sources were not found, too, for those that were.

    Returns:
        One row for each source, with every reason against it.

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
    chosen = settings or CalibrationSettings()
    findings = [_find(source) for source in sources]
    missing = [bool(finding.problems) for finding in findings]
    unread: tuple[str, ...] = ()
    if callable(image_shape):
        try:
            image_shape = None if all(missing) or (any(missing) and not regardless) else image_shape()
        except StitchError as error:
            if not any(missing):
                raise
            image_shape, unread = None, (f"The images cannot be used: {error}",)
    rows, files, blueprints, silences = [], [], [], Counter[str]()
    for finding, name in zip(findings, distinct([finding.name for finding in findings]), strict=True):
        row, blueprint, file = _check(finding, name, chosen, image_shape)
        if file is not None and file.unreachable and file.file is not None:
            silences[file.unreachable] += 1
        rows.append(row)
        files.append(file if row.fits else None)
        if blueprint is not None and row.fits:
            blueprints.append(blueprint)
    disks, shortages = _disks(files)
    problems = (*unread, *shortages, *_joint_problems(rows, chosen, image_shape))
    notes = tuple(
        f"{reason}: for {count} of {len(rows)} sources the cache was taken." for reason, count in silences.items()
    )
    seconds = time.monotonic() - began
    return Preflight(image_shape, tuple(rows), disks, problems, notes, seconds, tuple(blueprints))


@dataclass(frozen=True, slots=True)
class _Finding:
    """What came of looking for a source; where its weights cannot be had, the source without them if it is known."""

    spec: str
    name: str
    blueprint: Blueprint | None = None
    problems: tuple[str, ...] = ()
    download: int | None = None


def _find(source: AnySource) -> _Finding:
    if isinstance(source, Blueprint):
        return _Finding(source.spec, source.name, source, download=None if source.weights else 0)
    label = _label(source)
    try:
        spec = SourceSpec.of(source)
    except SourceError as error:
        return _Finding(*label, problems=(str(error),))
    download = 0 if spec.pretrained is False else None
    try:
        blueprint = find_source(spec)
        return _Finding(blueprint.spec, blueprint.name, blueprint, download=download)
    except SourceError as error:
        problems = (str(error).removeprefix(f"Source {spec.shown}: "),)
    try:
        blueprint = find_source(replace(spec, pretrained=False))
        return _Finding(blueprint.spec, blueprint.name, blueprint, problems, download)
    except SourceError:
        return _Finding(*label, problems=problems, download=download)


def _label(source: str | nn.Module | Mapping[str, Any]) -> tuple[str, str]:
    """What a source that was not found is called: its spec and its name."""
    spec = source.get("spec") if isinstance(source, Mapping) else source
    text = f"live:{type(spec).__qualname__}" if isinstance(spec, nn.Module) else str(spec)
    return text, str(source.get("name") or text) if isinstance(source, Mapping) else text


def _check(
    finding: _Finding,
    name: str,
    settings: CalibrationSettings,
    image_shape: tuple[int, int, int] | None,
) -> tuple[SourceCheck, Blueprint | None, WeightFile | None]:
    """A source, looked at more closely where it was found; its blueprint with what was traced, its file."""
    row = SourceCheck(name, finding.spec, download=finding.download, problems=finding.problems)
    if finding.blueprint is None:
        return row, None, None
    blueprint = replace(finding.blueprint, name=name)
    file = None if finding.problems else blueprint.weights
    problems, notes = list(row.problems), []
    row = replace(row, architecture=blueprint.architecture, revision=blueprint.revision, licence=blueprint.licence)
    if file is not None and file.size is None and file.url is not None:
        file = _ask_size(file)
        if file.unreachable:
            problems.append(f"{file.url} cannot be reached ({file.unreachable}), and {file.folder} does not hold it.")
    source = None
    try:
        shapes = tensor_shapes(file) if file is not None and not problems else None
        if shapes is None and not problems and file is not None and file.hub is not None:
            notes.append("its weights' shapes could not be read yet: whether they fit is checked when they are loaded")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the search will say it again
            source = outline(blueprint, shapes)
        if source is None:
            notes.append("the factory is not called yet: shapes and sizes are checked when it is")
    except StitchError as error:
        problems.append(str(error).removeprefix(f"Source {blueprint.spec!r}: "))
    if source is not None:
        row, more = _cut(row, source, settings, image_shape or source.preprocessing.input_size)
        problems += more
        blueprint = replace(blueprint, graphs=source.graphs)
    if file is not None:
        row = replace(row, weights=file.size, download=0 if file.file is not None else file.size)
    elif blueprint.outline is None or not row.problems:
        row = replace(row, download=0)
    notes = [*_licence_notes(row.licence), *notes]
    return replace(row, problems=tuple(problems), notes=tuple(notes)), blueprint, file


def _cut(
    row: SourceCheck, source: Source, settings: CalibrationSettings, image_shape: tuple[int, int, int]
) -> tuple[SourceCheck, list[str]]:
    """Where a network without weights can be cut."""
    row = replace(
        row,
        licence=source.licence,
        input_size=source.preprocessing.input_size,
        params=sum(parameter.numel() for parameter in source.module.parameters()),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph, cuts, end = opened(source, settings, image_shape)
    except StitchError as error:
        return row, [str(error)]
    formats = dict(Counter(str(cut.format) for cut in cuts))
    return (
        replace(
            row,
            view_size=view_size(source.preprocessing, image_shape),
            formats=formats,
            macs=graph.macs(None, end),
            output_features=graph.output_features(),
        ),
        [],
    )


def _ask_size(file: WeightFile) -> WeightFile:
    """The same, with the size that its server tells."""
    request = urllib.request.Request(str(file.url), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS_TO_ANSWER) as response:
            length = response.headers.get("Content-Length")
            return replace(file, size=None if length is None else int(length))
    except (OSError, ValueError) as error:
        return replace(file, unreachable=first_lines(error))


def _licence_notes(licence: str | None) -> list[str]:
    """What a licence means for what will be composed."""
    if licence is None:
        return ["its licence is unknown"]
    forbidden = forbidden_by(licence)
    return [f"its licence ({licence}) forbids {' and '.join(forbidden)}"] if forbidden else []


def _disks(files: Sequence[WeightFile | None]) -> tuple[tuple[Disk, ...], list[str]]:
    """What is to be downloaded to each file system, each file once, and where there is no room for it."""
    needs = {file.hub or file.url: file for file in files if file is not None and file.file is None}
    closed = sorted({file.folder for file in needs.values() if not _writable(_existing(file.folder))})
    by_device: dict[int, list[WeightFile]] = {}
    for file in needs.values():
        by_device.setdefault(os.stat(_existing(file.folder)).st_dev, []).append(file)
    disks = tuple(
        Disk(
            str(group[0].folder),
            sum(file.size or 0 for file in group),
            shutil.disk_usage(_existing(group[0].folder)).free,
        )
        for group in by_device.values()
    )
    refusals = [
        f"Weights are to be downloaded to {folder}, but {_existing(folder)} is no folder that can be written. Let "
        f"HF_HOME (or HF_HUB_CACHE) and TORCH_HOME name folders that can."
        for folder in closed
    ]
    return disks, [*refusals, *(_shortage(disk) for disk in disks if disk.download > disk.free)]


def _shortage(disk: Disk) -> str:
    unit, name = (1e9, "GB") if disk.download >= 1e9 else (1e6, "MB")
    need, free = disk.download / unit, disk.free / unit
    return (
        f"The weights need {need:.2f} {name} more in {disk.folder}, where {free:.2f} {name} are free. Free "
        f"{math.ceil(100 * (need - free)) / 100:.2f} {name}, take fewer sources, or let HF_HOME and TORCH_HOME name "
        f"folders with more room."
    )


def _writable(path: Path) -> bool:
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _existing(folder: Path) -> Path:
    """The folder, or what there is of the way to it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _joint_problems(
    rows: Sequence[SourceCheck], settings: CalibrationSettings, image_shape: tuple[int, int, int] | None
) -> list[str]:
    """What stands against sources together that each might do alone."""
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
