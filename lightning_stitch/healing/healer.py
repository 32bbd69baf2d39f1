"""Heal the composed networks that are worth it, and keep that only where it helped.

After composing and before ranking, a network is measured on calibration images that were held out of its healing: R2 of
its final features against those that its last source, unmodified, gives of the same images. Where healing does not
raise it the network stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_stitch.errors import CalibrationError
from lightning_stitch.healing.healing import heal
from lightning_stitch.healing.trials import held_out_images, held_out_r2
from lightning_stitch.progress import Progress, Silent
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import Calibrated, Candidate

SIZE_CLASSES = (1.0, 0.75, 0.5, 1 / 3)


class Healer:
    """Heals networks.

    Args:
        sources: The sources with their activations of the calibration images.
        settings: How rows are sampled; the sources'.
        ridge: Strength of the stitches' fit, where they are fitted anew.
    """

    def __init__(self, sources: Sequence[Calibrated], *, settings: CalibrationSettings, ridge: float) -> None:
        self.sources = sources
        self.settings = settings
        self.ridge = ridge

    @torch.inference_mode()
    def heal(self, candidate: Candidate) -> Candidate:
        """The candidate healed, or as it is where that does not raise the held-out R2.

        It is compared with its stitches fitted without the held-out images, too. A network of a single step, or that
        ends early, stays as it is.
        """
        if len(candidate.steps) == 1 or candidate.pool is not None:
            return candidate
        fitted, held_out = held_out_images(candidate, self.sources)
        if not held_out or not fitted:
            return candidate
        try:
            before = self._explained(candidate)
            healed = heal(candidate, self.sources, self.settings, ridge=self.ridge)
            return healed if held_out_r2(healed, self.sources, held_out) > before else candidate
        except CalibrationError:
            # The features do not vary over the held-out images, or are not finite: there is nothing to go by.
            return candidate

    @torch.inference_mode()
    def explained(self, candidate: Candidate) -> float | None:
        """Held-out R2 of a candidate whose stitches have not seen those images; None where that cannot be had."""
        try:
            return self._explained(candidate)
        except CalibrationError:
            return None

    def heal_finalists(
        self, candidates: Sequence[Candidate], *, max_healed: int, progress: Progress | None = None
    ) -> list[Candidate]:
        """Candidates, the `finalists` among them healed where that raises their held-out R2.

        Args:
            candidates: The networks.
            max_healed: Most networks that are healed.
            progress: Where to show progress.
        """
        candidates, progress = list(candidates), progress or Silent()
        chosen = self.finalists(candidates, max_healed)
        progress.start("healing", len(chosen))
        for index in chosen:
            candidates[index] = self.heal(candidates[index])
            progress.advance(1)
        return candidates

    def finalists(self, candidates: Sequence[Candidate], count: int) -> list[int]:
        """Which StitchNets are worth healing, by their place: of each size class in turn that of highest held-out R2.

        A size class is a range of MACs relative to the cheapest source, between the shares `SIZE_CLASSES`. Healing
        raises skips more than it reorders them, but a skip explains less than any network of the sources' own size, so
        that without classes none would be healed.

        Args:
            candidates: The networks; only StitchNets count.
            count: Most that are chosen.
        """
        stitched = [index for index, candidate in enumerate(candidates) if candidate.kind == "stitched"]
        if len(stitched) <= count:
            return stitched
        cheapest = min(source.parts.cost.macs for source in self.sources)
        classes: dict[int, list[tuple[float, int]]] = {}
        for index in stitched:
            explained = self.explained(candidates[index])
            if explained is not None:
                size = sum(candidates[index].cost.macs <= share * cheapest for share in SIZE_CLASSES)
                classes.setdefault(size, []).append((-explained, index))
        ranked = sorted((rank, size, index) for size, c in classes.items() for rank, (_, index) in enumerate(sorted(c)))
        return sorted(index for *_, index in ranked[:count])

    def _explained(self, candidate: Candidate) -> float:
        fair = heal(candidate, self.sources, self.settings, ridge=self.ridge, only_stitches=True)
        return held_out_r2(fair, self.sources, held_out_images(candidate, self.sources)[1])
