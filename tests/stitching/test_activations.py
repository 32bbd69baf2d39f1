from __future__ import annotations

import pytest
import torch
from doubles.small_sources import donor, images_seen, live, plain, shake
from doubles.tensors import digits, noise
from torch import Tensor, nn

from lightning_stitch.errors import CalibrationError
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching.activations import calibrate, positions, sampled_rows
from lightning_stitch.stitching.segments import Segmented, segment

IMAGES = digits(8, 64)[0]


def taken_apart(name: str = "test_resnet", **settings: object) -> tuple[Segmented, CalibrationSettings]:
    chosen = CalibrationSettings(**settings)  # type: ignore[arg-type]
    return segment(donor(name), chosen, (3, 64, 64)), chosen


def at_cuts(parts: Segmented, images: Tensor) -> list[Tensor]:
    """Each cut's activation, from the image anew: (images, positions, channels), or (images, channels) for a vector."""
    found = []
    for cut in parts.cuts:
        with torch.no_grad():
            x = parts.graph.fragment(None, cut.name)(parts.preprocess(images))
        if cut.format == "NCHW":
            x = x.flatten(2).transpose(1, 2)
        elif cut.format == "NHWC":
            x = x.flatten(1, 2)
        found.append(x[:, cut.num_prefix_tokens :] if cut.format == "tokens" else x)
    return found


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        ("test_resnet", {"NCHW", "vector"}),
        ("test_mambaout", {"NCHW", "NHWC", "vector"}),
        ("test_vit", {"NHWC", "tokens", "vector"}),
    ],
)
def test_without_sampling_rows_are_all_positions_of_all_images(name: str, formats: set[str]) -> None:
    parts, settings = taken_apart(name, rows_per_image=10_000, until="output")
    found = calibrate(parts, [IMAGES], settings)
    for kept, x in zip(found.statistics, at_cuts(parts, IMAGES), strict=True):
        torch.testing.assert_close(kept.rows, x.reshape(-1, x.shape[-1]), rtol=1e-4, atol=1e-5)
        assert kept.rows.dtype == torch.float32
    assert {cut.format for cut in parts.cuts} == formats


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_rows_are_positions_of_their_own_image_without_repeats(name: str) -> None:
    parts, settings = taken_apart(name, rows_per_image=5)
    found = calibrate(parts, [IMAGES], settings)
    for cut, kept, x in zip(parts.cuts, found.statistics, at_cuts(parts, IMAGES), strict=True):
        assert cut.grid is not None
        count = min(5, cut.grid[0] * cut.grid[1])
        assert kept.rows.shape == (count * len(IMAGES), cut.channels)
        for image, rows in enumerate(kept.rows.split(count)):
            distances = torch.cdist(rows.double(), x[image].double())
            assert distances.amin(1).max() < 1e-4 * x.abs().max()
            assert len(distances.argmin(1).unique()) == count or len(x[image].unique(dim=0)) < len(x[image])


def test_kept_memory_is_rows_by_channels_whatever_the_image_size() -> None:
    shapes = []
    for size in (64, 128):
        settings = CalibrationSettings(rows_per_image=4)
        parts = segment(donor("test_resnet"), settings, (3, size, size))
        found = calibrate(parts, [digits(6, size)[0]], settings)
        shapes.append([kept.rows.shape for kept in found.statistics])
        found.release()
        assert found.activations == []
    assert shapes[0] == shapes[1]


def test_positions_follow_the_seed_alone() -> None:
    x, grid = noise(4, 3, 9, 9), (9, 9)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sampled_rows(x, grid, CalibrationSettings(rows_per_image=7))
    sampled_rows(noise(4, 3, 6, 6), (6, 6), CalibrationSettings(rows_per_image=7))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(sampled_rows(x, grid, CalibrationSettings(rows_per_image=7)), first)
    assert not torch.equal(sampled_rows(x, grid, CalibrationSettings(rows_per_image=7, seed=1)), first)
    images = first.view(4, 7, 3)
    places = [(x[i].flatten(1).T[:, None] == images[i]).all(2).nonzero()[:, 0].tolist() for i in range(4)]
    assert len({tuple(sorted(place)) for place in places}) == 4


def test_two_activations_are_sampled_at_the_same_positions() -> None:
    settings = CalibrationSettings(rows_per_image=7)
    x = noise(4, 3, 9, 9)
    assert torch.equal(sampled_rows(2 * x, (9, 9), settings), 2 * sampled_rows(x, (9, 9), settings))


