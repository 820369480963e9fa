"""Localization metrics as torchmetrics classes.

Each is a thin state on top of :mod:`captum_robust.metrics.functional`: ``update`` adds up what a
batch gives, ``compute`` reads the sum, and torchmetrics reduces the sums over the processes of a
distributed run.
"""

from captum_robust.metrics.localization_error import LocalizationError
from captum_robust.metrics.maxboxacc import MaxBoxAcc, MaxBoxAccV2
from captum_robust.metrics.pointing_game import PointingGame
from captum_robust.metrics.pxap import PxAP

__all__ = ["LocalizationError", "MaxBoxAcc", "MaxBoxAccV2", "PointingGame", "PxAP"]
