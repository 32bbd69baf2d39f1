from __future__ import annotations

import gc
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from doubles.pools import path, pieces_run, records
from doubles.progress import Recorder
from doubles.small_sources import donor, plain
from doubles.tensors import digits, noise
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_stitch import CalibrationSettings, Pool
from lightning_stitch.errors import CalibrationError, StitchError
from lightning_stitch.search.results import SearchResult
from lightning_stitch.sources.source import Source

SHAPE = (3, 16, 16)
CALIBRATION = 0.7 * digits(12, 16)[0] + 0.3 * noise(12, *SHAPE)
SELECTION = [digits(40, 16, first=20, classes=3)]
SETTINGS = CalibrationSettings(rows_per_image=9)


def pair(seed: int = 1) -> list[Source]:
    return [plain("a", (8, 9, 10), seed=0), plain("b", (4, 7, 12), seed=seed, strides=(2, 2, 1))]


@pytest.fixture(scope="module")
def searched() -> SearchResult:
    return Pool(pair(), SHAPE, settings=SETTINGS).search(CALIBRATION.split(5), SELECTION)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pool = Pool(pair(), SHAPE, settings=SETTINGS)
    pool.calibrate(CALIBRATION.split(5))
    pool.save(folder := tmp_path_factory.mktemp("saved") / "pool")
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "pool"))


@pytest.mark.parametrize("keeping", ["disk", "memory"])
def test_a_pool_opened_again_finds_the_same_without_an_image_or_a_source(
    saved: Path, searched: SearchResult, keeping: str
) -> None:
    pool = Pool.open(saved, pair(), settings=CalibrationSettings(rows_per_image=9, keep_activations=keeping))  # type: ignore[arg-type]
    with pieces_run(pool) as ran:
        pool.stitch([("a", None, "0"), ("b", "1", None)])
    assert ran == []
    # A search keeps what it did not read itself: it can be searched again and again.
    for _ in range(2):
        result = pool.search(None, SELECTION)
        assert records(result) == records(searched)
        assert result.rejected == searched.rejected


def test_images_that_an_opened_pool_knows_run_no_source_and_others_do(saved: Path, searched: SearchResult) -> None:
    pool = Pool.open(saved, pair())
    for images, runs in ((CALIBRATION.split(5), False), ([CALIBRATION], False), ([CALIBRATION.flip(0)], True)):
        recorder = Recorder()
        result = pool.search(images, SELECTION, progress=recorder)
        assert ("calibrating" in [stage for stage, *_ in recorder.stages]) == runs
        assert (records(result) == records(searched)) != runs


def test_settings_and_image_shape_come_from_the_files(saved: Path) -> None:
    pool = Pool.open(str(saved), pair())
    assert (pool.settings, pool.image_shape) == (SETTINGS, SHAPE)
    settings = CalibrationSettings(granularity={"a": ["0"], "b": "all"}, estimator="biased", until="output", seed=4)
    pool = Pool(pair(), SHAPE, settings=settings)
    pool.calibrate([CALIBRATION])
    pool.save(saved)
    assert [len(part.cuts) for part in Pool.open(saved, pair()).parts] == [len(part.cuts) for part in pool.parts]
    assert Pool.open(saved, pair()).settings == settings


