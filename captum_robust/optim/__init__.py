"""Optimisers for many small independent problems at once."""

from captum_robust.optim.lbfgs import Minimum, as_number, check_options, minimize

__all__ = ["Minimum", "as_number", "check_options", "minimize"]
