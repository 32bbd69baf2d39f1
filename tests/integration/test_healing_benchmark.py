from __future__ import annotations

from functools import cache

import pytest
import torch
from doubles.small_sources import plain
from doubles.tensors import digits
from healed_stitches import skips
from healing import Row, markdown, measure, read
from ranking_tasks import Task

SHARES = (1.0, 0.8)


@cache
def task(*, labelled: bool) -> Task:
    images, labels = digits(420, 16, classes=3)
    sets = [[(x, y)] for x, y in zip(images.split([20, 100, 100, 200]), labels.split([20, 100, 100, 200]), strict=True)]
    sources = [plain("a", (8, 6, 5), seed=0), plain("b", (8, 7, 5), seed=1)]
    if not labelled:
        sets[2] = []
    return Task("three digits", sources, *sets, num_classes=3)


@cache
def rows(*, labelled: bool) -> list[Row]:
    return measure(task(labelled=labelled), SHARES, groups=None, distil=True, ranking="auto")


@pytest.mark.parametrize("labelled", [True, False])
def test_every_share_has_every_method_within_it(labelled: bool) -> None:
    found = rows(labelled=labelled)
    assert {(row["share"], row["method"]) for row in found} == {
        (share, method) for share in SHARES for method in ("unhealed", "healed", "distilled", "early exit")
    }
    cheapest = max(row["megamacs"] / row["share"] for row in found)
    for row in found:
        assert row["megamacs"] <= row["share"] * cheapest
        assert (row["fidelity"] is None) is (row["method"] == "early exit")
        assert row["read"] <= 1
        assert 0 <= row["accuracy" if labelled else "agreement"] <= 1
        assert row["agreement" if labelled else "accuracy"] is None


def test_under_one_share_the_three_forms_of_a_network_are_the_same_path() -> None:
    for share in SHARES:
        paths = {row["method"]: row["path"] for row in rows(labelled=True) if row["share"] == share}
        assert paths["unhealed"] == paths["healed"] == paths["distilled"] != paths["early exit"]


def test_what_is_a_linear_map_of_the_features_can_be_read_in_full() -> None:
    own = tuple(torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    mine = tuple(x @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [3.0, 0.0, 1.0]]) + 5 for x in own)
    assert torch.allclose(read(mine, own).float(), own[2], atol=1e-2)


def test_the_table_has_a_line_for_each_share_and_means_over_seeds() -> None:
    one = [{"images": 20, "seed": 0, **row} for row in rows(labelled=True)]
    other = [{**row, "seed": 1, "accuracy": row["accuracy"] - 0.1} for row in one]
    lines = markdown([*one, *other]).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| 20", "100"], ["| 20", "80"]]
    healed = next(row for row in one if row["share"] == 1 and row["method"] == "healed")
    assert f"{healed['accuracy'] - 0.05:.3f} +- 0.071" in lines[2]
    assert len({line.count("|") for line in lines}) == 1


def test_skips_of_a_bracket_cost_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = skips(task(labelled=True), 0.3, 0.9, count=4)
    assert 2 <= len(found) <= 4
    for skip in found:
        assert 0.3 <= skip["share"] <= 0.9
        assert skip["healed"] <= 1
    assert "| cka |" in capsys.readouterr().out
