"""Score one running network against 10,000 cuts: shortlist and exact CKA, against exact CKA of all.

    python tests/benchmarks/large_pile.py [--cuts 10000]

The cuts are synthetic: linear views, with noise of their own, of 64 hidden factors of which each cut sees its own
selection, in families that share most of theirs. Printed are the recall of the exact ten best, seconds for one step
and bytes held, for several numbers of compared rows.
"""

from __future__ import annotations

import argparse
import time

import torch

from lightning_stitch.maths.cka import CentredRows, centre_rows, cka_with_many
from lightning_stitch.search.scoring import Shortlist

FACTORS, FAMILIES = 64, 100


class Pile:
    """Synthetic activations, each made anew when it is asked for: all of them together would not fit in memory."""

    def __init__(self, count: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(rows, FACTORS, generator=generator)
        self.families = torch.rand(FAMILIES, FACTORS, generator=generator) ** 3
        self.count = count

    def __getitem__(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index + 1)
        family = self.families[index % FAMILIES]
        weights = 0.7 * family + 0.3 * torch.rand(FACTORS, generator=generator) ** 3
        width = int(torch.randint(16, 256, (1,), generator=generator))
        mixing = torch.randn(FACTORS, width, generator=generator) * weights[:, None]
        noise = torch.randn(len(self.hidden), width, generator=generator)
        return self.hidden @ mixing + 0.5 * torch.rand(1, generator=generator) * noise


def main() -> None:
    parser = argparse.ArgumentParser(description="Shortlist and exact scoring over a large pile of cuts.")
    parser.add_argument("--cuts", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--kept", type=int, default=200, help="length of the shortlist")
    options = parser.parse_args()
    pile = Pile(options.cuts, options.rows)
    queries = [pile[options.cuts + index] for index in range(options.queries)]
    centred = [centre_rows(rows) for rows in queries]
    exact = torch.zeros(options.queries, options.cuts)
    seconds = 0.0
    for first in range(0, options.cuts, 100):
        bank: list[CentredRows] = [centre_rows(pile[index]) for index in range(first, min(first + 100, options.cuts))]
        begun = time.perf_counter()
        for index, x in enumerate(centred):
            exact[index, first : first + len(bank)] = cka_with_many(x, bank).float()
        seconds += time.perf_counter() - begun
    best = [set(row.topk(10).indices.tolist()) for row in exact]
    print(f"{options.cuts} cuts of {options.rows} rows; CKA {exact.min():.2f} to {exact.max():.2f}")
    print(f"exact scoring of all: {seconds / options.queries * 1e3:.0f} ms a step")
    for num_rows in (64, 96, 128):
        shortlist = Shortlist((pile[index] for index in range(options.cuts)), num_rows=num_rows)
        found, begun = [], time.perf_counter()
        for rows in queries:
            found.append(shortlist.nearest(rows, options.kept).tolist())
        step = (time.perf_counter() - begun) / options.queries
        recall = sum(len(wanted & set(got)) for wanted, got in zip(best, found, strict=True)) / (10 * len(best))
        rescored, begun = 0.0, 0.0
        for x, got in zip(centred, found, strict=True):
            bank = [centre_rows(pile[index]) for index in got]
            begun = time.perf_counter()
            cka_with_many(x, bank)
            rescored += (time.perf_counter() - begun) / options.queries
        held = shortlist.vectors.nbytes / 2**20
        print(
            f"{num_rows:4d} rows: recall of the ten best {recall:.3f} among {options.kept}; {step * 1e3:.0f} ms for "
            f"the shortlist, {rescored * 1e3:.0f} ms for their exact scores, {held:.0f} MB"
        )


if __name__ == "__main__":
    main()
