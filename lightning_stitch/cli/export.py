"""`lightning-stitch export CHECKPOINT FILE`: a network as ONNX, or as a program of PyTorch's."""

from __future__ import annotations


def export(checkpoint: str, file: str, per_stage: bool = False, overwrite: bool = False) -> None:
    """Write the network of a checkpoint as a file that runs without this package.

    It takes images (batch, channels, height, width), float32, in [0, 1], and gives probabilities of classes or labels,
    numbers, or features.

    Args:
        checkpoint: A checkpoint such as stitched.ckpt, a saved folder, or hf-hub:ORG/NAME.
        file: Ends in .onnx, or in .pt2 (torch.export.load).
        per_stage: A file for each stage of a network that stops when it is sure; as a whole it runs all stages.
        overwrite: Replace the files if they are there.

    Raises:
        StitchError: If the checkpoint cannot be used, a package is missing, or the network cannot be written so.
    """
    from lightning_stitch.cli.publish import network_of
    from lightning_stitch.networks import StitchedNetwork

    network = network_of(checkpoint)
    if isinstance(network, StitchedNetwork):
        files = network.export(file, overwrite=overwrite)
    else:
        files = network.export(file, per_stage=per_stage, overwrite=overwrite)
    for written in files:
        print(f"Wrote {written} ({written.stat().st_size / 1e6:.1f} MB).")
