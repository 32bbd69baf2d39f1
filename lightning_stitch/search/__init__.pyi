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
    find_ranking,
    predict_left_out,
    require_labels,
    softened_labels,
)
from .results import Ranked, SearchResult, choose, measure_candidates, rank
from .space import SearchSpace
from .stopping import Stopped, TimeLimit, until_stopped
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
    "Stopped",
    "Strategy",
    "TimeLimit",
    "by_loo_soft_r2",
    "choose",
    "costs_of_pairs",
    "early_exits",
    "find_ranking",
    "follow",
    "measure_candidates",
    "network_latency",
    "outcomes",
    "piece_latencies",
    "predict_left_out",
    "rank",
    "require_labels",
    "search_identity",
    "self_stitched",
    "softened_labels",
    "unmodified",
    "until_stopped",
]
