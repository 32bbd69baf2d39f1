from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from doubles.helpers import assert_same_weights
from torch import nn

from lightning_stitch.errors import RecipeError, SourceError
from lightning_stitch.recipe import FragmentRef, Preprocessing, Recipe, SourceRef
from lightning_stitch.sources.finding import find_source
from lightning_stitch.sources.source import build_architecture, load_source, load_sources

DONORS = timm.list_models("test_*")
GREY = Preprocessing(input_size=(1, 8, 8), mean=(0.5,), std=(0.25,))


class Tiny(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width)


class TinyWithPreprocessing(Tiny):
    input_size, mean, std = (3, 10, 12), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)


def make_tiny(width: int = 3, kind: str = "plain") -> nn.Module:
    return (TinyWithPreprocessing if kind == "told" else Tiny)(width)


def make_number() -> int:
    return 7


def make_trouble() -> nn.Module:
    raise KeyError("no such checkpoint")


def donor(name: str, **options: Any) -> Any:
    return timm.create_model(name, **options).eval()


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


# Identity


@pytest.mark.parametrize("name", DONORS)
def test_every_donor_loads_and_its_ref_rebuilds_the_architecture(name: str) -> None:
    source = load_source(name, pretrained=False)
    cfg = donor(name).pretrained_cfg
    assert source.name == source.ref.spec == name
    assert source.ref.builder == "timm"
    assert source.licence == cfg.get("license")
    assert source.preprocessing == Preprocessing(
        input_size=cfg["input_size"],
        mean=cfg["mean"],
        std=cfg["std"],
        interpolation=cfg["interpolation"],
        fixed_size=cfg["fixed_input_size"],
    )
    assert not any(module.training for module in source.module.modules())
    # The seed is the spec's, so the rebuilt network even has the same random weights.
    assert_same_weights(build_architecture(source.ref), source.module.state_dict())


def test_random_weights_depend_on_the_spec_alone_and_leave_the_global_state() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_source("test_resnet", pretrained=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = load_source("test_resnet", pretrained=False)
    other = load_source("test_resnet.r160_in1k", pretrained=False)
    assert_same_weights(second.module, first.module.state_dict())
    assert second.ref.weight_hash == first.ref.weight_hash != other.ref.weight_hash


def test_weight_hash_covers_names_dtypes_shapes_bytes_and_buffers() -> None:
    def weight_hash(change: Callable[[Any], object]) -> str:
        torch.manual_seed(0)
        module = Tiny()
        change(module)
        return load_source(module, name="tiny", preprocessing=GREY).ref.weight_hash

    same = weight_hash(lambda m: m.train())
    changed = [
        weight_hash(lambda m: m.layer.weight.data.view(-1)[5:6].mul_(1.0000001).add_(1e-6)),
        weight_hash(lambda m: m.norm.num_batches_tracked.add_(1)),
        weight_hash(lambda m: m.norm.running_mean.add_(1)),
        weight_hash(lambda m: m.layer.half()),
        weight_hash(lambda m: setattr(m.layer, "weight", nn.Parameter(m.layer.weight.data.reshape(8, 3)))),
        weight_hash(lambda m: m.add_module("layer2", m._modules.pop("layer"))),
    ]
    assert same == weight_hash(lambda m: m.eval())
    assert same.startswith("sha256:")
    assert len({same, *changed}) == 7


def test_weight_hash_is_the_documented_one() -> None:
    module = nn.Module()
    module.register_buffer("b", torch.tensor(3, dtype=torch.int64))
    module.register_buffer("a", torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    expected = hashlib.sha256()
    expected.update(b'["a", "torch.bfloat16", [1, 2]]' + bytes.fromhex("803f0040"))
    expected.update(b'["b", "torch.int64", []]' + (3).to_bytes(8, "little"))
    found = load_source(module, name="m", preprocessing=GREY).ref.weight_hash
    assert found == f"sha256:{expected.hexdigest()}"


def test_ref_goes_through_a_recipe_and_back() -> None:
    source = load_source("test_vit", pretrained=False, arguments={"img_size": (64, 96)})
    recipe = Recipe(sources=(source.ref,), fragments=(FragmentRef(source.name, None, None),))
    ref = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).sources[0]
    assert ref == source.ref
    assert ref.preprocessing.input_size == (3, 64, 96)
    assert ref.preprocessing.fixed_size
    assert_same_weights(build_architecture(ref), source.module.state_dict())


# timm names


def test_tag_is_recorded_where_the_user_left_it_out() -> None:
    ref = load_source("test_resnet", pretrained=False).ref
    assert ref.architecture == "test_resnet.r160_in1k"
    assert ref.revision is None


def test_channels_need_their_own_preprocessing() -> None:
    with pytest.raises(SourceError, match=r"one mean and one positive std for each.*found input_size=\(1, 160, 160\)"):
        load_source("test_resnet", pretrained=False, arguments={"in_chans": 1})
    source = load_source("test_resnet", pretrained=False, arguments={"in_chans": 1}, preprocessing=GREY)
    assert source.module.get_parameter("conv1.0.weight").shape[1] == 1
    assert source.preprocessing == GREY


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnt50", "no model 'resnt50'. Nearest: 'resnet50', "),
        ("resnt50.a1_in1k", "no model 'resnt50'. Nearest: 'resnet50', "),
        ("test_resnet.a1_in1k", "no such tag for 'test_resnet'; weights exist for: 'test_resnet.r160_in1k'"),
        ("test_vit4.r160", "no such tag for 'test_vit4'; weights exist for: none"),
        ("timm/resnet50.a1_in1k", "'hf-hub:timm/resnet50.a1_in1k', a folder 'local-dir:timm/resnet50.a1_in1k'"),
        ("resnet50@main", "revision can only be given to 'hf-hub:ORG/NAME@REVISION'"),
        ("hf_hub:timm/resnet50", "unknown prefix 'hf_hub'.*'hf-hub:ORG/NAME"),
        ("torchvision:", "nothing follows 'torchvision'"),
        ("torchvision:resnet5", "Nearest: 'resnet50', "),
        ("torchvision:fasterrcnn_resnet50_fpn", "no classifier 'fasterrcnn_resnet50_fpn'"),
        ("local-dir:no/such", "there is no folder 'no/such'.*config.json and model.safetensors"),
        ("hf-hub:resnet50", "expected 'hf-hub:ORG/NAME'"),
        ("hf-hub:timm/resnet50@", "expected 'hf-hub:ORG/NAME'"),
        (f"python:{__name__}", "expected 'python:package.module:factory'"),
        ("python:no_such_package:make", "cannot be imported.*PYTHONPATH"),
        (f"python:{__name__}:no_such", "cannot be imported"),
        (f"python:{__name__}:DONORS", "no callable but a list"),
        ("", "expected a timm name"),
        (42, "expected a timm name"),
    ],
)
def test_what_cannot_be_found_is_said_before_any_work(spec: Any, words: str) -> None:
    for attempt in (find_source, load_source):
        with pytest.raises(SourceError, match=f"(?s)^Source {spec!r}: .*{words}"):
            attempt(spec)


