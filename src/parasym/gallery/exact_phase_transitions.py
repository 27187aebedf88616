"""Exact Phase Transitions in Deep Learning (Zeroth, first and second-order phase transitions in deep neural networks).

Slug exact-phase-transitions. The minimum of the training loss as a free energy, decay as temperature: L = E (f - y)^2 + gamma |theta|^2,
no 1/2 anywhere, D hidden layers. No hidden layer: no transition; one: second order at gamma = |E[xy]|; more: first order, with the origin
metastable at every decay. Starts are W ~ N(0, c^2 / fan-in), c = 1 or .1; descent and sweeps are full batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.deep_linear_exact import CROSS, SECOND, diagonal_net, run_descent
from parasym.gallery.diagrams import DEPTH
from parasym.gallery.drawings import curves
from parasym.measure.phases import PhaseCurve, classify, phase_sweep
from parasym.solvable.engines import Params, hessian, lbfgs_restarts, norm, stack
from parasym.solvable.latent import LinearLVM
from parasym.solvable.scale import Scale, infinite_depth, isotropic

SLUG = "exact-phase-transitions"


# ------------------------------------------------------------------------------------------------ A1: closed forms


@dataclass(frozen=True)
class FormConfig:
    """A = a, |E| = e, kappa; the general problem of A2; grids of the brute-force scan."""

    a: float = 1.3
    e: float = 0.9
    kappa: float = 1.2
    depths: tuple[int, ...] = (2, 3, 5)
    grid: int = 400_001
    landau_gap: float = 1e-4
    limits: tuple[int, ...] = (10, 100, 1000, 10_000)
    seeds: tuple[int, ...] = (0, 1, 2)


def forms(config: FormConfig) -> Part:
    """A1: R1, R4, R5, R6, R11 against scans of the reduced loss; R9 on a linear VAE."""
    checks: list[Check] = []
    b = np.linspace(1e-6, 1.2 * config.e / config.a, config.grid)
    for depth in config.depths:
        closed = isotropic(config.a, config.e, depth, config.kappa)

        def cost(g: float, depth: int = depth) -> np.ndarray:
            return config.kappa * config.a * b**2 - 2 * config.e * b + (depth + 1) * g * b ** (2 / (depth + 1))

        scanned = optimize.brentq(lambda g: float(cost(g).min()), 0.5 * closed["critical"], closed["spinodal"], xtol=1e-10)
        at = b[np.argmin(cost(scanned))]
        edge = _bisect(lambda g: bool((np.diff(cost(g)) < 0)[100:].any()), closed["critical"], 2 * closed["spinodal"])
        general = Scale(np.diag([config.a, 0.3]), np.array([config.e, 0.0]), depth, config.kappa)
        seen = [scanned, at, edge]
        names = ("critical", "jump", "spinodal")
        checks += [
            match(f"D = {depth}: {name}, closed form against a scan of |beta|", closed[name], value, 1e-5, source=f"{SLUG} A1, R5")
            for name, value in zip(names, seen, strict=True)
        ]
        numeric = [float(general.critical_decay()), float(general.jump()), float(general.spinodal())]
        claim = f"D = {depth}: the general root finder at E along an axis"
        checks.append(match(claim, [closed[name] for name in names], numeric, 1e-8, source=f"{SLUG} R6"))
    return Part((*checks, *_landau(config), *_latent(config), *_depths(config), *_ridge(), *_posterior(config)), (_order_figure(),))


def _bisect(inside: Callable[[float], bool], low: float, high: float) -> float:
    while high - low > 1e-9:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if inside(middle) else (low, middle)
    return low


def _landau(config: FormConfig) -> list[Check]:
    """R4 from the reduced minimum just below the transition, R1 against R2."""
    width, variance = 5, 0.4
    one = Scale(np.array(SECOND), np.array(CROSS), 1, 1 + variance / width)
    slope, bend = one.landau(width, variance)
    gap = config.landau_gap
    near = one.minimum(float(one.critical_decay()) - gap)
    gaps = []
    for depth in (1, 2, 3):
        scale = Scale(np.array(SECOND), np.array(CROSS), depth, (1 + variance / width) ** depth)
        best = scale.minimum(0.25)
        b = best.norm ** (1 / (depth + 1)) / width
        gaps.append(scale.width_form(b, 0.25, width, variance) - best.loss)
    return [
        match("D = 1: slope of b^2 in gamma_c - gamma", slope, near.norm / width**2 / gap, 1e-3, relative=True, source=f"{SLUG} R4"),
        match("D = 1: coefficient of (gamma_c - gamma)^2 in the loss", bend, near.loss / gap**2, 1e-3, relative=True, source=f"{SLUG} R4"),
        match(
            "the loss over b with all else minimised out, minus the reduced loss, D = 1, 2, 3", 0.0, gaps, 1e-12, source=f"{SLUG} R1, R2"
        ),
    ]


def _latent(config: FormConfig) -> list[Check]:
    """R7: slope of the global minimum on either side of the transition, by differences; the latent heat (D + 1) |beta|^(2/(D+1))."""
    below, above, heat = [], [], []
    for depth in config.depths:
        scale = Scale(np.array(SECOND), np.array(CROSS), depth)
        g = float(scale.critical_decay())
        low, high, step = 0.999 * g, 1.001 * g, 1e-6 * g
        slope = [(scale.minimum(at + step).loss - scale.minimum(at - step).loss) / (2 * step) for at in (low, high)]
        below.append(slope[0])
        above.append(slope[1])
        heat.append((depth + 1) * scale.minimum(low).norm ** (2 / (depth + 1)))
    return [
        match(f"D = {config.depths}: slope of the minimum in gamma just below gamma_c, |theta|^2", heat, below, 1e-6, relative=True,
              source=f"{SLUG} R7"),
        match("and just above", 0.0, above, 0.0, source=f"{SLUG} R7"),
    ]  # fmt: skip


def _depths(config: FormConfig) -> list[Check]:
    limit = infinite_depth(config.a, config.e)
    scaled = [isotropic(config.a, config.e, d)["critical"] * (d + 1) for d in config.limits]
    gaps = [abs(value / limit - 1) for value in scaled]
    return [
        match("(D + 1) gamma_c at the largest depth against E^2 / a", limit, scaled[-1], 1e-3, relative=True, source=f"{SLUG} R11"),
        holds("its error shrinks with depth: ratio of the last two", gaps[-1] / gaps[-2], at_most=0.2, source=f"{SLUG} R11"),
        holds("zeroth order: gamma_c itself at the largest depth", isotropic(config.a, config.e, config.limits[-1])["critical"],
              at_most=1e-3, source=f"{SLUG} R11"),
    ]  # fmt: skip


def _ridge() -> list[Check]:
    """Negative control: with no hidden layer nothing happens where one layer has its transition."""
    ridge, critical = Scale(np.array(SECOND), np.array(CROSS), 0), float(np.linalg.norm(CROSS))
    shares = np.linspace(0.5, 2.0, 31)
    sizes = torch.tensor([ridge.minimum(s * critical).norm for s in shares], dtype=torch.float64)
    curve = [PhaseCurve(torch.tensor(shares), sizes, sizes, sizes, d) for d in ("up", "down")]  # type: ignore[arg-type]
    third = sizes.diff(n=2).abs().max() / sizes.diff().abs().max()
    return [
        control("ridge: order of the transition (0: none)", float(classify(*curve)), at_most=0.0, source=f"{SLUG} R3"),
        control("ridge: largest change of slope of |beta| from point to point, relative", third, at_most=0.2, source=f"{SLUG} R3"),
    ]


def _posterior(config: FormConfig) -> list[Check]:
    """R9: a linear VAE is the case of one hidden layer: its first mode dies at beta e_d^2 = zeta_1^2, continuously, as one layer's map."""
    powers, dead, living, expected = [], [], [], []
    for seed in config.seeds:
        x = np.random.default_rng(seed).normal(size=(40, 3)) * [2.0, 1.0, 0.5]
        base = LinearLVM.of_data(x, latents=2, decoder=0.7)
        critical = float(base.critical_beta()[0])
        sizes = {}
        for share in (0.9, 0.99, 0.999, 1.01):
            model = replace(base, beta=share * critical)
            sizes[share] = float(torch.linalg.svdvals(model.minimise(seed, 2).best["U"])[0])
            if share < 1:
                living.append(sizes[share])
                expected.append(torch.as_tensor(model.predict("minimum").values["decoder"].value)[0])
        powers.append(float(np.log10(sizes[0.99] / sizes[0.999])))
        dead.append(sizes[1.01])
    source = f"{SLUG} R9"
    return [
        match("linear VAE: first singular value of the decoder at .9, .99, .999 of beta_c", expected, living, 1e-5, source=source),
        match("its exponent in beta_c - beta, second order", 0.5, powers, 1e-3, source=source, spread=powers),
        match("and at 1.01 beta_c", 0.0, dead, 1e-5, source=source),
    ]


