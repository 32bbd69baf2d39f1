"""Figures of a search: its candidates by score and cost, how alike its sources are, and which classes are mixed up.

matplotlib draws them, as SVG for the page and as PNG for loggers: it is what the other pictures are drawn with, and its
SVG needs no script. Letters and axes are of a grey that can be read on white and on black.
"""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

from lightning_stitch.hub import composition_figure
from lightning_stitch.recipe import Recipe
from lightning_stitch.search import SCORES
from lightning_stitch.tables import Record

# Okabe and Ito's colours, told apart by the colour-blind; the marker says the same once more.
_KINDS = {
    "source": ("#0072B2", "o"),
    "early exit": ("#56B4E9", "v"),
    "smaller image": ("#009E73", "s"),
    "shortened": ("#E69F00", "D"),
    "stitched": ("#D55E00", "*"),
    "side by side": ("#CC79A7", "P"),
    "staged": ("#9467bd", "X"),
    "self-stitched": ("#999999", "."),
}
_GREY = "#7a7a7a"
_MOST_NAMES = 40  # of a heat map's axes


def figures_of(record: Record) -> dict[str, Any]:
    """The figures of a record (`report.record.record_of`) by name; those that it has nothing for are left out."""
    figures = {
        "composition": composition_figure(Recipe.from_dict(record["recipe"])),
        "candidates": _candidates(record),
    }
    if record["predictions"]:
        figures["confusion"] = _confusion(record["predictions"])
    for number, pair in enumerate(record["similarities"]):
        figures[f"similarity_{number + 1}"] = _similarity(pair)
    return figures


def as_svg(figure: Any) -> str:
    """An SVG element, without what is said before it in a file of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def as_png(figure: Any) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot, which would choose a window system and keep the figure.
    figure: Any = import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(colors=_GREY, labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(_GREY)
    return figure, axes


def _candidates(record: Record) -> Any:
    figure, axes = _figure(8, 4.4)
    score = record["score"]
    rows = [row for row in record["candidates"] if row[score] is not None]
    for kind, (colour, marker) in _KINDS.items():
        of_kind = [row for row in rows if row["kind"] == kind]
        if of_kind:
            x, y = [_macs(row) / 1e6 for row in of_kind], [row[score] for row in of_kind]
            axes.scatter(x, y, s=34, color=colour, marker=marker, alpha=0.8, linewidths=0, label=kind)
    front: list[Record] = []
    for row in sorted(rows, key=lambda row: (_macs(row), -row[score])):
        if not front or row[score] > front[-1][score]:
            front.append(row)
    axes.step([_macs(r) / 1e6 for r in front], [r[score] for r in front], where="post", color=_GREY, lw=0.8, zorder=0)
    best = next(row for row in record["candidates"] if row["place"] == record["best"])
    axes.scatter([_macs(best) / 1e6], [best[score]], s=150, facecolors="none", edgecolors="#D55E00", label="chosen")
    sources = sorted((row for row in rows if row["kind"] == "source"), key=lambda row: row[score])
    for number, row in enumerate(sources):
        # They may cost about the same: the lowest is named below, the next above, and so on.
        offset = (0, 7 + 11 * (number // 2) if number % 2 else -14 - 11 * (number // 2))
        style = {"textcoords": "offset points", "ha": "center", "color": _GREY, "fontsize": 8, "parse_math": False}
        axes.annotate(row["path"].split(":")[0], (_macs(row) / 1e6, row[score]), xytext=offset, **style)
    limit = record["budget"].get("mean_macs") or record["budget"].get("max_macs")
    if limit:
        axes.axvline(limit / 1e6, color=_GREY, ls="--", lw=1)
        axes.annotate(" budget", (limit / 1e6, 0.02), xycoords=("data", "axes fraction"), color=_GREY, fontsize=9)
    axes.set_xscale("log")
    # Not its kin that writes formulas, whose parser keeps alive what called it: a Trainer, after a search.
    formatter = import_module("matplotlib.ticker").LogFormatter
    axes.xaxis.set_major_formatter(formatter())
    axes.xaxis.set_minor_formatter(formatter())
    axes.set_xlabel("M MACs of an image" + (", on average" if any(row["mean_macs"] for row in rows) else ""))
    axes.set_ylabel(SCORES.get(score, score))
    axes.xaxis.label.set_color(_GREY)
    axes.yaxis.label.set_color(_GREY)
    axes.legend(fontsize=8, frameon=False, labelcolor=_GREY, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _macs(row: Record) -> float:
    return float(row["mean_macs"] or row["macs"])


def _similarity(pair: Record) -> Any:
    names, values = pair["cuts"], pair["values"]
    figure, axes = _figure(1.6 + 0.22 * len(names[1]), 1.4 + 0.2 * len(names[0]))
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(names[0])), names[0], fontsize=7, parse_math=False)
    axes.set_xticks(range(len(names[1])), names[1], fontsize=7, rotation=90, parse_math=False)
    axes.set_ylabel(pair["sources"][0], color=_GREY, parse_math=False)
    axes.set_xlabel(pair["sources"][1], color=_GREY, parse_math=False)
    bar = figure.colorbar(image, ax=axes, label="CKA")
    bar.ax.tick_params(colors=_GREY)
    bar.ax.yaxis.label.set_color(_GREY)
    return figure


def _confusion(predictions: Record) -> Any:
    names, counts = predictions["class_names"], predictions["confusion"]
    side = min(9.0, 1.8 + 0.45 * len(names))
    figure, axes = _figure(side + 0.6, side)
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= 20:
        for y, row in enumerate(counts):
            for x, count in enumerate(row):
                colour = "white" if shares[y][x] > 0.5 else "black"
                axes.text(x, y, str(count), ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("predicted", color=_GREY)
    axes.set_ylabel("is", color=_GREY)
    return figure
