from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest
import timm
import torch
from doubles.tensors import noise
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.sources.source import load_source

SIZE = (3, 16, 16)


def difference(network: nn.Module, size: tuple[int, int, int]) -> str | None:
    """What a network does in train mode alone."""
    return CutGraph(network, size).train_mode_difference()


class Network(nn.Module):
    """Two convolutions, a linear layer, and what a network may do differently in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 5)
        self.relu, self.dropout, self.norm, self.p = nn.ReLU(inplace=True), nn.Dropout(0.3), nn.BatchNorm2d(4), 0.2
        # With grandchildren, so that no trace takes the network's parts for one small module.
        self.deep = nn.Sequential(nn.Sequential(nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.middle(self.relu(self.a(x))))

    def middle(self, x: Tensor) -> Tensor:
        return self.b(x)

    def tail(self, x: Tensor) -> Tensor:
        return self.head(self.deep(x).mean((2, 3)))


class Auxiliary(Network):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        features = self.middle(self.relu(self.a(x)))
        if self.training:
            return self.tail(features), self.head(features.amax((2, 3)))
        return self.tail(features)


class Skips(Network):
    def middle(self, x: Tensor) -> Tensor:
        return x if self.training else self.b(x)


class Scales(Network):
    def middle(self, x: Tensor) -> Tensor:
        return self.b(x) * (0.5 if self.training else 1.0)


class Guards(Network):
    def middle(self, x: Tensor) -> Tensor:
        if self.training and self.p > 0:
            x = F.dropout(x, self.p)
        return self.b(x)


class Chooses(Network):
    def middle(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(x, self.p if self.training else 0.0, self.training))


class Normalises(Network):
    def middle(self, x: Tensor) -> Tensor:
        mean, var = self.norm.running_mean, self.norm.running_var
        return self.b(F.batch_norm(x, mean, var, training=self.training))


class Writes(Network):
    def middle(self, x: Tensor) -> Tensor:
        x = self.b(x)
        if self.training:
            x[:, 0] = 0
        return x


class LooksAtValues(Network):
    def middle(self, x: Tensor) -> Tensor:
        if self.training and x.mean() > 0:
            x = -x
        return self.b(x)


class Asks(Network):
    @property
    def shift(self) -> float:
        return sum(1.0 for _ in range(2) if self.training)

    def middle(self, x: Tensor) -> Tensor:
        return self.b(x + self.shift)


class Around(nn.Sequential):
    """A network in whose part the difference is."""


DIFFERENT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another output": (Auxiliary, "amax where eval mode has the output"),
    "a layer less": (Skips, r"deep.0.0 \(Identity\) where eval mode has b \(Conv2d\)"),
    "another number": (Scales, "mul where eval mode has other arguments"),
    "dropout behind a question": (Guards, r"functional_dropout_\d \(Dropout\) where eval mode has b \(Conv2d\)"),
    "another dropout": (Chooses, r"functional_dropout_\d \(Dropout\) where eval mode has other arguments"),
    "functional BatchNorm": (Normalises, "batch_norm where eval mode has other arguments"),
    "writing": (Writes, r"setitem where eval mode has deep.0.0"),
    "values": (LooksAtValues, "in train mode it cannot be traced: TraceError"),
    "a property": (Asks, "add where eval mode has other arguments"),
    "inside a part": (lambda: Around(nn.Identity(), Scales()), "mul in 1 where eval mode has other arguments"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_only_train_mode_does_is_found_and_fragments_do_what_eval_mode_does(kind: str) -> None:
    make, words = DIFFERENT[kind]
    network = make().train()
    graph = CutGraph(network, SIZE)
    assert re.match(words, graph.train_mode_difference() or "")
    assert all(module.training for module in network.modules())
    images = noise(2, *SIZE)
    expected = network.eval()(images)
    fragment = graph.fragment(None, None)
    assert torch.equal(fragment.eval()(images), expected)
    assert torch.equal(fragment.train()(images), expected)


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) if self.training else x


class Handed(Network):
    def middle(self, x: Tensor) -> Tensor:
        x = F.dropout(self.b(x), self.p, training=self.training)
        return F.dropout2d(x, p=self.p, training=self.training, inplace=True)


class Follows(Network):
    def middle(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.b(x)))


class Small(Network):
    def __init__(self) -> None:
        super().__init__()
        self.noise = Noise()

    def middle(self, x: Tensor) -> Tensor:
        return self.noise(self.b(x))


class Caches(Network):
    """The same numbers in both modes, kept from the first call on in eval mode, as LeViT does."""

    kept: Tensor | None = None

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            kept = self.head.weight[0, 0]
        else:
            kept = self.kept = self.head.weight[0, 0] if str(x.device) and self.kept is None else self.kept
        return self.b(x) * kept


class Guarded(Network):
    def middle(self, x: Tensor) -> Tensor:
        return F.dropout(self.b(x), p=0.0) if self.training and self.p > 1 else self.b(x)


class AsksInVain(Network):
    """Mentions `training` where no forward passes."""

    def report(self) -> bool:
        return self.training

    def train(self, mode: bool = True) -> AsksInVain:
        super().train(mode and not self.training)
        return self


@pytest.mark.parametrize("make", [Network, Handed, Follows, Small, Caches, Guarded, AsksInVain])
def test_what_follows_train_and_eval_is_no_difference(make: Callable[[], nn.Module]) -> None:
    network = make().eval()
    assert difference(network, SIZE) is None
    fragment, images = CutGraph(network, SIZE).fragment(None, None), noise(2, *SIZE)
    for mode in (True, False):
        torch.manual_seed(0)
        expected = network.train(mode)(images)
        torch.manual_seed(0)
        assert torch.equal(fragment.train(mode)(images), expected)


def test_a_network_is_traced_in_train_mode_only_when_that_is_asked_for() -> None:
    modes: list[bool] = []

    class Noted(Scales):
        def forward(self, x: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(x)

    graph = CutGraph(Noted(), SIZE)
    assert modes == [False]
    assert graph.train_mode_difference() is not None
    assert modes == [False, True]


class LooksAtSizes(Scales):
    def tail(self, x: Tensor) -> Tensor:
        return super().tail(x if x.shape[2] > 2 else -x)


@pytest.mark.parametrize(("make", "way"), [(Scales, "symbolic"), (LooksAtSizes, "example")])
def test_it_is_found_at_every_input_size(make: type[Network], way: str) -> None:
    graph = CutGraph(make(), SIZE)
    assert graph.way == way
    for size in (SIZE, (3, 24, 24)):
        assert graph.at(size).train_mode_difference() == "mul where eval mode has other arguments"


class Draws(Network):
    """Draws and counts as it runs in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def middle(self, x: Tensor) -> Tensor:
        if self.training:
            self.count += 1
            self.drawn = random.random() + float(torch.rand(()))
        return self.b(x)


