"""Small sources whose every layer counts, and what runs in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from doubles.tensors import seeded
from safetensors.torch import save_file
from torch import nn

from lightning_stitch.recipe import Preprocessing
from lightning_stitch.sources.source import Source, load_source


def shake(module: nn.Module, seed: int) -> nn.Module:
    """Give all weights and running statistics random values, zero-initialised ones too, so that every layer counts."""
    generator = seeded(seed)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.2, generator=generator)
            part.running_mean.normal_(0, 0.2, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, generator=generator)
            if part.bias is not None:
                part.bias.data.normal_(0, 0.1, generator=generator)
    return module


@cache
def donor(architecture: str, seed: int = 0) -> Source:
    """A small timm network whose random weights leave no layer without effect."""
    source = load_source(architecture, pretrained=False)
    shake(source.module, seed)
    return source


def live(module: nn.Module, name: str, *, size: int = 16, channels: int = 3, fixed_size: bool = False) -> Source:
    """A hand-written network as a source."""
    preprocessing = Preprocessing((channels, size, size), (0.4,) * channels, (0.3,) * channels, fixed_size=fixed_size)
    return load_source(module, name=name, preprocessing=preprocessing)


def plain(
    name: str, widths: Sequence[int], *, seed: int, classes: int = 4, strides: Sequence[int] = (1, 2, 1)
) -> Source:
    """Three blocks of convolution and ReLU, pooling and a linear layer; its cuts are "0", "1" and the vector "2"."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in zip((3, *widths), widths, strides, strict=False):
        layers.append(nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()))
    layers[-1] = nn.Sequential(*layers[-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return live(shake(nn.Sequential(*layers, nn.Linear(widths[-1], classes)), seed), name)


@contextmanager
def images_seen(source: Source) -> Iterator[list[int]]:
    """How many images go through a source's first layer, one entry for each time that it runs."""
    seen: list[int] = []
    first = next(module for module in source.module.modules() if isinstance(module, nn.Conv2d))
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    yield seen
    hook.remove()


def assert_same_weights(module: nn.Module, expected: Mapping[str, torch.Tensor]) -> None:
    torch.testing.assert_close(dict(module.state_dict()), dict(expected), rtol=0, atol=0)


def write_local(source: Source, folder: Path) -> None:
    """A folder in timm's layout, for "local-dir:"."""
    folder.mkdir()
    save_file(dict(source.module.state_dict()), folder / "model.safetensors")
    config = {"architecture": source.ref.architecture, "num_classes": 1000, "pretrained_cfg": {}}
    (folder / "config.json").write_text(json.dumps(config))
