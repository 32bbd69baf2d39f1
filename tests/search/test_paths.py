from __future__ import annotations

import pytest
import timm
import torch
from doubles.pools import path
from doubles.references import sums_of
from doubles.small_sources import donor, live, plain, shake
from doubles.tensors import noise
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lightning_stitch import CalibrationSettings, CutError, FragmentRef, Pool, Source
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.progress import Silent

SIZE = 64


def vit(name: str, *, patch: int, width: int, class_token: bool = True, seed: int = 0) -> Source:
    torch.manual_seed(seed)
    pool = {} if class_token else {"class_token": False, "global_pool": "avg"}
    network = VisionTransformer(SIZE, patch, embed_dim=width, depth=4, num_heads=4, num_classes=5, **pool)  # type: ignore[arg-type]
    return live(network, name, size=SIZE, fixed_size=True)


def swin() -> Source:
    torch.manual_seed(1)
    network = SwinTransformer(
        img_size=SIZE, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=5
    )
    return live(network, "swin", size=SIZE, fixed_size=True)


def convnext() -> Source:
    torch.manual_seed(2)
    return live(ConvNeXt(depths=(1, 1, 2, 1), dims=(16, 32, 48, 64), num_classes=5), "convnext", size=SIZE)


def hybrid() -> Source:
    """Convolutions, and attention in windows and on a grid."""
    network = timm.create_model("test_maxvit", img_size=SIZE)
    return live(shake(network, 0), "hybrid", size=SIZE, fixed_size=True)


PAIRS = {
    "CNN -> ViT": (lambda: donor("test_resnet"), lambda: vit("vit", patch=8, width=48)),
    "ViT -> CNN": (lambda: vit("vit", patch=8, width=48), lambda: donor("test_resnet")),
    "ViT -> ViT of other width and patch": (
        lambda: vit("small", patch=16, width=32, class_token=False, seed=3),
        lambda: vit("vit", patch=8, width=48),
    ),
    "ConvNeXt -> Swin": (convnext, swin),
    "Swin -> ConvNeXt": (swin, convnext),
    "hybrid -> ViT": (hybrid, lambda: vit("vit", patch=8, width=48)),
}


