from .costs import CompositionCosts, costs_of_pairs
from .evaluation import Outcome, Remembered, keys_of_reads, outcomes
from .identity import search_identity
from .latency import network_latency, piece_latencies
from .paths import early_exits, follow, on_smaller_images, self_stitched, unmodified
from .ranking import NEED_LABELS, Ranking, SelectionData, by_loo_soft_r2, find_ranking, require_labels
from .results import Ranked, SearchResult, choose, draw_rows, in_order, measure_candidates, rank
from .sides import side_by_side
from .space import SearchSpace
from .staging import staged
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
    "Remembered",
    "SearchResult",
    "SearchSpace",
    "SelectionData",
    "Stopped",
    "Strategy",
    "TimeLimit",
    "by_loo_soft_r2",
    "choose",
    "costs_of_pairs",
    "draw_rows",
    "early_exits",
    "find_ranking",
    "follow",
    "in_order",
    "keys_of_reads",
    "measure_candidates",
    "network_latency",
    "on_smaller_images",
    "outcomes",
    "piece_latencies",
    "rank",
    "require_labels",
    "search_identity",
    "self_stitched",
    "side_by_side",
    "staged",
    "unmodified",
    "until_stopped",
]
