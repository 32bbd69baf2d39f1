from .contenders import METHODS, Method
from .finetuning import FineTuning
from .methods import compare_methods
from .table import Row, print_methods

__all__ = ["FineTuning", "METHODS", "Method", "Row", "compare_methods", "print_methods"]
