from .backbone import HOOK, StitchedBackbone, announce, put, restore_backbones, saved_backbones
from .classifier import check_classes, check_numbers, load_classifier, save_classifier
from .exporting import export_network
from .network import StitchedNetwork, assemble, is_traced

__all__ = [
    "HOOK",
    "StitchedBackbone",
    "StitchedNetwork",
    "announce",
    "assemble",
    "check_classes",
    "check_numbers",
    "export_network",
    "is_traced",
    "load_classifier",
    "put",
    "restore_backbones",
    "save_classifier",
    "saved_backbones",
]
