from .baselines import FineTuning, compare_methods
from .composing import Pool, ensemble, shrink
from .cost import Budget, Cost
from .cutting import Cut, CutGraph, network_cost
from .data import CalibrationDataModule
from .errors import BudgetError, CalibrationError, CutError, JournalError, RecipeError, SourceError, StitchError
from .heads import RidgeHead, RidgeLearner, class_map_from_names, fit_head, fit_ridge_head
from .hub import CardDetails, Publication, publish
from .maths import LinearCKA, linear_cka
from .networks import StitchedBackbone, StitchedNetwork, restore_backbones
from .recipe import FragmentRef, Preprocessing, Recipe
from .report import Verdict, judge_splits
from .search import Beam, DepthFirst, SearchResult
from .settings import CalibrationSettings
from .sources import Preflight, Source, load_source, load_sources, preflight
from .training import (
    FragmentSearch,
    ImageFiles,
    PredictionWriter,
    PublishAfterFit,
    StitchedClassifier,
    compose,
    predict_files,
)

__version__: str

__all__ = [
    "StitchedClassifier",
    "CalibrationDataModule",
    "FragmentSearch",
    "Budget",
    "Beam",
    "DepthFirst",
    "StitchedBackbone",
    "restore_backbones",
    "compose",
    "predict_files",
    "ImageFiles",
    "PredictionWriter",
    "publish",
    "Publication",
    "PublishAfterFit",
    "CardDetails",
    "compare_methods",
    "FineTuning",
    "Verdict",
    "judge_splits",
    "Pool",
    "shrink",
    "SearchResult",
    "CalibrationSettings",
    "StitchedNetwork",
    "Recipe",
    "FragmentRef",
    "RidgeHead",
    "RidgeLearner",
    "fit_ridge_head",
    "fit_head",
    "class_map_from_names",
    "ensemble",
    "Source",
    "Preprocessing",
    "load_source",
    "load_sources",
    "preflight",
    "Preflight",
    "Cut",
    "CutGraph",
    "Cost",
    "network_cost",
    "linear_cka",
    "LinearCKA",
    "StitchError",
    "SourceError",
    "CutError",
    "CalibrationError",
    "BudgetError",
    "RecipeError",
    "JournalError",
]
