"""The command ``captum-robust train``."""

from __future__ import annotations

import typer

from captum_robust.cli.train_localization import localization
from captum_robust.cli.train_masking import masking
from captum_robust.cli.train_robust import robust

app = typer.Typer(
    help="Train networks; a run that was stopped goes on when it is started again.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def train() -> None:
    """Train networks; a run that was stopped goes on when it is started again."""


app.command()(robust)
app.command()(masking)
app.command()(localization)
