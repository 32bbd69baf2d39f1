"""Closed-form heads, and the targets that they are fitted to.

No head uses back-propagation, each can be trained on from there, and each comes back from a checkpoint alone. In
reading order:

- `targets.py`: what images are to be told apart by: classes, several labels at once, or numbers
- `ridge.py`: the default: a linear map by ridge regression, its strength chosen by leave-one-out
- `score_calibration.py`: from scores to probabilities
- `ridge_learner.py`: the same head while labelled rows come and go
- `staged.py`: heads on ever more of a readout: an image gets the answer of the first that is sure of it
- `neighbours.py`: the k nearest labelled images vote
- `class_maps.py`: new classes as groups of the classes that a source knows: no labels
- `head_settings.py`: one description that a module, a search and a checkpoint share; `fit_head`

Ridge is ahead at every number of labels that was tried, so it is the default (tests/benchmarks/README.md).

**Readouts** are vectors side by side. Heads are told their widths (`blocks=`), standardise every feature and let
each block count alike; `RidgeFit.block_shares` says which of them decided.

**Stages** have a ridge head each, on all taps so far. How sure one is of images that it has not seen is known from
those left out of its fit: the margin between two classes, the least sure label, the expected residual of numbers.

**Tasks** have their loss and metrics: accuracy and AUROC of classes; AUROC, average precision and F1 of labels;
squared and absolute error, R2 and, of a single number, Pearson's correlation. Searches rank by leave-one-out R2
whatever the task; `FragmentSearch(compare=True)` is for classes only.

**Class maps** need pictures and no answers (examples/class_map.yaml). Classes are named as ImageNet has them, by
WordNet's names, which timm carries: "dog" alone names none of ImageNet-1k's classes, but "A .. B" is the stretch of its
list from A to B, and indices and ranges ("151-268") do as well.

Example:
    >>> import torch
    >>> from lightning_stitch.heads import fit_head
    >>> labels = torch.arange(40) % 2
    >>> features = labels[:, None] + 0.1 * torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    >>> head = fit_head(features, labels)
    >>> bool((head(features).argmax(1) == labels).all())
    True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
