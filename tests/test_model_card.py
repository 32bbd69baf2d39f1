from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from published_networks import network, together

from lightning_stitch import CardDetails, Recipe, StitchError
from lightning_stitch.composition_plot import draw_composition
from lightning_stitch.model_card import CardSubject, model_card, write_card


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
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "lightning-stitch",
        "image-classification",
    )
    assert "merge" in data.tags
    assert data.base_model_relation == "merge"
    assert data.datasets == ["org/digits"]
    assert [entry["revision"] for entry in data.stitched_from] == ["a" * 40, "b" * 40]
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
