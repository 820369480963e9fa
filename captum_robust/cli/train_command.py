"""The command ``captum-robust train``: its options are the fields of the trainings' settings."""

from __future__ import annotations

import typer

from captum_robust.cli.denoiser_command import denoiser
from captum_robust.cli.localization_command import localization
from captum_robust.cli.masking_command import masking
from captum_robust.cli.robust_command import robust

app = typer.Typer(
    help="Train networks; a run that was stopped goes on when it is started again.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


for command in (robust, masking, localization, denoiser):
    app.command()(command)
