"""Type-II saddles and probabilistic stability of SGD: the sign of E log|1 - lr h| decides, not the moments.

Slug probabilistic-stability. Near a point where every per-sample gradient vanishes the update is a product of random matrices,
and its largest Lyapunov exponent says whether SGD stays. A saddle may attract, a minimum may repel, and the origin of a
two-layer net has four phases. Learning rates and batches as in the dossier; draws are independent at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import chi2

from parasym.core.errors import InputError
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import curves
from parasym.gallery.sweep import Quantity, Sweep, cell_seed
from parasym.simulate import Average, Ensemble, Increments, Lyapunov, Snapshots, System, dot, exp, grid, log, where
from parasym.solvable.contract import number
from parasym.solvable.factors import (
    Discrete,
    Law,
    Normal,
    Uniform,
    critical_batch,
    critical_rates,
    exponent,
    largest_stable_rate,
    moment_limit,
    phase,
    two_layer_exponents,
)

SLUG = "probabilistic-stability"


# ------------------------------------------------------------------------------------------------ R1, R2, R4, R5, A2


@dataclass(frozen=True)
class ExponentConfig:
    """theta' = (1 - lr h) theta with h ~ N(mean, sd^2): growth of log|theta| against the closed form, over learning rates."""

    mean: float = -0.1
    sd: float = 1.0
    rates: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.5)
    attracting: float = 0.5
    replicas: int = 2000
    steps: int = 2000
    level: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)


def product(law: Law) -> System:
    """log|theta|, added up factor by factor, since theta itself leaves the range of numbers."""
    return System("product of factors", lambda p, d: [0.0], lambda s, p, draws: [s[0] + log(abs(1.0 - p.lr * law.draw(draws)))])


def normal_product() -> System:
    """The same for h ~ N(mu, sd^2), with mu and sd as parameters."""
    return System("normal factors", lambda p, d: [0.0], lambda s, p, draws: [s[0] + log(abs(1.0 - p.lr * (p.mu + p.sd * draws.normal())))])


def exponents(config: ExponentConfig) -> Part:
    """R1, R2, R4, R5 and A2: the exponent, its closed forms, and what the moments say instead."""
    law = Normal(config.mean, config.sd)
    theory = [number(exponent(law, lr)) for lr in config.rates]
    slopes, settled, factors = [], [], []
    size = Increments(lambda old, new, p: [exp(new[0] - old[0])])
    for seed in config.seeds:
        params = {"lr": config.rates, "mu": law.mu, "sd": law.sd}
        run = Ensemble(normal_product(), config.replicas, params, seed, precision="float64").run(config.steps, [size])
        factors.append(float(run[0].value[config.rates.index(config.attracting), 0]))
        slopes.append((run.final[..., 0].mean(-1) / config.steps).tolist())
        settled.append(float((run.final[config.rates.index(config.attracting), :, 0] < math.log(config.level)).double().mean()))
    flat = [slope for row in slopes for slope in row]
    checks = [
        match(
            "growth rate of log|theta| is E log|1 - lr h|, h ~ N(-.1, 1), every learning rate and seed",
            theory * len(config.seeds),
            flat,
            2e-3,
            source=f"{SLUG} A2",
            spread=flat,
        ),
        holds(
            f"at lr = {config.attracting} the saddle attracts: share of replicas below {config.level} of the start",
            settled,
            at_least=0.99,
            source=f"{SLUG} A2",
            spread=settled,
        ),
        match("mean of |1 - lr h| over all factors drawn", law.moment(config.attracting, 1), factors, 2e-3, source=f"{SLUG} R4"),
        control(
            "so that the mean of |theta| grows at every step (no moment of order >= 1 converges): by",
            factors,
            at_least=1.01,
            source=f"{SLUG} R4",
            spread=factors,
        ),
        *_threshold(law),
        _full_batch(config),
        *_other_laws(config),
    ]
    rates = np.geomspace(0.01, 4, 160).tolist()
    figure = Figure(
        "Exponent against learning rate",
        {
            "series": [
                {"name": "E log|1 - lr h|", "x": rates, "y": [law.log_factor(lr) for lr in rates]},
                {"name": "second order in lr", "x": rates, "y": [-lr * law.mean - lr**2 * law.square / 2 for lr in rates], "mark": "dash"},
                {"name": "simulated", "x": list(config.rates) * len(config.seeds), "y": flat, "mark": "points"},
            ],
            "x": "learning rate",
            "y": "growth of log|theta| per step",
            "log": "x",
        },
        curves,
        "Between the two zeros a saddle of negative mean curvature attracts.",
    )
    return Part(tuple(checks), (figure,))


