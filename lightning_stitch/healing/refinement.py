"""Make a composed network better on the same unlabelled images, and keep it only if that helped.

After composing and before ranking, each network is measured on calibration images that were held out of the change:
R2 of its final features against those that its last source, unmodified, gives of the same images. Where the change does
not raise it the network stays as it was. Healing (`lightning_stitch.healing.healing`) is kept as it was measured;
statistics of BatchNorm are, where they help, estimated anew on all calibration images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_stitch.cutting import with_tensors
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.healing.healing import heal
from lightning_stitch.healing.trials import (
    Numbers,
    divided,
    entered,
    held_out_images,
    held_out_r2,
    run_layerwise,
    with_numbers,
)
from lightning_stitch.progress import Progress, Silent
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import Calibrated, Candidate

Moments = tuple[Tensor, Tensor]


@torch.no_grad()
def batch_norm_statistics(
    candidate: Candidate, sources: Sequence[Calibrated], portions: Sequence[Tensor]
) -> list[Numbers]:
    """Means and variances of every BatchNorm behind a stitch, estimated anew on these images.

    In forward order, so that each is taken behind those before it, and relative to what the same layer is given in its
    own source on the same images: with a, b the mean and standard deviation there and m, s the layer's own, a' and b'
    in the running network make m' = a' - (a - m) b'/b and s' = s b'/b, so that what the layer gives is distributed as
    in its source, whatever images the source was trained on. (Statistics estimated anew for networks put together:
    Jordan et al. 2022, REPAIR, arXiv 2211.08403.)
    """
    found: list[Numbers] = [{}]
    num_images = sum(map(len, portions))
    for step in candidate.steps[1:]:
        numbers: dict[str, Tensor] = {}
        source = sources[step.source]
        portions = entered(portions, step, source)
        owns, _ = divided(source.activations[step.first - 1], len(source.features) - num_images)
        for index in range(step.first, step.last):
            piece = source.parts.pieces[index]
            buffers = _batch_norms(piece)
            variant = with_tensors(piece, {**step.tensors, **buffers})
            seen: dict[str, Moments] = {}

            def note(name: str, layer: nn.Module, inputs: Sequence[Tensor], seen: dict[str, Moments] = seen) -> None:
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    seen[name] = _moments(inputs)

            def move(
                name: str,
                layer: nn.Module,
                inputs: Sequence[Tensor],
                seen: dict[str, Moments] = seen,
                buffers: dict[str, Tensor] = buffers,
            ) -> None:
                if f"{name}.running_mean" in buffers:
                    _match(layer, seen[name], _moments(inputs))

            owns = run_layerwise(piece, owns, note)
            portions = run_layerwise(variant, portions, move)
            numbers |= {name: variant.get_buffer(name).clone() for name in buffers}
        found.append(numbers)
    return found


def batch_norm(
    candidate: Candidate, sources: Sequence[Calibrated], settings: CalibrationSettings, ridge: float
) -> Candidate:
    """The candidate with `batch_norm_statistics`, where they help when estimated without the held-out images."""
    fitted, held_out = held_out_images(candidate, sources)
    tried = with_numbers(candidate, batch_norm_statistics(candidate, sources, fitted), "batch_norm")
    if not held_out_r2(tried, sources, held_out) > held_out_r2(candidate, sources, held_out):
        return candidate
    return with_statistics(candidate, sources)


def healing(
    candidate: Candidate, sources: Sequence[Calibrated], settings: CalibrationSettings, ridge: float
) -> Candidate:
    """The candidate healed, where that helps; compared with its stitches fitted without the held-out images, too."""
    _, held_out = held_out_images(candidate, sources)
    fair = heal(candidate, sources, settings, ridge=ridge, only_stitches=True)
    before = held_out_r2(fair, sources, held_out)
    healed = heal(candidate, sources, settings, ridge=ridge)
    return healed if held_out_r2(healed, sources, held_out) > before else candidate


Refinement = Callable[[Candidate, Sequence[Calibrated], CalibrationSettings, float], Candidate]
REFINEMENTS: dict[str, Refinement] = {"batch_norm": batch_norm, "healing": healing}
SIZE_CLASSES = (1.0, 0.75, 0.5, 1 / 3)
FITS = ("open_loop", "row_weights")


def check_refinements(names: Sequence[str]) -> None:
    """Refuse names that are none.

    Raises:
        StitchError: Naming those that there are.
    """
    known = {*REFINEMENTS, *FITS}
    unknown = sorted(set(names) - known)
    if unknown:
        raise StitchError(f"Unknown refinements {unknown}; choose from {sorted(known)}.")


@torch.inference_mode()
def refined(
    candidate: Candidate,
    sources: Sequence[Calibrated],
    name: str,
    *,
    settings: CalibrationSettings | None = None,
    ridge: float = 1e-3,
) -> Candidate:
    """The candidate with one change made, or as it is where that does not raise the held-out R2.

    Args:
        candidate: The network; one of a single step, or that ends early, stays as it is.
        sources: The sources with their activations of the calibration images.
        name: Which change, of `REFINEMENTS`.
        settings: How rows are sampled; the sources'.
        ridge: Strength of the stitches' fit, where they are fitted anew.
    """
    if len(candidate.steps) == 1 or candidate.pool is not None:
        return candidate
    fitted, held_out = held_out_images(candidate, sources)
    if not held_out or not fitted:
        return candidate
    try:
        return REFINEMENTS[name](candidate, sources, settings or CalibrationSettings(), ridge)
    except CalibrationError:
        # The features do not vary over the held-out images, or are not finite: there is nothing to go by.
        return candidate


@torch.inference_mode()
def with_statistics(candidate: Candidate, sources: Sequence[Calibrated]) -> Candidate:
    """The candidate with `batch_norm_statistics` of all calibration images, whether they help or not."""
    fitted, held_out = held_out_images(candidate, sources)
    return with_numbers(candidate, batch_norm_statistics(candidate, sources, [*fitted, *held_out]), "batch_norm")


class Refiner:
    """Tries changes on networks.

    Args:
        sources: The sources with their activations of the calibration images.
        settings: How rows are sampled; the sources'.
        ridge: Strength of the stitches' fit, where they are fitted anew.
    """

    def __init__(self, sources: Sequence[Calibrated], *, settings: CalibrationSettings, ridge: float) -> None:
        self.sources = sources
        self.settings = settings
        self.ridge = ridge

    def refined(self, candidate: Candidate, name: str) -> Candidate:
        """As the function of that name."""
        return refined(candidate, self.sources, name, settings=self.settings, ridge=self.ridge)

    @torch.inference_mode()
    def explained(self, candidate: Candidate) -> float | None:
        """Held-out R2 of a candidate whose stitches have not seen those images; None where that cannot be had."""
        try:
            fair = heal(candidate, self.sources, self.settings, ridge=self.ridge, only_stitches=True)
            return held_out_r2(fair, self.sources, held_out_images(candidate, self.sources)[1])
        except CalibrationError:
            return None


def refine(
    candidates: Sequence[Candidate],
    refiner: Refiner,
    names: Sequence[str],
    *,
    max_healed: int = 16,
    progress: Progress | None = None,
) -> list[Candidate]:
    """Candidates with every change made that raises their held-out R2, in the order of the names.

    Args:
        candidates: The networks.
        refiner: Tries the changes.
        names: Which changes, of `REFINEMENTS`; other names are passed over.
        max_healed: Most networks that are healed (`finalists`).
        progress: Where to show progress.
    """
    found, progress = list(candidates), progress or Silent()
    for name in names:
        if name not in REFINEMENTS:
            continue
        chosen = finalists(found, refiner, max_healed) if name == "healing" else range(len(found))
        progress.start("healing" if name == "healing" else "refining", len(chosen))
        for index in chosen:
            found[index] = refiner.refined(found[index], name)
            progress.advance(1)
    return found


def finalists(candidates: Sequence[Candidate], refiner: Refiner, count: int) -> list[int]:
    """Which StitchNets are worth healing, by their place: of each size class in turn the one of highest held-out R2.

    A size class is a range of MACs relative to the cheapest source, between the shares `SIZE_CLASSES`. Healing raises
    skips more than it reorders them, but a skip explains less than any network of the sources' own size, so that
    without classes none would be healed.

    Args:
        candidates: The networks; only StitchNets count.
        refiner: Judges them as they are.
        count: Most that are chosen.
    """
    stitched = [index for index, candidate in enumerate(candidates) if candidate.kind == "stitched"]
    if len(stitched) <= count:
        return stitched
    cheapest = min(source.parts.cost.macs for source in refiner.sources)
    classes: dict[int, list[tuple[float, int]]] = {}
    for index in stitched:
        explained = refiner.explained(candidates[index])
        if explained is not None:
            size = sum(candidates[index].cost.macs <= share * cheapest for share in SIZE_CLASSES)
            classes.setdefault(size, []).append((-explained, index))
    ranked = sorted((place, size, index) for size, c in classes.items() for place, (_, index) in enumerate(sorted(c)))
    return sorted(index for *_, index in ranked[:count])


def _batch_norms(piece: nn.Module) -> dict[str, Tensor]:
    """Copies of the statistics of each BatchNorm that a piece calls once."""
    called = [str(node.target) for node in piece.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    found = {}
    for name in called:
        layer = piece.get_submodule(name)
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and called.count(name) == 1:
            for buffer in ("running_mean", "running_var"):
                if getattr(layer, buffer) is not None:
                    found[f"{name}.{buffer}"] = getattr(layer, buffer).clone()
    return found


def _moments(inputs: Sequence[Tensor]) -> Moments:
    """Mean and standard deviation of each channel."""
    count = sum(x.numel() // x.shape[1] for x in inputs)
    others = [dim for dim in range(inputs[0].ndim) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(inputs[0].ndim)]
    mean = torch.stack([x.sum(others, dtype=torch.float64) for x in inputs]).sum(0) / count
    squares = torch.stack([(x - mean.view(shape)).square().sum(others) for x in inputs]).sum(0)
    return mean, (squares / count).sqrt()


def _match(layer: nn.Module, own: Moments, running: Moments) -> None:
    mean, variance = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
    ratio = running[1] / own[1].clamp(min=1e-12)
    ratio = torch.where(own[1] > 1e-6 * own[0].abs(), ratio, 1.0)
    moved = running[0] - (own[0] - mean) * ratio
    mean.copy_(moved)
    variance.copy_(variance * ratio.square())
