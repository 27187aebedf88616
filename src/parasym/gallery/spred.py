"""spred: solving L1 penalties with SGD (slug spred): weights as products of factors, plain weight decay on the factors.

Problem: min loss + a |W|_1. Factors have torch's ``weight_decay`` a, that is (a / 2)(|U|^2 + |V|^2). Regressions: loss
|y - X w|^2 / (2 n), data standardised, no intercept, full batch, starts ``start`` N(0, 1); scikit-learn's Lasso(alpha = a) is the same
problem (the official linear task compares a loss without the 1/2 with it, off by a factor 2). float64 but for the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from parasym.core.errors import MissingExtraError
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.digits import digits
from parasym.gallery.drawings import agreement, bars, curves
from parasym.gallery.ensemble import Ensemble, plain, slope
from parasym.methods.lasso import lasso as certified
from parasym.methods.spred import Product, Spred, solve, spred

SLUG = "spred"
Rule = Literal["sgd", "adam", "adamw"]


def table(name: str) -> tuple[Tensor, Tensor]:
    """Standardised X (n, p) and y (n,) of one of scikit-learn's data sets.

    "diabetes", "diabetes squares" (with squares and products), "cancer" (malignant or not), "digit 8" (eight or not).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from sklearn.preprocessing import PolynomialFeatures  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise MissingExtraError("the data come with scikit-learn: pip install 'parasym[data]'") from error
    if name.startswith("diabetes"):
        x, y = datasets.load_diabetes(return_X_y=True)
        if name == "diabetes squares":
            x = PolynomialFeatures(2, include_bias=False).fit_transform(x)
    elif name == "cancer":
        x, y = datasets.load_breast_cancer(return_X_y=True)
    else:
        x, y = datasets.load_digits(return_X_y=True)
        x, y = x[:, x.std(0) > 0], y == 8
    x, y = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    return (x - x.mean(0)) / x.std(0, unbiased=False), (y - y.mean()) / y.std(unbiased=False)


