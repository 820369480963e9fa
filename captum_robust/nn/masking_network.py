"""A network that gives the mask of a class in one pass, on top of a frozen classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import (
    as_number,
    check,
    check_classes,
    check_type,
    printable,
    shape_or_type,
)
from captum_robust._contexts import evaluation, probing
from captum_robust._facts import Form, choice, listed, number, optional, or_none, text, whole
from captum_robust._files import TensorFile, read_facts, write_network
from captum_robust._processes import device_of
from captum_robust._scores import two_classes
from captum_robust.nn.mask_decoder import DecoderShape, MaskDecoder, upsampled
from captum_robust.nn.places import Layouts
from captum_robust.nn.saved_networks import check_fit, check_name, name_of
from captum_robust.nn.scales import (
    channels_of,
    channels_of_maps,
    check_scales,
    features_of,
    find_scales,
    input_size_of,
)

_FACTS = "captum_robust.masking_network"
_FORM: Form = {
    "encoder": text(),
    "encoder_weights": optional(or_none(listed(number(), 0, 64))),
    "channels": listed(whole(1), 1, 16),
    "num_classes": whole(1),
    "head": choice(False, True),
    "widths": listed(whole(1), 0, 15),
    "filtered": whole(1),
}


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
            by ``captum_robust.nn.scales.find_scales``, without the finest of five scales, which
            says little.
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
        check_type("encoder", encoder, nn.Module, "a torch.nn.Module")
        self.encoder = encoder
        self.input_size = input_size_of(encoder, input_size, 224)
        scales = find_scales(encoder, self.input_size)[-4:] if layers is None else layers
        check_scales("encoder", encoder, scales, 2 if layers is None else 1)
        self._layers = tuple(scales)  # a tuple: they are not registered twice
        shape, head = self._probe(num_classes, learned_classes)
        if decoder is None:
            decoder = MaskDecoder(shape, head).to(device_of(encoder), torch.float32)
        theirs, own = decoder.shape.channels, shape.channels
        check(theirs == own, f"decoder: is for features of {theirs} channels, not of {own}")
        self.decoder = decoder

    def _probe(
        self, num_classes: int | None, learned_classes: bool
    ) -> tuple[DecoderShape, tuple[Tensor, Tensor] | None]:
        with probing(self.encoder) as image_of, Layouts() as followed:
            # Noise: on a black image features could be zero, and tell nothing of the head.
            probe = image_of(channels_of(self.encoder, self.input_size), *self.input_size)
            noise = torch.rand(probe.shape, generator=torch.Generator().manual_seed(0))
            image = noise.to(probe)
            followed.begin_at(image)
            features, scores = self.encode(image)
        fits = isinstance(scores, Tensor) and scores.ndim >= 2
        check(fits, f"encoder: expected scores N×K, got {shape_or_type(scores)}")
        channels = channels_of_maps(features, self._layers, "encoder", followed)
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

    def encode(self, x: Tensor, *arguments: Any) -> tuple[list[Tensor], Tensor]:
        """The features of each scale, finest first, and the scores N×K, in one pass.

        They have a graph only where ``x`` asks for a gradient. ``arguments`` are passed to the
        encoder behind the images.
        """
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad),
            evaluation(self.encoder),  # also where it was put in training mode by itself
        ):
            features, scores = features_of(self.encoder, self._layers, x, *arguments)
        return features, two_classes(scores, len(x), "encoder")

    def masks_and_scores(
        self, x: Tensor, classes: Tensor | None = None, *, confidence: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Masks N×1×H×W in [0, 1] and the encoder's scores N×K of images N×C×H×W.

        Args:
            x: pixels in [0, 1].
            classes: N; None: those with the highest scores.
            confidence: see ``captum_robust.nn.mask_decoder.MaskDecoder``.

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
            others = f"the encoder has {scores.shape[1]} others; say which"
            fits = scores.shape[1] == count
            check(fits, f"classes: the masks are of {count} classes, but {others}")
            classes = scores.argmax(dim=1)
        masks = self.decoder(features, classes, confidence)
        return upsampled(masks, (x.shape[2], x.shape[3])), scores

    def forward(self, x: Tensor, classes: Tensor, confidence: float = 0.0) -> Tensor:
        """Masks N×1×H×W in [0, 1] of images N×C×H×W and their classes N.

        Raises what :meth:`masks_and_scores` raises.
        """
        return self.masks_and_scores(x, classes, confidence=confidence)[0]


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
    path: str | Path | TensorFile, encoder: nn.Module, *, layers: Sequence[nn.Module] | None = None
) -> MaskingNetwork:
    """The network of a file that :func:`save_masking_network` wrote, in evaluation mode.

    Args:
        layers: those that the network was made with, where they were given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file, or one without a masking network, or the network is
            for another encoder, for one of other weights, or for other classes.
    """
    where = printable(str(path))
    tensors, facts = read_facts(path, _FACTS, "masking network", _FORM)
    name, weights = facts.pop("encoder"), facts.pop("encoder_weights")
    sides = {side: tuple(facts[side]) for side in ("channels", "widths")}
    shape = DecoderShape(**{**facts, **sides})
    try:
        with torch.device("meta"):
            head = (torch.empty(0), torch.empty(0)) if shape.head else None
            decoder = MaskDecoder(shape, head)
    except ValueError as error:
        raise ValueError(f"{where} holds no masking network that can be used ({error})") from None
    check_name(where, "encoder", name, encoder)
    # Before memory is taken for sizes that a broken file could tell.
    check_fit(f"{where} does not fit the encoder {name}", decoder, tensors)
    # Of the encoder's own vectors there are as many as it has: the file holds none.
    count = None if shape.head else shape.num_classes
    network = MaskingNetwork(
        encoder, layers=layers, num_classes=count, learned_classes=not shape.head
    )
    own = network.decoder.shape
    wanted = f"{where} is for an encoder {name} with {shape.num_classes} classes"
    no_layer = "whose vectors are the weights of its last layer; this one has no such layer"
    is_like = own.head == shape.head and own.num_classes == shape.num_classes
    check(is_like, f"{wanted}, {no_layer}")
    features = f"features of {shape.channels} channels; this one has {own.channels}"
    check(own.channels == shape.channels, f"{wanted} and {features}")
    own_head: Any = (network.decoder.head_weight, network.decoder.head_bias)
    network.decoder = MaskDecoder(shape, own_head if shape.head else None)
    is_same = weights is None or _are_close(weights, _some_weights(encoder))
    other = "of other weights; load those, or train another"
    check(is_same, f"{where} is for an encoder {name} {other}")
    network.decoder.load_state_dict(tensors)
    return network.to(device_of(encoder)).eval()


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
    return all(abs(as_number(a) - b) <= 0.02 * scale for a, b in zip(there, here, strict=True))


def _head_of(encoder: nn.Module, features: Tensor, scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weights and bias of the last linear layer, where it takes the pooled coarsest features.

    Not so behind a normalisation (ConvNeXt) or an activation (DenseNet) of these, which is why the
    scores are compared, not the shapes alone.
    """
    linear = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    shape = (scores.shape[1], features.shape[1])
    if not linear or linear[-1].weight.shape != shape or scores.ndim > 2:
        return None
    weight, own_bias = linear[-1].weight.detach(), linear[-1].bias
    bias = torch.zeros_like(weight[:, 0]) if own_bias is None else own_bias.detach()
    pooled = features.float().mean(dim=(2, 3)) @ weight.float().T + bias.float()
    # Half precision rounds in each layer.
    share = 1e-2 if scores.dtype == torch.float32 else 5e-2
    tolerance = share * float((scores.float() - bias.float()).abs().max())
    is_head = torch.allclose(pooled, scores.float(), rtol=0, atol=tolerance)
    return (weight, bias) if is_head else None
