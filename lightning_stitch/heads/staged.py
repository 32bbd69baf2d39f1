"""Heads on ever more of a readout: an image gets the answer of the first that is sure of it.

Each head's answers on labelled images left out of its fit say how sure it is of images that it has not seen, so that
thresholds cost no further labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_stitch.errors import CalibrationError
from lightning_stitch.heads.ridge import RidgeFit, RidgeHead, fit_ridge_head
from lightning_stitch.heads.targets import Task, standardised, target_columns
from lightning_stitch.recipe import Recipe

_LEAST_RESIDUAL = 1e-6  # of a squared, standardised residual, before its logarithm


def confidence(outputs: Tensor, task: Task) -> Tensor:
    """How sure outputs (rows x columns) are: (rows,), more is surer.

    Of classes the margin between the two highest logits, of labels the least sure one's distance from a logit of 0; of
    numbers the last column is the logarithm of the expected squared residual, and the surer the less it is.
    """
    if task == "regression":
        return -outputs[:, -1]
    if task == "multilabel":
        return outputs.abs().amin(1)
    highest = outputs.topk(2, dim=1).values
    return highest[:, 0] - highest[:, 1]


def thresholds_at(confidences: Sequence[Tensor], goes_on: Sequence[float]) -> Tensor:
    """The confidences from which on an image stops, so that given shares of those that reach each stage go on.

    Args:
        confidences: Of the same images (images,) at each stage but the last.
        goes_on: For each of these stages the share, from 0 to 1, of those that reach it.

    Returns:
        (stages - 1,), float32: half way between the last that goes on and the first that stops; infinite where all do
        the same, and where no image arrives.

    Example:
        >>> thresholds_at([torch.tensor([4.0, 1.0, 2.0, 3.0])], [0.5]).tolist()
        [2.5]
    """
    reached = torch.ones(len(confidences[0]), dtype=torch.bool, device=confidences[0].device)
    thresholds = []
    for sure, share in zip(confidences, goes_on, strict=True):
        ordered = sure[reached].sort().values
        count = round(share * len(ordered))
        if count == 0:
            threshold = -torch.inf
        elif count == len(ordered):
            threshold = torch.inf
        else:
            threshold = float(ordered[count - 1 : count + 1].mean())
        thresholds.append(threshold)
        reached = reached & (sure < threshold)
    return torch.tensor(thresholds, dtype=torch.float32, device=reached.device)


class StagedHead(nn.Module):
    """A linear head for each stage; in eval mode each row gets the outputs of the first that is sure of it.

    In training mode the last one's are given; `outputs` gives all, to train them together.

    Attributes:
        heads: A `RidgeHead` for each stage, on the first so many features; of numbers it has one output more, the
            logarithm of the expected squared residual.
        settings: Buffer (settings x stages - 1): the confidences from which on a row stops, for each of the recipe's
            operating points.
        point: Which of them is in use.

    Args:
        recipe: A composition with stages.
        num_classes: Classes, labels or numbers.
        task: What they are.
    """

    settings: Tensor

    def __init__(self, recipe: Recipe, num_classes: int, task: Task) -> None:
        super().__init__()
        assert recipe.stages is not None
        self.num_classes, self.task = num_classes, task
        self.widths = tuple(sum(blocks) for blocks in recipe.stage_blocks)
        columns = num_classes + (task == "regression")
        self.heads = nn.ModuleList([RidgeHead(width, columns) for width in self.widths])
        self.register_buffer("settings", torch.zeros(len(recipe.stages.points), len(self.widths) - 1))
        self.point = recipe.stages.point

    @property
    def thresholds(self) -> Tensor:
        """The confidences from which on a row stops, (stages - 1,)."""
        return self.settings[self.point]

    def outputs(self, features: Tensor) -> list[Tensor]:
        """Every stage's outputs of whole readouts (rows x features)."""
        return [head(features[:, :width]) for head, width in zip(self.heads, self.widths, strict=True)]

    def is_sure(self, stage: int, outputs: Tensor) -> Tensor:
        """Which rows stop at a stage whose outputs these are: (rows,), bool; at the last all do."""
        if stage == len(self.heads) - 1:
            return torch.ones(len(outputs), dtype=torch.bool, device=outputs.device)
        return confidence(outputs, self.task) >= self.thresholds[stage]

    def answer(self, outputs: Tensor) -> Tensor:
        """Of a stage's outputs those that users ask for: logits or numbers (rows x num_classes)."""
        return outputs[:, : self.num_classes]

    def forward(self, features: Tensor) -> Tensor:
        """Logits or numbers (rows x num_classes) of whole readouts."""
        outputs = self.outputs(features)
        result = outputs[-1]
        for stage in reversed(range(0 if self.training else len(outputs) - 1)):
            result = torch.where(self.is_sure(stage, outputs[stage])[:, None], outputs[stage], result)
        return self.answer(result)

    def stops(self, features: Tensor) -> Tensor:
        """The stage at which each row of whole readouts stops: (rows,), integers."""
        stages = torch.full((len(features),), len(self.heads) - 1, device=features.device)
        for stage, outputs in reversed(list(enumerate(self.outputs(features)[:-1]))):
            stages = torch.where(self.is_sure(stage, outputs), stage, stages)
        return stages

    def set_thresholds(self, recipe: Recipe, confidences: Sequence[Tensor]) -> None:
        """For every operating point of the recipe the thresholds at which as many of these images go on.

        Args:
            recipe: The composition.
            confidences: `confidence` of the same images at each stage but the last, none of which a head was fitted on.
        """
        assert recipe.stages is not None
        rows = [thresholds_at(confidences, point.goes_on) for point in recipe.stages.points]
        self.settings.copy_(torch.stack(rows))

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"widths={self.widths}, num_classes={self.num_classes}, task={self.task!r}"


