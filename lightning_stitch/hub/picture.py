"""A composition drawn as a picture: a tree of fragments from left to right, stitches between them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_stitch.errors import StitchError
from lightning_stitch.io import complete_or_absent
from lightning_stitch.recipe import FragmentRef, Recipe, StitchSpec

# Okabe and Ito's colours, told apart by the colour-blind, light enough for black letters; a box's first line names its
# source as well.
_COLOURS = ("#8CC5E8", "#F5C26B", "#7FD1B9", "#E3B3CE", "#F0E442", "#E89A6B", "#C9C9C9")
_WIDTH, _HEIGHT, _GAP, _PITCH = 2.5, 1.0, 1.15, 1.75
_LETTERS = 26


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw_composition(recipe: Recipe, path: str | Path) -> Path:
    """Draw fragments as boxes, a colour for each source, and stitches as arrows with their CKA.

    Args:
        recipe: The structure.
        path: The image file; its ending says which kind.

    Returns:
        The path.

    Raises:
        StitchError: If matplotlib is not installed.
    """
    if not can_draw():
        raise StitchError("The picture needs matplotlib: pip install 'lightning-stitch[plots]'.")
    boxes = _boxes(recipe)
    columns, rows = max(box.column for box in boxes) + 1, max(box.row for box in boxes) + 1
    # Long chains go on in the next line, so that letters stay readable in a narrow page.
    per_line = min(columns, 3) if rows == 1 else columns
    lines = -(-columns // per_line) if rows == 1 else rows
    figure: Any = import_module("matplotlib.figure").Figure(
        figsize=(0.4 + per_line * (_WIDTH + _GAP), 0.4 + _PITCH * lines), layout="constrained"
    )
    axes = figure.subplots()
    axes.set_axis_off()
    colours = {ref.name: _COLOURS[index % len(_COLOURS)] for index, ref in enumerate(recipe.sources)}
    places = []
    for box in boxes:
        column, line = (box.column, box.row) if rows > 1 else (box.column % per_line, box.column // per_line)
        places.append((column * (_WIDTH + _GAP), -_PITCH * line))
    for box, (left, bottom) in zip(boxes, places, strict=True):
        patch = import_module("matplotlib.patches").FancyBboxPatch(
            (left, bottom), _WIDTH, _HEIGHT, boxstyle="round,pad=0.03", facecolor=colours[box.source], edgecolor="black"
        )
        axes.add_patch(patch)
        # A dollar in a name begins no formula.
        middle = (left + _WIDTH / 2, bottom + _HEIGHT / 2)
        axes.text(*middle, box.text, ha="center", va="center", fontsize=9, parse_math=False)
        if box.parent is not None:
            before_left, before_bottom = places[box.parent]
            _arrow(axes, (before_left, before_bottom), (left, bottom), box.joint)
    axes.set_xlim(-0.2, per_line * (_WIDTH + _GAP) - _GAP + 0.2)
    axes.set_ylim(-_PITCH * (lines - 1) - 0.2, _HEIGHT + 0.2)
    path = Path(path)
    # A link of that name is replaced; to write through it would change a file elsewhere.
    with complete_or_absent(path) as file:
        figure.savefig(file, dpi=110, format=path.suffix.removeprefix(".") or None)
    return path


@dataclass(frozen=True, slots=True)
class _Box:
    source: str
    text: str
    column: int
    row: int
    parent: int | None
    joint: str


def _boxes(recipe: Recipe) -> list[_Box]:
    """Each fragment's box: the first child stands in its parent's row, the others in rows of their own below."""
    boxes: list[_Box] = []
    num_rows = 0
    for index, fragment in enumerate(recipe.fragments):
        siblings = [earlier for earlier in recipe.fragments[:index] if earlier.parent == fragment.parent]
        if fragment.parent is not None and not siblings:
            row = boxes[fragment.parent].row
        else:
            row, num_rows = num_rows, num_rows + 1
        column = 0 if fragment.parent is None else boxes[fragment.parent].column + 1
        averaged = any(tap.statistics for tap in recipe.taps if tap.fragment == index)
        text = _text(fragment) + ("\n(averaged)" if averaged else "")
        boxes.append(_Box(fragment.source, text, column, row, fragment.parent, _joint(fragment.stitch)))
    return boxes


def _text(fragment: FragmentRef) -> str:
    lines = (fragment.source, f"{fragment.start or 'image'} ..", fragment.end or "output")
    return "\n".join(line if len(line) <= _LETTERS else f"{line[: _LETTERS - 3]}..." for line in lines)


def _joint(stitch: StitchSpec | None) -> str:
    if stitch is None:
        return ""
    words = "stitch" if stitch.cka is None else f"stitch\nCKA {stitch.cka:.2f}"
    return words + ("" if stitch.placement == "explicit" else "\n(folded)")


def _arrow(axes: Any, before: tuple[float, float], behind: tuple[float, float], words: str) -> None:
    start, end = (before[0] + _WIDTH, before[1] + _HEIGHT / 2), (behind[0], behind[1] + _HEIGHT / 2)
    if behind[0] <= before[0]:  # on in the next line: down, back and down again
        middle = before[1] - (_PITCH - _HEIGHT) / 2
        corners = [(before[0] + _WIDTH / 2, before[1]), (before[0] + _WIDTH / 2, middle)]
        start, end = (behind[0] + _WIDTH / 2, middle), (behind[0] + _WIDTH / 2, behind[1] + _HEIGHT)
        axes.plot(*zip(*corners, start, strict=True), color="black", linewidth=1, zorder=0)
        place = ((corners[1][0] + start[0]) / 2, middle)
    else:
        place = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": "black", "shrinkA": 0}, zorder=0)
    if words:
        back = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(*place, words, ha="center", va="center", fontsize=8, bbox=back)
