"""What an audit says in words: shared by the terminal table and the page."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CERTIFIED_BELOW = 1e-10
"""Largest relative change of the outputs that a certificate allows."""

MEANING = {
    "pure": "parameters of one place trade against each other; no activation moves",
    "translation": "an activation shifts by a constant, and its readers take the shift up",
    "diagonal": "each unit rescales: what comes in grows, what goes out shrinks",
    "linear": "the hidden coordinates mix, and the readers undo the mixing",
    "affine": "the hidden coordinates mix and shift, and the readers undo it",
    "discrete": "interchangeable units swap places or flip sign",
    "point": "holds only at these weights: a unit is dead, always on, or a duplicate",
    "blind": "a direction found from the Jacobian alone; it has no name yet",
}
"""What each kind of symmetry does, in one line."""


def meaning(symmetry: Mapping[str, Any]) -> str:
    """Say in one line what a symmetry does to the network.

    Args:
        symmetry: a ``Symmetry.to_dict()``.
    """
    kind, group = symmetry.get("kind", ""), str(symmetry.get("group", ""))
    if kind == "discrete" and group.startswith("S_"):
        return "interchangeable units or heads swap places"
    if kind == "discrete" and group.startswith("Z2"):
        return "units flip sign, and their readers flip it back"
    if kind == "linear" and group.startswith("GL("):
        return "any invertible mixing of the hidden coordinates, undone by the readers"
    if kind == "linear" and group.startswith(("O(", "SO(", "U(")):
        return "the hidden coordinates rotate, and the readers rotate them back"
    return MEANING.get(kind, kind)


def plain(value: Any) -> Any:
    """Return ``value`` with numbers JSON cannot hold (NaN, infinities) as None, and tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def number(value: float | None, digits: int = 2) -> str:
    """Write a number for reading: 12,345; 0.35; 3.1e-16; a dash for none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int) or float(value).is_integer():
        return f"{int(value):,}"
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.{max(digits - 1, 0)}e}"


def percent(value: float | None) -> str:
    """Write a fraction as a percentage; rounds down, so that 100 % means all."""
    return "–" if value is None else f"{math.floor(value * 1000 + 1e-9) / 10:g} %"


@dataclass(frozen=True)
class Fold:
    """Symmetries that repeat over layers, as one row.

    Attributes:
        name: the name they share.
        where: the places, layer numbers gathered in braces ("h.{0-11}.attn").
        group: their group.
        kind: their kind.
        count: how many there are.
        dim: their dimensions together.
        residual: the worst residual.
        certified: whether all of them are certified.
        meaning: what they do.
    """

    name: str
    where: str
    group: str
    kind: str
    count: int
    dim: int
    residual: float | None
    certified: bool
    meaning: str


def fold(symmetries: Iterable[Mapping[str, Any]]) -> list[Fold]:
    """Gather symmetries that differ only in the numbers of their place, in the order they first appear.

    Args:
        symmetries: ``Symmetry.to_dict()`` of each.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for symmetry in symmetries:
        shape = re.sub(r"\d+", "#", symmetry["where"])
        groups.setdefault((bare_name(symmetry), shape, symmetry["group"], symmetry["kind"], symmetry["level"]), []).append(symmetry)
    rows = []
    for (name, _, group, kind, _), members in groups.items():
        residuals = [member["residual"] for member in members]
        worst = max(residuals) if all(isinstance(value, (int, float)) for value in residuals) else None
        rows.append(
            Fold(
                name,
                gather([member["where"] for member in members]),
                group,
                kind,
                len(members),
                sum(member["dim"] for member in members),
                worst,
                all(member["certified"] for member in members),
                meaning(members[0]),
            )
        )
    return rows


def bare_name(symmetry: Mapping[str, Any]) -> str:
    """The name without the place it repeats at its end."""
    name, where = str(symmetry["name"]), str(symmetry["where"])
    return re.sub(r"(\s*[:,@]|\s+(of|in|at|on))\s*$", "", name.removesuffix(where)) or name if where else name


def gather(places: Sequence[str]) -> str:
    """Write places that differ in numbers as one pattern: ["h.0.mlp", "h.1.mlp"] -> "h.{0-1}.mlp"."""
    parts = [re.split(r"(\d+)", place) for place in places]
    if not parts or any(len(part) != len(parts[0]) for part in parts):
        return ", ".join(dict.fromkeys(places))
    pieces = []
    for column in zip(*parts, strict=True):
        values = list(dict.fromkeys(column))
        if len(values) == 1:
            pieces.append(values[0])
        elif all(value.isdigit() for value in values):
            pieces.append("{" + _ranges(sorted(map(int, values))) + "}")
        else:
            return ", ".join(dict.fromkeys(places))
    return "".join(pieces)


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for value in numbers:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def verdict(audit: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether every claim is certified and every direction explained, and that in one sentence.

    Args:
        audit: an audit's ``to_dict()``.
    """
    symmetries, complete = audit.get("symmetries") or [], audit.get("completeness") or {}
    loose = sum(not symmetry["certified"] for symmetry in symmetries)
    undecided, explained, nullity = len(audit.get("undecided") or []), complete.get("explained"), complete.get("nullity")
    gaps = []
    if loose:
        gaps.append(f"{loose} of {len(symmetries)} symmetries lack a certificate")
    if undecided:
        gaps.append(f"{undecided} {'question' if undecided == 1 else 'questions'} could not be decided")
    unclassified = (audit.get("classified") or {}).get("undecided") or 0
    if unclassified:
        gaps.append(f"{unclassified:,} {'parameter is' if unclassified == 1 else 'parameters are'} neither symmetric nor rigid for sure")
    if explained is not None and explained < 1:
        gaps.append(
            f"{percent(1 - explained) if nullity is None else number(round((1 - explained) * nullity))} free directions have no name"
        )
    if gaps:
        return False, "Open: " + "; ".join(gaps) + "."
    if explained is None:
        return True, f"All {len(symmetries)} symmetries are certified; the free directions were not counted."
    return True, f"Every one of the {number(nullity)} free directions has a name, and all {len(symmetries)} symmetries are certified."


def collapsed_units(audit: Mapping[str, Any]) -> int:
    """Units, heads or ranks that carry nothing, over all layers."""
    return sum(
        item.get("count") or 0
        for item in audit.get("collapse") or []
        if item.get("kind") in {"dead", "duplicate", "rank", "head", "norm-dead"}
    )