def _threshold(law: Normal) -> list[Check]:
    """R2: the smallest attracting learning rate, exact and to second order, as the saddle gets shallower."""
    gaps = []
    for scale in (1.0, 0.5, 0.25):
        shallow = Normal(law.mean * scale, law.sd)
        exact = number(critical_rates(shallow)[0])
        gaps.append(abs(exact / (-2 * shallow.mean / shallow.square) - 1))
    return [
        holds("smallest attracting rate is -2 E h / E h^2 to second order: relative gap", gaps[0], at_most=0.05, source=f"{SLUG} R2"),
        holds(
            "and the gap shrinks at least threefold each time the mean curvature is halved",
            [gaps[1] / gaps[0], gaps[2] / gaps[1]],
            at_most=1 / 3,
            source=f"{SLUG} R2",
        ),
    ]


def _full_batch(config: ExponentConfig) -> Check:
    """The noise switched off: gradient descent leaves the saddle."""
    params = {"lr": config.attracting, "mu": config.mean, "sd": 0.0}
    run = Ensemble(normal_product(), 1, params, precision="float64").run(config.steps)
    rate = float(run.final[0, 0]) / config.steps
    downhill = math.log(1 - config.attracting * config.mean)
    return control(
        f"without noise the saddle repels at log(1 - lr E h) = {downhill:.4f}",
        rate,
        at_least=downhill - 1e-9,
        source=f"{SLUG} A2",
    )


def _other_laws(config: ExponentConfig) -> list[Check]:
    """R5: the closed form of every law against draws."""
    laws: dict[str, Law] = {
        "three points": Discrete((2.0, -1.0, 0.3), (0.3, 0.5, 0.2)),
        "uniform": Uniform(-1.0, 2.5),
        "batch of four normals": Normal(-0.1, 1.0).averaged(4),
    }
    out = []
    for name, law in laws.items():
        theory = number(exponent(law, 0.7))
        seen = []
        for seed in config.seeds:
            params = {"lr": 0.7, "mu": law.mu, "sd": law.sd} if isinstance(law, Normal) else {"lr": 0.7}
            system = normal_product() if isinstance(law, Normal) else product(law)
            run = Ensemble(system, config.replicas, params, seed, precision="float64").run(config.steps)
            seen.append(float(run.final[:, 0].mean()) / config.steps)
        out.append(match(f"closed form of E log|1 - .7 h|, {name}", theory, seen, 1e-3, source=f"{SLUG} R5", spread=seen))
    return out


# ------------------------------------------------------------------------------------------------ R6, R7, R8, A1


@dataclass(frozen=True)
class PhaseConfig:
    """Origin of a two-layer net, chi in {1, a} evenly: the phase of every cell of a grid of learning rates and a."""

    lowest: float = 0.05
    highest: float = 3.0
    points: int = 24
    a_low: float = -0.99
    a_high: float = 0.97
    replicas: int = 64
    steps: int = 4000
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 64)
    curvatures: tuple[float, ...] = (0.5, 1.0, 4.0)
    seeds: tuple[int, ...] = (0, 1, 2)


def linearised(s: Any, p: Any, draws: Any) -> Any:
    """log|u + w| and log|u - w| at the origin, one step."""
    chi = where(draws.uniform() < 0.5, 1.0, p.a)
    return [s[0] + log(abs(1.0 + p.lr * chi)), s[1] + log(abs(1.0 - p.lr * chi))]


