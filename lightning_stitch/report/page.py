"""A search as one HTML page that opens from a disk: no script or picture from elsewhere, on a phone as on a desk."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_stitch.errors import StitchError
from lightning_stitch.hub import can_draw
from lightning_stitch.io import WRITING_MEND, complete_or_absent
from lightning_stitch.report.figures import as_png, as_svg, figures_of
from lightning_stitch.report.kinds import headline
from lightning_stitch.search import SCORES
from lightning_stitch.tables import Record

PAGE = "report.html"
_FIGURES = "figures"

_CAPTIONS = {
    "composition": "The network that was chosen: a colour for each source, stitches with their CKA, what heads read.",
    "candidates": "Every candidate. The line is the Pareto front: nothing on it is beaten by what costs less.",
    "confusion": "Test images by class and by what was predicted.",
}


def write_page(record: Record, directory: str | Path) -> Path:
    """Write `report.html` of a record (`record_of`), and its figures as SVG and PNG; returns the page's path.

    Without matplotlib there are no figures.

    Raises:
        StitchError: If a file cannot be written.
    """
    directory = Path(directory)
    svgs: dict[str, str] = {}
    try:
        (directory / _FIGURES if can_draw() else directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StitchError(f"{directory} cannot hold a report: {error}. {WRITING_MEND}") from error
    if can_draw():
        for name, figure in figures_of(record).items():
            svgs[name] = as_svg(figure)
            for suffix, content in ((".svg", svgs[name].encode()), (".png", as_png(figure))):
                with complete_or_absent(directory / _FIGURES / f"{name}{suffix}") as file:
                    file.write(content)
    with complete_or_absent(directory / PAGE) as file:
        file.write(page_of(record, svgs).encode())
    return directory / PAGE


def figure_files(directory: str | Path) -> list[Path]:
    """The PNG files of a page's figures."""
    return sorted((Path(directory) / _FIGURES).glob("*.png"))


def page_of(record: Record, svgs: dict[str, str]) -> str:
    """The page's HTML, with its figures as SVG elements by name."""
    best = next(row for row in record["candidates"] if row["place"] == record["best"])
    title = _text(headline(best["kind"]))
    parts = [
        f"<h1>{title}</h1>",
        _verdict(record["verdict"] or record["summary"]),
        _cards(record, best),
        _figure("composition", svgs),
        f"<details><summary>In words</summary><pre>{_text(record['description'])}</pre></details>",
        "<h2>Candidates</h2>",
        _figure("candidates", svgs),
        _table(record["candidates"], _candidate_columns(record), chosen=record["best"]),
        "" if svgs else "<p>There would be figures with matplotlib: pip install 'lightning-stitch[plots]'</p>",
    ]
    if record["comparison"]:
        parts += ["<h2>On test images that nothing else has touched</h2>", _table(record["comparison"], _COMPARISON)]
    if record["predictions"]:
        parts += ["<h2>Which images it gets wrong</h2>", _figure("confusion", svgs), _by_class(record["predictions"])]
        parts.append(_images(record["predictions"]))
    if record["similarities"]:
        parts.append("<h2>How alike the sources are</h2>")
        parts.append("<p>CKA of what heads read at any two cuts, over the same images: 1 is alike, 0 is not.</p>")
        parts += [_figure(f"similarity_{n + 1}", svgs) for n in range(len(record["similarities"]))]
    parts += ["<h2>What was turned down, and what took time</h2>", _counts(record["rejected"], "compositions")]
    parts.append(_stages(record))
    recipe = json.dumps(record["recipe"], indent=1)
    parts.append(f"<h2>The recipe</h2><details><summary>To copy</summary><pre>{_text(recipe)}</pre></details>")
    body = "\n".join(part for part in parts if part)
    style, script = _part("page.css"), _part("page.js")
    icon = "data:image/svg+xml;base64," + base64.b64encode(b'<svg xmlns="http://www.w3.org/2000/svg"/>').decode()
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="{icon}"><title>{title}</title><style>{style}</style></head>\n'
        f"<body>\n{body}\n<script>{script}</script>\n</body></html>\n"
    )


def _part(name: str) -> str:
    return files("lightning_stitch.report").joinpath(name).read_text(encoding="utf-8")


def _text(words: Any) -> str:
    return html.escape(str(words).encode(errors="replace").decode())


def _verdict(words: str) -> str:
    """Whether it was worth it, then what that rests on; what is said of other networks for who wants to know."""
    blocks: list[list[str]] = []
    for line in words.splitlines():
        goes_on = line.startswith("  ") or "orth it" in line
        if blocks and goes_on:
            blocks[-1].append(line)
        else:
            blocks.append([line])
    first, *others = blocks
    parts = [_block(first), *(f"<details><summary>{_text(o[0])}</summary>{_block(o[1:])}</details>" for o in others)]
    return "".join(parts)


def _block(lines: Sequence[str]) -> str:
    """The judgement set off, paragraphs, and lines that begin with two spaces as a list."""
    judged = "".join(f'<p class="verdict">{_text(line)}</p>' for line in lines if "orth it" in line)
    plain = "".join(f"<p>{_text(x)}</p>" for x in lines if "orth it" not in x and not x.startswith("  "))
    items = "".join(f"<li>{_text(line.strip())}</li>" for line in lines if line.startswith("  "))
    return judged + plain + (f'<ul class="rivals">{items}</ul>' if items else "")


