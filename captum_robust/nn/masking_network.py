"""A network that gives the mask of a class in one pass, on top of a frozen classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import check_classes, printable
from captum_robust._contexts import evaluation, probing
from captum_robust._files import read_facts, write_network
from captum_robust.nn.mask_decoder import DecoderShape, MaskDecoder, upsampled
from captum_robust.nn.scales import (
    channels_of,
    channels_of_maps,
    check_fit,
    features_of,
    find_scales,
    name_of,
    shapes_of,
)

_FACTS = "captum_robust.masking_network"


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
        with torch.no_grad(), probing(self.encoder) as image_of:
            # Noise: on a black image features could be zero, and tell nothing of the head.
            probe = image_of(channels_of(self.encoder), *self.input_size)
            noise = torch.rand(probe.shape, generator=torch.Generator().manual_seed(0))
            features, scores = self._encode(noise.to(probe))
        if not isinstance(scores, Tensor) or scores.ndim < 2:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"encoder: expected scores N×K, got {got}")
        channels = channels_of_maps(features, self._layers, "encoder")
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
        with evaluation(self.encoder):  # also where it was put in training mode by itself
            return features_of(self.encoder, self._layers, x, *arguments)

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
    check_fit(f"{shown} does not fit the encoder {name}", wanted, tensors)
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
        return shapes_of(MaskDecoder(shape, head))


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
