"""Units whose output is an affine combination of other units' outputs: dead (of none), copies (of one), linearised (of several).

A unit that nobody reads, one that is constant, one that repeats another up to scale and shift, and one that acts as a linear map its
neighbours already carry are the same case: h_j = sum_i C_ji h_i + c_j on all data, so that its readers can do without it. Relations are
found on the given data, fresh data of the same kind, and data of many amplitudes; each is then tried on draws of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parasym.core.samples import Batch, draw
from parasym.measure.activity import out_axis, unit_samples
from parasym.measure.copies import nearest
from parasym.measure.judge import Judge, Runner
from parasym.measure.units import Use
from parasym.methods.units import Place, Units
from parasym.symmetry.symmetry import Params

_COLUMNS = 4096  # numbers kept of each unit to look for relations,
_ROOM = 1 << 26  # and of all units together
_COMPARED = 3  # samples on which a unit must be active to be compared with others; two that are on once look alike
_TOL = 1e-9  # relative residual of a relation
_DRAWN, _SHOWN = 256, 1 << 22  # fresh batches of each kind at most, and activations of them
_FAR = 100.0  # times the amplitude of wide inputs


@dataclass
class Features:
    """Outputs of the units of one index space over all data, reader by reader.

    Attributes:
        low, high: (n, m) range, one for each use.
        rows: (n, m, samples) parts; samples are drawn once for all units.
    """

    low: list[Tensor]
    high: list[Tensor]
    rows: list[list[Tensor]]

    def matrix(self) -> tuple[Tensor, list[Tensor]]:
        """(n, k) centred outputs side by side, each use and inner entry centred on its own, and the (n, m) means."""
        joined = [torch.cat(parts, 2) for parts in self.rows]
        means = [r.mean(2) for r in joined]
        centred = [r - c[:, :, None] for r, c in zip(joined, means, strict=True)]
        return torch.cat([r.flatten(1) for r in centred], 1), means


@dataclass
class Relations:
    """What each redundant unit is made of.

    Attributes:
        parts: unit -> {other unit: coefficient}; empty for a constant or unread unit.
        shifts: unit -> its constant for each use, (m,).
        kind: unit -> "dead" | "unread" | "duplicate" | "linear".
    """

    parts: dict[int, dict[int, float]] = field(default_factory=dict)
    shifts: dict[int, list[Tensor]] = field(default_factory=dict)
    kind: dict[int, str] = field(default_factory=dict)

    def only(self, units: Sequence[int]) -> Relations:
        """Some of them."""
        keep = set(units)
        return Relations(*({k: v for k, v in d.items() if k in keep} for d in (self.parts, self.shifts, self.kind)))  # type: ignore[arg-type]


def sources(runner: Runner, given: Sequence[Batch], generator: torch.Generator, trust_inputs: bool) -> list[Batch]:
    """The given data; unless these are all the model will ever see, also fresh ones of their kind, of many amplitudes, and from afar.

    From afar a ReLU whose bias is many times the size of the usual input shows that it can be switched on (or off). Small networks are
    shown many batches: a unit that is switched on once in a thousand samples is not dead.
    """
    if trust_inputs:
        return list(given)
    out = list(given)
    for _ in range(max(1, min(_DRAWN, _SHOWN // max(1, runner.numbers)))):
        wide = draw(runner.graph, given[0], generator, wide=True)
        far = [[f * t if t.is_floating_point() else t for t in wide] for f in (_FAR, -_FAR)]
        out += [draw(runner.graph, given[0], generator), wide, *far]
    return out


def observe_units(
    runner: Runner, params: Params, batches: Sequence[Batch], spaces: Sequence[Units], seed: int = 0, compared: int = 1 << 30
) -> list[Features]:
    """Pass all data once and keep the range of what the units put out, and of the first ``compared`` batches what to compare."""
    found = [Features([], [], [[] for _ in u.uses]) for u in spaces]
    columns = min(_COLUMNS, max(64, _ROOM // max(1, sum(u.size * len(u.uses) for u in spaces))))
    share = max(1, columns // max(1, min(compared, len(batches))))

    def take(units: Units, features: Features, k: int, use: Use, number: int, live: Mapping[str, Any]) -> None:
        x = live[use.operand]
        rows = unit_samples(x, out_axis(use.reader, runner.graph, x.dim()))[use.columns]  # (n, m, samples)
        low, high = rows.amin(2), rows.amax(2)
        if len(features.low) <= k:
            features.low.append(low)
            features.high.append(high)
        else:
            features.low[k], features.high[k] = torch.minimum(features.low[k], low), torch.maximum(features.high[k], high)
        if number >= compared:
            return
        wanted = max(8, share // max(1, rows.shape[1]))
        if rows.shape[2] > wanted:
            stream = torch.Generator().manual_seed(seed + 1000 * number + k)
            rows = rows[:, :, torch.randperm(rows.shape[2], generator=stream)[:wanted]]
        features.rows[k].append(rows.clone())

    for number, batch in enumerate(batches):
        watch = [
            ((use.operand,), partial(take, u, f, k, use, number))
            for u, f in zip(spaces, found, strict=True)
            for k, use in enumerate(u.uses)
        ]
        runner.run(params, runner.graph.prepare(batch), watch)
    return found


def relations(units: Units, features: Features, params: Params) -> Relations:
    """The redundant units of one index space; units that others are made of are never among them."""
    out = Relations()
    rows, means = features.matrix()
    spread = torch.stack([(h - low).amax(1) for h, low in zip(features.high, features.low, strict=True)]).amax(0)
    typical = float(spread[spread > 0].median()) if bool((spread > 0).any()) else 1.0
    heard = torch.stack([_columns(params[u.reader.weight], u).abs().amax(1) for u in units.uses]).amax(0)
    unread, still = heard == 0, spread <= _TOL * typical
    for j in unread.nonzero().flatten().tolist():
        _enter(out, j, "unread", {}, [torch.zeros_like(c[j]) for c in means])
    for j in (still & ~unread).nonzero().flatten().tolist():
        _enter(out, j, "dead", {}, [c[j] for c in means])
    active = _active(rows)
    alive = (~(unread | still) & (active >= _COMPARED)).nonzero().flatten()
    if len(alive) < 2:
        return out
    size = rows[alive].norm(dim=1)
    unit = rows[alive] / size.clamp(min=1e-300)[:, None]
    partner, _ = nearest(unit, [torch.ones(unit.shape[1]), -torch.ones(unit.shape[1])], _TOL)
    lead = list(range(len(alive)))
    for k, j in enumerate(partner.tolist()):
        if j >= 0:
            lead[k] = lead[j]
            a, b = int(alive[k]), int(alive[lead[k]])
            ratio = float(rows[a] @ rows[b] / rows[b].square().sum())
            _enter(out, a, "duplicate", {b: ratio}, [c[a] - ratio * c[b] for c in means])
    rest = torch.tensor([j for j in alive.tolist() if j not in out.parts], dtype=torch.long)
    rest = rest[active[rest] > len(rest)]
    if rows.shape[1] >= 3 * len(rest) and len(rest) > 1:
        _dependent(out, rest, rows, means)
    return out


def _active(rows: Tensor) -> Tensor:
    """(n,) on how many of the kept samples a unit leaves its resting value, the one end of its range where it is most of the time."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    slack = _TOL * (high - low)
    return rows.shape[1] - torch.maximum((rows <= low + slack).sum(1), (rows >= high - slack).sum(1))


