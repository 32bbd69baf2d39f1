"""Fragments are where their input is, whatever device the network was traced on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_stitch import CutGraph


class Positions(nn.Module):
    """Makes a tensor where its weights are, so that a trace holds the device they were on."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + torch.arange(x.shape[-1], device=self.first.weight.device, dtype=x.dtype)
        return self.second(x).mean((2, 3))


def test_a_network_traced_without_memory_runs_where_its_input_is() -> None:
    torch.manual_seed(0)
    network = Positions().eval()
    with torch.device("meta"):
        bare = Positions().eval()
    fragment = CutGraph(bare, (3, 16, 16)).fragment(None, None).to_empty(device="cpu")
    fragment.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(fragment(images), network(images))
