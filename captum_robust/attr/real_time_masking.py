"""RealTimeMasking: the mask of a class in one forward pass of a trained network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor

from captum_robust._captum import TargetType
from captum_robust._checks import check, check_number, check_type, known_name
from captum_robust._contexts import evaluation
from captum_robust._scores import finite_scores, without_inference
from captum_robust.attr._classes import explained
from captum_robust.attr._inputs import as_given, as_tuple, checked_images, over_channels, size_of
from captum_robust.nn import MaskingNetwork, load_masking_network, upsampled

_PREFIX = "real_time_masking_"


class RealTimeMasking(Attribution):
    """What a trained network says is needed, and enough, to recognise a class.

    Dabkowski and Gal, "Real Time Image Saliency for Black Box Classifiers"
    (https://arxiv.org/abs/1705.07857). The mask is 1 where the evidence of the class is. It costs
    one pass of the network's encoder, which is the classifier itself here, and one of a small
    decoder.

    Args:
        network: :class:`captum_robust.nn.MaskingNetwork`; trained with
            ``captum-robust train masking`` or :func:`captum_robust.training.masking_training`.
        confidence: is taken from the log odds of the class at each place: with 6, only what is
            surely of the class is in it; with 0, what is similar too. The authors' code has 6.

    Raises:
        TypeError: no masking network.
        ValueError: a confidence that is no finite number.
    """

    explains_prediction = True

    def __init__(self, network: MaskingNetwork, *, confidence: float = 0.0) -> None:
        check_type("network", network, MaskingNetwork, "a captum_robust.nn.MaskingNetwork")
        super().__init__(network.encoder)
        self.network = network
        self.confidence = check_number("confidence", confidence)

    @classmethod
    def from_pretrained(cls, name: str, *, model: Any = None) -> RealTimeMasking:
        """The network that comes with this package for a classifier, on the CPU.

        Args:
            name: of the classifier: ``"efficientnet_lite0"``.
            model: the classifier itself, as ``load_classifier`` gives it, where there is one; else
                it is loaded.

        Raises:
            ValueError: there is no trained network for it; says which there are.
            ImportError: a package of the classifier's weights is missing; names the pip command.
        """
        networks = pretrained()
        try:
            name = known_name("trained masking network", name, networks)
        except ValueError as error:
            advice = f"train one with: captum-robust train masking --images DIR --model {name}"
            raise ValueError(f"{error}; {advice}") from None
        if model is None:
            from captum_robust.models import load_classifier

            model = load_classifier(name)
        return cls(load_masking_network(networks[name], model))

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        confidence: float | None = None,
    ) -> Any:
        """The mask of each sample, in [0, 1], in the shape of the inputs: alike in all channels.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: images N×C×H×W as the classifier takes them, or a tuple of such, each of which
                gets the mask at its size.
            target: the explained class; None: the predicted one.
            additional_forward_args: passed on to the classifier.
            confidence: None: as for the class.

        Raises:
            ValueError: inputs that are no images, NaN or infinity.
        """
        own = self.confidence
        confidence = own if confidence is None else check_number("confidence", confidence)
        images = checked_images(inputs)
        arguments = () if additional_forward_args is None else as_tuple(additional_forward_args)
        network = self.network
        # Outside of inference mode: its tensors can't be kept for a gradient later.
        with evaluation(network), torch.inference_mode(False), torch.no_grad():
            images = without_inference(images)
            features, scores = network.encode(*images, *arguments)
            check_type("forward_func", scores, Tensor, "a tensor of scores")
            scores = finite_scores(scores, len(images[0]))
            masks = network.decoder(features, self._classes(scores, target), confidence)
            attributions = [over_channels(upsampled(masks, size_of(x)), x) for x in images]
        return as_given(inputs, attributions)

    def _classes(self, scores: Tensor, target: TargetType) -> Tensor:
        count = self.network.decoder.shape.num_classes
        if scores.shape[1] != count:
            others = f"but the encoder has {scores.shape[1]} others; say which"
            check(target is not None, f"target: the masks are of {count} classes, {others}")
            scores = scores.new_zeros(len(scores), count)
        return explained(scores, target)[1]


def pretrained() -> dict[str, Path]:
    """Name of the classifier -> file of its trained masking network, of those in this package."""
    folder = Path(str(files("captum_robust") / "weights"))
    return {
        file.stem.removeprefix(_PREFIX): file
        for file in sorted(folder.glob(f"{_PREFIX}*.safetensors"))
    }
