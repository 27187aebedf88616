"""Noise Balance (Law of Balance) and the Stationary Distribution of SGD.

Slug law-of-balance. For two groups of weights with a rescaling symmetry, minibatch noise drives |u|^2 - |w|^2 to where the noise of the
two is equal. On the balanced manifold a diagonal linear network of any depth and width is one scalar equation, whose stationary density
is known in closed form: depth brings a sparsity transition, broken ergodicity and fluctuations that are not monotone in the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.diagrams import BALANCE
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble, slope
from parasym.solvable.balance import Moments, density, mean_and_variance, mode, quantile, sparsity_transition

SLUG = "law-of-balance"


# ------------------------------------------------------------------------------------------------ the law


@dataclass(frozen=True)
class LawConfig:
    """l(u, w, z) = sum_ij u_i w_j M_z,ij + (sum_ij u_i w_j N_z,ij)^2 / 2 with M, N ~ N(0, 1): depends on u_i w_j only. Batches of
    ``batch``."""

    u: int = 5
    w: int = 3
    samples: int = 64
    batch: int = 4
    eta: float = 0.02
    steps: int = 200
    decay: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)


def _law_gradients(u: Tensor, w: Tensor, M: Tensor, N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per-sample J (n, i, j), and the gradients J w (n, i), J^T u (n, j)."""
    J = M + torch.einsum("nij,i,j->n", N, u, w)[:, None, None] * N
    return J, J @ w, torch.einsum("nij,i->nj", J, u)


def law(config: LawConfig) -> Part:
    """R1-R3, A3: the discrete law is exact, for every hidden unit of a deep net too; the continuous one is its mean; what is left out of a
    group breaks it."""
    exact, split, broken, scalar = [], [], [], []
    for seed in config.seeds:
        draws = Ensemble((seed,))
        M, N = draws.normal(config.samples, config.u, config.w)[0], draws.normal(config.samples, config.u, config.w)[0]
        u, w = 0.5 * draws.normal(config.u)[0], 0.5 * draws.normal(config.w)[0]
        eta, q = config.eta, float(u @ u - w @ w)
        worst, damped = 0.0, (u.clone(), w.clone())
        predicted = with_decay = q
        for _ in range(config.steps):
            pick = draws.integers(config.samples, config.batch)[0]
            _, gu, gw = (g.mean(0) for g in _law_gradients(u, w, M[pick], N[pick]))
            predicted += eta**2 * float(gu @ gu - gw @ gw)
            u, w = u - eta * gu, w - eta * gw
            worst = max(worst, abs(float(u @ u - w @ w) - predicted))
            _, hu, hw = (g.mean(0) for g in _law_gradients(*damped, M[pick], N[pick]))
            hu = hu + config.decay * damped[0]
            with_decay += eta**2 * float(hu @ hu - hw @ hw)
            damped = damped[0] - eta * hu, damped[1] - eta * hw
        exact.append(worst)
        broken.append(abs(float(damped[0] @ damped[0] - damped[1] @ damped[1]) - with_decay))
        J, gu, gw = _law_gradients(u, w, M, N)
        C1 = (J @ J.mT).mean(0) - J.mean(0) @ J.mean(0).T
        C2 = (J.mT @ J).mean(0) - J.mean(0).T @ J.mean(0)
        traces = [g.var(0, correction=0).sum() for g in (gu, gw)]
        split.append(((traces[0] - traces[1]) - (w @ C2 @ w - u @ C1 @ u)).abs() / (traces[0] + traces[1]))
        scalar.append(_scalar_pair(draws, eta))
    left_out, read_out = _biases(config)
    units, bent = ([_unit_law(config, seed, act) for seed in config.seeds] for act in (nn.ReLU, nn.Tanh))
    return Part(
        (
            match("u in R^5, w in R^3: |u|^2 - |w|^2 against its sum of eta^2 (|g_u|^2 - |g_w|^2), every step", 0.0, exact, 1e-12,
                  source=f"{SLUG} R1, A3", spread=exact),
            match("tr Sigma_u - tr Sigma_w = w^T C2 w - u^T C1 u, relative", 0.0, torch.stack(split), 1e-12, source=f"{SLUG} R1"),
            match("scalar pair: u^2 - w^2 against prod (1 - eta^2 J_B^2), relative", 0.0, scalar, 1e-10, source=f"{SLUG} R2",
                spread=scalar),
            control("weight decay on u alone: the law misses by", broken, at_least=1e-3, source=f"{SLUG} A3", spread=broken),
            control("f = w (u.x + c), c left out of the group: the law misses by", left_out, at_least=1e-3, source=f"{SLUG} A3",
                spread=left_out),
            match("every ReLU unit of two hidden layers, in-weights and bias against out-weights: the same law", 0.0, units, 1e-12,
                  source=f"{SLUG} R3", spread=units),
            control("tanh units: the law misses by", bent, at_least=1e-4, source=f"{SLUG} R3", spread=bent),
            match("f = w (u.x) + b: the law with the output bias outside", 0.0, read_out, 1e-12, source=f"{SLUG} A3", spread=read_out),
        )
    )  # fmt: skip


