"""Closed-form repair behind a stitch.

A stitch is fitted at one place, and its error grows through the layers behind it. Healing re-solves these layers, in
forward order, on the same unlabelled images: each is fed what the running network gives it and should give what it
gave in its own source. The change is kept where it explains images held out of the fit better, and all of it only
where the network's final features agree more with those of its last source. No labels, no back-propagation;
architecture, operations and folds stay. In reading order:

- `healing.py`: what is solved, why, what it costs and where it fails: the method with its equations
- `layers.py`: one layer: which can be solved, the rows that they are fed, the solution
- `trials.py`: run a composed network from its first stitch on, with changes on trial, and judge it by held-out R2
- `healer.py`: heal the finalists of a search, and keep it only where it helped

`heal=True` asks `Pool.search`, `Pool.stitch` or `FragmentSearch` for it; `max_healed` says how many networks.
`StitchedNetwork.describe()` lists the layers that stayed as they were, and why.

Limits: it is off by default, because accuracy hardly follows fidelity (tests/benchmarks/README.md). Calibration
images must come from the task's own distribution. Where several show one thing (a photograph, a patient, a module),
say so with `Pool.calibrate(images, groups=labels)`, and the images that judge are whole groups; inside a Trainer
there is no way yet to say it. Under a hard shift of the images nothing shorter than a source stays true, healed or
not, and the guard is no insurance against it.

Example:
    >>> import torch
    >>> from lightning_stitch import load_source, shrink
    >>> source = load_source("test_resnet", pretrained=False)
    >>> images = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> short = shrink(source, [images[:16]], [images[16:]], 0.75)  # skips, healed, within 75 % of the MACs
    >>> short.chosen.candidate.kind
    'stitched'
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
