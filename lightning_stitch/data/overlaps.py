"""Which images of several datasets are the same: by their files' bytes, or by what is drawn of them."""

from __future__ import annotations

import hashlib
import os
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from lightning_stitch.data.folders import list_first
from lightning_stitch.data.images import Decoder, Items, image_of, naming_image
from lightning_stitch.data.labels import show_progress
from lightning_stitch.data.origins import find_file, find_origins, list_files
from lightning_stitch.data.transforms import without_transforms
from lightning_stitch.errors import CalibrationError

_PIECE = 4096
Keys = Sequence[Hashable]


def image_keys(datasets: Mapping[str, Items], decoder: Decoder) -> dict[str, Keys]:
    """A key for each image of each dataset; equal keys are equal images.

    Where all of them tell their files, links are followed and the files' bytes compared. Else each image is drawn as it
    is before the transforms that a dataset keeps in attributes; an item of one object is one image in any case. The
    global random states are changed.
    """
    origins = {name: find_origins(dataset) for name, dataset in datasets.items()}
    bottom = {id(base): base for origin in origins.values() for base in origin.datasets}
    places = {
        name: [
            (id(origin.datasets[which]), index)
            for which, index in zip(origin.which, origin.indices.tolist(), strict=True)
        ]
        for name, origin in origins.items()
    }
    files = {number: list_files(base) for number, base in bottom.items()}
    keys: dict[tuple[int, int], Hashable] = {}
    if None not in files.values():
        paths = {place: os.path.realpath(files[place[0]][place[1]]) for of in places.values() for place in of}  # type: ignore[index]
        by_path = _file_keys(set(paths.values()))
        keys = {place: by_path[path] for place, path in paths.items()}
    else:
        views: dict[int, _Undressed] = {}
        for name, of_set in places.items():
            for item in show_progress(range(len(of_set)), f"compare {name}"):
                number, index = place = of_set[item]
                if place not in keys:
                    view = views[number] = views.get(number) or _Undressed(bottom[number], index, decoder)
                    with naming_image(datasets[name], name, item):
                        keys[place] = view.hash(index)
    return {name: [keys[place] for place in of_set] for name, of_set in places.items()}


def check_disjoint(datasets: Mapping[str, Items], keys: Mapping[str, Keys]) -> None:
    """Refuse datasets that share images, and name the first."""
    for name, second in combinations(datasets, 2):
        places = {key: place for place, key in reversed(list(enumerate(keys[name])))}
        shared = [(places[key], place) for place, key in enumerate(keys[second]) if key in places]
        if shared:
            pairs = [f"{_describe(datasets, name, a)} is {_describe(datasets, second, b)}" for a, b in shared]
            raise CalibrationError(
                f"{name} and {second} share {len(shared)} images; they must be disjoint. {list_first(pairs)}. Leave "
                f"them out of one (torch.utils.data.Subset), or give only train=, out of which disjoint sets are drawn."
            )


def _describe(datasets: Mapping[str, Items], name: str, item: int) -> str:
    file = find_file(datasets[name], item)
    return f"image {item} of {name}" + ("" if file is None else f" ({file})")


def find_copies(keys: Keys) -> list[int]:
    """Places of images that are the same as an earlier one."""
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    return [place for place, key in enumerate(keys) if first[key] != place]


def fingerprint(keys: Sequence[Keys]) -> str:
    """A hash of sets of images, alike where the same images are in the same order in all of them."""
    return hashlib.sha256(repr([list(of_set) for of_set in keys]).encode()).hexdigest()


def _file_keys(paths: set[str]) -> dict[str, tuple[Any, ...]]:
    """A key for each file, equal for files of the same bytes; only those that are alike so far are read further."""
    keys: dict[str, tuple[Any, ...]] = {path: () for path in sorted(paths)}
    for read in (os.path.getsize, _read_middle, _hash_file):
        counts = Counter(keys.values())
        keys = {path: (*key, read(path)) if counts[key] > 1 else key for path, key in keys.items()}
    return keys


def _read_middle(path: str) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) // 2 - _PIECE, 0))
        return hashlib.blake2b(file.read(_PIECE), digest_size=16).digest()


def _hash_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.blake2b(file.read(), digest_size=16).digest()


class _Undressed:
    """A dataset without its transforms; with them where it gives no images otherwise."""

    def __init__(self, dataset: Any, index: int, decoder: Decoder) -> None:
        self._dataset = without_transforms(dataset)
        self._decoder = Decoder(decoder.num_channels)  # a transform normalised, if anything did
        try:
            self.hash(index)
        except Exception:  # whatever a transform's absence leads to
            self._dataset = dataset
        if self._dataset is dataset:
            self._decoder = decoder

    def hash(self, index: int) -> bytes:
        """A hash of an image's values in 16 bits, whatever type they come in."""
        # What is drawn at random in the dataset's own code is drawn alike for each of its objects.
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        image = self._decoder.scale(image_of(self._dataset[index]))
        values = (image * 65535).round().to(torch.int32).to(torch.int16).contiguous()
        return hashlib.blake2b(values.numpy().tobytes(), digest_size=16, key=str(tuple(image.shape)).encode()).digest()
