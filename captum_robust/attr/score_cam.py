"""ScoreCAM: the class activation map whose weights are the scores of what each channel shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_robust._captum import format_output
from captum_robust._checks import check
from captum_robust._contexts import without_autocast
from captum_robust._progress import Advance, progress_bar
from captum_robust._scores import at_least_float, finite_scores
from captum_robust.attr._classes import ExplainedScore, Target
from captum_robust.attr._inputs import checked_images, enlarged, in_dtype_of
from captum_robust.attr._layer_cut import LayerCut
from captum_robust.attr._masked import MaskedImages
from captum_robust.attr.robust_cam import Average, RobustCAM, minmax, weighted_sum


class ScoreCAM(LayerAttribution):
    r"""The channels of a layer, each as heavy as the score of the image that it masks.

    .. math:: M = \sum_c \mathrm{softmax}_c(f(x \odot s(A_c)))\, A_c

    where s enlarges a channel bilinearly to the image and scales it to [0, 1]. Wang et al.,
    "Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks"
    (https://arxiv.org/abs/1910.01279); the score of the baseline that is subtracted there changes
    no softmax. No gradient is taken. A sample costs one forward pass a channel, many at once.

    Args:
        forward_func: the model, or any function of the inputs that calls it.
        layer: whose output, N×C×h×w, the map is made of; others as for :class:`RobustCAM`.
        reshape_transform: as for :class:`RobustCAM`.

    Raises:
        TypeError, ValueError: as for :class:`RobustCAM`.
    """

    explains_prediction = True

    def __init__(
        self,
        forward_func: Callable[..., Tensor],
        layer: nn.Module | str,
        *,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._cam = RobustCAM(
            forward_func, layer, base="gradcam", reshape_transform=reshape_transform
        )
        super().__init__(forward_func, self._cam.layer)

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        *,
        normalize: str | None = "max",
        upsample: bool = False,
        perturbations_per_eval: int | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """The map of each sample: N×1×h×w, the layer's size, or N×1×H×W with ``upsample``.

        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: images N×C×H×W, or a tuple of such, all of which a channel masks.
            target: the explained class, or a function of the scores; None: the predicted class.
            additional_forward_args: passed on to ``forward_func``. Of a tensor whose first
                dimension is N, each sample keeps its row.
            attribute_to_layer_input: make the map of the layer's input instead of its output.
            normalize: as for :meth:`ClassActivationMap.attribute`.
            upsample: bilinear, to the spatial size of the (first) input.
            perturbations_per_eval: channels of a sample in one forward pass; None: as for
                :class:`RISE`.

        Raises:
            ValueError: inputs that are no images; a layer that does not run, or whose output is
                none of N×C×h×w; NaN or infinity in a score (names the sample).
        """
        images = checked_images(inputs)
        cut = LayerCut(self.layer, attribute_to_layer_input)
        average = Average([1.0], normalize, upsample, None)
        with torch.inference_mode(False), torch.no_grad():
            masked = MaskedImages(
                self.forward_func, images, additional_forward_args, perturbations_per_eval
            )
            scores, _, layouts = self._cam._forward(images, additional_forward_args, cut)
        with torch.inference_mode(False), torch.no_grad():  # the cut switched gradients on
            scores = finite_scores(scores.detach(), masked.n)
            explained = ExplainedScore(scores.to(masked.device), target)
            self._cam._check_batch(cut, layouts, masked.n)
            maps = []
            for leaf, layout in zip(cut.leaves, layouts, strict=True):
                features = at_least_float(self._cam._features(leaf, layout, cut))
                got = tuple(features.shape)
                check(features.ndim == 4, f"layer: expected an output N×C×h×w, got {got}")
                total = len(features) * features.shape[1]
                with progress_bar(total, "channel", None, "Score-CAM") as advance:
                    weights = [
                        _weights(masked, i, each, explained, advance)
                        for i, each in enumerate(features)
                    ]
                own = weighted_sum(torch.stack(weights).unsqueeze(0), features)
                with without_autocast(own):
                    maps.append(in_dtype_of(images[0], average.of(own, images[0])))
        result: Tensor | tuple[Tensor, ...] = format_output(cut.is_tuple, tuple(maps))
        return result


def _weights(
    masked: MaskedImages, i: int, channels: Tensor, explained: ExplainedScore, advance: Advance
) -> Tensor:
    """The weight C of each channel C×h×w of sample i."""
    numbers = []
    for part in masked.parts(0, len(channels)):
        own = channels[part].unsqueeze(1)
        masks = [minmax(enlarged(own, x.shape[2:]), first=2).to(x.device) for x in masked.images]
        scores = masked.masked_scores(i, masks)
        numbers.append(explained(scores, [i] * len(scores)))
        advance(len(scores))
    return at_least_float(torch.cat(numbers)).softmax(dim=0)