def test_the_sources_may_come_in_another_order(saved: Path) -> None:
    fragments = [("a", None, "0"), ("b", "1", None)]
    found = [Pool.open(saved, sources).stitch(fragments) for sources in (pair(), pair()[::-1])]
    assert path(found[0]) == path(found[1])
    states = [candidate.steps[1].stitch.state_dict() for candidate in found]  # type: ignore[union-attr]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_prefix_tokens_are_saved_too(tmp_path: Path) -> None:
    sources = [donor("test_vit"), donor("test_resnet")]
    pool = Pool(sources, (3, 160, 160), settings=CalibrationSettings(rows_per_image=4))
    pool.calibrate([noise(6, 3, 160, 160)])
    pool.save(tmp_path)
    cuts = [cut for cut in pool.parts[0].cuts if cut.num_prefix_tokens]
    into_itself = [("test_vit", None, cuts[0].name), ("test_vit", cuts[-1].name, None)]
    from_a_map = [("test_resnet", None, pool.parts[1].cuts[0].name), ("test_vit", cuts[-1].name, None)]
    for fragments in (into_itself, from_a_map):
        found = [each.stitch(fragments).steps[1].stitch for each in (pool, Pool.open(tmp_path, sources))]  # type: ignore[arg-type]
        torch.testing.assert_close(found[0].state_dict(), found[1].state_dict(), rtol=0, atol=0)  # type: ignore[union-attr]


def test_the_files_are_json_and_safetensors(saved: Path) -> None:
    description = json.loads((saved / "calibration.json").read_text())
    assert description["num_images"] == 12
    assert description["versions"]["torch"] == version("torch")
    pool = Pool.open(saved, pair())
    files = set()
    for number, source in enumerate(pool.calibration.sources):
        *of_cuts, features = sorted(saved.glob(f"source-{number}-*.safetensors"))
        assert torch.equal(load_file(features)["features"], source.features)
        for file, kept, activation in zip(of_cuts, source.statistics, source.activations, strict=True):
            tensors = load_file(file)
            assert torch.equal(tensors["rows"], kept.rows)
            portions = [x for name, x in tensors.items() if name.startswith("activation.")]
            assert sum(map(len, portions)) == 12
            assert torch.equal(tensors["activation.0"], next(iter(activation)))
        files |= {features, *of_cuts}
    assert set(saved.iterdir()) == {saved / "calibration.json", *files}


def held() -> dict[int, Tensor]:
    gc.collect()
    floats = (x for x in gc.get_objects() if issubclass(type(x), Tensor) and x.is_floating_point())
    return {id(x): x for x in floats}


def test_what_an_opened_pool_holds_in_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    sizes = []
    for size in (32, 128):
        settings = CalibrationSettings(rows_per_image=4)
        pool = Pool([plain("a", (5, 6, 8), seed=0)], (3, size, size), settings=settings)
        pool.calibrate([noise(2, 3, size, size) for _ in range(4)])
        pool.save(tmp_path / str(size))
        source = plain("a", (5, 6, 8), seed=0)
        before = held()
        opened = Pool.open(tmp_path / str(size), [source])
        assert len(opened.calibration.sources[0].activations) > 1
        sizes.append(sum(x.nbytes for key, x in held().items() if key not in before))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: Pool.open(p, pair(seed=2)), r'sources\.b\.weights: "sha256:.*" there, "sha256:.*" here'),
        (lambda p: Pool.open(p, pair()[:1]), r"sources\.b: \{.* there, nothing here"),
        (lambda p: Pool.open(p, [*pair(), plain("c", (4, 5, 6), seed=3)]), r"sources\.c: nothing there, \{.* here"),
        (
            lambda p: Pool.open(p, pair(), settings=CalibrationSettings()),
            r"settings\.rows_per_image: 9 there, 32 here\. Use the sources and settings",
        ),
        (
            lambda p: Pool.open(p, pair(), settings=CalibrationSettings(granularity="all", rows_per_image=9)),
            r'settings\.granularity: "blocks" there, "all" here; sources\.a\.cuts\.',
        ),
    ],
)
def test_another_pools_calibration_is_refused_with_what_differs(
    saved: Path, build: Callable[[Path], Pool], words: str
) -> None:
    with pytest.raises(CalibrationError, match=rf"The calibration in .*pool is another one's: .*{words}"):
        build(saved)


def cut_short(folder: Path) -> None:
    file = sorted(folder.glob("source-1-*"))[1]
    os.truncate(file, file.stat().st_size - 4)