def _order_figure() -> Figure:
    series = []
    for depth in range(4):
        scale = Scale(np.array(SECOND), np.array(CROSS), depth)
        unit = float(scale.critical_decay()) if depth else float(np.linalg.norm(CROSS))
        shares = np.linspace(0.02, 1.4, 140)
        sizes = [scale.minimum(s * unit).norm for s in shares]
        name = "no hidden layer" if depth == 0 else f"{depth} hidden layer{'s' if depth > 1 else ''}"
        series.append({"name": name, "x": shares.tolist(), "y": sizes})
    data = {"series": series, "x": "gamma / gamma_c", "y": "|beta|"}
    return Figure("order parameter against decay", data, curves, "None, second order, first order: depth decides.")


# ------------------------------------------------------------------------------------------------ A2: descent on networks


@dataclass(frozen=True)
class DescentConfig:
    """Width 8, rate .03; shares of gamma_c, and for D >= 2 of the spinodal too."""

    width: int = 8
    depths: tuple[int, ...] = (1, 2, 3)
    shares: tuple[float, ...] = (0.5, 0.9, 0.98, 1.02, 1.1)
    deep_shares: tuple[float, ...] = (0.5, 0.98, 1.02)
    edges: tuple[float, ...] = (0.99, 1.02)
    lr: float = 0.03
    steps: int = 8000
    seeds: tuple[int, ...] = (0, 1, 2)


