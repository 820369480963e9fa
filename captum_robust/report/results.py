"""The rows of a run: what it holds, and every query of the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from captum_robust.catalog.box_vote import VOTES
from captum_robust.catalog.methods import BASELINES, FIXED_BOXES
from captum_robust.catalog.thresholds import Threshold, shipped_threshold
from captum_robust.catalog.words import words_of
from captum_robust.metrics.functional import STABILITY_MEASURES, STRATEGIES
from captum_robust.runs.store import RunStore

STRATEGY_ORDER = STRATEGIES
"""The families whose boxes follow each other in a row's overlaps."""

CLEAN = "clean"

GALLERY_POOL = 512
"""Pictures and maps are kept for this many images, so that a run of any length stays small."""

ATTACK_POOL = 48
"""Attacked pictures, and what was changed in them, are kept for this many images."""

NOTHING_SCORED = "nothing was scored, for no image has a box"

_MEANS = ", ".join(f"avg({m}) AS {m}" for m in STABILITY_MEASURES)
_LOWEST = ", ".join(f"min({m}) AS {m}" for m in STABILITY_MEASURES)


FEW = 50
"""With fewer images a table says that they are too few to rank methods, or to tune on."""

WAYS = ("two-fold", "shipped", "pseudo")
"""How thresholds can be chosen for images that they are scored on without having seen their boxes.

On the other half of the images; on photographs of ImageNet, before; or on boxes that the other
methods agree on, see :func:`captum_robust.report.pseudo_boxes.agreed_boxes`."""


@dataclass(frozen=True)
class Tuning:
    """How boxes are judged and their thresholds chosen, see :meth:`Comparison.table`."""

    protocol: str = "whi2020"
    oracle: bool = False
    thresholds: str | None = None
    """One of :data:`WAYS`; None: "two-fold", but "shipped" where fewer images than
    :data:`FEW` have a box."""
    strategies: tuple[str, ...] = STRATEGY_ORDER
    seed: int = 0


USUAL_TUNING = Tuning()

Part: TypeAlias = tuple[int, int]
"""Positions of images, from the first one to that before the second one."""
EVERY: Part = (0, sys.maxsize)


