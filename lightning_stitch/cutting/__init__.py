"""From a module to a graph that can be cut.

A cut is a place where exactly one activation tensor is live, so that all that lies behind it depends on that tensor
alone. Residual, dense and branching blocks need no special case, and no architecture is listed anywhere. In reading
order:

- `graph.py`: `CutGraph` and `Cut`: where a network can be taken apart, and the parts
- `tracing.py`: a network as a flat graph of leaf operations, by torch.fx; by example where its Python looks at sizes
- `dataflow.py`: what reaches what, where one activation alone is live, which nodes a fragment needs
- `probing.py`: what each node yields and costs, from one pass over fake tensors; `network_cost`
- `activation_memory.py`: how many bytes of activations are alive at once
- `layouts.py`: how a cut's tensor is laid out (map NCHW or NHWC, tokens, vector), read off the operations around it
- `granularity.py`: which cuts are worth offering
- `copies.py`: copies of networks, and ones that share all but some tensors
- `fusing.py`: fragments made fast for inference, BatchNorm folded, channels-last
- `outlines.py`: the trace of a network without weights, over the one that it outlines
- `random_numbers.py`: draws that neither move the process's random numbers nor are moved by them
- `train_mode.py`: what a network does in train mode alone; its fragments always do what eval mode does

`granularity=` is "blocks" (the default), "stages", "all", "reference" (the rule of the StitchNet authors' code) or a
list of names of cuts.

Fragments run the eval graph in float32. What a source's Python does in train mode alone (auxiliary heads)
`CutGraph.train_mode_difference` tells, and a search warns of it before such fragments are trained with
`train_mode=True`. Convolutions, matrix products, attention and recurrent layers are counted; operators without a
formula are listed in `CutGraph.uncounted`.

Any thread may trace, count or build at any time, and no other one notices. Those that want to trace at once wait for
each other.

Example:
    >>> from timm import create_model
    >>> from lightning_stitch.cutting import CutGraph
    >>> graph = CutGraph(create_model("test_resnet").eval(), (3, 64, 64))
    >>> [cut.name for cut in graph.cuts("stages")]
    ['conv1.5', 'layer1', 'layer2', 'layer3', 'global_pool']
    >>> graph.fragment("layer1", "layer3").training
    False
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
