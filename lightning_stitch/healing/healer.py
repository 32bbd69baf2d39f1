"""Heal the composed networks that are worth it, and keep that only where it helped.

After composing and before ranking, a network is measured on calibration images that were held out of its healing: R2 of
its final features against those that its last source, unmodified, gives of the same images. Where healing does not
raise it the network stays as it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.healing.healing import heal
from lightning_stitch.healing.trials import held_out_images, held_out_r2
from lightning_stitch.io import Answer, Answers
from lightning_stitch.progress import Progress, Silent
from lightning_stitch.recipe import Recipe
from lightning_stitch.settings import CalibrationSettings
from lightning_stitch.stitching import Calibrated, Candidate, Stitch

SIZE_CLASSES = (1.0, 0.75, 0.5, 1 / 3)


class Healer:
    """Heals networks, with the sources' activations of the calibration images.

    `ridge` is the strength of the stitches' fit, where they are fitted anew; the journal remembers healed networks.
    """

    def __init__(
        self,
        sources: Sequence[Calibrated],
        *,
        settings: CalibrationSettings,
        ridge: float,
        journal: Answers | None = None,
    ) -> None:
        self.sources = sources
        self.settings = settings
        self.ridge = ridge
        self.journal = journal or Answers()

    def heal(self, candidate: Candidate) -> Candidate:
        """The candidate healed, or as it is where that does not raise the held-out R2.

        It is compared with its stitches fitted without the held-out images, too. A network of a single step stays as
        it is.
        """
        if len(candidate.steps) == 1:
            return candidate
        answer = self.journal.recall(["healed", candidate.key], lambda: self._heal(candidate), dict[str, Any] | None)
        if answer.value is None:
            return candidate
        with self.journal.reading():
            return self._with_numbers(candidate, answer)

    def explained(self, candidate: Candidate) -> float | None:
        """Held-out R2 of a candidate whose stitches have not seen those images; None where that cannot be had."""
        explained: float | None = self.journal.recall(
            ["explained", candidate.key], lambda: Answer(self._explained(candidate)), float | None
        ).value
        return explained

    def heal_finalists(
        self, candidates: Sequence[Candidate], *, max_healed: int, progress: Progress | None = None
    ) -> list[Candidate]:
        """Candidates, at most `max_healed` `finalists` among them healed where that raises their held-out R2."""
        candidates, progress = list(candidates), progress or Silent()
        chosen = self.finalists(candidates, max_healed)
        progress.start("healing", len(chosen))
        for index in chosen:
            candidates[index] = self.heal(candidates[index])
            progress.advance(1)
        return candidates

    def finalists(self, candidates: Sequence[Candidate], count: int) -> list[int]:
        """Which stitched networks are worth healing, by place: of each size class in turn that of highest held-out R2.

        A size class is a range of MACs relative to the cheapest source, between the shares `SIZE_CLASSES`. Healing
        raises skips more than it reorders them, but a skip explains less than any network of the sources' own size, so
        that without classes none would be healed.
        """
        stitched = [index for index, candidate in enumerate(candidates) if candidate.kind in ("stitched", "shortened")]
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

    @torch.inference_mode()
    def _heal(self, candidate: Candidate) -> Answer:
        """The healed candidate's recipe and the numbers of its steps; None where healing does not help."""
        fitted, held_out = held_out_images(candidate, self.sources)
        before = self._explained(candidate) if held_out and fitted else None
        if before is None:
            return Answer()
        try:
            healed = heal(candidate, self.sources, self.settings, ridge=self.ridge)
            if not held_out_r2(healed, self.sources, held_out) > before:
                return Answer()
        except CalibrationError:
            return Answer()
        numbers = {f"{place} {name}": x for place, step in enumerate(healed.steps) for name, x in step.tensors.items()}
        for place, step in enumerate(healed.steps):
            state = {} if step.stitch is None else step.stitch.state_dict()
            numbers |= {f"stitch {place} {name}": x for name, x in state.items()}
        return Answer(healed.recipe.to_dict(), numbers)

    @torch.inference_mode()
    def _explained(self, candidate: Candidate) -> float | None:
        try:
            fair = heal(candidate, self.sources, self.settings, ridge=self.ridge, only_stitches=True)
            return held_out_r2(fair, self.sources, held_out_images(candidate, self.sources)[1])
        except CalibrationError:
            # The features do not vary over the held-out images, or are not finite: there is nothing to go by.
            return None

    @torch.inference_mode()
    def _with_numbers(self, candidate: Candidate, answer: Answer) -> Candidate:
        """The candidate healed, from what `_heal` noted."""
        recipe = Recipe.from_dict(answer.value)
        steps = []
        for place, (step, spec) in enumerate(zip(candidate.steps, (None, *recipe.stitches), strict=True)):
            device = self.sources[step.source].features.device
            tensors = {name: x.to(device) for name, x in _under(f"{place} ", answer.tensors).items()}
            stitch = None
            if spec is not None:
                stitch = Stitch(dataclasses.replace(spec, placement="explicit"))
                stitch.load_state_dict(_under(f"stitch {place} ", answer.tensors))
                stitch.to(device)
            steps.append(dataclasses.replace(step, spec=spec, stitch=stitch, tensors=tensors))
        return candidate.with_steps(steps, healed=recipe.healed, unhealed=recipe.unhealed)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
