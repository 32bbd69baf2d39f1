from .card import CardDetails, CardSubject
from .loading import PretrainedFolder, open_pretrained
from .publishing import check_destination, check_publishable, publish
from .repository import ExistingCard, HubRepository, Publication
from .saving import check_free, save_folder

__all__ = [
    "CardDetails",
    "CardSubject",
    "ExistingCard",
    "HubRepository",
    "PretrainedFolder",
    "Publication",
    "check_destination",
    "check_free",
    "check_publishable",
    "open_pretrained",
    "publish",
    "save_folder",
]
