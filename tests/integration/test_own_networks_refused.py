"""Networks of users that cannot be loaded or cut: the error says what to do."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from doubles.small_sources import live
from torch import Tensor, nn

from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.errors import CutError, SourceError

SIZE = (3, 16, 16)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.b(self.a(x)))

    def tail(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


class Outputs(Own):
    def __init__(self, pick: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.pick = pick

    def forward(self, x: Tensor) -> object:
        x = self.b(self.a(x))
        return self.pick(x, self.tail(x))


class NeedsMask(Own):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.tail(self.a(x) * mask)


class NeedsNamedMask(Own):
    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return self.tail(self.a(x) * mask)


class WithBackbone(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def compiled_in_place() -> nn.Module:
    network = Own()
    network.compile()
    return network


ONE = r"not one tensor\. Give a part of it that returns one, or wrap it in a module whose forward picks one"
DEFAULTS = r"Give its other inputs defaults, or wrap it in a module whose forward takes images and supplies the rest"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Outputs(lambda x, y: {"map": x, "logits": y}), f"returns a dict of 'map', 'logits', {ONE}"),
        (lambda: Outputs(lambda x, y: (x, y)), f"returns a tuple of 2, {ONE}"),
        (lambda: Outputs(lambda x, y: [y]), f"returns a list of 1, {ONE}"),
        (lambda: Outputs(lambda x, y: y.chunk(2, 1)), f"returns a tuple of 2, {ONE}"),
        (lambda: Outputs(lambda x, y: None), f"returns None, {ONE}"),
        (lambda: Outputs(lambda x, y: y.shape[0]), f"returns a int, {ONE}"),
        (NeedsMask, rf"NeedsMask cannot be called .* alone: missing a required .*'mask'\. {DEFAULTS}"),
        (NeedsNamedMask, rf"NeedsNamedMask cannot be called .* alone: missing a required .*'mask'\. {DEFAULTS}"),
        (lambda: torch.compile(Own()), r"OptimizedModule is compiled, .*before torch\.compile, .*compile the stitched"),
        (compiled_in_place, r"Own is compiled, and cannot be cut"),
        (lambda: WithBackbone(torch.compile(Own())), r"WithBackbone, in its part 'backbone', is compiled"),
        (lambda: torch.jit.script(Own()), r"is a ScriptModule, .*Give the module that it was scripted or traced from"),
        (lambda: WithBackbone(torch.jit.script(Own())), r"WithBackbone, in its part 'backbone', is a ScriptModule"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_what_to_do(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(CutError, match=words):
        CutGraph(make().eval(), SIZE)


class Holds(Own):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Lazy(Own):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.LazyConv2d(4, 1)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Holds, r"Holds cannot be copied: TypeError: .*lock.*python:package\.module:factory"),
        (Lazy, r"2 tensors \(b\.bias, \.\.\.\) are on the meta device, or lazy.* run a batch of images through"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_what_to_do(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        live(make(), "own")
