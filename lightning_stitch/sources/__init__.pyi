from .blueprint import Blueprint
from .finding import find_sources
from .licences import CombinedLicence, combine_licences, hub_words
from .meta_device import build_on_meta
from .preflight_checks import Preflight, preflight
from .preflight_table import fitting_sources, print_preflight, refusal, require
from .source import Source, build_architecture, load_source, load_sources
from .spec import check_preprocessing
from .timm_models import hub_repository
from .views import Preprocess, check_names, cut_source, view_size, without_strangers

__all__ = [
    "Blueprint",
    "CombinedLicence",
    "Preflight",
    "Preprocess",
    "Source",
    "build_architecture",
    "build_on_meta",
    "check_names",
    "check_preprocessing",
    "combine_licences",
    "cut_source",
    "find_sources",
    "fitting_sources",
    "hub_repository",
    "hub_words",
    "load_source",
    "load_sources",
    "preflight",
    "print_preflight",
    "refusal",
    "require",
    "view_size",
    "without_strangers",
]
