"""Words of strangers in a card: they stay words, and no file beside the folder changes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from doubles.published_networks import classifier, network
from huggingface_hub import ModelCard

from lightning_stitch import CardDetails, StitchedClassifier, StitchedNetwork, StitchError
from lightning_stitch.hub.card import CardSubject, model_card, write_card

BAD = "x\n```\n````\n---\n# Owned\n- <img src=y>|[a](b)![c](d)`z $\\frac$\n<script>"


def subject_of(**changes: object) -> CardSubject:
    """A subject whose recipe has these words."""
    recipe = network().recipe
    if changes.pop("sources", None):
        words = {"spec": BAD, "licence": BAD, "weight_hash": BAD, "revision": BAD, "architecture": BAD}
        sources = tuple(dataclasses.replace(ref, **words) for ref in recipe.sources)
        recipe = dataclasses.replace(recipe, sources=sources)
    return dataclasses.replace(CardSubject(recipe, "two fragments", "StitchedNetwork", "multiclass"), **changes)


def outside_code(card: str) -> str:
    """What a reader of Markdown takes for more than code."""
    lines, fence = [], ""
    for line in card.split("\n---\n", 1)[1].splitlines():
        found = re.fullmatch(r" {0,3}(`{3,})([^`]*)", line)
        if fence:
            if found and found[1].startswith(fence) and not found[2].strip():
                fence = ""
        elif found:
            fence = found[1]
        else:
            lines.append(line)
    assert not fence
    return re.sub(r"(?<!\\)`[^`\n]+`", "(span)", "\n".join(lines))


@pytest.mark.parametrize(
    ("changes", "details"),
    [
        ({"description": BAD}, {}),
        ({"sources": True}, {}),
        ({"class_names": [BAD], "head": BAD}, {}),
        ({}, {"command": BAD}),
        ({}, {"verdict": BAD}),
        ({}, {"verdict": "# Owned"}),
        ({}, {"limits": [BAD, "- # Owned"]}),
        ({}, {"licence": BAD, "licence_override": BAD}),
        ({}, {"dataset": BAD, "split": BAD, "metrics": {BAD: 0.5}}),
        ({}, {"rows": [{"name": BAD, "kind": BAD, "params": BAD}]}),
    ],
    ids=lambda value: "-".join(value) or "nothing",
)
def test_words_cannot_break_out_of_their_place_in_the_card(
    changes: dict[str, object], details: dict[str, object]
) -> None:
    card = str(model_card(subject_of(**changes), CardDetails(**details), name="me/net").content)
    text = outside_code(card)
    headings = re.findall("^(?:- )*(#+ .*)$", text, re.MULTILINE)
    known = {"Where its parts come from", "How to use it", "Results", "Limits", "How to make it again", "Method"}
    assert {heading.lstrip("# ") for heading in headings} - known == {"me/net"}
    assert re.findall(r"(?<!\\)<(?!/?details|/?summary)", text) == []
    assert re.findall(r"(?<!\\)`", text) == []
    assert re.findall(r"(?<!\\)\[", text) == ["[", "["]  # the picture and the paper
    # rows of one table are of one width
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1
    assert ModelCard(card).data.library_name == "lightning-stitch"


def test_a_name_cannot_break_out_of_the_python_that_loads_it() -> None:
    card = str(model_card(subject_of(), CardDetails(), name='net")\nimport os; ("').content)
    code = card.split("```python\n")[1].split("\n```")[0]
    assert not any(line.startswith("import os") for line in code.splitlines())
    compile(code, "card", "exec")


@pytest.mark.parametrize("there", [True, False], ids=["a file", "nothing"])
@pytest.mark.parametrize("name", ["README.md", "composition.png"])
def test_a_link_of_a_files_name_is_replaced_and_what_it_leads_to_stays(name: str, there: bool, tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "net"
    if there:
        elsewhere.write_bytes(b"mine")
    folder.mkdir()
    (folder / name).symlink_to(elsewhere)
    write_card(subject_of(), folder, CardDetails(), name="net")
    assert not (folder / name).is_symlink()
    assert (folder / name).stat().st_size > 100
    assert elsewhere.exists() is there
    if there:
        assert elsewhere.read_bytes() == b"mine"
    assert {file.name for file in folder.iterdir()} == {"README.md", "composition.png"}


@pytest.mark.parametrize("characters", [r"$\frac$", "\ud800"], ids=ascii)
def test_any_characters_of_a_name_are_drawn_as_they_are(characters: str, tmp_path: Path) -> None:
    recipe = network().recipe
    names = {ref.name: f"{ref.name[:6]}{characters}" for ref in recipe.sources}
    renamed = dataclasses.replace(
        recipe,
        sources=tuple(dataclasses.replace(ref, name=names[ref.name]) for ref in recipe.sources),
        fragments=tuple(dataclasses.replace(each, source=names[each.source]) for each in recipe.fragments),
    )
    write_card(CardSubject(renamed, "two fragments", "StitchedNetwork"), tmp_path, CardDetails(), name="net")
    assert (tmp_path / "composition.png").stat().st_size > 100


def test_half_a_character_is_refused_in_names_and_a_question_mark_in_the_cards_words(tmp_path: Path) -> None:
    model = classifier()
    with pytest.raises(StitchError, match=r"The class name .* is no text: it cannot be written as UTF-8"):
        model.class_names = ["zero", "\ud800", "two"]
    with pytest.raises(StitchError, match=r"The folder .* is no text"):
        model.save_pretrained(tmp_path / "\ud800")
    model.save_pretrained(tmp_path, details=CardDetails(command="a\udfff"))
    card = (tmp_path / "README.md").read_text()
    assert "```bash\na?\n```" in card
    assert StitchedClassifier.from_pretrained(tmp_path).class_names == model.class_names


@pytest.mark.parametrize("column", ["params", "macs", "seconds", "accuracy_low"])
def test_words_where_a_table_has_numbers_are_shown_as_words(column: str, tmp_path: Path) -> None:
    row = {"name": "StitchNet", "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, column: "many"}
    network().save_pretrained(tmp_path, details=CardDetails(rows=[row]))
    card = (tmp_path / "README.md").read_text()
    assert ("| 0.500 |" if column == "accuracy_low" else "| many |") in card
    assert StitchedNetwork.from_pretrained(tmp_path).recipe == network().recipe
