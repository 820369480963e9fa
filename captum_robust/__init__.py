"""Attributions for Captum that place the object and hold under attack."""

__version__ = "0.1.0"
