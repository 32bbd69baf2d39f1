"""What a result looks like: short in words, a table of 80 columns, records for pandas, HTML in a notebook."""

from __future__ import annotations

import re
from functools import cache
from io import StringIO

from doubles.small_sources import donor
from doubles.tensors import digits
from rich.console import Console

import lightning_stitch as ls
from lightning_stitch.composing import compose_personal

IMAGES, LABELS = digits(100, 32, first=0, classes=4)


@cache
def pool() -> ls.Pool:
    sources = [donor("test_resnet"), donor("test_efficientnet")]
    return ls.Pool(sources, (3, 32, 32), settings=ls.CalibrationSettings("stages"))


@cache
def result() -> ls.SearchResult:
    return pool().search([IMAGES[:16]], [(IMAGES[16:], LABELS[16:])], max_candidates=4)


def test_what_is_looked_at_in_a_console_fits_a_few_lines() -> None:
    best = result().best
    mine = compose_personal(pool(), IMAGES[:20], LABELS[:20])
    for shown in (pool(), donor("test_resnet"), result(), best, best.candidate, mine, ls.preflight(["test_resnet"])):
        assert len(repr(shown)) < 300
        assert type(shown).__name__ in repr(shown)
    assert f"{len(result().ranked)} candidates" in repr(result())
    assert "test_resnet, test_efficientnet; images 3x32x32, calibrated" in repr(pool())


def test_a_table_has_the_best_and_the_choice_and_its_figures_are_whole_at_80_columns() -> None:
    text = StringIO()
    result().table(3, console=Console(file=text, width=80, force_terminal=True, no_color=True))
    said = text.getvalue()
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in said.splitlines()) <= 80
    assert "1" in said
    for r in result().ranked[:3]:
        assert f"{r.candidate.cost.macs / 1e6:.1f}" in said
        assert f"{r.scores['loo_accuracy']:.3f}" in said
    assert said.count("*") >= 1


def test_records_are_plain_and_html_escapes_what_it_shows() -> None:
    records = result().to_records()
    assert [record["place"] for record in records] == list(range(1, len(records) + 1))
    assert all(isinstance(value, str | int | float | bool | None) for record in records for value in record.values())
    shown = result()._repr_html_()
    assert shown.count("<tr>") == min(20, len(records)) + 1 + (result().best not in result().ranked[:20])
    assert "<table>" in shown
