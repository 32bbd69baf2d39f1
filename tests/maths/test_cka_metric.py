from __future__ import annotations

import doctest
import pickle
from pathlib import Path

import pytest
import torch
from doubles.cka_processes import related, run_process
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.maths import cka_metric as similarity
from lightning_stitch.maths.cka import linear_cka
from lightning_stitch.maths.cka_metric import LinearCKA

BEFORE_UPDATE = "ignore:The ``compute`` method of metric LinearCKA was called before"


def updated(x: Tensor, y: Tensor, *, batch_size: int = 8, estimator: str = "debiased") -> LinearCKA:
    metric = LinearCKA(estimator)
    for batch in zip(x.split(batch_size), y.split(batch_size), strict=True):
        metric.update(*batch)
    return metric


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(similarity) == (0, 5)


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_the_metric_is_cka_of_all_rows(batch_size: int, estimator: str) -> None:
    x, y = related(40, offset=1000)
    value = updated(x, y, batch_size=batch_size, estimator=estimator).compute()
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert float(value) == pytest.approx(float(linear_cka(x, y, estimator=estimator)), abs=1e-10)


def test_every_pixel_of_a_map_is_a_row() -> None:
    x, y = related(2 * 3 * 4)
    maps = [rows.reshape(2, 3, 4, -1).permute(0, 3, 1, 2) for rows in (x, y)]
    metric = LinearCKA()
    metric.update(maps[0], y)  # the order is image, height, width
    assert float(metric.compute()) == pytest.approx(float(linear_cka(x, y)), abs=1e-12)
    assert float(updated(*maps, batch_size=1).compute()) == pytest.approx(float(linear_cka(x, y)), abs=1e-12)


def test_forward_gives_the_batch_and_keeps_the_whole() -> None:
    x, y = related(24)
    metric = LinearCKA()
    for batch in zip(x.split(8), y.split(8), strict=True):
        assert float(metric(*batch)) == pytest.approx(float(linear_cka(*batch)), abs=1e-12)
    assert metric.update_count == 3
    assert float(metric.compute()) == pytest.approx(float(linear_cka(x, y)), abs=1e-10)


def test_reset_forgets_rows_and_channels() -> None:
    x, y = related(24)
    metric = updated(x, y)
    metric.reset()
    metric.update(y[:12, :2], x[:12])
    assert float(metric.compute()) == pytest.approx(float(linear_cka(y[:12, :2], x[:12])), abs=1e-12)


def test_merge_state_takes_a_metric_a_state_or_nothing() -> None:
    x, y = related(24)
    whole = float(linear_cka(x, y))
    first, second = updated(x[:10], y[:10]), updated(x[10:], y[10:])
    assert float(first.compute()) == pytest.approx(float(linear_cka(x[:10], y[:10])), abs=1e-12)
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(whole, abs=1e-10)
    second.merge_state(updated(x[:10], y[:10]).metric_state)
    second.merge_state(LinearCKA())
    assert float(second.compute()) == pytest.approx(whole, abs=1e-10)


def test_pickle_clone_and_state_dict_carry_on() -> None:
    x, y = related(24)
    whole = float(linear_cka(x, y))
    begun = updated(x[:10], y[:10])
    begun.persistent(True)
    loaded = LinearCKA()
    loaded.persistent(True)
    loaded.load_state_dict(begun.state_dict())
    for metric in (pickle.loads(pickle.dumps(begun)), begun.clone(), loaded):
        metric.update(x[10:], y[10:])
        assert float(metric.compute()) == pytest.approx(whole, abs=1e-10)


def test_precision_casts_of_a_module_do_not_touch_later_sums() -> None:
    x, y = related(24, offset=1000)
    metric = LinearCKA().to(torch.bfloat16)  # as Lightning's true half precision does
    metric.update(x, y)
    assert float(metric.compute()) == pytest.approx(float(linear_cka(x, y)), abs=1e-10)


def test_metrics_of_both_estimators_share_a_collection() -> None:
    x, y = related(24)
    collection = MetricCollection({"debiased": LinearCKA(), "biased": LinearCKA("biased")})
    for batch in zip(x.split(8), y.split(8), strict=True):
        collection.update(*batch)
    for estimator, value in collection.compute().items():
        assert float(value) == pytest.approx(float(linear_cka(x, y, estimator=estimator)), abs=1e-10)


@pytest.mark.filterwarnings(BEFORE_UPDATE)
def test_compute_before_update_says_so() -> None:
    with pytest.raises(CalibrationError, match=r"no rows yet: call update\(x, y\) before compute\(\)"):
        LinearCKA().compute()


def test_what_cannot_be_used_is_named() -> None:
    x, y = related(24)
    with pytest.raises(CalibrationError, match="needs at least 4 rows; found 3 in x and y"):
        updated(x[:3], y[:3], batch_size=1).compute()
    with pytest.raises(CalibrationError, match="x is constant"):
        updated(torch.ones(24, 5), y).compute()
    with pytest.raises(CalibrationError, match=r"same channels \(of x, of y\); found \(5, 7\) and \(5, 6\)"):
        updated(x, y).update(x, y[:, 1:])
    with pytest.raises(CalibrationError, match=r"y must be rows x channels.*found shape \(2, 3, 4\)"):
        LinearCKA().update(x, torch.ones(2, 3, 4))
    with pytest.raises(StitchError, match="no CKA estimator 'unbiased'"):
        updated(x, y, estimator="unbiased").compute()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_process, (str(tmp_path),), nprocs=2)
    x, y = related(40, offset=1000)
    whole = float(linear_cka(x, y))
    expected = [whole, whole, whole, float(linear_cka(x[:20], y[:20])), whole]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, abs=1e-10)
