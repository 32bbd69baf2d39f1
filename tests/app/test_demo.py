"""The app as a visitor uses it, in headless Chromium, against a pool of small sources."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from doubles.browser import DESK, PHONE, page_of, width_of
from doubles.predictions import NAMES, write_digits
from doubles.published_networks import classifier
from doubles.small_sources import write_local
from PIL import Image

from lightning_stitch import StitchedClassifier, StitchError, load_source
from lightning_stitch.app import demo_of


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), 40)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("sources")
    for name in ("test_resnet", "test_efficientnet"):
        write_local(load_source(name, pretrained=False), folder / name)
    with served(*(f"local-dir:{source}" for source in sorted(folder.iterdir())), "--image_size", "32") as here:
        yield here


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """`lightning-stitch app`, in a process of its own, as soon as it answers."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "lightning_stitch.cli", "app", *arguments, "--port", str(port)]
    with subprocess.Popen(command) as process:
        try:
            for _ in range(300):
                with suppress(OSError), urlopen(f"http://127.0.0.1:{port}", timeout=5):
                    break
                assert process.poll() is None
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def add(page: Any, name: str, files: list[Path]) -> None:
    """Name a class and choose its images."""
    page.fill("#class textarea, #class input", name)
    page.set_input_files("#files input[type=file]", files)
    page.wait_for_function(f"document.querySelectorAll('#files .file-name, #files td').length >= {len(files)}")
    page.click("#add")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [DESK, PHONE])
def test_a_visit_from_labelled_images_to_a_prediction_and_a_download(
    width: int, height: int, address: str, images: Path, tmp_path: Path
) -> None:
    with page_of(address, width=width, height=height) as (page, errors):
        page.wait_for_selector("#compose")
        for number, name in enumerate(NAMES[:2], start=1):
            add(page, name, sorted((images / name).iterdir())[:8])
            page.wait_for_selector(f"text={8 * number} images of {number} class")
        page.click("#compose")
        page.wait_for_function("document.querySelector('#verdict').innerText.includes('of your 16 images')")
        page.wait_for_selector("#picture img")
        page.set_input_files("#image input[type=file]", sorted((images / NAMES[1]).iterdir())[9])
        page.wait_for_function("document.querySelector('#label').innerText.includes('%')")
        said = page.inner_text("#label").split("\n")
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "got.zip")
        assert width_of(page) <= width
        assert errors == []
    zipfile.ZipFile(tmp_path / "got.zip").extractall(tmp_path / "got")
    model = StitchedClassifier.from_pretrained(tmp_path / "got")
    assert model.class_names == sorted(NAMES[:2])
    (row,) = model.predict([sorted((images / NAMES[1]).iterdir())[9]])
    assert row["class"] in said
    assert (tmp_path / "got" / "report.html").is_file()


@pytest.mark.slow
def test_no_image_a_broken_one_and_a_budget_without_meaning_are_told_and_the_visit_goes_on(
    address: str, images: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with page_of(address, width=1280, height=900) as (page, _):
        page.wait_for_selector("#compose")
        page.click("#compose")
        page.wait_for_selector("text=Add labelled images first")
        page.click("#add")
        page.wait_for_selector("text=Name the class, and choose its images.")
        good = sorted((images / NAMES[0]).iterdir())[:4]
        add(page, "first", [broken, *good])
        page.wait_for_selector("text=4 images of 1 class")
        page.wait_for_selector("text=Left out, as it cannot be read as an image: broken.png")
        page.click("#compose")
        page.wait_for_selector("text=at least two classes")
        add(page, "second", sorted((images / NAMES[1]).iterdir())[:4])
        page.wait_for_selector("text=8 images of 2 classes")
        page.fill("#budget input", "cheap")
        page.keyboard.press("Enter")
        page.click("#compose")
        page.wait_for_selector("text=is no limit")
        page.set_input_files("#image input[type=file]", good[0])
        page.wait_for_selector("text=Compose a network first.")
        page.click("#clear")
        page.wait_for_selector("text=No images yet.")


@pytest.mark.slow
def test_a_classifiers_page_predicts_and_tells_what_is_no_image(images: Path, tmp_path: Path) -> None:
    model = classifier()
    file = tmp_path / "digit.png"
    Image.open(next((images / NAMES[2]).iterdir())).save(file)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    (expected,) = model.predict([file])
    model.save_pretrained(tmp_path / "saved")
    with served(str(tmp_path / "saved")) as here, page_of(here, width=390, height=844) as (page, errors):
        page.wait_for_selector("#image")
        page.set_input_files("#image input[type=file]", file)
        page.wait_for_function("document.querySelector('#label').innerText.includes('%')")
        assert expected["class"] in page.inner_text("#label")
        assert width_of(page) <= 390
        assert errors == []
        page.click("#image button[aria-label*='lear'], #image button[aria-label*='emove']")
        page.set_input_files("#image input[type=file]", broken)
        page.wait_for_selector("text=cannot identify image file")


def test_what_the_app_cannot_show_is_refused() -> None:
    for model in (StitchedClassifier(3), StitchedClassifier(head="none")):
        with pytest.raises(StitchError, match="a classifier that has its network, and classes"):
            demo_of(model)
