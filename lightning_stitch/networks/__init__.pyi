from .backbone import HOOK, StitchedBackbone, announce, put, restore_backbones, saved_backbones
from .classifier import load_classifier, save_classifier
from .ensemble import Ensemble, _assembled
from .network import StitchedNetwork, assemble

__all__ = [
    "Ensemble",
    "HOOK",
    "StitchedBackbone",
    "StitchedNetwork",
    "_assembled",
    "announce",
    "assemble",
    "load_classifier",
    "put",
    "restore_backbones",
    "save_classifier",
    "saved_backbones",
]
