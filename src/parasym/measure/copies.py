"""Units whose weights are zero, or equal to those of another unit up to what the unit's activation allows.

Weights are read in parts: of each unit its norm and a random sketch are kept, and only units whose sketches agree are compared
exactly, so that a layer of any size takes one pass over its weights.

Source: stochastic-collapse R7 (zero and duplicate neurons).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parasym.measure.findings import LISTED, Row, Thresholds, finding
from parasym.measure.slices import CHUNK, Read, Rows, parts
from parasym.measure.units import Layer
from parasym.symmetry.dictionary import Entry

_SKETCH, _EXACT = 64, 256  # numbers in a sketch; width up to which rows are their own sketch

Stored = tuple[Rows, int, Tensor]
"""A tensor, an axis, and (n, m) positions along it: unit i is made of the entries at[i]."""


@dataclass(frozen=True)
class Block:
    """One tensor's share in the weights of n units: a matrix with a row for each, read when it is needed.

    Attributes:
        stored: where the rows lie.
        square, sketch: (n,) squared norms of the rows and (n, k) random projections, as stored.
        scale: (n,) factors of the rows.
    """

    stored: Stored
    square: Tensor
    sketch: Tensor
    scale: Tensor

    @property
    def width(self) -> int:
        """Numbers in one row."""
        return _width(self.stored)

    def scaled(self, factor: Tensor) -> Block:
        """Rows times a factor, (n,) or one for all."""
        return replace(self, scale=self.scale * factor)

    def rows(self, units: Tensor) -> Tensor:
        """(k, width) rows of some units, in float64."""
        values, axis, at = self.stored
        out = torch.empty(len(units), at.shape[1], self.width // at.shape[1], dtype=torch.float64)
        for part, rest, which in parts(values, axis, at[units].T):
            out[which, :, rest] = part.permute(2, 1, 0).to(torch.float64)
        return out.flatten(1) * self.scale[units, None]


def _width(stored: Stored) -> int:
    values, axis, at = stored
    return at.shape[1] * (values.shape.numel() // values.shape[axis])


def _blocks(stored: Sequence[Stored]) -> list[Block]:
    """Blocks side by side whose sketches add up to a sketch of the whole rows, in one pass."""
    widths = [_width(s) for s in stored]
    total, out = sum(widths), []
    for k, (values, axis, at) in enumerate(stored):
        if total <= _EXACT:
            directions = torch.eye(total, dtype=torch.float32)[sum(widths[:k]) : sum(widths[: k + 1])]
        else:
            directions = torch.randn(widths[k], _SKETCH, generator=torch.Generator().manual_seed(k), dtype=torch.float32) / math.sqrt(
                _SKETCH
            )
        by_place = directions.reshape(at.shape[1], -1, directions.shape[1])
        square, sketch = torch.zeros(len(at), dtype=torch.float64), torch.zeros(len(at), directions.shape[1], dtype=torch.float32)
        for part, rest, which in parts(values, axis, at.T):
            rows = part.permute(2, 1, 0).flatten(1)
            square[which] += rows.to(torch.float64).square().sum(1)
            sketch[which] += rows.float() @ by_place[:, rest].flatten(0, 1)
        out.append(Block((values, axis, at), square, sketch, torch.ones(len(at), dtype=torch.float64)))
    return out


@dataclass
class Blocks:
    """Weights of units, free of the units' rescaling where they have one.

    Attributes:
        inside, outside: in- and out-weights.
        raw: (n, blocks) norms of the slices of each parameter before that.
        signs: joint signs, one for each block of ``inside`` and one for ``outside``, under which two units are still the same.
        lost: parameters that one unit owns.
    """

    inside: list[Block]
    outside: list[Block]
    raw: Tensor
    signs: tuple[tuple[tuple[int, ...], int], ...] = ()
    lost: int = 0

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.raw)


def _as_stored(inside: Sequence[Stored], outside: Sequence[Stored]) -> Blocks:
    found = _blocks([*inside, *outside])
    raw = torch.stack([b.square.sqrt() for b in found], 1)
    return Blocks(found[: len(inside)], found[len(inside) :], raw, lost=sum(b.width for b in found))


def raw_blocks(layer: Layer, read: Read) -> Blocks | None:
    """Slices of the parameters as they are; None where units do not show in the weights."""
    if not layer.rows:
        return None
    inside = [(read(p), axis, at) for p, (axis, at) in layer.rows.items()]
    return _as_stored(inside, [(read(u.reader.weight), u.reader.in_axis, u.columns) for u in layer.uses])


def unit_blocks(layer: Layer, read: Read) -> Blocks | None:
    """The same modulo rescaling and sign, where the activation and the way to it allow."""
    raw = raw_blocks(layer, read)
    if raw is None or layer.effective is None:
        return raw
    every, power = torch.arange(layer.size)[:, None], torch.ones(layer.size, dtype=torch.float64)
    factors = [
        torch.ones(layer.size, dtype=torch.float64) if p is None else 1 / rows.norm(dim=1).clamp(min=1e-300)
        for rows, p in zip(layer.effective, layer.powers, strict=True)
    ]
    for factor, p in zip(factors, layer.powers, strict=True):
        power = power if p is None else power * factor**-p
    known = {r.weight for r in layer.writers} | {v for g in layer.regions for s in g.sources for v in s.vectors}
    slopes = [b.stored for (p, _), b in zip(layer.rows.items(), raw.inside, strict=True) if p not in known]  # of the activation
    inside: list[Stored] = [*((rows, 0, every) for rows in layer.effective), *slopes]
    found = _as_stored(inside, [b.stored for b in raw.outside])
    signs = []
    for flips in itertools.product((False, True), repeat=len(layer.signs) if len(layer.signs) <= 3 else 0):
        if any(flips) and all(s for f, s in zip(flips, layer.signs, strict=True) if f):
            still = (1,) * len(slopes)
            signs.append(((*(-1 if f else 1 for f in flips), *still), math.prod(s for f, s in zip(flips, layer.signs, strict=True) if f)))
    scaled = [b.scaled(f) for b, f in zip(found.inside, factors, strict=False)]
    outside = [b.scaled(power) for b in found.outside]
    return Blocks([*scaled, *found.inside[len(scaled) :]], outside, raw.raw, tuple(signs), raw.lost)


def zero_units(blocks: Blocks, t: Thresholds) -> tuple[list[int], list[float]]:
    """Units whose slices of every parameter vanish beside the largest of their layer."""
    top = blocks.raw.amax(0)
    share = (blocks.raw / top.clamp(min=1e-300))[:, top > 0].amax(1) if bool((top > 0).any()) else blocks.raw.new_zeros(blocks.count)
    units = (share <= t.zero).nonzero().flatten().tolist()
    return units, share[units].tolist()


def nearest(rows: Tensor, signs: Sequence[Tensor], tolerance: float) -> tuple[Tensor, Tensor]:
    """For each row the nearest earlier one within a tolerance, up to the given signs of its columns.

    Rows are compared through a random sketch first (64 numbers each keep distances within a few tens of percent) and the
    candidates exactly, so that n wide units take n^2 * 64 operations in blocks of bounded memory.

    Returns:
        (n,) index of the partner, -1 for none, and (n,) distances sqrt(2) |u_i - s u_j| / sqrt(|u_i|^2 + |u_j|^2).
    """
    every = torch.arange(len(rows))[:, None]
    turned = [_blocks([(rows * s, 0, every)])[0].sketch for s in signs]
    small = _blocks([(rows, 0, every)])[0].sketch
    return _nearest(small, turned, lambda s, i, j: (rows[i], rows[j] * signs[s]), rows.shape[1], tolerance)


def _nearest(
    small: Tensor, turned: Sequence[Tensor], fetch: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]], width: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """As :func:`nearest`, from sketches (those of the earlier rows under each sign) and a function that gives pairs of exact rows."""
    n, step = len(small), max(1, CHUNK // (2 * width))
    partner, best = torch.full((n,), -1), torch.full((n,), math.inf, dtype=torch.float64)
    for s, other in enumerate(turned):
        i, j = candidates(small, other, max(8 * tolerance**2, 1e-5))
        found = [best.new_zeros(0)]
        for a, b in zip(i.split(step), j.split(step), strict=True):
            x, y = fetch(s, a, b) if len(a) else (best.new_zeros(0, 1),) * 2
            found.append(math.sqrt(2) * (x - y).norm(dim=1) / (x.square().sum(1) + y.square().sum(1)).sqrt().clamp(min=1e-300))
        exact = torch.cat(found)
        order = exact.argsort(descending=True, stable=True)  # of several entries for one index the last, the nearest, stays
        i, j, exact = i[order], j[order], exact[order]
        better = exact < best[i]
        best[i[better]], partner[i[better]] = exact[better], j[better]
    partner[best > tolerance] = -1
    return partner, best


def candidates(small: Tensor, turned: Tensor, bar: float) -> tuple[Tensor, Tensor]:
    """Pairs (i, j), j < i, whose squared relative distance is below a bar; where they are very many, the nearest j of each i."""
    n, size, found = len(small), small.square().sum(1), list[Tensor]()
    step = max(1, CHUNK // n)
    for at in range(0, n, step):
        end = min(at + step, n)
        gap = small[at:end] @ turned[:end].T
        total = (size[at:end, None] + size[None, :end]).clamp_(min=1e-30)
        gap.mul_(-2).div_(total).add_(1)  # |x - y|^2 / (|x|^2 + |y|^2)
        gap[:, at:end].masked_fill_(torch.ones(end - at, end - at, dtype=torch.bool).triu_(), math.inf)
        hits = (gap <= bar).nonzero()
        if len(hits) > 8 * (end - at):
            near, j = gap.min(1)
            hits = torch.stack([torch.arange(end - at), j], 1)[near <= bar]
        found.append(hits + torch.tensor([at, 0]))
    pairs = torch.cat(found)
    return pairs[:, 0], pairs[:, 1]


def _groups(partner: Tensor) -> dict[int, list[int]]:
    """Representative -> the others, from each unit's earlier partner."""
    lead: dict[int, int] = {}
    for i, j in enumerate(partner.tolist()):
        lead[i] = i if j < 0 else lead[j]
    out: dict[int, list[int]] = {}
    for i, j in lead.items():
        if i != j:
            out.setdefault(j, []).append(i)
    return out


