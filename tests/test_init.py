from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lightning_stitch

WINGS = sorted(face.parent.name for face in Path(lightning_stitch.__file__).parent.glob("*/__init__.py"))


def loaded_after(code: str) -> set[str]:
    """Top-level names of the modules that a fresh process has loaded after some code."""
    script = f"import sys\n{code}\nprint('\\n'.join({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_heavy_library() -> None:
    loaded = loaded_after("import lightning_stitch")
    assert "lightning_stitch" in loaded
    assert not loaded & {
        "timm",
        "matplotlib",
        "pytorch_lightning",
        "lightning",
        "torch",
        "torchvision",
        "rich",
        "numpy",
    }


def test_composing_without_a_trainer_loads_neither_lightning_nor_matplotlib() -> None:
    loaded = loaded_after("from lightning_stitch import Pool, StitchedNetwork, linear_cka, load_source")
    assert "torch" in loaded
    assert not loaded & {"matplotlib", "pytorch_lightning", "lightning"}


@pytest.mark.parametrize("face", ["lightning_stitch", *(f"lightning_stitch.{wing}" for wing in WINGS)])
def test_every_name_of_a_face_is_there_and_listed(face: str) -> None:
    module = import_module(face)
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__class__.__name__ != "module"
        assert name in dir(module)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="No lightning_stitch attribute Stitcher"):
        lightning_stitch.Stitcher  # noqa: B018


@pytest.mark.slow
def test_timm_knows_the_architecture_only_when_asked_to() -> None:
    ask = "import timm, lightning_stitch{}; print(timm.is_model('lightning_stitch'))"
    for wanted, known in (("", "False"), (".timm", "True")):
        run = subprocess.run([sys.executable, "-c", ask.format(wanted)], check=True, capture_output=True, text=True)
        assert run.stdout.split()[-1] == known
