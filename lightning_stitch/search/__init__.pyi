from .costs import CompositionCosts, costs_of_pairs
from .evaluation import Outcome, outcomes
from .identity import search_identity
from .latency import network_latency, piece_latencies
from .paths import early_exits, follow, self_stitched, unmodified
from .ranking import (
    NEED_LABELS,
    Ranking,
    SelectionData,
    by_loo_soft_r2,
    check_ranking_fits,
    find_ranking,
    labelled,
    left_out,
    softened_labels,
)
from .results import Ranked, SearchResult, choose, measured, rank
from .space import SearchSpace
from .stopping import TimeLimit, until_stopped
from .strategies import Beam, DepthFirst, Strategy

__all__ = [
    "Beam",
    "CompositionCosts",
    "DepthFirst",
    "NEED_LABELS",
    "Outcome",
    "Ranked",
    "Ranking",
    "SearchResult",
    "SearchSpace",
    "SelectionData",
    "Strategy",
    "TimeLimit",
    "by_loo_soft_r2",
    "check_ranking_fits",
    "choose",
    "costs_of_pairs",
    "early_exits",
    "find_ranking",
    "follow",
    "labelled",
    "left_out",
    "measured",
    "network_latency",
    "outcomes",
    "piece_latencies",
    "rank",
    "search_identity",
    "self_stitched",
    "softened_labels",
    "unmodified",
    "until_stopped",
]
