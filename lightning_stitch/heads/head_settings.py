"""Which head a network gets: one description that a module, a search and a checkpoint share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor, nn

from lightning_stitch.errors import RecipeError, StitchError
from lightning_stitch.heads.class_maps import ClassMapHead, check_class_map, class_map_from_names, parse_class_map
from lightning_stitch.heads.neighbours import Metric, NearestNeighbourHead, fit_neighbour_head
from lightning_stitch.heads.ridge import RidgeFit, RidgeHead, fit_ridge_head
from lightning_stitch.heads.staged import StagedHead, fit_staged_head
from lightning_stitch.heads.targets import Task, count_of, task_of
from lightning_stitch.recipe import Recipe

_OPTIONS: dict[str, tuple[str, ...]] = {
    "ridge": ("strengths",),
    "knn": ("num_neighbours", "metric", "temperature"),
    "class_map": ("classes", "names", "other"),
    "none": (),
}
HEADS = tuple(_OPTIONS)
"""Names of the heads."""


@dataclass(frozen=True, slots=True)
class HeadSettings:
    """A head's description; make one with `HeadSettings.of`.

    Attributes:
        name: "ridge", "knn", "class_map" or "none".
        task: What the targets are.
        num_classes: How many classes, labels or numbers the head gives; 0 for "none", which gives the features, and
            where the number is not known yet (`is_open`).
        options: What it is made with, in plain dicts, lists, strings and numbers.
        class_names: The names of a class map's classes, in the order of its outputs; None for other heads.
    """

    name: str
    task: Task
    num_classes: int
    options: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        head: str | Mapping[str, Any],
        *,
        task: str = "multiclass",
        num_classes: int | None,
        may_be_open: bool = False,
    ) -> HeadSettings:
        """Check a head as a user writes it: a name, or a mapping with "name" and options.

        | name | task | options |
        |---|---|---|
        | ridge | any | strengths: ridge strengths to choose from |
        | knn | any | num_neighbours and temperature (chosen where not given), metric: cosine or euclidean |
        | class_map | multiclass | classes: {name: indices, ranges or, with `names`, names}, names: those of |
        | | | `class_map_from_names`, other: true or the name of a class of all that is not mapped |
        | none | any | |

        Args:
            head: The head.
            task: "multiclass", "multilabel" or "regression".
            num_classes: How many classes, labels or numbers; a class map knows, "none" does not need it, and a
                regression's default is 1.
            may_be_open: Whether the number may be missing, and come later.

        Raises:
            StitchError: If a name or option is unknown or does not fit the task, or a number is missing.
        """
        name, options = _name_and_options(head)
        if not isinstance(task, str) or task not in get_args(Task):
            raise StitchError(f"task must be one of {get_args(Task)}; found {task!r}.")
        if task != "multiclass" and name == "class_map":
            raise StitchError(f"head={name!r} tells classes apart; for task={task!r} use 'ridge' or 'knn'.")
        if name == "class_map":
            return _class_map(options, num_classes)
        if options.get("metric", "cosine") not in get_args(Metric):
            raise StitchError(f"metric must be one of {get_args(Metric)}; found {options['metric']!r}.")
        if name == "none":
            return cls(name, task, 0, options)  # type: ignore[arg-type]
        count = 1 if num_classes is None and task == "regression" else num_classes
        if count is None and may_be_open:
            return cls(name, task, 0, options)  # type: ignore[arg-type]
        if count is None:
            what = "labels" if task == "multilabel" else "classes"
            raise StitchError(f"head={name!r} with task={task!r} needs num_classes=, the number of {what}.")
        least = 2 if task == "multiclass" else 1
        if not isinstance(count, int) or count < least:
            raise StitchError(f"num_classes must be an integer, at least {least}; found {count!r}.")
        return cls(name, task, count, options)  # type: ignore[arg-type]

    @property
    def is_open(self) -> bool:
        """Whether the number of classes, labels or numbers is not known yet."""
        return self.needs_targets and self.num_classes == 0

    @property
    def until(self) -> str:
        """Where a network with this head ends: at the "features", or at its last source's "output"."""
        return "output" if self.name == "class_map" else "features"

    @property
    def needs_targets(self) -> bool:
        """Whether fitting it takes labelled images."""
        return self.name not in ("class_map", "none")

    @property
    def plain(self) -> str | dict[str, Any]:
        """The head as `of` takes it, resolved, so that a checkpoint's means the same tomorrow."""
        return {"name": self.name, **self.options} if self.options else self.name

    def empty(self, width: int) -> nn.Module:
        """The head for outputs of some width, without its numbers, which a state dict brings.

        Raises:
            StitchError: If a class map speaks of classes that the output does not have.
        """
        if self.name == "ridge":
            return RidgeHead(width, self.num_classes)
        if self.name == "knn":
            metric = {key: value for key, value in self.options.items() if key == "metric"}
            return NearestNeighbourHead(width, self.num_classes, task=self.task, **metric)
        if self.name == "class_map":
            check_class_map(self.options["classes"], num_source_classes=width)
            return ClassMapHead(list(self.options["classes"].values()), width, other=bool(self.options.get("other")))
        return nn.Identity()

    def empty_for(self, recipe: Recipe) -> nn.Module:
        """The head of a composition, without its numbers; `nn.Identity` where that averages heads of its own.

        Raises:
            RecipeError: If the composition has stages and the head is none that has them.
            StitchError: As `empty`.
        """
        if recipe.average is not None:
            return nn.Identity()
        if recipe.stages is None:
            return self.empty(recipe.num_features)
        self.check_stages()
        return StagedHead(recipe, self.num_classes, self.task)

    def check_stages(self) -> None:
        """Refuse (RecipeError) stages where the head is none that has them."""
        if self.name != "ridge":
            raise RecipeError(f"Stages have ridge heads, which leave-one-out says all of; found {self.name!r}.")

    def fit_for(self, recipe: Recipe, features: Tensor, targets: Tensor | None) -> tuple[nn.Module, RidgeFit | None]:
        """The head of a composition, fitted in closed form on its readouts (rows x features), as `fit`.

        Raises:
            RecipeError: As `empty_for`.
            CalibrationError: As `fit`.
            StitchError: As `fit`.
        """
        if recipe.stages is None:
            return self.fit(features, targets, recipe.head_blocks)
        self.check_stages()
        if targets is None:
            raise StitchError(f"head={self.name!r} is fitted on labelled images; these have no labels.")
        options = {"num_classes": self.num_classes, "task": self.task, **self.options}
        return fit_staged_head(features, targets, recipe, **options)

    def fit(
        self, features: Tensor, targets: Tensor | None, blocks: Sequence[int] | None = None
    ) -> tuple[nn.Module, RidgeFit | None]:
        """The head, fitted in closed form on a network's outputs (rows x width), and targets where it needs them.

        `blocks` are the widths of a readout's parts, which count alike (`fit_ridge_head`); only heads that are fitted
        to features heed them. Gives, too, what leave-one-out says of a ridge head.

        Raises:
            CalibrationError: If features or targets cannot be used.
            StitchError: If there are no targets and the head needs them, or the blocks do not fit; likewise as `empty`.
        """
        if not self.needs_targets:
            return self.empty(features.shape[1]).to(features.device), None
        if targets is None:
            raise StitchError(f"head={self.name!r} is fitted on labelled images; these have no labels.")
        options = {"num_classes": self.num_classes, "task": self.task, "blocks": blocks, **self.options}
        if self.name == "knn":
            return fit_neighbour_head(features, targets, **options), None
        return fit_ridge_head(features, targets, **options)


