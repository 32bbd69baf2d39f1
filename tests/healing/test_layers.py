from __future__ import annotations

import copy
import math

import pytest
import torch
from doubles.small_sources import shake
from doubles.tensors import distance, noise, normal
from sklearn.linear_model import Ridge
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, fx, nn

from lightning_stitch.cutting.copies import with_tensors
from lightning_stitch.healing import layers as layer_healing
from lightning_stitch.healing.healing import heal_piece
from lightning_stitch.healing.layers import Sampling, solve_layer

# -- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs"), [(60, 7), (20, 30)])
@pytest.mark.parametrize("strength", [1e-3, 1e-1, 10.0])
def test_the_change_is_ridge_regression_of_what_the_layer_gets_wrong(
    rows: int, inputs: int, has_bias: bool, strength: float
) -> None:
    layer = nn.Linear(inputs, 4).double()
    x, y = 2 + normal(rows + 10, inputs), normal(rows + 10, 4, seed=1)
    with torch.no_grad():
        # So that any change is better than none, on the rows that are held out.
        y[rows:] = layer(x[rows:]) + 100
        wrong = (y - layer(x))[:rows].numpy()
        fitted = x[:rows].numpy() - (x[:rows].mean(0).numpy() if has_bias else 0)
        reference = Ridge(alpha=strength * (fitted**2).sum() / inputs, fit_intercept=has_bias)
        reference.fit(x[:rows].numpy(), wrong)
        y[rows:] = layer(x[rows:]) + torch.from_numpy(reference.predict(x[rows:].numpy()))
        solved = solve_layer(layer, x[:, None], y[:, None], num_fitted=rows, has_bias=has_bias, strengths=(strength,))
    assert solved.strength == strength
    assert solved.weight is not None
    assert torch.allclose(solved.weight - layer.weight, torch.from_numpy(reference.coef_), atol=1e-8)
    assert (solved.shift is not None) == has_bias
    if solved.shift is not None:
        assert torch.allclose(solved.shift, torch.from_numpy(reference.intercept_), atol=1e-8)


def test_of_all_strengths_the_one_is_taken_that_explains_held_out_rows_best() -> None:
    layer = nn.Linear(12, 3).double()
    x = normal(70, 12)
    with torch.no_grad():
        y = layer(x) + 0.3 * x @ normal(12, 3, seed=2) + 0.8 * normal(70, 3, seed=3)
        left = {}
        for strength in layer_healing.STRENGTHS:
            one = solve_layer(layer, x[:, None], y[:, None], num_fitted=40, has_bias=True, strengths=(strength,))
            if one.weight is not None and one.shift is not None:
                given = x[40:] @ one.weight.T + layer.bias + one.shift
                left[strength] = float((y[40:] - given).square().sum())
        solved = solve_layer(layer, x[:, None], y[:, None], num_fitted=40, has_bias=True)
    assert len(left) > 2
    assert solved.strength == min(left, key=left.__getitem__)
    assert solved.strength not in (min(left), max(left))


def test_a_layer_that_no_strength_makes_better_stays_as_it_is() -> None:
    layer = nn.Linear(12, 3).double()
    x = normal(30, 12)
    with torch.no_grad():
        y = layer(x) + torch.cat([normal(20, 3, seed=2), torch.zeros(10, 3)])
        solved = solve_layer(layer, x[:, None], y[:, None], num_fitted=20, has_bias=True)
    assert (solved.strength, solved.weight, solved.shift) == (None, None, None)


# -- one piece -------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    """Two layers that the graph calls as one."""

    def __init__(self, *, twice: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), twice

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        x = self.second(self.first(x).relu())
        return self.second(x) if self.twice else x


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Again(nn.Module):
    """One layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Free(nn.Module):
    """A weight that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.mean((2, 3)), self.weight)