def fit(
    slope_of: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    decays: tuple[Tensor, Tensor],
    *,
    rule: Rule,
    eta: float,
    steps: int,
    start: tuple[Tensor, Tensor],
    momentum: float = 0.9,
    watch: Callable[[int, Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """u and v after training on a loss by its gradient in w = u v, batched over settings of different decays.

    Args:
        slope_of: w -> gradient of the plain loss, both of ``shape``.
        decays: of u and of v, broadcastable to the factors.
        rule: "sgd" with momentum; "adam" with the decay in the gradient; "adamw" decoupled (what does not work, R8); both Adams on a
            cosine to zero, since their steps do not shrink by themselves.
    """
    u, v = (s.clone().requires_grad_() for s in start)
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: torch.optim.SGD([u, v], eta, momentum=momentum),
        "adam": lambda: torch.optim.Adam([u, v], eta),
        "adamw": lambda: torch.optim.Adam([u, v], eta),
    }
    optimizer = makers[rule]()
    with torch.no_grad():
        for step in range(steps):
            rate = eta if rule == "sgd" else eta * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = rate
            g = slope_of(u * v)
            u.grad, v.grad = g * v, g * u
            if v.shape != u.shape:
                v.grad = v.grad.sum(-1, keepdim=True)
            if rule == "adamw":
                u.mul_(1 - rate * decays[0])
                v.mul_(1 - rate * decays[1])
            else:
                u.grad += decays[0] * u
                v.grad += decays[1] * v
            optimizer.step()
            if watch is not None:
                watch(step, u, v)
    assert (u * v).shape == torch.Size(shape)
    return u.detach(), v.detach()


# ------------------------------------------------------------------------------------------------ A1: lasso


@dataclass(frozen=True)
class LassoConfig:
    """Diabetes (442 x 10): SGD ``eta``, momentum .9, from ``start`` N(0, 1); ``hard``: an ill-conditioned penalty; ``ratio``: of decays."""

    alphas: tuple[float, ...] = (0.03, 0.1, 0.3)
    hard: float = 0.003
    ratio: float = 16.0
    eta: float = 0.1
    steps: int = 10_000
    start: float = 0.3
    seeds: tuple[int, ...] = (0, 1, 2)


def lasso(config: LassoConfig) -> Part:
    """A1, R1, R2: SGD with decay on u v finds the lasso's solution, zeros included, also with unequal decays."""
    x, y = table("diabetes")
    gram, target = x.T @ x / len(y), x.T @ y / len(y)
    alphas = torch.tensor([*config.alphas, config.hard, *config.alphas], dtype=torch.float64)[:, None, None]
    ratio = torch.tensor([1.0] * (len(config.alphas) + 1) + [config.ratio] * len(config.alphas), dtype=torch.float64)[:, None, None]
    draws = Ensemble(config.seeds)
    shape = (len(alphas), len(config.seeds), x.shape[1])
    first = [config.start * draws.normal(x.shape[1]).expand(shape) for _ in range(2)]
    decays = (alphas * ratio.sqrt(), alphas / ratio.sqrt())
    u, v = fit(lambda w: w @ gram - target, shape, decays, rule="sgd", eta=config.eta, steps=config.steps, start=(first[0], first[1]))
    w = u * v
    checks: list[Check] = []
    series = []
    for i, alpha in enumerate(config.alphas):
        exact = certified(x.numpy(), y.numpy(), alpha)
        reference = torch.from_numpy(exact.weights)
        error, other = (w[i] - reference).abs().amax(-1), (w[i + len(config.alphas) + 1] - reference).abs().amax(-1)
        library = torch.from_numpy(_sklearn(x, y, alpha))
        balance = (decays[0][i] * u[i].square() - decays[1][i] * v[i].square()).abs().amax(-1)
        uneven = i + len(config.alphas) + 1
        charge = (decays[0][uneven] * u[uneven].square() - decays[1][uneven] * v[uneven].square()).abs().amax(-1)
        checks += [
            match(
                f"alpha = {alpha:g}: weights of spred = Lasso of scikit-learn",
                0.0,
                (w[i] - library).abs().amax(-1),
                1e-6,
                source=f"{SLUG} A1",
            ),
            match(f"alpha = {alpha:g}: and = the certified solution (gap {exact.gap:.0e})", 0.0, error, 1e-6, source=f"{SLUG} A1"),
            match(f"alpha = {alpha:g}: size of the support", exact.support, (w[i].abs() > 1e-7).sum(-1), 0.0, source=f"{SLUG} A1"),
            match(f"alpha = {alpha:g}, decays 4 a and a / 4: weights", 0.0, other, 1e-6, source=f"{SLUG} R1"),
            match(f"alpha = {alpha:g}: a_u u^2 = a_v v^2 at the end", 0.0, torch.stack([balance, charge]), 1e-8, source=f"{SLUG} R1, R3"),
        ]
        series.append(
            {"name": f"alpha = {alpha:g}", "predicted": plain(reference.repeat(len(config.seeds))), "measured": plain(w[i].flatten())}
        )
    hard = certified(x.numpy(), y.numpy(), config.hard)
    objective = _objective(x, y, w[len(config.alphas)], config.hard)
    checks.append(
        holds("ill-conditioned penalty: objective above the optimum", objective - hard.objective, at_most=1e-4, source=f"{SLUG} A1")
    )
    wrong = torch.from_numpy(_sklearn(x, y, config.alphas[1] / 2))
    checks.append(
        control(
            "Lasso(alpha / 2) is another problem: largest difference",
            (w[1] - wrong).abs().amax(-1),
            at_least=1e-2,
            source=f"{SLUG} pitfalls",
        )
    )
    return Part(tuple(checks), (Figure("Weights of the lasso", {"series": series, "x": "exact", "y": "spred"}, agreement),))


def _sklearn(x: Tensor, y: Tensor, alpha: float) -> np.ndarray:
    from sklearn.linear_model import Lasso  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return np.asarray(Lasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=200_000).fit(x.numpy(), y.numpy()).coef_)


def _objective(x: Tensor, y: Tensor, w: Tensor, alpha: float) -> Tensor:
    return 0.5 * (w @ x.T - y).square().mean(-1) + alpha * w.abs().sum(-1)


# ------------------------------------------------------------------------------------------------ solver


@dataclass(frozen=True)
class SolverConfig:
    """The solver of `parasym.methods.lasso` on three real data sets, penalties as shares of the largest one that has a solution."""

    tables: tuple[str, ...] = ("diabetes squares", "cancer", "digit 8")
    shares: tuple[float, ...] = (0.3, 0.05, 0.01, 0.001)
    tol: float = 1e-10


def solver(config: SolverConfig) -> Part:
    """The spred solver reaches scikit-learn's objective on real data, with a duality gap as its proof."""
    checks, labels, gaps = [], [], []
    for name in config.tables:
        x, y = table(name)
        top = float((x.T @ y).abs().max()) / len(y)
        found = [certified(x.numpy(), y.numpy(), top * share, tol=config.tol) for share in config.shares]
        theirs = [float(_objective(x, y, torch.from_numpy(_sklearn(x, y, top * share)), top * share)) for share in config.shares]
        mine = [item.objective for item in found]
        gap = [item.relative_gap for item in found]
        checks += [
            match(f"{name}: objective of scikit-learn, every penalty", theirs, mine, 1e-6, source=f"{SLUG} solver", relative=True),
            holds(f"{name}: duality gap over the objective at zero", gap, at_most=config.tol, source=f"{SLUG} solver"),
        ]
        labels += [f"{name}, {share:g}" for share in config.shares]
        gaps += [max(value, 1e-18) for value in gap]
    figure = Figure(
        "Duality gaps", {"labels": labels, "series": [{"name": "gap", "y": gaps}], "y": "relative duality gap", "log": "y"}, bars
    )
    return Part(tuple(checks), (figure,))


# ------------------------------------------------------------------------------------------------ A2: p > n


@dataclass(frozen=True)
class WideConfig:
    """``samples`` x ``dim`` Gaussian design, ``true`` weights N(0, size^2), noise; SGD and Adam on u v, and what must not work.

    The error of decoupled decay scales with the true weights, whose size the dossier leaves open.
    """

    samples: int = 60
    dim: int = 200
    true: int = 5
    size: float = 3.0
    noise: float = 0.1
    alpha: float = 0.3
    eta: float = 0.02
    steps: int = 8000
    adam: float = 0.02
    start: float = 0.3
    seeds: tuple[int, ...] = (0, 1, 2)


def wide(config: WideConfig) -> Part:
    """A2, R8: with more weights than samples the zeros are still found; plain subgradient descent and decoupled decay do not find them."""
    draws = Ensemble(config.seeds)
    x, truth = draws.normal(config.samples, config.dim), torch.zeros(len(config.seeds), config.dim, dtype=torch.float64)
    truth[:, : config.true] = config.size * draws.normal(config.true)
    y = (x @ truth[..., None])[..., 0] + config.noise * draws.normal(config.samples)
    first = (config.start * draws.normal(config.dim), config.start * draws.normal(config.dim))
    exact = [certified(a.numpy(), b.numpy(), config.alpha) for a, b in zip(x, y, strict=True)]
    reference = torch.stack([torch.from_numpy(item.weights) for item in exact])

    def slope_of(w: Tensor) -> Tensor:
        return (x.mT @ ((x @ w[..., None])[..., 0] - y)[..., None])[..., 0] / config.samples

    alpha = torch.tensor(config.alpha, dtype=torch.float64)
    weights = {}
    for rule in ("sgd", "adam", "adamw"):
        eta = config.eta if rule == "sgd" else config.adam
        u, v = fit(slope_of, tuple(reference.shape), (alpha, alpha), rule=rule, eta=eta, steps=config.steps, start=first)  # type: ignore[arg-type]
        weights[rule] = u * v
    direct, speed = first[0] * first[1], torch.zeros_like(reference)
    for _ in range(config.steps):
        speed = 0.9 * speed + slope_of(direct) + alpha * direct.sign()
        direct = direct - config.eta * speed
    error = {rule: (w - reference).abs().amax(-1) for rule, w in weights.items()}
    checks = (
        match("SGD on u v: weights = the certified lasso", 0.0, error["sgd"], 1e-6, source=f"{SLUG} A2", spread=error["sgd"]),
        match("size of the support", [e.support for e in exact], (weights["sgd"].abs() > 1e-8).sum(-1), 0.0, source=f"{SLUG} A2"),
        match("Adam, decay in the gradient: weights", 0.0, error["adam"], 1e-4, source=f"{SLUG} R8", spread=error["adam"]),
        control("Adam, decoupled decay (AdamW): error", error["adamw"], at_least=1.0, source=f"{SLUG} A2, R8", spread=error["adamw"]),
        control("plain subgradient of a |w|: weights above 1e-8", (direct.abs() > 1e-8).sum(-1), at_least=config.dim, source=f"{SLUG} A2"),
        control("plain subgradient of a |w|: weights above 1e-3", (direct.abs() > 1e-3).sum(-1), at_least=100, source=f"{SLUG} A2"),
    )
    names = {"spred, SGD": weights["sgd"], "spred, AdamW": weights["adamw"], "subgradient": direct}
    series = [
        {"name": name, "x": list(range(1, config.dim + 1)), "y": plain(w[0].abs().sort(descending=True).values.clamp_min(1e-18))}
        for name, w in names.items()
    ]
    figure = Figure("Weights by size, first seed", {"series": series, "x": "rank", "y": "|w|", "log": "y"}, curves)
    return Part(checks, (figure,))


# ------------------------------------------------------------------------------------------------ A3: logistic


@dataclass(frozen=True)
class LogisticConfig:
    """Breast cancer (569 x 30), mean logistic loss, no intercept; ill-conditioned, hence the large rate."""

    alpha: float = 0.02
    eta: float = 0.5
    steps: int = 20_000
    start: float = 0.3
    seeds: tuple[int, ...] = (0, 1, 2)


def logistic(config: LogisticConfig) -> Part:
    """A3: L1 logistic regression, to the KKT conditions and to scikit-learn's saga."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-not-found, import-untyped, unused-ignore]

    x, y = table("cancer")
    sign = torch.where(y > 0, 1.0, -1.0).double()
    rows = x * sign[:, None]
    draws = Ensemble(config.seeds)
    shape = (len(config.seeds), x.shape[1])
    first = (config.start * draws.normal(x.shape[1]), config.start * draws.normal(x.shape[1]))

    def slope_of(w: Tensor) -> Tensor:
        return -(torch.sigmoid(-(w @ rows.T)) @ rows) / len(rows)

    a = torch.tensor(config.alpha, dtype=torch.float64)
    u, v = fit(slope_of, shape, (a, a), rule="sgd", eta=config.eta, steps=config.steps, start=first)
    w = u * v
    g, on = slope_of(w), w.abs() > 1e-8
    residual = torch.where(on, (g + a * w.sign()).abs(), (g.abs() - a).clamp_min(0)).amax(-1)
    saga = LogisticRegression(
        l1_ratio=1.0, C=1 / (config.alpha * len(x)), solver="saga", fit_intercept=False, tol=1e-10, max_iter=50_000, random_state=0
    ).fit(x.numpy(), sign.numpy())
    reference = torch.from_numpy(np.asarray(saga.coef_[0]))
    checks = (
        holds("KKT residual", residual, at_most=1e-8, source=f"{SLUG} A3", spread=residual),
        match("weights = scikit-learn's saga", 0.0, (w - reference).abs().amax(-1), 1e-4, source=f"{SLUG} A3"),
        match("size of the support", int((reference != 0).sum()), on.sum(-1), 0.0, source=f"{SLUG} A3"),
        control("it is sparse: weights that are zero", (~on).sum(-1), at_least=1, source=f"{SLUG} A3"),
    )
    return Part(checks)


# ------------------------------------------------------------------------------------------------ R3, R4, R6: the landscape


@dataclass(frozen=True)
class LandscapeConfig:
    """Small lassos (``dim``, a) with Gaussian data of ``samples`` rows; gradient flow by RK4 steps ``dt`` from ``start`` N(0, 1)."""

    dim: int = 6
    samples: int = 30
    alpha: float = 0.4
    dt: float = 0.01
    horizon: float = 150.0
    late: tuple[float, float] = (20.0, 40.0)
    start: float = 0.5
    kick: float = 1e-9  # small enough that the descent stays in the linear regime of zero
    cubic: float = 0.1
    pull: float = 2.0
    basin: float = 0.1
    seeds: tuple[int, ...] = (0, 1, 2)


def landscape(config: LandscapeConfig) -> Part:
    """R3, R4, R6: stationary points are KKT points or strict saddles; imbalance decays at 2 a; a pruned weight at 2 (a - |g|)."""
    draws = Ensemble(config.seeds)
    x = draws.normal(config.samples, config.dim)
    truth = draws.normal(config.dim) * (torch.arange(config.dim) < config.dim // 2)
    y = (x @ truth[..., None])[..., 0] + 0.1 * draws.normal(config.samples)
    gram, target, a = x.mT @ x / config.samples, (x.mT @ y[..., None])[..., 0] / config.samples, config.alpha

    def force(z: Tensor) -> Tensor:
        u, v = z
        g = (gram @ (u * v)[..., None])[..., 0] - target
        return -torch.stack([g * v + a * u, g * u + a * v])

    z = config.start * torch.stack([draws.normal(config.dim), draws.normal(config.dim)])
    initial = z[0].square() - z[1].square()
    times, imbalance, logs = [], [], []
    for step in range(round(config.horizon / config.dt)):
        k1 = force(z)
        k2 = force(z + 0.5 * config.dt * k1)
        k3 = force(z + 0.5 * config.dt * k2)
        z = z + config.dt / 6 * (k1 + 2 * k2 + 2 * k3 + force(z + config.dt * k3))
        if step % 20 == 0:
            times.append((step + 1) * config.dt)
            imbalance.append((z[0].square() - z[1].square()) / initial)
            logs.append((z[0] * z[1]).abs().clamp_min(1e-300).log())
    time = torch.tensor(times, dtype=torch.float64)
    early = time < 4
    law = torch.exp(-2 * a * time[early])[:, None, None]
    seen = torch.stack(imbalance)[early]
    g = (gram @ (z[0] * z[1])[..., None])[..., 0] - target
    exact = [certified(xs.numpy(), ys.numpy(), a) for xs, ys in zip(x, y, strict=True)]
    pruned = torch.stack([torch.from_numpy(item.weights) for item in exact]) == 0
    late = (time > config.late[0]) & (time < config.late[1])
    measured = slope(time[late], torch.stack(logs)[late])
    clear = pruned & (g.abs() > 0.05)  # nearer to zero a + g and a - g are too close for the late slope to be alone
    expected = -2 * (a - g.abs())
    eigenvalues = _curvature_of_zero_pairs(config, x, y, z, pruned)
    at_zero = ((gram @ torch.where(pruned, 0.0, z[0] * z[1])[..., None])[..., 0] - target)[pruned].abs()
    kkt = torch.where(pruned, (g.abs() - a).clamp_min(0), (g + a * (z[0] * z[1]).sign()).abs())
    checks = [
        match("imbalance (u^2 - v^2)(t) / (u^2 - v^2)(0) = exp(-2 a t)", law.expand_as(seen), seen, 1e-6, source=f"{SLUG} R4"),
        match(
            "pruned weights: late slope of log|u v| = -2 (a - |g|), where |g| > .05",
            expected[clear],
            measured[clear],
            0.02,
            relative=True,
            source=f"{SLUG} R4",
        ),
        holds("where the flow ends: KKT residual", kkt.amax(-1), at_most=1e-4, source=f"{SLUG} R2, R3"),
        match(
            "Hessian of the spred loss, block of a zero pair: eigenvalues a -+ |g|, g the slope of the loss in its weight",
            torch.cat([a - at_zero, a + at_zero]).sort().values,
            eigenvalues,
            1e-12,
            source=f"{SLUG} R3",
        ),
        *_saddles(config, x, y),
        *_deeper(config),
    ]
    series = [
        {"name": f"seed {s}", "x": plain(time), "y": plain(torch.stack(logs)[:, i].amin(-1) / np.log(10))}
        for i, s in enumerate(config.seeds)
    ]
    figure = Figure("The smallest weight under the flow", {"series": series, "x": "time", "y": "log10 |u v|"}, curves)
    return Part(tuple(checks), (figure,))


def factored(config: LandscapeConfig, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss of spred on one data set: |y - X (u v)|^2 / (2 n) + (a / 2)(|u|^2 + |v|^2) of the factors (2, dim), built by `Product`."""
    form = Product(config.alpha)

    def loss(z: Tensor) -> Tensor:
        return (y - x @ form(*z)).square().mean() / 2 + config.alpha / 2 * z.square().sum()

    return loss


def _curvature_of_zero_pairs(config: LandscapeConfig, x: Tensor, y: Tensor, z: Tensor, pruned: Tensor) -> Tensor:
    """Eigenvalues, sorted, of the (2, 2) blocks of the Hessian that belong to pruned weights, their factors set to zero."""
    found = []
    for i in range(len(x)):
        at = torch.where(pruned[i], 0.0, z[:, i])
        hessian = torch.func.hessian(factored(config, x[i], y[i]))(at)  # (2, dim, 2, dim)
        found += [torch.linalg.eigvalsh(hessian[:, k, :, k]) for k in pruned[i].nonzero().flatten().tolist()]
    return torch.cat(found).sort().values


def _saddles(config: LandscapeConfig, x: Tensor, y: Tensor) -> list[Check]:
    """Zero of every weight: a saddle where |g| > a, left at the rate |g| - a; a minimum where |g| < a. Descent on the spred loss."""
    eta, steps = 0.01, 400
    rates, slopes = [], []
    for xs, ys in zip(x, y, strict=True):
        loss = factored(config, xs, ys)
        push = torch.func.grad(loss)
        g = torch.func.grad(lambda w, xs=xs, ys=ys: (ys - xs @ w).square().mean() / 2)(torch.zeros_like(xs[0]))
        z = config.kick * torch.stack([torch.ones_like(g), -g.sign()])
        start = z.prod(0).abs().log()
        for _ in range(steps):
            z = z - eta * push(z)
        rates.append((z.prod(0).abs().log() - start) / (2 * steps))
        slopes.append(g)
    g, rate = torch.stack(slopes), torch.stack(rates)
    predicted = torch.log1p(eta * (g.abs() - config.alpha))
    return [
        match("near zero: |u|, |v| grow per step by 1 + eta (|g| - a)", predicted, rate, 1e-9, source=f"{SLUG} R3"),
        match("they grow exactly where |g| > a", (g.abs() > config.alpha).double(), (rate > 0).double(), 0.0, source=f"{SLUG} R3"),
    ]


def _deeper(config: LandscapeConfig) -> list[Check]:
    """R6: D factors cost (a D / 2)|w|^(2 / D), and leave zero only from above a threshold for D = 3."""
    w = torch.linspace(-2, 2, 41, dtype=torch.float64)
    checks = []
    for depth in (2, 3, 4):
        parts = Product(config.cubic, factors=depth).balanced(w)
        cost = 0.5 * config.cubic * torch.stack([p.square() for p in parts]).sum(0)
        stream = torch.Generator().manual_seed(depth)
        other = [p * s for p, s in zip(parts, _unit(depth, stream), strict=True)]
        moved = 0.5 * config.cubic * torch.stack([p.square() for p in other]).sum(0)
        checks.append(
            match(
                f"D = {depth}: cost of the balanced lift = (a D / 2)|w|^(2/D)",
                0.5 * config.cubic * depth * w.abs() ** (2 / depth),
                cost,
                1e-14,
                source=f"{SLUG} R6",
            )
        )
        checks.append(
            holds(f"D = {depth}: no other point of the orbit is cheaper", (moved - cost).min(), at_least=-1e-14, source=f"{SLUG} R6")
        )
    limit = config.cubic / config.pull
    starts = torch.tensor([1 - config.basin, 1 + config.basin], dtype=torch.float64) * limit
    factor = starts.clone()
    for _ in range(100_000):  # three equal factors on l = (w - pull)^2 / 2
        factor = factor - 0.01 * ((factor**3 - config.pull) * factor**2 + config.cubic * factor)
    checks.append(match(f"D = 3, from {1 - config.basin:g} a / |g(0)|: the weight ends at", 0.0, factor[0] ** 3, 1e-8, source=f"{SLUG} R6"))
    checks.append(
        holds(f"D = 3, from {1 + config.basin:g} a / |g(0)|: the weight ends above", factor[1] ** 3, at_least=1.0, source=f"{SLUG} R6")
    )
    return checks


def _unit(depth: int, stream: torch.Generator) -> Tensor:
    """Positive numbers whose product is one."""
    logs = torch.randn(depth, generator=stream, dtype=torch.float64)
    return (logs - logs.mean()).exp()


# ------------------------------------------------------------------------------------------------ R5, R7: groups and matrices


@dataclass(frozen=True)
class GroupConfig:
    """Regression with several outputs and few inputs that matter, (|Y - X W|^2 / (2 n)); matrices |A B - T|^2 / 2, T ~ N(0, 1)."""

    samples: int = 80
    dim: int = 30
    outputs: int = 3
    true: int = 6
    noise: float = 0.3
    alpha: float = 0.15
    size: int = 8
    decay: float = 1.5
    steps: int = 20_000
    tol: float = 1e-10
    seeds: tuple[int, ...] = (0, 1, 2)


def groups(config: GroupConfig) -> Part:
    """R5, R7: one scalar for each group is the group lasso; a matrix product is the nuclear norm; both by weight decay alone."""
    from sklearn.linear_model import MultiTaskLasso  # type: ignore[import-not-found, import-untyped, unused-ignore]

    errors, same, residuals, gates, shrunk = [], [], [], [], []
    for seed in config.seeds:
        draws = Ensemble((seed,))
        x, truth = draws.normal(config.samples, config.dim)[0], draws.normal(config.true, config.outputs)[0]
        y = x[:, : config.true] @ truth + config.noise * draws.normal(config.samples, config.outputs)[0]
        reference = MultiTaskLasso(alpha=config.alpha, fit_intercept=False, tol=1e-13, max_iter=200_000).fit(x.numpy(), y.numpy()).coef_
        model = nn.Linear(config.dim, config.outputs, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(0.3 * draws.normal(config.outputs, config.dim)[0])

        def loss(x: Tensor = x, y: Tensor = y, model: nn.Linear = model) -> Tensor:
            return cast(Tensor, 0.5 * (model(x) - y).square().sum() / len(x))

        certificate = solve(model, loss, config.alpha, group="in", tol=config.tol)
        errors.append(float((model.weight.detach() - torch.from_numpy(reference)).abs().max()))
        residuals.append(certificate.residual)
        alive = (model.weight.detach() != 0).any(0)
        same.append(float((alive == torch.from_numpy((reference != 0).any(0))).all()))
        gates.append(float(alive.sum()))
        shrunk.append(float((~alive).sum()))
    targets = Ensemble(config.seeds).normal(config.size, config.size)
    both = 0.3 * Ensemble([s + 1000 for s in config.seeds]).normal(2, config.size, config.size)
    a, b = both[:, 0], both[:, 1]
    for _ in range(config.steps):
        error = a @ b - targets
        a, b = a - 0.1 * (error @ b.mT + config.decay * a), b - 0.1 * (a.mT @ error + config.decay * b)
    values = torch.linalg.svdvals(targets)
    checks = (
        match("group spred = MultiTaskLasso, every weight", 0.0, errors, 1e-6, source=f"{SLUG} R5", spread=errors),
        match("the same groups are left", 1.0, same, 0.0, source=f"{SLUG} R5", spread=gates),
        holds("KKT residual of the groups, in units of a", residuals, at_most=1e-6, source=f"{SLUG} R5"),
        control("whole groups vanish", shrunk, at_least=1, source=f"{SLUG} R5"),
        match(
            "A B: singular values (s - a)_+", (values - config.decay).clamp_min(0), torch.linalg.svdvals(a @ b), 1e-10, source=f"{SLUG} R7"
        ),
    )
    return Part(checks)


# ------------------------------------------------------------------------------------------------ A4: networks


@dataclass(frozen=True)
class NetworkConfig:
    """Digits 60/40 (split seed 0), pixels / 16, 64-128-10 ReLU, torch's start, SGD .1, momentum .9, batch 64; both weights as U V.

    Then a one-shot cut by size to the shares ``keep``, and ``finetune`` epochs more. Controls: ordinary decay, L1 by its subgradient.
    """

    width: int = 128
    l1: float = 1e-3
    eta: float = 0.1
    batch: int = 64
    epochs: int = 40
    finetune: int = 3
    keep: tuple[float, ...] = (0.1, 0.05)
    seeds: tuple[int, ...] = (0, 1, 2)


def network(config: NetworkConfig) -> Part:
    """A4, R9: a network trained with spred keeps its accuracy when it is cut to a few percent of its weights."""
    rows = {
        name: torch.tensor([_cut(config, name, seed) for seed in config.seeds], dtype=torch.float64) for name in ("spred", "decay", "L1")
    }
    last, tuned = len(config.keep), -1
    s, d = rows["spred"], rows["decay"]
    share = config.keep[-1]
    checks = (
        holds(
            f"accuracy at {share:g}: spred - ordinary decay", s[:, last] - d[:, last], at_least=0.15, source=f"{SLUG} A4", spread=s[:, last]
        ),
        holds(f"spred: accuracy at {share:g} - uncut", s[:, last] - s[:, 0], at_least=-0.02, source=f"{SLUG} A4", spread=s[:, 0]),
        holds("spred, cut and finetuned: accuracy - uncut", s[:, tuned] - s[:, 0], at_least=-0.02, source=f"{SLUG} R9", spread=s[:, tuned]),
        control("ordinary decay, cut: accuracy - uncut", d[:, last] - d[:, 0], at_most=-0.1, source=f"{SLUG} A4", spread=d[:, last]),
        control(
            "L1 by its subgradient is as good at this size: accuracy - uncut",
            rows["L1"][:, last] - rows["L1"][:, 0],
            at_least=-0.05,
            source=f"{SLUG} A4",
        ),
    )
    labels = ["uncut", *(f"{k:g} of the weights" for k in config.keep), f"{share:g}, finetuned"]
    series = [{"name": name, "y": plain(values.mean(0))} for name, values in rows.items()]
    return Part(checks, (Figure("Test accuracy after a cut", {"labels": labels, "series": series, "y": "accuracy"}, bars),))


def _cut(config: NetworkConfig, name: str, seed: int) -> list[float]:
    """Test accuracy uncut, at each share, and at the last one after finetuning."""
    data = digits()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first, second = nn.Linear(64, config.width), nn.Linear(config.width, 10)
    model = nn.Sequential(first, nn.ReLU(), second)
    handle: Spred | None = spred(model, config.l1).apply() if name == "spred" else None
    weights = [first.weight, second.weight] if handle is None else []
    groups: Any = (
        handle.param_groups() if handle else [{"params": list(model.parameters()), "weight_decay": config.l1 if name == "decay" else 0.0}]
    )
    optimizer = torch.optim.SGD(groups, config.eta, momentum=0.9)
    stream = torch.Generator().manual_seed(seed)

    def train(epochs: int, masks: list[Tensor]) -> None:
        for _ in range(epochs):
            order = torch.randperm(len(data.x), generator=stream)
            for at in order.split(config.batch):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(data.x[at]), data.y[at])
                if name == "L1":
                    loss = loss + config.l1 * sum((w.abs().sum() for w in weights), torch.zeros(()))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                with torch.no_grad():
                    for w, mask in zip(weights, masks, strict=False):
                        w.mul_(mask)

    def accuracy() -> float:
        with torch.no_grad():
            return float((model(data.x_test).argmax(-1) == data.y_test).double().mean())

    train(config.epochs, [])
    found, masks = [accuracy()], []
    for share in config.keep:
        if handle is not None:
            handle.prune(keep=share)
        else:
            with torch.no_grad():
                every = torch.cat([w.abs().flatten() for w in weights])
                limit = every.sort(descending=True).values[round(share * len(every)) - 1]
                masks = [w.abs() >= limit for w in weights]
                for w, mask in zip(weights, masks, strict=True):
                    w.mul_(mask)
        found.append(accuracy())
    train(config.finetune, masks)
    if handle is not None:
        handle.bake()
    found.append(accuracy())
    return found


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    lasso: LassoConfig | None = LassoConfig()
    solver: SolverConfig | None = SolverConfig()
    wide: WideConfig | None = WideConfig()
    logistic: LogisticConfig | None = LogisticConfig()
    landscape: LandscapeConfig | None = LandscapeConfig()
    groups: GroupConfig | None = GroupConfig()
    network: NetworkConfig | None = NetworkConfig()


_EXPERIMENTS: Mapping[str, Callable[[Any], Part]] = {
    "lasso": lasso,
    "solver": solver,
    "wide": wide,
    "logistic": logistic,
    "landscape": landscape,
    "groups": groups,
    "network": network,
}

ENTRY = Entry(
    slug=SLUG,
    title="spred: Solving L1 Penalty with SGD",
    paper="Liu Ziyin, Zihao Wang, ICML 2023, arXiv 2210.01212",
    claims=(
        "Weight decay on the factors of U V is the L1 penalty of U V: SGD finds the lasso's solution, zeros included.",
        "No bad minimum is added: stationary points are solutions or strict saddles, left at the rate |g| - a.",
        "One factor for a group is the group lasso, a matrix product the nuclear norm.",
        "Decoupled decay (AdamW) does not do this; a network trained with it survives a cut to a few percent of its weights.",
    ),
    presets={
        "smoke": Config(
            lasso=LassoConfig(alphas=(0.1, 0.3), steps=4000),
            solver=SolverConfig(shares=(0.3, 0.01)),
            wide=WideConfig(steps=4000),
            logistic=None,
            landscape=LandscapeConfig(dt=0.02),
            groups=GroupConfig(dim=20, steps=8000),
            network=None,
        ),
        "default": Config(),
        "full": Config(
            lasso=LassoConfig(steps=60_000, seeds=tuple(range(10))),
            wide=WideConfig(steps=20_000, seeds=tuple(range(10))),
            logistic=LogisticConfig(steps=60_000, seeds=tuple(range(5))),
            network=NetworkConfig(epochs=200, finetune=20, seeds=tuple(range(10))),
        ),
    },
    experiments=_EXPERIMENTS,
)
