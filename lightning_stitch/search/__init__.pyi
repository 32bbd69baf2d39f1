from .costs import CompositionCosts, costs_of_pairs
from .evaluation import Outcome, Remembered, keys_of_reads, outcomes
from .final_ranking import keys_worth_keeping, rank_all
from .identity import search_identity
from .latency import latency_per_image, network_latency, piece_latencies
from .paths import early_exits, follow, on_smaller_images, self_stitched, unmodified
from .ranking import (
    NEED_LABELS,
    Ranking,
    SelectionData,
    by_loo_soft_r2,
    find_ranking,
    gram_of_taps,
    require_labels,
)
from .ranks import ALONE, DistributedRanks, Ranks
from .records import candidate_in_words, fragments_in_words
from .results import SCORES, Ranked, SearchResult, choose, measure_candidates, rank
from .rounds import outcomes_in_rounds
from .space import SearchSpace
from .stopping import Stopped, TimeLimit, until_stopped
from .strategies import Beam, DepthFirst, Strategy

__all__ = [
    "ALONE",
    "Beam",
    "CompositionCosts",
    "DepthFirst",
    "DistributedRanks",
    "NEED_LABELS",
    "Outcome",
    "Ranked",
    "SCORES",
    "Ranking",
    "Ranks",
    "Remembered",
    "SearchResult",
    "SearchSpace",
    "SelectionData",
    "Stopped",
    "Strategy",
    "TimeLimit",
    "by_loo_soft_r2",
    "candidate_in_words",
    "choose",
    "costs_of_pairs",
    "early_exits",
    "find_ranking",
    "follow",
    "fragments_in_words",
    "gram_of_taps",
    "keys_of_reads",
    "keys_worth_keeping",
    "measure_candidates",
    "latency_per_image",
    "network_latency",
    "on_smaller_images",
    "outcomes",
    "outcomes_in_rounds",
    "piece_latencies",
    "rank",
    "rank_all",
    "require_labels",
    "search_identity",
    "self_stitched",
    "unmodified",
    "until_stopped",
]