@pytest.mark.parametrize("size", [4, 9, 12])
def test_a_map_is_resampled_to_the_receivers_grid(size: int) -> None:
    x = noise(3, 5, 9, 9)
    options = {"mode": "bilinear", "align_corners": False, "antialias": True}
    expected = nn.functional.interpolate(x, size=(size, size), **options)  # type: ignore[arg-type]
    rows = sampled_rows(x, (size, size), CalibrationSettings(rows_per_image=1000))
    torch.testing.assert_close(rows.view(3, size, size, 5).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("grid", [(12, 12), (9, 12), (8, 14), (4, 4), (9, 9)])
def test_sampled_positions_are_those_of_the_whole_resampled_map(grid: tuple[int, int]) -> None:
    x = noise(3, 5, 9, 9)
    chosen = positions(grid, range(3), 7, 0)
    assert chosen is not None
    whole = sampled_rows(x, grid, CalibrationSettings(rows_per_image=1000)).view(3, -1, 5)
    expected = torch.cat([rows[places] for rows, places in zip(whole, chosen, strict=True)])
    torch.testing.assert_close(sampled_rows(x, grid, CalibrationSettings(rows_per_image=7)), expected)


def test_a_map_meets_a_vector_as_its_mean() -> None:
    x = noise(3, 5, 4, 4)
    torch.testing.assert_close(sampled_rows(x, None, CalibrationSettings()), x.mean((2, 3)))
    assert torch.equal(sampled_rows(x[:, :, 0, 0], None, CalibrationSettings()), x[:, :, 0, 0])


@pytest.mark.parametrize("batches", [(8,), (5, 3), (1,) * 8])
def test_the_batch_size_changes_nothing(batches: tuple[int, ...]) -> None:
    parts, settings = taken_apart("test_efficientnet", rows_per_image=9)
    whole = calibrate(parts, [IMAGES], settings)
    found = calibrate(parts, IMAGES.split(list(batches)), settings)
    torch.testing.assert_close(found.features, whole.features, rtol=1e-4, atol=1e-5)
    for kept, expected in zip(found.statistics, whole.statistics, strict=True):
        torch.testing.assert_close(kept.rows, expected.rows, rtol=1e-4, atol=1e-5)


def test_each_image_goes_in_once() -> None:
    parts, settings = taken_apart()
    with images_seen(parts.source) as seen:
        calibrate(parts, IMAGES.split(3), settings)
    assert sum(seen) == len(IMAGES)


def test_features_and_activations_are_the_sources_own() -> None:
    parts, settings = taken_apart()
    found = calibrate(parts, [IMAGES], settings)
    assert found.name == "test_resnet"
    with torch.no_grad():
        network = donor("test_resnet").module
        expected = network.forward_head(network.forward_features(parts.preprocess(IMAGES)), pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    for x, y in zip(found.activations, at_cuts(parts, IMAGES), strict=True):
        torch.testing.assert_close(x.whole().flatten(2).transpose(1, 2), y, rtol=1e-4, atol=1e-5)


def test_prefix_tokens_are_kept_as_their_mean() -> None:
    parts, settings = taken_apart("test_vit", rows_per_image=6)
    found = calibrate(parts, [IMAGES], settings)
    with_tokens = 0
    for kept, cut, x in zip(found.statistics, parts.cuts, found.activations, strict=True):
        if cut.format == "tokens":
            with_tokens += 1
            assert kept.prefix is not None
            torch.testing.assert_close(kept.prefix, x.whole()[:, :1].mean(0))
        else:
            assert kept.prefix is None
    assert with_tokens > 2


def test_a_cut_that_does_not_vary_is_marked() -> None:
    flat = shake(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU()), seed=0)
    flat[2].weight.data.zero_()
    head = [nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    source = live(nn.Sequential(*flat, *head), "dead")
    settings = CalibrationSettings(granularity=("1", "3"))
    found = calibrate(segment(source, settings, (3, 16, 16)), [noise(4, 3, 16, 16)], settings)
    assert [kept.centred is None for kept in found.statistics] == [False, True]


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
def test_too_few_rows_name_the_number_needed_and_the_cut(estimator: str) -> None:
    settings = CalibrationSettings(estimator=estimator, until="output")  # type: ignore[arg-type]
    parts = segment(plain("a", (4, 5, 6), seed=0), settings, (3, 16, 16))
    count = {"debiased": 3, "biased": 1}[estimator]
    words = f"CKA needs at least {count + 1} rows; found {count} in cut '2' of source 'a'"
    with pytest.raises(CalibrationError, match=words):
        calibrate(parts, [noise(count, 3, 16, 16)], settings)
    assert calibrate(parts, [noise(count + 1, 3, 16, 16)], settings).statistics[2].rows.shape == (count + 1, 6)


def test_activations_that_are_not_finite_name_the_cut_and_the_source() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean()).sqrt()

    layers = [nn.Conv2d(3, 4, 3), Root(), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    settings = CalibrationSettings(granularity="all")
    parts = segment(live(nn.Sequential(*layers), "rooted"), settings, (3, 16, 16))
    with pytest.raises(CalibrationError, match=r"cut '1' of source 'rooted' has NaN or infinite values in \d+ of its"):
        calibrate(parts, [noise(4, 3, 16, 16)], settings)


def test_no_image_at_all_is_said() -> None:
    parts, settings = taken_apart()
    with pytest.raises(CalibrationError, match="no calibration images"):
        calibrate(parts, [], settings)
