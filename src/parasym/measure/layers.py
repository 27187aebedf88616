"""Collapsed units of one layer on data: dead, zero, affine, copies; each removed from a copy of the weights and measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parasym.measure.activity import out_axis, replay, unit_samples
from parasym.measure.copies import Blocks, alike, listed, some, unit_blocks, zero_units
from parasym.measure.findings import EXACT, LISTED, Row, Thresholds, exact_first, finding, judged
from parasym.measure.judge import Judge, Swap
from parasym.measure.units import Layer, Region, Use
from parasym.symmetry.symmetry import Params

_MIN_SAMPLES = 16


def layer_rows(layer: Layer, params: Params, judge: Judge, t: Thresholds, gone: set[tuple[str, int]]) -> list[Row]:
    """Zero, dead, affine and equal units of one layer.

    Args:
        gone: (node, unit) of channels that a norm has already made constant.
    """
    m = layer.moments
    if m is None:
        return []
    blocks = unit_blocks(layer, params.__getitem__)
    path = {n.name for g in layer.regions for s in g.sources for n in s.path}
    known = {u for node, u in gone if node in path}
    zero, share = zero_units(blocks, t) if blocks is not None and layer.uses else ([], [])
    spread = m.spread
    typical = float(spread[spread > 0].median()) if bool((spread > 0).any()) else 1.0
    relative = spread / typical
    idle = [j for j in (relative <= t.dead).nonzero().flatten().tolist() if m.count >= 2]
    dead = [j for j in idle if j not in known and j not in set(zero)]
    rows = []
    lost = blocks.lost if blocks is not None and layer.private else sum(u.owned(params) for u in layer.uses)
    if zero:
        note = f"zero units: in- and out-weights below {t.zero:g} of the layer's largest"
        rows.append(
            _remove(layer, params, judge, finding("dead", layer.where, zero, layer.size, share, len(zero) * lost, note, layer.parameters))
        )
    always = (layer.wider or m).spread / typical <= t.dead
    steady = exact_first([j for j in dead if always[j]], relative)
    groups = [*((part, "and on fresh data") for part in steady), ([j for j in dead if not always[j]], "but not on fresh data")]
    for units, also in groups:
        if not units:
            continue
        margin = _margin(layer, judge, units, typical, t)
        note = f"output constant on {m.count} samples x tokens x places (range below {t.dead:g} of the layer's median) {also}"
        row = finding(
            "dead",
            layer.where,
            units,
            layer.size,
            relative[units].tolist(),
            len(units) * lost,
            note,
            layer.parameters,
            margin=margin[:LISTED],
        )
        known_margins = [abs(x) for x in margin if x is not None]
        if known_margins:
            row["note"] += f"; alive again if the pre-activation shifts by {min(known_margins):.2g} or more of its standard deviations"
        rows.append(_remove(layer, params, judge, row))
    quiet = set(idle) | set(zero) | known
    rows += _affine_rows(layer, judge, quiet, t)
    if blocks is not None:
        rows += _copy_rows(layer, params, judge, blocks, quiet, lost, t)
    return [{**r, "axis": layer.axis} for r in rows]


def _remove(layer: Layer, params: Params, judge: Judge, row: Row) -> Row:
    """Take units out: out-weights zeroed, their mean folded into the next bias; then in-weights zeroed too where only they use them."""
    units = row["_all"]
    if not layer.uses:
        row["note"] += "; not removed: no contraction reads these units alone"
        row["parameters_lost"] = 0
        return row
    changed = fold(layer.uses, units, params, judge)
    full = (-1.0, -1.0)
    if layer.private:
        full = judge.digits(_blank(layer, units, params, changed))
        if min(full) >= EXACT:
            return judged(row, full, "all their weights zeroed and the constant folded")
    figures = judge.digits(changed)
    if min(full) >= min(figures):
        return judged(row, full, "all their weights zeroed and the constant folded")
    row["parameters_lost"] = len(units) * sum(u.owned(params) for u in layer.uses)
    return judged(row, figures, "out-weights zeroed and the constant folded")


def _blank(layer: Layer, units: Sequence[int], params: Params, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zero the in-side of some units too."""
    out = dict(changed)
    for p, (axis, at) in layer.rows.items():
        q = out.get(p, params[p]).clone()
        q.movedim(axis, 0)[at[list(units)].reshape(-1)] = 0
        out[p] = q
    return out