def _enter(out: Relations, j: int, kind: str, parts: dict[int, float], shifts: list[Tensor]) -> None:
    out.parts[j], out.kind[j], out.shifts[j] = parts, kind, shifts


def _dependent(out: Relations, rest: Tensor, rows: Tensor, means: list[Tensor]) -> None:
    """Units whose outputs depend linearly on those of others, by a QR factorisation with pivots."""
    import scipy.linalg

    size = rows[rest].norm(dim=1)
    unit = (rows[rest] / size[:, None]).numpy()
    _, r, order = scipy.linalg.qr(unit.T, mode="economic", pivoting=True)
    diagonal = abs(r.diagonal())
    rank = int((diagonal > _TOL * diagonal[0]).sum())
    if rank == len(rest):
        return
    coefficients = scipy.linalg.solve_triangular(r[:rank, :rank], r[:rank, rank:])
    for column, at in enumerate(order[rank:]):
        j = int(rest[at])
        parts = {}
        for row, other in enumerate(order[:rank]):
            i, c = int(rest[other]), float(coefficients[row, column] * size[at] / size[other])
            if abs(coefficients[row, column]) > 1e-8:
                parts[i] = c
        _enter(out, j, "linear", parts, [m[j] - sum((c * m[i] for i, c in parts.items()), torch.zeros_like(m[j])) for m in means])


def _columns(W: Tensor, use: Use) -> Tensor:
    """(n, m * out...) what reads each unit."""
    return W.movedim(use.reader.in_axis, 0)[use.columns].flatten(1)


