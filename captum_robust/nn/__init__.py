"""Networks and layers that methods and defences train."""

from captum_robust.nn.dense_associative_memory import DenseAssociativeMemory
from captum_robust.nn.evidence_removal import EvidenceRemoval, blend
from captum_robust.nn.mask_objective import CodeObjective, PaperObjective
from captum_robust.nn.masking_network import (
    MaskingNetwork,
    load_masking_network,
    save_masking_network,
    upsampled,
)
from captum_robust.nn.small_resnet import SmallResNet

__all__ = [
    "CodeObjective",
    "DenseAssociativeMemory",
    "EvidenceRemoval",
    "MaskingNetwork",
    "PaperObjective",
    "SmallResNet",
    "blend",
    "load_masking_network",
    "save_masking_network",
    "upsampled",
]
