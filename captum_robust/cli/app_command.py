"""The command ``captum-robust app``: parsing and printing only."""

from __future__ import annotations

import threading
import webbrowser
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_robust.cli.model_options import ModelOptions, class_names
from captum_robust.cli.options import command_of, option
from captum_robust.cli.printing import echo
from captum_robust.cli.shared_options import (
    LOCALIZATION,
    MASKING,
    method_names,
    model_for,
    read_network,
    with_network,
)

if TYPE_CHECKING:
    from captum_robust.models import Classifier


@dataclass(frozen=True, kw_only=True)
class AppOptions(ModelOptions):
    """The options of the command."""

    methods: str | None = None
    """Names, separated by commas, of the methods whose maps are shown; see captum-robust methods.
    By default a few usual ones."""
    network: Path | None = None
    port: int | None = field(default=None, metadata=option(min=1, max=65535))
    """Of the page; by default the first free one from 7860."""
    open: bool = field(default=False, metadata=option("--open"))
    """Open the page in the browser too."""


@command_of(AppOptions)
def app(options: AppOptions) -> None:
    """Explore photographs in the browser: classes, maps and boxes, live attacks, the defence.

    The page is at the address that is printed, for this machine only, until Ctrl-C. What it shows
    can be saved as a picture, as JSON and as lines of Python. Needs the extra app.
    """
    from captum_robust.show.exploration import SHOWN
    from captum_robust.show.explorer_page import explorer

    named = method_names(options.methods)
    if named is None and options.network is not None:
        named = [*SHOWN, LOCALIZATION]
    file = read_network(options.network, named)
    model = model_for(file, options)
    given = with_network(model, named, file)
    if options.methods is None and file is not None:  # the file is of one of the two
        given = {n: v for n, v in given.items() if n not in (MASKING, LOCALIZATION) or n != v}
    page = explorer(model, given, port=options.port, source=source_of(options, model, given))
    try:
        echo(f"{page.url}  (Ctrl-C closes it)")
        if options.open:
            webbrowser.open(page.url)
        threading.Event().wait()
    finally:
        page.close()


def source_of(options: AppOptions, model: Classifier, methods: Any) -> list[str]:
    """Lines of Python that make the model and, with a network, the methods."""
    from captum_robust.attr import AdversarialLocalization
    from captum_robust.models import SMALL_NETWORKS
    from captum_robust.models.zoo import published_weights

    lines = _model_lines(options, published_weights(options.weights))
    for name, value in methods.items() if options.network is not None else ():
        if isinstance(value, str):
            continue
        file = repr(str(options.network))
        if not isinstance(value, AdversarialLocalization):
            lines += [f"network = RealTimeMasking(load_masking_network({file}, model))"]
        elif model.name in SMALL_NETWORKS and options.weights.lower() == "default":
            lines = [f"network = AdversarialLocalization.from_file({file})"]
            lines += ["model = network.forward_func"]
        else:
            lines += [f"network = AdversarialLocalization.from_file({file}, model=model)"]
        parts = [f"{n!r}: {'network' if n == name else repr(n)}" for n in methods]
        lines += [f"methods = {{{', '.join(parts)}}}"]
    return lines


def _model_lines(options: AppOptions, weights: str | None) -> list[str]:
    """Lines that load the classifier as ``load_model`` does."""
    names = class_names(options.classes)
    is_of_any = weights is None or Path(weights).is_file()
    given: dict[str, Any] = {"cam_layer": options.layer, "input_size": options.size}
    for name, numbers in (("mean", options.mean), ("std", options.std)):
        given[name] = None if numbers is None else [float(part) for part in numbers.split(",")]
    given["class_names"] = names if is_of_any else None
    words = [repr(options.model), *([] if weights == "DEFAULT" else [f"weights={weights!r}"])]
    words += [f"{name}={value!r}" for name, value in given.items() if value is not None]
    lines = [f"model = load_classifier({', '.join(words)})"]
    if weights is None:
        lines.insert(0, "manual_seed(0)")
    if names is not None and not is_of_any:
        lines.append(f"model.class_names = {names}")
    return lines