def phases(config: PhaseConfig) -> Part:
    """A1, R6, R7, R8: the phase diagram, the batch that escapes, and the largest stable learning rate."""
    rates, others = np.linspace(config.lowest, config.highest, config.points), np.linspace(config.a_low, config.a_high, config.points)
    points = grid(lr=rates.tolist(), a=others.tolist())
    theory = [two_layer_exponents(Discrete((1.0, a)), lr) for lr, a in zip(points["lr"], points["a"], strict=True)]
    names = [phase(plus, minus) for plus, minus in theory]
    agreements, per_seed = [], []
    for seed in config.seeds:
        run = Ensemble(System("origin", lambda p, d: [0.0, 0.0], linearised), config.replicas, points, seed, precision="float64").run(
            config.steps
        )
        plus, minus = run.final[..., 0] > 0, run.final[..., 1] > 0
        code = torch.stack([plus & ~minus, ~plus & minus, ~plus & ~minus, plus & minus]).sum(-1)  # votes for I, II, III, IV
        seen = [("I", "II", "III", "IV")[k] for k in code.argmax(0).tolist()]
        agreements.append(sum(a == b for a, b in zip(names, seen, strict=True)) / len(names))
        per_seed.append(seen)
    counts = {name: names.count(name) for name in ("I", "II", "III", "IV")}
    moved = names[1:] + names[:1]
    shifted = [sum(a != b for a, b in zip(moved, seen, strict=True)) / len(moved) for seen in per_seed]
    checks = [
        holds(
            f"share of {len(names)} cells whose majority phase is the predicted one (predicted {counts})",
            agreements,
            at_least=0.97,
            source=f"{SLUG} A1",
            spread=agreements,
        ),
        holds("all four phases occur in the grid: cells of the rarest", min(counts.values()), at_least=1, source=f"{SLUG} R6"),
        control("share of cells that a diagram shifted by one cell gets wrong", shifted, at_least=0.04, source=f"{SLUG} A1"),
        _moment_phases(points, names),
        *_batches(config),
        *_interpolation(config),
    ]
    return Part(tuple(checks), (_phase_figure(points, names),))


def _moment_phases(points: Mapping[str, Any], names: list[Any]) -> Check:
    """R6: phase Ib, where the decaying direction is stable in moments too, is a proper part of phase I."""
    cells = [(lr, a) for lr, a, name in zip(points["lr"], points["a"], names, strict=True) if name == "I"]
    both = sum(Discrete((1.0, a)).moment(lr, 2) < 1 for lr, a in cells)
    return holds(
        "phase I splits: cells of Ia (in probability only) and of Ib (in moments too)",
        [len(cells) - both, both],
        at_least=1,
        source=f"{SLUG} R6",
    )


def _phase_figure(points: Mapping[str, Any], names: list[Any]) -> Figure:
    series = []
    for name, words in (("I", "learns"), ("II", "learns the wrong sign"), ("III", "dies"), ("IV", "unstable")):
        at = [k for k, found in enumerate(names) if found == name]
        series.append(
            {
                "name": f"{name}: {words}",
                "x": [float(points["lr"][k]) for k in at],
                "y": [float(points["a"][k]) for k in at],
                "mark": "points",
            }
        )
    return Figure("Phases of a two-layer net at its origin", {"series": series, "x": "learning rate", "y": "a (chi in {1, a})"}, curves)


