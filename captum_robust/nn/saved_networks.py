"""What files of networks have in common: the name of a part, and whether tensors fit it."""

from __future__ import annotations

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