def fold(uses: Sequence[Use], units: Sequence[int], params: Params, judge: Judge) -> dict[str, Tensor]:
    """Zero the columns that read some units and add what they read on average to the bias behind, where there is one."""
    means: dict[int, Tensor] = {}

    def take(k: int, use: Use, live: Mapping[str, Any]) -> None:
        x = live[use.operand]
        means[k] = unit_samples(x, out_axis(use.reader, judge.runner.graph, x.dim()))[use.columns[units].reshape(-1)].mean(1)

    judge.look([((u.operand,), partial(take, k, u)) for k, u in enumerate(uses)])
    changed: dict[str, Tensor] = {}
    for k, u in enumerate(uses):
        r = u.reader
        at = u.columns[units].reshape(-1)
        W = changed.get(r.weight, params[r.weight]).clone()
        moved = W.movedim((r.in_axis, r.out_axis), (0, 1))  # a view
        total = torch.einsum("co...,c->o", moved[at].flatten(2), means[k]) if moved.dim() > 2 else moved[at].T @ means[k]
        moved[at] = 0
        changed[r.weight] = W
        if r.bias is not None and params[r.bias].numel() == len(total):
            b = changed.get(r.bias, params[r.bias])
            changed[r.bias] = b + total.reshape(b.shape)
    return changed


def _margin(layer: Layer, judge: Judge, units: Sequence[int], typical: float, t: Thresholds) -> list[float | None]:
    """Smallest shift of the pre-activation, in its own standard deviations, after which a unit's output varies again."""
    region, graph = layer.regions[0], judge.runner.graph
    assert layer.moments is not None
    deviation = layer.moments.deviation[:, 0]
    usual = float(deviation[deviation > 0].median()) if bool((deviation > 0).any()) else 1.0
    deviation = torch.where(deviation > 1e-9 * usual, deviation, usual)[list(units)]
    best = torch.full((len(units),), math.inf, dtype=torch.float64)

    def search(live: Mapping[str, Any]) -> None:
        nonlocal best
        z = live[region.inputs[0].name]

        def alive(shift: Tensor) -> Tensor:
            moved = z.clone()
            moved.movedim(region.axis, -1)[..., list(units)] += shift * deviation
            again = replay(graph, region.nodes, live, {region.inputs[0].name: moved}, region.output.name)
            h = unit_samples(again, region.axis)[list(units)]
            return h.amax(1) - h.amin(1) > t.dead * typical

        for sign in (1.0, -1.0):
            low, high = torch.zeros(len(units), dtype=torch.float64), torch.full((len(units),), math.inf, dtype=torch.float64)
            for step in (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0):
                on = alive(torch.full_like(low, sign * step)) & torch.isinf(high)
                high[on] = step
                low[~on & torch.isinf(high)] = step
            for _ in range(8):
                middle = torch.where(torch.isinf(high), low, (low.clamp(min=1e-3) * high.clamp(min=1e-3)).sqrt())
                on = alive(sign * middle)
                high, low = torch.where(on & ~torch.isinf(high), middle, high), torch.where(on, low, middle)
            best = torch.where(high < best.abs(), sign * high, best)

    judge.look([(tuple(n.name for n in (*region.inputs, region.output)), search)])
    return [None if math.isinf(x) else float(f"{x:.3g}") for x in best.tolist()]


def _affine_rows(layer: Layer, judge: Judge, quiet: set[int], t: Thresholds) -> list[Row]:
    """Units on which the activation acts as one affine map of its inputs."""
    m = layer.moments
    assert m is not None
    if m.count < max(_MIN_SAMPLES, 4 * m.first.shape[1]):
        return []
    slope, offset, left = m.fit()
    wide = (layer.wider or m).fit()[2]
    rows = []
    kinds = (
        ("always-on", left <= t.affine, wide <= t.affine),
        ("always-on", left <= t.affine, wide > t.affine),
        ("linearised", left > t.affine, left <= t.linearised),
    )
    for k, (kind, first, second) in enumerate(kinds):
        units = [j for j in (first & second).nonzero().flatten().tolist() if j not in quiet]
        if not units:
            continue
        also = (" and on fresh data", ", but not on fresh data", "")[k]
        degree = "exactly" if kind == "always-on" else "nearly"
        worst = float(left[units].max())
        note = (
            f"the activation is {degree} one affine map on {m.count} samples x tokens x places{also} (relative residual up to {worst:.1e})"
        )
        if layer.uses and layer.writers:
            note += _merge_note(layer, len(units), judge.params)
        row = finding(kind, layer.where, units, layer.size, left[units].tolist(), 0, note, layer.parameters)
        rows.append(judged(row, judge.digits({}, _linear_swap(layer, units, slope, offset)), "activation replaced by that map"))
        rows[-1]["removable"] = False  # the map remains
    return rows


