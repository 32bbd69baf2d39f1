"""What a recipe describes, as `nn.Module`s.

A recipe (`lightning_stitch.recipe`) is structure, as plain JSON: fragments, stitches, sources with revision and
weight hash. A state dict is numbers. The two together are a network, with no source at hand:
`StitchedClassifier.load_from_checkpoint(path, weights_only=True)` and `from_pretrained` load it. In reading order:

- `network.py`: `StitchedNetwork`: images in [0, 1] in, features out; chains, exits and ensembles alike
- `backbone.py`: `StitchedBackbone`: a stitched network where a module of your own had its backbone
- `classifier.py`: a classifier's folder: its network with head, task and class names, with and without Lightning
- `timm_entry.py`: a saved network as timm's tools want one; `import lightning_stitch.timm` registers it

**Backbones of your own modules**, for `FragmentSearch(attribute=...)`:

- `StitchedBackbone(num_features=W)` gives vectors of width W. A network of another width gets a linear layer behind
  it: the first principal components of its features, or all of them beside zeros.
- `StitchedBackbone()` is as wide as the network. The module is then told by `on_backbone_stitched(self, backbone)`,
  before `configure_optimizers`, and builds its head there.
- Or leave your own backbone in `__init__`. It is replaced, and the features are mapped by least squares onto what it
  gave, so that a head trained on it goes on working.
- `FragmentSearch(head_attribute="head")` fits a linear head in closed form; with `max_epochs=0` that is all.

Checkpoints hold the recipe as plain values in the state dict: `load_from_checkpoint(..., weights_only=True)` and
`test(ckpt_path=...)` need no search and no sources. In the second and third case `load_from_checkpoint` needs one
method more, which calls `restore_backbones(self, checkpoint)`: `on_load_checkpoint`.

The network normalises inside. Where the images are normalised by the dataset, say so to `CalibrationDataModule(mean=,
std=)`; where your module normalises them itself, to `StitchedBackbone(mean=, std=)`. The network stays in eval mode
while it trains, so that a head fitted to its features goes on fitting them; `train_mode=True` makes it follow
`train()`.

Recipes that are an ensemble share the fragments and stitches that their members begin with alike, up to the first
piece that differs: so not the piece that a stitch was folded into. They are exported by `torch.export` only.

Example:
    >>> import torch
    >>> from lightning_stitch import FragmentRef, Recipe, load_source
    >>> from lightning_stitch.networks import StitchedNetwork
    >>> source = load_source("test_resnet", pretrained=False)
    >>> whole, size = FragmentRef("test_resnet", None, None), (3, 64, 64)
    >>> recipe = Recipe.chain((source.ref,), (whole,), num_features=1000, input_size=size)
    >>> StitchedNetwork.from_recipe(recipe)(torch.rand(1, 3, 64, 64)).shape
    torch.Size([1, 1000])
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
