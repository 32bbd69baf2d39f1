from __future__ import annotations

import doctest
from functools import reduce

import pytest
import torch
from doubles.tensors import normal, related
from torch import Tensor

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths import cka as functional
from lightning_stitch.maths.cka import (
    centre_rows,
    cka_from_moments,
    cka_moments,
    cka_with_many,
    linear_cka,
    merge_cka_moments,
    row_bank,
)

ESTIMATORS = ("debiased", "biased")
SHAPES = [(20, 3, 5), (9, 30, 40), (12, 5, 40), (40, 8, 8), (4, 2, 3)]  # rows, channels of x, of y


def gram_cka(x: Tensor, y: Tensor, estimator: str) -> float:
    """The definition, on explicit Gram matrices: Kornblith et al. 2019, and eq. 5 of Song et al. 2012."""
    n = len(x)

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        if estimator == "biased":
            h = torch.eye(n, dtype=torch.float64) - 1 / n
            return (k @ h @ m @ h).trace()
        k, m = k - k.diag().diag(), m - m.diag().diag()
        return (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()

    kx, ky = x @ x.T, y @ y.T
    return float(hsic(kx, ky) / (hsic(kx, kx) * hsic(ky, ky)).sqrt())


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(functional) == (0, 2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_cka_is_its_definition_on_gram_matrices(shape: tuple[int, int, int], estimator: str) -> None:
    x, y = related(*shape)
    cka = linear_cka(x, y, estimator=estimator)
    assert cka.dtype == torch.float64
    assert cka.shape == ()
    assert float(cka) == pytest.approx(gram_cka(x, y, estimator), abs=1e-11)
    assert float(cka) == pytest.approx(float(linear_cka(y, x, estimator=estimator)), abs=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("channels", [6, 50])
def test_cka_is_one_for_rotations_scalings_and_shifts(channels: int, estimator: str) -> None:
    x = normal(20, channels)
    rotation = torch.linalg.qr(normal(channels, channels, seed=1)).Q
    for same in (x, x @ rotation, 1e-3 * x, x + 5, -7 * x @ rotation - 3):
        assert float(linear_cka(x, same, estimator=estimator)) == pytest.approx(1, abs=1e-12)


def test_unrelated_wide_activations_score_zero_debiased_and_high_biased() -> None:
    scores = {
        e: [linear_cka(normal(32, 2048, seed=s), normal(32, 2048, seed=s + 50), estimator=e) for s in range(8)]
        for e in ESTIMATORS
    }
    assert abs(torch.stack(scores["debiased"]).mean()) < 0.05
    assert min(scores["biased"]) > 0.95


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("channels", [4, 40])
def test_cka_is_exact_where_means_are_a_thousand_deviations(channels: int, estimator: str) -> None:
    x, y = ((part / part.std() + 1000).float() for part in related(30, channels, channels + 1))
    expected = gram_cka(x.double() - x.double().mean(0), y.double() - y.double().mean(0), estimator)
    assert float(linear_cka(x, y, estimator=estimator)) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_cka_takes_any_real_dtype(dtype: torch.dtype) -> None:
    x, y = ((8 * part).to(dtype) for part in related(10, 4, 3))
    assert float(linear_cka(x, y)) == pytest.approx(gram_cka(x.double(), y.double(), "debiased"), abs=1e-11)


GOOD = normal(8, 3)
NAN = GOOD.clone()
NAN[2, 1], NAN[5, 0] = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("x", "y", "estimator", "words"),
    [
        (GOOD[:, :, None], GOOD, "debiased", r"x must be rows x channels, 2-D .*found shape \(8, 3, 1\)"),
        (GOOD, GOOD[0], "debiased", r"y must be rows x channels.*found shape \(3,\)"),
        (GOOD, GOOD[:, :0], "debiased", r"y must be .*not empty.*found shape \(8, 0\)"),
        (GOOD, GOOD[:7], "debiased", r"x and y must have the same number of rows; found shapes \(8, 3\) and \(7, 3\)"),
        (GOOD[:3], GOOD[:3], "debiased", r"Debiased CKA needs at least 4 rows; found 3 in x\. Use more calibration"),
        (GOOD[:1], GOOD[:1], "biased", r"Biased CKA needs at least 2 rows; found 1"),
        (GOOD, NAN, "debiased", r"y has NaN or infinite values in 2 of its 8 rows"),
        (NAN, GOOD, "biased", r"x has NaN or infinite values in 2 of its 8 rows"),
        (
            torch.full((8, 3), 0.1),
            GOOD,
            "debiased",
            r"x is constant: its 8 rows of 3 channels are equal up to rounding",
        ),
        (GOOD, (1000 + 1e-5 * GOOD).float(), "debiased", r"y is constant"),
        (GOOD, torch.zeros(8, 2), "biased", r"y is constant"),
        (torch.eye(8), GOOD, "debiased", r"x has no debiased similarity to itself: .*its 8 rows.*too few"),
        (1e160 * GOOD, GOOD, "debiased", r"CKA overflows"),
        (1e-90 * GOOD, GOOD, "biased", r"CKA overflows: .*too large or too small"),
    ],
)
def test_cka_says_what_it_cannot_use(x: Tensor, y: Tensor, estimator: str, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        linear_cka(x, y, estimator=estimator)


def test_one_constant_channel_is_no_constant_activation() -> None:
    x = torch.cat([torch.full((8, 1), 1e6), GOOD], dim=1)
    assert float(linear_cka(x, GOOD)) == pytest.approx(1, abs=1e-9)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(StitchError, match=r"no CKA estimator 'unbiased'; choose one of \['debiased', 'biased'\]"):
        linear_cka(GOOD, GOOD, estimator="unbiased")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_moments_give_the_same_cka_for_any_batch_size(offset: float, batch_size: int, estimator: str) -> None:
    x, y = related(64, 6, 9)
    order = x[:, 0].argsort()  # so that the batches' means lie far apart
    x, y = (x[order] + offset).float(), (y[order] - offset).float()
    parts = [cka_moments(*batch) for batch in zip(x.split(batch_size), y.split(batch_size), strict=True)]
    expected = float(linear_cka(x, y, estimator=estimator))
    for order_of_merging in (parts, parts[::-1]):
        merged = reduce(merge_cka_moments, order_of_merging)
        assert merged.num_rows == 64
        assert float(cka_from_moments(merged, estimator=estimator)) == pytest.approx(expected, abs=1e-11)


def test_merged_moments_are_those_of_all_rows() -> None:
    x, y = related(30, 4, 3)
    parts = [cka_moments(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 12), (12, 30))]
    whole, first = cka_moments(x, y), parts[0]
    for merged in (reduce(merge_cka_moments, parts), merge_cka_moments(first, merge_cka_moments(*parts[1:]))):
        for name in ("mean", "zz", "sz", "ss"):
            torch.testing.assert_close(getattr(merged, name), getattr(whole, name), atol=1e-10, rtol=1e-10)


def test_moments_say_what_they_cannot_use() -> None:
    good = cka_moments(GOOD, GOOD)
    with pytest.raises(CalibrationError, match=r"same channels \(of x, of y\); found \(3, 3\) and \(3, 2\)"):
        merge_cka_moments(good, cka_moments(GOOD, GOOD[:, :2]))
    with pytest.raises(CalibrationError, match=r"same channels .*found \(3, 3\) and \(2, 4\)"):
        merge_cka_moments(good, cka_moments(GOOD[:, :2], normal(8, 4)))
    with pytest.raises(CalibrationError, match=r"needs at least 4 rows; found 3 in x and y"):
        cka_from_moments(cka_moments(GOOD[:3], GOOD[:3]))
    with pytest.raises(CalibrationError, match="y is constant: its 8 rows of 2 channels"):
        cka_from_moments(cka_moments(GOOD, (1000 + 1e-5 * GOOD[:, :2]).float()))
    with pytest.raises(CalibrationError, match="y has no debiased similarity to itself"):
        cka_from_moments(cka_moments(GOOD, torch.eye(8)))
    with pytest.raises(CalibrationError, match="x has NaN or infinite values in 2 of its 8 rows"):
        cka_moments(NAN, GOOD)
    with pytest.raises(CalibrationError, match=r"x must be .*not empty"):
        cka_moments(GOOD[:0], GOOD[:0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("n", "cx"), [(100, 12), (16, 64), (16, 5)])  # the second in Gram space
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_one_against_many_is_cka_one_by_one(offset: float, n: int, cx: int, estimator: str) -> None:
    pairs = [related(n, cx, cy) for cy in (1, 7, 200, 30)]
    x, ys = (pairs[0][0] + offset).float(), [(y - offset).float() for _, y in pairs]
    expected = torch.stack([linear_cka(x, y, estimator=estimator) for y in ys])
    one, many = centre_rows(x, estimator=estimator), [centre_rows(y, estimator=estimator) for y in ys]
    assert one.rows.dtype == torch.float32
    for entries in (many, row_bank(many)):
        torch.testing.assert_close(cka_with_many(one, entries), expected, atol=1e-6, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cka_with_many(one, many), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels", [(5, 5), (1, 40), (15, 60)])
def test_one_against_many_is_exact_for_few_channels_and_many_rows(channels: tuple[int, int]) -> None:
    x, y = (part.relu().float() for part in related(20_000, *channels))
    assert float(cka_with_many(centre_rows(x), [centre_rows(y)])) == pytest.approx(float(linear_cka(x, y)), abs=1e-6)


def test_centred_rows_say_what_they_cannot_use() -> None:
    with pytest.raises(CalibrationError, match="cut 'layer1' is constant"):
        centre_rows(torch.ones(8, 3), name="cut 'layer1'")
    with pytest.raises(CalibrationError, match="needs at least 4 rows; found 3 in cut 'layer1'"):
        centre_rows(GOOD[:3], name="cut 'layer1'")
    with pytest.raises(CalibrationError, match="cut 'layer1' has NaN"):
        centre_rows(NAN, name="cut 'layer1'")
    with pytest.raises(CalibrationError, match="the same rows and estimator; found none"):
        row_bank([])
    one, shorter = centre_rows(GOOD), centre_rows(GOOD[:7])
    with pytest.raises(CalibrationError, match=r"found \[\(7, 'debiased'\), \(8, 'debiased'\)\]"):
        row_bank([one, shorter])
    with pytest.raises(CalibrationError, match=r"found \[\(8, 'debiased'\), \(7, 'debiased'\)\]"):
        cka_with_many(one, [shorter])
    with pytest.raises(CalibrationError, match=r"found \[\(8, 'debiased'\), \(8, 'biased'\)\]"):
        cka_with_many(one, [centre_rows(GOOD, estimator="biased")])
    with pytest.raises(CalibrationError, match="CKA overflows"):  # too large for a product in float32
        cka_with_many(centre_rows(1e25 * normal(8, 20)), [centre_rows(1e25 * normal(8, 20))])


@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 2), (0, 1), (2, 3)])
def test_a_part_of_a_bank_scores_its_own_activations_and_copies_nothing(first: int, last: int) -> None:
    bank = row_bank([centre_rows(normal(20, channels, seed=channels)) for channels in (3, 5, 4)])
    x, part = centre_rows(normal(20, 6)), bank.narrowed(first, last)
    assert cka_with_many(x, part).tolist() == pytest.approx(cka_with_many(x, bank)[first:last].tolist(), abs=1e-7)
    assert part.columns.untyped_storage().data_ptr() == bank.columns.untyped_storage().data_ptr()
