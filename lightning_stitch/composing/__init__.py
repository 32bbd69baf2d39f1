"""Composing: the pool that conducts a search, and who calls it.

In reading order:

- `pool.py`: `Pool`: from sources and a few images to a ranked list of networks, without a Trainer
- `search_steps.py`: what a pool does in a search, step by step
- `shrinking.py`: `shrink`: a shorter version of one network, by skips within it, healed
- `personal.py`: `compose_personal`: a network for a few images of one person, from a pool that was prepared once
- `cross_fitting.py`: what a network gives for the images that its stitch is fitted on, as though it had not seen them
- `ensembling.py`: `ensemble`: several candidates of a search joined into one network

**Personal networks.** The sources run once over the images; early exits and fronts of stitched networks come out of
that pass, and only the tails behind stitches run besides (`effort`). The same images fit, choose and judge, but none is
judged by what has seen it.

**Ensembles.** Fragments and stitches that members begin with alike run and are held once, up to the first piece that
differs; each member has its own closed-form head. The output is log-probabilities, of the arithmetic or the geometric
mean. A `StitchedClassifier` takes one by `model.install(network, torch.nn.Identity())`.

Example:
    >>> import torch
    >>> from lightning_stitch.composing import Pool, compose_personal
    >>> from lightning_stitch import load_sources
    >>> pool = Pool.prepare(load_sources([{"spec": "test_resnet", "pretrained": False}]), (3, 64, 64))
    >>> images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> mine = compose_personal(pool, images, ["cup", "key"] * 4)
    >>> mine.classes, mine.network(images).shape
    (('cup', 'key'), torch.Size([8, 2]))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
