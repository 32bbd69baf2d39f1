from __future__ import annotations

import doctest
import logging
import math
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import pytest
import timm
import torch
from doubles.references import counted_bytes, counted_macs
from doubles.small_sources import live, shake
from doubles.tensors import noise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torchvision.ops import deform_conv2d

from lightning_stitch import cost
from lightning_stitch.composing.pool import Pool
from lightning_stitch.cost import Budget, Cost
from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.cutting.probing import network_cost
from lightning_stitch.errors import BudgetError, CutError
from lightning_stitch.sources.source import load_source


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(cost) == (0, 2)


TORCHVISION = [f"torchvision:{name}" for name in ("resnet18", "densenet121", "mobilenet_v3_small", "vit_b_32")]


@pytest.mark.parametrize("spec", [*timm.list_models("test_*"), *TORCHVISION])
def test_cost_is_parameters_half_of_what_the_flop_counter_says_and_what_is_alive_in_a_real_run(spec: str) -> None:
    source = load_source(spec, pretrained=False)
    network, size, graph = source.module, source.preprocessing.input_size, source.graph
    found = network_cost(network, size)
    params = sum(p.numel() for p in network.parameters())
    assert found == Cost(params, counted_macs(network, size), counted_bytes(graph.module, size))
    cuts = graph.cuts("all")
    pairs = list(pairwise([None, *(cut.name for cut in cuts), None]))
    assert sum(graph.macs(start, end) for start, end in pairs) == graph.macs(None, None) == found.macs
    assert [cut.macs for cut in cuts] == [graph.macs(None, end) for _, end in pairs[:-1]]
    peaks = [graph.activation_bytes(start, end) for start, end in pairs]
    assert max(peaks) == graph.activation_bytes(None, None) == found.activation_bytes
    assert graph.uncounted == ()


@pytest.mark.parametrize(("spec", "size"), [("torchvision:resnet18", 97), ("test_convnext", 96), ("test_vit", 64)])
def test_macs_follow_the_size_of_the_images(spec: str, size: int) -> None:
    source = load_source(spec, pretrained=False)
    expected = counted_macs(source.module, (3, size, size))
    assert network_cost(source.module, (3, size, size)).macs == expected != source.graph.macs(None, None)
    assert source.graph.at((3, size, size)).macs(None, None) == expected


def test_resnet18_costs_what_is_known_of_it() -> None:
    found = network_cost(load_source("torchvision:resnet18", pretrained=False).module, (3, 224, 224))
    # At the first BatchNorm, 64 maps of 112 x 112 in and out.
    assert found == Cost(params=11_689_512, macs=1_814_073_344, activation_bytes=4 * 2 * 64 * 112 * 112)


def test_a_convolution_and_a_linear_layer_cost_what_their_formulas_say() -> None:
    network = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 12, 5))
    params = (6 * 2 * 9 + 6) + (72 * 5 + 5)
    macs, alive = (3 * 4) * 6 * 2 * 9 + 72 * 5, 4 * (4 * 7 * 9 + 72)
    assert network_cost(network, (4, 7, 9)) == Cost(params, macs, alive)


def test_what_is_shared_counts_its_parameters_once_and_its_work_each_time() -> None:
    layer, tied = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    tied.weight = layer.weight
    once, twice, both = (
        network_cost(nn.Sequential(*part), (4, 8, 8)) for part in ([layer], [layer] * 2, [layer, tied])
    )
    assert twice == Cost(once.params, 2 * once.macs, once.activation_bytes)
    assert both == Cost(once.params + 4, 2 * once.macs, once.activation_bytes)


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
    assert torch.backends.mha.get_fastpath_enabled()
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


def test_a_network_that_cannot_be_traced_is_an_error() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CutError, match=r"Branching cannot be traced: .*control flow"):
        network_cost(Branching(), (3, 8, 8))


