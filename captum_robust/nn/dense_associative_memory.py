"""A classifier that compares features with stored patterns."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_robust._checks import (
    check,
    check_count,
    check_finite,
    check_floating,
    check_number,
    check_numbers_below,
    check_shape,
)
from captum_robust._progress import counted

LARGEST_BETA = 1e30
"""Above, a sum of activations could leave the range of float32."""


class DenseAssociativeMemory(nn.Module):
    r"""A dense associative memory that classifies: c = tanh(β Σ_μ ξ_cμ relu(ξ_μ·v)^n).

    Krotov, Hopfield, "Dense Associative Memory for Pattern Recognition"
    (https://arxiv.org/abs/1606.01164) and "Dense Associative Memory is Robust to Adversarial
    Inputs" (https://arxiv.org/abs/1701.00939). It is a network of one hidden layer, whose units are
    the memories μ, and whose activation function is a rectified power. With a small n many memories
    answer to an input, each to a feature of it; with a large one only the few that resemble it,
    the prototypes. The energy that the papers start from has the power n + 1.

    To be safe in float32 up to large n, and for a β of one meaning, the features v and the memories
    ξ_μ have length 1, so that ξ_μ·v is a cosine, and the power is taken of β^(1/n) times it: a
    cosine of β^(-1/n) gives an activation of 1. (That the scale belongs inside the power is in
    McAlister et al., https://arxiv.org/abs/2407.08742.) Before, the features are centred, as those
    behind a ReLU all lie in one direction: their cosines with each other are close to 1.

    What tells the classes is the order of :meth:`potentials`: tanh rounds to ±1 for large ones, and
    its gradient to 0. An attack on the outputs then stands still without being repelled; attack the
    potentials before calling a memory robust.

    Args:
        in_features: F, how many features an input has.
        classes: K.
        memories: M, how many patterns are stored.
        n: the power, from 1.
        beta: β, from 0 to 1e30. :meth:`fit` sets it by the features.
        seed: of the memories before :meth:`fit`, normally distributed; their classes take turns.

    Shape:
        v: N×F, floating point. Output: N×K, in [-1, 1], at least float32.

    Raises:
        ValueError: an argument out of range.

    >>> memory = DenseAssociativeMemory(2, classes=2, memories=2, n=2)
    >>> memory.patterns.data = torch.eye(2)
    >>> memory.classes_of_patterns.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    >>> memory.potentials(torch.tensor([[3.0, 4.0]]))  # cosines 0.6 and 0.8
    tensor([[-0.2800,  0.2800]], grad_fn=<MmBackward0>)
    """

    center: Tensor
    log_beta: Tensor

    def __init__(
        self,
        in_features: int,
        classes: int,
        memories: int,
        *,
        n: int = 3,
        beta: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.in_features = check_count("in_features", in_features, 1)
        self.classes = check_count("classes", classes, 2)
        self.memories = check_count("memories", memories, 1)
        self.n = check_count("n", n, 1)
        check_count("seed", seed)
        check_number("beta", beta, 0, LARGEST_BETA, open_low=True)
        generator = torch.Generator().manual_seed(seed)
        self.patterns = nn.Parameter(torch.randn(memories, in_features, generator=generator))
        """M×F, ξ_μ, of any length: they are normalised where they are used."""
        turns = torch.arange(memories) % classes
        self.classes_of_patterns = nn.Parameter(_signs(turns, classes).T.contiguous())
        """K×M, ξ_cμ."""
        self.register_buffer("center", torch.zeros(in_features))
        # Its logarithm, which half precision can hold too.
        self.register_buffer("log_beta", torch.tensor(math.log(beta)))

    @property
    def beta(self) -> float:
        """β."""
        return math.exp(float(self.log_beta))

    def forward(self, v: Tensor) -> Tensor:
        """The outputs N×K of features N×F."""
        return self.potentials(v).tanh()

    def potentials(self, v: Tensor) -> Tensor:
        """What tanh is taken of: N×K, to find the class from, and to attack.

        Raises:
            ValueError: features of another number, an empty batch, NaN or infinity.
            TypeError: features that are not floating point.
        """
        self._check_features(v)
        return self._potentials(v)

    def loss(self, outputs: Tensor, target: Tensor, m: int = 1) -> Tensor:
        """``Σ_c |c - t_c|^2m`` of each sample, t being 1 for its class and -1 for the others.

        A large m makes much of outputs that are far from wrong to right, where the gradient of
        tanh is small; it is what the papers train large n with.

        Args:
            outputs: N×K, of :meth:`forward`.
            target: N classes.
            m: from 1.

        Returns:
            N losses.

        Raises:
            ValueError: shapes that don't fit, classes out of range, or m.
            TypeError: classes that are no whole numbers.
        """
        check_count("m", m, 1)
        check_shape("outputs", outputs, f"N×{self.classes}")
        self._check_target(target, len(outputs))
        return self._loss(outputs, target, m)

    def fit(
        self,
        features: Tensor,
        target: Tensor,
        *,
        epochs: int = 20,
        batch_size: int = 64,
        learning_rate: float = 0.03,
        m: int = 1,
        seed: int = 0,
    ) -> DenseAssociativeMemory:
        """Store patterns of these features, then train them with Adam; returns the memory itself.

        The features are centred by their mean. M of them, drawn so that each class has its share,
        are the first memories, of a mean square of 1, like the papers' patterns of ±1. β is such
        that the activations which the median feature causes, among those that are not stored, add
        up to 1, so that tanh is far from flat to begin with.

        Args:
            features: N×F, frozen; N at least M.
            target: N classes.
            epochs: passes over the features; 0 leaves the stored patterns as they are.
            batch_size: features in a step.
            learning_rate: of Adam, falling to 0 along a cosine.
            m: of :meth:`loss`.
            seed: of which features are stored, and of the order of the batches.

        Raises:
            ValueError: fewer features than memories, or an argument out of range; as for
                :meth:`potentials` and :meth:`loss`.
        """
        check_count("epochs", epochs)
        check_count("m", m, 1)
        check_count("batch_size", batch_size, 1)
        check_count("seed", seed)
        check_number("learning_rate", learning_rate, 0, open_low=True)
        self._check_features(features)
        self._check_target(target, len(features))
        least, n = self.memories, len(features)
        check(n >= least, f"features: expected at least as many as memories, {least}, got {n}")
        with torch.inference_mode(False), torch.enable_grad():
            features = features.detach().to(self.center).clone()
            target = target.to(self.center.device, torch.long)
            generator = torch.Generator().manual_seed(seed)
            self._store(features, target, generator)
            optimizer = torch.optim.Adam([self.patterns, self.classes_of_patterns], learning_rate)
            for epoch in counted(range(epochs), "epoch", None, "memory"):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
                order = torch.randperm(n, generator=generator).to(features.device)
                for rows in torch.split(order, batch_size):
                    optimizer.zero_grad()
                    outputs = self._potentials(features[rows]).tanh()
                    loss = self._loss(outputs, target[rows], m).mean()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        optimizer.zero_grad()
        return self

    def _potentials(self, v: Tensor) -> Tensor:
        # Autocast would take the powers of rounded cosines.
        with torch.autocast(v.device.type, enabled=False):
            activations = self._activations(v)
            return activations @ self.classes_of_patterns.to(activations.dtype).T

    def _loss(self, outputs: Tensor, target: Tensor, m: int) -> Tensor:
        return (outputs - _signs(target, self.classes).to(outputs)).abs().pow(2 * m).sum(dim=1)

    @torch.no_grad()
    def _store(self, features: Tensor, target: Tensor, generator: torch.Generator) -> None:
        order = torch.randperm(len(features), generator=generator).to(features.device)
        # The first of each class, then the second of each, …
        turn = torch.zeros_like(target)
        for c in range(self.classes):
            is_class = target[order] == c
            turn[is_class] = torch.arange(int(is_class.sum()), device=target.device)
        order = order[turn.argsort(stable=True)]
        stored, others = order[: self.memories], order[self.memories :]
        self.center.copy_(features.mean(dim=0))
        length = math.sqrt(self.in_features)
        self.patterns.copy_(length * F.normalize(features[stored] - self.center, dim=1))
        self.classes_of_patterns.copy_(_signs(target[stored], self.classes).T)
        unstored = others if len(others) > 0 else stored
        self.log_beta.zero_()
        sums = [self._activations(part).sum(dim=1) for part in torch.split(features[unstored], 256)]
        # Where no memory answers, any β is as good.
        self.log_beta.copy_(-torch.cat(sums).median().clamp(min=1 / LARGEST_BETA).log())

    def _activations(self, v: Tensor) -> Tensor:
        """β relu(ξ_μ·v)^n, N×M."""
        precise = torch.promote_types(v.dtype, torch.float32)
        centred = v.to(precise) - self.center.to(precise)
        cosines = F.normalize(centred, dim=1) @ F.normalize(self.patterns.to(precise), dim=1).T
        # The root of β inside: neither β nor the power of a cosine can leave the range alone.
        scale = torch.exp(self.log_beta.to(cosines.dtype) / self.n)
        return (scale * cosines).relu().pow(self.n)

    def _check_features(self, v: Tensor) -> None:
        check_floating("features", v)
        check_shape("features", v, f"N×{self.in_features}")
        check(len(v) > 0, f"features: the batch is empty (shape {tuple(v.shape)})")
        check_finite(v, "features")

    def _check_target(self, target: Tensor, n: int) -> None:
        is_tensor = isinstance(target, Tensor)
        kind = target.dtype if is_tensor else type(target).__name__
        are_classes = is_tensor and not target.is_floating_point()
        check(are_classes, f"target: expected a tensor of classes, got {kind}", TypeError)
        check(target.shape == (n,), f"target: expected {n} classes, got {tuple(target.shape)}")
        check_numbers_below("target", target.long(), self.classes)

    def extra_repr(self) -> str:
        """The sizes, as ``print`` shows them."""
        return (
            f"in_features={self.in_features}, classes={self.classes}, memories={self.memories}, "
            f"n={self.n}, beta={self.beta:.4g}"
        )


def _signs(target: Tensor, classes: int) -> Tensor:
    """N×K, 1 for the class and -1 for the others."""
    return F.one_hot(target.long(), classes).float() * 2 - 1
