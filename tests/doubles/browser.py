"""A page as headless Chromium shows it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

PHONE, DESK = (390, 844), (1280, 900)


@contextmanager
def page_of(address: str, *, width: int, height: int, dark: bool = False) -> Iterator[tuple[Any, list[str]]]:
    """The page at an address, and the errors that its scripts make.

    A browser is no package of pip's, with which alone the tests have to pass; where there is none, pytest's summary
    names what was skipped for it.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("There is no Chromium on this machine: install Debian's package chromium.")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        page.set_default_timeout(60_000)
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        try:
            yield page, errors
        finally:
            browser.close()


def width_of(page: Any) -> int:
    """How wide the page is, with what one has to scroll to."""
    return int(page.evaluate("document.documentElement.scrollWidth"))
