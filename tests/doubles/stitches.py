"""Stitches whose every number counts, and networks that they join."""

from __future__ import annotations

import copy
import dataclasses

from doubles.tensors import seeded
from torch import fx, nn

from lightning_stitch.recipe import Placement, StitchSpec
from lightning_stitch.stitching.folding import fold_into_consumer, fold_into_producer
from lightning_stitch.stitching.stitches import Stitch


def filled(spec: StitchSpec, seed: int = 0) -> Stitch:
    """An explicit stitch whose every number counts."""
    stitch = Stitch(dataclasses.replace(spec, placement="explicit"))
    for tensor in stitch.state_dict().values():
        tensor.normal_(0, max(tensor.shape[-1], 1) ** -0.5, generator=seeded(seed))
    return stitch


def joined(before: fx.GraphModule, stitch: Stitch, after: fx.GraphModule, placement: Placement) -> nn.Sequential:
    """Sender, stitch and receiver in a row, on copies of their own, the stitch's numbers where the placement says."""
    before, after = copy.deepcopy(before), copy.deepcopy(after)
    joint = Stitch(dataclasses.replace(stitch.spec, placement=placement))
    joint.load_state_dict({key: stitch.state_dict()[key] for key in joint.state_dict()})
    if placement == "producer":
        fold_into_producer(before, stitch)
    elif placement == "consumer":
        fold_into_consumer(after, stitch)
    return nn.Sequential(before, joint, after).eval()