def _cards(record: Record, best: Record) -> str:
    score = best[record["score"]]
    cards = [(f"{score:.3f}", record["score"].replace("_", " ").replace("loo", "leave-one-out"))]
    for row in record["comparison"]:
        if "chosen by the search" in (row["budget"] or ""):
            low, high = row["accuracy_low"], row["accuracy_high"]
            cards.append((f"{row['accuracy']:.3f}", f"test accuracy, {low:.2f} to {high:.2f}"))
    cards.append((f"{best['params'] / 1e6:.2f} M", "parameters"))
    if best["mean_macs"]:
        cards.append((f"{best['mean_macs'] / 1e6:.1f} M", "MACs on average"))
    cards.append((f"{best['macs'] / 1e6:.1f} M", "MACs at most" if best["mean_macs"] else "MACs"))
    words = "".join(f"<li><b>{_text(value)}</b>{_text(name)}</li>" for value, name in cards)
    latency = f"<p>{_text(record['latency'])}</p>" if record["latency"] else ""
    return f'<ul class="cards">{words}</ul>{latency}'


def _figure(name: str, svgs: dict[str, str]) -> str:
    if name not in svgs:
        return ""
    style = {"composition": "light", "candidates": ""}.get(name, "wide" if name.startswith("similarity") else "light")
    caption = f"<figcaption>{_CAPTIONS[name]}</figcaption>" if name in _CAPTIONS else ""
    return f'<figure class="{style}" id="{name}">{svgs[name]}{caption}</figure>'


# A table's columns: the record's key, the heading, how many decimals a number has (None: words), and its unit.
_COMPARISON = [
    ("name", "network", None, 1.0),
    ("kind", "kind", None, 1.0),
    ("accuracy", "accuracy", 3, 1.0),
    ("auroc", "AUROC", 3, 1.0),
    ("params", "M params", 2, 1e6),
    ("macs", "M MACs", 1, 1e6),
    ("mean_macs", "mean M MACs", 1, 1e6),
    ("verdict", "verdict", None, 1.0),
    ("budget", "budget", None, 1.0),
]


def _candidate_columns(record: Record) -> list[tuple[str, str, int | None, float]]:
    known = {name for row in record["candidates"] for name, value in row.items() if value is not None}
    scores = [
        name for name in record["candidates"][0] if name.startswith(("loo_", "neg_loo", "consensus", "agreement"))
    ]
    scores.sort(key=lambda name: (name != record["score"], name != record["decided_by"]))
    columns: list[tuple[str, str, int | None, float]] = [("place", "place", 0, 1.0), ("kind", "kind", None, 1.0)]
    columns += [(name, name.replace("_", " "), 3, 1.0) for name in scores]
    columns += [("params", "M params", 2, 1e6), ("macs", "M MACs", 1, 1e6), ("mean_macs", "mean M MACs", 1, 1e6)]
    columns += [("latency_ms", "ms", 2, 1.0), ("fragments", "fragments", None, 1.0)]
    return [column for column in columns if column[0] in known]


def _table(
    rows: Sequence[Record], columns: Sequence[tuple[str, str, int | None, float]], *, chosen: int | None = None
) -> str:
    columns = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    head = "".join(
        f'<th scope="col"{_class(digits, name)}{_meaning(name)}><button type="button">{_text(words)}</button></th>'
        for name, words, digits, _ in columns
    )
    body = []
    for row in rows:
        cells = "".join(_cell(row.get(name), name, digits, unit) for name, _, digits, unit in columns)
        mark = chosen == row.get("place") if chosen else "chosen by the search" in (row.get("budget") or "")
        body.append(('<tr class="chosen">' if mark else "<tr>") + cells + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _meaning(name: str) -> str:
    return f' title="{_text(SCORES[name])}"' if name in SCORES else ""


def _class(digits: int | None, name: str) -> str:
    if digits is not None:
        return ""
    return ' class="text long"' if name in ("fragments", "verdict", "budget") else ' class="text"'


def _cell(value: Any, name: str, digits: int | None, unit: float) -> str:
    if value is None:
        return f'<td{_class(digits, name)} data-value=""></td>'
    if digits is None:
        return f"<td{_class(digits, name)}>{_text(value)}</td>"
    return f'<td data-value="{value}">{value / unit:.{digits}f}</td>'


def _by_class(predictions: Record) -> str:
    rows = [
        {"class": name, "images": sum(row), "right": row[number] / sum(row) if sum(row) else None}
        for number, (name, row) in enumerate(zip(predictions["class_names"], predictions["confusion"], strict=True))
    ]
    return _table(rows, [("class", "class", None, 1.0), ("images", "images", 0, 1.0), ("right", "accuracy", 3, 1.0)])


def _images(predictions: Record) -> str:
    names = predictions["class_names"]
    items = []
    for shown in predictions["shown"]:
        right = shown["is"] == shown["predicted"]
        words = f"{_text(names[shown['predicted']])} {shown['probability']:.2f}"
        words += "" if right else f", is {_text(names[shown['is']])}"
        picture = f'<img alt="{words}" src="data:image/png;base64,{shown["image"]}">'
        items.append(f'<li class="{"right" if right else "wrong"}">{picture}{words}</li>')
    return f'<ul class="images">{"".join(items)}</ul>' if items else ""


def _stages(record: Record) -> str:
    rows = [{"stage": name, "seconds": x, "peak": record["peaks"].get(name)} for name, x in record["seconds"].items()]
    return _table(
        rows,
        [("stage", "stage", None, 1.0), ("seconds", "seconds", 2, 1.0), ("peak", "MB held by then, at most", 0, 1e6)],
    )


def _counts(counts: dict[str, int], unit: str) -> str:
    rows = [{"what": name, unit: value} for name, value in sorted(counts.items(), key=lambda item: -item[1])]
    return _table(rows, [("what", "", None, 1.0), (unit, unit, 0, 1.0)]) if rows else ""
