from .callback_order import check_order
from .checkpoints import open_classifier
from .fragment_search import FragmentSearch
from .module import StitchedClassifier
from .one_call import compose
from .places import place_for_network
from .predicting import ImageFiles, PredictionWriter, predict_files
from .publish_after_fit import PublishAfterFit

__all__ = [
    "FragmentSearch",
    "ImageFiles",
    "PredictionWriter",
    "PublishAfterFit",
    "StitchedClassifier",
    "check_order",
    "compose",
    "open_classifier",
    "place_for_network",
    "predict_files",
]