def _merge_note(layer: Layer, units: int, params: Params) -> str:
    """How many units the affine ones amount to: the rank that a linear map of these widths can have."""
    fan_in = sum(params[r.weight].shape[r.in_axis] * math.prod(params[r.weight].shape[2:]) for r in layer.writers)
    fan_out = sum(params[u.reader.weight].shape[u.reader.out_axis] * math.prod(params[u.reader.weight].shape[2:]) for u in layer.uses)
    rank = min(fan_in, fan_out)
    return f"; together they are one linear map, of rank at most {rank}" if units > rank else ""


def _linear_swap(layer: Layer, units: Sequence[int], slope: Tensor, offset: Tensor) -> Swap:
    swap, at = Swap(), list(units)
    for region in layer.regions:
        if len(region.inputs) != slope.shape[1]:
            continue

        def value(live: Mapping[str, Any], region: Region = region) -> Tensor:
            h = live[region.output.name].clone()
            parts = (live[i.name].expand(h.shape).movedim(region.axis, -1)[..., at] * slope[at, k] for k, i in enumerate(region.inputs))
            h.movedim(region.axis, -1)[..., at] = sum(parts) + offset[at]
            return h

        swap[region.output.name] = tuple(i.name for i in region.inputs), value
    return swap


def _copy_rows(layer: Layer, params: Params, judge: Judge, blocks: Blocks, quiet: set[int], lost: int, t: Thresholds) -> list[Row]:
    """Units that are equal to others, fully or in what they compute."""
    same, copies, distance = alike(blocks, t, quiet)
    rows = []
    modulo = (
        " up to the rescaling and sign of a unit"
        if layer.effective is not None and (any(p is not None for p in layer.powers) or any(layer.signs))
        else ""
    )
    for groups, what in (
        (same, f"in- and out-weights equal{modulo}: SGD keeps them equal"),
        (copies, f"in-weights equal{modulo}, out-weights differ: one feature computed several times"),
    ):
        others = sorted(x for v in groups.values() for x in v)
        if not others:
            continue
        row = finding(
            "duplicate",
            layer.where,
            others,
            layer.size,
            [distance.get(x) for x in others],
            len(others) * lost,
            f"{what}; copies of {some(groups)}",
            layer.parameters,
        )
        rows.append({**_merge(layer, groups, params, judge, row), "groups": listed(groups)})
    return rows


def _merge(layer: Layer, groups: Mapping[int, Sequence[int]], params: Params, judge: Judge, row: Row) -> Row:
    """Give the out-weights of copies to their representative, whose output explains theirs; zero the copies."""
    pairs = [(k, x) for k, v in groups.items() for x in v]
    if not layer.uses:
        row["note"] += "; not merged: no contraction reads these units alone"
        row["parameters_lost"] = 0
        return row
    fits: dict[int, tuple[Tensor, Tensor]] = {}

    def take(k: int, use: Use, live: Mapping[str, Any]) -> None:
        x = live[use.operand]
        rows = unit_samples(x, out_axis(use.reader, judge.runner.graph, x.dim()))
        a, b = (rows[use.columns[[p[i] for p in pairs]].reshape(-1)].reshape(len(pairs), -1) for i in (0, 1))
        mean_a, mean_b = a.mean(1), b.mean(1)
        a, b = a - mean_a[:, None], b - mean_b[:, None]
        slope = (a * b).sum(1) / a.square().sum(1).clamp(min=1e-300)
        offset = mean_b - slope * mean_a
        fits[k] = slope, torch.where(offset.abs() < 1e-12 * (mean_b.abs() + b.abs().amax(1)), 0.0, offset)

    judge.look([((u.operand,), partial(take, k, u)) for k, u in enumerate(layer.uses)])
    changed: dict[str, Tensor] = {}
    for k, u in enumerate(layer.uses):
        r, (slope, offset) = u.reader, fits[k]
        W = changed.get(r.weight, params[r.weight]).clone()
        moved = W.movedim((r.in_axis, r.out_axis), (0, 1))
        total = torch.zeros(moved.shape[1], dtype=W.dtype)
        for (lead, other), s, c in zip(pairs, slope.tolist(), offset.tolist(), strict=True):
            taken = moved[u.columns[other]].clone()
            moved[u.columns[lead]] += s * taken
            moved[u.columns[other]] = 0
            total += c * taken.movedim(1, 0).flatten(1).sum(1)
        changed[r.weight] = W
        if r.bias is not None and params[r.bias].numel() == len(total) and bool(total.any()):
            b = changed.get(r.bias, params[r.bias])
            changed[r.bias] = b + total.reshape(b.shape)
    if layer.private:
        changed = _blank(layer, row["_all"], params, changed)
    return judged(row, judge.digits(changed), "copies merged into one")
