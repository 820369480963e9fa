"""Attributions made of other attributions."""

from captum_robust.attr.wrappers.defended import Defended
from captum_robust.attr.wrappers.guided import Guided
from captum_robust.attr.wrappers.multi_scale import MultiScale
from captum_robust.attr.wrappers.top_classes import TopClasses

__all__ = ["Defended", "Guided", "MultiScale", "TopClasses"]