def _unit_law(config: LawConfig, seed: int, act: type[nn.Module]) -> float:
    """Largest |charge - its sum of eta^2 (|g_in|^2 + g_b^2 - |g_out|^2)| over the units of a net 5-6-4-3 and the steps of SGD."""
    draws, layers = Ensemble((seed + 200,)), [nn.Linear(a, b, dtype=torch.float64) for a, b in ((5, 6), (6, 4), (4, 3))]
    model = nn.Sequential(layers[0], act(), layers[1], act(), layers[2])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(draws.normal(*p.shape)[0] / 2)
    X, Y = draws.normal(config.samples, 5)[0], draws.normal(config.samples, 3)[0]

    def sums(grad: bool) -> Tensor:
        w, b = ([getattr(layer, name).grad if grad else getattr(layer, name).detach() for layer in layers] for name in ("weight", "bias"))
        return torch.cat([w[i].square().sum(1) + b[i].square() - w[i + 1].square().sum(0) for i in (0, 1)])

    predicted, worst = sums(False), 0.0
    for _ in range(config.steps):
        at = draws.integers(config.samples, config.batch)[0]
        model.zero_grad()
        (model(X[at]) - Y[at]).square().sum(-1).mean().backward()  # type: ignore[no-untyped-call]
        predicted = predicted + config.eta**2 * sums(True)
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p.sub_(p.grad, alpha=config.eta)
        worst = max(worst, float((sums(False) - predicted).abs().max()))
    return worst


def _scalar_pair(draws: Ensemble, eta: float) -> float:
    u, w, factor = 1.5, 0.5, 1.0
    start = u * u - w * w
    for _ in range(500):
        x, e = (float(v) for v in draws.normal(2)[0])
        J = x * (w * u * x - x - e)
        factor *= 1 - (eta * J) ** 2
        u, w = u - eta * J * w, w - eta * J * u
    return abs((u * u - w * w) / (start * factor) - 1)


def _biases(config: LawConfig) -> tuple[list[float], list[float]]:
    """How far the charge without the hidden bias, and the charge with an output bias beside it, are from the law."""
    out: tuple[list[float], list[float]] = ([], [])
    for seed in config.seeds:
        for which in (0, 1):
            draws = Ensemble((seed + 100,))
            u, w, c, b = draws.normal(config.u)[0] * 0.5, 0.7, 0.3, 0.2
            q = predicted = float(u @ u) - w * w
            for _ in range(config.steps):
                x, y = draws.normal(config.u)[0], float(draws.normal()[0])
                across = float(u @ x) + (c if which == 0 else 0.0)
                r = w * across + (b if which else 0.0) - y
                gu, gw = r * w * x, r * across
                predicted += config.eta**2 * (float(gu @ gu) - gw * gw)
                u, w = u - config.eta * gu, w - config.eta * gw
                c, b = c - config.eta * r * (w + config.eta * gw), b - config.eta * r
            q = float(u @ u) - w * w
            out[which].append(abs(q - predicted))
    return out


# ------------------------------------------------------------------------------------------------ stationary densities


@dataclass(frozen=True)
class DensityConfig:
    """f = v x, v = sum_i prod_j u_ij (``factors`` of them, ``width`` units), loss (v x - y)^2, y = x + sigma eps, x, eps ~ N(0, 1).

    One fresh sample a step, eta = T, all factors of a unit equal and summing to v = 1 at the start; averages after ``burn`` of the run,
    over replicas with |v| below ``bound`` (the finite kick of S = 1 throws a few out for good; their share is a check).
    ``temperatures`` in units of T_c = b2 / a3.
    """

    factors: int = 2
    sigma: float = 20.0
    temperatures: tuple[float, ...] = (0.2, 0.34, 0.6)
    replicas: int = 1000
    steps: int = 16_000
    burn: float = 0.3
    bound: float = 1e3
    lost: float = 0.01
    mean_tol: float = 0.05
    var_tol: float | None = 0.08
    source: str = "A1"
    seeds: tuple[int, ...] = (0, 1, 2)


