"""The house: a wing imports only from wings before it, and from their faces; inside a wing, files import files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_stitch

PACKAGE = Path(lightning_stitch.__file__).parent
ORDER = (
    *("root", "maths", "io", "cutting", "sources", "stitching", "healing", "heads", "data", "hub", "networks"),
    *("search", "composing", "report", "training", "baselines", "app", "cli"),
)
LIGHTNING = {"root": ["_lightning"], "data": ..., "training": ..., "baselines": ..., "cli": ...}
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "timm.py")


def imported(file: Path) -> Iterator[list[str]]:
    """Dotted names of the modules that a file imports anywhere, as their parts."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = node.module == "lightning_stitch"
            yield from ([node.module, alias.name] if whole else str(node.module).split(".") for alias in node.names)


def wing_of(file: Path) -> str:
    return file.parent.name if file.parent != PACKAGE else "root"


def test_every_wing_has_its_place_and_a_face_whose_names_hide_no_file() -> None:
    wings = {face.parent for face in PACKAGE.glob("*/__init__.py")}
    assert {wing.name for wing in wings} | {"root"} == set(ORDER)
    for wing in wings:
        face = ast.parse((wing / "__init__.pyi").read_text())
        names = {alias.name for node in face.body if isinstance(node, ast.ImportFrom) for alias in node.names}
        assert not names & {file.stem for file in wing.glob("*.py")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_only_wings_before_its_own_and_only_their_faces(file: Path) -> None:
    wing = wing_of(file)
    for package, *rest in imported(file):
        if package in ("lightning", "pytorch_lightning") or rest == ["_lightning"]:
            allowed = LIGHTNING.get(wing, [])
            assert allowed is ... or file.stem in allowed, "only what Lightning runs may import it"
        if package == "lightning_stitch" and rest[0] in ORDER and rest[0] != wing:
            assert ORDER.index(rest[0]) < ORDER.index(wing), f"{rest[0]} stands above {wing}"
            assert len(rest) == 1, f"from {'.'.join(rest)}, not from its wing's face"


def test_recipes_need_neither_torch_nor_another_file_that_does() -> None:
    files = ("recipe.py", "plain_values.py", "stages.py")
    roots = {".".join(name) for file in files for name in imported(PACKAGE / file)}
    assert not {name for name in roots if name.split(".")[0] in ("torch", "timm", "numpy")}
    ours = {"lightning_stitch.errors", "lightning_stitch.plain_values", "lightning_stitch.stages"}
    assert {name for name in roots if name.startswith("lightning_stitch")} == ours