def fit_head(
    features: Tensor,
    targets: Tensor | None = None,
    head: str | Mapping[str, Any] = "ridge",
    *,
    task: str | None = None,
    num_classes: int | None = None,
    blocks: Sequence[int] | None = None,
) -> nn.Module:
    """Fit any of the heads, as `StitchedClassifier(head=...)` names them.

    Args:
        features: A network's features, rows x width; for a class map its logits.
        targets: Class indices (rows,), integers 0 and 1 (rows x labels), or floats (rows,) or (rows x numbers).
        head: A name, or a mapping with "name" and options (`HeadSettings.of`).
        task: None: as the targets' dtype and shape say.
        num_classes: None: as many classes, labels or numbers as the targets say.
        blocks: Widths of consecutive blocks of features that are to count alike (`fit_ridge_head`); class maps and
            "none" do not heed them.

    Raises:
        CalibrationError: If features or targets cannot be used.
        StitchError: If a name or option is unknown, does not fit the task, targets are missing, or blocks do not fit.

    Example:
        >>> features = torch.tensor([[0.0], [0.1], [0.9], [1.0]])
        >>> head = fit_head(features, torch.tensor([0.0, 1.0, 9.0, 10.0]), {"name": "knn", "num_neighbours": 1})
        >>> head(torch.tensor([[0.88]]))
        tensor([[9.]])
    """
    if targets is not None and num_classes is None and _name_and_options(head)[0] != "class_map":
        num_classes = max(2, count_of(targets)) if task_of(targets) == "multiclass" else count_of(targets)
    task = task or ("multiclass" if targets is None else task_of(targets))
    return HeadSettings.of(head, task=task, num_classes=num_classes).fit(features, targets, blocks)[0]


def _name_and_options(head: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    options = dict(head) if isinstance(head, Mapping) else {"name": head}
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in _OPTIONS:
        raise StitchError(f"head must be one of {HEADS}, or a mapping with such a 'name'; found {head!r}.")
    unknown = sorted(map(str, set(options) - set(_OPTIONS[name])))
    if unknown:
        raise StitchError(f"head={name!r} has no options {unknown}; it takes {list(_OPTIONS[name])}.")
    return name, {key: value for key, value in options.items() if value is not None}


def _class_map(options: Mapping[str, Any], num_classes: int | None) -> HeadSettings:
    if not isinstance(options.get("classes"), Mapping):
        raise StitchError(
            "head='class_map' needs its classes: head={'name': 'class_map', 'classes': {'dog': '151-268', ...}}."
        )
    parse = class_map_from_names if "names" in options else parse_class_map
    classes = parse(**{key: value for key, value in options.items() if key != "other"})
    other = options.get("other", False)
    rest = [other if isinstance(other, str) else "other"] if other else []
    if set(rest) & set(classes):
        raise StitchError(f"The class of all that is not mapped and a mapped one are both named {rest[0]!r}.")
    class_names = (*classes, *rest)
    if len(class_names) < 2:
        raise StitchError(f"A class map needs two classes, or one and other=true; found {list(class_names)}.")
    if num_classes not in (None, len(class_names)):
        raise StitchError(f"num_classes={num_classes}, but the class map has {len(class_names)}: {list(class_names)}.")
    resolved = {"classes": classes, **({"other": other} if other else {})}
    return HeadSettings("class_map", "multiclass", len(class_names), resolved, class_names)
