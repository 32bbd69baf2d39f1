from .comparison import Comparison, compare
from .evaluation import Evaluation, score
from .predictions import as_csv, check_output, prediction_rows, write_predictions
from .tables import print_comparison, write_candidates, write_comparison
from .verdicts import MARGIN, Verdict, check_margin, in_words, judge, judge_splits

__all__ = [
    "Comparison",
    "Evaluation",
    "MARGIN",
    "Verdict",
    "as_csv",
    "check_margin",
    "check_output",
    "compare",
    "in_words",
    "judge",
    "judge_splits",
    "prediction_rows",
    "print_comparison",
    "score",
    "write_candidates",
    "write_comparison",
    "write_predictions",
]