class Results:
    """The folder of a run, read.

    Args:
        folder: a run's folder; also one whose run was stopped half-way.
        lazy: open its rows when the first is asked for.

    Raises:
        FileNotFoundError: no run there.
    """

    def __init__(self, folder: str | Path, *, lazy: bool = False) -> None:
        self.store = RunStore(Path(folder), lazy=lazy)
        self.configuration = self.store.configuration
        self._held: tuple[int, dict[str, bool]] = 0, {}
        self.kinds: dict[str, str] = self.configuration["methods"]
        """What each method is in the catalog; one of one's own is described."""
        words = {m: words_of(m) if m == kind else m for m, kind in self.kinds.items()}
        self.words = words if len(set(words.values())) == len(words) else {m: m for m in words}
        """What each method is called on a page; a name of one's own stays as it is."""
        self.methods = list(self.kinds)
        self.plain_attacks = list(self.configuration["attacks"])
        self.adaptive: dict[str, Any] = self.configuration.get("adaptive", {})
        self.attacks = [CLEAN]
        for attack in self.plain_attacks:
            self.attacks.append(attack)
            self.attacks += [a for a, case in self.adaptive.items() if case["of"] == attack]
        self.attacks += [a for a, case in self.adaptive.items() if case["of"] is None]
        self.baselines = {m for m in self.methods if self.kinds[m] in BASELINES}
        self.fixed_boxes = {m for m in self.methods if self.kinds[m] in FIXED_BOXES}
        self.own_boxes = {m for m in self.methods if self.kinds[m] in VOTES} | self.fixed_boxes
        """Those that place a box whatever the threshold."""
        self.compared = [m for m in self.methods if m not in self.baselines] or self.methods
        """The methods that are no baselines; all, where there are no others."""

    def threshold(self, method: str) -> Threshold:
        """That which ships for what a method is, also for one of one's own; or the usual one."""
        kinds = {**self.kinds, **self.configuration.get("kinds", {})}  # earlier runs have none
        return shipped_threshold(kinds[method])

    @property
    def attacked_sets(self) -> list[str]:
        """The sets of attacked images that are to change the class: an attack, or a case of it."""
        names: list[str] = []
        for attack in self.attacks[1:]:
            case = self.adaptive.get(attack)
            if case is None:
                names.append(attack)
            elif case["of"] is not None:
                names += dict.fromkeys(case["images"].values())
        return names

    def rows_of(self, method: str, attack: str) -> str | None:
        """The attack whose rows say how a method does under an attack.

        Itself; of an adaptive attack and a method without a defence, which that does not change,
        the plain one; None where there are no rows, as of an attack on a map that has no gradient.
        """
        case = self.adaptive.get(attack)
        if case is None or method in case["images"]:
            return attack
        plain: str | None = case["of"]
        return plain

    def images_of(self, method: str, attack: str) -> str:
        """The set of images that a method was shown under an attack that it has rows of."""
        images: str = self.adaptive.get(attack, {"images": {}})["images"].get(method, attack)
        return images

    def select(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Rows of a query."""
        return list(self.store.select(sql, parameters))

    @cached_property
    def _class_names(self) -> dict[int, str]:
        return {r["number"]: r["name"] for r in self.select("SELECT * FROM classes")}

    def class_name(self, number: float | None) -> str:
        """The name of a class; its number where the model has no names; "unknown" without one."""
        if number is None or number != number:
            return "unknown"
        return self._class_names.get(int(number), str(int(number)))

    def counts(self) -> dict[str, int]:
        """How many images were ``read``, ``broken``, ``unboxed`` and ``unlabelled``.

        And how many maps ``failed``.
        """
        (counts,) = self.select(
            "SELECT count(*) AS read, count(error) AS broken, "
            "coalesce(sum(error IS NULL AND boxes = '[]'), 0) AS unboxed, "
            "coalesce(sum(error IS NULL AND label IS NULL), 0) AS unlabelled FROM images"
        )
        return counts | {"failed": sum(self.failed_maps().values())}

    def failed_maps(self) -> dict[tuple[str, str], int]:
        """How many maps of usable images failed of each method and attack of which any did."""
        rows = self.select(
            "SELECT r.method, r.attack, count(*) AS n FROM results r JOIN images i USING (position)"
            " WHERE r.error IS NOT NULL AND i.error IS NULL GROUP BY r.method, r.attack"
        )
        return {(row["method"], row["attack"]): row["n"] for row in rows}

    def failures(self) -> list[dict[str, Any]]:
        """Image, method, attack and error: of images that no method could use, then of maps."""
        return self.select(
            "SELECT image, '(all)' AS method, NULL AS attack, error FROM images "
            "WHERE error IS NOT NULL ORDER BY position"
        ) + self.select(
            "SELECT r.image, r.method, r.attack, r.error FROM results r "
            "JOIN images i USING (position) "
            "WHERE r.error IS NOT NULL AND i.error IS NULL ORDER BY position, method, attack"
        )

    def is_unscored(self) -> bool:
        """Whether images could be used, but none has a box."""
        counts = self.counts()
        return 0 < counts["unboxed"] == counts["read"] - counts["broken"]

    def measured(
        self, method: str, attack: str, value: str, part: Part = EVERY
    ) -> list[dict[str, Any]]:
        """A column of a method under an attack where it has a value, in the images' order.

        Rows have ``position``, ``label``, ``class`` (that the method takes the image for) and
        ``value``; those of some positions only.
        """
        sql = (
            "SELECT r.position, i.label, coalesce(r.decided, r.predicted) AS class, "
            f"r.{value} AS value FROM results r JOIN images i USING (position) "
            f"WHERE r.method = ? AND r.attack = ? AND r.{value} IS NOT NULL "
            "AND r.position >= ? AND r.position < ? ORDER BY r.position"
        )
        # What was not measured is not looked for in every row of each method.
        return self.select(sql, (method, attack, *part)) if self.holds(value) else []

    def holds(self, value: str) -> bool:
        """Whether a column of the results has a value anywhere."""
        if self._held[0] != (now := self.store.version()):
            self._held = now, {}
        held = self._held[1]
        if value not in held:
            sql = f"SELECT 1 FROM results WHERE {value} IS NOT NULL LIMIT 1"
            held[value] = bool(self.select(sql))
        return held[value]

    def true_crops(self) -> list[dict[str, Any]]:
        """``position`` and ``value`` of the crops around the largest true boxes."""
        return self.select(
            "SELECT position, true_crop AS value FROM images "
            "WHERE true_crop IS NOT NULL ORDER BY position"
        )

    def means(self, method: str, attack: str) -> dict[str, Any]:
        """What a method costs, how often its class is right and its perturbation flips one."""
        (means,) = self.select(
            "SELECT avg(r.forward_passes) AS forward, avg(r.backward_passes) AS backward, "
            "1000 * avg(r.seconds) AS ms_per_image, count(r.error) AS failed, "
            "avg(r.flipped) FILTER (WHERE predicted = explained) AS flipped, "
            "nullif(count(r.flipped) FILTER (WHERE predicted = explained), 0) AS flippable, "
            "avg(coalesce(r.decided, r.predicted) = i.label) AS accuracy "
            "FROM results r JOIN images i USING (position) WHERE r.method = ? AND r.attack = ?",
            (method, attack),
        )
        return means

    def is_defended(self) -> bool:
        """Whether a method takes images for a class of its own."""
        return self.holds("decided")

    def mean_stability(self, method: str, attack: str | None) -> dict[str, Any]:
        """``n`` and the mean of each measure of stability.

        Without an attack, the mean of each image's lowest value over all attacks.
        """
        rows = "results WHERE method = ? AND attack = ?"
        if attack is None:
            rows = (
                f"(SELECT {_LOWEST} FROM results WHERE method = ? AND attack <> ? "
                "AND spearman IS NOT NULL GROUP BY position)"
            )
        (means,) = self.select(
            f"SELECT count(spearman) AS n, {_MEANS} FROM {rows}", (method, attack or CLEAN)
        )
        return means

    def every_map(self, part: Part) -> list[dict[str, Any]]:
        """Rows of the images of some positions, see :meth:`Comparison.to_dataframe`."""
        return self.select(
            "SELECT r.position, r.image, r.method, r.attack, i.label, r.predicted, r.explained,"
            " r.confidence, r.pointing, r.seconds, r.forward_passes, r.backward_passes,"
            " coalesce(r.source, r.attack) AS source, r.decided, r.new_class, r.flipped,"
            " r.margin, a.already AS already_wrong, a.fooled, a.without_gradient,"
            f" a.linf, a.l2, {', '.join('r.' + m for m in STABILITY_MEASURES)}, r.error"
            " FROM results r JOIN images i USING (position) LEFT JOIN attacked a"
            " ON a.position = r.position AND a.attack = coalesce(r.source, r.attack)"
            " WHERE r.position >= ? AND r.position < ? ORDER BY r.position, r.attack, r.method",
            part,
        )

    def pictured(self) -> list[int]:
        """The positions of the images whose pictures are kept."""
        rows = self.select("SELECT position FROM images WHERE picture IS NOT NULL")
        return [row["position"] for row in rows]

    def right_before(self, most: int) -> list[int]:
        """The first images that were right before every plain attack, and whose pictures are kept.

        At least one, if there is any.
        """
        plain = self.plain_attacks
        rows = self.select(
            "SELECT position FROM attacked JOIN images USING (position) "
            "WHERE NOT already AND attacked.picture IS NOT NULL AND images.picture IS NOT NULL "
            f"AND attack IN ({', '.join('?' * len(plain))}) "
            "GROUP BY position HAVING count(*) = ? ORDER BY position LIMIT ?",
            (*plain, len(plain), max(1, most)),
        )
        return [row["position"] for row in rows]

    def image(self, position: int) -> dict[str, Any]:
        """The row of an image; its boxes M×4 in fractions of width and height."""
        (row,) = self.select("SELECT * FROM images WHERE position = ?", (position,))
        return row | {"boxes": json.loads(row["boxes"]) if row["boxes"] else []}

    def attacked(self, position: int) -> dict[str, dict[str, Any]]:
        """The rows of an image under each attack."""
        rows = self.select("SELECT * FROM attacked WHERE position = ?", (position,))
        return {row["attack"]: row for row in rows}

    def maps(self, position: int, attack: str) -> dict[str, dict[str, Any]]:
        """The kept map of each method, with what the method changed."""
        rows = self.select(
            "SELECT method, heat, perturbation, amplification, predicted, explained, new_class, "
            "flipped FROM results WHERE position = ? AND attack = ? AND heat IS NOT NULL "
            f"AND method IN ({', '.join('?' * len(self.methods))})",
            (position, attack, *self.methods),
        )
        return {row["method"]: row for row in rows}


def attacked_rows(store: RunStore, attack: str) -> list[dict[str, Any]]:
    """What an attack did to each image of a run, in their order."""
    rows = store.select(
        "SELECT a.already, a.fooled, a.linf, a.l2, a.without_gradient, a.skipped, a.error, "
        "i.label, a.predicted <> a.label AS lost FROM attacked a JOIN images i USING (position) "
        "WHERE a.attack = ? AND i.error IS NULL ORDER BY position",
        (attack,),
    )
    return list(rows)