def test_looking_for_differences_leaves_network_and_random_numbers_as_they_were() -> None:
    network = Draws().eval()
    network.a.train()
    modes, state = [module.training for module in network.modules()], (random.getstate(), torch.get_rng_state())
    difference(network, SIZE)
    assert [module.training for module in network.modules()] == modes
    assert network.count == 0
    assert not hasattr(network, "drawn")
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])


def test_torchvisions_auxiliary_classifier_is_found_and_its_plain_network_has_no_difference() -> None:
    auxiliary = difference(models.googlenet(init_weights=False), (3, 64, 64))
    assert (auxiliary or "").startswith("adaptive_avg_pool2d in aux1 where eval")
    plain = load_source("torchvision:googlenet", pretrained=False)
    assert difference(plain.module, (3, 64, 64)) is None


@pytest.mark.parametrize(("dropout", "matters"), [(0.0, False), (0.1, True)])
def test_a_function_told_to_drop_in_train_mode_matters_where_there_is_something_to_drop(
    dropout: float, matters: bool
) -> None:
    network = models.swin_transformer.SwinTransformer([4, 4], 24, [2], [2], [4, 4], attention_dropout=dropout)
    found = difference(network, (3, 32, 32))
    assert found is None if not matters else "shifted_window_attention in features.1.0.attn" in (found or "")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {"drop_rate": 0.2, "drop_path_rate": 0.2}),
        ("test_efficientnet", {"drop_rate": 0.2, "drop_path_rate": 0.2}),
        ("test_vit", {"drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_path_rate": 0.1, "patch_drop_rate": 0.5}),
        ("swiftformer_xs", {}),
        ("pit_ti_distilled_224", {}),
    ],
)
def test_dropout_and_stochastic_depth_of_timms_networks_are_no_difference(name: str, options: dict[str, float]) -> None:
    network = timm.create_model(name, **options)
    assert difference(network, network.pretrained_cfg["input_size"]) is None
