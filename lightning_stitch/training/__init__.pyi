from .callback_order import check_order
from .checkpoints import open_classifier
from .fragment_search import FragmentSearch
from .module import StitchedClassifier
from .predicting import ImageFiles, PredictionWriter, predict_files
from .publish_after_fit import PublishAfterFit
from .slots import place_for_network

__all__ = [
    "FragmentSearch",
    "ImageFiles",
    "PredictionWriter",
    "PublishAfterFit",
    "StitchedClassifier",
    "check_order",
    "open_classifier",
    "place_for_network",
    "predict_files",
]
