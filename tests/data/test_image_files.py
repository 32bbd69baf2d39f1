from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_stitch.data.image_files import ImageFileSet, list_images, select_readable
from lightning_stitch.errors import CalibrationError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, format="PNG")


def broken(path: Path) -> Path:
    """A file that begins as an image and ends in the middle of it."""
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:600])
    return path


def test_folders_give_their_images_sorted_and_files_are_taken_as_named(tmp_path: Path) -> None:
    inside = [tmp_path / name for name in ("a/2.png", "a/10.JPG", "a/b/1.webp", "c/3.tiff")]
    hidden = [tmp_path / name for name in ("a/._2.png", "a/.thumbnails/1.png", "a/notes.txt")]
    odd = tmp_path / "picture"
    touch(*inside, *hidden, odd)
    with pytest.warns(UserWarning, match=r"^1 files that are no images are left out: .*notes\.txt\.$"):
        found = list_images([odd, str(tmp_path / "c"), tmp_path / "a"])
    assert found == [odd, *(tmp_path / name for name in ("c/3.tiff", "a/10.JPG", "a/2.png", "a/b/1.webp"))]


def test_a_name_given_twice_is_taken_once_where_it_stood_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(*(tmp_path / name for name in ("1.png", "2.png", "3.png")))
    monkeypatch.chdir(tmp_path)
    listed = list_images([tmp_path / "3.png", tmp_path, "1.png", "./3.png"])
    assert [file.name for file in listed] == ["3.png", "1.png", "2.png"]


def test_two_names_of_one_file_are_two_images(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "abc"
    touch(blob)
    names = [tmp_path / "snapshot" / name for name in ("cat.png", "same_cat.png")]
    (tmp_path / "snapshot").mkdir()
    for name in names:
        name.symlink_to(blob)
    (tmp_path / "hard.png").hardlink_to(blob)
    assert list_images([tmp_path / "snapshot"]) == names
    assert list_images([*names, blob, tmp_path / "hard.png"]) == [*names, blob, tmp_path / "hard.png"]


def test_links_to_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(root / "a" / "1.png", elsewhere / "deep" / "2.png")
    (root / "linked").symlink_to(elsewhere)
    (root / "linked_again").symlink_to(elsewhere / "deep")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "here").symlink_to(".")
    (elsewhere / "back").symlink_to(root)
    found = [file.relative_to(root).as_posix() for file in list_images([root])]
    assert found == ["a/1.png", "linked/deep/2.png", "linked_again/2.png"]
    (tmp_path / "link_to_root").symlink_to(root)
    assert len(list_images([tmp_path / "link_to_root"])) == 3


def test_files_of_one_name_in_two_folders_are_two_images(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "1.png", tmp_path / "b" / "1.png")
    assert list_images([tmp_path / "a", tmp_path / "b"]) == [tmp_path / "a" / "1.png", tmp_path / "b" / "1.png"]


def test_paths_without_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    with pytest.raises(CalibrationError, match="No images were named"):
        list_images([])
    with pytest.raises(CalibrationError, match=r"nowhere\.png, .*nothing do not exist"):
        list_images([tmp_path / "nowhere.png", tmp_path / "nothing", tmp_path])
    with pytest.raises(CalibrationError, match=r"empty holds no images that Pillow reads; it holds 1 other files"):
        list_images([tmp_path / "empty"])


def test_files_that_are_no_images_are_refused_or_skipped_with_the_reason(tmp_path: Path) -> None:
    touch(tmp_path / "1.png")
    (tmp_path / "2.png").write_text("no image")
    files = [tmp_path / "1.png", tmp_path / "2.png", broken(tmp_path / "3.png")]
    with pytest.raises(CalibrationError, match=r"1 of 3 files cannot be read as images: .*2.png: cannot identify"):
        select_readable(files, skip_unreadable=False)
    left, reasons = select_readable(files, skip_unreadable=True)
    assert left == files[:1]
    assert list(reasons) == files[1:]
    assert "truncated" in reasons[files[2]] or "broken" in reasons[files[2]]
    with pytest.raises(CalibrationError, match="None of 2 files can be read"):
        select_readable(files[1:], skip_unreadable=True)


def test_many_unreadable_files_are_counted(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(8)]
    for file in files:
        file.write_text("no image")
    with pytest.raises(CalibrationError, match=r"8 of 8 files .*4\.png: .* and 3 more\. Mend"):
        select_readable(files, skip_unreadable=False)


COLOUR = (40, 80, 120)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("RGB", COLOUR, [part / 255 for part in COLOUR]),
        ("RGBA", (*COLOUR, 0), [part / 255 for part in COLOUR]),
        ("L", 51, [0.2] * 3),
        ("LA", (51, 7), [0.2] * 3),
        ("1", 1, [1.0] * 3),
        ("I;16", 40000, [40000 / 65535] * 3),
    ],
)
def test_every_kind_of_image_becomes_three_channels_between_zero_and_one(
    tmp_path: Path, mode: str, value: int | tuple[int, ...], expected: list[float]
) -> None:
    Image.new(mode, (6, 5), value).save(tmp_path / "1.png")
    image, index = ImageFileSet([tmp_path / "1.png"], (3, 4, 8))[0]
    assert index == 0
    torch.testing.assert_close(image, torch.tensor(expected).view(3, 1, 1).expand(3, 4, 8))


def test_palettes_become_their_colours(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), COLOUR).quantize(2).save(tmp_path / "1.gif")
    image, _ = ImageFileSet([tmp_path / "1.gif"], (3, 4, 4))[0]
    torch.testing.assert_close(image[:, 0, 0] * 255, torch.tensor(COLOUR).float())


def test_sixteen_bits_of_either_byte_order_are_the_same_image(tmp_path: Path) -> None:
    for mode, name in (("I;16", "little.tiff"), ("I;16B", "big.tiff")):
        Image.new(mode, (4, 4), 1000).save(tmp_path / name)
    little, big = (image for image, _ in ImageFileSet([tmp_path / "little.tiff", tmp_path / "big.tiff"], (1, 4, 4)))
    torch.testing.assert_close(little, torch.full((1, 4, 4), 1000 / 65535))
    assert torch.equal(little, big)


def test_images_are_resized_with_antialiasing(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    image, _ = ImageFileSet([tmp_path / "1.png"], (3, 8, 12))[0]
    given = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    expected = torch.nn.functional.interpolate(given, (8, 12), mode="bilinear", antialias=True)[0]
    torch.testing.assert_close(image, expected)


def test_images_that_do_not_suit_the_network_are_named(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    with pytest.raises(CalibrationError, match=r"colour\.png cannot be used: it is in colour, .* takes grey images"):
        ImageFileSet([tmp_path / "colour.png"], (1, 4, 4))[0]
    with pytest.raises(CalibrationError, match=r"float\.tiff cannot be used: its pixels are 32-bit numbers"):
        ImageFileSet([tmp_path / "float.tiff"], (3, 4, 4))[0]
    with pytest.raises(CalibrationError, match=r"broken\.png cannot be used"):
        ImageFileSet([broken(tmp_path / "broken.png")], (3, 4, 4))[0]
    with pytest.raises(CalibrationError, match="takes images of 4 channels, and image files hold 1 or 3"):
        ImageFileSet([tmp_path / "colour.png"], (4, 4, 4))
