"""Attributions for Captum that place the object and hold under attack."""

from captum_robust.attr import RobustCAM

__all__ = ["RobustCAM", "__version__"]
__version__ = "0.1.0"
