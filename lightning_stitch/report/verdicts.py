"""Verdicts: is a contender better than a rival, equivalent to it, or worse, and is it worth it?"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_stitch.errors import StitchError
from lightning_stitch.report.evaluation import Evaluation, correct, valid_targets
from lightning_stitch.report.paired_tests import equivalence, mcnemar, score_interval, student_quantile, student_tail
from lightning_stitch.tables import Record

Word = Literal["better", "equivalent", "worse", "undecided"]
CostUnit = Literal["MACs", "training FLOPs"]

MARGIN = 0.01
_SIGNIFICANT = 0.05
_PHRASES: dict[Word, str] = {
    "better": "better than",
    "equivalent": "equivalent to",
    "worse": "worse than",
    "undecided": "undecided against",
}
_UNITS: dict[CostUnit, tuple[str, float]] = {"MACs": ("M MACs", 1e6), "training FLOPs": ("training TFLOPs", 1e12)}


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a contender's accuracy compares with a rival's; `str` says it in words.

    It is *equivalent* where a difference of `margin` or more, either way, is refuted at 5 %: a margin is the least
    difference that counts, so this comes first, also where the accuracies differ surely but by less. Otherwise it is
    *better* or *worse* where equal accuracy is refuted at 5 %, and *undecided* where neither is.

    Attributes:
        rival: Name of what is compared with.
        contender: Name of what is judged.
        word: The outcome.
        difference: In accuracy, the contender's less the rival's; over several splits its mean.
        low: Lower end of the difference's 95 % interval.
        high: Upper end.
        p_value: Of equal accuracy.
        p_equivalence: Of accuracies that differ by the margin or more.
        margin: The least difference that counts.
        num_images: Test images (of each split).
        num_splits: How many splits of the data were compared.
        won: Images that the contender alone got right; None: several splits.
        lost: Images that the rival alone got right, likewise.
        accuracy: The contender's; None: several splits.
        guessing: Accuracy of always guessing the commonest class, where the contender is no better; None: it is.
        contender_cost: What it costs; None: costs do not matter here.
        rival_cost: Likewise.
        cost_unit: What costs are counted in.
    """

    rival: str
    contender: str
    word: Word
    difference: float
    low: float
    high: float
    p_value: float
    p_equivalence: float
    margin: float
    num_images: int
    num_splits: int = 1
    won: int | None = None
    lost: int | None = None
    accuracy: float | None = None
    guessing: float | None = None
    contender_cost: float | None = None
    rival_cost: float | None = None
    cost_unit: CostUnit = "MACs"

    @property
    def worth_it(self) -> bool:
        """Whether the contender is better, or as good at a lower cost, and better than guessing."""
        if self.guessing is not None:
            return False
        return self.word == "better" or (self.word == "equivalent" and self._cost_ratio < 1)

    @property
    def is_affordable(self) -> bool:
        """Whether the rival costs no more than the contender."""
        return self._cost_ratio >= 1

    @property
    def rival_with_cost(self) -> str:
        """The rival's name, with what it costs."""
        return self._named(self.rival, self.rival_cost)

    @property
    def contender_with_cost(self) -> str:
        """The contender's name, with what it costs."""
        return self._named(self.contender, self.contender_cost)

    def figures(self) -> str:
        """The difference in points of accuracy, with its interval."""
        return f"{_points(self.difference)} points of accuracy (95 % interval {self._interval()})"

    def line(self) -> str:
        """The word and the difference in points, with its interval, against which rival."""
        return f"{self.word}: {_points(self.difference)} points ({self._interval()}) against {self.rival_with_cost}"

    def sentence(self) -> str:
        """The word and the figures, whether it is worth it, and in parentheses what that rests on."""
        sure = self.word == "equivalent" and self.p_value < _SIGNIFICANT
        return (
            f"{self._named(self.contender, self.contender_cost)} is {_PHRASES[self.word]} "
            f"{self.rival_with_cost}: {self._accuracies()}{self.figures()}"
            f"{'; they do differ, but by less than counts' if sure else ''}. {self.conclusion()} ({self._evidence()}.)"
        )

    __str__ = sentence

    def conclusion(self) -> str:
        """Whether it is worth it, and why."""
        if self.guessing is not None:
            return f"Not worth it: {guessing_in_words(self.contender, self.guessing)}"
        if self.word == "undecided":
            told_by = "the test images" if self.num_splits == 1 else "these splits"
            return (
                f"Not worth it so far: {told_by} cannot tell it from {self.rival}, more would"
                f"{self._at_cost('; it takes')}."
            )
        reason = {"better": "more accurate than", "equivalent": "as accurate as", "worse": "less accurate than"}
        judgement = "Worth it" if self.worth_it else "Not worth it"
        return f"{judgement}: {reason[self.word]} {self.rival}{self._at_cost(', for')}."

    def record(self) -> Record:
        """All of it as a flat mapping of plain JSON values, the sentence included."""
        return {**dataclasses.asdict(self), "worth_it": self.worth_it, "sentence": self.sentence()}

    def _interval(self) -> str:
        return f"{_points(self.low)} to {_points(self.high)}"

    @property
    def _cost_ratio(self) -> float:
        if self.contender_cost is None or self.rival_cost is None:
            return 1.0
        return self.contender_cost / self.rival_cost if self.rival_cost else math.inf

    def _named(self, name: str, cost: float | None) -> str:
        unit, one = _UNITS[self.cost_unit]
        return name if cost is None else f"{name} ({cost / one:.3g} {unit})"

    def _accuracies(self) -> str:
        if self.accuracy is None:
            return ""
        return f"right on {self.accuracy:.3f} against {self.accuracy - self.difference:.3f}, "

    def _at_cost(self, words: str) -> str:
        if self.contender_cost is None or self.rival_cost is None:
            return ""
        ratio = self._cost_ratio
        if ratio == 1:
            return f"{words} as many {self.cost_unit}"
        times = f"{100 * ratio:.2g} % of" if ratio < 0.995 else f"{ratio:.3g} times"
        return f"{words} {times} its {self.cost_unit}"

    def _evidence(self) -> str:
        points = f"{100 * self.margin:g} point{'' if self.margin == 0.01 else 's'}"
        within = f"two one-sided tests within {points}, p = {self.p_equivalence:.2g}"
        if self.won is None:
            return (
                f"{self.num_splits} splits, {self.num_images} test images in each; corrected resampled t-test, "
                f"p = {self.p_value:.2g}; {within}"
            )
        return (
            f"Of {self.num_images} test images {self.won} only the former and {self.lost} only the latter got right: "
            f"exact McNemar test, p = {self.p_value:.2g}; {within}"
        )


