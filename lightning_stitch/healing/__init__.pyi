from .refinement import FITS, Refiner, check_refinements, refine
from .trials import run_on

__all__ = ["FITS", "Refiner", "check_refinements", "refine", "run_on"]