def damaged(folder: Path) -> None:
    file = sorted(folder.glob("source-1-*"))[1]
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def missing(folder: Path) -> None:
    sorted(folder.glob("source-1-*"))[1].unlink()


def unreadable(folder: Path) -> None:
    (folder / "calibration.json").write_text('{"schema": 1, "image')


def newer(folder: Path) -> None:
    described = json.loads((folder / "calibration.json").read_text())
    (folder / "calibration.json").write_text(json.dumps({**described, "schema": 2}))


def incomplete(folder: Path) -> None:
    described = json.loads((folder / "calibration.json").read_text())
    del described["images"]
    (folder / "calibration.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut_short, r"The saved calibration of source 'b' in .* cannot be used: source-1-1.* is damaged.*save again"),
        (damaged, r"The saved calibration of source 'b' in .* cannot be used: source-1-1.* is damaged.*save again"),
        (missing, r"The saved calibration of source 'b' in .* cannot be used: .*No such file"),
        (unreadable, r"calibration\.json cannot be read .*Calibrate and save again"),
        (newer, r"has schema 2; this version of lightning_stitch reads schema 1\. Upgrade"),
        (incomplete, r"has no images that can be used"),
        (shutil.rmtree, r"There is no saved calibration in .*Pool\.save writes one"),
    ],
)
def test_files_that_cannot_be_used_are_refused(saved: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(saved)
    with pytest.raises(CalibrationError, match=words):
        Pool.open(saved, pair())


@pytest.mark.parametrize(
    ("source_and_file", "name", "spoil"),
    [
        ("1-1", "activation.0", lambda x: x.double()),
        ("1-1", "activation.0", lambda x: x[:-1]),
        ("1-1", "activation.0", lambda x: x[..., :-1]),
        ("0-0", "activation.0", None),
        ("0-0", "activation", lambda x: torch.ones(2)),
        ("0-0", "rows", lambda x: torch.cat([x, x], 1)),
        ("0-0", "rows", None),
        ("1-2", "features", lambda x: torch.ones(())),
    ],
)
def test_tensors_of_another_shape_or_type_are_refused_though_their_names_say_their_hashes(
    source_and_file: str, name: str, spoil: Callable[[Tensor], Tensor] | None, saved: Path
) -> None:
    (file,) = saved.glob(f"source-{source_and_file}-*")
    tensors = load_file(file)
    first = next(key for key in tensors if key.startswith(name)) if name != "activation" else "activation"
    x = tensors.pop(first, None)
    if spoil is not None:
        tensors[first] = spoil(x).contiguous()
    file.unlink()
    save_file(tensors, file)
    forged = file.with_name(f"source-{source_and_file}-{sha256(file.read_bytes()).hexdigest()[:16]}.safetensors")
    file.rename(forged)
    description = (saved / "calibration.json").read_text()
    (saved / "calibration.json").write_text(description.replace(file.name, forged.name))
    with pytest.raises(CalibrationError, match=r"The saved calibration of source '[ab]' in .* cannot be used"):
        Pool.open(saved, pair())


@pytest.mark.parametrize(
    ("entry", "value"),
    [("sources", {"a": 3}), ("settings", {"seed": {}}), ("settings", {"granularity": 3}), ("image_shape", [3, {}, 16])],
)
def test_a_description_of_other_types_is_refused(entry: str, value: object, saved: Path) -> None:
    described = json.loads((saved / "calibration.json").read_text())
    described[entry] = {**described[entry], **value} if isinstance(value, dict) else value
    (saved / "calibration.json").write_text(json.dumps(described))
    with pytest.raises(CalibrationError, match=r"can be used|cannot be used|another one's"):
        Pool.open(saved, pair())


def calibrated(images: Tensor) -> Pool:
    pool = Pool(pair(), SHAPE, settings=SETTINGS)
    pool.calibrate([images])
    return pool


def test_saving_that_is_broken_off_leaves_the_old_calibration_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = {"old": calibrated(CALIBRATION), "new": calibrated(CALIBRATION.flip(0))}
    left: Iterator[int] = iter(())

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def called(*args: object) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            function(*args)

        return called

    def found(folder: Path) -> str:
        features = Pool.open(folder, pair()).calibration.sources[0].features
        return next(name for name, pool in pools.items() if torch.equal(pool.calibration.sources[0].features, features))

    names = []
    for number in range(12):
        folder = tmp_path / str(number)
        pools["old"].save(folder)
        # The process dies at one of the changes of the directory.
        left = iter(range(number))
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", counted(os.replace))
            patched.setattr(os, "unlink", counted(os.unlink))
            with pytest.raises(KeyboardInterrupt):
                pools["new"].save(folder)
        names.append(found(folder))
        pools["new"].save(folder)
        assert found(folder) == "new"
        assert len(list(folder.iterdir())) == 1 + sum(len(part.cuts) + 1 for part in pools["new"].parts)
    assert names == sorted(names, reverse=True)
    assert set(names) == {"old", "new"}


def test_only_a_calibrated_pool_can_be_saved_and_searched_without_images(tmp_path: Path) -> None:
    pool = Pool(pair(), SHAPE)

    def refused() -> None:
        with pytest.raises(CalibrationError, match=r"Calibrate the pool first: .* A search lets go of its images"):
            pool.save(tmp_path / "never")
        with pytest.raises(CalibrationError, match="Calibrate the pool first"):
            pool.search(None, never())

    refused()
    pool.search([CALIBRATION], SELECTION, max_candidates=0)
    refused()
    assert not (tmp_path / "never").exists()
    pool.calibrate([CALIBRATION])
    first, second = (pool.search(None, SELECTION) for _ in range(2))
    assert records(first) == records(second)


def never() -> Iterator[Tensor]:
    raise AssertionError("an image was read")
    yield


def test_a_directory_that_cannot_be_written_to_is_an_error(tmp_path: Path) -> None:
    pool = Pool(pair(), SHAPE)
    pool.calibrate([CALIBRATION])
    (tmp_path / "file").touch()
    with pytest.raises(CalibrationError, match=r"calibration cannot be written to .*file/pool: .*Not a directory"):
        pool.save(tmp_path / "file" / "pool")


def test_a_disk_that_is_full_leaves_the_old_calibration(tmp_path: Path) -> None:
    calibrated(CALIBRATION).save(tmp_path)
    (tmp_path / "model.safetensors").touch()
    before, pool = resource.getrlimit(resource.RLIMIT_FSIZE), calibrated(CALIBRATION.flip(0))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
        with pytest.raises(CalibrationError, match=r"calibration cannot be written to .*Name another directory"):
            pool.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    features = Pool.open(tmp_path, pair()).calibration.sources[0].features
    assert torch.equal(features, calibrated(CALIBRATION).calibration.sources[0].features)
    pool.save(tmp_path)
    assert torch.equal(
        Pool.open(tmp_path, pair()).calibration.sources[0].features, pool.calibration.sources[0].features
    )
    # What others put there stays, what was left unfinished does not.
    assert (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_calibration_that_is_gone_while_it_is_used_is_an_error(saved: Path) -> None:
    pool = Pool.open(saved, pair())
    shutil.rmtree(saved)
    with pytest.raises(
        CalibrationError, match=r"source-0-0-.* cannot be read any more: .*Keep it as long as it is used"
    ):
        pool.search(None, SELECTION)


def test_saved_settings_of_unknown_words_are_refused(saved: Path) -> None:
    described = json.loads((saved / "calibration.json").read_text())
    described["settings"]["estimator"] = "guessed"
    (saved / "calibration.json").write_text(json.dumps(described))
    with pytest.raises(StitchError, match="estimator must be one of"):
        Pool.open(saved, pair())
