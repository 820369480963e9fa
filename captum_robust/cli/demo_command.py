"""The command ``captum-robust demo``: parsing and printing only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from captum_robust.cli.model_options import ModelOptions, load_model
from captum_robust.cli.options import command_of
from captum_robust.cli.shared_options import print_comparison


@dataclass(frozen=True)
class DemoOptions:
    """The options of the command."""

    out: Path = Path("captum-robust-demo")
    """Folder of the run and its report."""
    device: str = "auto"


@command_of(DemoOptions, resumes=True)
def demo(options: DemoOptions) -> None:
    """Compare methods on the sample photographs with EfficientNet-Lite0; write the report."""
    from captum_robust.benchmark import compare as run
    from captum_robust.data import load_dataset

    model = load_model(ModelOptions(device=options.device))
    dataset = load_dataset("samples")
    typer.echo(f"{len(dataset)} photographs, EfficientNet-Lite0")
    print_comparison(run(model, dataset, out=options.out), options.out / "report.html")
