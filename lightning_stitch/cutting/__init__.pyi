from .copies import copy_module, reference_tensor, with_tensors
from .fusing import fuse
from .graph import Cut, CutGraph
from .probing import FORMULAS, network_activation_bytes, network_cost
from .random_numbers import RandomNumbers
from .tracing import in_eval_mode

__all__ = [
    "Cut",
    "CutGraph",
    "FORMULAS",
    "RandomNumbers",
    "copy_module",
    "fuse",
    "in_eval_mode",
    "network_activation_bytes",
    "network_cost",
    "reference_tensor",
    "with_tensors",
]
