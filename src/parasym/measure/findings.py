"""Rows of the audit's table of collapsed states: when a state counts, and how a row is made.

A row is a dict; keys that start with an underscore are for the measurement itself and never leave it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
LISTED = 64  # units listed in a row
EXACT = 10.0  # digits from which a removal counts as changing nothing; the bar of every certificate


@dataclass(frozen=True)
class Thresholds:
    """When a state counts as collapsed. All are relative and free of units: scaling data or weights leaves them.

    Attributes:
        dead: range of a unit's output over the data, relative to the median of its layer's units that vary.
        affine: residual of the affine fit of a unit's output, relative to its spread: exactly affine ("always-on").
        linearised: the same, affine to this accuracy.
        duplicate: sqrt(2) |u_i - u_j| / sqrt(|u_i|^2 + |u_j|^2), u the in- and out-weights (stochastic-collapse R7 without the square).
        copy: the same for in-weights alone: two units that compute one feature.
        zero: norm of in- and of out-weights, relative to the largest of the layer.
        rank: singular value of a product or stack, relative to its largest.
        head: largest singular value of a head's product, relative to the median head.
        imbalance: ratio of the norms of two factors, or its inverse.
        norm: gain of a channel, or its running standard deviation, relative to the median.
    """

    dead: float = 1e-6
    affine: float = 1e-6
    linearised: float = 1e-3
    duplicate: float = 1e-2
    copy: float = 1e-6
    zero: float = 1e-3
    rank: float = 1e-6
    head: float = 1e-3
    imbalance: float = 10.0
    norm: float = 1e-3


def finding(
    kind: str,
    where: str,
    units: Sequence[int],
    of: int,
    distance: Sequence[float | None] | None,
    lost: int,
    note: str,
    parameters: Sequence[str],
    **more: Any,
) -> Row:
    """A row of the audit's table of collapse.

    Args:
        kind, where, note, parameters: as shown.
        units, of: which units, of how many.
        distance: of each unit to its collapsed state, in the unit of :class:`Thresholds`.
        lost: parameters that the units hold.
    """
    listed = list(units)[:LISTED]
    spread = distance is not None and len(units) > LISTED
    figures: list[float | None] | None = None if distance is None else _quantiles(distance) if spread else list(distance)
    return {
        "symmetry": None,
        "where": where,
        "kind": kind,
        "count": len(units),
        "of": of,
        "units": listed,
        "distance": figures,
        "quantiles": spread,
        "parameters_lost": int(lost),
        "removable": False,
        "digits": None,
        "note": note,
        "parameters": list(parameters),
        "axis": None,
        "_all": list(units),
        "_node": "",
        **more,
    }


def exact_first(units: Sequence[int], distance: Tensor) -> list[list[int]]:
    """Units that sit on the collapsed state to machine precision, and those that are near it: what holds for the first may not for both."""
    exact = [j for j in units if float(distance[j]) <= 1e-12]
    return [part for part in (exact, [j for j in units if j not in set(exact)]) if part]


def public(row: Row) -> Row:
    """The row without what is for the measurement itself."""
    return {k: v for k, v in row.items() if not k.startswith("_")}


def _quantiles(values: Sequence[float | None]) -> list[float | None]:
    known = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    return known.quantile(torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)).tolist() if len(known) else []


def judged(row: Row, figures: tuple[float, float], what: str) -> Row:
    """Write the measured digits of a removal into a row."""
    given, fresh = figures
    row["digits"] = round(min(given, fresh), 2)
    row["removable"] = row["digits"] >= EXACT
    row["note"] += f"; {what}: {given:.1f} digits kept on the given data, {fresh:.1f} on fresh data"
    return row


def common(names: Iterable[str]) -> str:
    """Module path that parameters share; where they share none, that of the first."""
    paths = [n.split(".")[:-1] for n in names]
    first = ".".join(paths[0]) if paths else ""
    out = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        out.append(parts[0])
    return ".".join(out) or first