def descent(config: DescentConfig) -> Part:
    """A2: gradient descent finds the branch the theory has for its start: hysteresis with two hidden layers or more, none with one."""
    checks: list[Check] = []
    series: list[dict[str, object]] = []
    for depth in config.depths:
        base = diagonal_net((config.width,) * depth, 0.1)
        scale = base.scale
        critical, edge = float(scale.critical_decay()), float(scale.spinodal())
        gammas = [s * critical for s in (config.shares if depth == 1 else config.deep_shares)]
        gammas += [] if depth == 1 else [s * edge for s in config.edges]
        n, scales = len(config.seeds), (1.0, 0.1)
        start = stack([base.init(seed, c) for _ in gammas for c in scales for seed in config.seeds])
        gamma = torch.tensor(gammas, dtype=torch.float64).repeat_interleave(len(scales) * n)
        end = run_descent(base, start, gamma, config.lr, config.steps)
        sizes = base.moments(end)[0].norm(dim=-1).reshape(len(gammas), 2, n)
        losses = (base.error(end) + gamma * base.squared_norms(end).sum(-1) - base.power).reshape(len(gammas), 2, n)
        for i, g in enumerate(gammas):
            points = scale.stationary(g)
            # from an ordinary start the nontrivial branch, as long as it exists
            expected, height = (points[-1].norm, points[-1].loss) if points else (0.0, 0.0)
            words = f"D = {depth}, gamma = {g / critical:.3f} gamma_c"
            big, small = sizes[i]
            checks.append(match(f"{words}: |beta| from an ordinary start", expected, big, 1e-3, source=f"{SLUG} A2", spread=big))
            if points and depth > 1:
                checks.append(match(f"{words}: loss there, E[y^2] left out", height, losses[i, 0], 1e-4, source=f"{SLUG} A2"))
                if g > critical:
                    claim = f"{words}: metastable, above the trivial state"
                    checks.append(holds(claim, losses[i, 0], at_least=1e-4, source=f"{SLUG} A2"))
            low = expected if depth == 1 else 0.0
            checks.append(match(f"{words}: |beta| from a small start", low, small, 1e-3, source=f"{SLUG} A2", spread=small))
        shares = [g / critical for g in gammas]
        grid = np.linspace(0.3, 1.02 * edge / critical if depth > 1 else 1.2, 80)
        upper = [(p[-1].norm if (p := scale.stationary(s * critical)) else 0.0) for s in grid]
        series.append({"name": f"D = {depth}, nontrivial branch", "x": grid.tolist(), "y": upper, "colour": depth})
        series.append({"name": f"D = {depth}, descent from 1", "x": shares, "y": sizes[:, 0].mean(-1).tolist(), "mark": "points",
                       "colour": depth})  # fmt: skip
        series.append({"name": f"D = {depth}, descent from .1", "x": shares, "y": sizes[:, 1].mean(-1).tolist(), "mark": "points",
                       "colour": depth + 4})  # fmt: skip
    figure = Figure("branches and where descent lands", {"series": series, "x": "gamma / gamma_c", "y": "|beta|"}, curves,
                    "One hidden layer: one branch. More: two, and the start chooses.")  # fmt: skip
    return Part(tuple(checks), (figure,))


