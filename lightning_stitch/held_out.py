"""Which calibration images are held out of a fit to judge it by: one choice for stitches and refinements alike.

They are always the last ones of the calibration images: a quarter of them, or whole groups where groups are given, for
which the images are put in that order before they are used.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from lightning_stitch.errors import CalibrationError


def num_held_out(num_images: int) -> int:
    """How many images are held out of so many."""
    return num_images // 4


def held_out_groups(groups: Sequence[Hashable]) -> list[bool]:
    """Which images are held out where groups must not be split, for each image.

    Whole groups, those met last first, as long as they hold no more than a quarter of the images; the smallest group
    where each holds more.

    Args:
        groups: The label of each image's group: the photograph, patient or module that it shows.

    Raises:
        CalibrationError: If all images are of one group.
    """
    members: dict[Hashable, int] = {}
    for group in groups:
        members[group] = members.get(group, 0) + 1
    if len(members) < 2:
        raise CalibrationError(
            f"Holding out whole groups needs images of at least 2 groups; found {list(members) or 'no images'}. Leave "
            f"groups= out, and the last quarter of the images is held out."
        )
    chosen: set[Hashable] = set()
    taken = 0
    for group in reversed(members):
        if taken + members[group] <= num_held_out(len(groups)):
            chosen.add(group)
            taken += members[group]
    chosen = chosen or {min(reversed(members), key=members.__getitem__)}
    return [group in chosen for group in groups]
