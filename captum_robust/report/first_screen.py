"""What a reader of the report sees first: a sentence, the errors as dots, and six pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captum_robust.report.pictures import Shot, build_shots
from captum_robust.report.results import CLEAN, FEW
from captum_robust.report.run_tables import Tables
from captum_robust.report.tables import Ahead

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Dot:
    """An error in % with its interval, from ``low`` to ``high``; these are equal without one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DotRow:
    """A method's errors."""

    method: str
    clean: Dot
    attacked: Dot | None
    """Under the attack of the chart."""
    baseline: bool


def dots_of(tables: Tables, attack: str | None) -> list[DotRow]:
    """The methods with an error, best first, each on the clean images and under an attack."""
    if "error" not in tables.methods:
        return []
    rows = {(r["method"], r["attack"]): r for r in tables.methods.to_dict("records")}
    return [
        DotRow(
            method,
            _dot(rows[method, CLEAN]),
            _dot(rows[method, attack]) if attack and (method, attack) in rows else None,
            method in tables.results.baselines,
        )
        for method in tables.clean.loc[tables.clean["error"].notna(), "method"]
    ]


def _dot(row: dict[Any, Any]) -> Dot:
    value, low, high = (100 * row[c] for c in ("error", "error_low", "error_high"))
    return Dot(value, *((low, high) if low == low else (value, value)))


def shown_attack(tables: Tables) -> str | None:
    """The attack that the first screen shows: the last that is to change the class, if any."""
    plain = tables.results.plain_attacks
    return plain[-1] if plain else None


def first_shots(tables: Tables, frame: pd.DataFrame) -> list[Shot]:
    """The first six images, not chosen by the outcome, with the map of the best method."""
    methods = [m for m in tables.clean["method"] if m in tables.results.compared]
    return build_shots(tables.results, frame, methods[0], shown_attack(tables))


def leading(tables: Tables, attack: str = CLEAN, most: int = 5) -> list[str]:
    """The best methods under an attack, as many as lines can be told apart, and the baselines."""
    results = tables.results
    table = tables.methods[tables.methods["attack"] == attack]
    ranked = [m for m in table["method"] if m in results.compared and m not in results.baselines]
    return ranked[:most] + [m for m in results.methods if m in results.baselines]


def sentence_of(tables: Tables, ahead: Ahead) -> str:
    """What the clean rows of the table say in words, and what the shown attack does."""
    table, known = tables.clean, tables.results.baselines
    if "error" not in table or not table["error"].notna().any():
        return "No image has a box that could be scored, so the methods are not ranked."
    clean = table[table["error"].notna()].to_dict("records")
    methods = [row for row in clean if row["method"] not in known]
    if not methods:
        return "Only baselines were scored."
    baselines = [row for row in clean if row["method"] in known]
    few = methods[0]["n"] < FEW
    text = _few(tables, methods) if few else _best(tables, methods, baselines, ahead)
    return text + _under_attack(tables, methods[0])


def _few(tables: Tables, methods: list[dict[Any, Any]]) -> str:
    words, best, worst = tables.results.words, methods[0], methods[-1]
    n = best["n"]
    if n == 1:
        return "One image ranks nothing: there is one image, so there is no interval."
    text = f"{n} images rank nothing. The boxes of {words[best['method']]} miss "
    text += f"{_misses(best)}, those of {words[worst['method']]} {_misses(worst)}; "
    low, high = (100 * best[f"error_{end}"] for end in ("low", "high"))
    return text + f"of the first the 95 % interval reaches from {low:.0f} to {high:.0f} %."


def _misses(row: dict[Any, Any]) -> str:
    return f"{round(row['error'] * row['n'])} of {row['n']}"


def _best(
    tables: Tables,
    methods: list[dict[Any, Any]],
    baselines: list[dict[Any, Any]],
    ahead: Ahead,
) -> str:
    words, best = tables.results.words, methods[0]
    name = best["method"]
    peers = [r["method"] for r in methods[1:] if not ahead("error", CLEAN, name, r["method"])]
    low, high = (100 * best[f"error_{end}"] for end in ("low", "high"))
    # A name of one's own keeps its small letter.
    first = words[name] if words[name] == name else words[name][0].upper() + words[name][1:]
    text = f"{first} places the object best: {100 * best['error']:.1f} % of its boxes miss it"
    text += f" (95 % interval {low:.1f} to {high:.1f} %, {best['n']} images)"
    if not peers:
        text += ", fewer than those of any other method, beyond chance."
    elif len(peers) <= 2:
        text += f"; {' and '.join(words[m] for m in peers)} may be as good."
    else:
        text += f"; {len(peers)} other methods may be as good, the differences may be chance."
    if baselines:
        other = baselines[0]
        text += f" The best baseline, the {words[other['method']]}, misses"
        text += f" {100 * other['error']:.1f} %"
        if ahead("error", CLEAN, name, other["method"]):
            text += "."
        elif ahead("error", CLEAN, other["method"], name):
            text += ", which is better."
        else:
            text += ": no difference beyond chance."
    return text


def _under_attack(tables: Tables, best: dict[Any, Any]) -> str:
    """What becomes of the classifier and of the best method."""
    attack = shown_attack(tables)
    rows = tables.attacks[tables.attacks["attack"] == attack].to_dict("records")
    if not rows or not rows[0]["n_right"]:
        return ""
    text = f" “{attack}” fools the classifier on {100 * rows[0]['fooled']:.0f} % of the images"
    text += " that it gets right"
    table, words = tables.methods, tables.results.words
    under = table[(table["attack"] == attack) & table["error"].notna()]
    mine = under[under["method"] == best["method"]].to_dict("records")
    if not mine:
        return text + "."
    name = words[best["method"]]
    if best["n"] < FEW:
        return f"{text}; then the boxes of {name} miss {_misses(mine[0])}."
    text += f"; then {100 * mine[0]['error']:.1f} % of the boxes of {name} miss"
    first = under[~under["method"].isin(tables.results.baselines)].to_dict("records")[0]
    if first["error"] < mine[0]["error"]:
        text += f", and of {words[first['method']]} {100 * first['error']:.1f} %, the fewest"
    return text + "."