def judge(rival: Evaluation, contender: Evaluation, targets: Tensor, *, margin: float = MARGIN) -> Verdict:
    """Compare two networks on the same test images.

    Equal accuracy is tested by the exact McNemar test, equivalence by two exact one-sided tests
    (`report.paired_tests`); the interval is Tango's score interval, which reaches to 0 where equal accuracy is not
    refuted. A network is no better than guessing unless the McNemar test finds it better than the constant answer
    that is right most often.

    Args:
        rival: What is compared with.
        contender: What is judged.
        targets: True classes, integers, one for each image.
        margin: The least difference in accuracy that counts; with 0 nothing is equivalent.

    Raises:
        StitchError: If targets and probabilities do not fit each other, or the margin is not from 0 to 1.

    Example:
        >>> import torch
        >>> targets = torch.arange(400) % 2
        >>> sure = torch.nn.functional.one_hot(targets, 2).float()
        >>> costs = {"params": 1, "seconds": 0.0, "labels": 0}
        >>> source = Evaluation("resnet", "source", sure, macs=100, **costs)
        >>> verdict = judge(source, Evaluation("exit", "early exit", sure, macs=25, **costs), targets)
        >>> verdict.word, verdict.conclusion()
        ('equivalent', 'Worth it: as accurate as resnet, for 25 % of its MACs.')
    """
    check_margin(margin)
    targets = valid_targets(valid_targets(targets, rival), contender)
    right = correct(contender, targets)
    won, lost = _discordant(right, correct(rival, targets))
    difference, num_images = (won - lost) / len(targets), len(targets)
    p_value, p_equivalence = mcnemar(won, lost), equivalence(won, lost, num_images, margin)
    low, high = score_interval(won, lost, num_images)
    if p_value >= _SIGNIFICANT:
        low, high = min(low, 0.0), max(high, 0.0)
    return Verdict(
        rival=rival.label or rival.name,
        contender=contender.label or contender.name,
        word=_word(difference, p_value, p_equivalence),
        difference=difference,
        low=low,
        high=high,
        p_value=p_value,
        p_equivalence=p_equivalence,
        margin=margin,
        num_images=num_images,
        won=won,
        lost=lost,
        accuracy=float(right.mean()),
        guessing=guessing_share(contender, targets),
        contender_cost=contender.expected_macs,
        rival_cost=rival.expected_macs,
    )