def without(units: Units, relations: Relations, params: Params, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New weights of the readers: columns of redundant units go to the units they are made of, constants to the bias; theirs are zero."""
    out = dict(changed)
    if not relations.parts:
        return out
    gone = list(relations.parts)
    mix = torch.zeros(len(gone), units.size, dtype=torch.float64)
    for row, j in enumerate(gone):
        for i, c in relations.parts[j].items():
            mix[row, i] = c
    for k, use in enumerate(units.uses):
        r = use.reader
        W = out.get(r.weight, params[r.weight]).clone()
        moved = W.movedim((r.in_axis, r.out_axis), (0, 1))  # a view
        taken = moved[use.columns[gone]]  # (g, m, out, ...)
        shift = torch.stack([relations.shifts[j][k] for j in gone])  # (g, m)
        total = torch.einsum("gmos,gm->o", taken.flatten(3) if taken.dim() > 3 else taken[..., None], shift)
        fed = mix.abs().sum(0).nonzero().flatten()
        if len(fed):
            extra = torch.einsum("gn,gmx->nmx", mix[:, fed], taken.flatten(2)).unflatten(2, taken.shape[2:])
            moved[use.columns[fed]] += extra
        moved[use.columns[gone]] = 0
        out[r.weight] = W
        if r.bias is not None and params[r.bias].numel() == len(total) and bool(total.any()):
            b = out.get(r.bias, params[r.bias])
            out[r.bias] = b + total.reshape(b.shape)
    return out


def exact(units: Units, found: Relations, judge: Judge, bar: float) -> Relations:
    """The relations that hold on the judge's data: all at once where that works, else by halves."""

    def works(part: list[int]) -> bool:
        return min(judge.digits(without(units, found.only(part), judge.params, {}))) >= bar

    def good(part: list[int]) -> list[int]:
        if not part:
            return []
        if works(part):
            return part
        if len(part) == 1:
            return []
        half = len(part) // 2
        return good(part[:half]) + good(part[half:])

    easy = [j for j in found.parts if not any(bool(s.any()) for s in found.shifts[j]) and len(found.parts[j]) < 2]
    hard = [j for j in found.parts if j not in set(easy)]
    kept = good(easy) + good(hard)
    return found.only(kept if not kept or works(kept) else _one_by_one(kept, works))


def _one_by_one(units: list[int], works: Any) -> list[int]:
    kept: list[int] = []
    for j in units:
        if works([*kept, j]):
            kept.append(j)
    return kept


@dataclass(frozen=True)
class Join:
    """Rows of a tensor whose gradients join those of other rows: row ``target`` += ratio * row ``source``, all 1-d."""

    axis: int
    target: Tensor
    source: Tensor
    ratio: Tensor

    def add(self, value: Tensor, magnitude: bool = False) -> Tensor:
        """The tensor with the rows joined; ``magnitude``: by the size of the ratio."""
        rows = value.movedim(self.axis, 0)
        ratio = (self.ratio.abs() if magnitude else self.ratio).to(value).reshape(-1, *[1] * (rows.dim() - 1))
        extra = rows[self.source.to(value.device)] * ratio
        return rows.index_add(0, self.target.to(value.device), extra).movedim(0, self.axis)


def pulled(places: Sequence[Place], relations: Relations, tensors: Mapping[str, Tensor]) -> dict[str, list[Join]]:
    """How gradients of cut units join those of the units that stand for them, tensor by tensor.

    The row of a copy is a multiple s of its representative's row, so by the chain rule s times its gradient is added.
    """
    pairs = [(i, j, c, len(parts) == 1) for j, parts in relations.parts.items() for i, c in parts.items()]
    out: dict[str, list[Join]] = {}
    if not pairs:
        return out
    lead, gone = torch.tensor([p[0] for p in pairs]), torch.tensor([p[1] for p in pairs])
    given, single = torch.tensor([p[2] for p in pairs], dtype=torch.float64), torch.tensor([p[3] for p in pairs])
    for t, axis, at in places:
        rows = tensors[t].detach().double().movedim(axis, 0)
        one, two = (rows[at[k]].reshape(len(pairs), -1) for k in (lead, gone))
        square = one.square().sum(1)
        ratio = torch.where(single & (square > 0), (one * two).sum(1) / square.clamp(min=1e-300), given)
        join = Join(axis, at[lead].reshape(-1), at[gone].reshape(-1), ratio.repeat_interleave(at.shape[1]))
        out.setdefault(t, []).append(join)
    return out
