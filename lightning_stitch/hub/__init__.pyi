from .card import CardDetails, CardSubject
from .loading import PretrainedFolder, open_folder, open_pretrained
from .publishing import check_existing_card, check_publishable, check_repo_id, publish
from .repository import ExistingCard, HubRepository, Publication
from .saving import save_folder

__all__ = [
    "CardDetails",
    "CardSubject",
    "ExistingCard",
    "HubRepository",
    "PretrainedFolder",
    "Publication",
    "check_existing_card",
    "check_publishable",
    "check_repo_id",
    "open_folder",
    "open_pretrained",
    "publish",
    "save_folder",
]
