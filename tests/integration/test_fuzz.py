"""Whatever stands in a recipe, a config, a file of weights or a checkpoint: it is read, or refused in words."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256 as digest_of
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_stitch import StitchedClassifier, StitchedNetwork, StitchError
from lightning_stitch.recipe import Recipe

SAVED = Path(__file__).parents[1] / "regression" / "saved"
CONFIG = json.loads((SAVED / "classifier" / "config.json").read_text())
RECIPE = json.loads((SAVED / "expected.json").read_text())["recipe"]
WEIGHTS = (SAVED / "classifier" / "model.safetensors").read_bytes()

# The same examples each time: what CI finds anybody can find again.
slow_is_fine = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]  # the fixture is the same for each example
fuzzed = settings(deadline=None, derandomize=True, max_examples=150, suppress_health_check=slow_is_fine)
slow_fuzzed = settings(fuzzed, max_examples=60)

WORDS = ["", "mean", "network", "ridge", "blocks.0", "short", "python:os:abort", "../x", "\x00", "\udce9"]
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, float("nan"), float("inf")])
    | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "end", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all that is inside a plain value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield (*before, key)
        yield from places(inner, (*before, key))


@st.composite
def spoilt(draw: st.DrawFn, whole: Any) -> Any:
    """A plain value in which one to three things are others, doubled or gone."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        *way, key = draw(st.sampled_from(list(places(value)) or [("x",)]))
        inner = value
        for step in way:
            inner = inner[step]
        how = draw(st.sampled_from(["other", "other", "gone", "doubled"]))
        if how == "gone":
            inner.pop(key, None) if isinstance(inner, dict) else inner.pop(key)
        elif how == "doubled" and isinstance(inner, list):
            inner.append(copy.deepcopy(inner[key]))
        else:
            inner[key] = draw(ANYTHING)
    return value


@pytest.fixture(autouse=True)
def warnings_are_allowed() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@fuzzed
@given(spoilt(RECIPE))
def test_recipes(plain: Any) -> None:
    try:
        recipe = Recipe.from_dict(plain)
    except StitchError:
        return
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.slow
@slow_fuzzed
@given(config=spoilt(CONFIG))
def test_configs(tmp_path_factory: pytest.TempPathFactory, config: Any) -> None:
    folder = Path(shutil.copytree(SAVED / "classifier", tmp_path_factory.mktemp("config") / "classifier"))
    (folder / "config.json").write_text(json.dumps(config))
    for loaded in (StitchedClassifier, StitchedNetwork):
        with suppress(StitchError):
            loaded.from_pretrained(folder)


@fuzzed
@given(place=st.integers(0, 4000), content=st.binary(min_size=1, max_size=8), length=st.integers(0, len(WEIGHTS)))
def test_weights(tmp_path_factory: pytest.TempPathFactory, place: int, content: bytes, length: int) -> None:
    folder = Path(shutil.copytree(SAVED / "classifier", tmp_path_factory.mktemp("weights") / "classifier"))
    spoilt_weights = (WEIGHTS[:place] + content + WEIGHTS[place + len(content) :])[: max(length, place)]
    (folder / "model.safetensors").write_bytes(spoilt_weights)
    config = copy.deepcopy(CONFIG)
    config["lightning_stitch"]["weights"]["sha256"] = digest_of(spoilt_weights).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))
    with suppress(StitchError):
        StitchedClassifier.from_pretrained(folder)


@pytest.mark.slow
@slow_fuzzed
@given(data=st.data())
def test_checkpoints(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    checkpoint = torch.load(SAVED / "classifier.ckpt", weights_only=True)
    parts = {
        name: checkpoint["hyper_parameters"][name] for name in ("recipe", "head", "task", "num_classes", "class_names")
    }
    parts["lightning_stitch"] = checkpoint.pop("lightning_stitch")
    parts = data.draw(spoilt(parts))
    checkpoint["lightning_stitch"] = parts.pop("lightning_stitch", None)
    checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], **parts}
    path = tmp_path_factory.mktemp("checkpoint") / "spoilt.ckpt"
    torch.save(checkpoint, path)
    try:
        StitchedClassifier.load_from_checkpoint(path, weights_only=True)
    except RuntimeError as error:
        # What torch says of weights for another structure says it well.
        told = isinstance(error, StitchError) or "Error(s) in loading state_dict" in str(error)
        if not told:
            raise
