"""Finding, checking and loading pre-trained networks.

A source is a network with its identity (name, revision, weight hash), licence and preprocessing. In reading order:

- `spec.py`: what a user may say of a source
- `finding.py`: from that to a source whose configuration and files are known, no weight read
- `timm_models.py`, `torchvision_models.py`, `python_modules.py`: how each builder's sources are found and built
- `blueprint.py`: a source that was found but not loaded
- `source.py`: `Source`, `load_source` and `load_sources`
- `meta_device.py`: networks whose tensors have shapes and no memory
- `views.py`: a source's own view of an image, and its cuts for images of a shape
- `preflight_checks.py`, `preflight_table.py`: what can be checked before any weights are fetched, and the table of it
- `licences.py`: the licence of a network that is made of parts of others

**Downloads.** The cache is huggingface_hub's (`HF_HOME`), and torch.hub's (`TORCH_HOME`) for torchvision. In a
Trainer, downloads happen once for each node, in `prepare_data`. Without a network the cache is used, and said so.

**What the checks cannot see.** A factory (`python:`) may fetch weights itself, so that it is not called before the
search needs it; weights that are no safetensors files (torchvision) are compared when they are loaded; NaN shows when
weights are read. A source that cannot be used is an error, unless `skip_rejected=True` goes on without it.

Example:
    >>> from lightning_stitch.sources import load_source, preflight
    >>> source = load_source("test_resnet.r160_in1k", pretrained=False)
    >>> source.name, source.licence, source.preprocessing.input_size
    ('test_resnet.r160_in1k', 'apache-2.0', (3, 160, 160))
    >>> preflight([{"spec": "test_vit.r160_in1k", "pretrained": False}], image_shape=(3, 160, 160)).fits
    True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
