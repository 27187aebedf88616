"""The point of least norm over groups that pull both ways: where every charge is zero.

Rescalings, however many share weights: sum_cells S exp(2 M lam) is convex in all lam together, S the squares of the weights summed over
the cells of entries that scale alike; Newton's method. A GL(n) between two maps: a geometric mean of matrices. Translations: least
squares. Families are taken in turn, each minimised exactly, until the norm no longer falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from torch import Tensor

from parasym.laws.charges import Charge, charge_of
from parasym.laws.equilibrium import solve_pair
from parasym.methods.orbit import Move, apply
from parasym.symmetry.dictionary import DictionaryAction, put, units
from parasym.symmetry.symmetry import Params, Symmetry

Pairs = Sequence[tuple[Symmetry, Charge]]
_RIDGE = 1e-6  # of the trace: keeps a direction that one side of a pair lacks from being scaled to zero; a balanced pair stays put
_LIMIT = 14.0  # largest lam


def two_sided(families: Iterable[Symmetry]) -> list[tuple[Symmetry, Charge]]:
    """Families whose charge can be brought to zero: something grows while something shrinks."""
    out = []
    for s in families:
        c = charge_of(s)
        if isinstance(c, Charge) and c.kind != "linear" and {b.weight > 0 for b in c.blocks} == {True, False}:
            out.append((s, c))
    return out


def imbalance(pairs: Pairs, params: Params) -> float:
    """Sum of the charges' sizes over the sum of what they compare: 0 balanced, 1 all on one side.

    Units with nothing at all on one side have no balance and do not count.
    """
    gap = total = 0.0
    for _, c in pairs:
        plus, minus = c.split(params, params)
        live = (_size(plus) > 0) & (_size(minus) > 0)
        gap += float(_size(plus - minus)[live].sum())
        total += float((_size(plus) + _size(minus))[live].sum())
    return gap / total if total else 0.0


def _size(q: Tensor) -> Tensor:
    return q.flatten(1).norm(dim=1) if q.dim() > 1 else q.abs()


def balancing(pairs: Pairs, params: Params) -> list[Move]:
    """One round: all rescalings together, then each matrix pair."""
    now, moves = dict(params), list[Move]()
    scales = [(s, c) for s, c in pairs if c.kind == "quadratic"]
    if scales:
        for (s, c), lam in zip(scales, balanced_scales([c for _, c in scales], now), strict=True):
            moves.append(Move(s.name, s.action, element(s, c, lam)))
        now = apply(moves, now)
    for s, c in pairs:
        if c.kind != "matrix":
            continue
        grow, shrink = c.split(now, now)
        ridge = _RIDGE * (grow + shrink).diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)
        floor = ridge[:, None, None] * torch.eye(c.size, dtype=torch.float64)
        moves.append(Move(s.name, s.action, element(s, c, solve_pair(shrink + floor, grow + floor))))
        now = moves[-1].act(now)
    return moves


def element(s: Symmetry, c: Charge, lam: Tensor) -> Tensor:
    """Coordinates of exp(lam A): of a matrix charge the matrices, of a GL with folded gains the diagonal."""
    assert isinstance(s.action, DictionaryAction)
    entry = s.action.entry
    if entry.algebra == "gl" and c.kind == "quadratic":
        return torch.diag_embed(lam.reshape(entry.copies.count, entry.size)).reshape(-1)
    return lam.reshape(-1)


def merged(moves: Sequence[Move], step: Sequence[Move]) -> list[Move]:
    """Moves of scale families that follow one another are one move each: they commute."""
    alike = len(moves) == len(step) and all(a.action is b.action and _scale(a) for a, b in zip(moves, step, strict=True))
    if alike:
        return [Move(a.name, a.action, a.element + b.element) for a, b in zip(moves, step, strict=True)]
    return [*moves, *step]


def _scale(m: Move) -> bool:
    return isinstance(m.action, DictionaryAction) and m.action.entry.algebra == "scale"


# ------------------------------------------------------------------------------------------------------------------ rescalings


def balanced_scales(charges: Sequence[Charge], params: Params, steps: int = 50) -> list[Tensor]:
    """lam of every rescaling at the joint minimum of the norm; zero for units with nothing on one side."""
    offsets = np.cumsum([0, *(c.count for c in charges)])
    live = torch.cat([_live(c, params) for c in charges])
    S, M = _cells(charges, params, offsets)
    M = M @ scipy.sparse.diags(live.numpy().astype(float))
    lam = np.zeros(int(offsets[-1]))
    weights = S / max(S.sum(), 1e-300)
    value = 1.0
    for _ in range(steps):
        e = weights * np.exp(2 * (M @ lam))
        g = 2 * (M.T @ e)
        if np.abs(g).max(initial=0.0) <= 1e-16:
            break
        H = (4 * (M.T @ scipy.sparse.diags(e) @ M)).tocsr()
        diagonal = H.diagonal()
        scale = 1 / np.sqrt(np.maximum(diagonal, 1e-300))
        D = scipy.sparse.diags(np.where(diagonal > 0, scale, 0.0))
        step = D @ scipy.sparse.linalg.cg(D @ H @ D, -(D @ g), rtol=1e-12, maxiter=500)[0]
        size, slope = 1.0, float(g @ step)
        while size > 1e-8:
            trial = np.clip(lam + size * step, -_LIMIT, _LIMIT)
            new = float((weights * np.exp(2 * (M @ trial))).sum())
            if new <= value + 1e-4 * size * slope or new <= value * (1 + 1e-15):
                break
            size /= 2
        else:
            break
        moved = np.abs(trial - lam).max(initial=0.0)
        lam, value = trial, new
        if moved <= 1e-15:
            break
    found = torch.tensor(lam) * live
    return [found[a:b] for a, b in pairwise(offsets)]


def _live(c: Charge, params: Params) -> Tensor:
    plus, minus = c.split(params, params)
    return (plus > 0) & (minus > 0)


def _cells(charges: Sequence[Charge], params: Params, offsets: np.ndarray) -> tuple[np.ndarray, scipy.sparse.csr_matrix]:
    """Squares summed over the entries that scale alike, (cells,), and how each cell scales, (cells, all lam)."""
    sums, rows, columns, values = list[np.ndarray](), list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    count = 0
    for name in dict.fromkeys(n for c in charges for n in c.parameters):
        p = params[name]
        key = torch.zeros(p.numel(), dtype=torch.long)
        parts = list[tuple[float, Tensor]]()
        for c, offset in zip(charges, offsets, strict=False):
            for b in c.blocks:
                if b.place.parameter != name:
                    continue
                blank = torch.full(p.shape, -1, dtype=torch.long)
                u = units(blank, b.place)
                index = put(blank, b.place, (b.copy + int(offset))[:, None, :].expand(u.shape), False).reshape(-1)
                parts.append((b.weight, index))
                if bool((index != index[0]).any()):
                    key = torch.unique(key * (int(offsets[-1]) + 1) + index + 1, return_inverse=True)[1]
        cells = int(key.max()) + 1
        sums.append(torch.bincount(key, weights=p.reshape(-1).square(), minlength=cells).numpy())
        first = torch.full((cells,), p.numel(), dtype=torch.long).scatter_reduce(0, key, torch.arange(p.numel()), "amin")
        for weight, index in parts:
            at = index[first]
            keep = (at >= 0).nonzero().flatten()
            rows.append((count + keep).numpy())
            columns.append(at[keep].numpy())
            values.append(np.full(len(keep), weight))
        count += cells
    M = scipy.sparse.coo_matrix((np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(count, int(offsets[-1])))
    return np.concatenate(sums), M.tocsr()
