"""Exact Solutions of a Deep Linear Network.

Slug deep-linear-exact. L = E (f - y)^2 + sum gamma_i |W_i|^2 without any 1/2, D hidden layers, noise averaged exactly in the loss. Data
come as their moments; starts are W ~ N(0, c^2 / fan-in) for every layer, read-out too; descent is full batch. The global minimum is a
rank-one uniform network with one unknown number; one hidden layer has no bad minimum at the origin, two or more always do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.diagrams import DROPOUT
from parasym.gallery.drawings import bars, curves
from parasym.solvable.engines import Params, flow, hessian, stack
from parasym.solvable.linear_nets import DeepLinear, DeepLinearMulti
from parasym.solvable.scale import Scale

SLUG = "deep-linear-exact"
SECOND = ((2.2, 0, 0, 0), (0, 1.0, 0, 0), (0, 0, 0.5, 0), (0, 0, 0, 0.2))
CROSS = (0.9, 0.5, -0.4, 0.3)
POWER = 2.0


def diagonal_net(widths: tuple[int, ...], decay: float) -> DeepLinear:
    """The moments of A2 and A3: A = diag(2.2, 1, .5, .2), E = (.9, .5, -.4, .3); E[y^2] only shifts the loss."""
    return DeepLinear(torch.tensor(SECOND), torch.tensor(CROSS), POWER, widths, decay=decay)


# ------------------------------------------------------------------------------------------------ A1, R0-R4, R8


@dataclass(frozen=True)
class MinimumConfig:
    """x (50, 4) scaled by (1.5, 1, .7, .4), y = x.w + .3 noise; six starts of each of the scales 1 and 2, L-BFGS."""

    nets: tuple[tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]], ...] = (
        ((5,), (0.8,), (0.3, 0.2)),
        ((4, 6), (0.5, 0.3), (0.1, 0.15, 0.2)),
        ((4, 6), (0.5, 0.3), (0.6, 0.6, 0.6)),
        ((3, 3, 3), (0.4, 0.4, 0.4), (0.15, 0.15, 0.15, 0.15)),
    )
    restarts: int = 12
    seeds: tuple[int, ...] = (0, 1, 2)


def regression(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The data of A1."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, 4)) * [1.5, 1, 0.7, 0.4]
    return x, x @ rng.normal(size=4) + 0.3 * rng.normal(size=50)


def minimum(config: MinimumConfig) -> Part:
    """A1: the best of the restarts against the closed form; what noise does to the hidden units; controls."""
    checks: list[Check] = []
    for widths, noise, decay in config.nets:
        losses, maps, balance, spread, variances, ends, gradients = [], [], [], [], [], [], []
        expected = []
        for seed in config.seeds:
            model = DeepLinear.of_data(*regression(seed), widths, noise=noise, decay=decay)
            theory = model.predict("minimum").values
            found = model.minimise(seed, config.restarts)
            seen = model.observables(found.best)
            expected.append(float(theory["loss"]))
            losses.append(found.value)
            maps.append(float((seen["map"] - torch.as_tensor(theory["map"].value)).norm()))
            balance.append(float(seen["balance"].max() - seen["balance"].min()))
            rows = found.best["U"][0].abs()
            spread.append(float(rows.max() - rows.min()))
            variances.append(float(seen["variance"]) - float(theory["variance"]))
            levels = torch.tensor([model.power, *(model.power + p.loss for p in model.scale.stationary(model.g))], dtype=torch.float64)
            ends.append(float((found.loss[:, None] - levels).abs().amin(-1).max()))
            start = model.representative(seed)
            gradients.append(max(float(g.abs().max()) for g in torch.func.grad(model.loss)(start).values()))
        name = f"D = {len(widths)}, widths {widths}, s^2 {noise}, gamma {decay}"
        checks += [
            match(f"{name}: global loss", expected, losses, 1e-8, source=f"{SLUG} A1, R3", spread=losses),
            match(f"{name}: |beta - theory|", 0.0, maps, 1e-5, source=f"{SLUG} A1, R3", spread=maps),
            match(f"{name}: spread of gamma_i |W_i|^2 over layers", 0.0, balance, 1e-6, source=f"{SLUG} R2", spread=balance),
            match(f"{name}: spread of |U_i| over units (noise leaves signs only)", 0.0, spread, 1e-5, source=f"{SLUG} R1", spread=spread),
            match(f"{name}: gradient at the uniform network with random signs", 0.0, gradients, 1e-10, source=f"{SLUG} R3, R4"),
            match(
                f"{name}: variance of the prediction over the noise minus (kappa - 1) beta^T A beta",
                0.0,
                variances,
                1e-6,
                source=f"{SLUG} R8",
                spread=variances,
            ),
            match(
                f"{name}: distance of each restart's loss from the nearest predicted stationary level",
                0.0,
                ends,
                1e-8,
                source=f"{SLUG} R3, R6",
            ),
        ]
    return Part((*checks, *_controls(config)))


def _controls(config: MinimumConfig) -> list[Check]:
    """No decay: the balance is set by the start. No noise: units differ. Noise shared by a layer: kappa is 1 + s^2 whatever the width."""
    widths, noise, decay = config.nets[0]
    unbalanced, units, shared, own = [], [], [], []
    for seed in config.seeds:
        x, y = regression(seed)
        free = DeepLinear.of_data(x, y, widths, noise=noise, decay=0.0)
        end = free.minimise(seed, 1).best
        norms = free.squared_norms(end)
        unbalanced.append(float((norms[0] / norms[1] - decay[1] / decay[0]).abs()))
        quiet = DeepLinear.of_data(x, y, widths, decay=decay).minimise(seed, 3).best
        units.append(float(quiet["U"].abs().max() - quiet["U"].abs().min()))
        one = DeepLinear.of_data(x, y, (1,), noise=noise, decay=decay)  # one unit: the noise of a layer that shares its draw
        model = DeepLinear.of_data(x, y, widths, noise=noise, decay=decay)
        alone = one.minimise(seed, 3).value
        shared.append(abs(alone - float(model.predict("minimum").values["loss"])))
        own.append(abs(alone - float(one.predict("minimum").values["loss"])))
    return [
        control("gamma = 0: |W|^2 / |U|^2 is off the balanced ratio by", unbalanced, at_least=1e-2, source=f"{SLUG} R2", spread=unbalanced),
        control("no noise: spread of |U_i| over units", units, at_least=1e-2, source=f"{SLUG} R1", spread=units),
        control("noise shared by the layer: the formula with kappa = 1 + s^2 / d misses by", shared, at_least=1e-3, source=f"{SLUG} R3"),
        match("the same with kappa = 1 + s^2", 0.0, own, 1e-8, source=f"{SLUG} R3"),
    ]


# ------------------------------------------------------------------------------------------------ R7


@dataclass(frozen=True)
class BoundConfig:
    """Random problems: D 2..4, d 1..7, s^2 < 2, three inputs, equal widths and decays; networks are trained on the first few."""

    problems: int = 300
    trained: int = 12
    seeds: tuple[int, ...] = (0, 1, 2)


def bounds(config: BoundConfig) -> Part:
    """R7: b between its bounds with the smallest eigenvalue of A; with the largest it is not; the bounds crossed, nothing is there."""
    columns: list[list[int]] = []
    learned, obeyed = [], []
    for seed in config.seeds:
        rng = np.random.default_rng(seed)
        counts = [0, 0, 0, 0, 0]
        for k in range(config.problems):
            depth, d, s2 = int(rng.integers(2, 5)), int(rng.integers(1, 8)), float(rng.uniform(0, 2))
            gamma = float(np.exp(rng.uniform(math.log(0.01), math.log(3))))
            x = rng.normal(size=(12, 3)) * [1.5, 1, 0.5]
            a, e = x.T @ x / 12, x.T @ (x @ rng.normal(size=3)) / 12
            values, size = np.linalg.eigvalsh(a), float(np.linalg.norm(e))
            low = (gamma / size) ** (1 / (depth - 1)) / d
            high, high_wrong = ((size / (d * (s2 + d) ** depth * v)) ** (1 / (depth + 1)) for v in (values[0], values[-1]))
            found = Scale(a, e, depth, (1 + s2 / d) ** depth).stationary(gamma)
            for point in found:
                b = point.norm ** (1 / (depth + 1)) / d
                counts[0] += not (low <= b * (1 + 1e-9) and b <= high * (1 + 1e-9))
                counts[1] += b > high_wrong
                counts[2] += 1
            if low > high:
                counts[3] += 1
                counts[4] += bool(found)
            if k < config.trained:
                power = 10 * float(e @ np.linalg.solve(a, e))  # only shifts the loss
                net = DeepLinear(torch.from_numpy(a), torch.from_numpy(e), power, (d,) * depth, (s2,) * depth, gamma)
                norm = float(net.moments(net.minimise(seed, 2).best)[0].norm())
                b = norm ** (1 / (depth + 1)) / d
                learned.append(norm > 1e-3)
                obeyed.append(norm <= 1e-3 or low * (1 - 1e-6) <= b <= high * (1 + 1e-6))
        columns.append(counts)
    outside, outside_wrong, points, stops, wrong_stop = (list(column) for column in zip(*columns, strict=True))
    return Part(
        (
            match("stationary points outside the bounds with a_min", 0.0, outside, 0.0, source=f"{SLUG} R7", spread=outside),
            holds("stationary points looked at", points, at_least=100, source=f"{SLUG} R7"),
            match("problems whose bounds cross and that still have one", 0.0, wrong_stop, 0.0, source=f"{SLUG} R7", spread=wrong_stop),
            holds("problems whose bounds cross, all seeds", sum(stops), at_least=10, source=f"{SLUG} R7", spread=stops),
            control("stationary points outside the bound with a_max", outside_wrong, at_least=10, source=f"{SLUG} R7"),
            match("trained networks that keep to the bounds, or to zero: share", 1.0, sum(obeyed) / len(obeyed), 0.0, source=f"{SLUG} R7"),
            holds("of which have learned something: share", sum(learned) / len(learned), at_least=0.1, source=f"{SLUG} R7"),
        )
    )


# ------------------------------------------------------------------------------------------------ R5, R6, A2


@dataclass(frozen=True)
class OriginConfig:
    """Width 8, descent at rate .03 from .1 and 1 times fan-in, gamma = .5 and .9 of the critical decay."""

    width: int = 8
    depths: tuple[int, ...] = (1, 2, 3)
    shares: tuple[float, ...] = (0.5, 0.9)
    small: float = 0.1
    lr: float = 0.03
    steps: int = 8000
    seeds: tuple[int, ...] = (0, 1, 2)


def origin(config: OriginConfig) -> Part:
    """R5, R6: what the origin is; A2: where descent from a small and from an ordinary start ends."""
    checks: list[Check] = []
    for depth in config.depths:
        widths = (config.width,) * depth
        critical = float(diagonal_net(widths, 0.1).scale.critical_decay())
        zero = {name: torch.zeros_like(w) for name, w in diagonal_net(widths, 0.1).init(0).items()}
        lowest = {s: float(torch.linalg.eigvalsh(hessian(diagonal_net(widths, s * critical).loss, zero))[0]) for s in (*config.shares, 1.1)}
        if depth == 1:
            below = [lowest[s] for s in config.shares]
            checks.append(holds("D = 1: smallest Hessian eigenvalue at 0, gamma < |E|", below, at_most=-1e-3, source=f"{SLUG} R5"))
            checks.append(holds("D = 1: the same at 1.1 |E|", lowest[1.1], at_least=1e-3, source=f"{SLUG} R5"))
        else:
            expected = [2 * s * critical for s in lowest]
            words = f"D = {depth}: smallest Hessian eigenvalue at 0 is 2 gamma"
            checks.append(match(words, expected, list(lowest.values()), 1e-10, source=f"{SLUG} R6"))
        models = [diagonal_net(widths, s * critical) for s in config.shares]
        losses = [m.global_minimum().loss for m in (models[0].with_decay(f / config.shares[0]) for f in (0.999, 1.001))]
        checks.append(holds(f"D = {depth}: reduced loss at .999 g_c", losses[0], at_most=-1e-9, source=f"{SLUG} R6"))
        checks.append(match(f"D = {depth}: reduced loss at 1.001 g_c", 0.0, losses[1], 0.0, source=f"{SLUG} R6"))
        checks += _descended(config, models)
    return Part(tuple(checks), (landscape_figure(),))


def _descended(config: OriginConfig, models: list[DeepLinear]) -> list[Check]:
    """Copies: decay x scale x seed, all at once."""
    scales, depth, n = (config.small, 1.0), models[0].depth, len(config.seeds)
    start = stack([m.init(seed, scale) for m in models for scale in scales for seed in config.seeds])
    gamma = torch.tensor([m.g for m in models], dtype=torch.float64).repeat_interleave(len(scales) * n)
    end = run_descent(models[0], start, gamma, config.lr, config.steps)
    maps = models[0].moments(end)[0].reshape(len(models), len(scales), n, -1)
    checks = []
    for i, (model, share) in enumerate(zip(models, config.shares, strict=True)):
        best = torch.from_numpy(model.global_minimum().beta)
        gaps = (maps[i] - best).norm(dim=-1)
        words = f"D = {depth}, {share} g_c, descent"
        checks.append(match(f"{words} from an ordinary start: |beta - minimum|", 0.0, gaps[1], 1e-5, source=f"{SLUG} A2", spread=gaps[1]))
        if depth == 1:
            checks.append(match(f"{words} from .1: |beta - minimum|", 0.0, gaps[0], 1e-5, source=f"{SLUG} A2", spread=gaps[0]))
        else:
            trapped = maps[i, 0].norm(dim=-1)
            claim = f"{words} from .1 stays at the bad minimum: |beta|"
            checks.append(match(claim, 0.0, trapped, 1e-3, source=f"{SLUG} A2, R6", spread=trapped))
            checks.append(holds(f"{words}: |beta| of the minimum it missed", float(best.norm()), at_least=0.1, source=f"{SLUG} A2"))
    return checks


def run_descent(model: DeepLinear, start: Params, gamma: Tensor, lr: float, steps: int) -> Params:
    """Gradient descent on copies that differ in their decay ``gamma`` (n,) or (), equal for all layers; the pull of the decay, 2 gamma W,
    is added by hand, which takes half the time."""
    shrink = (1 - 2 * lr * gamma).reshape(-1, 1, 1)
    names, weights = list(start), list(start.values())
    for _ in range(steps):
        weights = [w.detach().requires_grad_() for w in weights]
        slope = torch.autograd.grad(model.error(dict(zip(names, weights, strict=True))).sum(), weights)
        with torch.no_grad():
            weights = [w * shrink - lr * g for w, g in zip(weights, slope, strict=True)]
    return dict(zip(names, weights, strict=True))


# ------------------------------------------------------------------------------------------------ A3


@dataclass(frozen=True)
class TrapConfig:
    """Width 16, gamma = .8 g_c, rate .01, start c times fan-in: (D, c). Trapped is |beta| < .01. The networks of the first seed also
    follow the gradient flow, by an adaptive Runge-Kutta method."""

    settings: tuple[tuple[int, float], ...] = ((2, 0.3), (3, 0.5), (4, 0.5), (2, 1.0))
    width: int = 16
    share: float = 0.8
    nets: int = 48
    lr: float = 0.01
    steps: int = 3000
    seeds: tuple[int, ...] = (0, 1, 2)


def traps(config: TrapConfig) -> Part:
    """A3: how many networks end at the origin; the two predicted outcomes are the only ones. Deeper or smaller: more of them."""
    checks: list[Check] = []
    shares, names = [], []
    for depth, scale in config.settings:
        widths = (config.width,) * depth
        g = config.share * float(diagonal_net(widths, 0.1).scale.critical_decay())
        model = diagonal_net(widths, g)
        start = stack([model.init(10_000 * seed + k, scale) for seed in config.seeds for k in range(config.nets)])
        end = run_descent(model, start, torch.tensor(g, dtype=torch.float64), config.lr, config.steps)
        beta = model.moments(end)[0]
        best = torch.from_numpy(model.global_minimum().beta)
        trapped = (beta.norm(dim=-1) < 1e-2).double()
        there = ((beta - best).norm(dim=-1) < 1e-2).double()
        by_seed = trapped.reshape(len(config.seeds), -1).mean(-1)
        name = f"D = {depth}, c = {scale}"
        names.append(name)
        shares.append(float(trapped.mean()))
        few = {key: w[: config.nets] for key, w in start.items()}

        def total(w: Params, model: DeepLinear = model) -> Tensor:
            return model.loss(w).sum()

        path = flow(total, few, [0.0, config.lr * config.steps], method="RK45", rtol=1e-4, atol=1e-6)
        flowed = (model.moments({key: w[-1] for key, w in path.theta.items()})[0].norm(dim=-1) < 1e-2).double()
        claim = f"{name}: share trapped at the origin, by gradient flow and by descent from the same starts"
        descended = float(trapped[: config.nets].mean())
        checks.append(match(claim, float(flowed.mean()), descended, 0.5 / config.nets, source=f"{SLUG} A3", spread=by_seed))
        checks.append(match(f"{name}: trapped and at the predicted minimum together", 1.0, float((trapped + there).mean()), 0.0,
                            source=f"{SLUG} A3"))  # fmt: skip
    order = dict(zip(config.settings, shares, strict=True))
    deeper = order[(4, 0.5)] - order[(3, 0.5)]
    smaller = order[(2, 0.3)] - order[(2, 1.0)]
    checks.append(holds("more depth, more trapped: D = 4 minus D = 3 at c = .5", deeper, at_least=0.1, source=f"{SLUG} A3"))
    checks.append(holds("a smaller start, more trapped: c = .3 minus c = 1 at D = 2", smaller, at_least=0.1, source=f"{SLUG} A3"))
    series = [{"name": "trapped at 0", "y": shares}, {"name": "at the global minimum", "y": [1 - s for s in shares]}]
    figure = Figure("where descent ends", {"labels": names, "series": series, "y": "share of networks"}, bars,
                    "Initialisation decides between the two predicted outcomes.")  # fmt: skip
    return Part(tuple(checks), (figure,))


def landscape_figure() -> Figure:
    """Reduced loss along the scale of the end-to-end map, D = 0..3, each at .8 of its critical decay."""
    series = []
    for depth in range(4):
        scale = Scale(np.array(SECOND), np.array(CROSS), depth)
        critical = scale.critical_decay()
        g = 0.8 * float(critical) if critical.ok else 0.3
        direction = scale.minimum(g).beta
        grid = np.linspace(0, 1.3, 120)
        name = "ridge" if depth == 0 else f"{depth} hidden layer{'s' if depth > 1 else ''}"
        series.append({"name": name, "x": grid.tolist(), "y": [scale.value(t * direction, g) for t in grid]})
    data = {"series": series, "x": "beta / beta of the minimum", "y": "L - E[y^2]"}
    return Figure("the loss along the scale", data, curves, "One hidden layer: the origin repels. More: it is a minimum of its own.")


# ------------------------------------------------------------------------------------------------ R9


@dataclass(frozen=True)
class ModeConfig:
    """M = E[y x^T] 4 x 5 standard normal, whitened input, no noise."""

    nets: tuple[tuple[tuple[int, ...], float], ...] = (((4,), 0.6), ((5, 4), 0.3), ((5, 5, 5), 0.2))
    restarts: int = 6
    seeds: tuple[int, ...] = (0, 1, 2)


def modes(config: ModeConfig) -> Part:
    """R9: with several outputs the singular modes decouple: soft threshold with one hidden layer, a jump with more."""
    checks: list[Check] = []
    for widths, decay in config.nets:
        losses, expected, seen, theory, targets = [], [], [], [], []
        for seed in config.seeds:
            model = DeepLinearMulti(torch.from_numpy(np.random.default_rng(seed).normal(size=(4, 5))), widths, decay)
            targets.append(torch.linalg.svdvals(model.target))
            predicted, found = model.predict("minimum").values, model.minimise(seed, config.restarts)
            expected.append(float(predicted["loss"]))
            losses.append(found.value)
            theory.append(torch.as_tensor(predicted["singular values"].value))
            seen.append(model.observables(found.best)["singular values"])
        name = f"D = {len(widths)}, gamma = {decay}"
        checks.append(match(f"{name}: loss of 4 x 5 outputs", expected, losses, 1e-7, source=f"{SLUG} R9", spread=losses))
        checks.append(match(f"{name}: singular values", torch.stack(theory), torch.stack(seen), 1e-4, source=f"{SLUG} R9"))
        alive, bare = torch.stack(theory) > 0, torch.stack(targets)
        if len(widths) == 1:
            soft = (bare - decay).clamp_min(0.0)
            checks.append(match(f"{name}: soft threshold max(m - gamma, 0)", soft, torch.stack(seen), 1e-4, source=f"{SLUG} R9"))
        else:  # at the jump s = m (D-1)/D, and m grows faster from there
            least = (torch.stack(seen) / bare)[alive]
            bound = (len(widths) - 1) / len(widths)
            checks.append(holds(f"{name}: no living mode below its jump, s / m >= (D-1)/D", least, at_least=bound, source=f"{SLUG} R9"))
    return Part(tuple(checks))


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    minimum: MinimumConfig | None = MinimumConfig()
    bounds: BoundConfig | None = BoundConfig(problems=100)
    origin: OriginConfig | None = OriginConfig()
    traps: TrapConfig | None = TrapConfig()
    modes: ModeConfig | None = ModeConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Exact Solutions of a Deep Linear Network",
    paper="Liu Ziyin, Botao Li, Xiangming Meng, NeurIPS 2022, arXiv 2202.04777",
    claims=(
        "With decay on every layer and noise on hidden units the global minimum is a uniform rank-one network with one unknown number.",
        "One hidden layer: the origin is the global minimum or a saddle. Two or more: it is a local minimum for every decay.",
        "Descent from an ordinary small start is trapped there, more often the deeper the network and the smaller the start.",
        "With several outputs and no noise the singular modes decouple.",
    ),
    presets={
        "smoke": Config(
            minimum=MinimumConfig(nets=MinimumConfig.nets[:2], restarts=4),
            bounds=BoundConfig(problems=100, trained=4),
            origin=OriginConfig(depths=(1, 2), shares=(0.5,), steps=2500),
            traps=None,
            modes=ModeConfig(nets=(((4,), 0.6), ((5, 4), 0.3)), restarts=4),
        ),
        "default": Config(),
        "full": Config(
            bounds=BoundConfig(),
            origin=OriginConfig(steps=16_000),
            traps=TrapConfig(nets=192),
            modes=ModeConfig(restarts=12),
        ),
    },
    experiments={"minimum": minimum, "bounds": bounds, "origin": origin, "traps": traps, "modes": modes},
    sweeps={"dropout": DROPOUT},
)
