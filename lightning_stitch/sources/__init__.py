"""Finding, checking and loading pre-trained networks.

A source is a network with its identity (name, revision, weight hash), licence and preprocessing. In reading order:

- `spec.py`: what a user may say of a source, checked before anything is looked for
- `finding.py`: from that to a source that was found: its configuration and its files are known, no weight is read
- `blueprint.py`: a source that was found but not loaded
- `source.py`: `Source`, `load_source` and `load_sources`: from a blueprint to a network with identity
- `timm_models.py`: names of timm's registry, and folders and hub repositories in its layout
- `torchvision_models.py`: torchvision's classifiers
- `python_modules.py`: what the user's own Python makes: factories, and live modules
- `meta_device.py`: networks on the meta device, where tensors have shapes and no memory
- `views.py`: a source's own view of an image: its size where that is fixed, its mean and standard deviation
- `preflight_checks.py`: `preflight`: which sources can be used for images of a shape, and what it takes to get them
- `preflight_table.py`: that as a table with the reasons below it; and going on, or not, after it
- `licences.py`: which licence a network has that is made of parts of others: that of all, where they have the same

**Downloads.** The cache is huggingface_hub's (`HF_HOME`), and torch.hub's (`TORCH_HOME`) for torchvision. In a
Trainer, downloads happen once for each node, with progress, in `prepare_data`, where ranks wait without a time limit,
whichever module is trained.

**Checks before downloads.** Every search, `lightning-stitch check --config FILE` and `preflight` look up names,
revisions and files, build architectures on the meta device, cut them at the size of your images, compare names and
shapes of the weights with them by the first bytes of the file, read licences, and compare what is to be downloaded
with the room on the disk::

    3 of 3 sources fit, for images of 3x128x128; checked in 1.8 s
    source              fits  sees       cuts     M params  M MACs  licence     download
    efficientnet_lite0  yes   3x128x128  17 NCHW      4.65   125.4  apache-2.0         -
    efficientnet_lite1  yes   3x128x128  22 NCHW      5.42   163.7  apache-2.0         -
    efficientnet_lite2  yes   3x128x128  22 NCHW      6.09   187.8  apache-2.0         -

A source that cannot be used is reported with all others, and the search is an error unless
`FragmentSearch(skip_rejected=True)` may go on without it. `lightning-stitch check` also says what `fit` would refuse
of data, module and ranking. Without a network the table says so, and what can be checked is.

What the checks cannot see: a factory (`python:`) is not called, because it may fetch weights itself, so that its
shapes are checked when the search calls it; weights that are no safetensors files (torchvision) are compared when
they are loaded; NaN in weights shows when they are read.

**Sizes.** All sources need the same number of channels. Those that accept other image sizes run at the data's size,
those that do not get theirs by resizing.

Example:
    >>> from lightning_stitch.sources import load_source, preflight
    >>> source = load_source("test_resnet.r160_in1k", pretrained=False)
    >>> source.name, source.licence, source.preprocessing.input_size
    ('test_resnet.r160_in1k', 'apache-2.0', (3, 160, 160))
    >>> checked = preflight([{"spec": "test_vit.r160_in1k", "pretrained": False}], image_shape=(3, 160, 160))
    >>> checked.fits, [row.problem for row in checked.rows]
    (True, [None])
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
