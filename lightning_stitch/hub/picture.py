"""A composition drawn as a picture: a tree of fragments from top to bottom, stitches between them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_stitch.io import complete_or_absent
from lightning_stitch.recipe import FragmentRef, Recipe, StitchSpec

# Okabe and Ito's colours, told apart by the colour-blind, light enough for black letters; a box's first line names its
# source as well.
_COLOURS = ("#8CC5E8", "#F5C26B", "#7FD1B9", "#E3B3CE", "#F0E442", "#E89A6B", "#C9C9C9")
# In inches.
_BOX_WIDTH, _BOX_HEIGHT = 2.5, 0.9
_COLUMN_WIDTH, _ROW_HEIGHT = 2.8, 1.5
_MAX_LETTERS = 26


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw_composition(recipe: Recipe, path: Path) -> None:
    """Draw fragments as boxes, a colour for each source, and stitches as arrows with their CKA, into a PNG file."""
    colours = {ref.name: _COLOURS[index % len(_COLOURS)] for index, ref in enumerate(recipe.sources)}
    averaged = {tap.fragment for tap in recipe.taps if tap.statistics}
    places = _places(recipe)
    columns, rows = (max(numbers) + 1 for numbers in zip(*places, strict=True))
    size = (columns * _COLUMN_WIDTH + 0.4, rows * _ROW_HEIGHT)
    figure: Any = import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-_COLUMN_WIDTH / 2, (columns - 0.5) * _COLUMN_WIDTH)
    axes.set_ylim((0.5 - rows) * _ROW_HEIGHT, _ROW_HEIGHT / 2)
    for index, (fragment, (column, row)) in enumerate(zip(recipe.fragments, places, strict=True)):
        x, y = column * _COLUMN_WIDTH, -row * _ROW_HEIGHT
        axes.add_patch(
            import_module("matplotlib.patches").FancyBboxPatch(
                (x - _BOX_WIDTH / 2, y - _BOX_HEIGHT / 2),
                _BOX_WIDTH,
                _BOX_HEIGHT,
                boxstyle="round,pad=0.03",
                facecolor=colours[fragment.source],
                edgecolor="black",
            )
        )
        text = _label(fragment) + ("\n(averaged)" if index in averaged else "")
        # A dollar in a name begins no formula.
        axes.text(x, y, text, ha="center", va="center", fontsize=9, parse_math=False)
        if fragment.parent is not None:
            parent_column, parent_row = places[fragment.parent]
            start = (parent_column * _COLUMN_WIDTH, -parent_row * _ROW_HEIGHT - _BOX_HEIGHT / 2)
            end = (x, y + _BOX_HEIGHT / 2)
            arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0}
            axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=0)
        if fragment.stitch is not None:
            background = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
            axes.text(*middle, _stitch_label(fragment.stitch), ha="center", va="center", fontsize=8, bbox=background)
    # A link of that name is replaced; to write through it would change a file elsewhere.
    with complete_or_absent(path) as file:
        figure.savefig(file, dpi=110, format="png")


def _places(recipe: Recipe) -> list[tuple[int, int]]:
    """Each fragment's column and row: the first child stands below its parent, the others in columns of their own."""
    places: list[tuple[int, int]] = []
    num_columns = 0
    parents: list[int | None] = []
    for fragment in recipe.fragments:
        row = 0 if fragment.parent is None else places[fragment.parent][1] + 1
        if fragment.parent is not None and fragment.parent not in parents:
            column = places[fragment.parent][0]
        else:
            column, num_columns = num_columns, num_columns + 1
        parents.append(fragment.parent)
        places.append((column, row))
    return places


def _label(fragment: FragmentRef) -> str:
    lines = (fragment.source, f"{fragment.start or 'image'} ..", fragment.end or "output")
    text = "\n".join(line if len(line) <= _MAX_LETTERS else f"{line[: _MAX_LETTERS - 3]}..." for line in lines)
    return text.encode(errors="replace").decode()  # matplotlib draws no half characters


def _stitch_label(stitch: StitchSpec) -> str:
    words = "stitch" if stitch.cka is None else f"stitch, CKA {stitch.cka:.2f}"
    return words + ("" if stitch.placement == "explicit" else " (folded)")
