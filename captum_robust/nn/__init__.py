"""Networks and layers that methods and defences train."""

from captum_robust.nn.corruption_network import CorruptionNetwork
from captum_robust.nn.denoiser import Denoiser, load_denoiser, save_denoiser
from captum_robust.nn.dense_associative_memory import DenseAssociativeMemory
from captum_robust.nn.evidence_removal import EvidenceRemoval, blend
from captum_robust.nn.localization_network import (
    LocalizationNetwork,
    load_localization_network,
    read_localization_facts,
    save_localization_network,
)
from captum_robust.nn.mask_decoder import upsampled
from captum_robust.nn.mask_objective import CodeObjective, PaperObjective
from captum_robust.nn.masking_network import (
    MaskingNetwork,
    load_masking_network,
    save_masking_network,
)
from captum_robust.nn.removal_loss import removal_loss
from captum_robust.nn.small_networks import SimpleConvNet, SmallResNet
from captum_robust.nn.straight_through import straight_through
from captum_robust.nn.superpixel_pooling import spread, superpixel_means

__all__ = [
    "CodeObjective",
    "CorruptionNetwork",
    "Denoiser",
    "DenseAssociativeMemory",
    "EvidenceRemoval",
    "LocalizationNetwork",
    "MaskingNetwork",
    "PaperObjective",
    "SimpleConvNet",
    "SmallResNet",
    "blend",
    "load_denoiser",
    "load_localization_network",
    "load_masking_network",
    "read_localization_facts",
    "removal_loss",
    "save_denoiser",
    "save_localization_network",
    "save_masking_network",
    "spread",
    "straight_through",
    "superpixel_means",
    "upsampled",
]
