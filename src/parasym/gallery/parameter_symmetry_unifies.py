"""Parameter Symmetry Potentially Unifies Deep Learning Theory (slug parameter-symmetry-unifies): three hierarchies from one mechanism.

A position paper: its hypotheses are made measurable here. Dynamics go from more to less symmetric states (linear and tanh networks from
a small start); decay and data choose the level of symmetry, that is the size of the model; layers of a trained network repeat the
pattern. Losses: |B A - T|_F^2 / 2 for linear networks (input whitened); mean square without 1/2 for tanh (R5c: with 1/2 and
gamma |theta|^2); cross-entropy on the digits with torch's weight_decay. float64 but for the digits.

Not reproduced at this size: that syre keeps the spread within classes from vanishing (R5d). On the digits the spread of the last layer
does not vanish under decay either, and syre leaves it within a few percent: `layers` enters it as refuted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.digits import cross_entropies, digits, networks
from parasym.gallery.drawings import agreement, bars, curves
from parasym.gallery.ensemble import Ensemble, plain, slope, standard_error
from parasym.laws.mirror import mirror_thresholds
from parasym.measure.hierarchy import distinct_directions, feature_rank, gram_agreement, within_over_between
from parasym.methods.syre import syre
from parasym.solvable.hierarchy import half_times, mode, modes_under_decay, overlaps, plateau_losses
from parasym.symmetry.mirror import Mirror

SLUG = "parameter-symmetry-unifies"


# ------------------------------------------------------------------------------------------------ A1: jumps of a linear network


@dataclass(frozen=True)
class StairConfig:
    """f = B A x, modes s, k hidden units, size x size; gradient descent ``eta`` from ``start`` N(0, 1).

    ``scales``: falling starts at which the loss is compared with its plateaus, half-way between two half times. The plateau losses are
    the limit of a small start: at 1e-3 the later plateaus of these modes are not flat yet (6 to 14 % off), at the last scale they are.
    """

    modes: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    size: int = 10
    hidden: int = 10
    start: float = 1e-3
    scales: tuple[float, ...] = (1e-3, 1e-4, 1e-6)
    large: float = 0.5
    eta: float = 0.01
    steps: int = 3000
    seeds: tuple[int, ...] = tuple(range(6))


def linear_runs(config: StairConfig, start: float) -> dict[str, Tensor]:
    """Modes u_i.B A v_i over steps (steps, s, modes), losses (steps, s), singular values at the same steps, and the two a0 (s, modes)."""
    draws = Ensemble(config.seeds)
    count = len(config.modes)
    left, right = (torch.linalg.qr(draws.normal(config.size, config.size))[0][..., :count] for _ in range(2))
    s = torch.tensor(config.modes, dtype=torch.float64)
    target = (left * s) @ right.mT
    a, b = start * draws.normal(config.hidden, config.size), start * draws.normal(config.size, config.hidden)
    ordered = torch.stack([overlaps(x, y, u, v) for x, y, u, v in zip(a, b, left, right, strict=True)])
    bare = (0.5 * (b.mT @ left + a @ right)).square().sum(1)
    grown, losses = [], []
    values: list[Tensor] = []
    for _ in range(config.steps):
        error = b @ a - target
        grown.append(torch.einsum("sim,sij,sjm->sm", left, b @ a, right))
        losses.append(0.5 * error.square().sum((-1, -2)))
        values.append(torch.linalg.svdvals(b @ a)[..., : count + 1] if len(values) % 10 == 0 else values[-1])
        a, b = a - config.eta * b.mT @ error, b - config.eta * error @ a.mT
    return {"modes": torch.stack(grown), "loss": torch.stack(losses), "values": torch.stack(values), "a0": ordered, "bare": bare}


def ranks_visited(values: Tensor, smallest: float) -> list[int]:
    """Numbers of singular values above half the smallest mode, in the order they appear, (steps, r)."""
    ranks = (values > 0.5 * smallest).sum(-1)
    return torch.unique_consecutive(ranks).tolist()


def plateau_runs(config: StairConfig, start: float) -> Tensor:
    """Losses half-way between the predicted half times of two modes that follow each other, (s, modes)."""
    s = torch.tensor(config.modes, dtype=torch.float64)
    times = half_times(s, linear_runs(replace(config, steps=1), start)["a0"])
    middle = 0.5 * (torch.cat([torch.zeros(len(config.seeds), 1), times], 1)[:, :-1] + times)
    at = (middle / config.eta).long().clamp(min=0)
    loss = linear_runs(replace(config, steps=int(at.max()) + 1), start)["loss"]
    return loss.gather(0, at.T).T


def stairs(config: StairConfig) -> Part:
    """A1, R1: modes are learned one by one at predicted times, the loss rests on plateaus, the rank goes 0, 1, 2, ..."""
    run = linear_runs(config, config.start)
    s = torch.tensor(config.modes, dtype=torch.float64)
    reached = config.eta * ((run["modes"] > 0.5 * s).double().argmax(0) + 1)
    predicted, plain_guess = half_times(s, run["a0"]), half_times(s, run["bare"])
    error = (reached / predicted - 1).abs()
    order = [ranks_visited(run["values"][:, i], config.modes[-1]) for i in range(len(config.seeds))]
    plateaus = plateau_losses(s)
    rests = torch.stack([plateau_runs(config, scale) for scale in config.scales])  # (scales, s, modes)
    away = (rests / plateaus[:-1] - 1).abs().amax(1)
    big = linear_runs(replace(config, steps=500), config.large)
    times = config.eta * torch.arange(1, config.steps + 1, dtype=torch.float64)[:, None, None]
    curve = mode(times, s, run["a0"])
    checks = (
        match(
            "half times ln(s / a0 - 1) / (2 s), four modes of every seed",
            predicted.flatten(),
            reached.flatten(),
            0.03,
            relative=True,
            source=f"{SLUG} A1, R1",
            spread=error.amax(-1),
        ),
        match(
            f"ranks visited: 0, 1, ..., {len(s)} in order (1 for yes)",
            1.0,
            [float(o == list(range(len(s) + 1))) for o in order],
            0.0,
            source=f"{SLUG} A1",
        ),
        match(
            f"start {config.scales[-1]:g}: every plateau, loss = sum of the s^2 / 2 not learned yet",
            plateaus[:-1].expand_as(rests[-1]).flatten(),
            rests[-1].flatten(),
            0.02,
            relative=True,
            source=f"{SLUG} R1",
        ),
        holds(
            "the plateaus are a limit: how much farther from them a larger start is, worst of the seeds",
            away.diff(dim=0).neg(),
            at_least=0.0,
            source=f"{SLUG} R1",
        ),
        match("last plateau: loss 0", 0.0, run["loss"][-1], 0.05 * float(plateaus[-2]), source=f"{SLUG} R1"),
        holds(
            "the projection matters: worst error of the half times without it / with it",
            (reached / plain_guess - 1).abs().max() / error.max(),
            at_least=1.0,
            source=f"{SLUG} R1",
        ),
        control(
            f"start {config.large:g}: rank at the beginning (no staircase)",
            (big["values"][0] > 0.5 * config.modes[-1]).sum(-1),
            at_least=len(s) + 1,
            source=f"{SLUG} A1",
        ),
    )
    x = plain(times[::20, 0, 0])
    series = []
    for i, value in enumerate(config.modes):
        series.append({"name": f"mode {value:g}", "x": x, "y": plain(run["modes"][::20, 0, i]), "colour": i})
        series.append({"name": f"predicted {value:g}", "x": x, "y": plain(curve[::20, 0, i]), "colour": i, "mark": "dash"})
    steps = {"series": [{"name": "loss", "x": x, "y": plain(run["loss"][::20, 0])}], "x": "time", "y": "loss"}
    figure = Figure("Modes of a linear network", {"series": series, "x": "time", "y": "u.B A v"}, curves, "First seed.")
    rest = [
        {"name": f"start {scale:g}", "x": list(range(len(s))), "y": plain(away[i]), "colour": i} for i, scale in enumerate(config.scales)
    ]
    gaps = {"series": rest, "x": "modes learned", "y": "largest |loss / plateau - 1|", "log": "y"}
    return Part(checks, (figure, Figure("Plateaus", steps, curves), Figure("How far the loss is from its plateaus", gaps, curves)))


# ------------------------------------------------------------------------------------------------ A2: rank under decay


@dataclass(frozen=True)
class LevelConfig:
    """The linear network of A1 with (decay / 2)(|A|^2 + |B|^2), from ``start`` N(0, 1), to convergence."""

    modes: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
    size: int = 10
    hidden: int = 10
    decays: tuple[float, ...] = (0.2, 0.7, 1.5, 3.0, 5.0)
    start: float = 0.1
    eta: float = 0.05
    steps: int = 8000
    seeds: tuple[int, ...] = (0, 1, 2)


def levels(config: LevelConfig) -> Part:
    """A2, R2: decay chooses the level of symmetry: final singular values (s - decay)_+, rank #{s > decay}."""
    draws = Ensemble(config.seeds)
    count = len(config.modes)
    left, right = (torch.linalg.qr(draws.normal(config.size, config.size))[0][..., :count] for _ in range(2))
    s, decay = torch.tensor(config.modes, dtype=torch.float64), torch.tensor(config.decays, dtype=torch.float64)
    target = ((left * s) @ right.mT)[None]
    shape = (len(decay), -1, -1, -1)
    a = (config.start * draws.normal(config.hidden, config.size)).expand(shape)
    b = (config.start * draws.normal(config.size, config.hidden)).expand(shape)
    keep = (1 - config.eta * decay)[:, None, None, None]
    for _ in range(config.steps):
        error = config.eta * (b @ a - target)
        a, b = keep * a - b.mT @ error, keep * b - error @ a.mT
    values = torch.linalg.svdvals(b @ a)[..., :count]
    predicted = torch.stack([modes_under_decay(s, float(d)) for d in decay])[:, None].expand_as(values)
    checks = (
        match("singular values (s - decay)_+", predicted.flatten(), values.flatten(), 1e-8, source=f"{SLUG} A2, R2"),
        match("rank #{s > decay}", (predicted > 0).sum(-1).flatten(), (values > 1e-6).sum(-1).flatten(), 0.0, source=f"{SLUG} A2, R2"),
        control(
            "no level without decay: rank at the smallest decay - at the largest",
            (values[0] > 1e-6).sum(-1) - (values[-1] > 1e-6).sum(-1),
            at_least=count,
            source=f"{SLUG} R2",
        ),
    )
    series = [
        {"name": f"decay {d:g}", "predicted": plain(predicted[i, 0]), "measured": plain(values[i, 0])} for i, d in enumerate(config.decays)
    ]
    return Part(checks, (Figure("Singular values under decay", {"series": series, "x": "(s - decay)_+", "y": "measured"}, agreement),))


