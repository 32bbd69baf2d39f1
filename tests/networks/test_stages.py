"""Networks that stop when they are sure: an image runs as far as it must, and gets what running everything gives."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from doubles.small_sources import donor, images_seen
from doubles.tensors import digits
from torch import Tensor, nn

from lightning_stitch import Budget, CalibrationSettings, Pool, SearchResult, StitchedNetwork
from lightning_stitch.heads import HeadSettings, StagedHead
from lightning_stitch.search import Ranked

SHAPE = (3, 64, 64)
IMAGES, LABELS = digits(160, 64, first=20, classes=4)
NEW = digits(30, 64, first=300, classes=4)[0]


@cache
def pool() -> Pool:
    return Pool(
        [donor("test_resnet"), donor("test_efficientnet")], SHAPE, settings=CalibrationSettings(granularity="stages")
    )


@cache
def result() -> SearchResult:
    cheapest = min(part.cost.macs for part in pool().parts)
    budget = Budget(mean_macs=0.8 * cheapest)
    return pool().search([IMAGES[:16]], [(IMAGES, LABELS)], max_candidates=6, budget=budget, sizes=[32])


def staged() -> list[Ranked]:
    found = [r for r in result().ranked if r.candidate.kind == "staged"]
    assert found
    return found


def fitted(ranked: Ranked) -> tuple[StitchedNetwork, StagedHead]:
    network = pool().assemble(ranked.candidate)
    with torch.no_grad():
        head, _ = HeadSettings.of("ridge", num_classes=4).fit_for(network.recipe, network(IMAGES), LABELS)
    assert isinstance(head, StagedHead)
    return network, head


class _Runs:
    """How many images each fragment of a network runs."""

    def __init__(self, network: StitchedNetwork) -> None:
        self.images = [0] * len(network.fragments)
        for number, fragment in enumerate(network.fragments):
            fragment.register_forward_hook(lambda module, inputs, output, number=number: self._count(number, output))

    def _count(self, number: int, output: Tensor) -> None:
        self.images[number] += len(output)


@pytest.mark.parametrize("setting", [0, None, -1])
def test_a_batch_that_is_split_gets_in_order_what_running_every_stage_and_choosing_gives(setting: int | None) -> None:
    for ranked in staged():
        network, head = fitted(ranked)
        if setting is not None:
            head.point = range(len(head.settings))[setting]
        with torch.no_grad():
            answers, stops = network.in_stages(NEW, head)
            readouts = network(NEW)
        torch.testing.assert_close(answers, head(readouts), rtol=1e-4, atol=1e-5)
        assert torch.equal(stops, head.stops(readouts))
        if setting is None:
            assert 0 < (stops > 0).sum() < len(NEW)


def test_each_fragment_runs_for_the_images_alone_that_reach_its_stage_and_once() -> None:
    for ranked in staged():
        network, head = fitted(ranked)
        runs = _Runs(network)
        with torch.no_grad():
            _, stops = network.in_stages(NEW, head)
        for stage, images in zip(network.recipe.fragment_stages, runs.images, strict=True):
            assert images == int((stops >= stage).sum())


def test_a_batch_where_all_stop_pays_for_the_front_alone_and_no_image_is_none() -> None:
    network, head = fitted(staged()[0])
    head.settings.fill_(-math.inf)
    runs = _Runs(network)
    with torch.no_grad():
        answers, stops = network.in_stages(NEW, head)
        assert not stops.any()
        assert sum(runs.images) == len(NEW) * network.recipe.fragment_stages.count(0)
        torch.testing.assert_close(answers, head.outputs(network(NEW))[0], rtol=1e-4, atol=1e-5)


def test_one_image_gets_what_it_gets_in_a_batch() -> None:
    network, head = fitted(staged()[0])
    with torch.no_grad():
        together, _ = network.in_stages(NEW, head)
        alone = torch.cat([network.in_stages(image[None], head)[0] for image in NEW])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_folded_networks_stop_alike() -> None:
    network, head = fitted(staged()[0])
    with torch.no_grad():
        plain, folded = network.in_stages(NEW, head), network.fused().in_stages(NEW, head)
    assert (plain[1] == folded[1]).float().mean() > 0.95  # a threshold may lie within rounding
    same = plain[1] == folded[1]
    torch.testing.assert_close(plain[0][same], folded[0][same], rtol=1e-2, atol=1e-2)


def test_gradients_pass_through_what_ran() -> None:
    network, head = fitted(staged()[0])
    images = NEW.clone().requires_grad_()
    answers, _ = network.in_stages(images, head)
    answers.square().sum().backward()
    assert images.grad is not None
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_a_network_that_is_exported_runs_all_stages_and_gives_the_same() -> None:
    network, head = fitted(staged()[0])

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.head = network, head

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.network(images))

    exported = torch.export.export(Whole().eval(), (NEW,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(NEW), network.in_stages(NEW, head)[0], rtol=1e-4, atol=1e-5)


def test_a_network_says_where_its_images_stop() -> None:
    ranked = staged()[0]
    words = copy.deepcopy(pool().assemble(ranked.candidate)).describe()
    stages = ranked.candidate.recipe.stages
    assert stages is not None
    assert "stops when sure:" in words
    assert f"{stages.chosen.mean_macs / 1e6:.1f} M MACs on average; can be set from" in words
    assert words.count("of images behind") == len(stages.taps)


def test_searching_runs_no_source_more_than_a_search_without_stages() -> None:
    source = donor("test_resnet")

    def runs(**options: object) -> int:
        own = Pool([source], SHAPE, settings=CalibrationSettings(granularity="stages"))
        for part in own.parts:
            part._fused = part.pieces
        with images_seen(source) as seen:
            own.search([IMAGES[:16]], [(IMAGES, LABELS)], max_candidates=2, sizes=[], **options)
        return sum(seen)

    macs = pool().parts[0].cost.macs
    assert runs(budget=Budget(mean_macs=0.9 * macs)) == runs(budget=Budget(max_macs=10 * macs))
