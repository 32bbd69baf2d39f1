"""The page of a search as headless Chromium shows it: on a desk and a phone, light and dark."""

from __future__ import annotations

from typing import Any

import pytest
from doubles.browser import DESK, PHONE, page_of, width_of
from doubles.fragment_searches import digits, search, trainer

from lightning_stitch import StitchedClassifier

pytestmark = [pytest.mark.figures, pytest.mark.slow]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, search(compare=True)).fit(StitchedClassifier(num_classes=3), digits())
    return (folder / "report.html").as_uri()


@pytest.mark.parametrize(("width", "height", "dark"), [(*DESK, False), (*PHONE, True)], ids=["desk", "phone, dark"])
def test_every_figure_is_there_nothing_is_cut_off_and_no_script_fails(
    width: int, height: int, dark: bool, address: str
) -> None:
    with page_of(address, width=width, height=height, dark=dark) as (page, errors):
        assert width_of(page) <= width
        figures = page.locator("figure svg")
        boxes = [figures.nth(number).bounding_box() for number in range(figures.count())]
        assert len(boxes) == 4
        assert all(box["width"] > 100 and box["height"] > 50 for box in boxes)
        pictures = page.locator(".images img")
        assert pictures.count() > 0
        assert all(pictures.nth(n).evaluate("x => x.naturalWidth") > 0 for n in range(pictures.count()))
        back, text = (_brightness(page, name) for name in ("background-color", "color"))
        assert (back < text) == dark
        assert errors == []


def test_a_table_sorts_by_the_column_that_is_clicked_either_way_and_again_by_keyboard(address: str) -> None:
    with page_of(address, width=1280, height=900) as (page, errors):
        table = page.locator("table").first
        headings = table.locator("th").all_inner_texts()
        place = next(n for n, words in enumerate(headings) if "MACs" in words)

        def values() -> list[float]:
            cells = table.locator(f"tbody td:nth-child({place + 1})")
            return [float(cells.nth(n).get_attribute("data-value")) for n in range(cells.count())]

        button = table.locator("th button").nth(place)
        before = values()
        button.click()
        assert values() == sorted(before, reverse=True)
        button.press("Enter")
        assert values() == sorted(before)
        assert len(set(before)) > 2
        assert errors == []


def _brightness(page: Any, property_name: str) -> int:
    """The sum of red, green and blue of a colour of the body."""
    colour = page.evaluate(f"getComputedStyle(document.body).getPropertyValue('{property_name}')")
    return sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(",")))
