"""A composition drawn as a picture: a tree of fragments from top to bottom, stitches between them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_stitch.io import complete_or_absent
from lightning_stitch.recipe import FragmentRef, Recipe, Run, StitchSpec

# Okabe and Ito's colours, told apart by the colour-blind, light enough for black letters; a box's first line names its
# source as well.
_COLOURS = ("#8CC5E8", "#F5C26B", "#7FD1B9", "#E3B3CE", "#F0E442", "#E89A6B", "#C9C9C9")
# In inches.
_BOX_WIDTH, _LINE_HEIGHT, _BOX_MARGIN = 2.6, 0.18, 0.28
_COLUMN_WIDTH, _GAP = 2.8, 0.5
_MAX_LETTERS = 26


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def draw_composition(recipe: Recipe, path: Path) -> None:
    """Draw `composition_figure` into a PNG file."""
    # A link of that name is replaced; to write through it would change a file elsewhere.
    with complete_or_absent(path) as file:
        composition_figure(recipe).savefig(file, dpi=110, format="png")


def composition_figure(recipe: Recipe) -> Any:
    """Fragments as boxes, a colour for each source, and stitches as arrows with their CKA: a matplotlib figure."""
    colours = {ref.name: _COLOURS[index % len(_COLOURS)] for index, ref in enumerate(recipe.sources)}
    runs = recipe.runs
    places = _places(recipe)
    columns, rows = (max(numbers) + 1 for numbers in zip(*places, strict=True))
    texts = [_label(run.ref) + _taps_label(recipe, run) + _stages_label(recipe, run) for run in runs]
    box_height = _BOX_MARGIN + _LINE_HEIGHT * max(text.count("\n") + 1 for text in texts)
    row_height = box_height + _GAP
    size = (columns * _COLUMN_WIDTH + 0.4, rows * row_height)
    figure: Any = import_module("matplotlib.figure").Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-_COLUMN_WIDTH / 2, (columns - 0.5) * _COLUMN_WIDTH)
    axes.set_ylim((0.5 - rows) * row_height, row_height / 2)
    for run, (column, row), text in zip(runs, places, texts, strict=True):
        fragment = run.ref
        x, y = column * _COLUMN_WIDTH, -row * row_height
        axes.add_patch(
            import_module("matplotlib.patches").FancyBboxPatch(
                (x - _BOX_WIDTH / 2, y - box_height / 2),
                _BOX_WIDTH,
                box_height,
                boxstyle="round,pad=0.03",
                facecolor=colours[fragment.source],
                edgecolor="black",
            )
        )
        # A dollar in a name begins no formula.
        axes.text(x, y, text, ha="center", va="center", fontsize=9, parse_math=False)
        if fragment.parent is not None:
            parent_column, parent_row = places[next(n for n, r in enumerate(runs) if fragment.parent in r.fragments)]
            start = (parent_column * _COLUMN_WIDTH, -parent_row * row_height - box_height / 2)
            end = (x, y + box_height / 2)
            arrow = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0}
            axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=0)
        if fragment.stitch is not None:
            background = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
            axes.text(*middle, _stitch_label(fragment.stitch), ha="center", va="center", fontsize=8, bbox=background)
    return figure


def _places(recipe: Recipe) -> list[tuple[int, int]]:
    """Each run's column and row: the first child stands below its parent, the others in columns of their own."""
    places: dict[int, tuple[int, int]] = {}  # of the run, by its fragments
    num_columns = 0
    parents: list[int | None] = []
    for run in recipe.runs:
        parent = run.ref.parent
        row = 0 if parent is None else places[parent][1] + 1
        if parent is not None and parent not in parents:
            column = places[parent][0]
        else:
            column, num_columns = num_columns, num_columns + 1
        parents.append(parent)
        places |= dict.fromkeys(run.fragments, (column, row))
    return [places[run.fragments[0]] for run in recipe.runs]


def _label(fragment: FragmentRef) -> str:
    size = "" if fragment.image_size is None else f" at {fragment.image_size[0]}x{fragment.image_size[1]}"
    lines = (fragment.source, f"{fragment.start or 'image'}{size} ..", fragment.end or "output")
    text = "\n".join(line if len(line) <= _MAX_LETTERS else f"{line[: _MAX_LETTERS - 3]}..." for line in lines)
    return text.encode(errors="replace").decode()  # matplotlib draws no half characters


def _taps_label(recipe: Recipe, run: Run) -> str:
    """What is read of a run, and how much of it decides."""
    taps = [tap for tap in recipe.taps if tap.fragment in run.fragments]
    if not taps:
        return ""
    shares = [tap.share for tap in taps if tap.share is not None]
    decides = f", {sum(shares):.0%} of what decides" if shares else ""
    return f"\nread at {len(taps)} cut{'s' * (len(taps) > 1)}{decides}"


def _stages_label(recipe: Recipe, run: Run) -> str:
    """Which share of all images stops at which cut of a run."""
    if recipe.stages is None:
        return ""
    lines = []
    for count, share in zip(recipe.stages.taps, recipe.stages.stopping, strict=True):
        fragment = recipe.taps[count - 1].fragment
        if fragment in run.fragments:
            lines.append(f"\n{share:.0%} of images stop at {recipe.fragments[fragment].end or 'output'}")
    return "".join(lines)


def _stitch_label(stitch: StitchSpec) -> str:
    words = "stitch" if stitch.cka is None else f"stitch, CKA {stitch.cka:.2f}"
    return words + ("" if stitch.placement == "explicit" else " (folded)")