# ------------------------------------------------------------------------------------------------ A3: a tanh network


@dataclass(frozen=True)
class TeacherConfig:
    """tanh student of ``width`` units; teacher: orthonormal rows, output weights ``teacher``; x ~ N(0, 1); mean (f - y)^2, full batch."""

    width: int = 12
    inputs: int = 10
    teacher: tuple[float, ...] = (3.0, 2.0, 1.0)
    samples: int = 500
    eta: float = 0.02
    start: float = 1e-3
    large: float = 0.5
    steps: int = 3000
    every: int = 25
    active: float = 0.05
    cosine: float = 0.95
    seeds: tuple[int, ...] = (0, 1, 2)


def teacher_runs(config: TeacherConfig, start: float, steps: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """Counts of distinct active units for each seed at each record, losses (records, s), final weights (s, width, inputs + 1)."""
    draws = Ensemble(config.seeds)
    rows = torch.linalg.qr(draws.normal(config.inputs, config.inputs))[0][:, : len(config.teacher)]
    x = draws.normal(config.samples, config.inputs)
    y = (torch.tanh(x @ rows.mT) * torch.tensor(config.teacher, dtype=torch.float64)).sum(-1)
    w, a = start * draws.normal(config.width, config.inputs), start * draws.normal(config.width)
    counts: list[list[int]] = [[] for _ in config.seeds]
    losses = []
    for step in range(steps):
        hidden = torch.tanh(x @ w.mT)
        error = (hidden * a[:, None]).sum(-1) - y
        if step % config.every == 0:
            losses.append(error.square().mean(-1))
            for i in range(len(config.seeds)):
                counts[i].append(_distinct(config, w[i], a[i]))
        pull = 2 * error / config.samples
        slope_a = (hidden * pull[..., None]).sum(1)
        slope_w = ((1 - hidden * hidden) * pull[..., None] * a[:, None]).mT @ x
        w, a = w - config.eta * slope_w, a - config.eta * slope_a
    return counts, torch.stack(losses), torch.cat([w, a[..., None]], -1)


def _distinct(config: TeacherConfig, w: Tensor, a: Tensor) -> int:
    weight = a.abs() * w.norm(dim=1)
    rows = torch.cat([w, a[:, None]], 1) * a.sign()[:, None]
    chosen = rows[weight > config.active]
    return distinct_directions(chosen, 0.0, config.cosine)


def teacher(config: TeacherConfig) -> Part:
    """A3, R3: the number of distinct units of a tanh network grows one by one while the loss drops."""
    counts, losses, _ = teacher_runs(config, config.start, config.steps)
    loud, _, _ = teacher_runs(config, config.large, 200)
    first = []
    drops = []
    for i, row in enumerate(counts):
        seen: list[int] = []
        at = []
        for k, n in enumerate(row):
            if not seen or n != seen[-1]:
                seen.append(n)
                at.append(k)
        first += (seen + [-1] * 4)[:4]
        marks = losses[at[:4], i]
        drops.append(float(((marks[:-1] / marks[1:]) > 2).sum()))
    checks = (
        match("distinct active units: the first four counts of every seed", [0, 1, 2, 3] * len(counts), first, 0.0, source=f"{SLUG} A3"),
        holds("drops of the loss by more than 2 by the fourth event", drops, at_least=2, source=f"{SLUG} A3", spread=drops),
        control(
            f"start {config.large:g}: distinct units at the beginning",
            [row[0] for row in loud],
            at_least=len(config.teacher) + 1,
            source=f"{SLUG} A3",
        ),
    )
    x = [float(config.every * k) for k in range(len(losses))]
    series = [{"name": f"loss, seed {s}", "x": x, "y": plain(losses[:, i]), "colour": i} for i, s in enumerate(config.seeds)]
    levels_of = [{"name": f"seed {s}", "x": x, "y": [float(n) for n in counts[i]], "colour": i} for i, s in enumerate(config.seeds)]
    return Part(
        checks,
        (
            Figure("Loss of a tanh network", {"series": series, "x": "step", "y": "loss", "log": "y"}, curves),
            Figure("Distinct active units", {"series": levels_of, "x": "step", "y": "units"}, curves),
        ),
    )


# ------------------------------------------------------------------------------------------------ R5, R5b, R6: traps and their edge


@dataclass(frozen=True)
class TrapConfig:
    """Linear network of A1 near the state of rank r; a hidden unit leaves at the rate -lambda_min(O^T H O); start offset ``kicks``.

    A tanh unit next to a trained one (R6): gammas as multiples of the boundary.
    """

    modes: tuple[float, ...] = (2.0, 1.0, 0.5)
    size: int = 6
    kicks: tuple[float, ...] = (1e-3, 1e-5, 1e-7)
    eta: float = 0.01
    steps: int = 4000
    multiples: tuple[float, ...] = (0.8, 0.95, 1.05, 1.2)
    seeds: tuple[int, ...] = (0, 1, 2)


def traps(config: TrapConfig) -> Part:
    """R5, R5b, R6: a symmetric state is left only by its instability, after ln(1 / Delta_0) / (2 rate); decay moves the boundary."""
    s = torch.tensor(config.modes, dtype=torch.float64)
    draws = Ensemble(config.seeds)
    target = torch.diag_embed(s)
    size = len(s)
    kick = torch.tensor(config.kicks, dtype=torch.float64)[:, None, None, None]
    noise = draws.normal(2, size, 2)
    # rank-1 state: unit 0 holds mode 0 exactly, unit 1 is on its mirror but for a kick
    unit = torch.zeros(size, dtype=torch.float64)
    unit[0] = s[0].sqrt()
    a = torch.stack([unit, torch.zeros_like(unit)]).expand(len(config.kicks), len(config.seeds), -1, -1).clone()
    b = a.mT.clone()
    a[..., 1:, :] += kick * noise[:, 0, :, :1].mT
    b[..., 1:] += kick * noise[:, 1, :, :1]
    rate = torch.log1p(config.eta * s[1])  # -lambda_min of the normal block is the next mode
    start = 0.5 * (a[..., 1, 1] + b[..., 1, 1])
    crossed = torch.full(a.shape[:2], -1)
    exact = a.clone(), b.clone()
    exact[0][..., 1, :], exact[1][..., 1] = 0, 0
    for step in range(config.steps):
        error = b @ a - target
        a, b = a - config.eta * b.mT @ error, b - config.eta * error @ a.mT
        grown = (b[..., 1] * a[..., 1, :])[..., 1]
        crossed = torch.where((crossed < 0) & (grown > 0.5 * s[1]), step + 1, crossed)
        if step < 500:  # R5b: the state on the mirror follows the smaller model
            error = exact[1] @ exact[0] - target
            exact = exact[0] - config.eta * exact[1].mT @ error, exact[1] - config.eta * error @ exact[0].mT
    predicted = torch.log(s[1].sqrt() / start.abs()) / rate
    delta = crossed[1:] - crossed[:-1]
    gap = torch.log(torch.tensor(config.kicks[0] / config.kicks[1], dtype=torch.float64)) / rate
    small_a, small_b = a.new_zeros(1, size), a.new_zeros(size, 1)
    small_a[0, 0], small_b[0, 0] = s[0].sqrt(), s[0].sqrt()
    for _ in range(500):
        error = small_b @ small_a - target[:size, :size]
        small_a, small_b = small_a - config.eta * small_b.T @ error, small_b - config.eta * error @ small_a.T
    distance = (exact[1] @ exact[0] - small_b @ small_a).abs().max()
    checks: list[Check] = [
        match(
            "plateau is longer by ln(kick ratio) / rate for a smaller kick (steps)", gap, delta.double().flatten(), 1.5, source=f"{SLUG} R5"
        ),
        match(
            "its length = ln(1 / Delta_0) / (2 rate), all kicks (relative)",
            predicted.flatten(),
            crossed.double().flatten(),
            0.12,
            relative=True,
            source=f"{SLUG} R5",
        ),
        match("a state on the mirror trains as the network without the unit", 0.0, distance, 1e-12, source=f"{SLUG} R5b"),
        *_boundary(config),
    ]
    series = [
        {"name": f"seed {seed}", "predicted": plain(predicted[:, i]), "measured": plain(crossed[:, i])}
        for i, seed in enumerate(config.seeds)
    ]
    return Part(tuple(checks), (Figure("Length of a plateau", {"series": series, "x": "predicted steps", "y": "measured"}, agreement),))


def _boundary(config: TrapConfig) -> list[Check]:
    """R6: the mirror of a unit stops being a minimum where lambda_min(O^T H O) + 2 gamma = 0."""
    draws = Ensemble(config.seeds)
    x, t = draws.normal(100, 3), draws.normal(1, 3)
    y = torch.tanh(x @ t.mT)[..., 0]
    edge = (y[..., None] * x).mean(1).norm(dim=-1)  # lambda_min = -2 |mean y x| at zero, loss mean (f - y)^2 + gamma |theta|^2
    multiple = torch.tensor(config.multiples, dtype=torch.float64)
    gamma = multiple[:, None] * edge
    w, v = 1e-6 * draws.normal(3).expand(len(multiple), -1, -1), 1e-6 * draws.normal(1)[:, 0].expand(len(multiple), -1)
    begin = (w.square().sum(-1) + v.square()).sqrt()
    for _ in range(2000):
        hidden = torch.tanh((x @ w[..., None])[..., 0])
        error = 2 * (v[..., None] * hidden - y) / 100
        slope = (((1 - hidden * hidden) * error * v[..., None])[..., None, :] @ x)[..., 0, :]
        w, v = w - 0.1 * (slope + 2 * gamma[..., None] * w), v - 0.1 * ((error * hidden).sum(-1) + 2 * gamma * v)
    grown = (w.square().sum(-1) + v.square()).sqrt() > begin
    expected = (multiple < 1)[:, None].expand_as(grown).double()
    return [
        match(
            "a zero unit is left exactly where gamma < -lambda_min(O^T H O) / 2",
            expected.flatten(),
            grown.double().flatten(),
            0.0,
            source=f"{SLUG} R6",
        )
    ]


# ------------------------------------------------------------------------------------------------ R5c: how many units


@dataclass(frozen=True)
class CountConfig:
    """tanh net 1-h-1 on sin 2x, 40 points of [-2, 2], mean square / 2 + gamma |theta|^2 (biases too); Adam .01, the last third .001."""

    widths: tuple[int, ...] = (10, 40, 160)
    gammas: tuple[float, ...] = (1e-2, 3e-3, 1e-3)
    steps: int = 12_000
    cluster: float = 0.05
    seeds: tuple[int, ...] = (0, 1, 2)


def counts(config: CountConfig) -> Part:
    """R5c: with decay the number of distinct active units is bounded, whatever the width."""
    x = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
    y = torch.sin(2 * x)[:, 0]
    gamma = torch.tensor(config.gammas, dtype=torch.float64)
    table = []
    for width in config.widths:
        draws = Ensemble(config.seeds)
        shape = (len(gamma), -1, -1, -1)
        w = (2 * draws.uniform(width, 2) - 1)[None].expand(shape).clone().requires_grad_()
        v = ((2 * draws.uniform(width, 1) - 1) / width**0.5)[None].expand(shape).clone().requires_grad_()
        optimizer = torch.optim.Adam([w, v], 0.01)
        for step in range(config.steps):
            if step == 2 * config.steps // 3:
                optimizer.param_groups[0]["lr"] = 0.001
            optimizer.zero_grad()
            f = (torch.tanh(x[:, 0, None] * w[..., None, :, 0] + w[..., None, :, 1]) * v[..., 0][..., None, :]).sum(-1)
            loss = 0.5 * (f - y).square().mean(-1) + gamma[:, None] * (w.square().sum((-1, -2)) + v.square().sum((-1, -2)))
            loss.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        rows = torch.cat([w, v], -1).detach()
        limit = 1 - config.cluster**2 / 2
        table.append([[distinct_directions(rows[i, k], 0.05, limit) for k in range(len(config.seeds))] for i in range(len(gamma))])
    seen = torch.tensor(table, dtype=torch.float64)
    checks = (
        holds(
            "distinct units at the largest width - at the smallest, every gamma and seed",
            seen[-1] - seen[0],
            at_most=1,
            source=f"{SLUG} R5c",
        ),
        holds("distinct units over the width, largest width", seen[-1] / config.widths[-1], at_most=0.1, source=f"{SLUG} R5c"),
        control("there are some", seen.amin((0, 2)), at_least=1, source=f"{SLUG} R5c"),
    )
    labels = [f"gamma = {g:g}" for g in config.gammas]
    series = [{"name": f"width {w}", "y": plain(seen[i].mean(-1))} for i, w in enumerate(config.widths)]
    return Part(checks, (Figure("Distinct units", {"labels": labels, "series": series, "y": "units"}, bars),))


# ------------------------------------------------------------------------------------------------ A4: layers


@dataclass(frozen=True)
class LayersConfig:
    """Digits, pixels / 16, all 1797 images, ReLU net 64-(width x depth)-C, torch's start, SGD .1, momentum .9, batch 64, weight_decay."""

    width: int = 48
    depth: int = 4
    eta: float = 0.1
    batch: int = 64
    steps: int = 2500
    decays: tuple[float, ...] = (0.0, 5e-3)
    few: tuple[int, ...] = (2, 4)
    few_decay: float = 1e-3
    sigma0: float = 0.05
    seeds: tuple[int, ...] = (0, 1, 2)


def features(config: LayersConfig, classes: int, decays: tuple[float, ...], point: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden features of all images, one (decays * seeds, n, width) for each layer; the labels; the share of alive units in each layer."""
    data = digits()
    x, labels = torch.cat([data.x, data.x_test]), torch.cat([data.y, data.y_test])
    keep = labels < classes
    x, labels = x[keep], labels[keep]
    draws = Ensemble(config.seeds)
    weights = networks(draws, [64, *[config.width] * config.depth, classes], methods=len(decays))
    decay = torch.tensor(decays).repeat_interleave(len(config.seeds))[:, None, None]
    centres = [torch.zeros_like(w) for w in weights]
    if point:
        holder = nn.ParameterList(weights)
        anchor = syre(holder, config.sigma0)
        centres = [anchor.theta0(str(i)) for i in range(len(weights))]
    optimizer = torch.optim.SGD(weights, config.eta, momentum=0.9)

    def hidden(images: Tensor) -> tuple[list[Tensor], Tensor]:
        value, out = images.expand(len(weights[0]), *images.shape[-2:]), []
        for index, w in enumerate(weights):
            value = torch.baddbmm(w[:, -1:], value, w[:, :-1])
            if index < len(weights) - 1:
                value = torch.relu(value)
                out.append(value)
        return out, value

    for _ in range(config.steps):
        pick = draws.integers(len(x), config.batch).repeat(len(decays), 1)
        optimizer.zero_grad()
        cross_entropies(hidden(x[pick])[1], labels[pick]).sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for w, c in zip(weights, centres, strict=True):
                assert w.grad is not None
                w.grad += decay * (w - c)
        optimizer.step()
    with torch.no_grad():
        layers, _ = hidden(x)
    alive = torch.stack([(h > 0).any(1).double().mean(-1) for h in layers])
    return layers, labels, alive


def layers(config: LayersConfig) -> Part:
    """A4, R4, R5d: rank and spread fall with depth and decay, rise with the number of classes; seeds agree in the end."""
    shape = (len(config.decays), len(config.seeds))
    all_layers, labels, alive = features(config, 10, config.decays)
    rank = torch.stack([feature_rank(h).reshape(shape) for h in all_layers])
    spread = torch.stack([within_over_between(h.double(), labels).reshape(shape) for h in all_layers])
    few = {c: features(config, c, (config.few_decay,)) for c in config.few}
    ranks = {c: torch.stack([feature_rank(h) for h in found[0]]) for c, found in few.items()}
    kept, kept_labels, _ = features(config, 10, config.decays[-1:], point=True)
    kept_spread = torch.stack([within_over_between(h.double(), kept_labels) for h in kept])
    third = 2
    same = [float(gram_agreement(all_layers[-1][0], all_layers[-1][i])) for i in range(1, len(config.seeds))]
    data = digits()
    pixels = float(gram_agreement(all_layers[-1][0], torch.cat([data.x, data.x_test])))
    heavy, light = config.decays[-1], config.decays[0]
    checks = (
        holds(
            f"layer 3: rank at decay {heavy:g} / at {light:g}",
            rank[third, -1] / rank[third, 0],
            at_most=0.8,
            source=f"{SLUG} A4",
            spread=rank[third].flatten(),
        ),
        holds("rank with two classes, deepest layers", ranks[config.few[0]][1:].flatten(), at_most=1.5, source=f"{SLUG} A4"),
        holds(
            "rank rises with the number of classes (layer 3)",
            torch.stack([ranks[c][third].mean() for c in config.few] + [rank[third, 0].mean()]).diff(),
            at_least=0,
            source=f"{SLUG} R4",
        ),
        holds("rank falls with depth: first - last layer", rank[0] - rank[-1], at_least=0, source=f"{SLUG} R4, R5d"),
        holds(
            "spread within classes falls with depth: NC1 of the first - of the last layer",
            spread[0] - spread[-1],
            at_least=0,
            source=f"{SLUG} R4, R5d",
        ),
        holds(
            "share of alive units falls with decay (layers 2..)",
            (alive[1:].reshape(-1, *shape)[:, 0] - alive[1:].reshape(-1, *shape)[:, 1]).mean(),
            at_least=0,
            source=f"{SLUG} R4",
        ),
        holds(
            "other seeds, same data: Gram matrices of the last layer agree more with each other than with the pixels (difference)",
            [value - pixels for value in same],
            at_least=0.05,
            source=f"{SLUG} R5d",
            spread=same,
        ),
        refuted(
            "last layer: NC1 under syre over that under plain decay of the same size, every seed",
            kept_spread[-1] / spread[-1, -1],
            at_least=1.5,
            source=f"{SLUG} R5d",
            spread=kept_spread[-1],
        ),
        control(
            "without decay the rank stays: layer 3 over layer 1 at no decay - at decay",
            (rank[third, 0] / rank[0, 0] - rank[third, -1] / rank[0, -1]).mean(),
            at_least=0.0,
            source=f"{SLUG} A4",
        ),
    )
    depth = [float(k + 1) for k in range(config.depth)]
    series = [{"name": f"decay {d:g}", "x": depth, "y": plain(rank[:, i].mean(-1))} for i, d in enumerate(config.decays)]
    series += [{"name": f"{c} classes", "x": depth, "y": plain(ranks[c].mean(-1))} for c in config.few]
    spreads = [{"name": f"decay {d:g}", "x": depth, "y": plain(spread[:, i].mean(-1))} for i, d in enumerate(config.decays)]
    spreads.append({"name": f"syre, decay {heavy:g}", "x": depth, "y": plain(kept_spread.mean(-1))})
    return Part(
        checks,
        (
            Figure("Effective rank of the layers", {"series": series, "x": "layer", "y": "rank"}, curves),
            Figure("Spread within over between classes", {"series": spreads, "x": "layer", "y": "NC1", "log": "y"}, curves),
        ),
    )


# ------------------------------------------------------------------------------------------------ R5e: noise goes where it is cold


@dataclass(frozen=True)
class ColdConfig:
    """f = sum_j v_j W_j.x_j, the ``inputs`` entries of x_j signs at random, y = sum_j s_j mean(x_j) sqrt(inputs) + N(0, 1); loss r^2, one
    sample a step drawn from ``samples`` with replacement. Each (v_j, W_j) -> -(v_j, W_j) is a mirror: a layer W times a scalar v that can
    be switched off. ``decay`` and ``sigma0`` are those of the runs that remove it. The exponent holds the other weights; in training they
    fluctuate and add a little to the residual, so that layers go a few per cent faster. With two inputs a layer noise contracts far less
    (the exponent is about zero at this signal and twice the rate), hence one.
    """

    signals: tuple[float, ...] = (0.5, 0.5, 0.01, 0.01)
    inputs: int = 1
    samples: int = 10_000
    eta: float = 0.05
    decay: float = 0.004
    sigma0: float = 0.05
    start: float = 0.3
    steps: int = 8000
    replicas: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)


class Gated(nn.Module):
    """The model of `ColdConfig`: v (blocks,), W (blocks, inputs)."""

    def __init__(self, v: Tensor, w: Tensor) -> None:
        super().__init__()
        self.v, self.w = nn.Parameter(v.clone()), nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (self.v * (x * self.w).sum(-1)).sum(-1)


def cold_data(config: ColdConfig) -> tuple[Tensor, Tensor]:
    """x (s, n, blocks, inputs), y (s, n)."""
    draws, s = Ensemble(config.seeds), torch.tensor(config.signals, dtype=torch.float64)
    x = draws.normal(config.samples, len(s), config.inputs).sign()  # bounded, so that a single sample throws no replica out
    return x, (s * x.sum(-1)).sum(-1) / config.inputs**0.5 + draws.normal(config.samples)


def cold_runs(config: ColdConfig, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """v (s, replicas, blocks) and W (s, replicas, blocks, inputs) at the end, log |(v_j, W_j)| at 100 times (times, s, replicas, blocks).

    ``kind``: "noise"; "descent", all samples at once; "fixed", no scalar v; "decay" and "syre", noise with decay to zero or to a point.
    """
    x, y = cold_data(config)
    draws, blocks, r = Ensemble([s + 100 for s in config.seeds]), len(config.signals), 1 if kind == "descent" else config.replicas
    v, w = config.start * draws.normal(r, blocks), config.start * draws.normal(r, blocks, config.inputs)
    v0, w0 = draws.normal(blocks)[:, None] * config.sigma0, draws.normal(blocks, config.inputs)[:, None] * config.sigma0
    if kind != "syre":
        v0, w0 = 0 * v0, 0 * w0
    shrink = config.eta * config.decay if kind in ("decay", "syre") else 0.0
    if kind == "fixed":
        v = torch.ones_like(v)
    seed, path = torch.arange(len(config.seeds))[:, None], []
    whole = torch.einsum("snbi,sncj->sbicj", x, x) / config.samples, torch.einsum("snbi,sn->sbi", x, y) / config.samples
    for step in range(config.steps):
        if step % (config.steps // 100) == 0:
            path.append(0.5 * (v.square() + w.square().sum(-1)).log())
        if kind == "descent":
            pull = (torch.einsum("sbicj,srcj->srbi", whole[0], v[..., None] * w) - whole[1][:, None]) * 2 * config.eta
        else:
            if step % 1000 == 0:
                picks = draws.integers(config.samples, 1000, r)
            at = picks[:, step % 1000]
            one = x[seed, at]
            residual = (v * (one * w).sum(-1)).sum(-1) - y[seed, at]
            pull = 2 * config.eta * residual[..., None, None] * one
        slope_v = (pull * w).sum(-1)
        w = w - pull * v[..., None] - shrink * (w - w0)
        if kind != "fixed":
            v = v - slope_v - shrink * (v - v0)
    return v, w, torch.stack(path)


def noise_rank(x: Tensor, y: Tensor, v: Tensor, w: Tensor, fixed: bool = False) -> tuple[int, float]:
    """Rank (singular values above 1e-6 of the largest) and trace of the covariance of the samples' gradients."""
    r = 2 * ((v * (x * w).sum(-1)).sum(-1) - y)[:, None, None]
    g = (r * v[:, None] * x).flatten(1)
    if not fixed:
        g = torch.cat([(r[..., 0] * (x * w).sum(-1)), g], 1)
    g = g - g.mean(0)
    values = torch.linalg.svdvals(g)
    return int((values > 1e-6 * values[0]).sum()), float(g.square().sum() / len(g))


def cold(config: ColdConfig) -> Part:
    """R5e: gradient noise takes a layer to where it makes none, its symmetric state, as the exponent of its mirror says; descent does not.

    Where the scalar is fixed there is no mirror and nothing is lost; decay to a random point instead of zero takes the trap away.
    """
    x, y = cold_data(config)
    weak = [j for j, s in enumerate(config.signals) if s < max(config.signals)]
    live = [j for j in range(len(config.signals)) if j not in weak]
    runs = {kind: cold_runs(config, kind) for kind in ("noise", "descent", "fixed", "decay", "syre")}
    times = torch.arange(0, config.steps, config.steps // 100, dtype=torch.float64)
    half = len(times) // 2
    rate = slope(times[half:], runs["noise"][2][half:])  # (s, replicas, blocks)
    z, exponents, ranks, smaller = [], [], [], []
    ends: dict[str, list[int]] = {kind: [] for kind in ("fixed", "decay", "syre")}
    v, w, _ = runs["noise"]
    for i, seed in enumerate(config.seeds):
        a, b = runs["descent"][0][i, 0].clone(), runs["descent"][1][i, 0].clone()
        a[weak], b[weak] = 0.0, 0.0
        for j in range(len(config.signals)):
            masks = {"v": torch.zeros(len(a), dtype=torch.bool), "w": torch.zeros(b.shape, dtype=torch.bool)}
            masks["v"][j], masks["w"][j] = True, True
            found = mirror_thresholds(Gated(a, b), lambda out, target: (out - target).square().mean(), (x[i], y[i]), Mirror.zeros(masks),
                                      lr=config.eta, batch_size=1, steps=4000, seed=seed)  # fmt: skip
            if j in weak:
                error = (standard_error(rate[i, :, j]).square() + float(found.exponent.stderr or 0) ** 2) ** 0.5
                z.append(float((rate[i, :, j].mean() - float(found.exponent)) / error))
                exponents.append(float(found.exponent))
        ranks.append(noise_rank(x[i], y[i], v[i, 0], w[i, 0])[0])
        smaller.append(noise_rank(x[i][:, live], y[i], v[i, 0][live], w[i, 0][live])[0])
        for kind, out in ends.items():
            out.append(noise_rank(x[i], y[i], runs[kind][0][i, 0], runs[kind][1][i, 0], kind == "fixed")[0])
    size = {kind: (run[0].square() + run[1].square().sum(-1)).sqrt() for kind, run in runs.items()}
    full = config.inputs * len(config.signals)
    checks = (
        holds("exponent of log |c| at the mirrors of the weak layers: noise makes them attract", exponents, at_most=0.0,
              source=f"{SLUG} R5e"),
        match("rate at which SGD switches a weak layer off against that exponent: z", 0.0, z, 4.0, source=f"{SLUG} R5e, R5", spread=z),
        holds("weak layers after SGD: largest size", size["noise"][..., weak].amax((1, 2)), at_most=1e-2, source=f"{SLUG} R5e",
              spread=size["noise"][..., weak].amax((1, 2))),
        match("rank of the gradient noise after SGD = that of the network without the weak layers", smaller, ranks, 0.0,
              source=f"{SLUG} R5e, R5b", spread=ranks),
        control("strong layers after SGD: smallest size", size["noise"][..., live].amin((1, 2)), at_least=0.3, source=f"{SLUG} R5e"),
        control("descent without noise: smallest size of a weak layer", size["descent"][..., weak].amin((1, 2)), at_least=0.03,
                source=f"{SLUG} R5e"),
        control("the scalar held at one: rank of the noise stays that of all layers", ends["fixed"], at_least=full, source=f"{SLUG} R5e"),
        control("noise and plain decay: rank of the noise", ends["decay"], at_most=full - 1, source=f"{SLUG} R5e"),
        holds("noise and decay to a random point: rank of the noise", ends["syre"], at_least=full, source=f"{SLUG} R5e",
              spread=ends["syre"]),
    )  # fmt: skip
    grid = times.tolist()
    names = {"noise": "SGD", "descent": "descent", "decay": "SGD and decay", "syre": "SGD and syre"}
    series = [{"name": text, "x": grid, "y": plain(runs[kind][2][:, 0, 0, weak[0]].exp())} for kind, text in names.items()]
    data = {"series": series, "x": "step", "y": "size of a weak layer", "log": "y"}
    return Part(checks, (Figure("Noise switches a layer off", data, curves, "First seed and replica."),))


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    stairs: StairConfig | None = StairConfig()
    levels: LevelConfig | None = LevelConfig()
    teacher: TeacherConfig | None = TeacherConfig()
    traps: TrapConfig | None = TrapConfig()
    counts: CountConfig | None = CountConfig()
    layers: LayersConfig | None = LayersConfig()
    cold: ColdConfig | None = ColdConfig()


_EXPERIMENTS: Mapping[str, Callable[[Any], Part]] = {
    "stairs": stairs,
    "levels": levels,
    "teacher": teacher,
    "traps": traps,
    "counts": counts,
    "layers": layers,
    "cold": cold,
}

ENTRY = Entry(
    slug=SLUG,
    title="Parameter Symmetry Potentially Unifies Deep Learning Theory",
    paper="Liu Ziyin, Yizhou Xu, Tomaso Poggio, Isaac Chuang, 2025, arXiv 2502.05300",
    claims=(
        "From a small start learning goes from symmetric to less symmetric states, at times that follow from the start.",
        "Weight decay chooses the level of symmetry: the rank, or the number of distinct units, whatever the width.",
        "A symmetric state is left only by its own instability, and trains as the smaller network it is.",
        "Gradient noise goes to symmetric states, where there is less of it; decay to a random point takes them away.",
        "Rank and spread within classes fall with depth and decay, and rise with the number of classes.",
    ),
    presets={
        "smoke": Config(
            stairs=StairConfig(seeds=(0, 1, 2)),
            levels=LevelConfig(steps=4000),
            counts=None,
            layers=None,
            cold=None,
        ),
        "default": Config(),
        "full": Config(
            stairs=StairConfig(seeds=tuple(range(12))),
            teacher=TeacherConfig(seeds=tuple(range(8))),
            counts=CountConfig(gammas=(1e-2, 3e-3, 1e-3, 1e-4), seeds=tuple(range(5))),
            layers=LayersConfig(width=128, steps=10_000, seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
)
