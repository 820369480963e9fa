"""The command ``captum-robust demo``: parsing and printing only."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import typer

from captum_robust.cli.model_options import ModelOptions, load_model
from captum_robust.cli.options import command_of, option
from captum_robust.cli.printing import Verbosity, echo, print_json
from captum_robust.cli.shared_options import print_comparison


@dataclass(frozen=True)
class DemoOptions:
    """The options of the command."""

    out: Path | None = None
    """Folder of the run and its report; else captum-robust-demo, or captum-robust-demo-all."""
    device: str = "auto"
    all: bool = field(default=False, metadata=option("--all"))
    """Compare all methods on the clean photographs instead: minutes, and a table."""
    json: bool = field(default=False, metadata=option("--json"))
    """Print one JSON object instead of the table."""


@command_of(DemoOptions, resumes=True)
def demo(options: DemoOptions) -> None:
    """Show what an attack does to five methods on seven photographs; write the pictures."""
    if not Verbosity.quiet:
        said = "seven photographs, EfficientNet-Lite0: loading PyTorch and the classifier"
        typer.echo(said, err=options.json)
    from captum_robust.benchmark import compare
    from captum_robust.benchmark.demo import demonstrate
    from captum_robust.data import load_dataset
    from captum_robust.report.demo_page import Demo

    usual = "captum-robust-demo-all" if options.all else "captum-robust-demo"
    out = options.out or Path(usual)
    model = load_model(ModelOptions(device=options.device))
    if options.all:
        result = compare(model, load_dataset("samples"), out=out)
        print_comparison(result, out / "report.html", as_json=options.json)
        return
    shown = Demo(demonstrate(model, out).folder)
    page = shown.write(out / "report.html")
    if options.json:
        print_json(shown.facts() | {"report": page})
        return
    echo("\n" + shown.to_text())
    echo(f"\nreport: {page}")
