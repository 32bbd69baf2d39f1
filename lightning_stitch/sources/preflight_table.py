"""What `preflight` found, as a table with the reasons below it; and going on, or not, after it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lightning_stitch.errors import SourceError, StitchError
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.sources.preflight_checks import Preflight
from lightning_stitch.sources.source import Source
from lightning_stitch.sources.views import cut_source
from lightning_stitch.tables import print_table, table_text

_LEFT = ("fits", "sees", "cuts", "licence")
_EXPENDABLE = ("M MACs", "cuts", "M params", "sees")
_ADVICE = "skip_rejected=True goes on without those that are rejected."


def print_preflight(checked: Preflight, *, console: Console | None = None) -> None:
    """Print one line for each source, and below them what is wrong or worth knowing."""
    title, notes = _title(checked), _notes(checked)
    print_table(_rows(checked), title=title, notes=notes, left=_LEFT, expendable=_EXPENDABLE, console=console)


def preflight_text(checked: Preflight) -> str:
    """What `print_preflight` prints, without colours."""
    return table_text(_rows(checked), title=_title(checked), notes=_notes(checked), left=_LEFT)


def require(checked: Preflight, *, skip_rejected: bool = False) -> None:
    """Refuse, with the table, to go on with sources that cannot be used; those that are rejected may be skipped.

    Raises:
        SourceError: If one is rejected that may not be skipped, or all together cannot be used.
    """
    if checked.problems or not (checked.fits or skip_rejected):
        advice = "" if checked.problems else f"\n{_ADVICE}"
        raise SourceError(f"{refusal(checked)} No weights were downloaded.\n{preflight_text(checked)}{advice}")


def refusal(checked: Preflight) -> str:
    """One sentence on what is wrong."""
    rejected = sum(not row.fits for row in checked.rows)
    if rejected:
        return f"{rejected} of {len(checked.rows)} sources cannot be used."
    return "The sources cannot be used together."


def fitting_sources(
    sources: Sequence[Source],
    image_shape: tuple[int, int, int],
    settings: CalibrationSettings,
    *,
    skip_rejected: bool,
) -> list[Source]:
    """Those of loaded sources that take the images, where the images' shape was not known when they were checked.

    Raises:
        SourceError: If one does not that may not be left out, or none does.
    """
    fitting, problems = [], []
    for source in sources:
        try:
            cut_source(source, settings, image_shape)
            fitting.append(source)
        except StitchError as error:
            problems.append(f"{source.name} is rejected: {error}")
    if problems and not (skip_rejected and fitting):
        lines = [
            f"{len(problems)} of {len(sources)} sources cannot be used.",
            *problems,
            *([_ADVICE] if fitting else []),
        ]
        raise SourceError("\n".join(lines))
    return fitting


def _title(checked: Preflight) -> str:
    seen = "each in its own size" if checked.image_shape is None else f"for images of {_size(checked.image_shape)}"
    fitting = sum(row.fits for row in checked.rows)
    return f"{fitting} of {len(checked.rows)} sources fit, {seen}; checked in {checked.seconds:.1f} s"


def _rows(checked: Preflight) -> list[dict[str, str]]:
    return [
        {
            "source": row.name,
            "fits": "yes" if row.fits else "no",
            "sees": "-" if row.view_size is None else _size(row.view_size),
            "cuts": "-" if row.formats is None else ", ".join(f"{n} {format}" for format, n in row.formats.items()),
            "M params": "-" if row.params is None else f"{row.params / 1e6:.2f}",
            "M MACs": "-" if row.macs is None else f"{row.macs / 1e6:.1f}",
            "licence": row.licence or "unknown",
            "download": "?" if row.download is None else f"{row.download / 1e6:.1f} MB" if row.download else "-",
        }
        for row in checked.rows
    ]


def _notes(checked: Preflight) -> list[str]:
    reasons = [f"{row.name} is rejected: {row.problem}" for row in checked.rows if not row.fits]
    notes = [f"{row.name}: {note}." for row in checked.rows if row.fits for note in row.notes]
    downloads = [
        f"{disk.download / 1e6:.1f} MB to download to {disk.folder}; {disk.free / 1e9:.1f} GB are free there."
        for disk in checked.disks
    ]
    return [*reasons, *checked.problems, *checked.notes, *notes, *downloads]


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
