"""Optimisers for many small independent problems at once."""

from captum_robust._checks import as_number
from captum_robust.optim.lbfgs import Minimum, check_options, minimize

__all__ = ["Minimum", "as_number", "check_options", "minimize"]
