from __future__ import annotations

import pytest
import torch
from doubles.tensors import noise, normal
from torch import Tensor

from lightning_stitch.cutting.graph import Cut
from lightning_stitch.recipe import Format, Statistic
from lightning_stitch.stitching.taps import Reading, statistics_of, tap_at


def cut_of(format: Format, shape: tuple[int, ...], grid: tuple[int, int] | None, prefix: int = 0) -> Cut:
    return Cut("cut", format, shape, grid, None if grid is None else 4.0, prefix, 0)


MAP = noise(5, 6, 3, 4)
PREFIX = noise(5, 2, 6, seed=1)
# What a cut's activation is, and the positions (5 x positions x 6) and prefix tokens that it holds.
KINDS: dict[str, tuple[Cut, Tensor]] = {
    "NCHW": (cut_of("NCHW", (6, 3, 4), (3, 4)), MAP),
    "NHWC": (cut_of("NHWC", (3, 4, 6), (3, 4)), MAP.permute(0, 2, 3, 1)),
    "tokens": (cut_of("tokens", (12, 6), (3, 4)), MAP.flatten(2).transpose(1, 2)),
    "tokens with a prefix": (
        cut_of("tokens", (14, 6), (3, 4), prefix=2),
        torch.cat([PREFIX, MAP.flatten(2).transpose(1, 2)], dim=1),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_of_positions_mean_and_deviation_are_read_and_the_prefix_as_it_is(kind: str) -> None:
    cut, x = KINDS[kind]
    expected = [MAP.mean((2, 3)), MAP.std((2, 3), correction=0)]
    names: tuple[Statistic, ...] = ("mean", "std")
    if cut.num_prefix_tokens:
        expected.append(PREFIX.flatten(1))
        names = (*names, "prefix")
    assert statistics_of(cut) == names
    tap = tap_at(cut, 0, names)
    vectors = Reading(cut, names)(x)
    torch.testing.assert_close(vectors, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-6)
    assert vectors.shape == (5, tap.num_features)
    assert tap.blocks == tuple(part.shape[1] for part in expected)
    torch.testing.assert_close(Reading(cut, ("mean",))(x), expected[0])


def test_a_vector_is_read_as_it_is_and_one_position_has_no_deviation() -> None:
    assert statistics_of(cut_of("vector", (6,), None)) == ()
    assert statistics_of(cut_of("NCHW", (6, 1, 1), (1, 1))) == ("mean",)
    x = normal(4, 6)
    assert Reading(cut_of("vector", (6,), None), ())(x) is x
    assert Reading(None, ())(x) is x
    assert tap_at(cut_of("vector", (6,), None), 3, ()).blocks == (6,)


def test_gradients_of_a_channel_that_does_not_vary_are_finite() -> None:
    cut, _ = KINDS["NCHW"]
    x = torch.ones(2, 6, 3, 4, requires_grad=True)
    Reading(cut, ("mean", "std"))(x).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
