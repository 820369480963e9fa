"""The command ``captum-robust doctor``: parsing and printing only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import typer

from captum_robust.cli.options import command_of, option
from captum_robust.cli.printing import echo, print_json


@dataclass(frozen=True)
class DoctorOptions:
    """The options of the command."""

    json: bool = field(default=False, metadata=option("--json"))
    """Print one JSON object instead: whether all that is needed works, and what was found."""


@command_of(DoctorOptions)
def doctor(options: DoctorOptions) -> None:
    """Say what is installed and works: versions, devices, photographs, weights, optional packages.

    Nothing is downloaded or written. The exit code is 0 unless something that is needed is broken.
    """
    from captum_robust.catalog.installation import examine, versions_text

    findings = examine(progress=not options.json)
    is_well = all(one.state != "broken" for one in findings)
    if options.json:
        print_json({"ok": is_well, "findings": [asdict(one) for one in findings]})
    else:
        echo(versions_text())
        width = max(len(one.name) for one in findings)
        for group in dict.fromkeys(one.group for one in findings):
            echo(f"\n{group}")
            for one in findings:
                if one.group == group:
                    echo(f"  {one.state:<8}{one.name:<{width}}  {one.detail}")
        echo("\nall that is needed works" if is_well else "\nsomething that is needed is broken")
    if not is_well:
        raise typer.Exit(2)
