"""Whether the data suit the head that a search fits, and how it ranks."""

from __future__ import annotations

from lightning_stitch.data import CalibrationDataModule
from lightning_stitch.errors import StitchError
from lightning_stitch.heads import HeadSettings
from lightning_stitch.search import NEED_LABELS, Ranking


def check_targets(head: HeadSettings, data: CalibrationDataModule, *, ranking: str | Ranking, compare: bool) -> None:
    """Refuse data whose targets are none that the head, the ranking or the comparison on test images can use."""
    if compare and (data.task == "none" or head.name == "none" or head.task != "multiclass"):
        raise StitchError(
            f"compare=True tells accuracies of classes; the data have task={data.task!r}, the module has "
            f"task={head.task!r} and head={head.name!r}. Leave it out: candidates.csv has the scores of all candidates."
        )
    if data.task == "none":
        if head.needs_targets:
            raise StitchError(
                f"head={head.name!r} is fitted on labelled images, but the data module has task='none'. Give it "
                f"targets and task={head.task!r}, or use head='class_map' or 'none'."
            )
        if ranking in NEED_LABELS:
            raise StitchError(f"ranking={ranking!r} needs labels, but the data module has task='none'; use 'auto'.")
        return
    if head.name == "none":
        return
    if data.task != head.task:
        raise StitchError(
            f"The data module has task={data.task!r}, StitchedClassifier has task={head.task!r}; give both the same."
        )
    if data.num_classes != head.num_classes:
        what = {"multiclass": "classes", "multilabel": "labels", "regression": "numbers for each image"}[head.task]
        raise StitchError(
            f"The data have {data.num_classes} {what}, StitchedClassifier has num_classes={head.num_classes}."
        )
    mapped, names = list(head.class_names or []), data.class_names or []
    if mapped != names and sorted(mapped) == sorted(names):
        raise StitchError(
            f"The class map has the data's classes in another order: {mapped} instead of {names}. Give them in the "
            f"data's order, by which the labels are numbered."
        )
