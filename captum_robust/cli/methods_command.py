"""The command ``captum-robust methods``: parsing and printing only."""

from __future__ import annotations

from dataclasses import dataclass, field

from captum_robust.cli.options import command_of, option
from captum_robust.cli.printing import echo, print_json
from captum_robust.cli.shared_options import LOCALIZATION, MASKING


@dataclass(frozen=True)
class MethodsOptions:
    """The options of the command."""

    json: bool = field(default=False, metadata=option("--json"))
    """Print one JSON object instead: methods and attacks by name, each with its meaning."""


@command_of(MethodsOptions)
def methods(options: MethodsOptions) -> None:
    """List the methods that compare and explain know, and the attacks of compare and attack.

    Names may be written in capitals and with other marks between words, such as Grad-CAM.
    """
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
    if options.json:
        of_methods = {name: notes.get(name, "") for name in METHODS}
        of_attacks = {name: kind.meaning for name, kind in ATTACKS.items()}
        print_json({"methods": of_methods, "attacks": of_attacks})
        return
    for name in METHODS:
        echo(f"{name}  ({notes[name]})" if name in notes else name)
    for name, kind in ATTACKS.items():
        echo(f"{name}  (attack: {kind.meaning})")