class Two(nn.Module):
    """A layer inside of one that takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Beside()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, 2 * x)


class Beside(Inner):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.second(self.first(x) + y)


class ByLayer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Inner) or (next(m.children(), None) is None and not isinstance(m, Free))


LAYERS = {
    "pointwise": nn.Conv2d(3, 8, 1),
    "k x k, stride, padding": nn.Conv2d(3, 8, 3, 2, padding=1),
    "dilated": nn.Conv2d(3, 8, 3, padding=2, dilation=2),
    "kernel of two sizes": nn.Conv2d(3, 8, (3, 2), (1, 2), padding=(1, 0)),
    "padding same": nn.Conv2d(3, 8, 3, padding="same"),
    "Conv2dSame": Conv2dSame(3, 8, 3, 2),
    "depthwise": nn.Conv2d(3, 3, 3, padding=1, groups=3),
    "grouped": nn.Conv2d(3, 6, 3, groups=3),
    "no bias": nn.Conv2d(3, 8, 3, bias=False),
    "no bias, then BatchNorm": nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)),
    "bias, then BatchNorm": nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
    "linear on channels last": nn.Sequential(Last(), nn.Linear(3, 8)),
}
OWN = noise(32, 3, 9, 9)


def piece_of(network: nn.Module) -> fx.GraphModule:
    """A network as a fragment, in eval mode; the graph calls its layers."""
    network = shake(nn.Sequential(copy.deepcopy(network)), 0).eval()
    return fx.GraphModule(network, ByLayer().trace(network))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_makes_up_for_channels_that_are_scaled_before_it(kind: str) -> None:
    piece = piece_of(LAYERS[kind])
    # Channel by channel, so that depthwise layers can undo it, too; the last images come in portions of their own.
    fed = torch.tensor([0.5, 2.0, 1.5]).view(1, 3, 1, 1) * OWN
    healed = heal_piece(piece, fed.split(10), OWN.split(7), num_held_out=8)
    assert distance(torch.cat(healed.source_portions), piece(OWN)) < 1e-6
    assert distance(piece(fed), piece(OWN)) > 0.1
    assert distance(torch.cat(healed.portions), piece(OWN)) < 0.01
    assert healed.unsolvable == {}
    variant = with_tensors(piece, healed.tensors)
    assert distance(variant(fed), torch.cat(healed.portions)) < 1e-6


def test_without_a_bias_the_mean_is_moved_in_the_norm_behind() -> None:
    piece = piece_of(LAYERS["no bias, then BatchNorm"])
    healed = heal_piece(piece, [OWN + torch.tensor([1.0, -2.0, 3.0]).view(1, 3, 1, 1)], [OWN], num_held_out=8)
    assert sorted(healed.tensors) == ["0.0.weight", "0.1.running_mean"]
    assert distance(torch.cat(healed.portions), piece(OWN)) < 1e-3


def test_a_norm_that_others_read_through_keeps_its_mean() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x + self.norm(x)

    healed = heal_piece(piece_of(Branches()), [2 * OWN], [OWN], num_held_out=8)
    assert sorted(healed.tensors) == ["0.layer.weight"]


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_fed_as_in_its_source_stays_as_it_is(kind: str) -> None:
    piece = piece_of(LAYERS[kind])
    healed = heal_piece(piece, OWN.split(10), OWN.split(7), num_held_out=8)
    assert distance(torch.cat(healed.portions), piece(OWN)) < 1e-5
    state = {**dict(piece.named_parameters()), **dict(piece.named_buffers())}
    assert all(distance(x, state[name]) < 1e-4 for name, x in healed.tensors.items())


def test_layers_inside_of_one_that_runs_as_a_whole_are_healed_in_their_order() -> None:
    piece = piece_of(Inner())
    fed = torch.tensor([0.5, 2.0, 1.5]).view(1, 3, 1, 1) * OWN
    healed = heal_piece(piece, fed.split(10), OWN.split(7), num_held_out=8)
    assert list(healed.strengths) == ["0.first", "0.second"]
    assert distance(torch.cat(healed.portions), piece(OWN)) < 0.01
    assert distance(with_tensors(piece, healed.tensors)(fed), torch.cat(healed.portions)) < 1e-6
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in piece.modules())


@pytest.mark.parametrize(
    ("network", "reasons"),
    [
        (Again(), {"0.layer": "called 2 times"}),
        (Inner(twice=True), {"0.second": "not called exactly once"}),
        (Free(), {"0.weight": "no layer"}),
        (
            Two(),
            dict.fromkeys(("0.inner.first", "0.inner.second"), "inside of a Beside of several inputs or with hooks"),
        ),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), {"0": "is not padded with zeros"}),
        (nn.ConvTranspose2d(3, 4, 2), {"0": "a ConvTranspose2d"}),
        (StdConv2d(3, 4, 1), {"0": "a StdConv2d"}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_solved_is_left_alone_and_listed(network: nn.Module, reasons: dict[str, str]) -> None:
    network = nn.Sequential(network).eval()
    piece = fx.GraphModule(network, ByLayer().trace(network))
    healed = heal_piece(piece, [2 * OWN], [OWN], num_held_out=8)
    assert healed.unsolvable == reasons
    assert not {name for name in healed.tensors if name.rpartition(".")[0] in reasons}


def test_layers_of_more_inputs_than_the_cap_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 5, 1))
    monkeypatch.setattr(layer_healing, "MAX_INPUTS", 9)
    healed = heal_piece(piece_of(layers), [2 * OWN], [OWN], num_held_out=8)
    assert healed.unsolvable == {"0.0": "27 inputs, more than 9"}
    assert list(healed.strengths) == ["0.1", "0.2"]


def test_rows_are_bounded_whatever_the_image_size_and_the_number_of_images() -> None:
    def most(count: int, size: int) -> int:
        sampling, x = Sampling(count, seed=0), noise(count, 3, size, size)
        layers = [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 500, 1)]
        with torch.no_grad():
            rows = [sampling.rows(layer, x, first_image=0).flatten(0, 1).shape for layer in layers]
            given = [sampling.outputs(layer, layer(x), first_image=0).flatten(0, 1).shape for layer in layers]
        assert [a[:2] for a in rows] == [b[:2] for b in given]
        assert [a[0] for a in rows] == [math.ceil(20 * inputs / count) * count for inputs in (27, 9, 3)]
        return max(shape.numel() for shape in (*rows, *given))

    assert most(8, 20) == most(8, 40)
    assert most(64, 20) < 1.3 * most(8, 20)
    wide, many = nn.Linear(2000, 2), torch.zeros(8, 1000, 2000)
    assert len(Sampling(8, seed=0).rows(wide, many, first_image=0).flatten(0, 1)) == layer_healing.MAX_ROWS
