"""Optimisers for many small independent problems at once."""

from captum_robust.optim.lbfgs import Minimum, minimize

__all__ = ["Minimum", "minimize"]
