"""What files of networks have in common: the name of a part, and whether tensors fit it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from captum_robust._checks import check, printable


def name_of(network: nn.Module | None) -> str | None:
    """Its own name, or that of its class; None of None."""
    name = getattr(network, "name", None)
    return name if network is None or isinstance(name, str) else type(network).__name__


def check_name(where: str, part: str, wanted: str, network: nn.Module) -> None:
    """Raise ``ValueError`` unless the network that is given as a part has the name in the file."""
    own = name_of(network)
    check(wanted == own, f"{where} is for the {part} {printable(wanted)}, not {own}")


def check_fit(where: str, part: nn.Module, tensors: dict[str, Tensor], prefix: str = "") -> None:
    """Raise ``ValueError`` that names the first tensor of a file which is not as the part's own.

    Args:
        where: begins the message.
        part: of a network; only the shapes of its tensors count.
        tensors: of the file.
        prefix: of the part's tensors in the file; others are not looked at.
    """
    wanted = {prefix + name: t.shape for name, t in part.state_dict().items()}
    there = {name: t.shape for name, t in tensors.items() if name.startswith(prefix)}
    names = sorted(wanted.keys() | there.keys())
    wrong = [printable(name) for name in names if wanted.get(name) != there.get(name)]
    check(not wrong, f"{where}: {''.join(wrong[:1])} is missing, of another shape, or unknown")
    check_numbers(where, part, tensors, prefix)


def check_numbers(
    where: str, part: nn.Module, tensors: Mapping[str, Tensor], prefix: str = ""
) -> None:
    """Raise ``ValueError`` for tensors that would be read as other numbers, or are none.

    Integers are no weights, nor are NaN and infinity, but where the part's own are infinite. Those
    of another name or shape are not looked at; arguments are those of :func:`check_fit`.
    """
    for name, own in part.state_dict().items():
        t = tensors.get(prefix + name)
        if t is None or t.shape != own.shape:
            continue
        kinds = [(x.is_floating_point(), x.is_complex(), x.dtype == torch.bool) for x in (own, t)]
        got = f"{where}: {prefix}{name}: expected {own.dtype}, got"
        check(kinds[0] == kinds[1], f"{got} {t.dtype}")
        is_free = t.isfinite().all() or (
            not own.is_meta and (t.isfinite().to(own.device) | ~own.isfinite()).all()
        )
        check(is_free, f"{got} NaN or infinity")


def network_size(network: Callable[[], nn.Module]) -> int:
    """How many numbers a network has, which is built for that without memory for them."""
    with torch.device("meta"):
        return sum(t.numel() for t in network().state_dict().values())


def check_names(
    where: str, field: str, names: Sequence[str] | None, tensors: Mapping[str, Tensor]
) -> None:
    """Raise ``ValueError`` for class names of a file that has no layer of so many outputs.

    A network of them would take memory that the file does not. One logit may have two names.
    """
    lengths = {2} | {length for t in tensors.values() for length in t.shape}
    count = 2 if names is None else len(names)
    expected = f"{field}: expected as many as the last layer in the file has outputs"
    check(count in lengths, f"{where}: {expected}, got {count}")
