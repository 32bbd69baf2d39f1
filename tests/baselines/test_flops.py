from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from doubles.small_sources import donor
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_stitch.baselines.flops import Meter
from lightning_stitch.cutting.probing import network_cost


def test_a_backward_pass_takes_twice_the_forward_one_but_for_the_first_layers_input_gradient() -> None:
    network = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    with Meter() as forward:
        loss = network(torch.ones(11, 5)).sum()
    with Meter() as backward:
        loss.backward()
    first, second = 2 * 11 * 5 * 7, 2 * 11 * 7 * 3
    assert forward.spent.flops == first + second
    assert backward.spent.flops == first + 2 * second


@pytest.mark.parametrize("architecture", ["test_resnet", "test_efficientnet", "test_vit"])
def test_training_a_network_counts_what_torch_counts(architecture: str) -> None:
    network, images = donor(architecture).module, torch.rand(2, 3, 160, 160)
    with sdpa_kernel(SDPBackend.MATH):
        with Meter() as meter:
            network(images).sum().backward()
        with FlopCounterMode(display=False) as counter:
            network(images).sum().backward()
    assert meter.spent.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_pass_counts_two_flops_for_each_mac_whatever_kernel_runs(
    architecture: str, mode: Callable[[], torch.no_grad]
) -> None:
    network = donor(architecture).module
    with mode(), Meter() as meter:
        network(torch.rand(3, 3, 160, 160))
    assert meter.spent.flops == 3 * 2 * network_cost(network, (3, 160, 160)).macs


def test_fused_attention_computes_the_scores_once_more_on_the_way_back() -> None:
    query, key, value = (torch.rand(2, 4, length, 8, requires_grad=True) for length in (6, 9, 9))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with Meter() as forward:
            attended = functional.scaled_dot_product_attention(query, key, value)
        with Meter() as backward:
            attended.sum().backward()
    assert forward.spent.flops == 2 * (2 * 2 * 4 * 6 * 9 * 8)
    assert backward.spent.flops == 5 * (2 * 2 * 4 * 6 * 9 * 8)


SQUARE = torch.eye(6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("run", "flops"),
    [
        (lambda: torch.linalg.cholesky(SQUARE), 6**3 // 3),
        (lambda: torch.cholesky_solve(torch.ones(6, 4).double(), SQUARE), 2 * 6 * 6 * 4),
        (lambda: torch.linalg.eigh(SQUARE), 9 * 6**3),
        (lambda: SQUARE @ torch.ones(6).double(), 2 * 6 * 6),
        (lambda: torch.rand(9, 9).relu().sum(), 0),
        (lambda: torch.empty(4, 5, device="meta") @ torch.empty(5, 6, device="meta"), 0),
    ],
    ids=["cholesky", "solve", "eigh", "matrix-vector", "element-wise", "without values"],
)
def test_what_closed_form_fits_are_made_of_counts(run: Callable[[], Tensor], flops: int) -> None:
    with Meter() as meter:
        run()
    assert meter.spent.flops == flops


def test_dry_runs_count_nothing() -> None:
    with Meter() as meter:
        assert network_cost(nn.Conv2d(3, 8, 3), (3, 8, 8)).macs > 0
    assert meter.spent.flops == 0


def test_seconds_run_until_the_end_also_where_that_is_an_error() -> None:
    def fail() -> None:
        time.sleep(0.05)
        raise ZeroDivisionError(SQUARE @ SQUARE)

    meter = Meter()
    with pytest.raises(ZeroDivisionError), meter:
        fail()
    assert meter.spent.seconds >= 0.05 > meter.spent.cpu_seconds
    assert meter.spent.flops == 2 * 6**3
    assert (SQUARE @ SQUARE).shape == (6, 6)
    assert meter.spent.flops == 2 * 6**3
