"""What run.json of a run may say of it, field by field."""

from __future__ import annotations

from captum_robust._facts import (
    Fact,
    Form,
    listed,
    named,
    number,
    optional,
    or_none,
    parts,
    text,
    whole,
)

_TEXTS = named(text())
RUN_FORM: Form = {
    "model": parts(
        {
            "name": text(),
            "parameters": whole(0, 2**63),
            "input_size": listed(whole(1)),
            "weights_crc32": whole(0, 2**32),
        },
        others=True,
    ),
    "dataset": parts({"kind": text(), "samples": whole(0)}, others=True),
    "methods": _TEXTS,
    "kinds": optional(_TEXTS, {}),
    "attacks": _TEXTS,
    "adaptive": optional(named(parts({"of": or_none(text()), "images": _TEXTS}, others=True)), {}),
    "settings": parts(
        {
            "batch_size": whole(1),
            "fit": text(),
            "seed": whole(-(2**63), 2**64),
            "device": text(),
            "target": Fact("a number, a text or none", lambda v: isinstance(v, str | int | None)),
            "saliency_metric": optional(named(listed(number()))),
            "certificates": optional(
                parts(
                    {
                        "sigma": number(0, open_low=True),
                        "samples": whole(1),
                        "radii": listed(number(0, open_low=True), 1),
                        "cells": whole(1),
                    },
                    others=True,
                )
            ),
        },
        others=True,
    ),
    "versions": _TEXTS,
}
"""What a run says of itself."""
