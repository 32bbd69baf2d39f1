"""Accuracy of the closed-form heads on solar cells, by number of labelled images, on the best unmodified source.

python tests/benchmarks/heads.py --solar-cells solar_cells

Every source runs once over all images. For each seed the images are split anew: those that the head is fitted on, 256
that choose the source (by the search's own score, once for all heads), and 1,024 that test.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional import auroc

from lightning_stitch import CalibrationDataModule, fit_head, load_source
from lightning_stitch.heads.ridge import DEFAULT_STRENGTHS
from lightning_stitch.heads.targets import comparable_columns
from lightning_stitch.maths.leave_one_out import loo_ridge
from lightning_stitch.maths.regression import r2
from lightning_stitch.sources.source import Source
from lightning_stitch.sources.views import Preprocess

HEADS = {
    "ridge": "ridge",
    "knn, cosine": "knn",
    "knn, euclidean": {"name": "knn", "metric": "euclidean"},
}


@torch.inference_mode()
def features_of(source: Source, images: Tensor) -> Tensor:
    """What the source's classifier reads, images x features."""
    graph = source.graph_at(tuple(images.shape[1:]))
    run = graph.fragment(None, graph.feature_cut().name).eval()
    preprocess = Preprocess(source.preprocessing)
    return torch.cat([run(preprocess(batch)) for batch in images.split(8)])


def score(features: Tensor, labels: Tensor) -> float:
    """Leave-one-out R2 of one-hot labels."""
    columns = comparable_columns(labels, num_classes=2)
    predictions = loo_ridge(features, columns, strengths=DEFAULT_STRENGTHS).predictions
    return max(r2(prediction, columns) for prediction in predictions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"))
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--labels", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    folder = CalibrationDataModule(
        image_folder=str(options.solar_cells / "images"),
        image_size=options.image_size,
        calibration_samples=4,
        selection_samples=2,
        test_samples=2,
    )
    parts = (
        folder.calibration_dataloader(),
        folder.head_dataloader(),
        folder.val_dataloader(),
        folder.test_dataloader(),
    )
    images, labels = (torch.cat(x) for x in zip(*(batch for part in parts for batch in part), strict=True))
    names = sorted(path.name for path in options.solar_cells.glob("efficientnet_lite*"))
    features = {name: features_of(load_source(f"local-dir:{options.solar_cells / name}"), images) for name in names}
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    chosen: dict[str, int] = dict.fromkeys(names, 0)
    for seed in range(options.seeds):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        test, selection, train = order[:1024], order[1024:1280], order[1280:]
        best = max(names, key=lambda name: score(features[name][selection], labels[selection]))
        chosen[best] += 1
        for count in options.labels:
            rows = train[:count]
            for words, head in HEADS.items():
                fitted = fit_head(features[best][rows], labels[rows], head, num_classes=2)
                p = fitted(features[best][test]).detach().softmax(1)
                accuracy = float((p.argmax(1) == labels[test]).double().mean())
                area = float(auroc(p[:, 1], labels[test], task="binary"))
                found.setdefault((words, count), []).append((accuracy, area))
    print(f"{len(labels)} images, {options.seeds} splits; source chosen: {chosen}\n")
    print("| head | " + " | ".join(f"{count} labels: accuracy, AUROC" for count in options.labels) + " |")
    print("|---" * (len(options.labels) + 1) + "|")
    for words in HEADS:
        cells = []
        for count in options.labels:
            mean, spread = (f(torch.tensor(found[words, count]), 0) for f in (torch.mean, torch.std))
            cells.append(f"{mean[0]:.3f} +- {spread[0]:.3f}, {mean[1]:.3f} +- {spread[1]:.3f}")
        print(f"| {words} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
