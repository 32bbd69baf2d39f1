"""What `preflight` found, as a table with the reasons below it; and going on, or not, after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_stitch.errors import SourceError
from lightning_stitch.segments import CalibrationSettings
from lightning_stitch.source_checks import Preflight, SourceCheck, preflight

_NARROWEST = 100  # in a pipe or a log there is no width to go by


def print_preflight(checked: Preflight, *, console: Console | None = None) -> None:
    """Print one line for each source, and below them what is wrong or worth knowing.

    Args:
        checked: What `preflight` found.
        console: Where to; None: standard output.
    """
    console = console or Console()
    if console.width < _NARROWEST:
        console = Console(file=console.file, width=_NARROWEST)
    table = Table(box=None, padding=(0, 2, 0, 0), title=_title(checked), title_justify="left")
    for column in ("source", "fits", "sees", "cuts", "M params", "M MACs", "licence", "download"):
        table.add_column(column, justify="right" if column[:2] == "M " or column == "download" else "left")
    for row in checked.rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in _cells(row)))
    console.print(table)
    reasons = [f"{row.name} is rejected: {problem}" for row in checked.rows for problem in row.problems]
    notes = [f"{row.name}: {note}." for row in checked.rows if row.fits for note in row.notes]
    for line in (*reasons, *checked.problems, *checked.notes, *notes, *map(_room, checked.disks)):
        # Whole lines: they hold commands to copy.
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def preflight_text(checked: Preflight) -> str:
    """What `print_preflight` prints, without colours."""
    text = StringIO()
    print_preflight(checked, console=Console(file=text, width=_NARROWEST))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def require(checked: Preflight, *, skip_rejected: bool = False) -> None:
    """Refuse to go on with sources that cannot be used.

    Args:
        checked: What `preflight` found.
        skip_rejected: Whether the others may go on without those that are rejected.

    Raises:
        SourceError: With the table.
    """
    rejected = sum(not row.fits for row in checked.rows)
    if not checked.problems and (skip_rejected or not rejected):
        return
    raise SourceError(
        f"{refusal(checked)} No weights were downloaded.\n{preflight_text(checked)}"
        + ("\nskip_rejected=True goes on without those that are rejected." if not checked.problems else "")
    )


def refusal(checked: Preflight) -> str:
    """One sentence on what is wrong."""
    rejected = sum(not row.fits for row in checked.rows)
    if rejected:
        return f"{rejected} of {len(checked.rows)} sources cannot be used."
    return "The sources cannot be used together."


def usable_sources(
    sources: Sequence[str | nn.Module | Mapping[str, Any]],
    image_shape: tuple[int, int, int] | Callable[[], tuple[int, int, int] | None] | None,
    settings: CalibrationSettings,
    *,
    skip_rejected: bool,
    show: bool,
) -> list[Any]:
    """Those of the sources with which a search may begin.

    Args:
        sources: What `load_sources` takes.
        image_shape: As in `preflight`.
        settings: As in `preflight`.
        skip_rejected: Whether sources that are rejected are left out; otherwise they are an error.
        show: Whether to print the table.

    Raises:
        SourceError: If one is rejected that may not be left out, or all together cannot be used; with the table.
    """
    checked = preflight(sources, image_shape=image_shape, settings=settings)
    require(checked, skip_rejected=skip_rejected)
    if show:
        print_preflight(checked)
    return [source for source, row in zip(sources, checked.rows, strict=True) if row.fits]


def _title(checked: Preflight) -> str:
    seen = "each in its own size" if checked.image_shape is None else f"for images of {_size(checked.image_shape)}"
    fitting = sum(row.fits for row in checked.rows)
    return f"{fitting} of {len(checked.rows)} sources fit, {seen}; checked in {checked.seconds:.1f} s"


def _cells(row: SourceCheck) -> list[str]:
    return [
        row.name,
        "yes" if row.fits else "no",
        "-" if row.view_size is None else _size(row.view_size),
        "-" if row.formats is None else ", ".join(f"{count} {format}" for format, count in row.formats.items()),
        "-" if row.params is None else f"{row.params / 1e6:.2f}",
        "-" if row.macs is None else f"{row.macs / 1e6:.1f}",
        row.licence or "unknown",
        "?" if row.download is None else f"{row.download / 1e6:.1f} MB" if row.download else "-",
    ]


def _room(disk: Any) -> str:
    return f"{disk.download / 1e6:.1f} MB to download to {disk.folder}; {disk.free / 1e9:.1f} GB are free there."


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
