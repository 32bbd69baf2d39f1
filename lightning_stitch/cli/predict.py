"""`lightning-stitch predict CHECKPOINT IMAGES...`: class names and probabilities of image files."""

from __future__ import annotations

import sys


def predict(
    checkpoint: str,
    images: list[str],
    output: str | None = None,
    overwrite: bool = False,
    skip_unreadable: bool = False,
    class_names: list[str] | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str = "auto",
) -> None:
    """Predict the classes of image files; their size and channels come from the checkpoint.

    `predict_data` predicts with a module and a data module of your own.

    Args:
        checkpoint: A checkpoint such as stitched.ckpt, a saved folder, or hf-hub:ORG/NAME.
        images: Image files, and folders of them (those in folders inside too).
        output: A .csv or .jsonl file; without it CSV is printed, with what a terminal cannot show escaped.
        overwrite: Replace the output file if it is there.
        skip_unreadable: Leave out files that cannot be decoded.
        class_names: Names of the classes, instead of the checkpoint's.
        batch_size: Images in a batch.
        num_workers: Processes that read images.
        device: auto, cpu, cuda, cuda:1, mps, ...

    Raises:
        StitchError: If the checkpoint, an image, the device or the output file cannot be used.
    """
    from lightning_stitch.baselines import quiet_trainers
    from lightning_stitch.report import as_csv
    from lightning_stitch.training import ImageFiles, open_classifier, predict_files

    module = open_classifier(checkpoint)
    if class_names:
        module.class_names = class_names
    elif module.class_names is None:
        print(
            f"{checkpoint} holds no class names, so classes are numbered from 0; give them with --class_names.",
            file=sys.stderr,
        )
    files = ImageFiles(images, batch_size, num_workers, skip_unreadable)
    with quiet_trainers():
        rows = predict_files(
            module, files, output=output, overwrite=overwrite, device=device, progress=output is not None
        )
    for reason in files.skipped.values():
        print(f"skipped: {escape(reason, sys.stderr.encoding)}", file=sys.stderr)
    if output is None:
        encoding = sys.stdout.encoding or "ascii"
        text = as_csv([{**row, "file": escape(row["file"], encoding)} for row in rows])
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="")
    else:
        print(f"Wrote {len(rows)} row{'s' * (len(rows) != 1)} to {escape(output, sys.stdout.encoding)}.")


def escape(text: str, encoding: str | None) -> str:
    """Text with backslash escapes for control characters, bytes that are no text, and what an encoding lacks."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.encode(encoding or "ascii", "backslashreplace").decode(encoding or "ascii")
