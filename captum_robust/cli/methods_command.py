"""The command ``captum-robust methods``: parsing and printing only."""

from __future__ import annotations

import typer

from captum_robust.cli.shared_options import LOCALIZATION, MASKING


def methods() -> None:
    """List the methods that compare and explain know, and the attacks of compare and attack."""
    from captum_robust.attr.real_time_masking import pretrained
    from captum_robust.benchmark import ATTACKS, BASELINES, METHODS
    from captum_robust.catalog.attributions import IN_WORDS
    from captum_robust.catalog.box_vote import VOTES
    from captum_robust.catalog.methods import SLOW

    slow = "slow: runs only where it is named"
    notes = IN_WORDS | dict.fromkeys(BASELINES, "baseline")
    notes |= {name: f"{notes[name]}; {slow}" if name in notes else slow for name in SLOW}
    trained = ", ".join(pretrained()) or "no model yet"
    notes[MASKING] = (
        f"trained for {trained}; for others captum-robust train masking, then --network"
    )
    notes |= dict.fromkeys(VOTES, f"places a box itself; for {trained}, for others see locate")
    notes[LOCALIZATION] = "needs --network, from captum-robust train localization"
    notes["lrp"] = "for chains of layers only, such as vgg16 and simple_convnet"
    for name in METHODS:
        typer.echo(f"{name}  ({notes[name]})" if name in notes else name)
    for name, kind in ATTACKS.items():
        typer.echo(f"{name}  (attack: {kind.meaning})")
