"""Defences: input transforms, adversarial training, detection of attacks."""

from captum_robust._transform import Transform

__all__ = ["Transform"]
