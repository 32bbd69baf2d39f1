from __future__ import annotations

import pytest
import torch
from doubles.tensors import noise, seeded
from torch import Tensor

from lightning_stitch.errors import CalibrationError
from lightning_stitch.maths.cka import linear_cka
from lightning_stitch.search.scoring import Shortlist, gram_vector


def views(count: int, rows: int) -> list[Tensor]:
    """Activations that share more or less of what they say."""
    generator = seeded(0)
    hidden = torch.randn(rows, 6, generator=generator)
    found = []
    for _ in range(count):
        weights = torch.rand(6, generator=generator) ** 3
        mixing = torch.randn(6, 9, generator=generator) * weights[:, None]
        found.append(hidden @ mixing + 0.3 * torch.randn(rows, 9, generator=generator) + 5)
    return found


@pytest.mark.parametrize("estimator", ["debiased", "biased"])
@pytest.mark.parametrize("rows", [4, 5, 40])
def test_the_dot_product_of_gram_vectors_is_the_cka(estimator: str, rows: int) -> None:
    x, y = views(2, rows)
    vectors = [gram_vector(z, estimator=estimator) for z in (x, y)]  # type: ignore[arg-type]
    expected = linear_cka(x, y, estimator=estimator)  # type: ignore[arg-type]
    assert float(vectors[0] @ vectors[1]) == pytest.approx(float(expected), abs=1e-5)
    assert [float(vector.norm()) for vector in vectors] == pytest.approx([1, 1])


def test_with_all_rows_the_nearest_are_those_of_highest_cka() -> None:
    pile = views(50, 60)
    query = pile.pop()
    ckas = torch.stack([linear_cka(query, rows) for rows in pile])
    shortlist = Shortlist(pile, num_rows=60)
    assert shortlist.vectors.shape == (49, 60 * 59 // 2)
    assert shortlist.nearest(query, 7).tolist() == ckas.topk(7).indices.tolist()
    assert len(shortlist.nearest(query, 99)) == 49


def test_few_rows_keep_most_of_the_best_among_a_longer_list() -> None:
    pile = views(400, 500)
    query = pile.pop()
    best = set(torch.stack([linear_cka(query, rows) for rows in pile]).topk(10).indices.tolist())
    found = Shortlist(pile, num_rows=64).nearest(query, 60).tolist()
    assert len(best & set(found)) >= 9
    assert len(set(found)) == 60


def test_activations_of_other_rows_are_refused() -> None:
    with pytest.raises(CalibrationError, match="one or more activations of the same rows"):
        Shortlist([noise(8, 3), noise(9, 3)])
    with pytest.raises(CalibrationError, match="one or more"):
        Shortlist([])
    with pytest.raises(CalibrationError, match="must have the rows of those"):
        Shortlist([noise(8, 3)]).nearest(noise(9, 3), 1)
    with pytest.raises(CalibrationError, match="one of which varies"):
        Shortlist([torch.ones(8, 3)])
    with pytest.raises(CalibrationError, match="constant"):
        Shortlist([noise(8, 3)]).scores(torch.ones(8, 3))


def test_an_activation_that_does_not_vary_on_the_compared_rows_is_never_near() -> None:
    pile = views(6, 40)
    query = pile.pop()
    pile[2] = torch.ones(40, 9)
    scores = Shortlist(pile).scores(query)
    assert scores[2] == 0
    assert (scores[[0, 1, 3, 4]] != 0).all()
