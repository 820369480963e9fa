"""Optimisers for many small independent problems at once."""

from captum_robust.optim.lbfgs import Minimum, check_options, minimize

__all__ = ["Minimum", "check_options", "minimize"]
