"""Files that an earlier commit wrote (make.py) are what they were then; only sums' last digits may be another's."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from doubles.journals import answers

from lightning_stitch import JournalError, StitchedClassifier

FOLDER = Path(__file__).parent
SAVED = FOLDER / "saved"


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = spec_from_file_location("regression_make", FOLDER / "make.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((SAVED / "expected.json").read_text())


def assert_as_then(classifier: StitchedClassifier, make: ModuleType, expected: dict[str, Any]) -> None:
    assert classifier.recipe is not None
    assert classifier.recipe.to_dict() == expected["recipe"]
    assert classifier.class_names == make.NAMES
    with torch.no_grad():
        logits = classifier.eval()(make.images(4, first=300)[0])
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=0, atol=0.01)


@pytest.mark.filterwarnings("error:Fragment")
def test_a_saved_folder(make: ModuleType, expected: dict[str, Any]) -> None:
    assert_as_then(StitchedClassifier.from_pretrained(SAVED / "classifier"), make, expected)


@pytest.mark.filterwarnings("error:Fragment")
def test_a_lightning_checkpoint(make: ModuleType, expected: dict[str, Any]) -> None:
    loaded = StitchedClassifier.load_from_checkpoint(SAVED / "classifier.ckpt", weights_only=True)
    assert_as_then(loaded, make, expected)


def renamed(nodes: list[list[str]]) -> list[list[str]]:
    """What fragments would say of themselves whose source called its first norm by another name then."""
    return [[name.replace("norm1", "norm_before") for name in fragment] for fragment in nodes]


def test_a_source_whose_code_has_become_another_is_told_with_the_versions(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SAVED / "classifier", tmp_path / "classifier"))
    config = json.loads((folder / "config.json").read_text())
    config["lightning_stitch"]["nodes"] = renamed(config["lightning_stitch"]["nodes"])
    config["lightning_stitch"]["versions"]["timm"] = "0.9.16"
    (folder / "config.json").write_text(json.dumps(config))
    words = r"Fragment \d of '.*' does something .* was 'blocks.0.norm_before.weight' and is 'blocks.0.norm1.weight'"
    with pytest.warns(UserWarning, match=words) as told:
        StitchedClassifier.from_pretrained(folder)
    assert 'timm: "0.9.16" there' in str(told[0].message)

    checkpoint = torch.load(SAVED / "classifier.ckpt", weights_only=True)
    checkpoint["lightning_stitch"]["nodes"] = renamed(checkpoint["lightning_stitch"]["nodes"])
    torch.save(checkpoint, tmp_path / "classifier.ckpt")
    with pytest.warns(UserWarning, match="of this checkpoint does something else"):
        StitchedClassifier.load_from_checkpoint(tmp_path / "classifier.ckpt", weights_only=True)


@pytest.mark.parametrize("nonsense", [None, 3, {"nodes": 3}, {"nodes": [3, None]}, {"nodes": [[3] * 9], "versions": 3}])
def test_what_says_nothing_of_fragments_does_not_keep_a_checkpoint_from_loading(nonsense: Any, tmp_path: Path) -> None:
    checkpoint = torch.load(SAVED / "classifier.ckpt", weights_only=True)
    checkpoint["lightning_stitch"] = nonsense
    torch.save(checkpoint, tmp_path / "classifier.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        StitchedClassifier.load_from_checkpoint(tmp_path / "classifier.ckpt", weights_only=True)


def test_a_journal_of_a_search_that_goes_on(make: ModuleType, expected: dict[str, Any], tmp_path: Path) -> None:
    journal = Path(shutil.copytree(SAVED / "journal", tmp_path / "journal"))
    remembered = answers(journal)
    assert remembered
    if {package: version(package) for package in expected["versions"]} != expected["versions"]:
        # What releases of before were answered is not mixed with what later ones would be.
        with pytest.raises(JournalError, match="is of another search: versions"):
            make.search(journal)
        return
    _, result = make.search(journal)
    assert answers(journal) == remembered
    assert [ranked.score for ranked in result.ranked] == pytest.approx(expected["scores"], abs=1e-3)
    assert result.best_stitched.candidate.recipe.to_dict() == expected["recipe"]


def test_the_files_are_small() -> None:
    assert sum(file.stat().st_size for file in SAVED.rglob("*") if file.is_file()) < 100_000
