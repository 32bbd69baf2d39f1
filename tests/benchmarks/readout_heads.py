"""What it costs to fit heads to readouts, and to label some more rows: ratios to other ways, in one run.

python tests/benchmarks/readout_heads.py

Every way gives the head of the same rows of random features (three classes): `RidgeLearner` after an update, at its
strength; a refit from nothing at that strength; a refit that chooses the strength anew; and scikit-learn's
RidgeClassifierCV with as many strengths, on standardised features, which has no calibration. The ways take turns; of
each the median CPU time is printed. Where blocks are scaled and features outnumber rows, most of an update is the
rows' Gram matrix, as each new row moves every feature's deviation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import process_time

import torch
from sklearn.linear_model import RidgeClassifierCV
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lightning_stitch import RidgeLearner, fit_ridge_head
from lightning_stitch.heads import DEFAULT_STRENGTHS

BLOCK = 50


def seconds(call: Callable[[], object]) -> float:
    start = process_time()
    call()
    return process_time() - start


def in_turns(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median CPU seconds of each way."""
    times = [{name: seconds(way) for name, way in ways.items()} for _ in range(turns + 1)][1:]
    return {name: median(turn[name] for turn in times) for name in ways}


def compare(num_rows: int, width: int, new: int, turns: int, *, blocks: bool, keep_rows: bool) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_rows + new * (turns + 1), width, generator=generator)
    targets = (features[:, :3] + torch.randn(len(features), 3, generator=generator)).argmax(1)
    widths = [BLOCK] * (width // BLOCK) if blocks else None
    learner = RidgeLearner(features[:num_rows], targets[:num_rows], num_classes=3, blocks=widths, keep_rows=keep_rows)

    def update() -> None:
        here = slice(learner.num_rows, learner.num_rows + new)
        learner.update(features[here], targets[here])
        _ = learner.head

    def refit(strengths: list[float] | None) -> Tensor:
        now = learner.num_rows
        head, _ = fit_ridge_head(features[:now], targets[:now], num_classes=3, blocks=widths, strengths=strengths)
        return head.weight.detach()

    def scikit_learn() -> None:
        x = StandardScaler().fit_transform(features[: learner.num_rows].double().numpy())
        RidgeClassifierCV([strength * width for strength in DEFAULT_STRENGTHS]).fit(x, targets[: learner.num_rows])

    ways = {
        "update": update,
        "refit": lambda: refit([learner.strength]),
        "refit, strength anew": lambda: refit(None),
        "RidgeClassifierCV": scikit_learn,
    }
    times = in_turns(ways, turns)
    expected = refit([learner.strength])
    if keep_rows:  # without rows the first calibration stays
        assert float((learner.head.weight.detach() - expected).abs().max() / expected.abs().max()) < 1e-6
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=8, help="rows of an update")
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; an update is of {options.new} rows\n")
    print(
        "| rows x features | scaled | rows kept | update, CPU ms | refit | refit, strength anew | RidgeClassifierCV |"
    )
    print("|---|---|---|---|---|---|---|")
    for rows, width, blocks, keep in (
        (512, 5000, True, True),
        (512, 5000, False, True),
        (5000, 500, True, True),
        (5000, 500, True, False),
    ):
        times = compare(rows, width, options.new, options.turns, blocks=blocks, keep_rows=keep)
        update, *others = times.values()
        cells = " | ".join(f"{other / update:.1f} x" for other in others)
        names = f"{rows} x {width} | {'blocks' if blocks else 'no'} | {'yes' if keep else 'no'}"
        print(f"| {names} | {1e3 * update:.0f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
