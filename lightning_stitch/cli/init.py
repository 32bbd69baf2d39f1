"""`lightning-stitch init FOLDER`: a commented configuration to begin with."""

from __future__ import annotations

_TEMPLATE = """\
# Compose a classifier for {images} images in {num_classes} classes.
#
#   lightning-stitch check --config {file}   # sources, before anything is downloaded
#   lightning-stitch fit --config {file}
#   lightning-stitch predict logs/stitched/version_0/stitched.ckpt IMAGES...
#
# `lightning-stitch fit --help` begins with all options of the three classes here.
seed_everything: 0
model:
  class_path: lightning_stitch.StitchedClassifier # its classes are the data's: {names}
  # init_args:
  #   head: knn # the most similar labelled images vote
data:
  class_path: lightning_stitch.CalibrationDataModule
  init_args:
    image_folder: {folder}
    image_size: {image_size} # a square; more pixels cost more and see more
    calibration_samples: {calibration} # stitches are fitted on these, without labels
    # test_samples: 512 # or a share; {test}
trainer:
  max_epochs: 0 # no back-propagation; 3 would train on from what is composed
  accelerator: auto
  devices: 1
  logger:
    class_path: CSVLogger
    init_args: {{save_dir: logs, name: stitched}}
  callbacks:
    - class_path: lightning_stitch.FragmentSearch
      init_args:
        sources: # timm names, hf-hub:ORG/NAME, local-dir:PATH, torchvision:NAME
{sources}
        compare: true # the honest table: test images that nothing else touches
        # budget:
        #   class_path: lightning_stitch.Budget
        #   init_args: {{max_macs: 1.0e+9}} # or mean_macs, max_params, max_latency_ms
"""
_SOURCES = ("resnet18.a1_in1k", "efficientnet_b0.ra_in1k", "mobilenetv3_large_100.ra_in1k")


def init(folder: str, sources: list[str] = list(_SOURCES), output: str = "stitch.yaml", image_size: int = 224) -> None:  # noqa: B006
    """Write a commented configuration for a folder of images, for `fit`, `check` and `compare`.

    Args:
        folder: Class folders of images, or train, val and test with class folders.
        sources: What to compose from.
        output: The file; one that is there is kept.
        image_size: Images are resized to a square of so many pixels.

    Raises:
        StitchError: If the folder cannot be used, or the file is there already.
    """
    import json
    from pathlib import Path

    from lightning_stitch.data import calibration_samples_of, list_images, open_class_folders
    from lightning_stitch.errors import StitchError
    from lightning_stitch.io import complete_or_absent

    path = Path(output)
    if path.exists():
        raise StitchError(f"{path} is there already. Name another file with --output.")
    sets = open_class_folders(Path(folder))
    names, num_images = sets["train"].classes, len(list_images([folder]))
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    text = _TEMPLATE.format(
        images=num_images,
        num_classes=len(names),
        names=shown.replace("\n", " "),
        file=path,
        folder=json.dumps(str(folder), ensure_ascii=False),
        image_size=image_size,
        calibration=calibration_samples_of(num_images),
        test="all of the folder's test set" if "test" in sets else "a fifth of the images",
        sources="\n".join(f"          - {json.dumps(source)}" for source in sources),
    )
    with complete_or_absent(path) as file:
        file.write(text.encode())
    print(f"Wrote {path}. Next: lightning-stitch check --config {path}")