def alike(blocks: Blocks, t: Thresholds, skip: set[int]) -> tuple[dict[int, list[int]], dict[int, list[int]], dict[int, float]]:
    """Groups equal in in- and out-weights, further groups equal in in-weights alone, and each member's distance."""
    keep = torch.tensor([j for j in range(blocks.count) if j not in skip], dtype=torch.long)
    distance: dict[int, float] = {}
    found: list[dict[int, list[int]]] = []
    if len(keep) < 2 or not blocks.inside:
        return {}, {}, distance
    taken: set[int] = set()
    for outside, tolerance in ((blocks.outside, t.duplicate), ([], t.copy)):
        if outside or tolerance == t.copy:
            signs = [(*each, *(out for _ in outside)) for each, out in (((1,) * len(blocks.inside), 1), *blocks.signs)]
            partner, gap = _partners([*blocks.inside, *outside], signs, keep, tolerance)
            groups = {int(keep[k]): [int(keep[v]) for v in vs if int(keep[v]) not in taken] for k, vs in _groups(partner).items()}
            groups = {k: v for k, v in groups.items() if v}
            distance |= {int(keep[i]): float(gap[i]) for i in range(len(keep)) if math.isfinite(gap[i]) and int(keep[i]) not in distance}
            taken |= {x for v in groups.values() for x in v}
            found.append(groups)
        else:
            found.append({})
    return found[0], found[1], distance


