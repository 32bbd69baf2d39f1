from .class_maps import class_map_from_names
from .head_settings import HeadSettings, fit_head
from .neighbours import NearestNeighbourHead
from .ridge import DEFAULT_STRENGTHS, RidgeHead, fit_ridge_head
from .ridge_learner import RidgeLearner
from .score_calibration import class_temperature
from .staged import StagedHead, confidence, log_residuals, thresholds_at
from .targets import Task, comparable_columns, count_of, predictions, task_of

__all__ = [
    "DEFAULT_STRENGTHS",
    "HeadSettings",
    "NearestNeighbourHead",
    "RidgeHead",
    "RidgeLearner",
    "StagedHead",
    "Task",
    "class_map_from_names",
    "class_temperature",
    "comparable_columns",
    "confidence",
    "count_of",
    "fit_head",
    "fit_ridge_head",
    "log_residuals",
    "predictions",
    "task_of",
    "thresholds_at",
]
