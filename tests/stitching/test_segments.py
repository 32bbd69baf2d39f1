from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from doubles.references import sums_of
from doubles.small_sources import donor, live, plain
from doubles.tensors import noise
from torch import nn

from lightning_stitch.cost import Cost
from lightning_stitch.errors import CutError, StitchError
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.segments import Segmented, chunks, segment

IMAGES = noise(6, 3, 64, 64)


def featureless(part: Segmented) -> nn.Module:
    """The source's network without its classifier, as timm itself takes it off."""
    network = copy.deepcopy(part.source.module)
    network.reset_classifier(0)  # type: ignore[operator]
    return network


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("granularity", ["blocks", "all"])
def test_the_pieces_in_a_row_are_the_source_up_to_its_features(
    name: str, granularity: Literal["blocks", "all"]
) -> None:
    part = segment(donor(name), CalibrationSettings(granularity=granularity), (3, 64, 64))
    network = featureless(part)
    assert len(part.pieces) == len(part.cuts) + 1 > 1
    with torch.no_grad():
        x = part.preprocess(IMAGES)
        expected = network(x)
        for piece in part.pieces:
            x = piece(x)
    assert torch.equal(x, expected)
    assert part.cost == sums_of(network, (3, 64, 64))
    assert part.cost == sum(part.costs, Cost(0, 0))
    assert part.cost_between(0, 1) + part.cost_between(1, len(part.pieces)) == part.cost
    assert part.name == name


def test_batches_are_run_in_portions_that_make_them_up() -> None:
    portions = chunks(IMAGES, 4)
    assert [len(portion) for portion in portions] == [4, 2]
    assert torch.equal(torch.cat(list(portions)), IMAGES)
    few, many = (
        segment(donor("test_resnet"), CalibrationSettings(), (3, size, size)).images_at_once for size in (512, 64)
    )
    assert 1 <= few < many


def test_pieces_share_the_sources_parameters() -> None:
    part = segment(donor("test_resnet"), CalibrationSettings(until="output"), (3, 64, 64))
    own = {id(parameter) for parameter in part.source.module.parameters()}
    assert {id(parameter) for piece in part.pieces for parameter in piece.parameters()} == own


def test_pieces_until_the_output_end_in_the_sources_own_classes() -> None:
    part = segment(donor("test_resnet"), CalibrationSettings(until="output"), (3, 64, 64))
    with torch.no_grad():
        x = part.preprocess(IMAGES)
        expected = part.source.module(x)
        for piece in part.pieces:
            x = piece(x)
    assert torch.equal(x, expected)
    assert part.end is None
    assert part.cost == sums_of(part.source.module, (3, 64, 64))
    assert part.cuts[-1].format == "vector"


def test_granularity_may_be_each_sources_own() -> None:
    settings = CalibrationSettings(granularity={"a": ["1"], "b": "all"})
    cuts = {
        name: [cut.name for cut in segment(plain(name, (4, 5, 6), seed=0), settings, (3, 16, 16)).cuts]
        for name in ("a", "b", "c")
    }
    assert cuts == {"a": ["1"], "b": ["0.0", "0", "1.0", "1"], "c": ["0", "1"]}


def test_cuts_with_nothing_to_compute_between_them_and_the_features_are_left_out() -> None:
    part = segment(plain("a", (4, 5, 6), seed=0), CalibrationSettings(granularity="all"), (3, 16, 16))
    assert part.end == "2"
    assert [cut.name for cut in part.cuts] == ["0.0", "0", "1.0", "1"]


def test_a_source_of_fixed_size_is_cut_at_its_own_size() -> None:
    part = segment(
        live(nn.Sequential(*plain("a", (4, 5, 6), seed=0).module), "a", fixed_size=True),
        CalibrationSettings(),
        (3, 8, 8),
    )
    assert part.graph.input_size == (3, 16, 16)
    assert part.image_shape == (3, 8, 8)
    assert part.preprocess(noise(2, 3, 8, 8)).shape == (2, 3, 16, 16)


def test_a_source_that_takes_no_other_size_names_the_sizes_and_the_mend() -> None:
    layers = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, 8), nn.ReLU(), nn.Linear(8, 2)]
    source = live(nn.Sequential(*layers), "flat", size=16)
    assert segment(source, CalibrationSettings(), (3, 16, 16)).graph.input_size == (3, 16, 16)
    words = r"(?s)^Source 'flat' at 3x24x24: .*It does take its native 3x16x16: use images .* fixed_size=True"
    with pytest.raises(CutError, match=words):
        segment(source, CalibrationSettings(), (3, 24, 24))
    mended = live(nn.Sequential(*layers), "flat", size=16, fixed_size=True)
    assert segment(mended, CalibrationSettings(), (3, 24, 24)).graph.input_size == (3, 16, 16)


@pytest.mark.parametrize("fixed_size", [False, True])
def test_images_of_other_channels_are_refused(fixed_size: bool) -> None:
    source = live(plain("a", (4, 5, 6), seed=0).module, "grey?", fixed_size=fixed_size)
    with pytest.raises(CutError, match="'grey\\?' takes images of 3 channels; the calibration images have 1"):
        segment(source, CalibrationSettings(), (1, 16, 16))


def test_what_cannot_be_cut_says_the_source_and_the_size() -> None:
    unpadded = live(nn.Sequential(nn.Conv2d(3, 4, 9), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "deep")
    with pytest.raises(CutError, match=r"Source 'deep' at 3x8x8: .*fails in a dry run"):
        segment(unpadded, CalibrationSettings(), (3, 8, 8))
    with pytest.raises(CutError, match="Source 'a' at 3x16x16: No cut is named 'layer9'"):
        segment(plain("a", (4, 5, 6), seed=0), CalibrationSettings(granularity=("layer9",)), (3, 16, 16))
    maps = live(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)), "maps")
    with pytest.raises(CutError, match=r"Source 'maps' .*no feature vector"):
        segment(maps, CalibrationSettings(), (3, 16, 16))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"until": "logits"}, "until must be 'features' or 'output'; found 'logits'"),
        ({"estimator": "unbiased"}, r"estimator must be one of \('debiased', 'biased'\); found 'unbiased'"),
        ({"rows_per_image": 0}, "rows_per_image must be an integer, at least 1; found 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(StitchError, match=words):
        CalibrationSettings(**settings)  # type: ignore[arg-type]
