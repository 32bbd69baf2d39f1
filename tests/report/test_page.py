"""The page of a search: one file that needs nothing else, with all that the search knows."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from doubles.fragment_searches import digits, search, trainer

from lightning_stitch import Budget, FragmentSearch, StitchedClassifier, StitchError
from lightning_stitch._lightning import pl
from lightning_stitch.cli.main import main
from lightning_stitch.maths import linear_cka
from lightning_stitch.report import FILE, images_to_show, read_record, write_page
from lightning_stitch.tables import Record

pytestmark = pytest.mark.figures

_VOID = {"meta", "link", "img", "br", "path", "use", "rect"}


class Page(HTMLParser):
    """Elements by name with their attributes, text by the element it is in, and whether all that opens closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FragmentSearch]:
    folder = tmp_path_factory.mktemp("run")
    callback = search(compare=True, budget=Budget(max_macs=5e6))
    trainer(folder, callback).fit(StitchedClassifier(num_classes=3), digits())
    return folder, callback


def page_of(folder: Path) -> tuple[str, Page]:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    return text, page


def test_a_page_needs_nothing_from_elsewhere_and_its_figures_are_there_as_files_too(
    run: tuple[Path, FragmentSearch],
) -> None:
    folder, _ = run
    text, page = page_of(folder)
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")]
    assert links
    assert all(str(link).startswith(("data:", "#")) for link in links)
    assert not re.search(r"@import|url\((?!#)|fetch\(|https?://(?!www\.w3\.org|purl\.org|creativecommons)", text)
    names = {attributes.get("id") for tag, attributes in page.elements if tag == "figure"}
    assert names == {"composition", "candidates", "confusion", "similarity_1"}
    files = {file.name for file in (folder / "figures").iterdir()}
    assert files == {f"{name}{suffix}" for name in names for suffix in (".svg", ".png")}
    assert all((folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in names)


def test_every_candidate_and_every_row_of_the_comparison_is_in_a_table_with_the_choice_marked(
    run: tuple[Path, FragmentSearch],
) -> None:
    folder, callback = run
    text, page = page_of(folder)
    assert callback.result is not None
    assert callback.comparison is not None
    classes = [attributes.get("class") for tag, attributes in page.elements if tag == "tr"]
    assert classes.count("chosen") == 2
    best = callback.result.best
    for value in (best.candidate.cost.macs, best.scores["loo_accuracy"], best.score):
        assert f'data-value="{value}"' in text
    for row in callback.comparison.rows:
        assert f'data-value="{row["accuracy"]}"' in text
    assert all(html.escape(reason) in text for reason in callback.result.rejected)
    assert callback.comparison.words[:30] in text


def test_wrong_images_come_first_and_counts_are_those_of_the_test_images(run: tuple[Path, FragmentSearch]) -> None:
    folder, callback = run
    record = read_record(folder)
    comparison = callback.comparison
    assert comparison is not None
    wrong = comparison.probabilities.argmax(1) != comparison.targets
    counts = torch.tensor(record["predictions"]["confusion"])
    assert int(counts.sum()) == len(comparison.targets)
    assert int(counts.sum() - counts.trace()) == int(wrong.sum())
    shown = images_to_show(comparison)
    num_wrong = min(16, int(wrong.sum()))
    assert wrong[shown[:num_wrong]].all()
    assert not wrong[shown[num_wrong:]].any()
    assert len(record["predictions"]["shown"]) == len(shown)
    pictures = [one["image"] for one in record["predictions"]["shown"]]
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def test_how_alike_sources_are_is_debiased_cka_of_what_is_read(run: tuple[Path, FragmentSearch]) -> None:
    folder, callback = run
    (pair,) = read_record(folder)["similarities"]
    assert len(pair["values"]) == len(pair["cuts"][0])
    assert all(len(row) == len(pair["cuts"][1]) for row in pair["values"])
    pool, data = callback.pool, digits()
    assert pool is not None
    data.setup()
    images = torch.cat([x for x, _ in data.labelled_dataloader("train", "selection", "calibration")])[:256]
    ends = []
    for part, cuts in zip(pool.parts, pair["cuts"], strict=True):
        network = pool.assemble(next(r.candidate for r in callback.result.ranked if _is_source(r, part.name)))
        with torch.no_grad():
            features = network(images)[:, -network.recipe.taps[-1].num_features :]
        ends.append((features - features.mean(0)) / features.std(0).clamp_min(1e-12))
        assert cuts[-1] == (network.recipe.fragments[-1].end or "output")
    assert pair["values"][-1][-1] == pytest.approx(float(linear_cka(*ends)), abs=1e-3)


def _is_source(ranked: object, name: str) -> bool:
    candidate = ranked.candidate  # type: ignore[attr-defined]
    return candidate.kind == "source" and candidate.recipe.fragments[0].source == name


def test_a_page_is_made_again_from_its_record_and_without_matplotlib_has_no_figures(
    run: tuple[Path, FragmentSearch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = run
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes())
    main(["report", str(tmp_path)])
    assert "report.html" in capsys.readouterr().out
    assert len(page_of(tmp_path)[1].elements) == len(page_of(folder)[1].elements)
    monkeypatch.setattr("lightning_stitch.report.page.can_draw", lambda: False)
    write_page(read_record(folder), tmp_path)
    _, page = page_of(tmp_path)
    assert "figure" not in {tag for tag, _ in page.elements}
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StitchError, match="cannot hold a report"):
        write_page(read_record(folder), tmp_path / "file")
    with pytest.raises(StitchError, match=r"holds no report.json of a search"):
        read_record(tmp_path / "nowhere")
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(StitchError, match="it has no candidates"):
        read_record(tmp_path)


def test_names_from_elsewhere_are_words_and_no_markup(run: tuple[Path, FragmentSearch], tmp_path: Path) -> None:
    record: Record = json.loads(json.dumps(read_record(run[0])))
    evil = '<script>alert("x")</script>'
    record["predictions"]["class_names"][0] = evil
    record["candidates"][0]["kind"] = evil
    record["rejected"][evil] = 3
    write_page(record, tmp_path)
    text, page = page_of(tmp_path)
    assert evil not in text
    assert [tag for tag, _ in page.elements].count("script") == 1


def test_without_a_comparison_the_page_has_what_the_search_knows(tmp_path: Path) -> None:
    trainer(tmp_path, search()).fit(StitchedClassifier(num_classes=3), digits())
    text, page = page_of(tmp_path)
    names = {attributes.get("id") for tag, attributes in page.elements if tag == "figure"}
    assert names == {"composition", "candidates"}
    assert "on the selection images" in text


class _Images(pl.loggers.Logger):
    """Takes images as Weights & Biases does, or as TensorBoard does."""

    name, version = "images", 0

    def __init__(self, log_image: Callable[..., None] | None = None, experiment: object = None) -> None:
        super().__init__()
        self._experiment = experiment
        if log_image is not None:
            self.log_image = log_image

    @property
    def experiment(self) -> object:
        return self._experiment

    def log_metrics(self, metrics: object, step: int | None = None) -> None: ...

    def log_hyperparams(self, *args: object, **kwargs: object) -> None: ...


def test_loggers_that_take_images_get_the_figures(tmp_path: Path) -> None:
    taken: dict[str, object] = {}

    class Board:
        def add_image(self, tag: str, image: object, dataformats: str) -> None:
            taken[f"{tag} as {dataformats}"] = image

    loggers = [_Images(lambda key, images: taken.update({key: images})), _Images(experiment=Board())]
    run = trainer(tmp_path, search(), logger=loggers)
    run.fit(StitchedClassifier(num_classes=3), digits())
    assert set(taken) == {f"search/{n}{s}" for n in ("composition", "candidates") for s in ("", " as HWC")}
