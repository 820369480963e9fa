"""A support vector machine on quantised activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, check_shape
from captum_robust._files import TensorRecord


@dataclass(frozen=True)
class SupportVectorMachine(TensorRecord):
    """Activations N×D -> codes N×D -> decision function N."""

    reference: Tensor
    """(bins - 1)×D, the thresholds between the levels; 1×D, the mean, where it is not quantised."""
    scale: Tensor
    """D, standard deviations."""
    support_vectors: Tensor
    """S×D codes."""
    dual_coefficients: Tensor
    """S."""
    gamma: float
    intercept: float
    quantised: bool

    @classmethod
    def fitted(
        cls, clean: Tensor, attacked: Tensor, bins: int | None, penalty: float, gamma: float | None
    ) -> SupportVectorMachine:
        """Fit a machine that tells activations N×D from M×D; the two kinds weigh alike."""
        deviation, mean = torch.std_mean(clean, dim=0, correction=0)
        # An activation that never changes carries nothing, and must not be divided by zero.
        scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        reference = mean[None] if bins is None else _levels(clean, bins)
        none = clean[:0]
        machine = cls(reference, scale, none, none[:, 0], 1.0, 0.0, quantised=bins is not None)
        codes = torch.cat([machine.codes(clean), machine.codes(attacked)])
        variance = float(codes.double().var(correction=0))
        check(variance, "layers: their activations are the same for all images; choose others")
        gamma = 1 / (codes.shape[1] * variance) if gamma is None else gamma
        is_attacked = torch.arange(len(codes)) >= len(clean)
        svm = support_vector_classifier()(C=penalty, gamma=gamma, class_weight="balanced")
        svm.fit(codes.cpu().numpy(), is_attacked.numpy())
        device = clean.device
        return replace(
            machine,
            support_vectors=codes[torch.as_tensor(svm.support_, dtype=torch.long, device=device)],
            dual_coefficients=torch.from_numpy(svm.dual_coef_[0]).float().to(device),
            gamma=float(gamma),
            intercept=float(svm.intercept_[0]),
        )

    def score(self, activations: Tensor) -> Tensor:
        return self.score_of_codes(self.codes(activations))

    def codes(self, activations: Tensor, temperature: float | None = None) -> Tensor:
        """Quantise activations; with a temperature the gradient is that of a sum of sigmoids."""
        got, own = activations.shape[1], len(self.scale)
        check(
            got == own,
            f"inputs: they give {got} activations, the detector was fitted on {own}; give images "
            "of the size that it was fitted on",
        )
        if not self.quantised:
            return (activations - self.reference) / self.scale
        # Level by level: all at once would take bins times the memory.
        codes = torch.zeros_like(activations)
        for level in self.reference:
            step = (activations > level).to(activations.dtype)
            if temperature is not None:
                soft = torch.sigmoid((activations - level) / (temperature * self.scale))
                step = soft + (step - soft).detach()
            codes = codes + step
        return codes

    def score_of_codes(self, codes: Tensor) -> Tensor:
        """Σ_s a_s exp(-γ‖c - c_s‖²) + b."""
        # Autocast would round the products of whole numbers, which float32 holds exactly.
        with torch.autocast(codes.device.type, enabled=False):
            squares = codes.square().sum(1)[:, None] + self.support_vectors.square().sum(1)
            distances = (squares - 2 * codes @ self.support_vectors.T).clamp(min=0)
            return torch.exp(-self.gamma * distances) @ self.dual_coefficients + self.intercept

    def checked(self, bins: int | None) -> SupportVectorMachine:
        """Return this machine.

        Raises:
            ValueError: the tensors of a file do not make one for so many levels.
        """
        for name in ("scale", "dual_coefficients"):
            check_shape(name, getattr(self, name), "N")
        d, s = len(self.scale), len(self.dual_coefficients)
        levels = 1 if bins is None else bins - 1
        self.check_shapes(f"{levels}×{d}", f"{d}", f"{s}×{d}", f"{s}")
        for name, t in self.tensors().items():
            check(t.dtype == torch.float32, f"{name}: expected torch.float32, got {t.dtype}")
            check(t.isfinite().all(), f"{name}: expected finite numbers")
        check((self.scale > 0).all(), "scale: expected positive numbers")
        return self


def support_vector_classifier() -> Any:
    """Scikit-learn's class; ``ImportError`` that names the pip command where it is not there."""
    try:
        from sklearn.svm import SVC
    except ImportError:
        raise ImportError(
            "fitting a detector needs scikit-learn: pip install 'captum-robust[demo]'"
        ) from None
    return SVC


def _levels(activations: Tensor, bins: int) -> Tensor:
    """The thresholds (bins - 1)×D between which lie equal shares of N×D activations."""
    n = len(activations)
    ordered = activations.sort(dim=0).values
    # Midway between two, so that no image lies on a threshold.
    above = [min(max(round(n * k / bins), 1), n - 1) for k in range(1, bins)]
    return torch.stack([(ordered[i - 1] + ordered[i]) / 2 for i in above])
