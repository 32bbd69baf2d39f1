from .contenders import METHODS, Method
from .finetuning import FineTuning, quiet_trainers
from .methods import compare_methods
from .tables import print_methods

__all__ = ["FineTuning", "METHODS", "Method", "compare_methods", "print_methods", "quiet_trainers"]