def judge_splits(
    differences: Sequence[float],
    *,
    num_train: int,
    num_test: int,
    rival: str,
    contender: str,
    contender_cost: float | None = None,
    rival_cost: float | None = None,
    cost_unit: CostUnit = "MACs",
    margin: float = MARGIN,
) -> Verdict:
    """Compare two ways of making a network over several random splits of one data set.

    Training sets of random splits overlap, so that differences are less independent than they look: the variance of
    their mean is (1 / splits + num_test / num_train) times their variance, and the statistic is compared with
    Student's t of splits - 1 degrees (Nadeau and Bengio 2003, "Inference for the generalization error", the corrected
    resampled t-test). Equivalence is two such tests, one-sided. The variance is taken for no less than it were if one
    image of one split had been answered otherwise: differences that happen to be equal prove nothing.

    Args:
        differences: In accuracy, the contender's less the rival's, one for each split.
        num_train: Labelled images that each split made the networks with.
        num_test: Test images of each split.
        rival: Name of what is compared with.
        contender: Name of what is judged.
        contender_cost: What it costs; None: costs do not matter.
        rival_cost: Likewise.
        cost_unit: What costs are counted in.
        margin: As in `judge`.

    Raises:
        StitchError: If there are fewer than two differences, one is not finite, or a number is out of range.

    Example:
        >>> numbers = {"num_train": 300, "num_test": 1000, "rival": "last features", "contender": "all taps"}
        >>> verdict = judge_splits([0.05, 0.06, 0.055, 0.05, 0.06], **numbers)
        >>> verdict.word, round(verdict.low, 3), round(verdict.high, 3)
        ('better', 0.043, 0.067)
    """
    check_margin(margin)
    splits = len(differences)
    if splits < 2 or not all(map(math.isfinite, differences)):
        raise StitchError(f"Splits are compared by two or more finite differences; found {list(differences)}.")
    if min(num_train, num_test) < 1:
        raise StitchError(f"num_train and num_test must be at least 1; found {num_train} and {num_test}.")
    mean = statistics.fmean(differences)
    variance = max(statistics.variance(differences), 1 / (splits * num_test**2))
    error = math.sqrt((1 / splits + num_test / num_train) * variance)
    half = student_quantile(0.95, splits - 1) * error
    p_value = student_tail(mean / error, splits - 1)
    inside = (margin - abs(mean)) / error  # the nearer limit decides
    one_sided = student_tail(inside, splits - 1) / 2
    p_equivalence = one_sided if inside > 0 else 1 - one_sided
    return Verdict(
        rival=rival,
        contender=contender,
        word=_word(mean, p_value, p_equivalence),
        difference=mean,
        low=max(-1.0, mean - half),
        high=min(1.0, mean + half),
        p_value=p_value,
        p_equivalence=p_equivalence,
        margin=margin,
        num_images=num_test,
        num_splits=splits,
        contender_cost=contender_cost,
        rival_cost=rival_cost,
        cost_unit=cost_unit,
    )


def guessing_share(evaluation: Evaluation, targets: Tensor) -> float | None:
    """Accuracy of always answering the commonest class, where a network is not surely better; None where it is."""
    constant = (targets == targets.mode().values).double()
    ahead, behind = _discordant(correct(evaluation, targets), constant)
    is_better = ahead > behind and mcnemar(ahead, behind) < _SIGNIFICANT
    return None if is_better else float(constant.mean())


def guessing_in_words(name: str, share: float) -> str:
    """That a network is no better than guessing, and what would help."""
    return (
        f"{name} is no better than always guessing the commonest class (right on {share:.3f}). More labels would help, "
        f"or sources that were trained on something nearer."
    )


def strongest(verdicts: Sequence[Verdict]) -> Verdict:
    """Of verdicts on one contender the one that decides: against those that cost no more, and the worst of them.

    The first of several alike, so that they should come in the order of a ranking by other images. A contender is
    worth it where it is against all of them, which needs no correction for their number (Berger 1982).
    """
    return min([v for v in verdicts if v.is_affordable] or verdicts, key=lambda verdict: verdict.worth_it)


def in_words(verdicts: Sequence[Verdict]) -> str:
    """Of one contender: how accurate it is, a line against each rival, the strongest first, and whether it is worth it.

    The lines against rivals begin with two spaces.
    """
    first = strongest(verdicts)
    right = "" if first.accuracy is None else f": right on {first.accuracy:.3f} of {first.num_images} test images"
    rivals = [first, *(verdict for verdict in verdicts if verdict is not first)]
    lines = [f"{first.contender_with_cost}{right}", *(f"  {verdict.line()}" for verdict in rivals)]
    return "\n".join([*lines, first.conclusion()])


def in_short(verdicts: Sequence[Verdict]) -> str:
    """The word against the strongest rival, as "better than resnet"."""
    first = strongest(verdicts)
    return f"{_PHRASES[first.word]} {first.rival}"


def _points(difference: float) -> str:
    """A difference in accuracy as points, without a sign for none."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"


def check_margin(margin: float) -> None:
    """Refuse a margin that is no difference in accuracy."""
    if not 0 <= margin < 1:
        raise StitchError(f"margin is a difference in accuracy, from 0 to 1, as 0.01 for a point; found {margin}.")


def _word(difference: float, p_value: float, p_equivalence: float) -> Word:
    if p_equivalence <= _SIGNIFICANT:
        return "equivalent"
    if p_value >= _SIGNIFICANT:
        return "undecided"
    return "better" if difference > 0 else "worse"


def _discordant(right: Tensor, others: Tensor) -> tuple[int, int]:
    """How many images only the first and only the second got right."""
    gain = right - others
    return int((gain > 0).sum()), int((gain < 0).sum())
