from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from doubles.tensors import normal, seeded
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_stitch import fit_head
from lightning_stitch.errors import StitchError
from lightning_stitch.heads.head_settings import HeadSettings
from lightning_stitch.heads.neighbours import fit_neighbour_head
from lightning_stitch.heads.ridge import fit_ridge_head
from lightning_stitch.heads.targets import Task

WIDTHS = [400, 3, 700, 1]


def planted(n: int, *, block: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two classes that only one of the blocks tells apart; the others are noise of other sizes and offsets."""
    targets = torch.arange(n) % 2
    features = torch.randn(n, sum(WIDTHS), generator=seeded(seed))
    parts = list(features.split(WIDTHS, dim=1))
    parts[block] = parts[block] + 1.5 * (2 * targets[:, None] - 1)
    return torch.cat([part * size + 5 for part, size in zip(parts, (30, 0.1, 9, 1), strict=True)], 1), targets


def scaled(features: Tensor, widths: list[int]) -> np.ndarray:
    parts = features.double().split(widths, dim=1)
    return np.concatenate([StandardScaler().fit_transform(part.numpy()) / part.shape[1] ** 0.5 for part in parts], 1)


@pytest.mark.parametrize("block", [1, 3])
def test_a_label_that_only_a_narrow_block_tells_is_found_among_wide_noise(block: int) -> None:
    features, targets = planted(300, block=block)
    test, wanted = planted(400, block=block, seed=1)
    accuracies = {}
    for name, blocks in (("blocks", WIDTHS), ("none", None)):
        head, fit = fit_ridge_head(features, targets, num_classes=2, blocks=blocks)
        accuracies[name] = float((head(test).argmax(1) == wanted).float().mean())
    assert accuracies["blocks"] > 0.85
    assert accuracies["blocks"] > accuracies["none"] + 0.2
    _, fit = fit_ridge_head(features, targets, num_classes=2, blocks=WIDTHS)
    assert sum(fit.block_shares) == pytest.approx(1)
    assert max(range(4), key=fit.block_shares.__getitem__) == block
    assert fit.block_shares[block] > 0.5
    knn = [fit_head(features, targets, "knn", blocks=blocks)(test) for blocks in (WIDTHS, None)]
    right, without = (float((output.argmax(1) == wanted).float().mean()) for output in knn)
    assert right > without + 0.1


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
@pytest.mark.parametrize("n", [30, 200])
def test_a_head_with_blocks_reads_raw_features_and_is_ridge_on_scaled_ones(n: int, task: Task) -> None:
    widths, features = [40, 3, 7], normal(n, 50) * 4 + 9
    numbers = features[:, 40:42] - 9 + normal(n, 2, seed=1)
    targets = {"multiclass": (numbers[:, 0] > 0).long(), "multilabel": (numbers > 0).long(), "regression": numbers}[
        task
    ]
    head, fit = fit_ridge_head(features, targets, num_classes=2, task=task, blocks=widths)
    z = scaled(features, widths)
    plain, plain_fit = fit_ridge_head(torch.from_numpy(z), targets, num_classes=2, task=task)
    assert fit.strength == plain_fit.strength
    assert fit.loo_r2 == pytest.approx(plain_fit.loo_r2)
    expected = plain.double()(torch.from_numpy(z))
    torch.testing.assert_close(head.double()(features), expected, atol=2e-5, rtol=1e-4)


def test_shares_are_covariances_of_each_blocks_part_with_the_whole() -> None:
    widths, features = [40, 3, 7], normal(60, 50) * 4 + 9
    numbers = torch.stack([features[:, 40] - features[:, 2], 100 * features[:, 45]], 1)
    _, fit = fit_ridge_head(features, numbers, num_classes=2, task="regression", blocks=widths)
    z, y = scaled(features, widths), StandardScaler().fit_transform(numbers.numpy())
    penalty = fit.strength * np.square(z).sum() / 50
    model = Ridge(alpha=penalty).fit(z, y)
    whole = model.predict(z) - y.mean(0)
    parts = [z[:, 0:40] @ model.coef_[:, 0:40].T, z[:, 40:43] @ model.coef_[:, 40:43].T]
    expected = [float((part * whole).sum() / np.square(whole).sum()) for part in parts]
    assert fit.block_shares == pytest.approx((*expected, 1 - sum(expected)))
    _, alone = fit_ridge_head(features, numbers, num_classes=2, task="regression")
    assert alone.block_shares == (1.0,)


def test_features_that_do_not_vary_leave_the_shares_of_classes_and_no_share_of_a_block() -> None:
    features, targets = torch.full((9, 6), 2.0), torch.arange(9) % 3
    for blocks in ([2, 4], [6]):
        head, fit = fit_ridge_head(features, targets, num_classes=3, blocks=blocks)
        assert fit.block_shares == (0.0,) * len(blocks)
        assert head(torch.randn(4, 6)).isfinite().all()
        assert not head.weight.any()


@pytest.mark.parametrize("widths", [[5], [2, 3], [1] * 5])
@pytest.mark.parametrize("n", [2, 3, 8])
def test_few_rows_one_a_class_or_twice_the_same_give_finite_heads(n: int, widths: list[int]) -> None:
    features, targets = normal(n, 5).float(), torch.arange(n) % max(2, n)
    for rows, labels in ((features, targets), (features[:1].expand(n, 5), targets)):
        head, fit = fit_ridge_head(rows, labels, num_classes=n, blocks=widths)
        assert head(features).isfinite().all()
        assert np.isfinite(fit.loo_r2)
    doubled, _ = fit_ridge_head(features.repeat(2, 1), targets.repeat(2), num_classes=n, blocks=widths)
    assert doubled(features).argmax(1).tolist() == targets.tolist() or n > 5


@pytest.mark.parametrize("head", ["ridge", "knn"])
def test_dtypes_give_the_same_head_and_fits_repeat(head: str) -> None:
    features, targets = (normal(60, 9) * 2 + 1).half(), torch.arange(60) % 3
    fits = [
        fit_head(features.to(dtype), targets, head, blocks=[4, 5]).state_dict()
        for dtype in (torch.float16, torch.float32, torch.float64, torch.float64)
    ]
    for state in fits[1:]:
        torch.testing.assert_close(state, fits[0], rtol=0, atol=0)


def test_neighbours_are_nearest_in_scaled_features() -> None:
    widths, features, targets = [20, 2], normal(50, 22) * 3 + 4, torch.arange(50) % 3
    queries = normal(15, 22, seed=1) * 3 + 4
    options: dict[str, Any] = {"metric": "euclidean", "num_neighbours": 5, "temperature": 1e6}
    head = fit_neighbour_head(features, targets, num_classes=3, blocks=widths, **options)
    scaler = StandardScaler().fit(features.numpy())
    scale = np.repeat(np.sqrt(1 / np.array(widths)), widths)
    reference = KNeighborsClassifier(5).fit(scaler.transform(features.numpy()) * scale, targets)
    votes = torch.from_numpy(reference.predict_proba(scaler.transform(queries.numpy()) * scale))
    torch.testing.assert_close(head(queries.float()).double().exp(), (50 * votes + 1 / 3) / 51, rtol=1e-4, atol=1e-5)
    assert float(head.rows.square().mean()) == pytest.approx(1, abs=1e-4)
    one = fit_neighbour_head(features, targets, num_classes=3, blocks=[22])
    torch.testing.assert_close(
        one(queries.float()), fit_neighbour_head(features, targets, num_classes=3)(queries.float())
    )


@pytest.mark.parametrize("name", ["ridge", "knn"])
def test_settings_pass_blocks_on_and_states_rebuild_the_head(name: str) -> None:
    features, targets = planted(40, block=1)
    settings = HeadSettings.of(name, num_classes=2)
    fitted, _ = settings.fit(features, targets, WIDTHS)
    rebuilt = settings.empty(sum(WIDTHS))
    rebuilt.load_state_dict(fitted.state_dict())
    assert torch.equal(rebuilt(features), fitted(features))
    assert torch.equal(fit_head(features, targets, name, blocks=WIDTHS)(features), fitted(features))
    assert not torch.equal(settings.fit(features, targets)[0](features), fitted(features))


def test_a_class_map_does_not_heed_blocks() -> None:
    head = {"name": "class_map", "classes": {"dog": "0-2", "cat": [4, 5]}}
    logits = normal(3, 6).float()
    assert torch.equal(fit_head(logits, None, head, blocks=[1])(logits), fit_head(logits, None, head)(logits))


@pytest.mark.parametrize("widths", [(), (3, 2), (7,), (6, 0), (8, -2)])
@pytest.mark.parametrize("name", ["ridge", "knn"])
def test_blocks_that_do_not_fit_are_refused(name: str, widths: tuple[int, ...]) -> None:
    with pytest.raises(StitchError, match=r"blocks= must be widths of at least 1 that sum to the 6 features; found \["):
        fit_head(normal(9, 6), torch.arange(9) % 2, name, blocks=widths)


class LargestTensor(TorchDispatchMode):
    """Records how many numbers the largest float64 tensor has that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                self.numel = max(self.numel, tensor.numel())
        return made


@pytest.mark.parametrize(("n", "d"), [(9000, 200), (200, 9000)])
def test_neither_all_pairs_of_many_nor_a_float64_copy_of_the_features_is_made(n: int, d: int) -> None:
    features = torch.randn(n, d, generator=seeded(0))
    targets = (features[:, 0] > 0).long()
    with LargestTensor() as largest:
        fit_ridge_head(features, targets, num_classes=2, blocks=[d // 2, d - d // 2])
    assert 200 * 200 <= largest.numel <= 2**18
    assert n * d / 6 > 2**18
