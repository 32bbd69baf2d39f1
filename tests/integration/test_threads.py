"""Threads of one process: some serve finished networks while others load, cut, count and compose."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from doubles.pools import records
from doubles.published_networks import classifier, outputs
from doubles.small_sources import assert_same_weights, donor, plain
from doubles.tensors import digits, noise
from torch import Tensor, nn

from lightning_stitch import Pool, StitchedClassifier, compose, load_source, network_cost, preflight
from lightning_stitch.cutting.graph import CutGraph
from lightning_stitch.errors import JournalError, StitchError
from lightning_stitch.io.journal import Journal
from lightning_stitch.training.checkpoints import open_classifier


def state_of_the_process() -> list[object]:
    attention = torch.backends.cuda
    return [
        nn.Module.__call__,
        nn.Module.__getattr__,
        torch.arange,
        torch.fx._symbolic_trace._Patcher,
        torch.backends.mha.get_fastpath_enabled(),
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        torch.utils._device.CURRENT_DEVICE,
        torch.get_default_dtype(),
        len(nn.modules.module._global_forward_pre_hooks),
        len(nn.modules.module._global_forward_hooks),
        torch.get_rng_state().tolist(),
        random.getstate(),
    ]


@contextmanager
def served(module: nn.Module, images: Tensor) -> Iterator[None]:
    """Have a thread run a network without a pause; each of its outputs is the first, to the last bit."""
    stop, failures, passes = threading.Event(), [], 0

    @torch.no_grad()
    def serve() -> None:
        nonlocal passes
        while not stop.is_set():
            try:
                assert torch.equal(module(images), expected), "other numbers"
            except Exception as error:  # whatever another thread's work does to it
                failures.append(error)
                return
            passes += 1

    with torch.no_grad():
        expected = module(images)
    server = threading.Thread(target=serve)
    server.start()
    try:
        yield
    finally:
        stop.set()
        server.join()
    assert failures == []
    assert passes > 0


def at_once(work: Callable[[int], object], *, threads: int = 2) -> list[object]:
    """What several threads make of their numbers, all begun at one time."""
    begin = threading.Barrier(threads)

    def begun(number: int) -> object:
        begin.wait()
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(begun, range(threads)))


class Attending(nn.Module):
    """A fused attention kernel's numbers are not those of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 4, 4)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
        return self.norm(self.layer(x)).mean(1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A classifier in every form in which it can be loaded."""
    model = classifier()
    model.save_pretrained(tmp_path / "folder")
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("make", [Attending, classifier])
def test_a_server_does_not_notice_what_other_threads_load(saved: Path, make: Callable[[], nn.Module]) -> None:
    server, expected = make().eval(), outputs(classifier())
    own = [plain("own", (4, 6, 8), seed=number) for number in range(2)]
    before = state_of_the_process()

    def load(number: int) -> list[Tensor]:
        preflight([{"spec": name, "pretrained": False} for name in ("test_vit", "test_convnext")])
        Pool([load_source("test_resnet", pretrained=False), own[number]], (3, 32, 32))
        network_cost(load_source("test_vit2", pretrained=False).module, (3, 160, 160))
        models = [
            StitchedClassifier.from_pretrained(saved / "folder"),
            StitchedClassifier.load_from_checkpoint(saved / "model.ckpt", weights_only=True).eval(),
            open_classifier(saved / "model.ckpt").eval(),
        ]
        return [outputs(model) for model in models]

    with served(server, noise(2, 3, 32, 32)):
        for loaded in at_once(load):
            for x in loaded:
                torch.testing.assert_close(x, expected, rtol=0, atol=0)
    assert state_of_the_process() == before
    assert nn.Linear(2, 2)(torch.zeros(1, 2)).shape == (1, 2)


class Caching(nn.Module):
    """Keeps what it has computed, and a closure over its own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.both = lambda x: self.norm(self.a(x))
        self.scales: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(x)
        if "last" not in self.scales or self.training:
            self.scales["last"] = self.a.weight.mean() * x.size(1)
        return (x * self.scales["last"]).mean((2, 3))


def test_a_network_is_served_while_its_own_cuts_and_costs_are_looked_up() -> None:
    server = Caching().eval()

    def look(_: int) -> object:
        cost = network_cost(server, (3, 16, 16))
        graph = CutGraph(server, (3, 16, 16))
        return cost, [cut.name for cut in graph.cuts("all")], graph.train_mode_difference()

    outputs_once = server(noise(2, 3, 16, 16))
    assert outputs_once.shape == (2, 4)
    alone = look(0)
    with served(server, noise(2, 3, 16, 16)):
        for _ in range(5):
            assert at_once(look) == [alone, alone]
    assert alone == look(0)
    # Gradients of a network that trains in another thread stay on.
    assert all(parameter.requires_grad for parameter in server.parameters())


def test_networks_with_random_weights_are_the_same_however_many_threads_make_them() -> None:
    alone = load_source("test_vit", pretrained=False).module.state_dict()
    drawing = threading.Event()

    def make(number: int) -> nn.Module:
        if number == 0:
            while not drawing.is_set():
                torch.rand(3)
            return nn.Identity()
        try:
            return nn.ModuleList(load_source("test_vit", pretrained=False).module for _ in range(5))
        finally:
            drawing.set()

    for copies in at_once(make, threads=3)[1:]:
        for copy in copies:  # type: ignore[attr-defined]
            assert_same_weights(copy, alone)


# -- pools and journals ------------------------------------------------------------------------------------------------


def test_threads_compose_on_one_prepared_pool_as_one_alone() -> None:
    images, labels = digits(24, 32, classes=3)
    pool = Pool.prepare([donor("test_resnet"), plain("plain", (8, 12, 16), seed=3)], (3, 32, 32))

    def request(number: int) -> list[tuple[object, ...]]:
        return records(compose(pool, images[number : number + 20], labels[number : number + 20]).result)

    alone = [request(number) for number in range(3)]
    assert at_once(request, threads=3) == alone


class Waiting(list[Tensor]):
    """Images that come when they are let."""

    def __init__(self, images: Tensor) -> None:
        super().__init__([images])
        self.asked, self.let = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[Tensor]:
        self.asked.set()
        self.let.wait()
        return super().__iter__()


def test_a_pool_in_a_search_refuses_a_second_one_and_is_free_after_the_first() -> None:
    images, labels = digits(48, 32, classes=3)
    pool = Pool([plain("a", (4, 6, 8), seed=1), plain("b", (6, 8, 4), seed=2)], (3, 32, 32))
    calibration, selection = Waiting(images[:24]), [(images[24:], labels[24:])]
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(pool.search, calibration, selection)
        calibration.asked.wait()
        try:
            with pytest.raises(StitchError, match=r"This pool is in another search, of another thread\. Wait for it"):
                pool.search([images[:24]], selection)
        finally:
            calibration.let.set()
        assert records(first.result()) == records(pool.search([images[:24]], selection))


def test_a_journal_is_in_use_for_the_same_process_too(tmp_path: Path) -> None:
    words = "is in use, by this process or another. Wait for it, or name another directory"
    with Journal(tmp_path):
        for _ in range(2):
            with pytest.raises(JournalError, match=words):
                Journal(tmp_path)
    with Journal(tmp_path) as journal:
        journal.agree({"a": 1})