def _partners(blocks: Sequence[Block], signs: Sequence[tuple[int, ...]], keep: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """For each kept unit the nearest earlier one; no block outweighs another: each is divided by the root mean square norm of its rows."""
    size = [(b.square * b.scale.square())[keep].mean().sqrt().clamp(min=1e-300) for b in blocks]
    even = [b.scaled(1 / s) for b, s in zip(blocks, size, strict=True)]
    sketches = [(b.sketch * b.scale[:, None])[keep].float() for b in even]
    turned = [sum((x * s for x, s in zip(sketches, sign, strict=True)), torch.zeros(())) for sign in signs]

    def fetch(s: int, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        units, at = torch.cat([i, j]).unique(return_inverse=True)
        rows = [b.rows(keep[units]) for b in even]
        turn = [x * r for x, r in zip(signs[s], rows, strict=True)]
        return torch.cat(rows, 1)[at[: len(i)]], torch.cat(turn, 1)[at[len(i) :]]

    return _nearest(turned[0], turned, fetch, sum(b.width for b in blocks), tolerance)


def weight_rows(where: str, blocks: Blocks, parameters: Sequence[str], t: Thresholds) -> list[Row]:
    """Zero units and duplicates from weights alone."""
    rows, size = [], blocks.count
    zero, share = zero_units(blocks, t)
    if zero:
        rows.append(
            finding(
                "dead",
                where,
                zero,
                size,
                share,
                len(zero) * blocks.lost,
                f"zero units: in- and out-weights below {t.zero:g} of the layer's largest; weights only, nothing was run",
                parameters,
            )
        )
    same, copies, distance = alike(blocks, t, set(zero))
    for groups, what in (
        (same, "in- and out-weights equal"),
        (copies, "in-weights equal, out-weights differ: one feature computed several times"),
    ):
        others = sorted(x for v in groups.values() for x in v)
        if others:
            note = f"{what}, copies of {some(groups)}; weights only, nothing was run"
            row = finding("duplicate", where, others, size, [distance.get(x) for x in others], len(others) * blocks.lost, note, parameters)
            rows.append({**row, "groups": listed(groups)})
    return rows


def listed(groups: Mapping[int, Sequence[int]]) -> list[list[int]]:
    """Some of the sets of like units, each with its representative first."""
    return [[k, *groups[k]][:LISTED] for k in sorted(groups)[:8]]


def some(groups: Mapping[int, Sequence[int]]) -> str:
    """The representatives, in words."""
    heads = sorted(groups)
    return ", ".join(f"unit {h}" for h in heads[:8]) + (f" and {len(heads) - 8} more" if len(heads) > 8 else "")


def rescaled(layer: Layer, blocks: Blocks, e: Entry | None) -> Blocks:
    """Blocks of a layer, normalised by a rescaling family of its units."""
    if e is None or any(t.op not in ("mode", "dual") or t.gain is not None for _, t in e.terms):
        return blocks
    power = {t.place.parameter: w if t.op == "mode" else -w for w, t in e.terms}
    names = [*layer.rows, *(u.reader.weight for u in layer.uses)]
    powers = [power.get(n, 0.0) for n in names]
    return blocks if len(set(names)) < len(names) else _normalised(blocks, powers)


def scale_blocks(e: Entry, read: Read) -> Blocks | None:
    """Units of a rescaling family, normalised by it: terms of positive weight are in-weights, of negative weight out-weights."""
    if any(t.op not in ("mode", "dual") or t.gain is not None for _, t in e.terms):
        return None
    signed = [(w if t.op == "mode" else -w, t) for w, t in e.terms]
    sides = [[(w, t) for w, t in signed if (w > 0) == up] for up in (True, False)]
    if not sides[0] or not sides[1] or any(t.place.index.shape[0] != e.size for _, t in signed):
        return None
    inside, outside = ([(read(t.place.parameter), t.place.axis, t.place.index) for _, t in side] for side in sides)
    return _normalised(_as_stored(inside, outside), [w for side in sides for w, _ in side])


def _normalised(blocks: Blocks, powers: Sequence[float]) -> Blocks:
    """Units rescaled so that what scales with the highest power has norm one; powers one for each block."""
    every, lead = [*blocks.inside, *blocks.outside], max(powers)
    if lead <= 0:
        return blocks
    scale = sum((b.square for b, p in zip(every, powers, strict=True) if p == lead), torch.zeros(())).sqrt().clamp(min=1e-300)
    every = [b.scaled(scale ** (-p / lead)) for b, p in zip(every, powers, strict=True)]
    return replace(blocks, inside=every[: len(blocks.inside)], outside=every[len(blocks.inside) :])
