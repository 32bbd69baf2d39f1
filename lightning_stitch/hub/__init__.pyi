from .card import CardDetails, CardSubject
from .loading import PretrainedFolder, open_pretrained
from .picture import can_draw, composition_figure
from .publishing import check_destination, check_publishable, publish
from .repository import ExistingCard, HubRepository, Publication
from .saving import check_free, save_folder
from .structure import structure_of, warn_of_changes

__all__ = [
    "CardDetails",
    "CardSubject",
    "ExistingCard",
    "HubRepository",
    "PretrainedFolder",
    "Publication",
    "can_draw",
    "check_destination",
    "check_free",
    "check_publishable",
    "composition_figure",
    "open_pretrained",
    "publish",
    "save_folder",
    "structure_of",
    "warn_of_changes",
]
