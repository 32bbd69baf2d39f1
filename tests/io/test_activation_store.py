from __future__ import annotations

import gc
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from doubles.small_sources import plain
from doubles.tensors import digits, noise
from torch import Tensor

from lightning_stitch import CalibrationSettings, Pool
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.io.activation_store import Carried, Deferred, Spool, carry
from lightning_stitch.settings import Keeping


@pytest.mark.parametrize("keeping", ["disk", "memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_put_down_is_taken_up_bit_for_bit(keeping: str, dtype: torch.dtype) -> None:
    spool = Spool(keeping)  # type: ignore[arg-type]
    x = noise(7, 5, 3, 2).to(dtype)
    x[0, 0, 0] = torch.tensor([float("nan"), float("-inf")])
    kept = [x, x.permute(0, 2, 3, 1), x[:, 0, 0, 0], x[:0]]
    taken = [spool.put(y) for y in kept]
    for _ in range(2):
        for take_up, y in reversed(list(zip(taken, kept, strict=True))):
            assert take_up().dtype == dtype
            assert take_up().shape == y.shape
            assert torch.equal(take_up().nan_to_num(), y.nan_to_num())


@pytest.mark.parametrize("keeping", ["disk", "memory"])
def test_an_activation_comes_back_in_its_portions(keeping: str) -> None:
    x = noise(7, 4)
    carried = carry(x.split(3), Spool(keeping))  # type: ignore[arg-type]
    assert [len(portion) for portion in carried] == [3, 3, 1]
    assert torch.equal(carried.whole(), x)


def test_a_deferred_activation_is_made_from_those_before_it_when_it_is_first_looked_at() -> None:
    made = []

    def one_more(number: int, before: Carried) -> Carried:
        made.append(number)
        return carry([portion + 1 for portion in before], Spool("memory"))

    chain = [carry(torch.zeros(3, 2).split(2), Spool("memory"))]
    # More of them than Python nests calls.
    for number in range(3000):
        chain.append(Carried(Deferred(chain[-1], partial(one_more, number))))
    assert made == []
    assert torch.equal(chain[1500].whole(), torch.full((3, 2), 1500.0))
    assert made == list(range(1500))
    assert [len(portion) for portion in chain[3000]] == [2, 1]
    for number in (3000, 1499, 2):
        assert torch.equal(chain[number].whole(), torch.full((3, 2), float(number)))
    assert made == list(range(3000))


def test_the_file_has_no_name_and_is_closed_when_nothing_refers_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[IO[bytes]] = []
    temporary_file = tempfile.TemporaryFile

    def opened(*args: Any) -> IO[bytes]:
        files.append(temporary_file(*args, dir=tmp_path))
        return files[0]

    monkeypatch.setattr(tempfile, "TemporaryFile", opened)
    carried = carry([noise(4, 3)], Spool("disk"))
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(carried.whole(), noise(4, 3))
    assert [file.closed for file in files] == [False]
    del carried
    gc.collect()
    assert [file.closed for file in files] == [True]


def test_a_directory_that_cannot_be_written_to_is_named_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool([plain("a", (4, 5, 6), seed=0)], (3, 16, 16))
    (tmp_path / "a_file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a_file"))
    words = r"cannot be written to .*a_file: .*TMPDIR.*keep_activations=\"memory\""
    with pytest.raises(CalibrationError, match=words):
        pool.calibrate([noise(8, 3, 16, 16)])


def test_a_file_that_was_cut_short_is_refused_and_not_read_as_whatever_memory_holds() -> None:
    spool = Spool("disk")
    take_up = spool.put(torch.rand(64, 32))
    assert spool._file is not None
    os.ftruncate(spool._file.fileno(), 1000)
    with pytest.raises(CalibrationError, match="were cut short: 1000 of 8192 bytes are left"):
        take_up()


def test_where_activations_are_kept_must_be_known() -> None:
    with pytest.raises(StitchError, match=r"keep_activations must be one of .*'disk', 'memory'.*; found 'gpu'"):
        CalibrationSettings(keep_activations="gpu")  # type: ignore[arg-type]


def test_a_search_finds_the_same_wherever_activations_are_kept() -> None:
    images, labels = digits(40, 16, classes=4)
    found = []
    for keeping in ("disk", "memory"):
        sources = [plain("a", (5, 6, 8), seed=0), plain("b", (4, 7, 9), seed=1, strides=(2, 2, 1))]
        pool = Pool(sources, (3, 16, 16), settings=CalibrationSettings(keep_activations=keeping))  # type: ignore[arg-type]
        result = pool.search([images[:16]], [(images[16:], labels[16:])])
        found.append([ranked.candidate.recipe.to_dict() for ranked in result.ranked])
    assert len(found[0]) > 4
    assert found[0] == found[1]


def held() -> dict[int, Tensor]:
    gc.collect()
    floats = (x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.is_floating_point())
    return {id(x): x for x in floats}


@pytest.mark.slow
def test_on_disk_memory_is_rows_by_channels_whatever_the_image_size() -> None:
    growth = []
    for keeping in ("disk", "memory"):
        sizes = []
        for size in (32, 128):
            settings = CalibrationSettings(rows_per_image=4, keep_activations=keeping)  # type: ignore[arg-type]
            pool = Pool([plain("a", (5, 6, 8), seed=0)], (3, size, size), settings=settings)
            before = held()
            pool.calibrate([noise(2, 3, size, size) for _ in range(4)])
            sizes.append(sum(x.nbytes for key, x in held().items() if key not in before))
        growth.append(sizes[1] / sizes[0])
    assert growth[0] == 1
    assert growth[1] > 8


@pytest.mark.parametrize("keeping", ["disk", "memory"])
def test_what_lies_channels_last_comes_back_so(keeping: Keeping) -> None:
    x = torch.randn(2, 3, 4, 5)
    for layout in (torch.contiguous_format, torch.channels_last):
        taken = Spool(keeping).put(x.to(memory_format=layout))()
        assert torch.equal(taken, x)
        assert taken.is_contiguous(memory_format=layout)
