"""Attributions of this package, and Captum's, in the forms that other libraries take."""

from captum_robust.interop.quantus import quantus_explain_func

__all__ = ["quantus_explain_func"]
