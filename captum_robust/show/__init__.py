"""One image or video: explain it, locate objects in it, annotate it, explore it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_robust.show.explorer_page import explorer

__all__ = ["explorer"]


def __getattr__(name: str) -> Any:
    """Import the explorer when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from captum_robust.show.explorer_page import explorer

    return explorer
