"""A corruption network and the classifier that it was trained against, together and on disk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_robust._checks import (
    check,
    check_count,
    check_number,
    check_type,
    printable,
    valid_unicode,
)
from captum_robust._draws import Generators
from captum_robust._facts import LARGEST_SIDE, Form, listed, number, or_none, text, whole
from captum_robust._files import TensorFile, read_facts, write_network
from captum_robust._processes import device_of
from captum_robust.nn.corruption_network import LARGEST_TRUNK_SIZE, CorruptionNetwork
from captum_robust.nn.evidence_removal import blend
from captum_robust.nn.saved_networks import check_fit, check_name, check_names, name_of
from captum_robust.nn.straight_through import straight_through
from captum_robust.nn.superpixel_pooling import spread, superpixel_means

KIND = "captum_robust.localization_network"
"""Of the facts in a file of such a network."""
_NAMES = or_none(listed(text()))
_FORM: Form = {
    "width": whole(1),
    "trunk": or_none(text()),
    "trunk_layers": _NAMES,
    "trunk_class_names": _NAMES,
    "trunk_size": or_none(whole(1, LARGEST_TRUNK_SIZE)),
    "classifier": text(),
    "class_names": _NAMES,
    "input_size": or_none(listed(whole(1, LARGEST_SIDE), 1, 3)),
    "fill": listed(number(), 1, 1024),
    "n_segments": or_none(whole(1)),
}


class LocalizationNetwork(nn.Module):
    """What removes an object from an image, and the classifier that shall not see it any more.

    Fan, Zhao and Ermon, "Adversarial Localization Network". A mask m is 1 where the object is, and
    there the image gets the fill: x̃ = (1 - m)·x + m·fill.

    Args:
        corruption: says of each pixel how likely it is to be removed.
        classifier: images N×C×H×W with pixels in [0, 1] -> scores N×K.
        fill: a number, or one for each channel, in pixel units; None: the mean that the classifier
            takes from its pixels, which is 0 behind its normalisation, and .5 where it has none.
        n_segments: about how many super-pixels an image has; None: the network is for pixels.

    Raises:
        TypeError: another corruption network, or a classifier that is no module.
        ValueError: a fill that is not finite, a number of segments below 1.
    """

    corruption: CorruptionNetwork
    classifier: nn.Module
    fill: Tensor

    def __init__(
        self,
        corruption: CorruptionNetwork,
        classifier: nn.Module,
        *,
        fill: float | Sequence[float] | None = None,
        n_segments: int | None = 100,
    ) -> None:
        super().__init__()
        expected = "a captum_robust.nn.CorruptionNetwork"
        check_type("corruption", corruption, CorruptionNetwork, expected)
        check_type("classifier", classifier, nn.Module, "a torch.nn.Module")
        self.corruption = corruption
        self.classifier = classifier
        self.n_segments = check_count("n_segments", n_segments, 1, optional=True)
        values = torch.tensor(_fill_of(fill, classifier), device=device_of(corruption))
        # Not persistent: it is written beside the tensors, where a reader sees it.
        self.register_buffer("fill", values.view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Probabilities N×1×H×W that a pixel is of the object.

        Args:
            x: images N×C×H×W with pixels in [0, 1].
            segments: N×H×W, the number of each pixel's super-pixel, whose mean it gets; None:
                each pixel has its own.

        Raises:
            TypeError: segments that are no integers.
            ValueError: segments of another shape, or negative ones.
        """
        probabilities, on_pixels = self._probabilities(x, segments)
        return on_pixels(probabilities)

    def sample(
        self,
        x: Tensor,
        segments: Tensor | None = None,
        generator: Generators = None,
        *,
        literal: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Drawn masks N×1×H×W of 0 and 1, and the probabilities N×1×H×W that they follow.

        There is one draw for each super-pixel, or for each pixel where none are given, and the
        gradient passes straight through it: see :func:`captum_robust.nn.straight_through`, also for
        ``generator`` and ``literal``. The other arguments, and what raises, are as in
        :meth:`forward`.
        """
        probabilities, on_pixels = self._probabilities(x, segments)
        drawn = straight_through(probabilities, generator, literal=literal)
        return on_pixels(drawn), on_pixels(probabilities)

    def remove(self, x: Tensor, mask: Tensor) -> Tensor:
        """x̃ = (1 - m)·x + m·fill, of images N×C×H×W and masks N×1×H×W.

        Raises:
            ValueError: masks of another number or size than the images, a fill for other channels.
        """
        got = f"{tuple(mask.shape)} for {tuple(x.shape)}"
        fits = x.ndim == 4 and mask.shape == (len(x), 1, *x.shape[2:])
        check(fits, f"mask: expected N×1×H×W for images N×C×H×W, got {got}")
        channels = self.fill.shape[1]
        check(channels in (1, x.shape[1]), f"fill: is for {channels} channels, got {x.shape[1]}")
        return blend(x, 1 - mask, self.fill)

    def _probabilities(
        self, x: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """One for each super-pixel or pixel, and what brings such numbers to N×1×H×W."""
        probabilities = torch.sigmoid(self.corruption(x))
        if segments is None:
            return probabilities, lambda values: values
        segments = segments.to(probabilities.device)
        return superpixel_means(probabilities, segments), partial(spread, segments=segments)


def _fill_of(fill: Any, classifier: nn.Module) -> list[float]:
    if fill is None:
        mean = getattr(classifier, "mean", None)
        return mean.detach().flatten().tolist() if isinstance(mean, Tensor) else [0.5]
    values = fill if isinstance(fill, (list, tuple)) else [fill]
    channels = getattr(classifier, "input_shape", (len(values),))[0]  # of other modules unknown
    fits = len(values) in (1, channels) and values
    check(fits, f"fill: expected a finite number, or one for each channel, got {fill!r}")
    return [check_number("fill", value) for value in values]


def save_localization_network(
    network: LocalizationNetwork, path: str | Path, *, half: bool = False, card: str = ""
) -> None:
    """Write the weights of both networks, and what they need, as a safetensors file.

    Args:
        half: in half precision, but for what is too large for it.
        card: what the network was trained on and what it scores, for who loads it.

    Raises:
        ValueError: the path does not end in ``.safetensors``.
        OSError: the file cannot be written; one that was there before stays.
    """
    corruption, classifier = network.corruption, network.classifier
    trunk = None if corruption.has_own_trunk else corruption.trunk
    facts = {
        "width": corruption.width,
        "trunk": name_of(trunk),
        "trunk_layers": None if trunk is None else corruption.layer_names,
        "trunk_class_names": _list_of(trunk, "class_names"),
        "trunk_size": corruption.trunk_size,
        "classifier": name_of(classifier),
        "class_names": _list_of(classifier, "class_names"),
        "input_size": _list_of(classifier, "input_size"),
        "fill": network.fill.flatten().tolist(),
        "n_segments": network.n_segments,
    }
    write_network(path, network.state_dict(), KIND, facts, half=half, card=card)


def _list_of(network: nn.Module | None, attribute: str) -> list[Any] | None:
    values = getattr(network, attribute, None)
    return None if values is None else list(values)


def read_localization_facts(path: str | Path | TensorFile) -> dict[str, Any]:
    """What a file of :func:`save_localization_network` says of its networks, beside the weights.

    ``classifier`` and ``trunk`` (None: the corruption network's own) are names, ``class_names`` and
    ``input_size`` those of the classifier or None. ``trunk_class_names`` and ``trunk_layers``, the
    names of the layers that are used, are those of the trunk or None.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no safetensors file, or one without a localization network.
    """
    return _read(path)[1]


def load_localization_network(
    path: str | Path | TensorFile,
    classifier: nn.Module,
    *,
    trunk: nn.Module | None = None,
    layers: Sequence[nn.Module] | None = None,
) -> LocalizationNetwork:
    """The network of a file that :func:`save_localization_network` wrote, in evaluation mode.

    It is on the device of ``classifier``.

    Args:
        classifier: one like the network's, of the same classes. It stays as it is: a copy gets the
            weights of the file, since training changed them.
        trunk: one like that of the corruption network, where it was given one; a copy gets the
            weights of the file.
        layers: of the trunk, where others are meant than those that the file names.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a classifier or a trunk that is no module.
        ValueError: it is no safetensors file, or one without a localization network, or the network
            is for another classifier, another trunk, or other classes.
    """
    tensors, facts = _read(path)
    where = printable(str(path))
    check_type("classifier", classifier, nn.Module, "a torch.nn.Module")
    check_type("trunk", trunk, nn.Module | None, "a torch.nn.Module")
    check_name(where, "classifier", facts["classifier"], classifier)
    wanted, own = _trunk_name(facts["trunk"]), _trunk_name(name_of(trunk))
    check(wanted == own, f"{where} is for {wanted}; got {own} as the argument trunk")
    names = _list_of(classifier, "class_names")
    if names is not None and facts["class_names"] not in (None, names):
        others = f"{len(facts['class_names'])} other classes than the {len(names)}"
        raise ValueError(f"{where} is for {others} of the classifier")
    does_not_fit = f"{where} does not fit"
    # Before memory is taken for sizes that a broken file could tell: the last block has 3×3
    # convolutions of so many channels.
    least, held = 9 * facts["width"] ** 2, sum(t.numel() for t in tensors.values())
    check(least <= held, f"{does_not_fit}: it holds too little for its width")
    if trunk is not None:
        check_fit(does_not_fit, trunk, tensors, "corruption.trunk.")
        trunk, layers = copy.deepcopy((trunk, layers))
        if layers is None and facts["trunk_layers"] is not None:
            layers = _layers_of(does_not_fit, trunk, facts["trunk_layers"])
    corruption = CorruptionNetwork(
        trunk, layers=layers, width=facts["width"], trunk_size=facts["trunk_size"]
    )
    try:
        network = LocalizationNetwork(
            *(corruption, copy.deepcopy(classifier)),
            **{name: facts[name] for name in ("fill", "n_segments")},
        )
    except ValueError as error:
        raise ValueError(f"{does_not_fit}: {error}") from None
    check_fit(does_not_fit, network, tensors)
    network.load_state_dict(tensors)
    return network.to(device_of(classifier)).eval()


def _read(path: str | Path | TensorFile) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, facts = read_facts(path, KIND, "localization network", _FORM)
    for names in ("trunk_layers", "trunk_class_names", "class_names"):
        facts[names] = facts[names] and [valid_unicode(name) for name in facts[names]]
    facts["input_size"] = facts["input_size"] and tuple(facts["input_size"])
    where = printable(str(path))
    check_names(where, "class_names", facts["class_names"], tensors)
    check_names(where, "trunk_class_names", facts["trunk_class_names"], tensors)
    return tensors, facts


def _layers_of(does_not_fit: str, trunk: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    modules = dict(trunk.named_modules())
    for name in names:
        check(name in modules, f"{does_not_fit}: the trunk has no layer {printable(name)}")
    return [modules[name] for name in names]


def _trunk_name(name: str | None) -> str:
    return "no trunk" if name is None else f"the trunk {printable(name)}"