class OnTokens(nn.Module):
    """A convolution makes 16 tokens of width 8, and something of the test's takes them."""

    def __init__(self, work: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.work, self.call = nn.Conv2d(3, 8, 4, 4), work, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.work, self.stem(x).flatten(2).transpose(1, 2))


LAYER = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
COMPOSITES: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]] = {
    "attention": (nn.MultiheadAttention(8, 2, batch_first=True), lambda work, x: work(x, x, x)[0]),
    "attention without weights": (
        nn.MultiheadAttention(8, 2, batch_first=True),
        lambda work, x: work(x, x, x, need_weights=False)[0],
    ),
    "functional attention": (nn.Linear(8, 8), lambda work, x: F.scaled_dot_product_attention(work(x), x, x)),
    "encoder layer": (LAYER, lambda work, x: work(x)),
    "encoder": (nn.TransformerEncoder(LAYER, 2), lambda work, x: work(x)),
    "LSTM": (nn.LSTM(8, 6, num_layers=2, bidirectional=True), lambda work, x: work(x)[0]),
    "GRU": (nn.GRU(8, 6, batch_first=True), lambda work, x: work(x)[0]),
    "LSTM cell": (nn.LSTMCell(8, 6), lambda work, x: work(x[:, 0])[0]),
    "einsum": (nn.Linear(8, 6), lambda work, x: torch.einsum("bnc,dc->bnd", x, work.weight)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), lambda work, x: work(x)),
}


@pytest.mark.parametrize("kind", COMPOSITES)
@pytest.mark.parametrize("frozen", [False, True])
def test_composite_layers_cost_their_matrix_products_whichever_kernel_runs(kind: str, frozen: bool) -> None:
    network = OnTokens(*COMPOSITES[kind]).requires_grad_()
    params, macs = sum(p.numel() for p in network.parameters()), counted_macs(network, (3, 16, 16))
    assert macs > counted_macs(network.stem, (3, 16, 16))
    found = network_cost(network.requires_grad_(not frozen), (3, 16, 16))
    assert (found.params, found.macs) == (params, macs)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_recurrent_kernel_of_cudnns_costs_what_the_layer_costs_elsewhere() -> None:
    def call(work: nn.LSTM, x: Tensor) -> Tensor:
        h = x.new_zeros(1, 2, 6)
        weights = list(work.parameters())
        return torch._cudnn_rnn(x, weights, 4, None, h, h, 2, 6, 0, 1, True, 0.0, False, False, [], None)[0]

    lstm = nn.LSTM(8, 6, batch_first=True)
    expected = network_cost(OnTokens(lstm, lambda work, x: work(x)[0]), (3, 16, 16))
    assert network_cost(OnTokens(lstm, call), (3, 16, 16)) == expected


# -- work that cannot be counted -------------------------------------------------------------------------------------


@torch.library.custom_op("test_cost::mixed", mutates_args=())
def mixed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bchw,dc->bdhw", x, weight)


@mixed.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


class Step(nn.Module):
    def __init__(self, work: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.work, self.weight = work, nn.Parameter(torch.rand(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.work(x, self.weight)


def with_step(work: Callable[[Tensor, Tensor], Tensor]) -> nn.Sequential:
    blocks = nn.Sequential(nn.Conv2d(8, 8, 1), Step(work))
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 2, 2), blocks=blocks, pool=nn.AdaptiveAvgPool2d(2)))


UNCOUNTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "test_cost.mixed": mixed,
    "torchvision.deform_conv2d": lambda x, weight: deform_conv2d(x, x[:, :2], weight[:, :, None, None]),
    "aten._fft_r2c": lambda x, weight: torch.fft.rfft2(x, s=(8, 14)).abs(),
    "aten._linalg_solve_ex": lambda x, weight: torch.linalg.solve(weight, x),
    "aten._cdist_forward": lambda x, weight: torch.cdist(x, weight, p=1.0),
    "aten._trilinear": lambda x, weight: F.bilinear(x, x, weight.expand(8, 8, 8)),
    "aten.mv": lambda x, weight: (x @ weight[0])[..., None],
    "aten.addmm_": lambda x, weight: x + weight.clone().addmm_(weight, weight),
}