def test_pretrained_without_weights_is_refused() -> None:
    with pytest.raises(SourceError, match=r"no pre-trained weights.*pretrained=False"):
        find_source("test_vit4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"no_such_argument": 1}, "could not build 'test_resnet.r160_in1k' with arguments .*no_such_argument"),
        ({"act_layer": nn.ReLU}, "must be plain JSON.*python:your.module:factory"),
        ({"checkpoint_path": "x.pth"}, r"may not hold \['checkpoint_path'\]"),
    ],
)
def test_arguments_that_do_not_do(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        load_source("test_resnet", pretrained=False, arguments=arguments)


# torchvision


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
def test_torchvision_weights_come_from_its_own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    weights = torchvision.models.get_model_weights(name).DEFAULT
    options = {"init_weights": False} if name == "googlenet" else {}
    expected = torchvision.models.get_model(name, weights=None, **options).state_dict()
    (tmp_path / "checkpoints").mkdir()
    torch.save(expected, tmp_path / "checkpoints" / Path(weights.url).name)

    source = load_source(f"torchvision:{name}")
    kept = {key: tensor for key, tensor in expected.items() if not key.startswith("aux")}
    assert_same_weights(source.module, kept)
    assert source.name == source.ref.architecture == name
    assert source.licence is None
    transforms = weights.transforms()
    assert source.preprocessing == Preprocessing(
        (3, 224, 224), tuple(transforms.mean), tuple(transforms.std), transforms.interpolation.value
    )
    rebuilt = build_architecture(source.ref)
    assert shapes(rebuilt) == shapes(source.module)
    assert getattr(rebuilt, "transform_input", None) == getattr(source.module, "transform_input", None)


def test_torchvision_random_weights_and_arguments() -> None:
    source = load_source("torchvision:squeezenet1_1", pretrained=False, arguments={"num_classes": 4})
    assert source.module.num_classes == 4
    assert_same_weights(build_architecture(source.ref), source.module.state_dict())
    with pytest.raises(SourceError, match=r"could not build 'squeezenet1_1'.*no_such"):
        load_source("torchvision:squeezenet1_1", pretrained=False, arguments={"no_such": 4})


# Factories and live modules


def test_factory_is_rebuilt_only_if_trusted() -> None:
    spec = f"python:{__name__}:make_tiny"
    source = load_source(spec, arguments={"width": 5, "kind": "told"})
    assert source.name == "make_tiny"
    assert source.preprocessing == Preprocessing((3, 10, 12), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(RecipeError, match=rf"import '{__name__}' and call .*make_tiny.*'width': 5.*trust_f"):
        build_architecture(source.ref)
    assert_same_weights(build_architecture(source.ref, trust_factory=True), source.module.state_dict())


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("make_tiny", r"Tiny does not say how it wants its images. Give preprocessing=Preprocessing\("),
        ("make_number", "returned a int; expected a torch.nn.Module"),
        ("make_trouble", "raised KeyError: 'no such checkpoint' when called"),
    ],
)
def test_factory_that_does_not_do(factory: str, words: str) -> None:
    with pytest.raises(SourceError, match=f"^Source 'python:{__name__}:{factory}': .*{words}"):
        load_source(f"python:{__name__}:{factory}")


