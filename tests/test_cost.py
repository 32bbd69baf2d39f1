from __future__ import annotations

import doctest
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_stitch import cost
from lightning_stitch.cost import Budget, Cost, network_cost
from lightning_stitch.errors import BudgetError, CutError
from lightning_stitch.sources import load_source


def counted_macs(network: nn.Module, size: tuple[int, int, int]) -> int:
    """The reference: half the FLOPs that torch counts in a real run of one image."""
    counter = FlopCounterMode(display=False)
    # The plain attention is the one that every version of the counter knows.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network.eval()(torch.zeros(1, *size))
    return counter.get_total_flops() // 2


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(cost) == (0, 1)


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("torchvision:resnet18", 224),
        ("torchvision:resnet18", 97),
        ("torchvision:mobilenet_v3_small", 224),
        ("test_vit", 160),
        ("test_vit_relpos", 160),
        ("test_maxvit", 160),
        ("test_convnext", 96),
    ],
)
def test_cost_is_parameters_and_half_of_what_the_flop_counter_says(spec: str, size: int) -> None:
    network = load_source(spec, pretrained=False).module
    found = network_cost(network, (3, size, size))
    assert found == Cost(sum(p.numel() for p in network.parameters()), counted_macs(network, (3, size, size)))


def test_resnet18_costs_what_is_known_of_it() -> None:
    found = network_cost(load_source("torchvision:resnet18", pretrained=False).module, (3, 224, 224))
    assert found == Cost(params=11_689_512, macs=1_814_073_344)


def test_a_convolution_and_a_linear_layer_cost_what_their_formulas_say() -> None:
    network = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12, 5))
    params = (6 * 2 * 9 + 6) + (72 * 5 + 5)
    assert network_cost(network, (4, 7, 9)) == Cost(params, macs=(3 * 4) * 6 * 2 * 9 + 72 * 5)


def test_what_is_shared_counts_its_parameters_once_and_its_work_each_time() -> None:
    layer, tied = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    tied.weight = layer.weight
    once, twice, both = (
        network_cost(nn.Sequential(*part), (4, 8, 8)) for part in ([layer], [layer] * 2, [layer, tied])
    )
    assert twice == Cost(once.params, 2 * once.macs)
    assert both == Cost(once.params + 4, 2 * once.macs)


def test_counting_leaves_modes_and_statistics_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    network.train()
    network[2].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network_cost(network, (3, 8, 8))
    assert [part.training for part in network] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_size_that_the_network_refuses_is_an_error_that_names_the_operation_and_no_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    with pytest.raises(CutError, match=r"(?s)2.*fails in a dry run.*must have same reduction dim[^\n]*$"):
        network_cost(network, (3, 10, 10))
    assert caplog.records == []
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


def test_a_network_that_cannot_be_traced_is_an_error() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CutError, match=r"Branching cannot be traced: .*control flow"):
        network_cost(Branching(), (3, 8, 8))


def test_costs_add_and_subtract() -> None:
    assert Cost(3, 40) + Cost(1, 2) == Cost(4, 42)
    assert Cost(3, 40) - Cost(1, 50) == Cost(2, -10)
    assert str(Cost(25_557_032, 4_089_184_256)) == "25.56 M parameters, 4089.2 M MACs"


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [
        (Budget(), True),
        (Budget(max_params=100), True),
        (Budget(max_params=99), False),
        (Budget(max_macs=2000.0), True),
        (Budget(max_macs=1999.5), False),
        (Budget(max_params=100, max_macs=1999), False),
        (Budget(max_params=99, max_macs=2000), False),
    ],
)
def test_a_budget_allows_what_keeps_each_of_its_limits(budget: Budget, allowed: bool) -> None:
    assert budget.allows(Cost(params=100, macs=2000)) is allowed


@pytest.mark.parametrize("limit", [0, -1e6, float("nan")])
@pytest.mark.parametrize("name", ["max_params", "max_macs"])
def test_a_limit_must_be_positive(name: str, limit: float) -> None:
    with pytest.raises(BudgetError, match=f"{name} must be positive or None; found {limit}"):
        Budget(**{name: limit})


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(), "no limit"),
        (Budget(max_macs=2e9), "at most 2000 M MACs"),
        (Budget(max_params=2.5e6, max_macs=1e8), "at most 2.5 M parameters and at most 100 M MACs"),
    ],
)
def test_a_budget_in_words(budget: Budget, words: str) -> None:
    assert str(budget) == words
