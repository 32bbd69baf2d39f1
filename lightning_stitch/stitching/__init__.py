"""Activations, stitches, and how they are fitted and folded.

A stitch joins one fragment's output to the next one's input: a format bridge, a resample, an affine map. In reading
order:

- `image_checks.py`: whether what a loader gives is images that a network can take, for every entrance of the package
- `images.py`: batches of images as a search reads them, hashed, put down to be read again; what is held out
- `segments.py`: sources taken apart at their cuts, and what their pieces cost, before anything is run
- `activations.py`: one pass of a source over the calibration images, and what is kept of every cut
- `stitches.py`: the stitch itself: bridge the format, resample to the receiver's grid, apply an affine map
- `fitting.py`: fit it on what a running network sends and what the receiver was given in its own source
- `folding.py`: fold its map into the layer before or behind it, where that is exact, and what it costs where
- `taps.py`: what a composition reads of the activations that it passes
- `candidates.py`: what a search proposes: complete compositions, as ways and taps and as trees of fragments
- `calibration.py`: all that as one value, in memory or saved in a directory

**What is scored is what runs.** The running network's activation is resampled to the receiver's grid as the final
network will do it, and CKA and the stitch come from the same sampled rows. It is carried forward, never computed from
the image again; between steps it waits in an unnamed temporary file, or in memory. Fits are in float64. A biased map
is not folded into a convolution padded with zeros: the border would be wrong.

**Formats.** Any cut can be stitched to any other, but a vector to a map. Maps become tokens and tokens maps on the
receiver's grid, both become vectors by their mean. Class and register tokens go through where both sides have as
many, else they come from the receiver's calibration mean. Position embeddings stay in the fragment that adds them.

Example:
    >>> import torch
    >>> from lightning_stitch import Pool, load_source
    >>> pool = Pool([load_source("test_resnet", pretrained=False)], (3, 64, 64))
    >>> pool.calibrate([torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))])
    >>> skip = pool.stitch([("test_resnet", None, "layer1"), ("test_resnet", "layer2", None)])
    >>> [(spec.in_channels, spec.out_channels) for spec in skip.recipe.stitches]
    [(32, 48)]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