@pytest.mark.parametrize("operator", UNCOUNTED)
def test_what_has_no_formula_is_listed_with_its_place_and_warned_of(operator: str) -> None:
    network = with_step(UNCOUNTED[operator])
    graph = CutGraph(network, (3, 16, 16))
    assert graph.uncounted == (f"blocks.1: {operator}",)
    counted = 64 * (8 * 12 + 8 * 8)
    assert graph.macs(None, None) == counted
    message = rf"The MACs of Sequential leave out blocks\.1: {operator}: there is no FLOP formula for them\. torch"
    with pytest.warns(UserWarning, match=message):
        assert network_cost(network, (3, 16, 16)).macs == counted


def test_a_step_of_the_network_itself_is_listed_by_its_name_and_each_work_once() -> None:
    class Mixing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = mixed(mixed(self[0](x), self[0].weight[:, :, 0, 0]), self[0].weight[:, :, 0, 0])
            return self[1](x).sum((2, 3))

    network = Mixing(nn.Conv2d(3, 3, 1), with_step(lambda x, weight: mixed(mixed(x, weight), weight)))
    assert CutGraph(network, (3, 16, 16)).uncounted == (
        *("mixed_default: test_cost.mixed", "mixed_default_1: test_cost.mixed"),
        "1.blocks.1: test_cost.mixed",
    )


def test_a_formula_that_is_registered_makes_an_operator_count() -> None:
    @register_flop_formula(torch.ops.test_cost.mixed)
    def flops(x: torch.Size, weight: torch.Size, *, out_shape: torch.Size) -> int:
        return 2 * math.prod(x) * weight[0]

    try:
        graph = CutGraph(with_step(mixed), (3, 16, 16))
    finally:
        del flop_registry[torch.ops.test_cost.mixed]
    assert graph.uncounted == ()
    product = with_step(lambda x, weight: torch.einsum("bchw,dc->bdhw", x, weight))
    assert graph.macs(None, None) == network_cost(product, (3, 16, 16)).macs


FREE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "element by element": lambda x, w: F.gelu(x) * F.hardswish(x).clamp_(0) + F.prelu(x, w[0]) / (1 + x.abs().sqrt()),
    "gated": lambda x, w: F.glu(torch.where(x > 0, x, w)) ** 2,
    "norms": lambda x, w: (
        F.layer_norm(F.group_norm(F.instance_norm(x), 2), (8, 8)) + F.normalize(x) + x.std(1, keepdim=True)
    ),
    "batch and other norms": lambda x, w: (
        F.batch_norm(x, x[0, :, 0, 0].detach(), x[0, :, 0, 0].detach().abs())
        + F.rms_norm(x, (8,))
        + F.local_response_norm(x, 2)
    ),
    "softmax": lambda x, w: x.softmax(1) + x.log_softmax(2) + x.sigmoid(),
    "pooling": lambda x, w: (
        F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 4) + F.lp_pool2d(x, 2, 2)
    ),
    "reductions": lambda x, w: (
        x.sum(1, True) + x.amax(1, True) + x.logsumexp(1, True) + x.cumsum(1) + x.norm(dim=1)[:, None]
    ),
    "sorting": lambda x, w: x.topk(4, dim=1).values + x.sort(1).values[:, :4] + x.argmax(1)[:, None],
    "resampling": lambda x, w: (
        F.interpolate(x, 12, mode="bicubic") + F.interpolate(x, 12, mode="bilinear", antialias=True)
    ),
    "grid sampling": lambda x, w: F.grid_sample(
        x, x[..., :2, 0, None].tanh().movedim(1, 3)[..., [0, 0]], align_corners=False
    ),
    "indexing": lambda x, w: x[:, [1, 0, 2]].gather(1, x[:, :3].long() % 3).index_select(2, torch.tensor([1])),
    "copies": lambda x, w: F.pad(torch.cat([x, x.flip(1)], 1).roll(1, 2), (1, 1, 1, 1), mode="reflect").contiguous(),
    "windows": lambda x, w: (
        F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2) + F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2)[..., :8, :8]
    ),
    "views": lambda x, w: x.unfold(2, 2, 2).flatten(2).transpose(1, 2).reshape(len(x), 8, -1, 2).chunk(2, 1)[0],
    "factories": lambda x, w: (
        x + torch.arange(8) + torch.zeros_like(x) + torch.linspace(0, 1, 8) + x.new_full((1,), 2.0)
    ),
    "dropout": lambda x, w: F.feature_alpha_dropout(F.dropout(x, training=False), training=False),
}


