"""What a recipe describes, as `nn.Module`s.

A recipe is structure, as plain JSON; a state dict is numbers. The two together are a network, with no source at hand.
In reading order:

- `network.py`: `StitchedNetwork`: images in [0, 1] in, features out; chains, exits and ensembles alike
- `backbone.py`: `StitchedBackbone`: a stitched network where a module of your own had its backbone
- `classifier.py`: a classifier's folder: its network with head, task and class names, with and without Lightning
- `exporting.py`: ONNX and PyTorch's own programs, whole or stage by stage
- `timm_entry.py`: a saved network as timm's tools want one; `import lightning_stitch.timm` registers it

**Stages.** `StitchedNetwork.in_stages` runs each image of a batch until a stage's head is sure of it: the rest of the
batch goes on from the activations that are there. What is exported or traced runs all stages, and gives the same; with
`per_stage=True` each is a file, (images, features, activations so far) -> (answer, whether it is sure, what the next
one needs), and examples/run_stages.py runs them with onnxruntime alone. `openvino.convert_model("network.onnx")` reads
an ONNX file, too: equal in float32 (`{"INFERENCE_PRECISION_HINT": "f32"}`; where a CPU has bfloat16 it takes that
unasked), but not where a source sees a smaller image, which OpenVINO resizes in another way.

**Backbones of your own modules**, for `FragmentSearch(attribute=...)`:

- `StitchedBackbone(num_features=W)` gives vectors of width W. A network of another width gets a linear layer behind
  it: the first principal components of its features, or all of them beside zeros.
- `StitchedBackbone()` is as wide as the network; `on_backbone_stitched(self, backbone)` builds what depends on that.
- Your own backbone of `__init__` is replaced, and the features are mapped by least squares onto what it gave.

Checkpoints hold the recipe: `load_from_checkpoint(..., weights_only=True)` and `test(ckpt_path=...)` need no search. In
the second and third case `on_load_checkpoint` has to call `restore_backbones(self, checkpoint)`.

The network normalises inside. Where the images are normalised by the dataset, say so to `CalibrationDataModule(mean=,
std=)`; where your module normalises them itself, to `StitchedBackbone(mean=, std=)`.

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
