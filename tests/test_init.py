from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lightning_stitch

TREE = ast.parse(Path(lightning_stitch.__file__).read_text())


def names_for_type_checkers() -> dict[str, str]:
    """Public name -> module, as the block under TYPE_CHECKING imports them."""
    block = next(n for n in TREE.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == len(block.body)
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh process has loaded after some code."""
    script = f"import sys\n{code}\nprint('\\n'.join({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_heavy_library() -> None:
    loaded = loaded_after("import lightning_stitch")
    assert "lightning_stitch" in loaded
    assert not loaded & {"timm", "matplotlib", "pytorch_lightning", "lightning", "torch", "torchvision", "rich"}


def test_composing_without_a_trainer_loads_neither_lightning_nor_matplotlib() -> None:
    loaded = loaded_after("from lightning_stitch import Pool, StitchedNetwork, linear_cka, load_source")
    assert "torch" in loaded
    assert not loaded & {"matplotlib", "pytorch_lightning", "lightning"}


def test_type_checkers_see_exactly_the_public_names() -> None:
    assert sorted(names_for_type_checkers()) == sorted(lightning_stitch.__all__)
    assert len(set(lightning_stitch.__all__)) == len(lightning_stitch.__all__)


@pytest.mark.parametrize("name", lightning_stitch.__all__)
def test_a_public_name_is_the_one_that_type_checkers_see(name: str) -> None:
    home = import_module(names_for_type_checkers()[name])
    assert getattr(lightning_stitch, name) is getattr(home, name)
    assert name in dir(lightning_stitch)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'lightning_stitch' has no attribute 'Stitcher'"):
        lightning_stitch.Stitcher  # noqa: B018
