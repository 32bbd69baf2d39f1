"""A question that two networks answer together: each sees one colour of an image alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class OneColour(nn.Module):
    """Sees one colour of an image."""

    def __init__(self, colour: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        generator = torch.Generator().manual_seed(colour)
        with torch.no_grad():
            for name, x in self.named_parameters():
                x.copy_(torch.rand(x.shape, generator=generator) * 0.5 if name.endswith("weight") else 0.2 + 0 * x)
            self.first[0].weight[:, torch.arange(3) != colour] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.first(x)))


def two_colours(count: int) -> tuple[Tensor, Tensor]:
    """Whether an image is redder than a threshold less its green, and some noise in all."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(count, 3, generator=generator)
    images = colours[:, :, None, None] + 0.05 * torch.randn(count, 3, 16, 16, generator=generator)
    return images.clamp(0, 1), (colours[:, 0] + colours[:, 1] > 1).long()