def _batches(config: PhaseConfig) -> list[Check]:
    """R7: a larger batch escapes the saddle, chi ~ N(.1, 1), lr = 1."""
    law = Normal(0.1, 1.0)
    theory = [two_layer_exponents(law, 1.0, batch)[0] for batch in config.batches]
    # 1 + lr chi = 1 - lr (-chi)
    params = {"lr": 1.0, "mu": -law.mu, "sd": [law.averaged(batch).sd for batch in config.batches]}
    run = Ensemble(normal_product(), 2000, params, config.seeds[0], precision="float64").run(1000)
    seen = (run.final[..., 0].mean(-1) / 1000).tolist()
    first = number(critical_batch(law, 1.0))
    return [
        match(f"Lambda_+ for batches {config.batches}", theory, seen, 4e-3, source=f"{SLUG} R7"),
        holds("it changes sign: Lambda_+ at the smallest batch", theory[0], at_most=0.0, source=f"{SLUG} R7"),
        match(
            "the batch at which it does is lr v / (2 mu) to second order, within a factor of two (log2)",
            math.log2(law.variance / (2 * law.mean)),
            math.log2(first),
            1.0,
            source=f"{SLUG} R7",
        ),
    ]


def _interpolation(config: PhaseConfig) -> list[Check]:
    """R8: batches of one on curvatures x_i^2."""
    law = Discrete(config.curvatures)
    largest = number(largest_stable_rate(config.curvatures))
    gradient_descent, second_moment = 2 / law.mean, moment_limit(law)
    around = (0.98 * largest, 1.02 * largest)
    square = Increments(lambda old, new, p: [exp(2 * (new[0] - old[0]))])
    run = Ensemble(product(law), 1000, {"lr": around}, config.seeds[0], precision="float64").run(4000, [square])
    slopes = (run.final[..., 0].mean(-1) / 4000).tolist()
    full = Ensemble(product(Discrete((law.mean,))), 1, {"lr": around[0]}, precision="float64").run(100)
    return [
        match(
            "growth just below and just above the largest stable rate",
            [law.log_factor(lr) for lr in around],
            slopes,
            2e-3,
            source=f"{SLUG} R8",
        ),
        holds("shrinks below it (minus the slope) and grows above it", [-slopes[0], slopes[1]], at_least=0.0, source=f"{SLUG} R8"),
        holds("largest stable rate is at least 1 / min h", largest, at_least=1 / min(config.curvatures), source=f"{SLUG} R8"),
        control(
            "gradient descent and the second moment allow less: largest stable rate over each limit",
            [largest / gradient_descent, largest / second_moment],
            at_least=1.5,
            source=f"{SLUG} R8",
        ),
        control(
            "just below it, where SGD contracts: growth of gradient descent a step, and of the mean square (minus one)",
            [float(full.final[0, 0]) / 100, float(run[0].value[0, 0]) - 1],
            at_least=0.0,
            source=f"{SLUG} R8",
        ),
    ]


# ------------------------------------------------------------------------------------------------ A3, A4, R10


@dataclass(frozen=True)
class NetworkConfig:
    """f = u w x, chi in {1, -.8}, start .1 N(0,1): dies at a large learning rate, learns at a small one."""

    chi: tuple[float, float] = (1.0, -0.8)
    dies: float = 0.6
    learns: float = 0.05
    replicas: int = 2000
    steps: int = 5000
    dead: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)


def scalar_net(chi: tuple[float, float]) -> System:
    """SGD on (u w - chi)^2 / 2."""

    def step(s: Any, p: Any, draws: Any) -> Any:
        residual = s[0] * s[1] - where(draws.uniform() < 0.5, chi[0], chi[1])
        return [s[0] - p.lr * residual * s[1], s[1] - p.lr * residual * s[0]]

    return System("u w x", lambda p, d: [0.1 * d.normal(), 0.1 * d.normal()], step)


def balanced_product(chi: tuple[float, float], lr: float) -> float:
    """The product u w = p at which a grown direction neither grows nor shrinks: the root of E log|1 + lr (chi - p)| near E chi."""

    def rate(p: float) -> float:
        return 0.5 * sum(math.log(abs(1 + lr * (c - p))) for c in chi)

    low = 0.0
    high = min(max(chi), 1 / lr + min(chi)) * (1 - 1e-9)
    return float(brentq(rate, low, high)) if rate(low) > 0 > rate(high) else 0.0