@pytest.mark.parametrize("kind", FREE)
def test_what_is_free_by_the_convention_is_not_listed(kind: str) -> None:
    graph = CutGraph(with_step(FREE[kind]), (3, 16, 16))
    assert graph.uncounted == ()
    assert graph.macs(None, None) == 64 * (8 * 12 + 8 * 8)


@pytest.mark.parametrize(
    ("operations", "words"),
    [
        (["a: x.y"], "leave out a: x.y: there"),
        (["a: x.y", "b: x.z", "c: x.y"], "leave out a: x.y, b: x.z, c: x.y: there"),
        (["a: x.y", "b: x.z", "c: x.y", "d: x.z", "e: x.z"], "leave out a: x.y, b: x.z, c: x.y and 2 more: there"),
    ],
)
def test_a_limit_on_macs_warns_where_the_count_leaves_work_out(operations: list[str], words: str) -> None:
    with pytest.warns(UserWarning, match=f"The MACs of net {words}") as warned:
        Budget(max_macs=1e9).warn_of_uncounted({"plain": [], "net": operations})
    assert len(warned) == 1


def test_a_search_under_a_limit_on_macs_warns_of_work_that_they_leave_out() -> None:
    class Fourier(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft2(x).abs()

    layers = [nn.Conv2d(3, 4, 3), Fourier(), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    pool = Pool([live(shake(nn.Sequential(*layers, nn.Linear(4, 3)), 0), "waves")], (3, 16, 16))
    with pytest.warns(UserWarning, match=r"The MACs of waves leave out 1: aten\._fft_r2c: there is no FLOP formula"):
        pool.search([noise(8, 3, 16, 16)], [noise(8, 3, 16, 16, seed=1)], budget=Budget(max_macs=1e9))


def test_no_limit_on_macs_no_warning_of_what_they_leave_out(recwarn: pytest.WarningsRecorder) -> None:
    Budget(max_params=1e9).warn_of_uncounted({"net": ["a: x.y"]})
    assert not recwarn.list


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("25M", Budget(max_macs=25e6)),
        ("1.2 G MACs", Budget(max_macs=1.2e9)),
        ("mean 10M, 40M", Budget(mean_macs=10e6, max_macs=40e6)),
        ("5M parameters,20ms", Budget(max_params=5e6, max_latency_ms=20)),
        ("8 MB", Budget(max_activation_bytes=8e6)),
        ("50%", Budget(max_macs=100.0)),
        ("mean 25 %", Budget(mean_macs=50.0)),
    ],
)
def test_limits_in_words(words: str, expected: Budget) -> None:
    assert Budget.of(words, cheapest_macs=lambda: 200.0) == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("", "'' is no limit"),
        ("25 apples", "'25 apples' is no limit"),
        ("mean 20 ms", "'mean 20 ms' is no limit"),
        ("50% parameters", "is no limit"),
        ("25M, 30M", "limits max_macs twice"),
        ("0M", "must be positive"),
        ("50%", "no sources are known here"),
    ],
)
def test_words_that_are_no_limits_are_refused(words: str, reason: str) -> None:
    with pytest.raises(BudgetError, match=reason):
        Budget.of(words)
