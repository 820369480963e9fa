"""The command ``captum-robust``: one module a command, which parses and prints only."""

from captum_robust.cli.app import app, main

__all__ = ["app", "main"]
