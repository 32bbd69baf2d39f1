from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from doubles.pools import calibrated_pool
from doubles.published_networks import STITCHED, network, together
from doubles.tensors import noise
from huggingface_hub import ModelCard
from PIL import Image

import lightning_stitch as ls
from lightning_stitch import CardDetails, Recipe, StitchError, load_sources
from lightning_stitch.hub.card import CardSubject, model_card, write_card
from lightning_stitch.hub.picture import draw_composition
from lightning_stitch.recipe import Tap


def subject(recipe: Recipe | None = None, **options: object) -> CardSubject:
    return CardSubject(recipe or network().recipe, "two fragments", "StitchedClassifier", "multiclass", **options)


def with_sources(*changes: dict[str, object]) -> Recipe:
    recipe = network().recipe
    sources = [dataclasses.replace(ref, **change) for ref, change in zip(recipe.sources, changes, strict=True)]
    return dataclasses.replace(recipe, sources=tuple(sources))


FROM_HUB = with_sources(
    {"spec": "hf-hub:org/one@v2", "revision": "a" * 40, "licence": "mit"},
    {"spec": "test_convnext.r160_in1k", "revision": "b" * 40, "licence": "apache-2.0"},
)


def test_the_metadata_are_read_back_by_the_hubs_own_parser() -> None:
    details = CardDetails(dataset="org/digits", metrics={"accuracy": 0.5}, num_images=30, split="validation")
    data = ModelCard(str(model_card(subject(FROM_HUB), details, name="me/net"))).data
    assert data.base_model == ["org/one", "timm/test_convnext.r160_in1k"]
    assert (data.license, data.license_name) == ("other", "see-sources")
    assert (data.library_name, data.pipeline_tag) == ("lightning-stitch", "image-classification")
    assert "merge" in data.tags
    assert data.base_model_relation == "merge"
    assert data.datasets == ["org/digits"]
    assert [entry["revision"] for entry in data.stitched_from] == ["a" * 40, "b" * 40]
    assert [entry["license"] for entry in data.stitched_from] == ["mit", "apache-2.0"]
    [result] = data.eval_results
    assert (result.dataset_split, result.metric_type, result.metric_value) == ("validation", "accuracy", 0.5)
    assert result.dataset_args == {"num_images": 30}


def test_sources_that_are_not_on_the_hub_are_named_without_folders_of_this_machine() -> None:
    recipe = with_sources({"spec": "local-dir:/home/me/secret/one"}, {"spec": "torchvision:alexnet"})
    card = model_card(subject(recipe), CardDetails(), name="me/net")
    assert card.data.base_model is None
    assert [entry["source"] for entry in card.data.stitched_from] == ["local-dir:one", "torchvision:alexnet"]
    assert "secret" not in card.content


def test_the_recipe_in_the_card_is_the_recipe() -> None:
    import yaml

    recipe = network().recipe
    content = model_card(subject(), CardDetails(), name="net").content
    found = yaml.safe_load(content.split("```yaml\n")[1].split("```")[0])
    assert Recipe.from_dict(found) == recipe


@pytest.mark.parametrize("heal", [False, True])
def test_the_python_in_the_card_makes_the_network_again(heal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = calibrated_pool("test_convnext", "test_resnet")
    original = pool.assemble(pool.stitch(STITCHED, heal=heal))
    content = model_card(subject(original.recipe), CardDetails(), name="net").content
    [code] = [part for part in content.split("```python\n") if "pool.stitch" in part]
    monkeypatch.setattr(
        ls, "load_sources", lambda specs: load_sources([{"spec": s, "pretrained": False} for s in specs])
    )
    made: dict[str, Any] = {"batches": [noise(30, 3, 32, 32)]}
    exec(code.partition("```")[0], made)
    again, wanted = made["network"].recipe, original.recipe
    assert (again.path, again.healed) == (wanted.path, wanted.healed)


def test_what_makes_it_again_names_the_commits_that_were_taken() -> None:
    content = model_card(subject(FROM_HUB), CardDetails(), name="net").content
    specs = f"{{'spec': 'hf-hub:org/one@{'a' * 40}', 'name': '{FROM_HUB.sources[0].name}'}}"
    assert specs in content
    assert f"hf-hub:timm/test_convnext.r160_in1k@{'b' * 40}" in content


def test_a_timm_names_repository_is_the_one_that_timm_takes_it_from() -> None:
    names = ("rdnet_tiny.nv_in1k", "davit_base_fl.msft_florence2")
    recipe = with_sources(*({"spec": name, "architecture": name, "revision": "c" * 40} for name in names))
    card = model_card(subject(recipe), CardDetails(), name="net")
    assert card.data.base_model == ["naver-ai/rdnet_tiny.nv_in1k", "microsoft/Florence-2-base"]
    assert f"hf-hub:naver-ai/rdnet_tiny.nv_in1k@{'c' * 40}" in card.content
    # a repository in another layout, which timm alone can read
    assert "{'spec': 'davit_base_fl.msft_florence2'" in card.content


def test_what_makes_it_again_is_left_out_where_it_would_not() -> None:
    assert "pool.stitch" not in model_card(subject(together().recipe), CardDetails(), name="net").content
    early = dataclasses.replace(
        network().recipe, fragments=network().recipe.fragments[:1], taps=(Tap(0, 8, ("mean",)),)
    )
    content = model_card(subject(early), CardDetails(), name="net").content
    assert "pool.stitch" not in content
    assert "without a stitch" in content


def test_names_cannot_break_the_tables() -> None:
    content = model_card(subject(class_names=["a|b", "c`d\n# e"]), CardDetails(), name="net").content
    assert "`a/b`, `c'd # e`" in content


def test_a_picture_of_the_composition_lies_beside_the_card(tmp_path: Path) -> None:
    write_card(subject(), tmp_path, CardDetails(), name="net")
    assert "](composition.png)" in (tmp_path / "README.md").read_text()
    draw_composition(together().recipe, tmp_path / "ensemble.png")
    for name in ("composition.png", "ensemble.png"):
        with Image.open(tmp_path / name) as picture:
            colours = picture.convert("RGB").getcolors(2**24)
        # both sources have boxes of a colour of their own
        assert {(0x8C, 0xC5, 0xE8), (0xF5, 0xC2, 0x6B)} <= {colour for count, colour in colours if count > 500}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metrics": {"accuracy": float("nan")}, "dataset": "d"}, "'accuracy' is nan"),
        ({"metrics": {"accuracy": "high"}, "dataset": "d"}, "'accuracy' is 'high'"),
        ({"metrics": {"accuracy": 0.5}}, "give dataset= as well"),
    ],
)
def test_metrics_that_say_nothing_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(StitchError, match=words):
        CardDetails(**options)
