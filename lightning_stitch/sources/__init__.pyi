from .blueprint import checked_preprocessing
from .licences import CombinedLicence, combine_licences, hub_words
from .meta_device import build_on_meta, give_memory
from .preflight_checks import Preflight, preflight
from .preflight_table import fitting_sources, print_preflight, refusal, usable_sources
from .source import Source, build_architecture, find_sources, load_source, load_sources
from .timm_models import hub_repository
from .views import Preprocess, check_names, opened, view_size, without_strangers

__all__ = [
    "CombinedLicence",
    "Preflight",
    "Preprocess",
    "Source",
    "build_architecture",
    "build_on_meta",
    "check_names",
    "checked_preprocessing",
    "combine_licences",
    "find_sources",
    "fitting_sources",
    "give_memory",
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
