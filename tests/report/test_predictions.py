from __future__ import annotations

import csv
import doctest
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_stitch import StitchError
from lightning_stitch.report import predictions as prediction_table
from lightning_stitch.report.predictions import check_output, prediction_rows, write_predictions

FILES = ["a/1.png", "b/1.png"]
NUMBERS = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])
NAMES = ["cat", "dog", "eel, large"]


def test_the_example_runs() -> None:
    assert doctest.testmod(prediction_table, extraglobs={"torch": torch}) == (0, 1)


def test_classes_are_the_most_probable_ones() -> None:
    first, second = prediction_rows(FILES, NUMBERS, NAMES)
    assert first == {
        "file": "a/1.png",
        "class": "dog",
        "probability": 0.7,
        "probabilities": {"cat": 0.1, "dog": 0.7, "eel, large": 0.2},
    }
    assert (second["class"], second["probability"]) == ("cat", 0.5)


def test_without_names_columns_are_numbered() -> None:
    first, _ = prediction_rows(FILES, NUMBERS)
    assert first["class"] == "1"
    assert list(first["probabilities"]) == ["0", "1", "2"]


def test_labels_are_those_of_probability_one_half_and_more() -> None:
    rows = prediction_rows(FILES, torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.2, 0.49]]), NAMES, task="multilabel")
    assert [row["labels"] for row in rows] == [["cat", "dog"], []]


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_values_of_a_regression_are_its_numbers(shape: tuple[int, ...]) -> None:
    rows = prediction_rows(FILES, torch.tensor([1.5, -20.25]).view(shape), ["age"], task="regression")
    assert rows == [{"file": "a/1.png", "values": {"age": 1.5}}, {"file": "b/1.png", "values": {"age": -20.25}}]


def test_numbers_are_read_back_as_the_same_float32() -> None:
    outputs = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    rows = prediction_rows([str(index) for index in range(50)], outputs)
    read = np.array([list(row["probabilities"].values()) for row in rows], np.float32)
    assert np.array_equal(read, outputs.numpy())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outputs": NUMBERS[:1]}, r"one row of numbers for each image; found \(1, 3\) for 2 images"),
        ({"outputs": NUMBERS[None]}, r"found \(1, 2, 3\)"),
        ({"names": ["cat"]}, r"1 names \['cat'\] for 3 predicted columns"),
        ({"task": "segmentation"}, "no way to write predictions of the task 'segmentation'"),
    ],
)
def test_outputs_that_make_no_table_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StitchError, match=words):
        prediction_rows(**({"files": FILES, "outputs": NUMBERS, "names": NAMES} | changes))


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("multiclass", {"class": "dog", "probability": "0.7", "probability_eel, large": "0.2"}),
        ("multilabel", {"labels": "cat;dog", "probability_cat": "0.5"}),
        ("regression", {"value_cat": "0.5"}),
    ],
)
def test_csv_has_a_column_for_each_number_and_json_lines_the_rows(
    tmp_path: Path, task: str, columns: dict[str, str]
) -> None:
    outputs = NUMBERS if task == "multiclass" else torch.tensor([[0.5, 0.9, 0.1], [0.1, 0.2, 0.4]])
    rows = prediction_rows(["naïve, new.png", "2.png"], outputs, NAMES, task=task)
    write_predictions(rows, tmp_path / "p.csv")
    write_predictions(rows, tmp_path / "p.jsonl")
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["file"] for row in read] == ["naïve, new.png", "2.png"]
    assert columns.items() <= read[0].items()
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == rows


def test_names_of_files_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    rows = prediction_rows([os.fsdecode(b"caf\xe9.png"), "2.png"], NUMBERS)
    write_predictions(rows, tmp_path / "p.csv")
    assert b"\ncaf\xe9.png,1," in (tmp_path / "p.csv").read_bytes()


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("old")
    rows = prediction_rows(["1.png", "\ud800.png"], NUMBERS)  # no file system gives this name, and UTF-8 has no bytes
    with pytest.raises(UnicodeEncodeError):
        write_predictions(rows, tmp_path / "p.csv")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"p.csv": "old"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("p.txt", r"written as \.csv or \.jsonl; found the output file .*p\.txt"),
        ("nowhere/p.csv", "nowhere for p.csv does not exist or cannot be written to"),
        ("folder.csv", "folder.csv is a folder"),
        ("old.csv", r"old\.csv exists; .* --overwrite"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "old.csv").write_text("old")
    with pytest.raises(StitchError, match=words):
        check_output(tmp_path / name, overwrite=False)
    check_output(tmp_path / "old.csv", overwrite=True)
    check_output(tmp_path / "new.JSONL", overwrite=False)
