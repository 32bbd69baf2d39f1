from __future__ import annotations

import csv
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from doubles.predictions import NAMES, classifier, save_checkpoint, write_digits

from lightning_stitch import StitchedClassifier, predict_files
from lightning_stitch._lightning import NAMESPACE
from lightning_stitch.cli.main import main
from lightning_stitch.report.predictions import as_csv


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    # LightningCLI warns where it is given arguments and the process has some, too.
    monkeypatch.setattr(sys, "argv", ["lightning-stitch"])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"), 12)


@pytest.fixture(scope="module")
def model() -> StitchedClassifier:
    return classifier()


@pytest.fixture(scope="module")
def checkpoint(model: StitchedClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(model, tmp_path_factory.mktemp("run") / "stitched.ckpt")


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_predictions_are_printed_as_csv_and_nothing_else(
    checkpoint: Path, model: StitchedClassifier, images: Path
) -> None:
    command = [sys.executable, "-m", "lightning_stitch.cli", "predict", str(checkpoint), str(images)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == as_csv(predict_files(model, images))
    assert done.stderr == ""


def test_lightnings_own_notes_are_back_afterwards(
    checkpoint: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger(f"{NAMESPACE}.utilities.rank_zero")
    level = logger.level
    main(["predict", str(checkpoint), str(images)])
    assert capsys.readouterr().out.startswith("file,class,")
    assert logger.level == level


def test_predictions_are_written_where_options_stand_before_and_behind(
    checkpoint: Path, model: StitchedClassifier, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = as_csv(predict_files(model, images))
    for name, options in (("a", ["--batch_size=12"]), ("b", ["--batch_size", "12", "--device", "cpu"])):
        output = tmp_path / f"{name}.csv"
        main(["predict", *options, "--output", str(output), str(checkpoint), str(images)])
        assert output.read_text() == expected
        assert f"Wrote 12 rows to {output}." in " ".join(capsys.readouterr().out.split())
    assert "b.csv exists" in error_of(["predict", str(checkpoint), str(images), f"--output={output}"], capsys)
    one = sorted(images.rglob("*.png"))[0]
    main(["predict", str(checkpoint), str(one), "--output", str(output), "--overwrite"])
    assert [line.split(",")[0] for line in output.read_text().splitlines()] == ["file", str(one)]


def test_unreadable_files_are_refused_or_skipped_and_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_digits(tmp_path / "images", 4)
    (folder / "notes.png").write_text("no image")
    arguments = ["predict", str(checkpoint), str(folder)]
    assert "1 of 5 files cannot be read as images" in error_of(arguments, capsys)
    main([*arguments, "--skip_unreadable"])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 1 + 4
    assert re.search(r"skipped: .*notes\.png: cannot identify image file", printed.err)


def test_classes_without_names_are_numbered_unless_they_are_given(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unnamed = str(save_checkpoint(classifier(names=None), tmp_path / "unnamed.ckpt"))
    main(["predict", unnamed, str(images)])
    printed = capsys.readouterr()
    assert printed.out.startswith("file,class,probability,probability_0,probability_1,probability_2\n")
    assert f"{unnamed} holds no class names, so classes are numbered from 0; give them with" in printed.err
    main(["predict", unnamed, str(images), "--class_names", "x", "y", "z"])
    named = capsys.readouterr()
    assert [line.split(",")[1] for line in named.out.splitlines()[1:]] == [
        "xyz"[int(line.split(",")[1])] for line in printed.out.splitlines()[1:]
    ]
    assert named.err == ""
    wrong = error_of(["predict", unnamed, str(images), "--class_names", "x", "y"], capsys)
    assert "class_names should be 3 different names" in wrong


def changed(checkpoint: Path, path: Path, **hparams: Any) -> str:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"].update(hparams)
    torch.save(content, path)
    return str(path)


def test_a_checkpoint_of_either_packages_command_line_is_taken(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["predict", str(checkpoint), str(images)])
    expected = capsys.readouterr().out
    for package in ("pytorch_lightning", "lightning.pytorch"):
        made = {
            "_instantiator": f"{package}.cli.instantiate_module",
            "_class_path": "lightning_stitch.StitchedClassifier",
        }
        main(["predict", changed(checkpoint, tmp_path / "cli.ckpt", **made), str(images)])
        assert capsys.readouterr().out == expected


def test_files_that_are_no_checkpoint_of_a_network_are_refused(
    checkpoint: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    changed(checkpoint, tmp_path / "empty.ckpt", recipe=None)
    for name, words in {
        "nowhere.ckpt": "nowhere.ckpt does not exist",
        "text.ckpt": "text.ckpt is not a checkpoint of a StitchedClassifier that can be read safely: UnpicklingError",
        "other.ckpt": "other.ckpt is not a checkpoint of a StitchedClassifier",
        "empty.ckpt": "empty.ckpt holds no network: it was saved before one was composed",
    }.items():
        assert words in error_of(["predict", str(tmp_path / name), str(images)], capsys)


def test_class_names_are_in_the_checkpoint(checkpoint: Path) -> None:
    assert StitchedClassifier.load_from_checkpoint(checkpoint, weights_only=True).class_names == NAMES


@pytest.mark.slow
def test_names_that_a_terminal_cannot_show_are_escaped_and_nothing_is_lost(
    checkpoint: Path, images: Path, tmp_path: Path
) -> None:
    picture = next(images.rglob("*.png")).read_bytes()
    names = [b"caf\xc3\xa9.png", b"bell\x07 \x1b[31mred.png", b"two\nlines.png", b"latin\xe9.png"]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(picture)
    command = [sys.executable, "-m", "lightning_stitch.cli", "predict", str(checkpoint), str(tmp_path)]
    for encoding, cafe in (("ascii", r"caf\xe9.png"), ("utf-8", "caf\u00e9.png")):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, check=True, env=environment)
        shown = {Path(row["file"]).name for row in csv.DictReader(done.stdout.decode(encoding).splitlines())}
        assert shown == {cafe, r"bell\x07 \x1b[31mred.png", r"two\nlines.png", r"latin\udce9.png"}
    subprocess.run([*command, f"--output={tmp_path / 'p.csv'}"], capture_output=True, check=True)
    with (tmp_path / "p.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert {os.fsencode(Path(row["file"]).name) for row in csv.DictReader(file)} == set(names)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b""])
def test_what_is_there_in_place_of_a_checkpoint_is_called_that(
    content: bytes, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stitched.ckpt"
    file.write_bytes(content)
    assert re.match(
        r"error: .*stitched.ckpt is (a Git LFS|a web page|empty)", error_of(["predict", str(file), str(images)], capsys)
    )
