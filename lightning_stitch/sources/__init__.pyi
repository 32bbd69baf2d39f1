from .blueprint import Blueprint
from .licences import CombinedLicence, combine_licences, hub_words
from .meta_device import build_on_meta
from .preflight_checks import Preflight, preflight
from .preflight_table import fitting_sources, print_preflight, refusal, usable_sources
from .source import Source, build_architecture, load_source, load_sources
from .spec import checked_preprocessing
from .timm_models import hub_repository
from .views import Preprocess, check_names, opened, view_size, without_strangers

__all__ = [
    "Blueprint",
    "CombinedLicence",
    "Preflight",
    "Preprocess",
    "Source",
    "build_architecture",
    "build_on_meta",
    "check_names",
    "checked_preprocessing",
    "combine_licences",
    "fitting_sources",
    "hub_repository",
    "hub_words",
    "load_source",
    "load_sources",
    "opened",
    "preflight",
    "print_preflight",
    "refusal",
    "usable_sources",
    "view_size",
    "without_strangers",
]
