"""The command ``captum-robust demo``: parsing and printing only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from captum_robust.cli.model_options import Device, load_model
from captum_robust.cli.shared_options import USUAL_MODEL, print_comparison


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run and its report.")] = Path(
        "captum-robust-demo"
    ),
    device: Device = "auto",
) -> None:
    """Compare methods on the sample photographs with EfficientNet-Lite0; write the report."""
    from captum_robust.benchmark import compare as run
    from captum_robust.data import load_dataset

    model = load_model(USUAL_MODEL, "DEFAULT", device)
    dataset = load_dataset("samples")
    typer.echo(f"{len(dataset)} photographs, EfficientNet-Lite0")
    print_comparison(run(model, dataset, out=out, progress=True), out / "report.html")
