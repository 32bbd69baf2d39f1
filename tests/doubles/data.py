"""Datasets and a datamodule whose images tell their index, for tests of the data module."""

from __future__ import annotations

from zlib import crc32

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_stitch._lightning import pl


class Pairs(Dataset):
    """Any images with any labels; `reads` counts the images that were decoded."""

    def __init__(self, images, labels):
        self.images, self.answers, self.reads = images, labels, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        return self.images[index], self.answers[index]


class Normalising(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(stage)
        images = numbered(60).tensors[0]
        normal = TensorDataset((images - 0.4) / 0.2, torch.arange(60) % 3)
        # A new random split in every call, as careless datamodules have it.
        self.train, self.test = torch.utils.data.random_split(normal, [50, 10])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=7, shuffle=True)

    def test_dataloader(self):
        return [DataLoader(self.test, batch_size=7)]


class Loaders(pl.LightningDataModule):
    """A data module of given dataloaders."""

    def __init__(self, train, val=None, test=None):
        super().__init__()
        self.loaders = {"train": train, "val": val, "test": test}

    def train_dataloader(self):
        return self.loaders["train"]

    def val_dataloader(self):
        return self.loaders["val"] or []

    def test_dataloader(self):
        return self.loaders["test"] or []


def numbered(count, num_classes=2, labels=None, size=4, first=0):
    """Grey float images whose every pixel tells their index: (first + index) / 1000."""
    images = (torch.arange(first, first + count) / 1000).view(-1, 1, 1, 1).expand(count, 1, size, size).clone()
    return TensorDataset(images, torch.arange(count) % num_classes if labels is None else torch.as_tensor(labels))


def loader_of(module, part):
    return module.head_dataloader() if part == "train" else getattr(module, f"{part}_dataloader")()


def drawn(module, part):
    """Indices and labels of a set, read off its pixels."""
    images, labels = (torch.cat(batches) for batches in zip(*loader_of(module, part), strict=True))
    return (images[:, 0, 0, 0] * 1000).round().long().tolist(), labels


def write_folder(root, counts, *, size=(6, 5), mode="RGB"):
    """Folders of images, each of one colour but for three pixels, which tell its path."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = root / name / f"{number}.png"
            image = Image.new(mode, size, number if mode == "L" else (number, 0, 255))
            for place, byte in enumerate(crc32(str(path).encode()).to_bytes(4, "big")[:3]):
                image.putpixel((place, 0), byte if mode == "L" else (byte, 0, 255))
            image.save(path)
    return str(root)