# ------------------------------------------------------------------------------------------------ A3: nonlinear networks


@dataclass(frozen=True)
class NonlinearConfig:
    """Width 4, one hidden layer, 40 samples of three inputs, y = tanh(x.(1, -.5, .3)) + .1 noise; shares of phi'(0) |E|.
    Of the first six data sets number 5 is the one on which SiLU jumps."""

    width: int = 4
    samples: int = 40
    shares: tuple[float, ...] = (0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.04, 1.1, 1.2)
    seeds: tuple[int, ...] = (0, 1, 5)
    silu: bool = True


def nonlinear_data(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """The data of A3."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, 3))
    y = np.tanh(x @ [1, -0.5, 0.3]) + 0.1 * rng.normal(size=samples)
    return torch.from_numpy(x), torch.from_numpy(y)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "tanh": (torch.tanh, 1.0),
    "SiLU": (torch.nn.functional.silu, 0.5),
}


def nonlinear(config: NonlinearConfig) -> Part:
    """A3, R7, R8: the instability of the origin is that of the linear network with E -> phi'(0) E; the order is the data's."""
    checks: list[Check] = []
    figures = []
    names = ("tanh", "SiLU") if config.silu else ("tanh",)
    for name in names:
        phi, c = ACTIVATIONS[name]
        series, lines, expected, orders = [], [], [], []
        for seed in config.seeds:
            x, y = nonlinear_data(seed, config.samples)
            unit = c * float((x * y[:, None]).mean(0).norm())

            def loss(w: Params, g: float, x: Tensor = x, y: Tensor = y, phi: Callable[[Tensor], Tensor] = phi) -> Tensor:
                return (phi(x @ w["W"].T) @ w["u"] - y).square().mean() + g * (w["W"].square().sum() + w["u"].square().sum())

            start = _start(config.width, seed)
            zero = {key: torch.zeros_like(w) for key, w in start.items()}
            line = optimize.brentq(lambda g: float(torch.linalg.eigvalsh(hessian(lambda w: loss(w, g), zero))[0]), 0.3 * unit, 3 * unit)  # noqa: B023
            lines.append(line)
            expected.append(unit)
            gammas = [s * unit for s in config.shares]
            low = lbfgs_restarts(lambda w: loss(w, gammas[0]), [start, _start(config.width, seed + 9)]).best  # noqa: B023
            up = phase_sweep(loss, norm, gammas, low, direction="up", seed=seed)
            down = phase_sweep(loss, norm, gammas, {key: 1e-3 * w for key, w in start.items()}, direction="down", seed=seed)
            at = {s: i for i, s in enumerate(config.shares)}
            above = [i for s, i in at.items() if s >= 1.01]
            order = classify(up, down)
            orders.append(float(order))
            where = f"{name}, data {seed}"
            if name == "tanh":
                gap = (up.norm2 - down.norm2).abs().max()
                checks += [
                    match(f"{where}: largest difference of |theta|^2 between the branches", 0.0, gap, 1e-3, source=f"{SLUG} A3, R8"),
                    holds(f"{where}: |theta|^2 above 1.01 |E|", up.norm2[above], at_most=1e-6, source=f"{SLUG} A3"),
                    holds(f"{where}: |theta|^2 at .99 |E|", up.norm2[at[0.99]], at_least=1e-3, source=f"{SLUG} A3"),
                    match(f"{where}: order of the transition", 2.0, float(order), 0.0, source=f"{SLUG} R10"),
                ]
            else:
                checks.append(holds(f"{where}: the cooling branch has left 0 at .98 |E| / 2 (order found: "
                                    f"{order.details['word']})", down.norm2[at[0.98]], at_least=1e-3,
                                    source=f"{SLUG} A3, R8"))  # fmt: skip
            for branch in (up, down):
                mark = "line" if branch.direction == "up" else "dash"
                series.append({"name": f"data {seed}, {branch.direction}", "x": list(config.shares), "y": branch.norm2.tolist(),
                               "mark": mark, "colour": seed})  # fmt: skip
            if seed == config.seeds[0]:
                checks.append(_latent_heat(loss, up, gammas, where))
        claim = f"{name}: decay at which the origin loses stability, from the Hessian"
        checks.append(match(claim, expected, lines, 1e-8, source=f"{SLUG} R8", spread=lines))
        if name == "SiLU":
            checks.append(refuted("SiLU: with one hidden layer the transition is of second order whatever the data: orders", orders,
                                  at_least=2.0, source=f"{SLUG} R8"))  # fmt: skip
        data = {"series": series, "x": "gamma / (phi'(0) |E|)", "y": "|theta|^2"}
        figures.append(Figure(f"{name}: squared norm, swept up and down", data, curves, "A kink: second order. A loop: first order."))
    checks += _deep_and_biased(config)
    return Part(tuple(checks), tuple(figures))


def _start(width: int, seed: int) -> Params:
    draws = torch.Generator().manual_seed(seed)
    w = torch.randn(width, 3, generator=draws, dtype=torch.float64) / 3**0.5
    return {"W": w, "u": torch.randn(width, generator=draws, dtype=torch.float64) / width**0.5}


def _latent_heat(loss: Callable[[Params, float], Tensor], up: PhaseCurve, gammas: list[float], where: str) -> Check:
    """R7: dL_min / dgamma = |theta*|^2, by a central difference of the minimum at the third gamma."""
    g, step = gammas[2], 1e-4 * gammas[2]
    starts = [_start(4, seed) for seed in range(3)]
    values = [lbfgs_restarts(lambda w, at=at: loss(w, at), starts).value for at in (g - step, g + step)]  # type: ignore[misc]
    slope = (values[1] - values[0]) / (2 * step)
    claim = f"{where}: |theta|^2 is the slope of the minimum in gamma"
    return match(claim, float(up.norm2[2]), slope, 1e-4, relative=True, source=f"{SLUG} R7")


def _deep_and_biased(config: NonlinearConfig) -> list[Check]:
    """Two hidden tanh layers: the origin is stable at every decay. An output bias: E[xy] becomes Cov(x, y)."""
    lowest, lines, expected = [], [], []
    for seed in config.seeds:
        x, y = nonlinear_data(seed, config.samples)
        x, y = x + 0.7, y + 1.5

        def deep(w: Params, x: Tensor = x, y: Tensor = y) -> Tensor:
            out = torch.tanh(torch.tanh(x @ w["A"].T) @ w["B"].T) @ w["u"]
            return (out - y).square().mean() + 0.01 * sum(v.square().sum() for v in w.values())

        sizes = {"A": (3, 3), "B": (3, 3), "u": (3,)}
        zero = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        lowest.append(float(torch.linalg.eigvalsh(hessian(deep, zero))[0]))

        def biased(w: Params, g: float, x: Tensor = x, y: Tensor = y) -> Tensor:
            out = torch.tanh(x @ w["W"].T) @ w["u"] + w["b"]
            return (out - y).square().mean() + g * (w["W"].square().sum() + w["u"].square().sum())

        trivial = {key: torch.zeros_like(w) for key, w in _start(config.width, 0).items()} | {"b": y.mean()}
        covariance = float(((x - x.mean(0)) * (y - y.mean())[:, None]).mean(0).norm())
        found = optimize.brentq(
            lambda g: float(torch.linalg.eigvalsh(hessian(lambda w: biased(w, g), trivial))[0]),  # noqa: B023
            0.2 * covariance, 5 * covariance, xtol=1e-13,
        )  # fmt: skip
        lines.append(found)
        expected.append(covariance)
    return [
        match("two hidden tanh layers, gamma = .01: smallest Hessian eigenvalue at 0 is 2 gamma", 0.02, lowest, 1e-10, source=f"{SLUG} R8"),
        match("tanh with an output bias: the trivial state loses stability at |Cov(x, y)|", expected, lines, 1e-8, source=f"{SLUG} R8"),
    ]


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    forms: FormConfig | None = FormConfig()
    descent: DescentConfig | None = DescentConfig()
    nonlinear: NonlinearConfig | None = NonlinearConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Exact Phase Transitions in Deep Learning",
    paper="Liu Ziyin, Masahito Ueda, arXiv 2205.12510",
    claims=(
        "No hidden layer: no transition. One: second order at gamma = |E[xy]|, whatever the width and the noise. More: first order.",
        "With two or more hidden layers the trivial state is metastable at every decay, the other one up to a spinodal.",
        "The squared norm of the weights is the slope of the minimum in decay: its jump is a latent heat.",
        "A smooth activation has the instability line of the linear network; whether the transition is continuous depends on the data.",
    ),
    presets={
        "smoke": Config(
            forms=FormConfig(depths=(2, 3), grid=100_001),
            descent=DescentConfig(depths=(1, 2), shares=(0.5, 0.9, 1.1), deep_shares=(0.5, 1.02), edges=(), steps=3000),
            nonlinear=NonlinearConfig(shares=(0.8, 0.9, 0.95, 0.98, 0.99, 1.01, 1.04), seeds=(0,), silu=False),
        ),
        "default": Config(),
        "full": Config(
            forms=FormConfig(grid=4_000_001),
            descent=DescentConfig(steps=16_000, seeds=tuple(range(6))),
            nonlinear=NonlinearConfig(seeds=(0, 1, 2, 3, 4, 5)),
        ),
    },
    experiments={"forms": forms, "descent": descent, "nonlinear": nonlinear},
    sweeps={"depth": DEPTH},
)
