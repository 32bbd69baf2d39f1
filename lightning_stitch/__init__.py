"""Compose a new network from fragments of pre-trained ones, in seconds, without back-propagation.

Names are imported at their first use: `import lightning_stitch` loads neither timm nor Lightning nor matplotlib. One
side effect: timm, once it is imported too, before or after, knows the architecture "lightning_stitch", so that
`timm.create_model("hf-hub:ORG/NAME", pretrained=True)` loads what was published from here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_stitch import _timm_hook

if TYPE_CHECKING:
    from lightning_stitch.baselines.finetuning import FineTuning
    from lightning_stitch.baselines.methods import compare_methods
    from lightning_stitch.composing.ensembling import ensemble
    from lightning_stitch.composing.personal import Composition, compose
    from lightning_stitch.composing.pool import Pool
    from lightning_stitch.composing.shrinking import shrink
    from lightning_stitch.cost import Budget, Cost
    from lightning_stitch.cutting.graph import Cut, CutGraph
    from lightning_stitch.cutting.probing import network_cost
    from lightning_stitch.data.datamodule import CalibrationDataModule
    from lightning_stitch.errors import (
        BudgetError,
        CalibrationError,
        CutError,
        JournalError,
        RecipeError,
        SourceError,
        StitchError,
    )
    from lightning_stitch.heads.class_maps import class_map_from_names
    from lightning_stitch.heads.head_settings import fit_head
    from lightning_stitch.heads.ridge import RidgeHead, fit_ridge_head
    from lightning_stitch.hub.card import CardDetails
    from lightning_stitch.hub.publishing import Publication, publish
    from lightning_stitch.maths.cka import linear_cka
    from lightning_stitch.maths.cka_metric import LinearCKA
    from lightning_stitch.networks.backbone import StitchedBackbone, restore_backbones
    from lightning_stitch.networks.ensemble import Ensemble
    from lightning_stitch.networks.network import StitchedNetwork
    from lightning_stitch.recipe import EnsembleRecipe, FragmentRef, Preprocessing, Recipe
    from lightning_stitch.search.results import SearchResult
    from lightning_stitch.search.strategies import Beam, DepthFirst
    from lightning_stitch.settings import CalibrationSettings
    from lightning_stitch.sources.preflight_checks import Preflight, preflight
    from lightning_stitch.sources.source import Source, load_source, load_sources
    from lightning_stitch.training.fragment_search import FragmentSearch
    from lightning_stitch.training.module import StitchedClassifier
    from lightning_stitch.training.predicting import ImageFiles, PredictionWriter, predict_files
    from lightning_stitch.training.publish_after_fit import PublishAfterFit

__version__ = "0.1.0"

_timm_hook.install()

_HOMES = {
    "backbones": ["StitchedBackbone", "restore_backbones"],
    "callbacks": ["FragmentSearch"],
    "class_maps": ["class_map_from_names"],
    "personal": ["Composition", "compose"],
    "pool": ["Pool"],
    "cost": ["Budget", "Cost", "network_cost"],
    "data": ["CalibrationDataModule"],
    "ensemble_recipe": ["EnsembleRecipe"],
    "ensembles": ["Ensemble", "ensemble"],
    "errors": [
        "BudgetError",
        "CalibrationError",
        "CutError",
        "JournalError",
        "RecipeError",
        "SourceError",
        "StitchError",
    ],
    "finetuning": ["FineTuning"],
    "functional": ["linear_cka"],
    "graph": ["Cut", "CutGraph"],
    "head_settings": ["fit_head"],
    "heads": ["RidgeHead", "fit_ridge_head"],
    "methods": ["compare_methods"],
    "model_card": ["CardDetails"],
    "module": ["StitchedClassifier"],
    "network": ["StitchedNetwork"],
    "predicting": ["ImageFiles", "PredictionWriter", "predict_files"],
    "publish_callback": ["PublishAfterFit"],
    "publishing": ["Publication", "publish"],
    "recipe": ["FragmentRef", "Preprocessing", "Recipe"],
    "results": ["SearchResult"],
    "search": ["Beam", "DepthFirst"],
    "segments": ["CalibrationSettings"],
    "shrinking": ["shrink"],
    "similarity": ["LinearCKA"],
    "source_checks": ["Preflight", "preflight"],
    "sources": ["Source", "load_source", "load_sources"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    # composing inside a Trainer
    "StitchedClassifier",
    "CalibrationDataModule",
    "FragmentSearch",
    "Budget",
    "Beam",
    "DepthFirst",
    # in a LightningModule of your own
    "StitchedBackbone",
    "restore_backbones",
    # predicting image files
    "predict_files",
    "ImageFiles",
    "PredictionWriter",
    # sharing networks
    "publish",
    "Publication",
    "PublishAfterFit",
    "CardDetails",
    # beside fine-tuning
    "compare_methods",
    "FineTuning",
    # composing without one
    "Pool",
    "shrink",
    "SearchResult",
    "CalibrationSettings",
    "StitchedNetwork",
    "Recipe",
    "FragmentRef",
    "RidgeHead",
    "fit_ridge_head",
    "fit_head",
    "class_map_from_names",
    # composing for a few images of one person
    "compose",
    "Composition",
    # several networks as one
    "ensemble",
    "Ensemble",
    "EnsembleRecipe",
    # taking networks apart
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
    # comparing activations
    "linear_cka",
    "LinearCKA",
    # what can go wrong
    "StitchError",
    "SourceError",
    "CutError",
    "CalibrationError",
    "BudgetError",
    "RecipeError",
    "JournalError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