def pool_of(*sources: Source, images: Tensor, **settings: object) -> Pool:
    pool = Pool(sources, (3, SIZE, SIZE), settings=CalibrationSettings(**{"readout": "last", **settings}))  # type: ignore[arg-type]
    pool.calibrate(images.split(8))
    return pool


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAIRS)
def test_every_kind_joins_every_other_at_any_cut(kind: str) -> None:
    sender, receiver = (make() for make in PAIRS[kind])
    pool = pool_of(sender, receiver, images=noise(12, 3, SIZE, SIZE), rows_per_image=16)
    leave, enter = ([cut.name for cut in part.cuts] for part in pool.parts)
    joints = {(leave[len(leave) // 2], entry) for entry in enter} | {(exit, enter[len(enter) // 2]) for exit in leave}
    candidates = [
        pool.stitch([(sender.name, None, exit), (receiver.name, entry, None)]) for exit, entry in sorted(joints)
    ]
    outcomes, _ = pool.outcomes(candidates, [noise(3, 3, SIZE, SIZE, seed=1)], progress=Silent())
    assert len(candidates) >= 8
    for candidate, outcome in zip(candidates, outcomes, strict=True):
        network = pool.assemble(candidate)
        assert sums_of(network, (3, SIZE, SIZE)) == candidate.cost
        with torch.no_grad():
            features = network(noise(3, 3, SIZE, SIZE, seed=1))
        # What ran in the search, stitch by stitch, is what the assembled network does, folds included.
        torch.testing.assert_close(features, outcome.features, rtol=1e-3, atol=1e-4)
        spec = candidate.recipe.stitches[0]
        assert spec is not None
        assert spec.r2 is not None
        assert spec.r2 <= 1
    formats = {(s.in_format, s.out_format) for c in candidates for s in c.recipe.stitches if s is not None}
    assert len(formats) >= 1 + (kind == "hybrid -> ViT")


class Pixels(nn.Module):
    """Each patch's pixels, mixed by a random regular matrix, as a map or as tokens; then a few layers."""

    def __init__(self, patch: int, *, tokens: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        width = 3 * patch**2
        self.mix = nn.Conv2d(3, width, patch, patch)
        mixing = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
        self.mix.weight.data.copy_(mixing.view(width, 3, patch, patch))
        self.tokens = nn.Flatten(2) if tokens else nn.Identity()
        self.hidden = nn.Linear(width, 8) if tokens else nn.Conv2d(width, 8, 1)
        self.head = nn.Linear(8, 4)
        self.channels_last = tokens

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(x)
        if self.channels_last:
            return self.head(self.hidden(self.tokens(x).transpose(1, 2)).mean(1))
        return self.head(self.hidden(x).mean((2, 3)))


PLANTED = {
    "map -> tokens": (False, 8, lambda: vit("vit", patch=8, width=48), "patch_embed.proj"),
    "tokens -> tokens": (True, 8, lambda: vit("vit", patch=8, width=48), "patch_embed"),
    "tokens -> map": (True, 4, convnext, "stem.0"),
    "map -> NHWC": (False, 4, swin, "permute"),
    "tokens -> NHWC": (True, 4, swin, "permute"),
}


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("bias", [True, False])
def test_what_the_front_holds_the_tail_gets_whatever_their_kinds(kind: str, bias: bool) -> None:
    tokens, patch, make, entry = PLANTED[kind]
    receiver, front = make(), live(Pixels(patch, tokens=tokens), "pixels", size=SIZE)
    granularity = {"pixels": "all", receiver.name: "all"}
    pool = pool_of(front, receiver, images=noise(24, 3, SIZE, SIZE), rows_per_image=64, granularity=granularity)
    exit = next(cut.name for cut in front.cuts("all") if cut.format == ("tokens" if tokens else "NCHW"))
    candidate = pool.stitch([("pixels", None, exit), (receiver.name, entry, None)], ridge=0.0, bias=bias)
    spec = candidate.recipe.stitches[0]
    assert spec is not None
    images = noise(4, 3, SIZE, SIZE, seed=1)
    whole = pool.parts[1].graph.fragment(None, pool.parts[1].end)
    with torch.no_grad():
        found, expected = pool.assemble(candidate)(images), whole(pool.parts[1].preprocess(images))
    if bias:
        assert spec.r2 == pytest.approx(1, abs=1e-6)
        assert (found - expected).norm() < 1e-3 * expected.norm()
    else:
        # The networks' patch embeddings have a bias, which a map without one cannot give.
        assert (found - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize(
    ("sender", "receiver", "exit", "entry", "placement"),
    [
        # Behind a LayerNorm that alone reads: the patch merging's and the downsampling's linear maps take it in.
        (convnext, swin, "stages.1.downsample", "layers.1.downsample.norm", "consumer"),
        (swin, convnext, "layers.0.blocks.0", "stages.1.downsample.0", "consumer"),
        # Before one, which is no affine map of its channels, nothing can take it in.
        (convnext, swin, "stages.2.blocks.0", "layers.1.downsample", "explicit"),
        (swin, lambda: vit("vit", patch=8, width=48), "layers.0.blocks.0", "blocks.1", "explicit"),
    ],
)
def test_a_stitch_folds_behind_a_layer_norm_where_that_is_exact(
    sender: object, receiver: object, exit: str, entry: str, placement: str
) -> None:
    front, tail = sender(), receiver()  # type: ignore[operator]
    pool = pool_of(front, tail, images=noise(16, 3, SIZE, SIZE), rows_per_image=16)
    candidate = pool.stitch([(front.name, None, exit), (tail.name, entry, None)])
    spec = candidate.recipe.stitches[0]
    assert spec is not None
    assert spec.placement == placement
    outcome = pool.outcomes([candidate], [noise(4, 3, SIZE, SIZE, seed=2)], progress=Silent())[0][0]
    with torch.no_grad():
        features = pool.assemble(candidate)(noise(4, 3, SIZE, SIZE, seed=2))
    assert (features - outcome.features).norm() < 1e-4 * features.norm()


@pytest.mark.parametrize("size", [48, 64, 100])
def test_sources_of_different_native_sizes_meet_on_one_calibration_set(size: int) -> None:
    free = live(plain("free", (5, 6, 8), seed=0).module, "free", size=32)
    sources = [vit("fixed", patch=8, width=48), free]
    pool = Pool(sources, (3, size, size), settings=CalibrationSettings(rows_per_image=16, readout="last"))
    pool.calibrate([noise(8, 3, size, size)])
    assert [part.graph.input_size for part in pool.parts] == [(3, SIZE, SIZE), (3, size, size)]
    for one, other in (("fixed", "free"), ("free", "fixed")):
        cuts = {part.name: part.cuts[1].name for part in pool.parts}
        candidate = pool.stitch([(one, None, cuts[one]), (other, cuts[other], None)])
        network = pool.assemble(candidate)
        assert sums_of(network, (3, size, size)) == candidate.cost
        with torch.no_grad():
            assert torch.isfinite(network(noise(2, 3, size, size, seed=1))).all()


def small_pool() -> Pool:
    sources = [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1)]
    pool = Pool(sources, (3, 16, 16), settings=CalibrationSettings(readout="last"))
    pool.calibrate([noise(8, 3, 16, 16)])
    return pool


def test_the_fragments_of_a_candidates_recipe_make_the_same_network_again() -> None:
    pool = pool_of(donor("test_resnet"), donor("test_efficientnet"), images=noise(12, 3, SIZE, SIZE), rows_per_image=16)
    names = [part.name for part in pool.parts]
    leave, enter = (part.cuts[1].name for part in pool.parts)
    one = pool.stitch([(names[0], None, leave), (names[1], enter, None)])
    other = pool.stitch(one.recipe.fragments)
    assert one.recipe.fragments[-1].end is not None
    assert other.recipe == one.recipe
    images = noise(2, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(pool.assemble(one)(images), pool.assemble(other)(images))


def test_fragments_may_come_back_to_a_source_and_use_it_again() -> None:
    refs = [("a", None, "0"), ("b", "0", "1"), ("a", "0", "1"), ("a", "0", "2")]
    candidate = small_pool().stitch([FragmentRef("a", None, "0"), *refs[1:3], ("a", "0", None)])  # type: ignore[list-item]
    assert path(candidate) == refs
    assert len(candidate.recipe.stitches) == 3
    assert candidate.kind == "stitched"


@pytest.mark.parametrize("share_weights", [False, True])
def test_a_fragment_used_twice_is_copied_or_shared_as_the_user_says(share_weights: bool) -> None:
    pool = small_pool()
    candidate = pool.stitch([("a", None, "1"), ("a", "0", "1"), ("a", "1", None)])
    network, apart = (pool.assemble(candidate, share_weights=share) for share in (share_weights, False))
    twice, images = pool.parts[0].cost_between(1, 2).params, noise(2, 3, 16, 16)
    expected = candidate.cost.params - (twice if share_weights else 0)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    assert network.recipe.share_weights == share_weights
    with torch.no_grad():
        assert torch.equal(network(images), apart(images))


@pytest.mark.parametrize(
    ("fragments", "words"),
    [
        ([], "begins at the image"),
        ([("a", "0", None)], "begins at the image"),
        ([("a", None, "0"), ("b", "0", "1")], "runs to its end"),
        ([("a", None, None), ("b", "0", None)], "only the last runs to its end"),
        ([("a", None, "0"), ("b", None, None)], "Only the first fragment of a network begins at the image"),
        ([("c", None, "0"), ("b", "0", None)], "No source is named 'c'. Nearest: "),
        ([("a", None, "0"), ("b", "1", "0"), ("a", "1", None)], "'0' does not lie behind '1'"),
        ([("a", None, "0.0"), ("b", "0", None)], "Cut '0.0' of source 'a' is not among those .* Nearest: '0"),
    ],
)
def test_fragments_that_make_no_path_are_refused(
    fragments: list[tuple[str, str | None, str | None]], words: str
) -> None:
    with pytest.raises(StitchError, match=words):
        small_pool().stitch(fragments)


def test_an_unknown_cut_offers_the_nearest() -> None:
    with pytest.raises(CutError, match=r"No cut is named '7'\. Nearest: "):
        small_pool().stitch([("a", None, "7"), ("b", "0", None)])


def test_a_vector_leads_to_no_grid() -> None:
    sources = [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1)]
    pool = Pool(sources, (3, 16, 16), settings=CalibrationSettings(until="output"))
    pool.calibrate([noise(8, 3, 16, 16)])
    with pytest.raises(StitchError, match=r"No stitch leads from a vector \('2'\) to a grid \('1'\)"):
        pool.stitch([("a", None, "2"), ("b", "1", None)])


def test_what_does_not_vary_cannot_be_stitched() -> None:
    flat = plain("flat", (5, 6, 8), seed=0)
    flat.module[0][0].weight.data.zero_()  # type: ignore[index,union-attr]
    pool = Pool([flat, plain("b", (4, 7, 9), seed=1)], (3, 16, 16), settings=CalibrationSettings(readout="last"))
    pool.calibrate([noise(8, 3, 16, 16)])
    with pytest.raises(CalibrationError, match="from '0' of 'b' to '0' of 'flat': one of the two does not vary"):
        pool.stitch([("b", None, "0"), ("flat", "0", None)])


def test_a_pool_is_calibrated_first() -> None:
    pool = Pool([plain("a", (5, 6, 8), seed=0)], (3, 16, 16), settings=CalibrationSettings(readout="last"))
    with pytest.raises(CalibrationError, match="Calibrate the pool first"):
        pool.stitch([("a", None, None)])