def fit_staged_head(
    features: Tensor,
    targets: Tensor,
    recipe: Recipe,
    *,
    num_classes: int,
    task: Task = "multiclass",
    strengths: Sequence[float] | None = None,
) -> tuple[StagedHead, RidgeFit]:
    """Fit the heads of a composition with stages in closed form, their thresholds by leave-one-out.

    Args:
        features: Whole readouts, rows x features.
        targets: As `fit_ridge_head` takes them.
        recipe: The composition that they are of; its stages say how many images are to go on.
        num_classes: Classes, labels or numbers.
        task: "multiclass", "multilabel" or "regression".
        strengths: Ridge strengths to choose from.

    Returns:
        The head, in eval mode, and what leave-one-out says of the last stage.

    Raises:
        CalibrationError: As `fit_ridge_head`.
    """
    options = {"num_classes": num_classes, "task": task, "strengths": strengths}
    with torch.inference_mode(False), torch.no_grad():
        staged = StagedHead(recipe, num_classes, task).to(features.device)
        confidences = []
        for place, blocks in enumerate(recipe.stage_blocks):
            of_stage = features[:, : staged.widths[place]]
            scaled = blocks if len(blocks) > 1 else None
            head, fit = fit_ridge_head(of_stage, targets, blocks=scaled, **options)  # type: ignore[arg-type]
            assert fit.left_out is not None
            left_out = fit.left_out
            if task == "regression":
                doubt, of_doubt = _fit_doubt(of_stage, targets, left_out, scaled, num_classes)
                head_weight, head_bias = torch.cat([head.weight, doubt.weight]), torch.cat([head.bias, doubt.bias])
                left_out = torch.cat([left_out, of_doubt], dim=1)
            else:
                head_weight, head_bias = head.weight, head.bias
            staged.heads[place].load_state_dict({"weight": head_weight, "bias": head_bias})
            confidences.append(confidence(left_out, task))
        staged.set_thresholds(recipe, confidences[:-1])
    return staged.eval(), fit


def _fit_doubt(
    features: Tensor, targets: Tensor, left_out: Tensor, blocks: Sequence[int] | None, num_classes: int
) -> tuple[RidgeHead, Tensor]:
    """A linear map to the logarithm of the squared residual of a row left out, and what it says of rows left out."""
    columns = target_columns(targets, task="regression", num_classes=num_classes).to(features.device)
    residuals = log_residuals(left_out, columns)
    try:
        doubt, fit = fit_ridge_head(features, residuals, num_classes=1, task="regression", blocks=blocks)
    except CalibrationError:  # all alike: no image is surer than another
        return RidgeHead(features.shape[1], 1).to(features.device), torch.zeros_like(residuals)[:, None]
    assert fit.left_out is not None
    return doubt, fit.left_out


def log_residuals(predictions: Tensor, columns: Tensor) -> Tensor:
    """The logarithm of each row's mean squared residual (rows,), numbers standardised."""
    deviation = standardised(columns)[2]
    return ((predictions - columns) / deviation).square().mean(1).clamp_min(_LEAST_RESIDUAL).log()
