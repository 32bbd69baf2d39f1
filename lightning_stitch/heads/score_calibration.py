"""From scores to probabilities: one temperature for classes, one slope and offset for each label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_stitch.heads.targets import Task

_TEMPERATURES = (1e-3, 1e3)  # scores lie around [0, 1]: nearly uniform probabilities up to nearly certain ones
_BISECTIONS = 40
_NEWTON_STEPS = 50


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Outputs = factor * scores + offset, each (columns,), float64; and what they say of the rows it was made of.

    `temperature`, the classes' one factor, and `accuracy` are None but for classes, `log_loss` for numbers.
    """

    factor: Tensor
    offset: Tensor
    temperature: float | None
    accuracy: float | None
    log_loss: float | None


def calibrate(scores: Tensor, columns: Tensor, *, task: Task) -> Calibration:
    """The calibration of scores (rows x columns) of rows that they do not know, whose targets are the columns."""
    factor, offset = torch.ones_like(columns[0]), torch.zeros_like(columns[0])
    if task == "multiclass":
        temperature = class_temperature(scores, columns)
        accuracy = (scores.argmax(1) == columns.argmax(1)).double().mean().item()
        log_loss = F.cross_entropy(temperature * scores, columns.argmax(1)).item()
        return Calibration(temperature * factor, offset, temperature, accuracy, log_loss)
    if task == "multilabel":
        factor, offset = label_calibration(scores, columns)
        log_loss = F.binary_cross_entropy_with_logits(factor * scores + offset, columns).item()
        return Calibration(factor, offset, None, None, log_loss)
    return Calibration(factor, offset, None, None, None)


def class_temperature(scores: Tensor, one_hot: Tensor) -> float:
    """The factor on class scores, between 1e-3 and 1e3, whose softmax has the least smoothed log-loss.

    Smoothed as though one further row were labelled at random: without that, classes that are told apart without error
    would get infinite logits (compare Platt 1999, section 2.2). The loss is convex, so its slope is bisected, in the
    factor's logarithm. Scores and labels are rows x classes; the scores, float64, spread over about one unit, are
    better those of rows that they do not know.
    """
    n, num_classes = scores.shape
    smoothed = (n * one_hot + 1 / num_classes) / (n + 1)
    target_score = (smoothed * scores).sum() / n
    low, high = (math.log(bound) for bound in _TEMPERATURES)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        mean_score = ((math.exp(middle) * scores).softmax(1) * scores).sum() / n
        low, high = (middle, high) if mean_score < target_score else (low, middle)
    return math.exp((low + high) / 2)


def label_calibration(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of each label's logit, by Platt's method (Platt 1999), with his smoothed targets.

    A slope is never negative: scores of rows that were left out of a fit which learnt nothing lie the wrong way, as
    each row's absence moves the mean away from it. Scores, float64, of rows that they do not know, and labels, 0 or 1,
    are rows x labels.
    """
    n = len(scores)
    positives = labels.sum(0)
    high, low = (positives + 1) / (positives + 2), 1 / (n - positives + 2)
    wanted = torch.where(labels > 0, high, low)
    centre, deviation = scores.mean(0), scores.std(0, correction=0)
    x = (scores - centre) / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    base = torch.special.logit(wanted.mean(0))
    slope, offset = torch.zeros_like(base), base.clone()
    best = F.binary_cross_entropy_with_logits(slope * x + offset, wanted, reduction="none").mean(0)
    for _ in range(_NEWTON_STEPS):
        p = (slope * x + offset).sigmoid()
        curvature = p * (1 - p)
        a, b, c = (curvature * x * x).mean(0) + 1e-9, (curvature * x).mean(0), curvature.mean(0) + 1e-9
        ga, gb = ((p - wanted) * x).mean(0), (p - wanted).mean(0)
        determinant = a * c - b * b
        steps = (c * ga - b * gb) / determinant, (a * gb - b * ga) / determinant
        share = torch.ones_like(base)
        for _ in range(10):  # halve the step of each label whose loss would rise
            tried = slope - share * steps[0], offset - share * steps[1]
            loss = F.binary_cross_entropy_with_logits(tried[0] * x + tried[1], wanted, reduction="none").mean(0)
            share = torch.where(loss <= best, share, share / 2)
        falls = loss <= best
        slope, offset = torch.where(falls, tried[0], slope), torch.where(falls, tried[1], offset)
        best = torch.where(falls, loss, best)
    learnt = (slope > 0) & (deviation > 0)
    slope, offset = torch.where(learnt, slope, 0.0), torch.where(learnt, offset, base)
    slope = slope / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    return slope, offset - slope * centre