def moments_of(sigma: float) -> Moments:
    """Population moments of y = x + sigma eps with x, eps ~ N(0, 1)."""
    return Moments(a1=2.0, a2=2.0, a3=2 + sigma**2, b1=1.0, b2=1.0)


def simulate(config: DensityConfig, shares: Sequence[float] = (1.0,)) -> tuple[Tensor, Tensor, Tensor]:
    """SGD on the diagonal network.

    Args:
        shares: v_i of each unit at the start.

    Returns:
        mean and variance of v over replicas and time (temperatures, seeds), and the units' v_i at the end (units, temperatures, seeds,
        replicas).
    """
    L, draws, chunk = config.factors, Ensemble(config.seeds), 500
    eta = 2 * sparsity_transition(moments_of(config.sigma))[0] * torch.tensor(config.temperatures, dtype=torch.float64)[:, None, None]
    first = torch.tensor(shares, dtype=torch.float64) ** (1 / L)
    u = first[:, None, None, None].expand(-1, len(config.temperatures), len(config.seeds), config.replicas).clone()
    s1 = torch.zeros(u.shape[1:3], dtype=torch.float64)
    s2, count = torch.zeros_like(s1), 0
    for block in range(config.steps // chunk):
        x = draws.normal(chunk, config.replicas).transpose(0, 1)
        y = x + config.sigma * draws.normal(chunk, config.replicas).transpose(0, 1)
        for k in range(chunk):
            rest = u if L == 2 else u * u if L == 3 else u ** (L - 1)
            v = (rest * u).sum(0)
            if block * chunk + k >= config.burn * config.steps and k % 10 == 0:
                kept = torch.where(v.abs() < config.bound, v, torch.nan)  # a replica that a kick has thrown out never comes back
                s1, s2, count = s1 + kept.nanmean(-1), s2 + kept.square().nanmean(-1), count + 1
            u = u - (eta * (v * x[k] - y[k]) * x[k]) * rest
    mean = s1 / count
    return mean, s2 / count - mean.square(), u**L


def stationary(config: DensityConfig) -> Part:
    """A1, A2, R5, R6: mean and variance of SGD against the closed density."""
    moments = moments_of(config.sigma)
    critical = sparsity_transition(moments)[0]
    mean, var, end = simulate(config)
    theory = [mean_and_variance(moments, t * critical, config.factors) for t in config.temperatures]
    checks: list[Check] = []
    for i, t in enumerate(config.temperatures):
        where = f"{config.factors} factors, T = {t} T_c"
        checks.append(match(f"{where}: mean of v", theory[i][0], mean[i], config.mean_tol, relative=True, source=f"{SLUG} {config.source}",
                            spread=mean[i]))  # fmt: skip
        if config.var_tol is not None:
            checks.append(match(f"{where}: variance of v", theory[i][1], var[i], config.var_tol, relative=True,
                                source=f"{SLUG} {config.source}", spread=var[i]))  # fmt: skip
    lost = 1 - (end.sum(0).abs() < config.bound).double().mean(-1)
    claim = f"{config.factors} factors: share of replicas thrown out by a kick and left out, each temperature and seed"
    checks.append(holds(claim, lost, at_most=config.lost, source=f"{SLUG} {config.source}"))
    return Part(tuple(checks), (_density_figure(config, end),))


def _density_figure(config: DensityConfig, end: Tensor) -> Figure:
    moments, series = moments_of(config.sigma), []
    critical = sparsity_transition(moments)[0]
    grid = torch.linspace(0.01, 2.5, 80, dtype=torch.float64)
    for i, t in enumerate(config.temperatures):
        p = density(moments, t * critical, config.factors, grid)
        inside = end.sum(0)[i].reshape(-1)
        counts = torch.histc(inside[inside.isfinite()], bins=25, min=0, max=2.5) / (end[0, i].numel() * 0.1)
        series.append({"name": f"T = {t} T_c", "x": grid.tolist(), "y": p.tolist(), "colour": i})
        middle = (torch.arange(25) * 0.1 + 0.05).tolist()
        series.append({"name": f"SGD, T = {t} T_c", "x": middle, "y": counts.tolist(), "mark": "points", "colour": i})
    data = {"series": series, "x": "v", "y": "density"}
    return Figure(
        f"stationary density, {config.factors} factors", data, curves, "SGD's replicas at the end of the run (points) over the formula."
    )


# ------------------------------------------------------------------------------------------------ phases


@dataclass(frozen=True)
class PhaseConfig:
    """Collapse above T_c (two factors) and its absence (three); the one-step rate of log v near 0; temperatures in units of T_c."""

    above: float = 1.5
    two: DensityConfig = DensityConfig(temperatures=(1.5,), replicas=300, steps=8000)
    three: DensityConfig = DensityConfig(factors=3, sigma=40.0, temperatures=(1.5,), replicas=1000, steps=12_000)
    rate_sigmas: tuple[float, ...] = (20.0, 40.0, 80.0, 160.0)
    rate_draws: int = 400_000
    fluctuation: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
    fluctuation_sigma: float = 40.0
    seeds: tuple[int, ...] = (0, 1, 2)


def phases(config: PhaseConfig) -> Part:
    """R8, R9, R11, A1, A2, A4: sparsity transition, modes, and fluctuations that fall again with the noise."""
    v2 = simulate(config.two)[2][0, 0].abs()
    three = config.three
    v3 = simulate(three)[2][0, 0]
    moments = moments_of(three.sigma)
    critical, leaves = sparsity_transition(moments)
    predicted = quantile(moments, config.above * critical, 3, 0.5)
    positive = torch.stack([row[row > 0].median() for row in v3])
    jumped = (v3 < 0).double().mean(-1)
    rate, kick = _rates(config)
    modes = [mode(moments, t * leaves, 2) for t in (0.98, 1.02)]
    wide = [torch.tensor([mean_and_variance(moments_of(config.fluctuation_sigma), t * critical, L)[1] for t in config.fluctuation])
            for L in (1, 2, 3)]  # fmt: skip
    closed = _closed_forms(moments, 0.34 * critical)
    still = {L: _flux(moments, 0.34 * critical, L) for L in (1, 2, 3, 4)}
    checks = (
        match("2 factors: the density by quadrature over its closed form, largest relative deviation", 0.0, closed[0], 1e-6,
              source=f"{SLUG} R6"),
        match("1 to 4 factors: flux of the reduced equation on its density, over its drift", 0.0, list(still.values()), 1e-3,
              source=f"{SLUG} R4, R5"),
        control("the same without the drift that noise makes, 2 to 4 factors", [_flux(moments, 0.34 * critical, L, 0.0) for L in (2, 3, 4)],
                at_least=0.05, source=f"{SLUG} R4"),
        match("1 factor: the general density over the closed form of linear regression", 0.0, closed[1], 1e-6, source=f"{SLUG} R7"),
        match("1 factor: exponent of the tail against 2 + b1 / (T a1)", closed[3], closed[2], 0.01, relative=True, source=f"{SLUG} R7"),
        holds(f"2 factors, T = {config.above} T_c: median |v| at the end", v2.median(-1).values, at_most=1e-3, source=f"{SLUG} A1, R8",
              spread=v2.median(-1).values),
        match(f"3 factors, T = {config.above} T_c: median of v over replicas that kept their sign", predicted, positive, 0.25,
            relative=True,
              source=f"{SLUG} A2, R9", spread=positive),
        holds("the same: share of replicas that jumped to v < 0, which the diffusion cannot do", jumped, at_most=0.16, source=f"{SLUG} A2",
              spread=jumped),
        match("2 factors: the most likely value is 0 just above T_c / 3", 0.0, modes[1], 1e-6, source=f"{SLUG} R8"),
        holds("2 factors: the most likely value just below T_c / 3", modes[0], at_least=1e-3, source=f"{SLUG} R8"),
        match("3 factors, T = 1.5 T_c: the most likely value against (6 T / T_c)^-3", (6 * config.above) ** -3,
              mode(moments, config.above * critical, 3), 0.02, relative=True, source=f"{SLUG} R9"),
        match("rate of log v near 0 at 1.5 T_c, sampled against 4 eta (b2 - T a3): order at which the finite kick vanishes", 2.0, kick, 0.3,
              source=f"{SLUG} R8"),
        holds("rate of log v near 0 at 1.5 T_c is negative: collapse", -rate, at_least=0.0, source=f"{SLUG} R8", spread=rate),
        holds("1 factor: Var[v] grows with T, smallest increase", (wide[0][1:] - wide[0][:-1]).amin(), at_least=0.0,
            source=f"{SLUG} A4, R11"),
        control("2 factors: Var[v] at 0.8 T_c over its largest value", wide[1][-1] / wide[1].max(), at_most=0.8, source=f"{SLUG} A4, R11"),
        control("3 factors: Var[v] at 0.8 T_c over its largest value", wide[2][-1] / wide[2].max(), at_most=0.95, source=f"{SLUG} A4, R11"),
    )  # fmt: skip
    series = [{"name": f"{L} factors", "x": list(config.fluctuation), "y": w.tolist()} for L, w in zip((1, 2, 3), wide, strict=True)]
    figure = Figure("fluctuations against temperature", {"series": series, "x": "T / T_c", "y": "Var[v]"}, curves, "Depth turns them over.")
    return Part(checks, (figure,))


def _closed_forms(m: Moments, t: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Deviations of the quadrature from R6 and R7, and the exponent of the tail of one factor, measured and predicted."""
    v = torch.linspace(0.05, 3, 60, dtype=torch.float64)
    delta = (m.a1 * m.a3 - m.a2**2) ** 0.5

    def k(v: Tensor) -> Tensor:
        return m.a1 * v**2 - 2 * m.a2 * v + m.a3

    turn = torch.arctan((m.a1 * v - m.a2) / delta)
    two = (m.b2 / (2 * m.a3 * t) - 1.5) * v.log() - (1 + m.b2 / (4 * t * m.a3)) * k(v).log()
    two = two - (m.a3 * m.b1 - m.a2 * m.b2) / (2 * t * m.a3 * delta) * turn
    one = -(1 + m.b1 / (2 * t * m.a1)) * k(v).log() - (m.a2 * m.b1 - m.a1 * m.b2) / (t * m.a1 * delta) * turn
    gaps = []
    for L, closed in ((2, two), (1, one)):  # logarithms: the powers leave the range of floating point
        ratio = density(m, t, L, v).log() - closed
        gaps.append((ratio - ratio[0]).abs().max())
    far = torch.logspace(3, 3.5, 20, dtype=torch.float64)
    wide = 50 * m.b1 / m.a1  # a temperature at which the exponent is small enough to be seen in double precision
    tail = slope(far.log(), density(m, wide, 1, far).log())
    return gaps[0], gaps[1], -tail, 2 + m.b1 / (wide * m.a1)


def _flux(m: Moments, t: float, L: int, ito: float = 1.0, h: float = 1e-5) -> float:
    """Largest |drift p - (D p)' / 2| over |drift| p of dv = -L v^(2 - 2/L) (L' dt + sqrt(T c) dW) + (L (L - 1) / 2) v^(3 - 4/L) T c dt,
    with c = 4 k(v) and L' = 2 (b1 v - b2); ``ito`` scales its last term."""
    v = torch.linspace(0.3, 2.5, 45, dtype=torch.float64)
    at = torch.stack([v - h, v, v + h])
    p = density(m, t, L, at.flatten()).reshape(3, -1)
    noise = 4 * t * (m.a1 * at.square() - 2 * m.a2 * at + m.a3)
    drift = -L * v ** (2 - 2 / L) * 2 * (m.b1 * v - m.b2) + ito * L * (L - 1) / 2 * v ** (3 - 4 / L) * noise[1]
    spread = L**2 * at ** (4 - 4 / L) * noise
    slope_of = ((spread * p)[2] - (spread * p)[0]) / (2 * h)
    size = (L * v ** (2 - 2 / L) * 2 * (m.b1 * v - m.b2)).abs() * p[1] + (spread[1] * p[1]) / v
    return float(((drift * p[1] - slope_of / 2).abs() / size).max())


def _rates(config: PhaseConfig) -> tuple[Tensor, Tensor]:
    """Rate of log v per step near 0 over its diffusion value at each sigma, and the order in 1/sigma at which their difference goes."""
    draws = Ensemble(config.seeds)
    x, e = draws.normal(config.rate_draws), draws.normal(config.rate_draws)
    rates, gaps, log_sigma = [], [], []
    for sigma in config.rate_sigmas:
        moments = moments_of(sigma)
        eta = config.above * sparsity_transition(moments)[0]
        y = x + sigma * e
        rate = 2 * (1 + 2 * eta * x * y).abs().log()
        linear = 2 * (2 * eta * x * y - (2 * eta * x * y).square() / 2)  # the same draws to second order: what the diffusion keeps
        theory = 4 * eta * (moments.b2 - eta * moments.a3)
        rates.append(rate.mean(-1) / abs(theory))
        gaps.append(((rate - linear).mean() / abs(theory)).abs())
        log_sigma.append(-torch.tensor(sigma, dtype=torch.float64).log())
    order = slope(torch.stack(log_sigma), torch.stack(gaps).log())
    return torch.stack(rates)[-1], order


# ------------------------------------------------------------------------------------------------ width


@dataclass(frozen=True)
class WidthConfig:
    """Two units with v_1 / v_2 = 3 at T = 0.3 T_c."""

    run: DensityConfig = DensityConfig(temperatures=(0.3,), replicas=200, steps=30_000)
    ratio: float = 3.0
    seeds: tuple[int, ...] = (0, 1, 2)


def width(config: WidthConfig) -> Part:
    """A5, R10: with two factors the ratio of the units is frozen, with three they become equal."""
    checks: list[Check] = []
    shares = (config.ratio / (1 + config.ratio), 1 / (1 + config.ratio))
    for L in (2, 3):
        run = replace(config.run, factors=L, seeds=config.seeds)
        moments = moments_of(run.sigma)
        t = run.temperatures[0] * sparsity_transition(moments)[0]
        mean, _, end = simulate(run, shares)
        ratio = (end[0, 0] / end[1, 0]).median(-1).values
        theory = mean_and_variance(moments, t, L, width=2)[0]
        if L == 2:
            spread = ((end[0, 0] / end[1, 0]) - config.ratio).abs().amax(-1)
            checks.append(
                match("2 factors: largest |v_1 / v_2 - 3| after the run", 0.0, spread, 1e-9, source=f"{SLUG} A5, R10", spread=spread)
            )
        else:
            checks.append(holds("3 factors: v_1 / v_2 after the run (median)", ratio, at_most=1.1, source=f"{SLUG} A5, R10", spread=ratio))
        checks.append(match(f"{L} factors, width 2: mean of v", theory, mean[0], 0.04, relative=True, source=f"{SLUG} A5", spread=mean[0]))
    return Part(tuple(checks))


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    law: LawConfig | None = LawConfig()
    one: DensityConfig | None = DensityConfig(factors=1, source="R7")
    two: DensityConfig | None = DensityConfig()
    three: DensityConfig | None = DensityConfig(3, 40.0, replicas=200, steps=60_000, var_tol=None, source="A2")
    four: DensityConfig | None = DensityConfig(4, 40.0, (0.2, 0.34), replicas=400, steps=60_000, var_tol=None, source="R5")
    phases: PhaseConfig | None = PhaseConfig()
    width: WidthConfig | None = WidthConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Noise Balance and Stationary Distribution of Stochastic Gradient Descent",
    paper="Liu Ziyin, Hongchao Li, Masahito Ueda, arXiv 2308.06671",
    claims=(
        "Minibatch noise moves |u|^2 - |w|^2 exactly by eta^2 (|g_u|^2 - |g_w|^2) a step, towards equal noise.",
        "A balanced diagonal network has a closed stationary density for any depth and width.",
        "Two factors collapse to zero above T_c; more factors never do, and their fluctuations fall again as the noise grows.",
        "With two factors the ratio of the units is frozen; with more they become equal.",
    ),
    presets={
        "smoke": Config(
            law=LawConfig(steps=60),
            one=None,
            four=None,
            two=DensityConfig(replicas=1500, steps=8000, temperatures=(0.2, 0.34)),
            three=DensityConfig(3, 40.0, temperatures=(0.2,), replicas=200, steps=12_000, mean_tol=0.12, var_tol=None, source="A2"),
            phases=PhaseConfig(three=DensityConfig(3, 40.0, (1.5,), 400, 12_000), rate_draws=200_000),
            width=WidthConfig(run=DensityConfig(temperatures=(0.3,), replicas=200, steps=12_000)),
        ),
        "default": Config(),
        "full": Config(
            law=LawConfig(seeds=tuple(range(6))),
            two=DensityConfig(seeds=tuple(range(6))),
            three=DensityConfig(3, 40.0, replicas=400, steps=60_000, var_tol=None, source="A2", seeds=tuple(range(5))),
            phases=PhaseConfig(rate_draws=2_000_000),
        ),
    },
    experiments={
        "law": law,
        "one": stationary,
        "two": stationary,
        "three": stationary,
        "four": stationary,
        "phases": phases,
        "width": width,
    },
    sweeps={"collapse": BALANCE},
)