def test_live_module_is_copied_and_cannot_be_rebuilt() -> None:
    module = Tiny().train()
    source = load_source(module, name="mine", preprocessing=GREY)
    assert module.training
    assert not source.module.training
    module.layer.weight.data.zero_()
    assert source.module.get_parameter("layer.weight").any()
    with pytest.raises(RecipeError, match=r"given as a live module.*'python:package.module:factory'"):
        build_architecture(source.ref, trust_factory=True)


def test_live_timm_module_brings_its_preprocessing_and_licence() -> None:
    module = donor("test_vit")
    source = load_source(module, name="vit")
    assert source.preprocessing == load_source("test_vit", pretrained=False).preprocessing
    assert source.licence == module.pretrained_cfg["license"]


@pytest.mark.parametrize(
    ("module", "options", "words"),
    [
        (Tiny(), {"preprocessing": GREY}, "needs a name"),
        (Tiny(), {"name": "tiny"}, "does not say how it wants its images"),
        (Tiny().to("meta"), {"name": "tiny", "preprocessing": GREY}, "on the meta device"),
        (Tiny(), {"name": "tiny", "preprocessing": Preprocessing((3, 8, 8), (0.5,), (0.5,))}, "for each channel"),
    ],
)
def test_live_module_that_does_not_do(module: nn.Module, options: dict[str, Any], words: str) -> None:
    with pytest.raises(SourceError, match=f"^Source .*Tiny'?: .*{words}"):
        load_source(module, **options)


# Several sources


def test_load_sources_makes_names_unique_and_keeps_the_order() -> None:
    specs: list[Any] = [
        {"spec": "test_resnet", "pretrained": False},
        {"spec": "test_vit", "pretrained": False, "name": "test_resnet"},
        {"spec": "torchvision:squeezenet1_1", "pretrained": False},
        {"spec": "test_resnet", "pretrained": False, "name": "test_resnet#2"},
        {"spec": Tiny(), "name": "tiny", "preprocessing": {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25]}},
    ]
    sources = load_sources(specs)
    assert [s.name for s in sources] == ["test_resnet", "test_resnet#2", "squeezenet1_1", "test_resnet#2#2", "tiny"]
    assert [s.ref.spec for s in sources[:2]] == ["test_resnet", "test_vit"]
    assert sources[4].preprocessing == GREY


def test_load_sources_lists_every_failure_before_loading_any(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> nn.Module:
        raise AssertionError("a network was built")

    monkeypatch.setattr(timm, "create_model", fail)
    good: Any = {"spec": "test_resnet", "pretrained": False}
    bad = [
        "resnt50",
        {"spec": "test_vit", "pretraind": False},
        {"spec": Tiny(), "name": "t", "preprocessing": {"a": 1}},
    ]
    with pytest.raises(SourceError, match=r"^3 of 4 sources cannot be had; nothing was loaded") as failure:
        load_sources([good, *bad])
    lines = str(failure.value).splitlines()
    assert len(lines) == 4
    assert "Nearest: 'resnet50'" in lines[1]
    assert "may hold ['spec', 'name', 'pretrained'" in lines[2]
    assert "preprocessing cannot be read" in lines[3]


@pytest.mark.parametrize("specs", [[], (), "resnet50", {"spec": "resnet50"}])
def test_load_sources_wants_a_list(specs: Any) -> None:
    with pytest.raises(SourceError, match=r"Expected a list of sources"):
        load_sources(specs)


# Recipes from strangers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "local-dir:somewhere"}, "no model 'local-dir:somewhere'"),
        ({"architecture": "hf-hub:org/name"}, "no model 'hf-hub:org/name'"),
        ({"arguments": {"checkpoint_path": "evil.pth"}}, "checkpoint_path.*would make timm read files"),
        ({"arguments": {"depth": "deep"}}, "timm could not build 'test_resnet'"),
        ({"builder": "torchvision", "architecture": "fasterrcnn_resnet50_fpn"}, "no classifier"),
        ({"builder": "torchvision", "architecture": "resnet18", "arguments": {"weights": "DEFAULT"}}, "weights"),
        ({"builder": "pickle"}, "its builder is 'pickle'; known are"),
    ],
)
def test_build_architecture_reads_nothing_that_a_recipe_names(change: dict[str, Any], words: str) -> None:
    fields: dict[str, Any] = {"builder": "timm", "architecture": "test_resnet", **change}
    ref = SourceRef(name="odd", spec="test_resnet", weight_hash="", preprocessing=GREY, **fields)
    with pytest.raises(RecipeError, match=f"^The architecture of source 'odd' cannot be rebuilt: .*{words}"):
        build_architecture(ref)
