"""Compositions that are read at every depth: what they give, cost, and how they come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from doubles.references import sums_of
from doubles.small_sources import donor, live, plain
from doubles.tensors import digits, noise
from torch import Tensor, nn

from lightning_stitch import CalibrationSettings, Pool, StitchedNetwork
from lightning_stitch.errors import StitchError
from lightning_stitch.progress import Silent
from lightning_stitch.recipe import Recipe
from lightning_stitch.search.results import Ranked, SearchResult
from lightning_stitch.search.strategies import Beam

SHAPE = (3, 64, 64)
CALIBRATION = 0.7 * digits(16, 64)[0] + 0.3 * noise(16, *SHAPE)
IMAGES, LABELS = digits(40, 64, first=20, classes=3)
PROBES = IMAGES[:5]


@pytest.fixture(scope="module")
def pool() -> Pool:
    pool = Pool([donor("test_resnet"), donor("test_vit"), donor("test_efficientnet")], SHAPE)
    pool.calibrate([CALIBRATION])
    return pool


@pytest.fixture(scope="module")
def result(pool: Pool) -> SearchResult:
    return pool.search([CALIBRATION], [(IMAGES, LABELS)], strategy=Beam(width=3, max_fragments=3), max_candidates=12)


def of_kind(result: SearchResult, kind: str) -> list[Ranked]:
    ranked = [r for r in result.ranked if r.candidate.kind == kind]
    assert ranked, kind
    return ranked


def outputs(network: nn.Module, images: Tensor = PROBES) -> Tensor:
    with torch.no_grad():
        return network(images)


def test_a_source_is_read_at_the_end_of_each_block_and_at_its_own(pool: Pool, result: SearchResult) -> None:
    for ranked in of_kind(result, "source"):
        recipe = ranked.candidate.recipe
        part = next(part for part in pool.parts if part.name == recipe.sources[0].name)
        assert [fragment.end for fragment in recipe.fragments] == [*(cut.name for cut in part.cuts), part.end]
        assert len(recipe.runs) == 1
        assert recipe.is_chain
        expected = []
        for cut in part.cuts:
            x = outputs(part.graph.fragment(None, cut.name), part.preprocess(PROBES))
            if cut.format == "tokens":
                prefix, x = x[:, : cut.num_prefix_tokens], x[:, cut.num_prefix_tokens :]
                expected += [x.mean(1), x.std(1, correction=0), prefix.flatten(1)]
            else:
                positions = (1, 2) if cut.format == "NHWC" else (2, 3)
                expected += [x.mean(positions), x.std(positions, correction=0)]
        expected.append(outputs(part.graph.fragment(None, part.end), part.preprocess(PROBES)))
        network = pool.assemble(ranked.candidate)
        torch.testing.assert_close(outputs(network), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)
        assert recipe.blocks == tuple(x.shape[1] for x in expected)
        assert network.num_features == ranked.features == sum(recipe.blocks)


@pytest.mark.slow
def test_whatever_was_found_costs_and_gives_what_its_network_does(pool: Pool, result: SearchResult) -> None:
    kinds = set()
    for ranked in result.ranked:
        network = pool.assemble(ranked.candidate)
        assert sums_of(network, SHAPE) == ranked.candidate.cost
        (outcome,), _ = pool.outcomes([ranked.candidate], [PROBES], progress=Silent())
        scale = float(outcome.features.abs().max())
        torch.testing.assert_close(outputs(network), outcome.features, rtol=1e-3, atol=1e-5 * scale)
        kinds.add(ranked.candidate.kind)
    assert kinds >= {"source", "self-stitched", "early exit", "stitched", "side by side"}


def test_an_early_exit_gives_what_its_source_gives_up_to_there(pool: Pool, result: SearchResult) -> None:
    sources = {r.candidate.recipe.sources[0].name: r.candidate for r in of_kind(result, "source")}
    for ranked in of_kind(result, "early exit"):
        whole = outputs(pool.assemble(sources[ranked.candidate.recipe.sources[0].name]))
        early = outputs(pool.assemble(ranked.candidate))
        torch.testing.assert_close(early, whole[:, : early.shape[1]])


def test_a_tree_gives_what_its_branches_give(pool: Pool, result: SearchResult) -> None:
    for ranked in of_kind(result, "side by side"):
        candidate = ranked.candidate
        assert len(candidate.ways) > 1
        network = pool.assemble(candidate)
        features = outputs(network).split([tap.num_features for tap in candidate.recipe.taps], dim=1)
        branches = {}
        for other in result.ranked:
            if len(other.candidate.ways) == 1:
                taps = other.candidate.recipe.taps
                parts = outputs(pool.assemble(other.candidate)).split([tap.num_features for tap in taps], dim=1)
                for read, part in zip(other.candidate.reads, parts, strict=True):
                    branches[other.candidate.ways[0], read.num_pieces] = part
        for read, part in zip(candidate.reads, features, strict=True):
            expected = branches[candidate.ways[read.way], read.num_pieces]
            torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["source", "early exit", "stitched", "side by side"])
def test_it_comes_back_from_its_recipe_and_from_a_folder(
    pool: Pool, result: SearchResult, kind: str, tmp_path: Path
) -> None:
    network = pool.assemble(of_kind(result, kind)[0].candidate)
    recipe = Recipe.from_dict(json.loads(json.dumps(network.recipe.to_dict())))
    assert recipe == network.recipe
    rebuilt = StitchedNetwork.from_recipe(recipe)
    rebuilt.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(outputs(rebuilt), outputs(network), rtol=1e-5, atol=1e-5)
    network.save_pretrained(tmp_path / "saved")
    loaded = StitchedNetwork.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(outputs(loaded), outputs(network), rtol=1e-5, atol=1e-5)
    assert loaded.describe() == network.describe()


@pytest.mark.parametrize("kind", ["source", "stitched", "side by side"])
def test_it_is_exported_for_any_batch(pool: Pool, result: SearchResult, kind: str) -> None:
    network = pool.assemble(of_kind(result, kind)[0].candidate)
    program = torch.export.export(network, (PROBES,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.testing.assert_close(program.module()(IMAGES[:7]), outputs(network, IMAGES[:7]), rtol=1e-4, atol=1e-4)


def test_gradients_reach_all_depths(pool: Pool, result: SearchResult) -> None:
    network = pool.assemble(of_kind(result, "source")[0].candidate)
    first = network.recipe.taps[0].num_features
    network(PROBES)[:, :first].square().sum().backward()
    reached = {name.split(".")[1] for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"0"}
    network.zero_grad()
    network(PROBES).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_it_says_what_is_read_and_what_decides(pool: Pool, result: SearchResult) -> None:
    network = pool.assemble(of_kind(result, "source")[0].candidate)
    recipe = network.recipe
    assert f"    read at {len(recipe.taps)} cuts: {recipe.num_features} features" in network.describe().splitlines()
    shares = [0.0] * len(recipe.blocks)
    shares[0], shares[-1] = 0.75, 0.25
    network.recipe = recipe.with_shares(shares)
    first, last = recipe.fragments[0].end, recipe.fragments[-1].end
    assert f"; of what decides 75% {first}, 25% {last}" in network.describe().splitlines()[2]
    assert "0%" not in network.describe()
    assert Recipe.from_dict(network.recipe.to_dict()) == network.recipe


# -- settings --------------------------------------------------------------------------------------------------------


def widths(readout: str | list[str], **settings: object) -> list[int]:
    sources = [plain("a", (5, 6, 8), seed=0)]
    options = CalibrationSettings(readout=readout, **settings)  # type: ignore[arg-type]
    pool = Pool(sources, (3, 16, 16), settings=options)
    result = pool.search([noise(8, 3, 16, 16)], [noise(8, 3, 16, 16, seed=1)], max_candidates=1)
    return [
        tap.num_features for tap in next(r for r in result.ranked if r.candidate.kind == "source").candidate.recipe.taps
    ]


def test_a_readout_is_all_the_last_or_what_is_named() -> None:
    assert widths("all") == [10, 12, 8]
    assert widths("last") == [8]
    assert widths(["1"]) == [12, 8]
    assert widths("all", until="output") == [4]
    # Of cuts everywhere those at the ends of blocks are read.
    assert widths("all", granularity="all") == [10, 12, 8]
    with pytest.raises(StitchError, match=r"readout= names \['7'\], which no source offers as cuts. Nearest"):
        widths(["1", "7"])
    with pytest.raises(StitchError, match="readout must be 'all', 'last' or a list of cut names; found 'first'"):
        widths("first")


# -- planted labels --------------------------------------------------------------------------------------------------


class Forgetful(nn.Module):
    """The first block keeps all of the image; the second one lets through its mean colour alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.early = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.late = nn.Sequential(nn.AvgPool2d(16), nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        with torch.no_grad():
            # One channel is the image's mean colour, which ReLU leaves alone, and the second block reads no other.
            self.early[0].weight[0], self.early[0].bias[0] = 0.0, 0.0
            self.early[0].weight[0, :, 1, 1] = 1 / 3
            self.late[1].weight[:, 1:] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.early(x)))


def test_a_label_that_only_an_early_block_tells_is_read_there() -> None:
    """Texture: images of one mean, smooth or rough, which an average over positions does not tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    rough = torch.rand(80, 3, 16, 16, generator=generator) - 0.5
    images = (0.5 + rough * torch.tensor([0.1, 0.6])[labels][:, None, None, None]).clamp(0, 1)
    scores = {}
    for readout in ("all", "last"):
        settings = CalibrationSettings(readout=readout)
        pool = Pool([live(Forgetful(0).eval(), "forgetful")], (3, 16, 16), settings=settings)
        result = pool.search([images[:20]], [(images[20:], labels[20:])], max_candidates=1, exits=False)
        scores[readout] = result.best_source.scores["loo_r2"]
    assert scores["all"] > 0.9
    assert scores["last"] < scores["all"] - 0.1
