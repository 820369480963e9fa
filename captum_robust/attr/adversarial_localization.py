"""AdversarialLocalization: the pixels that a network removes so that a classifier is lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust._captum import TargetType
from captum_robust._checks import check, check_type, printable
from captum_robust._contexts import evaluation
from captum_robust._files import TensorFile
from captum_robust._scores import (
    finite_scores,
    model_scores,
    two_classes,
    without_inference,
)
from captum_robust.attr._classes import explained
from captum_robust.attr._inputs import as_given, as_tuple, checked_images, over_channels
from captum_robust.nn import LocalizationNetwork, load_localization_network, read_localization_facts
from captum_robust.nn.superpixel_pooling import check_segments


class AdversarialLocalization(Attribution):
    """How likely each pixel is to be of the object, by a network trained against a classifier.

    Fan, Zhao and Ermon, "Adversarial Localization Network". The network removes what a classifier
    knows the object by, and the classifier learned to know it by what is left, until all of it was
    to be removed. The map depends on the image alone: it is of the object that is there, whichever
    class is asked for.

    The paper pools the network's probabilities over super-pixels. They are those of SLIC, on the
    CPU, image after image: some 4 ms for one of 64×64 pixels, 70 ms for 224×224, about as long as
    the network takes on one core, and much longer than it takes on a GPU. Give ``segments`` that
    were computed before, or ``superpixels=False`` for the network's own map, smooth and without
    edges, which then costs one pass of the network and one of the classifier.

    Args:
        network: :class:`captum_robust.nn.LocalizationNetwork`, trained with
            ``captum-robust train localization`` or
            :func:`captum_robust.training.localization_training`.

    Raises:
        TypeError: no localization network.
    """

    explains_prediction = True

    def __init__(self, network: LocalizationNetwork) -> None:
        expected = "a captum_robust.nn.LocalizationNetwork"
        check_type("network", network, LocalizationNetwork, expected)
        super().__init__(network.classifier)
        self.network = network

    @classmethod
    def from_file(
        cls,
        path: str | Path | TensorFile,
        *,
        model: nn.Module | None = None,
        trunk: nn.Module | None = None,
    ) -> AdversarialLocalization:
        """The network of a file that training wrote, on the CPU or on the device of ``model``.

        Args:
            path: of the ``.safetensors`` file.
            model: a classifier like that which it was trained against; None: the file tells its
                name, for :func:`captum_robust.models.load_classifier`.
            trunk: see :func:`captum_robust.nn.load_localization_network`, which also tells what
                raises; None: the file tells its name too, where it has one.

        Raises:
            ImportError: a package of the ``demo`` extra is missing; names the pip command.
        """
        from captum_robust.models.imported import is_imported
        from captum_robust.models.zoo import untrained_classifier

        path = path if isinstance(path, TensorFile) else TensorFile(path)
        facts = read_localization_facts(path)
        for argument, given, own in (("model", model, "classifier"), ("trunk", trunk, "trunk")):
            # A file must not say which code to run.
            is_safe = given is not None or not is_imported(facts[own] or "")
            where, name = printable(str(path)), printable(facts[own] or "")
            check(is_safe, f"{where}: its {own} is {name}; give it as the argument {argument}")
        load = partial(untrained_classifier, path)
        if model is None:
            names, size = facts["class_names"], facts["input_size"]
            model = load(facts["classifier"], class_names=names, input_size=size)
        if trunk is None and facts["trunk"] is not None:
            names = facts["trunk_class_names"]
            try:
                trunk = load(facts["trunk"], class_names=names)
            except ValueError as error:
                message = f"{printable(str(path))}: give its trunk as the argument trunk; {error}"
                raise ValueError(message) from None
        return cls(load_localization_network(path, model, trunk=trunk))

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        superpixels: bool = True,
        segments: Tensor | tuple[Tensor, ...] | None = None,
    ) -> Any:
        """The probabilities, in [0, 1], in the shape of the inputs: alike in all channels.

        The paper's mask is where they are above .5. Shared arguments are explained in
        :mod:`captum_robust.attr`.

        Args:
            inputs: images N×C×H×W as the classifier takes them, or a tuple of such, each of which
                gets a map of its own.
            target: is checked, as every method does; the map is the same for each class.
            additional_forward_args: passed on to the classifier.
            superpixels: pool over super-pixels, computed of the inputs clamped to [0, 1], as many
                as in training; False, or a network that was trained without: do not.
            segments: N×H×W integers, or a tuple of such for a tuple of inputs: the number of the
                super-pixel of each pixel, which are then not computed.

        Raises:
            TypeError: segments that are no integers.
            ValueError: inputs that are no images, or too small for their super-pixels, NaN or
                infinity, segments that do not fit the inputs.
        """
        images = checked_images(inputs)
        regions = self._regions(images, superpixels, segments)
        network = self.network
        # Outside of inference mode: its tensors can't be kept for a gradient later.
        with evaluation(network), torch.inference_mode(False), torch.no_grad():
            images = without_inference(images)
            scores = model_scores(self.forward_func, images, additional_forward_args)
            scores = two_classes(finite_scores(scores, len(images[0])), len(images[0]))
            if target is not None:
                explained(scores, target)
            attributions = [
                over_channels(network(x, None if region is None else region.to(x.device)), x)
                for x, region in zip(images, regions, strict=True)
            ]
        return as_given(inputs, attributions)

    def _regions(
        self,
        inputs: tuple[Tensor, ...],
        superpixels: bool,
        segments: Tensor | tuple[Tensor, ...] | None,
    ) -> tuple[Tensor | None, ...]:
        """The super-pixels of each input; None: it has none."""
        if segments is not None:
            regions = as_tuple(segments)
            wanted, got = len(inputs), len(regions)
            message = f"segments: expected one tensor for each of {wanted} inputs, got {got}"
            check(got == wanted, message)
            for x, region in zip(inputs, regions, strict=True):
                check_segments(region, f"{len(x)}×{x.shape[2]}×{x.shape[3]}")
            return regions
        count = self.network.n_segments
        if not superpixels or count is None:
            return (None,) * len(inputs)
        from captum_robust.data.superpixels import superpixels as segmented

        try:
            return tuple(segmented(x.detach().clamp(0, 1), count) for x in inputs)
        except ValueError as error:
            raise ValueError(f"inputs: {error}; or give segments, or superpixels=False") from None
