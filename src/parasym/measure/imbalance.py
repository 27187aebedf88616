"""Noether charges of factors: how far out of balance the two sides of a symmetry are.

Sources: _symmetry-catalog section 0 (charges of GL and rescaling), law-of-balance (balance of factors).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from parasym.measure.findings import Row, Thresholds, common, finding
from parasym.measure.slices import Read, owners, parts
from parasym.symmetry.dictionary import Entry, by_unit


def scale_rows(entries: Sequence[Entry], read: Read, t: Thresholds) -> list[Row]:
    """Charges |w|^2 - p |v|^2 of rescaling families; those of GL come with the products of their factors."""
    rows = []
    for e in entries:
        if e.algebra == "scale" and all(x.gain is None and x.op in ("mode", "dual") for _, x in e.terms):
            both = _squares(e, read)
            if both is not None and bool(both.any(1).all()):
                rows += charge_rows(e, both[0], both[1], float((both[0] - both[1]).abs().sum() / both.sum()), t)
    return rows


def charge_rows(e: Entry, plus: Tensor, minus: Tensor, spread: float, t: Thresholds) -> list[Row]:
    """A row where the charge of some copies is large beside the sum of the same terms.

    Args:
        plus, minus: (copies,) weighted squared norms of the two sides.
        spread: charge of the whole family, relative.
    """
    total = (plus + minus).clamp(min=1e-300)
    ratio = (plus / minus.clamp(min=1e-300)).sqrt()
    off = (((ratio > t.imbalance) | (ratio < 1 / t.imbalance)) & (plus > 0) & (minus > 0)).nonzero().flatten().tolist()
    if not off:
        return []
    law, worst = "|w|^2 - |v|^2" if e.algebra == "scale" else "W W^T - V^T V", float(torch.maximum(ratio, 1 / ratio)[off].max())
    note = (
        f"charge {law} far from zero: norms of the two factors differ up to {worst:.3g} times (bar {t.imbalance:g}); relative charge "
        f"of the whole family {spread:.2f}; gradient flow conserves it, weight decay shrinks it"
    )
    return [finding("imbalance", common(e.parameters), off, len(plus), ((plus - minus).abs() / total)[off].tolist(), 0, note, e.parameters)]


def _squares(e: Entry, read: Read) -> Tensor | None:
    """(2, copies) weighted squared norms of what grows and of what shrinks; None where a place does not tell the copies apart."""
    both = torch.zeros(2, e.copies.count, dtype=torch.float64)
    for w, x in e.terms:
        place = by_unit(x.place, e.space) if e.space else x.place
        owner = owners(e.copies, place)
        if owner is None:
            return None
        across, down = owner
        weight = w if x.op == "mode" else -w
        for part, rest, which in parts(read(place.parameter), place.axis, place.index):
            square = part.to(torch.float64).square().sum(1)
            if len(down) == 1:
                at, square = across[which], square.sum(0)
            elif not bool(across.any()):
                at, square = down[rest], square.sum(1)
            else:
                at, square = (down[rest, None] + across[which]).reshape(-1), square.reshape(-1)
            both[int(weight < 0)].index_add_(0, at, abs(weight) * square)
    return both
