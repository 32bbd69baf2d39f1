"""Compose a new network from fragments of pre-trained ones, in seconds, without back-propagation.

Names are imported at their first use: `import lightning_stitch` loads neither torch nor timm nor Lightning. In reading
order, each wing importing only from those before it:

- `errors`, `recipe`, `settings`, `cost`, `progress`, `tables`: the words that every wing speaks, as frozen values, and
  how they are shown
- `maths`: similarity (CKA) and regression of rows
- `io`: downloads, tensor files, activations that wait on disk, the journal of a search
- `cutting`: from a module to a graph with cuts
- `sources`: finding, checking and loading pre-trained networks
- `stitching`: activations, stitches, how they are fitted and folded
- `healing`: closed-form repair behind a stitch
- `heads`: closed-form heads and their targets
- `data`: images and labels
- `hub`: saved folders, cards, repositories
- `networks`: what a recipe describes, as `nn.Module`s
- `search`: space, strategies, ranking, results
- `composing`: the pool that conducts a search, and who calls it
- `report`: comparisons, tables, predictions
- `training`: Lightning's hooks
- `baselines`: what else the same data allow
- `app`: pages in the browser, in Gradio
- `cli`: the command line

`import lightning_stitch.timm` tells timm of the architecture "lightning_stitch", so that
`timm.create_model("hf-hub:ORG/NAME", pretrained=True)` loads what was published from here.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