def network(config: NetworkConfig) -> Part:
    """A3: fate of the nonlinear net as the exponents say."""
    law = Discrete(config.chi)
    predicted = [phase(*two_layer_exponents(law, lr)) for lr in (config.dies, config.learns)]
    dead, alive, products = [], [], []
    for seed in config.seeds:
        observe = [Snapshots([config.steps // 2, config.steps], lambda s, p: [s[0] * s[1]])]
        run = Ensemble(scalar_net(config.chi), config.replicas, {"lr": (config.dies, config.learns)}, seed, precision="float64").run(
            config.steps, observe
        )
        gone = ((run.final.abs() < config.dead).all(-1) & run.sound).double().mean(-1)
        dead.append(float(gone[0]))
        alive.append(float(gone[1]))
        products.append(float(run.final[1].prod(-1).mean()))
    return Part(
        (
            holds(
                f"phase III at lr = {config.dies} (1 if so) and I at lr = {config.learns}",
                [float(predicted[0] == "III"), float(predicted[1] == "I")],
                at_least=1,
                source=f"{SLUG} R6",
            ),
            holds(f"lr = {config.dies}: share of replicas at (0, 0)", dead, at_least=1.0, source=f"{SLUG} A3", spread=dead),
            control(f"lr = {config.learns}: share at (0, 0)", alive, at_most=0.0, source=f"{SLUG} A3", spread=alive),
            match(
                f"lr = {config.learns}: mean u w is where a grown direction is balanced, E log|1 + lr (chi - u w)| = 0",
                balanced_product(config.chi, config.learns),
                products,
                0.005,
                source=f"{SLUG} A3",
                spread=products,
            ),
        )
    )


@dataclass(frozen=True)
class RankConfig:
    """f = U W x, 2 x 2: each step shows e_k with target chi_k e_k; every mirror has its own exponents, so the rank is predicted."""

    first: tuple[float, float] = (1.0, 0.5)
    second: tuple[float, float] = (1.0, -0.8)
    large: float = 0.6
    small: float = 0.05
    replicas: int = 1000
    large_steps: int = 8000
    small_steps: int = 20000
    threshold: float = 1e-4
    seeds: tuple[int, ...] = (0, 1, 2)


def matrix_net(config: RankConfig) -> System:
    """SGD on |U W e_k - chi e_k|^2 / 2; state U then W, row by row."""

    def step(s: Any, p: Any, draws: Any) -> Any:
        u, w = s[:4], s[4:]
        shown = draws.uniform() < 0.5  # which column
        coin = draws.uniform() < 0.5
        chi = where(shown, where(coin, config.first[0], config.first[1]), where(coin, config.second[0], config.second[1]))
        column = [where(shown, w[0], w[1]), where(shown, w[2], w[3])]
        out = [dot(u[:2], column), dot(u[2:], column)]
        residual = [out[0] - where(shown, chi, 0.0), out[1] - where(shown, 0.0, chi)]
        back = [u[0] * residual[0] + u[2] * residual[1], u[1] * residual[0] + u[3] * residual[1]]
        new_u = [u[2 * i + j] - p.lr * residual[i] * column[j] for i in range(2) for j in range(2)]
        new_w = []
        for j in range(2):
            moved = p.lr * back[j]
            new_w += [where(shown, w[2 * j] - moved, w[2 * j]), where(shown, w[2 * j + 1], w[2 * j + 1] - moved)]
        return [*new_u, *new_w]

    return System("U W x", lambda p, d: [0.1 * d.normal() for _ in range(8)], step)


def rank(config: RankConfig) -> Part:
    """A4, R10: the rank SGD keeps is the number of directions with a positive exponent."""
    checks: list[Check] = []
    for lr, steps in ((config.large, config.large_steps), (config.small, config.small_steps)):
        plus = [two_layer_exponents(Discrete(chi), lr)[0] for chi in (config.first, config.second)]
        expected = sum(value > 0 for value in plus)
        shares, diagonals = [], []
        for seed in config.seeds:
            run = Ensemble(matrix_net(config), config.replicas, {"lr": lr}, seed, precision="float64").run(steps)
            u, w = run.final[:, :4].reshape(-1, 2, 2), run.final[:, 4:].reshape(-1, 2, 2)
            maps = torch.nan_to_num(u @ w, nan=math.inf)
            ranks = (torch.linalg.svdvals(maps[run.sound]) > config.threshold).sum(-1)
            shares.append(float((ranks == expected).sum()) / config.replicas)
            diagonals.append(maps.mean(0).diagonal().tolist())
        balanced = [balanced_product(chi, lr) if value > 0 else 0.0 for chi, value in zip((config.first, config.second), plus, strict=True)]
        words = f"lr = {lr}: share of nets of rank {expected}, the number of positive exponents ({plus[0]:+.3f}, {plus[1]:+.3f})"
        checks.append(holds(words, shares, at_least=0.99, source=f"{SLUG} A4", spread=shares))
        seen = [value for row in diagonals for value in row]
        checks.append(
            match(
                f"lr = {lr}: diagonal of U W is where each direction is balanced",
                balanced * len(config.seeds),
                seen,
                0.03,
                source=f"{SLUG} A4",
                spread=seen,
            )
        )
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ R3, R9


@dataclass(frozen=True)
class SpectrumConfig:
    """Products of 1 - lr x x^T, x ~ N(0, 1_D): the whole spectrum by QR."""

    dim: int = 4
    rate: float = 0.3
    unstable: float = 1.5
    replicas: int = 2048
    steps: int = 2000
    burn: int = 100
    fate_steps: int = 600
    seeds: tuple[int, ...] = (0, 1, 2)


def rank_one(dim: int) -> System:
    """theta' = (1 - lr x x^T) theta."""

    def step(s: Any, p: Any, draws: Any) -> Any:
        x = draws.normals(dim)
        along = dot(x, s)
        return [a - p.lr * along * b for a, b in zip(s, x, strict=True)]

    return System("rank-one factors", lambda p, d: [1.0] * dim, step)


def log_determinant(dim: int, lr: float) -> float:
    """E log|1 - lr |x|^2|, by quadrature over the chi-square law, split at the zero."""
    cuts = (0.0, 1 / lr, max(4 / lr, 60.0 + 10 * dim))
    pieces = [quad(lambda s: chi2.pdf(s, dim) * math.log(abs(1 - lr * s)), a, b, limit=400)[0] for a, b in pairwise(cuts)]
    return float(sum(pieces))


def spectrum(config: SpectrumConfig) -> Part:
    """R3, R9: exponents add up to E log|det|, and the sign of the largest decides."""
    sums, tops, fates = [], [], []
    for seed in config.seeds:
        ensemble = Ensemble(rank_one(config.dim), config.replicas, {"lr": (config.rate, config.unstable)}, seed, precision="float64")
        run = ensemble.run(config.steps, [Lyapunov(config.dim)], burn=config.burn, start=[0.0] * config.dim)  # tangents only
        found = run[0]
        values = torch.as_tensor(found.value)
        sums.extend(values.sum(-1).tolist())
        tops.append(values[:, 0].tolist())
        size = ensemble.run(config.fate_steps).final.norm(dim=-1)
        fates.append([float((size[0] < 1e-6).double().mean()), float((~(size[1] < 1e6)).double().mean())])
    theory = [log_determinant(config.dim, lr) for lr in (config.rate, config.unstable)]
    flat = [value for row in fates for value in row]
    return Part(
        (
            match(
                "the exponents add up to E log|det(1 - lr x x^T)|, both learning rates, every seed",
                theory * len(config.seeds),
                sums,
                3e-3,
                source=f"{SLUG} R9",
                spread=sums,
            ),
            holds("largest exponent: negative at the small rate", [-row[0] for row in tops], at_least=0.0, source=f"{SLUG} R3"),
            control("and positive at the large one", [row[1] for row in tops], at_least=0.0, source=f"{SLUG} R3"),
            holds("share of replicas that went where its sign says: to 0, and away", flat, at_least=0.99, source=f"{SLUG} R3", spread=flat),
        )
    )


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    exponents: ExponentConfig | None = ExponentConfig()
    phases: PhaseConfig | None = PhaseConfig()
    network: NetworkConfig | None = NetworkConfig()
    rank: RankConfig | None = RankConfig()
    spectrum: SpectrumConfig | None = SpectrumConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "exponents": exponents,
    "phases": phases,
    "network": network,
    "rank": rank,
    "spectrum": spectrum,
}


@dataclass(frozen=True)
class OriginCell:
    """One cell of the phase diagram of u sigma(w x) at its origin: chi in {1, a} evenly, learning rate eta, batches of S."""

    eta: float = 0.3
    a: float = -0.5
    S: int = 1
    replicas: int = 64
    steps: int = 4000
    seed: int = 0


def origin_cell(config: OriginCell) -> dict[str, dict[str, float]]:
    """R6, R7: Lambda_+ and Lambda_- of a cell, closed form beside the mean log factor of every replica and step."""

    def factors(s: Any, p: Any, draws: Any) -> Any:
        chi = sum(where(draws.uniform() < 0.5, 1.0, p.a) for _ in range(config.S)) / float(config.S)
        return [log(abs(1.0 + p.lr * chi)), log(abs(1.0 - p.lr * chi))]

    if config.S < 1:
        raise InputError(f"a batch holds at least one sample, not S = {config.S}")
    params = {"lr": config.eta, "a": config.a}
    system = System("factors at the origin", lambda p, d: [0.0, 0.0], factors)
    seen = Ensemble(system, config.replicas, params, cell_seed(config)).run(config.steps, [Average()])[0]
    value, error = np.asarray(seen.value, float), np.asarray(seen.stderr if seen.stderr is not None else [math.nan] * 2, float)
    theory = two_layer_exponents(Discrete((1.0, config.a)), config.eta, config.S)
    lost = seen.details["diverged"]
    return {
        name: {"predicted": theory[k], "measured": float(value[k]), "stderr": float(error[k]), "diverged": lost}
        for k, name in enumerate(("plus", "minus"))
    }


ORIGIN = Sweep(
    title="phases at the origin of a two-layer net",
    config=OriginCell(),
    cell=origin_cell,
    quantities=(
        Quantity("plus", "Lambda_+: growth along u = w (above 0 the net learns the sign of E chi)", 0.0, 2e-3),
        Quantity("minus", "Lambda_-: growth along u = -w", 0.0, 2e-3),
    ),
    axes={"eta": tuple(np.linspace(0.05, 3.0, 24).tolist()), "a": tuple(np.linspace(-0.99, 0.97, 24).tolist())},
)

ENTRY = Entry(
    slug=SLUG,
    title="Type-II Saddles and Probabilistic Stability of Stochastic Gradient Descent",
    paper="Liu Ziyin, Botao Li, Tomer Galanti, Masahito Ueda, 2023, arXiv 2303.13093",
    claims=(
        "Where every per-sample gradient vanishes, SGD stays in probability if and only if the largest Lyapunov exponent is negative.",
        "A saddle can attract though every moment diverges; a minimum can repel.",
        "The origin of a two-layer net has four phases in learning rate and noise; a larger batch leaves the dying phase.",
        "The rank a network keeps is the number of mirrors with a positive exponent.",
    ),
    presets={
        "smoke": Config(
            exponents=ExponentConfig(seeds=(0, 1, 2)),
            phases=replace(PhaseConfig(), replicas=16, steps=2000),
            rank=None,
            spectrum=None,
        ),
        "default": Config(),
        "full": Config(
            exponents=ExponentConfig(replicas=20_000, seeds=tuple(range(10))),
            phases=PhaseConfig(points=72, replicas=256, steps=20_000, seeds=tuple(range(5))),
            network=NetworkConfig(replicas=20_000, seeds=tuple(range(5))),
            rank=RankConfig(replicas=10_000, seeds=tuple(range(5))),
            spectrum=SpectrumConfig(replicas=20_000, seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
    sweeps={"origin": ORIGIN},
)
