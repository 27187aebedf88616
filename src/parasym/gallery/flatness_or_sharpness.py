"""Does SGD Seek Flatness or Sharpness? An Exactly Solvable Model.

Slug flatness-or-sharpness. SGD minimises the fluctuation of its gradient among the global minima, not the curvature. In deep linear
regression the minimiser is known, so the sharpness at convergence is a function of the data alone: the flattest possible where the label
noise is isotropic, and without bound as it becomes degenerate. Nonlinear networks follow the same trend.

Conventions: loss |f - y|^2 summed over outputs (no 1/2; ``paper`` alone uses the paper's half), sharpness tr H of the population loss,
 Gaussian inputs, label noise N(0, Sigma_eps) with log-spaced eigenvalues of condition number kappa and trace 3, fresh samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble, settle
from parasym.solvable.chains import (
    Chain,
    chain_fluctuation,
    curvature_kernel,
    hessian_trace,
    minimise_gauge,
    random_gauges,
    regauge,
)
from parasym.solvable.edln import EDLN, LinearRegressionNetwork, run_sgd

SLUG = "flatness-or-sharpness"
_F64 = torch.float64


def spaced(kappa: float, size: int = 3, trace: float = 3.0) -> Tensor:
    """Diagonal covariance with log-spaced entries of condition number ``kappa`` and the given trace."""
    w = torch.logspace(0, -math.log10(kappa), size, dtype=_F64)
    return torch.diag(trace * w / w.sum())


def turned(values: Sequence[float], draws: Ensemble) -> Tensor:
    """diag(values) times a random rotation (from a QR of N(0, 1))."""
    n = len(values)
    return torch.diag(torch.tensor(values, dtype=_F64)) @ torch.linalg.qr(draws.normal(n, n)[0]).Q


# ------------------------------------------------------------------------------------------------ algebra


@dataclass(frozen=True)
class AlgebraConfig:
    """Random V (outs, ins) and covariances; depths 2..4 with the widths below; noise of each kappa in a random basis."""

    outs: int = 3
    ins: int = 4
    widths: tuple[tuple[int, ...], ...] = ((5,), (4, 4), (4, 6, 5))
    kappas: tuple[float, ...] = (1.0, 10.0, 100.0, 1e4)
    extreme: tuple[float, float] = (1e8, 1e10)
    gauges: int = 200
    kick: float = 0.02
    descent: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)


def _covariance(draws: Ensemble, n: int) -> Tensor:
    A = draws.normal(n, n)[0]
    return A @ A.T / n + 0.2 * torch.eye(n, dtype=_F64)


def algebra(config: AlgebraConfig) -> Part:
    """R1-R5, R9, E3: closed forms against direct evaluation, automatic differentiation, random gauges and minimisation."""
    names = ("fluctuation", "trace", "top", "flattest", "gauge", "growth", "edge", "still", "fell")
    rows: dict[str, list[float]] = {key: [] for key in names}
    ratios: dict[int, list[list[float]]] = {len(w) + 1: [] for w in config.widths}
    for seed in config.seeds:
        draws, g = Ensemble((seed,)), torch.Generator().manual_seed(seed)
        V, X = draws.normal(config.outs, config.ins)[0], _covariance(draws, config.ins)
        turn = torch.linalg.qr(draws.normal(config.outs, config.outs)[0]).Q
        noise = _covariance(draws, config.outs)
        for widths in config.widths:
            model = LinearRegressionNetwork(V, X, noise, widths)
            chain, W = model.chain, model.noise_equilibrium(g)
            theta = torch.cat([w.reshape(-1) for w in W])
            H = torch.func.hessian(model.loss)(theta)
            rows["fluctuation"].append(float(chain_fluctuation(W, X, noise)) / chain.fluctuation() - 1)
            rows["trace"].append(float(H.trace()) / chain.sharpness() - 1)
            rows["top"].append(float(torch.linalg.eigvalsh(H)[-1]) / chain.top_curvature() - 1)
            rows["top"].append(float(torch.linalg.eigvalsh(curvature_kernel(W, X))[-1]) / chain.top_curvature() - 1)
            others = [regauge(W, random_gauges(widths, 0.3, g)) for _ in range(config.gauges)]
            rows["gauge"].append(min(float(chain_fluctuation(o, X, noise)) for o in others) / chain.fluctuation())
            flat = minimise_gauge(W, lambda o, X=X, c=chain: hessian_trace(o, X) / c.flattest_sharpness(), seed)  # type: ignore[misc]
            rows["flattest"].append(float(hessian_trace(flat, X)) / chain.flattest_sharpness() - 1)
            change, fell = _descent(model, config, g, seed)
            rows["still"].append(change)
            rows["fell"].append(fell)
            kinds = [replace(chain, noise=turn @ spaced(k, config.outs) @ turn.T) for k in config.kappas]
            ratios[len(widths) + 1].append([c.sharpness() / c.flattest_sharpness() for c in kinds])
            far = [replace(chain, noise=turn @ spaced(k, config.outs) @ turn.T).sharpness() for k in config.extreme]
            rows["growth"].append(math.log(far[1] / far[0]) / math.log(config.extreme[1] / config.extreme[0]))
        rows["edge"] += _rank_one(config, draws)
    seen = torch.tensor(list(ratios.values()), dtype=_F64)  # depths, seeds, kappas
    steps = seen.log().diff(dim=-1)
    depth = _depths(config)
    checks = (
        match("E|g|^2 at the minimiser against 4 D T, relative", 0.0, rows["fluctuation"], 1e-10, source=f"{SLUG} R2, E3"),
        match("tr H at the minimiser: closed form against the autograd one, relative", 0.0, rows["trace"], 1e-10, source=f"{SLUG} R3, E3"),
        match("lambda_max at the minimiser: closed form against the autograd Hessian and the kernel, relative", 0.0, rows["top"], 1e-9,
              source=f"{SLUG} R5"),
        match("flattest global minimum: closed form against L-BFGS on tr H over all gauges, relative", 0.0, rows["flattest"], 1e-7,
              source=f"{SLUG} R3"),
        holds(f"least E|g|^2 of {config.gauges} random gauges over that of the minimiser", rows["gauge"], at_least=1 - 1e-12,
              source=f"{SLUG} E3"),
        match("isotropic noise: tr H at the minimiser over the flattest", 1.0, seen[..., 0], 1e-10, source=f"{SLUG} R4, Cor. 2"),
        holds("tr H over the flattest rises with kappa: smallest factor from one kappa to the next", steps.exp().amin(), at_least=1.0,
              source=f"{SLUG} R4, Cor. 4", spread=steps.exp().amin((0, 2))),
        match(f"growth exponent of tr H with kappa from {config.extreme[0]:g} to {config.extreme[1]:g}: without bound", 0.5, rows["growth"],
              0.05, source=f"{SLUG} R4"),
        match("te tx = s_bar^2: second difference of tr H over the depths 2..8, relative: it grows linearly", 0.0, depth, 1e-10,
              source=f"{SLUG} Cor. 1"),
        match("rank-one target: tr H and the flattest over their formulas - 1", 0.0, rows["edge"][0::2], 1e-10, source=f"{SLUG} R9"),
        match("rank-one target, anisotropic noise with p.Sigma p = te / d_y: tr H over the flattest", 1.0, rows["edge"][1::2], 1e-10,
              source=f"{SLUG} R9"),
        control("full-batch descent from near the flattest minimum: |change| of tr H from it, relative", rows["still"], at_most=0.01,
                source=f"{SLUG} E3", spread=rows["still"]),
        holds("the same: its excess loss fell, start over end", rows["fell"], at_least=100.0, source=f"{SLUG} E3", spread=rows["fell"]),
    )  # fmt: skip
    series = [{"name": f"D = {d}", "x": list(config.kappas), "y": seen[i].mean(0).tolist(), "low": seen[i].amin(0).tolist(),
               "high": seen[i].amax(0).tolist()} for i, d in enumerate(ratios)]  # fmt: skip
    data = {"series": series, "x": "condition number of the label noise", "y": "tr H / flattest", "log": "xy"}
    return Part(
        checks, (Figure("sharpness at convergence", data, curves, "Over the flattest minimum; the band is the spread of the seeds."),)
    )


def _descent(model: LinearRegressionNetwork, config: AlgebraConfig, g: torch.Generator, seed: int) -> tuple[float, float]:
    """|tr H - flattest| / flattest after noiseless descent from near the flattest minimum, and by what factor the excess loss fell."""
    flattest = model.chain.flattest().weights(model.widths, g)
    _, end, fell = settle(model.loss, torch.cat([w.reshape(-1) for w in flattest]), config.kick, config.descent, seed)
    X = model.chain.inputs
    return abs(float(hessian_trace(model.unflatten(end), X) / hessian_trace(flattest, X)) - 1), fell


def _depths(config: AlgebraConfig) -> Tensor:
    """Second differences of tr H over the depth for noise scaled so that T does not depend on it."""
    out = []
    for seed in config.seeds:
        draws = Ensemble((seed + 50,))
        V, X, noise = draws.normal(config.outs, config.ins)[0], _covariance(draws, config.ins), _covariance(draws, config.outs)
        c = Chain(V, X, noise, 2)
        V = V * (float(noise.trace() * X.trace()) ** 0.5 / c.total)  # the nuclear norm is linear in V
        trace = torch.tensor([Chain(V, X, noise, d).sharpness() for d in range(2, 9)], dtype=_F64)
        out.append((trace.diff(n=2).abs() / trace[0]).max())
    return torch.stack(out)


def _rank_one(config: AlgebraConfig, draws: Ensemble) -> list[float]:
    """Largest relative error of the two formulas of R9; and the ratio to the flattest where p.Sigma p = te / d_y."""
    p, c = (torch.nn.functional.normalize(draws.normal(n)[0], dim=0) for n in (config.outs, config.ins))
    X, noise, sigma, d = _covariance(draws, config.ins), _covariance(draws, config.outs), 1.3, config.outs
    chain, al, te = Chain(sigma * torch.outer(p, c), X, noise, 2), p @ noise @ p, noise.trace()
    half = X.trace().sqrt() * (c @ X @ c).sqrt() * sigma
    seen = chain.sharpness() / (2 * half * ((te / al).sqrt() + d * (al / te).sqrt())), chain.flattest_sharpness() / (4 * d**0.5 * half)
    basis = torch.linalg.qr(torch.cat([p[:, None], draws.normal(d, d - 1)[0]], 1)).Q
    weights = torch.ones(d, dtype=_F64)
    weights[1], weights[2] = 1.5, 0.5  # mean one: p.Sigma p = 1 = te / d
    special = replace(chain, noise=basis @ torch.diag(weights) @ basis.T)
    return [max(abs(float(s) - 1) for s in seen), special.sharpness() / special.flattest_sharpness()]


# ------------------------------------------------------------------------------------------------ SGD


@dataclass(frozen=True)
class StationaryConfig:
    """f = W_2 W_1 x, one hidden layer of ``width``; V = diag(1, .8, .6) Q, Sigma_x = diag(1, .7, .5); one fresh sample a step.

    Start: the minimiser in the gauge I + ``gauge`` N(0, 1) / sqrt(width); tr H averaged over the last 30 % and over replicas. At 60,000
    steps, the length of the dossier, kappa 50 is still up to 14 % above its stationary value from some gauges, hence the longer run.
    """

    width: int = 4
    eta: float = 0.005
    steps: int = 400_000
    replicas: int = 20
    gauge: float = 0.4
    kappas: tuple[float, ...] = (1.0, 10.0, 50.0)
    tolerances: tuple[float, ...] = (0.04, 0.04, 0.08)
    halvings: int = 3
    halved_steps: int = 60_000
    seeds: tuple[int, ...] = (0, 1, 2)


def networks(config: StationaryConfig, seed: int) -> list[LinearRegressionNetwork]:
    """One network for each kappa, with the same map."""
    V, X = turned((1.0, 0.8, 0.6), Ensemble((seed,))), torch.diag(torch.tensor([1.0, 0.7, 0.5], dtype=_F64))
    return [LinearRegressionNetwork(V, X, spaced(k), (config.width,), lr=config.eta) for k in config.kappas]


def stationary(config: StationaryConfig) -> Part:
    """E1, R3, R6: SGD ends where the closed form says; the gap is of the order of the learning rate."""
    found, closed, flat, began = [], [], [], []
    for seed in config.seeds:
        models = networks(config, seed)
        starts = [replace(m, gauge=config.gauge).random_minimum(torch.Generator().manual_seed(seed)) for m in models]
        run = run_sgd(models, starts, steps=config.steps, replicas=config.replicas, seed=seed)
        found.append(_tensor(run.average)[:, 0])
        closed.append([m.chain.sharpness() for m in models])
        flat.append([m.chain.flattest_sharpness() for m in models])
        began.append([float(hessian_trace(W, m.chain.inputs)) for m, W in zip(models, starts, strict=True)])
    seen, theory = torch.stack(found), torch.tensor(closed, dtype=_F64)
    checks: list[Check] = [
        match(f"kappa {k}: tr H of SGD against the closed form, seeds", theory[:, i], seen[:, i], tol, relative=True, source=f"{SLUG} E1",
              spread=seen[:, i])
        for i, (k, tol) in enumerate(zip(config.kappas, config.tolerances, strict=True))
    ]  # fmt: skip
    flattest = torch.tensor(flat, dtype=_F64)[:, -1]
    checks.append(control(f"kappa {config.kappas[-1]}: tr H of SGD over the flattest minimum", seen[:, -1] / flattest,
                          at_least=1.15, source=f"{SLUG} E1, R4", spread=seen[:, -1]))  # fmt: skip
    start = torch.tensor(began, dtype=_F64)
    checks.append(holds("kappa 1 from a random gauge: tr H at the end over the start: SGD flattens", seen[:, 0] / start[:, 0], at_most=1.0,
                        source=f"{SLUG} R6", spread=seen[:, 0]))  # fmt: skip
    gaps = _shrinking(config)
    checks.append(holds("the gap to the closed form when the rate is halved: smallest factor", gaps[:-1] / gaps[1:], at_least=1.3,
                        source=f"{SLUG} E1: first order in eta"))  # fmt: skip
    series = [{"name": f"SGD, seed {s}", "x": list(config.kappas), "y": seen[i].tolist(), "mark": "points", "colour": i}
              for i, s in enumerate(config.seeds)]  # fmt: skip
    series += [{"name": f"closed form, seed {s}", "x": list(config.kappas), "y": theory[i].tolist(), "colour": i}
               for i, s in enumerate(config.seeds)]  # fmt: skip
    data = {"series": series, "x": "condition number of the label noise", "y": "tr H", "log": "x"}
    return Part(tuple(checks), (Figure("SGD ends at the predicted sharpness", data, curves),))


def _tensor(estimate: object) -> Tensor:
    value = getattr(estimate, "value", None)
    return value if isinstance(value, Tensor) else torch.tensor(float("nan"), dtype=_F64)[None, None]


def _shrinking(config: StationaryConfig) -> Tensor:
    """Relative gap at kappa 1 over halved rates, averaged over seeds; as long in time as the first."""
    rows = []
    for k in range(config.halvings):
        eta, gaps = config.eta / 2**k, []
        for seed in config.seeds:
            model = replace(networks(config, seed)[0], lr=eta)
            run = run_sgd([model], [model.noise_equilibrium()], steps=config.halved_steps * 2**k, replicas=2 * config.replicas, seed=seed)
            gaps.append(abs(float(_tensor(run.average)[0, 0]) / model.chain.sharpness() - 1))
        rows.append(sum(gaps) / len(gaps))
    return torch.tensor(rows, dtype=_F64)


@dataclass(frozen=True)
class SharpeningConfig:
    """As `StationaryConfig`, started on the flattest global minimum; tr H and E|g|^2 read at equal times."""

    run: StationaryConfig = StationaryConfig(kappas=(1.0, 50.0), steps=40_000, replicas=100)
    at: int = 24_000
    points: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)


def sharpening(config: SharpeningConfig) -> Part:
    """E2, R6, R7: from the flattest minimum tr H rises where the noise is anisotropic, while E|g|^2 falls."""
    run, times = config.run, tuple(range(0, config.run.steps, config.run.steps // config.points))
    rows = []
    for seed in config.seeds:
        models = networks(run, seed)
        starts = [m.chain.flattest().weights((run.width,)) for m in models]
        rows.append(_tensor(run_sgd(models, starts, steps=run.steps, replicas=run.replicas, seed=seed, path=times).path))
    seen = torch.stack(rows)  # seeds, kappas, times, (tr H, E|g|^2)
    at = times.index(min(times, key=lambda t: abs(t - config.at)))
    change = seen[..., at, 0] / seen[..., 0, 0] - 1
    fall = seen[:, -1, :, 1]
    sharp = seen[:, -1, :, 0]
    together = torch.stack([torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(sharp, fall, strict=True)])
    checks = (
        holds(f"kappa {run.kappas[-1]}: rise of tr H at step {times[at]} from the flattest minimum", change[:, -1], at_least=0.12,
              source=f"{SLUG} E2, R6", spread=change[:, -1]),
        control(f"kappa {run.kappas[0]}: |change| of tr H", change[:, 0].abs(), at_most=0.06, source=f"{SLUG} E2", spread=change[:, 0]),
        holds(f"kappa {run.kappas[-1]}: E|g|^2 at the end over the start", fall[:, -1] / fall[:, 0], at_most=0.95, source=f"{SLUG} R7",
              spread=fall[:, -1] / fall[:, 0]),
        holds(f"kappa {run.kappas[-1]}: correlation of tr H with E|g|^2 along the run", together, at_most=-0.5, source=f"{SLUG} R7",
              spread=together),
    )  # fmt: skip
    series = []
    for i, k in enumerate(run.kappas):
        for j, what in enumerate(("tr H", "E|g|^2")):
            v = seen[:, i, :, j] / seen[:, i, :1, j]
            band = {"low": v.amin(0).tolist(), "high": v.amax(0).tolist()}
            series.append({"name": f"{what}, kappa {k}", "x": list(times), "y": v.mean(0).tolist(), "mark": "line" if j == 0 else "dash",
                           "colour": i, **band})  # fmt: skip
    data = {"series": series, "x": "step", "y": "over its start, at the flattest minimum"}
    return Part(checks, (Figure("progressive sharpening", data, curves, "The fluctuation falls while the curvature rises."),))


@dataclass(frozen=True)
class PaperConfig:
    """The paper's own setting: D = 3, V = Sigma_x = I_2, roots of Sigma_eps diag(10, .1) or diag(10, 10), loss (1/2)|f - y|^2, rate .01,
    batches of 10; weights started at ``init`` N(0, 1). In this library's convention that is |f - y|^2 at half the rate, with half its
    tr H."""

    eta: float = 0.01
    batch: int = 10
    steps: int = 60_000
    init: float = 0.7
    replicas: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)


def paper(config: PaperConfig) -> Part:
    """The paper's linear experiment: the anisotropic run sharpens for as long as it lasts, the isotropic one is as flat as can be."""
    eye = torch.eye(2, dtype=_F64)
    noises = [torch.diag(torch.tensor(v, dtype=_F64)) for v in ((100.0, 0.01), (100.0, 100.0))]
    models = [EDLN(eye, eye, n, (2, 2), lr=config.eta / 2, batch=config.batch) for n in noises]
    times = tuple(config.steps * k // 12 for k in range(1, 13))
    times = (*times[:-1], config.steps - 1)
    rows = []
    for seed in config.seeds:
        W = [config.init * w for w in Ensemble((seed,)).normal(3, 2, 2)[0]]
        run = run_sgd(models, [W, W], steps=config.steps, replicas=config.replicas, seed=seed, path=times)
        rows.append(_tensor(run.path)[..., 0] / 2)
    seen = torch.stack(rows)
    closed = [m.chain.sharpness() / 2 for m in models]
    ratio = seen[:, 0, -1] / seen[:, 1, -1]
    checks = (
        match("isotropic noise: the closed form is that of the flattest minimum (half loss)", models[1].chain.flattest_sharpness() / 2,
              closed[1], 1e-9, source=f"{SLUG} R3"),
        holds("closed form, diag(10, .1) over diag(10, 10)", closed[0] / closed[1], at_least=20.0, source=f"{SLUG} R3, Cor. 3"),
        holds("tr H after the run, diag(10, .1) over diag(10, 10)", ratio, at_least=3.0, source=f"{SLUG}: settings of the paper",
              spread=ratio),
        holds("diag(10, .1): tr H at the end over that at a third of the run: still rising", seen[:, 0, -1] / seen[:, 0, 3], at_least=1.0,
              source=f"{SLUG}: settings of the paper", spread=seen[:, 0, -1] / seen[:, 0, 3]),
        control("diag(10, .1): tr H at the end over its limit: far from stationary", seen[:, 0, -1] / closed[0], at_most=0.9,
                source=f"{SLUG}: settings of the paper", spread=seen[:, 0, -1] / closed[0]),
    )  # fmt: skip
    series = [{"name": name, "x": list(times), "y": seen[:, i].mean(0).tolist(), "low": seen[:, i].amin(0).tolist(),
               "high": seen[:, i].amax(0).tolist()} for i, name in enumerate(("diag(10, .1)", "diag(10, 10)"))]  # fmt: skip
    data = {"series": series, "x": "step", "y": "tr H (half loss)"}
    return Part(checks, (Figure("the paper's linear setting", data, curves, "Roots of the label-noise covariance."),))


# ------------------------------------------------------------------------------------------------ nonlinear networks

Forward = Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class StudentConfig:
    """Students of one architecture, teacher-student regression with label noise of each kappa, fresh N(0, I) inputs of dimension 4.

    ``kind``: "mlp" 4-16-3 with ReLU, teacher with 6 units; "rnn", 12 tanh units over 3 tokens, read out from the last state; "transformer",
    width 12, one head, residual attention and ReLU feed-forward of 24, no norm, mean-pooled. No biases. Start N(0, 1/fan_in) (recurrent
    x .7), the same for every kappa and replica of a seed; Gauss-Newton trace 2 E|df/dtheta|^2 on ``probe`` inputs at ``points`` times.
    The ratio of an MLP depends on its teacher: 1.07 to 1.89 over ten of them. The dossier's demand of 1.1 for each of its four (E4) is
    therefore entered as refuted (``strict``); ``each`` and ``mean`` are those of E5.
    """

    kind: str = "mlp"
    eta: float = 0.01
    batch: int = 2
    steps: int = 60_000
    replicas: int = 6
    points: int = 6
    probe: int = 512
    kappas: tuple[float, ...] = (1.0, 1000.0)
    each: float = 1.03
    mean: float = 1.1
    strict: float | None = None
    source: str = "E4"
    seeds: tuple[int, ...] = (0, 1, 2)


def _mlp(x: Tensor, W: Sequence[Tensor]) -> Tensor:
    return torch.relu(x @ W[0]) @ W[1]


def _rnn(x: Tensor, W: Sequence[Tensor]) -> Tensor:
    h = torch.tanh(x[..., 0, :] @ W[0])
    for t in range(1, x.shape[-2]):
        h = torch.tanh(x[..., t, :] @ W[0] + h @ W[1])
    return h @ W[2]


def _transformer(x: Tensor, W: Sequence[Tensor]) -> Tensor:
    """x (..., b, T, 4); the leading axes of x and of every weight are those of the stack."""
    flat = x.flatten(-3, -2)
    e = flat @ W[0]
    q, k, v = ((e @ w).unflatten(-2, x.shape[-3:-1]) for w in W[1:4])
    mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    e = e + mixed.flatten(-3, -2)
    e = e + torch.relu(e @ W[4]) @ W[5]
    return e.unflatten(-2, x.shape[-3:-1]).mean(-2) @ W[6]


_BLOCK = [(4, 12), (12, 12), (12, 12), (12, 12), (12, 24), (24, 12), (12, 3)]
_SHAPES: dict[str, tuple[Forward, list[tuple[int, int]], list[tuple[int, int]], tuple[int, ...]]] = {
    "mlp": (_mlp, [(4, 16), (16, 3)], [(4, 6), (6, 3)], (4,)),
    "rnn": (_rnn, [(4, 12), (12, 12), (12, 3)], [(4, 12), (12, 12), (12, 3)], (3, 4)),
    "transformer": (_transformer, _BLOCK, _BLOCK, (3, 4)),
}  # fmt: skip


def _drawn(kind: str, shapes: list[tuple[int, int]], draws: Ensemble) -> list[Tensor]:
    """(seeds, in, out) of N(0, 1 / fan_in); the recurrent matrix of an RNN x .7."""
    out = [draws.normal(*s, dtype=torch.float32) / s[0] ** 0.5 for s in shapes]
    if kind == "rnn":
        out[1] = 0.7 * out[1]
    return out


def gauss_newton_trace(forward: Forward, weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """2 E|df/dtheta|^2 of each network of a stack (s, ...), over inputs x (n, ...) that all see."""

    def one(*args: Tensor) -> Tensor:
        W, sample = [w[None] for w in args[:-1]], args[-1]
        return forward(sample[None, None], W)[0, 0]

    jac = torch.func.jacrev(one, tuple(range(len(weights))))
    total = torch.zeros(len(weights[0]), dtype=_F64)
    for chunk in x.split(32):
        found = torch.func.vmap(torch.func.vmap(jac, (*([None] * len(weights)), 0)), (*([0] * len(weights)), None))(*weights, chunk)
        total += sum(j.double().square().flatten(1).sum(1) for j in found)
    return 2 * total / len(x)


def students(config: StudentConfig) -> tuple[Tensor, Tensor]:
    """Gauss-Newton traces (seeds, kappas, times), averaged over replicas, and fit errors E|f - teacher|^2 at the end (seeds, kappas)."""
    forward, shapes, teacher_shapes, inside = _SHAPES[config.kind]
    draws, s, c, r = Ensemble(config.seeds), len(config.seeds), len(config.kappas), config.replicas
    W = [w[:, None, None].expand(-1, c, r, -1, -1).flatten(0, 2).clone().requires_grad_() for w in _drawn(config.kind, shapes, draws)]
    teacher = _drawn(config.kind, teacher_shapes, draws)
    shared = [t[:, None, None].expand(-1, c, r, -1, -1).flatten(0, 2) for t in teacher]
    root = torch.stack([spaced(k).sqrt() for k in config.kappas]).float()
    probe = draws.normal(config.probe, *inside, dtype=torch.float32)[0]
    traces, every, block = [gauss_newton_trace(forward, W, probe)], config.steps // config.points, 200
    for start in range(0, config.steps, block):
        # replicas differ in their samples; the kappas of a seed see the same inputs and the same unit noise
        x = draws.normal(block, r, config.batch, *inside, dtype=torch.float32)[:, None].expand(-1, c, *([-1] * (3 + len(inside))))
        e = draws.normal(block, r, config.batch, 3, dtype=torch.float32)[:, None]
        e = (e @ root[None, :, None, None]).transpose(0, 2).transpose(1, 2).flatten(1, 3)
        x = x.transpose(0, 2).transpose(1, 2).flatten(1, 3)
        with torch.no_grad():
            y = torch.stack([forward(a, shared) for a in x]) + e
        for a, b in zip(x, y, strict=True):
            loss = (forward(a, W) - b).square().sum(-1).mean(-1).sum()
            for w, g in zip(W, torch.autograd.grad(loss, W), strict=True):
                w.data.sub_(g, alpha=config.eta)
        if (start + block) % every < block:
            traces.append(gauss_newton_trace(forward, W, probe))
    with torch.no_grad():
        gap = forward(probe.expand(s * c * r, *probe.shape), W) - forward(probe.expand(s * c * r, *probe.shape), shared)
    return torch.stack(traces, -1).reshape(s, c, r, -1).mean(2), gap.square().sum(-1).mean(-1).reshape(s, c, r).mean(2).double()


def nonlinear(config: StudentConfig) -> Part:
    """E4, E5, R8: anisotropic label noise sharpens nonlinear networks too, at equal fit."""
    traces, fit = students(config)
    late = traces[..., -3:].mean(-1)
    ratio = late[:, -1] / late[:, 0]
    where = f"{config.kind}, kappa {config.kappas[-1]:g} over kappa {config.kappas[0]:g}"
    checks = [
        holds(f"{where}: Gauss-Newton trace, mean of the last three readings, every seed", ratio, at_least=config.each,
              source=f"{SLUG} {config.source}, R8", spread=ratio),
        holds(f"{where}: its mean over the seeds", ratio.mean(), at_least=config.mean, source=f"{SLUG} {config.source}", spread=ratio),
        holds(f"{config.kind}: both are fitted: E|f - teacher|^2 over the trace of the label noise", fit / 3.0, at_most=0.25,
              source=f"{SLUG} {config.source}", spread=fit[:, -1]),
    ]  # fmt: skip
    if config.strict is not None:
        checks.append(refuted(f"{where}: the same ratio, every seed", ratio, at_least=config.strict, source=f"{SLUG} {config.source}",
                              spread=ratio))  # fmt: skip
    times = [config.steps * k // config.points for k in range(traces.shape[-1])]
    series = [{"name": f"kappa {k:g}", "x": times, "y": traces[:, i].mean(0).tolist(), "low": traces[:, i].amin(0).tolist(),
               "high": traces[:, i].amax(0).tolist()} for i, k in enumerate(config.kappas)]  # fmt: skip
    return Part(
        tuple(checks), (Figure(f"sharpness of the {config.kind}", {"series": series, "x": "step", "y": "2 E|df/dtheta|^2"}, curves),)
    )


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    algebra: AlgebraConfig | None = AlgebraConfig()
    stationary: StationaryConfig | None = StationaryConfig()
    sharpening: SharpeningConfig | None = SharpeningConfig()
    paper: PaperConfig | None = PaperConfig()
    mlp: StudentConfig | None = StudentConfig(strict=1.1)
    rnn: StudentConfig | None = StudentConfig("rnn", batch=4, steps=8000, replicas=4, points=10, probe=128, source="E5")
    transformer: StudentConfig | None = StudentConfig("transformer", batch=4, steps=6000, replicas=4, points=10, probe=128, source="E5")


ENTRY = Entry(
    slug=SLUG,
    title="Does SGD Seek Flatness or Sharpness? An Exactly Solvable Model",
    paper="Yizhou Xu, Pierfrancesco Beneventano, Isaac Chuang, Liu Ziyin, arXiv 2602.05065",
    claims=(
        "Among global minima SGD picks the least gradient fluctuation, so its sharpness is a function of the data alone.",
        "With isotropic label noise that is the flattest minimum there is; with anisotropic noise SGD sharpens, without bound.",
        "Sharpness can rise while the fluctuation that SGD minimises falls.",
        "ReLU networks, recurrent networks and transformers follow.",
    ),
    presets={
        "smoke": Config(
            algebra=AlgebraConfig(widths=((5,), (4, 4)), gauges=50),
            stationary=StationaryConfig(halvings=2),
            mlp=None,
            rnn=None,
            transformer=None,
        ),
        "default": Config(),
        "full": Config(
            algebra=AlgebraConfig(seeds=tuple(range(9))),
            stationary=StationaryConfig(steps=600_000, replicas=100, seeds=tuple(range(5))),
            sharpening=SharpeningConfig(seeds=tuple(range(5))),
            paper=PaperConfig(steps=100_000),
            mlp=StudentConfig(strict=1.1, seeds=tuple(range(4))),
            rnn=StudentConfig("rnn", batch=4, steps=40_000, replicas=4, points=10, probe=128, source="E5"),
            transformer=StudentConfig("transformer", batch=4, steps=40_000, replicas=4, points=10, probe=128, source="E5"),
        ),
    },
    experiments={
        "algebra": algebra,
        "stationary": stationary,
        "sharpening": sharpening,
        "paper": paper,
        "mlp": nonlinear,
        "rnn": nonlinear,
        "transformer": nonlinear,
    },
)
