from __future__ import annotations

import io
from typing import Any

import pytest
from doubles.methods import row_of as row
from rich.console import Console

from lightning_stitch.baselines.tables import COUNTED, print_methods
from lightning_stitch.errors import StitchError


def printed(rows: list[dict[str, Any]]) -> str:
    console = Console(file=io.StringIO(), width=120)
    print_methods(rows, title="Test images", console=console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_printed_table_has_every_figure_and_says_what_is_counted() -> None:
    verdict = "StitchNet is undecided against linear probe. Not worth it: more test images would be needed."
    text = printed([row("linear probe"), row("StitchNet", flops=2_340_000_000, auroc=None, verdict=verdict)])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "linear probe 0.800 +- 0.000 0.800 +- 0.000 12.3 1 32 3.40 125.4 5.5" in lines
    assert "StitchNet 0.800 +- 0.000 - 12.3 0.00234 32 3.40 125.4 5.5" in lines
    assert lines[3] == "resnet"
    assert f"{verdict} {COUNTED}" in " ".join(lines)


def test_without_rows_there_is_nothing_to_show() -> None:
    with pytest.raises(StitchError, match="There are no rows to"):
        printed([])
