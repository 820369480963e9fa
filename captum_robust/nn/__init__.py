"""Networks and layers that methods and defences train."""

from captum_robust.nn.dense_associative_memory import DenseAssociativeMemory
from captum_robust.nn.small_resnet import SmallResNet

__all__ = ["DenseAssociativeMemory", "SmallResNet"]
