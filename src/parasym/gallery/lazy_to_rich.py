"""From Lazy to Rich: exact learning dynamics of two-layer linear networks with lambda-balanced starts.

Slug lazy-to-rich. L = |W2 W1 X - Y|^2 / (2 P) with whitened inputs, gradient descent on the full batch; lambda I = W2^T W2 - W1 W1^T.
lambda = 0 is rich (sigmoids, both layers take the task's shape), |lambda| large lazy (exponentials, one layer stays near the identity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parasym.gallery.contract import Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import plain
from parasym.solvable.balanced_net import (
    Solution,
    balance,
    balanced_pair,
    final_grams,
    mode,
    singular_pair,
    solve,
    solve_as,
    task_sequence,
)
from parasym.solvable.engines import follow

SLUG = "lazy-to-rich"


def gaussian(*shape: int, seed: int) -> Tensor:
    """Entries N(0, 1), float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(
    inputs: int, hidden: int, outputs: int, lam: float, scale: float, seed: int, aligned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A balanced pair whose product has singular values scale * |N(0, 1)|."""
    draws = torch.Generator().manual_seed(seed)
    s = scale * torch.randn(min(inputs, hidden, outputs), generator=draws, dtype=torch.float64).abs()
    return balanced_pair(inputs, hidden, outputs, lam, s, draws, aligned)


def descend(w1: Tensor, w2: Tensor, target: Tensor, lr: float, steps: int, every: int) -> tuple[Tensor, Tensor]:
    """Gradient descent of |W2 W1 - target|^2 / 2, any leading axes; W1 and W2 at every ``every``-th step, the start included."""
    seen = [(w1, w2)]
    for step in range(1, steps + 1):
        error = w2 @ w1 - target
        w1, w2 = w1 - lr * w2.mT @ error, w2 - lr * error @ w1.mT
        if step % every == 0:
            seen.append((w1, w2))
    return torch.stack([a for a, _ in seen]), torch.stack([b for _, b in seen])


def grams(w1: Tensor, w2: Tensor) -> Solution:
    """What was measured, as a `Solution`."""
    Q = torch.cat([w1.mT, w2], -2)
    return Solution(Q @ Q.mT, w1.shape[-1])


# ------------------------------------------------------------------------------------------------ A: trajectories


@dataclass(frozen=True)
class TrajectoryConfig:
    """A square net of ``size`` learns a Gaussian Sigma by gradient descent from s0 = ``scale`` |N|; every lambda and seed at once."""

    size: int = 4
    lams: tuple[float, ...] = (-10.0, -1.0, 0.0, 1.0, 10.0)
    scale: float = 0.02
    lr: float = 1e-3
    steps: int = 12_000
    every: int = 300
    ode_shapes: tuple[tuple[int, int, int, float], ...] = ((5, 2, 3, -3.0), (3, 2, 6, 2.0), (4, 6, 4, 0.0), (4, 4, 4, -10.0))
    seeds: tuple[int, ...] = (5, 6, 7)


def trajectories(config: TrajectoryConfig) -> Part:
    """A, R1-R5, R7: the Riccati solution beside descent, the ODE, and single modes."""
    worst, drift, curve = [], [], []
    times = config.lr * config.every * torch.arange(config.steps // config.every + 1, dtype=torch.float64)
    for seed in config.seeds:
        n, target = config.size, gaussian(config.size, config.size, seed=seed)
        pairs = [start(n, n, n, lam, config.scale, seed + 100) for lam in config.lams]
        w1, w2 = descend(
            torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs]), target, config.lr, config.steps, config.every
        )
        for i, lam in enumerate(config.lams):
            theory, seen = solve(*pairs[i], target, times), grams(w1[:, i], w2[:, i])
            worst.append(float(((theory.gram - seen.gram).norm(dim=(1, 2)) / seen.gram.norm(dim=(1, 2))).max()))
            charge = w2[:, i].mT @ w2[:, i] - w1[:, i] @ w1[:, i].mT - lam * torch.eye(n, dtype=torch.float64)
            drift.append(float(charge.norm(dim=(1, 2)).max()))
            if seed == config.seeds[0]:
                curve.append((lam, theory, seen, target))
    ode, weights = _against_ode(config)
    rng = torch.Generator().manual_seed(config.seeds[0])
    wild = []
    for seed in config.seeds:
        w1, w2 = (0.5 * torch.randn(config.size, config.size, generator=rng, dtype=torch.float64) for _ in range(2))
        target = gaussian(config.size, config.size, seed=seed)
        a, b = descend(w1, w2, target, config.lr, config.steps, config.every)
        theory, seen = solve_as(w1, w2, target, times, balance(w1, w2).lam), grams(a, b)
        wild.append(float(((theory.gram - seen.gram).norm(dim=(1, 2)) / seen.gram.norm(dim=(1, 2))).max()))
    single = _modes()
    checks = (
        match(f"Q Q^T of descent at lr {config.lr:g} against the solution, relative, every lambda and seed", 0.0, worst, 1e-2,
              source=f"{SLUG} A, R3", spread=worst),
        match("|W2^T W2 - W1 W1^T - lambda I| over the run", 0.0, drift, 1e-2, source=f"{SLUG} R1", spread=drift),
        match("Q Q^T against the ODE, relative, four shapes", 0.0, ode, 1e-8, source=f"{SLUG} A, R3"),
        match("W1 and W2 themselves against the ODE, four shapes", 0.0, weights, 1e-8, source=f"{SLUG} R5"),
        match("aligned modes against s' = sqrt(lambda^2 + 4 s^2)(s~ - s)", 0.0, single, 1e-8, source=f"{SLUG} R7"),
        control("Gaussian layers that are not balanced, lambda from the trace: error of the formula", wild, at_least=0.05,
                source=f"{SLUG} control", spread=wild),
    )  # fmt: skip
    return Part(checks, (_loss_figure(curve, times), _distance_figure(curve, times)))


def _against_ode(config: TrajectoryConfig) -> tuple[list[float], list[float]]:
    from parasym.solvable.riccati import Propagator, two_layer_matrix

    gram, weight, t = [], [], [0.0, 0.5, 3.0]
    for inn, hidden, out, lam in config.ode_shapes:
        target, Q0 = gaussian(out, inn, seed=hidden), 0.3 * gaussian(inn + out, hidden, seed=1)
        F = two_layer_matrix(target, lam)
        exact = follow(lambda _, w, F=F: {"q": F @ w["q"] - 0.5 * w["q"] @ w["q"].mT @ w["q"]}, {"q": Q0}, t, rtol=1e-12).theta["q"]  # type: ignore[misc]
        propagator = Propagator(F)
        gram.append(float((propagator.trajectory(Q0, t) - exact @ exact.mT).abs().max() / (exact @ exact.mT).abs().max()))
        weight.append(float((propagator.weights(Q0, t) - exact).abs().max()))
    return gram, weight


def _modes() -> list[float]:
    out, t = [], torch.linspace(0, 6, 7, dtype=torch.float64)
    for lam in (1e-3, 0.5, 5.0, -0.5, -5.0):
        rhs = lambda _, w, lam=lam: {"s": (lam**2 + 4 * w["s"] ** 2).sqrt() * (1.7 - w["s"])}  # noqa: E731
        exact = follow(rhs, {"s": torch.tensor(0.02, dtype=torch.float64)}, t, rtol=1e-12).theta["s"]
        out.append(float((mode(lam, 0.02, 1.7, t) - exact).abs().max()))
    return out


def _loss_figure(curve: Sequence[tuple[float, Solution, Solution, Tensor]], times: Tensor) -> Figure:
    series = []
    for k, (lam, theory, seen, target) in enumerate(curve):
        for name, found, mark in ((f"lambda = {lam:g}", theory, "line"), (f"descent, {lam:g}", seen, "points")):
            loss = 0.5 * (found.map - target).square().sum((1, 2))
            series.append({"name": name, "x": plain(times), "y": plain(loss.clamp_min(1e-12)), "mark": mark, "colour": k})
    return Figure("loss from lazy to rich", {"series": series, "x": "time", "y": "loss", "log": "y"}, curves,
                  "Sigmoidal at lambda = 0, exponential at large |lambda|; points are gradient descent.")  # fmt: skip


def _distance_figure(curve: Sequence[tuple[float, Solution, Solution, Tensor]], times: Tensor) -> Figure:
    series = []
    for k, (lam, theory, seen, _) in enumerate(curve):
        series.append({"name": f"lambda = {lam:g}", "x": plain(times), "y": plain(theory.kernel_distance()), "colour": k})
        series.append({"name": f"descent, {lam:g}", "x": plain(times), "y": plain(seen.kernel_distance()), "mark": "points", "colour": k})
    return Figure("distance of the tangent kernel from its start", {"series": series, "x": "time", "y": "1 - cos"}, curves)


# ------------------------------------------------------------------------------------------------ B: kernels and architectures


@dataclass(frozen=True)
class KernelConfig:
    """NTK distance after ``time`` of the square net, and of funnels (8-3-3) and inverted funnels (3-3-8) after ``funnel_time``.

    The order in lambda is a statement about most targets: of 300 Gaussian draws 5 miss the factor 1.2 between d(0) and d(+-1), and one,
    ``counterexample``, reverses the two."""

    size: int = 4
    scale: float = 0.02
    time: float = 12.0
    funnel_time: float = 25.0
    lams: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    counterexample: int = 190
    seeds: tuple[int, ...] = tuple(range(30))


def _moved(shape: tuple[int, int, int], lam: float, scale: float, time: float, seed: int) -> float:
    inn, hidden, out = shape
    pair = start(inn, hidden, out, lam, scale, seed + 50)
    found = solve(*pair, gaussian(out, inn, seed=seed), [0.0, time]).kernel_distance()
    return float(found[-1])


def kernels(config: KernelConfig) -> Part:
    """B, R9, R10: rich in the middle, lazy on both sides; in a funnel on one side only."""
    n = config.size
    square = {
        lam: [_moved((n, n, n), lam, config.scale, config.time, seed) for seed in config.seeds]
        for lam in sorted({sign * lam for lam in config.lams for sign in (1, -1)})
    }
    rich = [square[0.0][i] / max(square[1.0][i], square[-1.0][i]) for i in range(len(config.seeds))]
    odd = {lam: _moved((n, n, n), lam, config.scale, config.time, config.counterexample) for lam in (0.0, 1.0, -1.0)}
    lazy = [min(square[1.0][i], square[-1.0][i]) / max(square[10.0][i], square[-10.0][i]) for i in range(len(config.seeds))]
    funnel, inverted = (8, 3, 3), (3, 3, 8)
    side = {
        (shape, lam): [_moved(shape, lam, config.scale, config.funnel_time, seed) for seed in config.seeds]
        for shape in (funnel, inverted)
        for lam in (5.0, -5.0)
    }
    ends, predicted = _ends(config)
    checks = (
        holds("share of targets with d(0) > 1.2 d(+-1)", sum(ratio > 1.2 for ratio in rich) / len(rich), at_least=0.95,
              source=f"{SLUG} B, R10", spread=rich),
        refuted(f"every target has d(0) > d(+-1): their ratio for draw {config.counterexample}", odd[0.0] / max(odd[1.0], odd[-1.0]),
                at_least=1.0, source=f"{SLUG} B, R10"),
        holds("d(+-1) over d(+-10), every seed", lazy, at_least=15.0, source=f"{SLUG} B, R10", spread=lazy),
        match("square net: d(-lambda) = d(lambda), lambda = 1 and 10, every seed", [*square[1.0], *square[10.0]],
              [*square[-1.0], *square[-10.0]], 1e-3, source=f"{SLUG} B"),
        holds("funnel 8-3-3, lambda = 5 is lazy", side[funnel, 5.0], at_most=0.05, source=f"{SLUG} B, R10", spread=side[funnel, 5.0]),
        holds("funnel 8-3-3, lambda = -5 is rich", side[funnel, -5.0], at_least=0.25, source=f"{SLUG} B, R10", spread=side[funnel, -5.0]),
        holds("inverted funnel 3-3-8, lambda = -5 is lazy", side[inverted, -5.0], at_most=0.05, source=f"{SLUG} B, R10",
              spread=side[inverted, -5.0]),
        holds("inverted funnel 3-3-8, lambda = 5 is rich", side[inverted, 5.0], at_least=0.25, source=f"{SLUG} B, R10",
              spread=side[inverted, 5.0]),
        match("W1^T W1 and W2 W2^T at the end, every lambda", predicted, ends, 1e-8, source=f"{SLUG} R9"),
    )  # fmt: skip
    lams = sorted(square)
    series = [{"name": "square 4-4-4", "x": lams, "y": [_mean(square[lam]) for lam in lams],
               "low": [min(square[lam]) for lam in lams], "high": [max(square[lam]) for lam in lams]}]  # fmt: skip
    figure = Figure(
        "how far the kernel moves", {"series": series, "x": "lambda", "y": "NTK distance"}, curves, "Mean and range of the seeds."
    )
    return Part(checks, (figure,))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _ends(config: KernelConfig) -> tuple[list[Tensor], list[Tensor]]:
    seen, theory = [], []
    target = gaussian(config.size, config.size, seed=config.seeds[0])
    for lam in (-2.0, 0.0, 3.0):
        pair = start(config.size, config.size, config.size, lam, config.scale, 3, target)
        end = solve(*pair, target, [0.0, 200.0])
        seen += [end.gram_in[-1].reshape(-1), end.gram_out[-1].reshape(-1)]
        theory += [g.reshape(-1) for g in final_grams(target, lam, config.size)]
    return [v for row in seen for v in row], [v for row in theory for v in row]


# ------------------------------------------------------------------------------------------------ C: sequences of tasks


@dataclass(frozen=True)
class TaskConfig:
    """Reversal (Sigma -> -Sigma from the converged aligned state), continual learning and random wide layers."""

    modes: tuple[float, ...] = (2.0, 1.5, 1.0, 0.7)
    lams: tuple[float, ...] = (0.0, 0.2, -0.2)
    lr: float = 1e-3
    steps: int = 20_000
    widths: tuple[int, ...] = (50, 500, 5000)
    hidden: int = 8
    spreads: tuple[float, float] = (0.05, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2)


def tasks(config: TaskConfig) -> Part:
    """C, R8, R11, R12: reversal sticks at a saddle only when balanced; forgetting does not depend on lambda."""
    s = torch.tensor(config.modes, dtype=torch.float64)
    losses = {}
    for lam in config.lams:
        first, second = (values.diag() for values in singular_pair(lam, s))
        w1, w2 = descend(first, second, -s.diag(), config.lr, config.steps, config.steps)
        losses[lam] = float(0.5 * (w2[-1] @ w1[-1] + s.diag()).square().sum())
    forgotten, expected = [], []
    for seed in config.seeds:
        a, b = gaussian(3, 3, seed=seed), gaussian(3, 3, seed=seed + 10)
        for lam in (0.0, 1.0, -4.0):
            _, second_task = task_sequence(*start(3, 3, 3, lam, 0.05, seed), [a, b], 150.0, points=2)
            forgotten.append(0.5 * (second_task.map[-1] - a).square().sum())
            expected.append(0.5 * (b - a).square().sum())
    s1, s2 = config.spreads
    found = [[balance(s1 * gaussian(config.hidden, n, seed=seed), s2 * gaussian(n, config.hidden, seed=seed + 1)) for seed in config.seeds]
             for n in config.widths]  # fmt: skip
    wide = [b.lam / (n * (s2**2 - s1**2)) for b, n in zip(found[-1], [config.widths[-1]] * len(config.seeds), strict=True)]
    spread = 5 * (2 * (s1**4 + s2**4) / (config.widths[-1] * config.hidden)) ** 0.5 / (s2**2 - s1**2)  # 5 standard errors of the trace
    defects = [_mean([b.defect for b in row]) for row in found]
    power = float(torch.log(torch.tensor(defects[-1] / defects[0])) / torch.log(torch.tensor(config.widths[-1] / config.widths[0])))
    checks = (
        match("reversal, lambda = 0: loss stays at sum s~^2 / 2, the saddle", float(0.5 * s.square().sum()), losses[0.0], 0.05,
              source=f"{SLUG} C, R11"),
        control("reversal, lambda = +-0.2 escapes: loss", [losses[lam] for lam in config.lams if lam], at_most=1e-12, source=f"{SLUG} C"),
        match("loss on the first task after the second = |B - A|^2 / 2", torch.stack(expected), torch.stack(forgotten), 1e-4,
              source=f"{SLUG} R11"),
        match(f"random layers, width {config.widths[-1]}: lambda / N (s2^2 - s1^2)", 1.0, wide, spread, source=f"{SLUG} R12", spread=wide),
        match("defect of random layers falls as width^-1/2: exponent", -0.5, power, 0.1, source=f"{SLUG} R12"),
    )  # fmt: skip
    return Part(checks)


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    trajectories: TrajectoryConfig | None = TrajectoryConfig()
    kernels: KernelConfig | None = KernelConfig()
    tasks: TaskConfig | None = TaskConfig()


ENTRY = Entry(
    slug=SLUG,
    title="From Lazy to Rich: Exact Learning Dynamics in Deep Linear Networks",
    paper="C. Domine, N. Anguita, A. Proca, L. Braun, D. Kunin, P. Mediano, A. Saxe, ICLR 2025, arXiv 2409.14623",
    claims=(
        "The Gram matrix of lambda-balanced layers solves a matrix Riccati equation with a closed solution at every time.",
        "lambda = 0 is rich, large |lambda| lazy; in funnels only the side whose big layer has full rank is lazy.",
        "A balanced network cannot reverse a task, an unbalanced one can; what it forgets does not depend on lambda.",
    ),
    presets={
        "smoke": Config(
            trajectories=TrajectoryConfig(lams=(-1.0, 0.0, 10.0), steps=6000, ode_shapes=((5, 2, 3, -3.0), (4, 4, 4, -10.0))),
            kernels=KernelConfig(seeds=(0, 1, 2), lams=(0.0, 1.0, 10.0)),
            tasks=TaskConfig(widths=(50, 2000)),
        ),
        "default": Config(),
        "full": Config(
            trajectories=TrajectoryConfig(seeds=tuple(range(5, 15))),
            kernels=KernelConfig(seeds=tuple(range(100))),
            tasks=TaskConfig(seeds=tuple(range(10))),
        ),
    },
    experiments={"trajectories": trajectories, "kernels": kernels, "tasks": tasks},
)
