"""A network that gives the mask of a class in one pass, on top of a frozen classifier."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captum_robust._checks import check_classes, printable
from captum_robust._files import read_facts, write_network

_FACTS = "captum_robust.masking_network"
_EPSILON = 1e-4
"""Of |a| + |b|: where both vanish, so does the mask."""
_MOST = 4.0
"""The log odds that the gate alone can give the mask: a mask of .98, which the rest can undo."""


@dataclass(frozen=True)
class DecoderShape:
    """All that the shapes of a :class:`MaskDecoder` follow from."""

    channels: tuple[int, ...]
    """Of the features, from the finest scale that is used to the coarsest."""
    num_classes: int
    head: bool
    """Whether the classes' vectors are the weights of the classifier's own last layer."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of the up-sampling blocks, from the finest scale to the coarsest but one."""
    filtered: int = 128
    """Channels of the filtered features."""


class UpBlock(nn.Module):
    """Enlarged to the features of the next scale and joined with them; one residual bottleneck.

    The authors' code enlarges by pixel shuffling, which leaves a grid in the masks; here it is
    bilinear (Odena et al., https://distill.pub/2016/deconv-checkerboard).
    """

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        joined = max(4, outputs // 2)
        self.reduce = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )
        self.skip = nn.Sequential(
            nn.Conv2d(skip, joined, 1, bias=False), nn.BatchNorm2d(joined), nn.ReLU()
        )
        self.join = nn.Sequential(
            nn.Conv2d(outputs + joined, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )
        self.bottleneck = nn.Sequential(
            nn.Conv2d(outputs, joined, 1, bias=False),
            nn.BatchNorm2d(joined),
            nn.ReLU(),
            nn.Conv2d(joined, joined, 3, padding=1, bias=False),
            nn.BatchNorm2d(joined),
            nn.ReLU(),
            nn.Conv2d(joined, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """A map of the size of the finer scale's features."""
        size = (features.shape[2], features.shape[3])
        up = F.interpolate(self.reduce(x), size, mode="bilinear", align_corners=False)
        x = self.join(torch.cat([up, self.skip(features)], dim=1))
        return F.relu(x + self.bottleneck(x))


class MaskDecoder(nn.Module):
    """Features of several scales and a class -> the mask of that class.

    The coarsest features pass the feature filter of Dabkowski and Gal, X·σ(s·XᵀC_c + t), where C_c
    is the vector of class c, then up-sampling blocks, each joined with the features of its scale.
    The mask is |a| / (|a| + |b| + ε) of two channels, exponentials here. They start from the
    filter's log odds, so that an untrained network gives its gate: with the vectors of the
    classifier's last layer, a class activation map.

    Args:
        shape: of the network.
        head: K×C and K, weights and bias of the classifier's last layer, which stay as they are
            and in no state dict; None: the vectors are learned.
    """

    head_weight: Tensor | None
    head_bias: Tensor | None

    def __init__(self, shape: DecoderShape, head: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        if shape.head != (head is not None):
            raise ValueError("head: expected exactly where the shape says so")
        if len(shape.widths) != len(shape.channels) - 1:
            raise ValueError(
                f"widths: expected {len(shape.channels) - 1} for {len(shape.channels)} scales, got "
                f"{shape.widths}"
            )
        self.shape = shape
        deepest = shape.channels[-1]
        weight, bias = (None, None) if head is None else head
        self.register_buffer("head_weight", weight, persistent=False)
        self.register_buffer("head_bias", bias, persistent=False)
        self.embedding: nn.Embedding | None = None
        if head is None:
            self.embedding = nn.Embedding(shape.num_classes, deepest)
            nn.init.normal_(self.embedding.weight, std=deepest**-0.5)
        self.scale = nn.Parameter(torch.tensor(0.5 if shape.head else 1.0))
        self.shift = nn.Parameter(torch.tensor(-2.0 if shape.head else 0.0))
        self.filter = nn.Sequential(
            nn.Conv2d(deepest, shape.filtered, 1, bias=False),
            nn.BatchNorm2d(shape.filtered),
            nn.ReLU(),
        )
        blocks = []
        inputs = shape.filtered + 1
        for skip, outputs in zip(shape.channels[-2::-1], shape.widths[::-1], strict=True):
            blocks.append(UpBlock(inputs, skip, outputs))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.two_channels = nn.Conv2d(inputs, 2, 1)
        nn.init.zeros_(self.two_channels.weight)
        nn.init.zeros_(self.two_channels.bias)  # type: ignore[arg-type]

    def evidence(self, features: Tensor, classes: Tensor) -> Tensor:
        """Log odds N×h×w that the class is there, of the coarsest features N×C×h×w.

        Their mean over the positions is the e of the paper's warm-up.
        """
        if self.embedding is not None:
            vectors = self.embedding(classes)
        else:
            assert self.head_weight is not None
            vectors = self.head_weight[classes]
        similarity = torch.einsum("nchw,nc->nhw", features, vectors.to(features.dtype)).float()
        if self.head_bias is not None:
            similarity = similarity + self.head_bias[classes][:, None, None]
        found: Tensor = self.scale * similarity + self.shift
        return found

    def forward(
        self, features: Sequence[Tensor], classes: Tensor, confidence: float = 0.0
    ) -> Tensor:
        """Masks N×1×h×w in [0, 1], of the size of the finest features.

        Args:
            features: N×C×h×w each, from the finest scale to the coarsest.
            classes: N.
            confidence: is taken from the log odds: with 6, only what is surely of the class is
                shown; with 0, similar things too.
        """
        if not torch.is_autocast_enabled(features[-1].device.type):
            # Those of an encoder in half precision.
            features = [f.to(self.two_channels.weight.dtype) for f in features]
        deepest = features[-1]
        odds = (self.evidence(deepest, classes) - confidence)[:, None]
        gate = torch.sigmoid(odds)
        x = self.filter(deepest * gate.to(deepest.dtype))
        bounded = torch.tanh(odds / _MOST)
        x = torch.cat([x, bounded.to(x.dtype)], dim=1)
        for block, skip in zip(self.blocks, features[-2::-1], strict=True):
            x = block(x, skip)
        start = F.interpolate(bounded, x.shape[2:], mode="bilinear", align_corners=False)
        start = start * (_MOST / 2)
        pair = self.two_channels(x).float() + torch.cat([start, -start], dim=1)
        # Above 0: where a channel crosses it, its magnitude leaves a dark line in the mask.
        a, b = pair.clamp(-20, 20).exp().split(1, dim=1)
        masks: Tensor = a / (a + b + _EPSILON)
        return masks


class MaskingNetwork(nn.Module):
    """Images and classes -> masks, in one pass of a frozen classifier and a small decoder.

    Where the classifier that is explained is also the encoder, one pass serves both:
    :meth:`masks_and_scores`.

    Args:
        encoder: images N×C×H×W with pixels in [0, 1] -> scores N×K; any network whose modules
            return maps at two or more scales. Its weights are never changed, and it always runs in
            evaluation mode.
        decoder: None: a new one, where the encoder is, in float32.
        layers: whose outputs are the features, from the finest scale to the coarsest; None: found
            by :func:`find_scales`, without the finest of five scales, which says little.
        num_classes: of the masks; None: K of the encoder.
        learned_classes: learn the classes' vectors, instead of taking the weights of the
            encoder's last layer.
        input_size: (H, W) of a probe; None: the encoder's ``input_size``, else 224.

    Raises:
        TypeError: an encoder that is no module.
        ValueError: fewer than two scales, a decoder of another encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: MaskDecoder | None = None,
        *,
        layers: Sequence[nn.Module] | None = None,
        num_classes: int | None = None,
        learned_classes: bool = False,
        input_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
        self.encoder = encoder
        size = getattr(encoder, "input_size", (224, 224)) if input_size is None else input_size
        self.input_size: tuple[int, int] = (int(size[0]), int(size[1]))
        found = tuple(find_scales(encoder, self.input_size) if layers is None else layers)
        if layers is None and len(found) > 4:
            found = found[-4:]
        if len(found) < (2 if layers is None else 1):
            raise ValueError(
                f"encoder: expected maps at two or more scales, found {len(found)} in "
                f"{type(encoder).__name__}; give the layers yourself"
            )
        self._layers = found  # a tuple: they are not registered twice
        shape, head = self._probe(num_classes, learned_classes)
        like = next(encoder.parameters(), torch.empty(0))
        self.decoder = (
            MaskDecoder(shape, head).to(like.device, torch.float32) if decoder is None else decoder
        )
        if decoder is not None and decoder.shape.channels != shape.channels:
            raise ValueError(
                f"decoder: is for features of {decoder.shape.channels} channels, the encoder's "
                f"have {shape.channels}"
            )

    def _probe(
        self, num_classes: int | None, learned_classes: bool
    ) -> tuple[DecoderShape, tuple[Tensor, Tensor] | None]:
        with torch.no_grad(), probed(self.encoder) as image_of:
            # Noise: on a black image features could be zero, and tell nothing of the head.
            probe = image_of(self.input_size)
            noise = torch.rand(probe.shape, generator=torch.Generator().manual_seed(0))
            features, scores = self._encode(noise.to(probe))
        if not isinstance(scores, Tensor) or scores.ndim < 2:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"encoder: expected scores N×K, got {got}")
        if len(features) < len(self._layers) or any(
            not isinstance(f, Tensor) or f.ndim != 4 for f in features
        ):
            raise ValueError(
                "layers: expected layers of the encoder, each of which gives maps N×C×h×w"
            )
        channels = tuple(int(f.shape[1]) for f in features)
        count = int(scores.shape[1]) if num_classes is None else num_classes
        head = None
        if not learned_classes and count == scores.shape[1]:
            head = _head_of(self.encoder, features[-1], scores)
        widths = tuple(16 * 2**i for i in range(len(channels) - 1))
        return DecoderShape(channels, count, head is not None, widths), head

    def train(self, mode: bool = True) -> MaskingNetwork:
        """As :meth:`torch.nn.Module.train`, but the encoder goes to evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def _encode(self, x: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        """The features of each scale, and the scores, in one pass."""
        # Also where the encoder was put in training mode by itself.
        training = [m for m in self.encoder.modules() if m.training]
        try:
            for m in training:
                m.training = False
            with outputs_of(self._layers) as found:
                scores = self.encoder(x, *arguments)
        finally:
            for m in training:
                m.training = True
        return [found[i] for i in range(len(self._layers)) if i in found], scores

    def encode(self, x: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        """The features of each scale, finest first, and the scores N×K, in one pass.

        They have a graph only where ``x`` asks for a gradient. ``arguments`` are passed to the
        encoder behind the images.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            return self._encode(x, *arguments)

    def masks_and_scores(
        self, x: Tensor, classes: Tensor | None = None, *, confidence: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Masks N×1×H×W in [0, 1] and the encoder's scores N×K of images N×C×H×W.

        Args:
            x: pixels in [0, 1].
            classes: N; None: those with the highest scores.
            confidence: see :meth:`MaskDecoder.forward`.

        Raises:
            TypeError: classes that are no integers.
            ValueError: classes that the masks do not have, or not one for each image; None where
                the encoder's classes are others.
        """
        count = self.decoder.shape.num_classes
        if classes is not None:
            check_classes(classes, len(x), count)
        features, scores = self.encode(x)
        if classes is None:
            if scores.shape[1] != count:
                raise ValueError(
                    f"classes: the masks are of {count} classes, but the encoder has "
                    f"{scores.shape[1]} others; say which"
                )
            classes = scores.argmax(dim=1)
        masks = self.decoder(features, classes, confidence)
        return upsampled(masks, (x.shape[2], x.shape[3])), scores

    def forward(self, x: Tensor, classes: Tensor, confidence: float = 0.0) -> Tensor:
        """Masks N×1×H×W in [0, 1] of images N×C×H×W and their classes N.

        Raises what :meth:`masks_and_scores` raises.
        """
        return self.masks_and_scores(x, classes, confidence=confidence)[0]


def upsampled(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks N×1×h×w at the size of the images."""
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)


def save_masking_network(
    network: MaskingNetwork, path: str | Path, *, half: bool = False, card: str = ""
) -> None:
    """Write the decoder's weights, and what it needs, as a safetensors file.

    Args:
        half: in half precision, but for what is too large for it.
        card: what the network was trained on and what it scores, for who loads it.

    Raises:
        ValueError: the path does not end in ``.safetensors``.
        OSError: the file cannot be written; one that was there before stays.
    """
    facts = {
        "encoder": name_of(network.encoder),
        "encoder_weights": _some_weights(network.encoder),
        **asdict(network.decoder.shape),
    }
    write_network(path, network.decoder.state_dict(), _FACTS, facts, half=half, card=card)


def load_masking_network(
    path: str | Path, encoder: nn.Module, *, layers: Sequence[nn.Module] | None = None
) -> MaskingNetwork:
    """The network of a file that :func:`save_masking_network` wrote, in evaluation mode.

    Args:
        layers: those that the network was made with, where they were given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file, or one without a masking network, or the network is
            for another encoder, for one of other weights, or for other classes.
    """
    shown = printable(str(path))
    tensors, facts = read_facts(path, _FACTS, "masking network")
    try:
        name, weights = str(facts.pop("encoder")), facts.pop("encoder_weights", None)
        shape = DecoderShape(
            **{**facts, "channels": tuple(facts["channels"]), "widths": tuple(facts["widths"])}
        )
        wanted = _shapes_of(shape)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
        raise ValueError(f"{shown} holds no masking network") from None
    if name != name_of(encoder):
        raise ValueError(f"{shown} is for the encoder {printable(name)}, not {name_of(encoder)}")
    # Before anything is made of sizes that a broken file could tell.
    different = sorted(
        {*tensors, *wanted} - {n for n in tensors if tensors[n].shape == wanted.get(n)}
    )
    if different:
        raise ValueError(
            f"{shown} does not fit the encoder {name}: {printable(different[0])} is missing, of "
            "another shape, or unknown"
        )
    network = MaskingNetwork(
        encoder, layers=layers, num_classes=shape.num_classes, learned_classes=not shape.head
    )
    own = network.decoder.shape
    if shape.head and not own.head:
        raise ValueError(
            f"{shown} is for an encoder {name} with {shape.num_classes} classes, whose vectors are "
            "the weights of its last layer; this one has no such layer"
        )
    if own.channels != shape.channels or own.head != shape.head:
        raise ValueError(
            f"{shown} is for an encoder {name} with {shape.num_classes} classes and features of "
            f"{shape.channels} channels; this one has {own.num_classes} and {own.channels}"
        )
    if own != shape:
        head = network.decoder.head_weight, network.decoder.head_bias
        network.decoder = MaskDecoder(shape, head if shape.head else None)  # type: ignore[arg-type]
    if weights is not None and not _are_close(weights, _some_weights(encoder)):
        raise ValueError(
            f"{shown} is for an encoder {name} of other weights; load those, or train another"
        )
    network.decoder.load_state_dict(tensors)
    like = next(encoder.parameters(), torch.empty(0))
    return network.to(like.device).eval()


def _shapes_of(shape: DecoderShape) -> dict[str, torch.Size]:
    """Of the tensors of a decoder, which is not made for that."""
    with torch.device("meta"):
        head = (torch.empty(0), torch.empty(0)) if shape.head else None
        return {name: t.shape for name, t in MaskDecoder(shape, head).state_dict().items()}


def _some_weights(encoder: nn.Module) -> list[float]:
    """A number of the middle of each of the encoder's larger weights, at most 64 of them."""
    weights = [p.detach().flatten() for p in encoder.parameters() if p.ndim > 1]
    chosen = weights[:: max(1, -(-len(weights) // 64))]
    return [float(w[w.numel() // 2]) for w in chosen]


def _are_close(there: Any, here: list[float]) -> bool:
    """Up to the rounding to bfloat16, and a little training."""
    if not isinstance(there, list) or len(there) != len(here):
        return False
    scale = max((abs(value) for value in here), default=0.0)
    return all(
        isinstance(a, (int, float)) and abs(a - b) <= 0.02 * scale
        for a, b in zip(there, here, strict=True)
    )


def name_of(encoder: nn.Module) -> str:
    """Its own name, or that of its class."""
    name = getattr(encoder, "name", None)
    return name if isinstance(name, str) else type(encoder).__name__


def find_scales(
    encoder: nn.Module, input_size: tuple[int, int] = (224, 224)
) -> tuple[nn.Module, ...]:
    """The last layer of each scale, from the finest to the coarsest, found by a probe.

    Scales are powers of 2 of the image's size, up to rounding. A layer counts if it runs once,
    gives a map N×C×h×w, smaller than the image and larger than one position, that depends on it
    and that nothing overwrites later, and is not inside of a block that ends at a coarser scale.
    One black image, of as many channels as the first convolution takes, is run in evaluation mode.

    Raises:
        ValueError: no layer gives such a map.
    """
    runs: Counter[nn.Module] = Counter()
    outputs: dict[nn.Module, tuple[Tensor, int]] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        runs[module] += 1
        if isinstance(output, Tensor) and output.ndim == 4 and output.requires_grad:
            outputs.pop(module, None)
            outputs[module] = output, output._version

    handles = [m.register_forward_hook(record) for m in encoder.modules() if m is not encoder]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            probed(encoder) as image_of,
        ):
            encoder(image_of(input_size).requires_grad_().clone())
    finally:
        for handle in handles:
            handle.remove()
    usable = {
        module: stage
        for module, (output, version) in outputs.items()
        if runs[module] == 1
        and output._version == version
        and (stage := _stage(output, input_size)) is not None
    }
    inside = _inside_of_coarser(encoder, usable)
    last = {stage: module for module, stage in usable.items() if module not in inside}
    if not last:
        raise ValueError(
            f"encoder: no layer of {type(encoder).__name__} gives an N×C×h×w map smaller than the "
            "image; give the layers yourself"
        )
    return tuple(last[stage] for stage in sorted(last))


def _stage(output: Tensor, input_size: tuple[int, int]) -> int | None:
    """How often the image was halved; None: this is no map of it, or a single position."""
    height, width = output.shape[2:]
    down, across = (math.log2(i / o) for i, o in zip(input_size, (height, width), strict=True))
    if height * width == 1 or abs(down - across) > 0.5 or round(down) < 1:
        return None
    return round(down)


def _inside_of_coarser(encoder: nn.Module, usable: dict[nn.Module, int]) -> set[nn.Module]:
    """What is at work within a block whose own output is coarser; a block is not half of all."""
    half = sum(1 for _ in encoder.modules()) / 2
    inside: set[nn.Module] = set()
    for block, stage in usable.items():
        parts = [m for m in block.modules() if m is not block]
        is_plain = isinstance(block, nn.Sequential) and (
            type(block).forward is nn.Sequential.forward
        )
        if is_plain or len(parts) > half:
            continue
        inside.update(m for m in parts if usable.get(m, stage) < stage)
    return inside


def _head_of(encoder: nn.Module, features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weights and bias of the last linear layer, where it takes the pooled coarsest features.

    Not so behind a normalisation (ConvNeXt) or an activation (DenseNet) of these, which is why the
    scores are compared, not the shapes alone.
    """
    linear = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    if not linear or linear[-1].weight.shape != (scores.shape[1], features.shape[1]):
        return None
    if scores.ndim > 2:
        return None
    weight = linear[-1].weight.detach()
    has_bias = linear[-1].bias is not None
    bias = linear[-1].bias.detach() if has_bias else torch.zeros_like(weight[:, 0])
    pooled = features.float().mean(dim=(2, 3)) @ weight.float().T + bias.float()
    # Half precision rounds in each layer.
    share = 1e-2 if scores.dtype == torch.float32 else 5e-2
    tolerance = share * float((scores.float() - bias.float()).abs().max())
    if not torch.allclose(pooled, scores.float(), rtol=0, atol=tolerance):
        return None
    return weight, bias


@contextmanager
def outputs_of(layers: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Number of a layer -> its last output, of those that run inside of the context."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        return lambda module, arguments, output: found.__setitem__(number, output)  # noqa: ARG005

    handles = [m.register_forward_hook(keep(i)) for i, m in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def probed(encoder: nn.Module) -> Iterator[Callable[..., Tensor]]:
    """(H, W) -> a black image for the encoder, in evaluation mode and frozen; put back later."""
    modes = [(m, m.training) for m in encoder.modules()]
    frozen = [(p, p.requires_grad) for p in encoder.parameters()]
    like = next(encoder.parameters(), torch.empty(0))

    first = next((m for m in encoder.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels

    def image_of(size: tuple[int, int]) -> Tensor:
        return torch.zeros(1, channels, *size, device=like.device, dtype=like.dtype)

    try:
        encoder.eval()
        for p, _ in frozen:
            p.requires_grad = False
        yield image_of
    finally:
        for p, needs_gradient in frozen:
            p.requires_grad = needs_gradient
        for m, mode in modes:
            m.training = mode
