"""Certified: which pixels of a map, and which box, no attacker within a radius can move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor

from captum_robust._captum import format_output, is_tuple
from captum_robust._checks import (
    check,
    check_callable,
    check_choice,
    check_count,
    check_number,
    checked_size,
)
from captum_robust._progress import progress_bar
from captum_robust.attr._certificate import BOX_RULES, CertifiedDetails, Counts, Rules, distance
from captum_robust.attr._classes import Target
from captum_robust.attr._inputs import checked_images
from captum_robust.attr._noisy import Copies, NoisyMaps
from captum_robust.attr._wrapped import Wrapper, is_of_layer, takes_target
from captum_robust.metrics.functional import CORRECTIONS, STRATEGIES, least_samples
from captum_robust.metrics.functional.certificates import probability_at
from captum_robust.metrics.functional.thresholding import check_alpha

_LEAST_FIRST, _FIRST_SHARE = 10, 0.1
"""Copies that choose the class, where none is given."""


class Certified(Wrapper):
    r"""What a map shows of an image, and of every image that differs by at most R in L2.

    The map of a copy with Gaussian noise is made of zeros and ones: the pixels that it shows most.
    For each pixel the share of copies that show it estimates a probability, which changes little
    from image to image: where it exceeds :math:`\tau`, it exceeds one half in the whole ball of the
    radius

    .. math:: R = \sigma\, \Phi^{-1}(\tau).

    So what is certified is the *smoothed map*: the pixels that are shown by more than half of all
    noisy copies. A pixel is certified in, if it belongs to that map for each image of the ball,
    certified out, if for none, and abstains, if the copies prove neither. All pixels of an image
    are right at once with the confidence. After Anani, Lorenz, Fritz and Schiele, "Pixel-level
    Certified Explanations via Randomized Smoothing" (ICML 2025); the tests are explained in
    :func:`captum_robust.metrics.functional.certify_counts`.

    The map may be made of a copy in any way. What counts is the magnitude, added up over channels;
    of a layer the positive part of the sum. That of a layer is enlarged first, in each copy; what
    is certified is the enlarged map. ``denoiser`` and a model that clips its input are part of the
    certified function: the noise comes before both.

    **The box.** Three rules, each with its proof; inner and outer box in the details are such that
    the box of every image in the ball lies between them:

    ``"pixels"``
        The box of all pixels of the smoothed map. That map holds the pixels that are certified in,
        and none that are certified out; so its box holds the box of the first, and lies within the
        box of all that are not the second.
    ``"component"``
        The box of its largest connected component (of 8 neighbours, in cells of ``size``). Let A be
        the largest component of the pixels certified in, and O ⊇ A the component of those not
        certified out. The pixels of A belong to one component of the smoothed map, which lies
        within O. Any other one neither meets nor touches A, so it lies within a component of what
        is left of the pixels not certified out without A and its neighbours. If all of these are
        smaller than A, the largest is the one around A: its box holds that of A, and lies within
        that of O.
    ``"median"``
        Each side is the median, over noisy copies, of that side of the box of the copy's own
        largest component, of the whole image where it shows nothing. A side of at most v is an
        event with a probability like any other: where it exceeds τ, the median is at most v within
        R (Chiang et al., "Detection as Regression: Certified Object Detection by Median Smoothing",
        https://arxiv.org/abs/2007.03730). The least such v is found by order statistics, without a
        correction but for the eight bounds.

    It costs n attributions an image, and, without a target, a tenth as many forward passes to find
    the class; an attribution that does not rank the classes itself then takes n more. Counts alone
    are kept, whatever n is.

    Args:
        attribution: any of images; its maps may be of a layer.
        sigma: standard deviation σ of the noise, in the unit of the inputs.
        share: of the pixels, how many of the largest a copy shows, one at least; in (0, 1). Of
            equal pixels all or none; never those of the least value.
        n: copies.
        confidence: that nothing of what is certified of an image (and, apart from it, of its box)
            is wrong; with a class that is found, it included.
        threshold: ``(strategy, alpha)`` of :func:`captum_robust.metrics.functional.threshold`: the
            pixels that a copy shows, in the stead of ``share``.
        tau: τ in (½, 1). Default 0.75.
        radius: R, in the stead of τ.
        box: one of the rules.
        correction: for the number of pixels, ``"holm"`` or ``"bonferroni"``.
        size: (h, w), or one number, of the grid on which maps are thresholded and tested; each
            pixel has the answer of its cell. None: that of the images. Fewer cells are fewer tests.
        denoiser: images N×C×H×W -> as many, which the attribution gets in the stead of the copies.
        seed: of the noise, and of attributions that draw; None: torch's global generator, for an
            attribution that does not draw.

    Raises:
        TypeError: ``attribution`` is no attribution.
        ValueError: a number out of range, or an unknown name.

    >>> import torch
    >>> from captum.attr import InputXGradient
    >>> attribution = InputXGradient(lambda x: x.flatten(1))
    >>> x = torch.zeros(1, 1, 2, 2)
    >>> x[0, 0, 1, 1] = 2
    >>> certified = Certified(attribution, sigma=0.25, share=0.25, n=100)
    >>> certified.attribute(x, target=3)
    tensor([[[[0., 0.],
              [0., 1.]]]])
    """

    explains_prediction = True

    def __init__(
        self,
        attribution: Attribution,
        sigma: float = 0.25,
        share: float | None = None,
        n: int = 100,
        confidence: float = 0.999,
        *,
        threshold: tuple[str, float] | None = None,
        tau: float | None = None,
        radius: float | None = None,
        box: str = "pixels",
        correction: str = "holm",
        size: int | tuple[int, int] | None = None,
        denoiser: Callable[[Tensor], Tensor] | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__(attribution)
        check_number("sigma", sigma, 0, open_low=True)
        check_count("n", n, 1)
        check_number("confidence", confidence, 0, 1, open_low=True, open_high=True)
        check(share is None or threshold is None, "threshold: give it, or share, not both")
        if threshold is None:
            share = 0.15 if share is None else share
            check_number("share", share, 0, 1, open_low=True, open_high=True)
        else:
            is_pair = isinstance(threshold, Sequence) and len(threshold) == 2
            check(is_pair, f"threshold: expected (strategy, alpha), got {threshold!r}")
            check_choice("threshold", threshold[0], STRATEGIES)
            check_alpha(*threshold, "threshold")
        check(tau is None or radius is None, "radius: give it, or tau, not both")
        if radius is not None:
            check_number("radius", radius, 0, open_low=True)
            tau = probability_at(radius / sigma)
            check(0.5 < tau < 1, f"radius: {radius} is too far, or too near, for sigma={sigma}")
        tau = 0.75 if tau is None else tau
        check_number("tau", tau, 0.5, 1, open_low=True, open_high=True)
        check_choice("box", box, BOX_RULES)
        check_choice("correction", correction, CORRECTIONS)
        self.rules = Rules(sigma, n, confidence, tau, share, threshold, box, correction)
        self.size = None if size is None else checked_size("size", size)
        check_callable("denoiser", denoiser, optional=True)
        self.denoiser = denoiser
        self.seed = check_count("seed", seed, 0, optional=True)

    @property
    def radius(self) -> float:
        """R, in L2 over all inputs of a sample, in their unit."""
        return self.rules.sigma * distance(self.rules.tau)

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: object | None = None,
        *,
        return_details: bool = False,
        frequencies: bool = False,
        perturbations_per_eval: int | None = None,
        show_progress: bool | None = None,
        **arguments: Any,
    ) -> Any:
        """N×1×H×W: 1 where the pixel is certified in, 0 where out, .5 where it abstains.

        For a tuple of inputs it is a tuple, but of a layer's map, which is that of the first.
        Shared arguments are explained in :mod:`captum_robust.attr`.

        Args:
            inputs: images N×C×H×W, or a tuple of such, which are all given noise (and so are to be
                attacked together); what an attacker can't change is an additional argument.
            target: None: the class of the smoothed classifier, which the test of Cohen et al. has
                to prove on the same copies; an image whose class is not proven abstains altogether.
                A given class is explained as it is given.
            additional_forward_args: passed on, tensors of N rows once a copy.
            return_details: also :class:`CertifiedDetails`, for a tuple of maps a tuple of them.
            frequencies: the share of copies that show the pixel, in the stead of the certificate.
            perturbations_per_eval: copies in one pass; None: as many as are 64 MiB of images, on
                the CPU 4 MiB a thread, which is quickest there.
            show_progress: a bar on standard error, of the copies.
            arguments: those of the attribution's ``attribute``, tensors of N rows likewise.

        Raises:
            ValueError: inputs that are no images; too few copies for one pixel to be certified
                (says how many it takes); NaN or infinity in the maps of more than 1 % of the copies
                of an image, which otherwise count as neither in nor out; an attribution that draws,
                without a seed.
            TypeError: an attribution whose results are no maps.
        """
        images = checked_images(inputs)
        check_count("perturbations_per_eval", perturbations_per_eval, 1, optional=True)
        with torch.inference_mode(False):
            noisy = NoisyMaps(
                self.attribution,
                inputs,
                images,
                additional_forward_args,
                arguments,
                sigma=self.rules.sigma,
                size=self.size,
                seed=self.seed,
                denoiser=self.denoiser,
                at_once=perturbations_per_eval,
            )
            all_details = self._certified(noisy, target, show_progress)
            maps = [d.frequency if frequencies else d.map for d in all_details]
            results = tuple(m.to(x) for m, x in zip(maps, noisy.mapped, strict=True))
        is_several = is_tuple(inputs) and not is_of_layer(self.attribution)
        result = format_output(is_several, results)
        return (result, format_output(is_several, all_details)) if return_details else result

    def _certified(
        self, noisy: NoisyMaps, target: Any, show_progress: bool | None
    ) -> tuple[CertifiedDetails, ...]:
        classes = None
        if target is None and takes_target(self.attribution):
            count = max(_LEAST_FIRST, round(_FIRST_SHARE * self.rules.n))
            target = classes = noisy.top_class(count)
        all_counts = self._empty(noisy, classes)
        total = self.rules.n * noisy.n_images
        with progress_bar(total, "copy", show_progress, "Certified") as advance:

            def take(copies: Copies) -> None:
                for counts, maps in zip(all_counts, copies.maps, strict=True):
                    counts.add(copies, maps)
                advance(copies.failed.numel())

            noisy(self.rules.n, target, take, with_classes=classes is not None)
        return tuple(counts.certified(self.rules.tau) for counts in all_counts)

    def _empty(self, noisy: NoisyMaps, classes: Tensor | None) -> list[Counts]:
        """Counts of no copies, for each input; ``ValueError`` where n are too few."""
        rules, parts = self.rules, len(noisy.mapped) * (1 if classes is None else 2)
        all_counts = []
        for x, (h, w) in zip(noisy.mapped, noisy.sizes(), strict=True):
            got = f"size: expected at most that of the images, {tuple(x.shape[2:])}, got {(h, w)}"
            check(h <= x.shape[2] and w <= x.shape[3], got)
            # The error that is allowed is divided among the inputs, and the class.
            counts = Counts(rules, (1 - rules.confidence) / parts, x, (h, w), classes)
            least = least_samples(h * w, rules.tau, 1 - counts.error)
            facts = f"tau={rules.tau:.4g} and confidence={rules.confidence} on {h}×{w} cells"
            check(rules.n >= least, f"n: expected at least {least} for {facts}, got {rules.n}")
            all_counts.append(counts)
        return all_counts
