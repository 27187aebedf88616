"""Three Mechanisms of Feature Learning in a Linear Network: alignment, disalignment and rescaling of layers, in an exact solution.

Slug three-mechanisms. f = gamma sum_i u_i w_i.x on data x = a n that lie on a line, L = E (f - y)^2 / 2, full-batch gradient descent with
a rate for each layer. On digits: 64-100-100-100-10 ReLU without biases, squared error / 2 on one-hot labels, plain SGD.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match, refuted
from parasym.gallery.digits import digits
from parasym.gallery.drawings import curves, phase_diagram
from parasym.gallery.ensemble import Ensemble, plain, standard_error
from parasym.solvable.engines import follow
from parasym.solvable.line_net import LineFlow, Mechanism, mechanism, scaling_phase

SLUG = "three-mechanisms"


@dataclass(frozen=True)
class Setting:
    """One network: scales of the start, multiplier, rates, slope of the labels, learning rate and steps."""

    name: str
    sigma_u: float
    sigma_w: float
    lr: float
    steps: int
    slope: float = 1.5
    gamma: float = 1.0
    eta_u: float = 1.0
    eta_w: float = 1.0
    aligned: bool = False


SETTINGS = (
    Setting("alignment", 0.05, 0.05, 2e-3, 8000),
    Setting("disalignment", 1.2, 1.2, 5e-4, 8000, slope=0.2),
    Setting("rescaling", 0.3, 0.3, 1e-3, 8000, aligned=True),
    Setting("layer rates", 0.3, 0.1, 1e-3, 12_000, gamma=0.7, eta_u=0.2, eta_w=2.0),
)

# ------------------------------------------------------------------------------------------------ the four runs


@dataclass(frozen=True)
class RunConfig:
    """``width`` neurons, n = 40 points a_k ~ N(0,1), y = slope a; u, omega ~ N(0, sigma^2) (omega = u where aligned)."""

    settings: tuple[Setting, ...] = SETTINGS
    width: int = 20
    samples: int = 40
    records: int = 80
    seeds: tuple[int, ...] = (0, 1, 2, 3)


def closed(s: Setting, config: RunConfig) -> tuple[LineFlow, Tensor, Tensor]:
    """The closed form of every seed (seeds, d), and the data a, y (seeds, n)."""
    draws = Ensemble(config.seeds)
    a = draws.normal(config.samples)
    y = s.slope * a
    u, omega = s.sigma_u * draws.normal(config.width), s.sigma_w * draws.normal(config.width)
    omega = u.clone() if s.aligned else omega
    return LineFlow(u, omega, 1.0, 0.0, s.gamma, s.eta_u, s.eta_w), a, y


def measure(s: Setting, config: RunConfig) -> tuple[list[LineFlow], Tensor, dict[str, Tensor]]:
    """Gradient descent of all seeds; the closed form of each, the times, and (seeds, T) curves of s, cos, |u|^2, |omega|^2, charges."""
    flow, a, y = closed(s, config)
    v, m = a.square().mean(-1), (a * y).mean(-1)
    flows = [replace(flow, u=flow.u[i], omega=flow.omega[i], v=float(v[i]), m=float(m[i])) for i in range(len(config.seeds))]
    u, omega, every = flow.u.clone(), flow.omega.clone(), s.steps // config.records
    kept: dict[str, list[Tensor]] = {name: [] for name in ("s", "cos", "|u|^2", "|omega|^2", "charges")}
    for step in range(s.steps + 1):
        if step % every == 0:
            product, uu, ww = (u * omega).sum(-1), u.square().sum(-1), omega.square().sum(-1)
            values = (product, product / (uu * ww).sqrt(), uu, ww, u.square() / s.eta_u - omega.square() / s.eta_w)
            for name, value in zip(kept, values, strict=True):
                kept[name].append(value)
        pull = s.gamma * (m - v * s.gamma * (u * omega).sum(-1))[:, None]
        u, omega = u + s.lr * s.eta_u * pull * omega, omega + s.lr * s.eta_w * pull * u
    times = s.lr * every * torch.arange(len(kept["s"]), dtype=torch.float64)
    return flows, times, {name: torch.stack(rows, 1) for name, rows in kept.items()}


def runs(config: RunConfig) -> Part:
    """R1-R7, R9: descent beside the closed form, the ODE, the kernel-change identity, and the mechanism each run shows."""
    names = get_args(Mechanism)
    checks: list[Check] = []
    figures: list[Figure] = []
    ode: list[float] = []
    for s in config.settings:
        flows, t, seen = measure(s, config)
        output, ratio, theory, cosines, drift, labels, expected = [], [], [], [], [], [], []
        for i, flow in enumerate(flows):
            scale = max(abs(s.slope), s.gamma * abs(float(seen["s"][i, 0])))
            output.append(float((s.gamma * (seen["s"][i] - flow.product(t))).abs().max()) / scale)
            kernel = s.eta_w * seen["|u|^2"][i] + s.eta_u * seen["|omega|^2"][i]
            ratio.append(kernel[-1] / kernel[0])
            theory.append(flow.kernel_change())
            cosines.append(float((seen["cos"][i] - flow.cosine(t)).abs().max()))
            drift.append(
                float((seen["charges"][i] - seen["charges"][i, 0]).abs().max() / seen["charges"][i, 0].abs().max().clamp_min(0.01))
            )
            labels.append(mechanism(seen["cos"][i], (seen["|u|^2"][i] * seen["|omega|^2"][i]).sqrt()))
            uu, ww = flow.norms(t)
            expected.append(mechanism(flow.cosine(t), (uu * ww).sqrt()))
            ode.append(_against_ode(flow, float(t[-1])))
        wanted = "alignment" if s.name == "layer rates" else s.name
        right = [float(label == wanted) for label in labels]
        checks += [
            match(
                f"{s.name}: output along the run, over max(|slope|, gamma |s_0|)", 0.0, output, 2e-2, source=f"{SLUG} R4, R5", spread=output
            ),
            match(f"{s.name}: K_T / K_0 against the identity", theory, ratio, 0.01, relative=True, source=f"{SLUG} R7"),
            match(f"{s.name}: cosine of the layers along the run", 0.0, cosines, 5e-3, source=f"{SLUG} R5", spread=cosines),
            match(
                f"{s.name}: mechanism of every seed, by its place in {', '.join(names)}",
                [names.index(v) for v in expected],
                [names.index(v) for v in labels],
                0.0,
                source=f"{SLUG} R9",
            ),
            holds(f"{s.name}: share of seeds that show it", sum(right) / len(right), at_least=0.75, source=f"{SLUG} R9", spread=right),
            holds(f"{s.name}: drift of the charges (order of the learning rate)", drift, at_most=0.05, source=f"{SLUG} R2", spread=drift),
        ]
        figures.append(_figure(s, flows[0], t, seen))
    checks.append(match("weights against the ODE, every run", 0.0, ode, 1e-8, source=f"{SLUG} R4"))
    return Part(tuple(checks), tuple(figures))


def _against_ode(flow: LineFlow, horizon: float) -> float:
    def rhs(_: float, w: Mapping[str, Tensor]) -> dict[str, Tensor]:
        pull = flow.gamma * (flow.m - flow.v * flow.gamma * (w["u"] * w["o"]).sum())
        return {"u": flow.eta_u * pull * w["o"], "o": flow.eta_w * pull * w["u"]}

    found = follow(rhs, {"u": flow.u, "o": flow.omega}, [0.0, 0.3 * horizon, horizon], rtol=1e-12, atol=1e-14)
    u, omega = flow.weights([0.0, 0.3 * horizon, horizon])
    return float(torch.maximum((u - found.theta["u"]).abs().max(), (omega - found.theta["o"]).abs().max()))


def _figure(s: Setting, flow: LineFlow, t: Tensor, seen: Mapping[str, Tensor]) -> Figure:
    uu, ww = flow.norms(t)
    rows = (("cos", flow.cosine(t), seen["cos"][0]), ("|u| |w|", (uu * ww).sqrt(), (seen["|u|^2"][0] * seen["|omega|^2"][0]).sqrt()))
    series: list[dict[str, Any]] = []
    for k, (name, theory, found) in enumerate(rows):
        series.append({"name": name, "x": plain(t), "y": plain(theory), "colour": k})
        series.append({"name": f"{name}, descent", "x": plain(t[::4]), "y": plain(found[::4]), "mark": "points", "colour": k})
    return Figure(f"mechanism: {s.name}", {"series": series, "x": "time", "y": ""}, curves, "The solution (lines) and descent (points).")


# ------------------------------------------------------------------------------------------------ phase diagram


@dataclass(frozen=True)
class PhaseConfig:
    """K_inf / K_0 - 1 against width, target 1.5, v = 1; a heat map over the scales of the two layers at ``map_width``."""

    widths: tuple[int, ...] = (10, 100, 1000, 10_000)
    target: float = 1.5
    map_width: int = 1000
    grid: int = 21
    seeds: tuple[int, ...] = tuple(range(100))


_PARAMETRISATIONS = {  # exponents of gamma, sigma_u, sigma_w
    "NTK": (0.5, 0.0, 0.0),
    "mean field": (1.0, 0.0, 0.0),
    "Kaiming": (0.0, 0.5, 0.0),
    "Xavier": (0.0, 0.5, 0.5),
}


_SCALINGS = {  # the same with exponents of the two rates
    **{name: (*e, 0.0, 0.0) for name, e in _PARAMETRISATIONS.items()},
    "mean field, rates ~ d": (1.0, 0.0, 0.0, 1.0, 1.0),
    "unequal rates": (0.2, 0.3, 0.0, 0.4, -0.2),
}
_PLACE = {name: i for i, name in enumerate(_SCALINGS)}


def _exponents(exponents: tuple[float, float, float, float, float], config: PhaseConfig) -> tuple[float, float]:
    """Powers of the width in Theta and in v K(0), read off random weights at the second and the last width."""
    g, a, b, x, y = exponents
    ends, rows = (config.widths[1], config.widths[-1]), []
    for d in ends:
        draws = Ensemble(config.seeds)
        u, omega = d**-a * draws.normal(d), d**-b * draws.normal(d)
        flow = LineFlow(u, omega, 1.0, config.target, d**-g, d**x, d**y)
        speed = flow.v * flow.gamma**2 * (flow.eta_w * u.square().sum(-1) + flow.eta_u * omega.square().sum(-1))
        rows.append((flow.richness().mean().log(), speed.mean().log()))
    scale = math.log(ends[1] / ends[0])
    return float(rows[1][0] - rows[0][0]) / scale, float(rows[1][1] - rows[0][1]) / scale


def _changes(width: int, exponents: tuple[float, float, float], config: PhaseConfig) -> Tensor:
    draws, (g, a, b) = Ensemble(config.seeds), exponents
    u, omega = width**-a * draws.normal(width), width**-b * draws.normal(width)
    return LineFlow(u, omega, 1.0, config.target, width**-g).kernel_change() - 1


def phases(config: PhaseConfig) -> Part:
    """R7, R8: lazy and rich parametrisations, by the exponent and by the kernel."""
    change = {name: [_changes(d, e, config) for d in config.widths] for name, e in _PARAMETRISATIONS.items()}
    label = {name: scaling_phase(*e) for name, e in _PARAMETRISATIONS.items()}
    means = {name: torch.stack([v.mean() for v in rows]) for name, rows in change.items()}
    lazy = [name for name in label if label[name].richness < 0]
    ends, gap = {name: [change[name][1], change[name][-1]] for name in lazy}, math.log(config.widths[-1] / config.widths[1])
    fall = [float((ends[name][1].mean() / ends[name][0].mean()).abs().log()) / gap for name in lazy]
    # K(inf) / K(0) - 1 goes with Theta^2; the error is that of the two means over the seeds
    noise = [math.hypot(*(float(standard_error(v) / v.mean()) for v in ends[name])) / gap for name in lazy]
    rich = [name for name in label if label[name].richness == 0]
    # rich: the kernel's growth at infinite width, sqrt(1 + Theta^2) - 1 with Theta = 2 s* / (c N_0), N_0 = d (sig_u^2 + sig_w^2)
    limit = (1 + config.target**2) ** 0.5 - 1
    measured = [_exponents(e, config) for e in _SCALINGS.values()]
    checks = (
        holds("NTK and Kaiming are lazy, mean field and Xavier rich, by the exponent", [float(set(lazy) == {"NTK", "Kaiming"}),
              float(set(rich) == {"mean field", "Xavier"})], at_least=1.0, source=f"{SLUG} R8"),
        holds("lazy: |K_inf / K_0 - 1| at the largest width", torch.stack([means[n][-1].abs() for n in lazy]), at_most=1e-3,
              source=f"{SLUG} R8, control (iii)"),
        match("rich: K_inf / K_0 - 1 at the largest width against its limit", limit, torch.stack([means[n][-1] for n in rich]), 0.02,
              relative=True, source=f"{SLUG} R8"),
        match(f"lazy ({', '.join(lazy)}): power of the width with which the change falls is twice that of Theta, within four errors",
              [2 * label[name].richness for name in lazy], fall, 4 * max(noise), source=f"{SLUG} R8"),
        match("exponent of Theta in the width, from the weights", [scaling_phase(*e).richness for e in _SCALINGS.values()],
              [row[0] for row in measured], 0.02, source=f"{SLUG} R8"),
        match("exponent of v K(0), from the weights", [scaling_phase(*e).speed for e in _SCALINGS.values()],
              [row[1] for row in measured], 0.02, source=f"{SLUG} R8"),
        control("mean field at rates of order one is frozen, at rates ~ d it is not: difference of the measured exponents of v K(0)",
                measured[_PLACE["mean field, rates ~ d"]][1] - measured[_PLACE["mean field"]][1], at_least=0.95, source=f"{SLUG} R8"),
    )  # fmt: skip
    series = [
        {"name": name, "x": list(config.widths), "y": plain(rows.abs().clamp_min(1e-8)), "mark": "line"} for name, rows in means.items()
    ]
    growth = Figure("kernel growth against width", {"series": series, "x": "width", "y": "|K_inf / K_0 - 1|", "log": "xy"}, curves)
    return Part(checks, (growth, _map(config)))


def _map(config: PhaseConfig) -> Figure:
    powers = torch.linspace(-1.0, 0.5, config.grid, dtype=torch.float64)
    draws = Ensemble(config.seeds[:1])
    u, w = draws.normal(config.map_width)[0], draws.normal(config.map_width)[0]
    scale = config.map_width**powers
    a, b = scale[:, None, None] * u, scale[None, :, None] * w
    flow = LineFlow(a.expand_as(a + b), b.expand_as(a + b), 1.0, config.target)
    z = flow.kernel_change().log10()
    theta = 2 * config.target / (config.map_width * (config.map_width ** (2 * powers)[:, None] + config.map_width ** (2 * powers)[None]))
    data = {
        "x": plain(powers), "y": plain(powers), "z": z.tolist(), "boundary": (0.5 * (1 + theta.square()).log10()).tolist(),
        "level": 0.5 * math.log10(2), "xtitle": "log_d sigma_w", "ytitle": "log_d sigma_u", "ztitle": "log10 K_inf / K_0",
    }  # fmt: skip
    return Figure("lazy and rich starts", data, phase_diagram, f"Growth of the kernel, width {config.map_width}; on the line Theta = 1.")


# ------------------------------------------------------------------------------------------------ controls


@dataclass(frozen=True)
class ControlConfig:
    """width 20, scales .3, lr 1e-3, 8000 steps: two-dimensional data, and tanh in place of the identity."""

    width: int = 20
    sigma: float = 0.3
    samples: int = 40
    lr: float = 1e-3
    steps: int = 8000
    slope: float = 1.5
    seeds: tuple[int, ...] = (0, 1, 2, 3)


def controls(config: ControlConfig) -> Part:
    """Controls (i), (ii): one scalar carries the run on a line only, and in a linear network only."""
    spreads = {dim: _spread(config, dim) for dim in (1, 2)}
    ratio, identity = {}, _identity(config)
    for name, act in (("linear", lambda h: h), ("tanh", torch.tanh)):
        ratio[name] = _nonlinear(config, act)
    gaps = {name: (value / identity - 1).abs() for name, value in ratio.items()}
    checks = (
        holds("data on a line: spread over neurons of p_i(T) / p_i(0)", spreads[1], at_most=1e-10, source=f"{SLUG} R1", spread=spreads[1]),
        control("two-dimensional data: the same spread", spreads[2], at_least=0.1, source=f"{SLUG} control (i)", spread=spreads[2]),
        match("linear: K_T / K_0 off the identity", 0.0, gaps["linear"], 1e-3, source=f"{SLUG} R7", spread=gaps["linear"]),
        control("tanh: K_T / K_0 off the linear identity, mean of the seeds", gaps["tanh"].mean(), at_least=0.03,
                source=f"{SLUG} control (ii)", spread=gaps["tanh"]),
        refuted("tanh: the same by more than 3 % on every seed (where the kernel grows little, little is missed)", gaps["tanh"],
                at_least=0.03, source=f"{SLUG} control (ii)"),
        control("tanh: its gap over that of the linear network, every seed", gaps["tanh"] / gaps["linear"], at_least=30.0,
                source=f"{SLUG} control (ii)"),
    )  # fmt: skip
    return Part(checks)


def _inputs(config: ControlConfig) -> tuple[Ensemble, Tensor, Tensor, Tensor]:
    draws = Ensemble(config.seeds)
    a = draws.normal(config.samples)
    return draws, a, config.sigma * draws.normal(config.width), config.sigma * draws.normal(config.width)


def _identity(config: ControlConfig) -> Tensor:
    _, a, u, w = _inputs(config)
    v = a.square().mean(-1)
    return torch.stack([LineFlow(u[i], w[i], float(v[i]), config.slope * float(v[i])).kernel_change() for i in range(len(u))])


def _nonlinear(config: ControlConfig, act: Any) -> Tensor:
    """K_T / K_0 (trace over the samples) of f = u.act(w a), data on a line."""
    _, a, u, w = _inputs(config)
    y = config.slope * a

    def kernel(u: Tensor, w: Tensor) -> Tensor:
        h, slope = _with_slope(act, w[:, None] * a[..., None])
        return (h.square().sum(-1) + a.square() * (u[:, None] * slope).square().sum(-1)).sum(-1)

    first = kernel(u, w)
    for _ in range(config.steps):
        pre = w[:, None] * a[..., None]
        h, slope = _with_slope(act, pre)
        r = ((h * u[:, None]).sum(-1) - y) / a.shape[1]
        u, w = u - config.lr * (r[..., None] * h).sum(1), w - config.lr * ((r * a)[..., None] * slope * u[:, None]).sum(1)
    return kernel(u, w) / first


def _with_slope(act: Any, pre: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.func.jvp(act, (pre,), (torch.ones_like(pre),))
    return found[0], found[1]


def _spread(config: ControlConfig, dim: int) -> Tensor:
    """std / |median| over neurons of p_i(T) / p_i(0), p = u + w.e1, for inputs N(0, I_dim) and the target along e1."""
    draws = Ensemble(config.seeds)
    x = draws.normal(config.samples, dim)
    y = config.slope * x[..., 0]
    u, w = config.sigma * draws.normal(config.width), config.sigma * draws.normal(config.width, dim)
    first = u + w[..., 0]
    for _ in range(config.steps):
        r = (torch.einsum("snd,skd,sk->sn", x, w, u) - y) / config.samples
        pull = torch.einsum("sn,snd->sd", r, x)
        u, w = u - config.lr * torch.einsum("sd,skd->sk", pull, w), w - config.lr * u[..., None] * pull[:, None]
    ratio = (u + w[..., 0]) / first
    return ratio.std(-1) / ratio.median(-1).values.abs()


# ------------------------------------------------------------------------------------------------ digits


@dataclass(frozen=True)
class DigitsConfig:
    """64-100-100-100-10 ReLU without biases, W ~ c N(0, 2 / fan-in), (f - y)^2 / 2 on one-hot labels, SGD without momentum.

    Pixels over 16, centred. ``starts``: (c, learning rate).
    """

    starts: tuple[tuple[float, float], ...] = ((0.3, 0.3), (0.5, 0.1), (1.0, 0.02), (1.6, 0.003))
    sizes: tuple[int, ...] = (64, 100, 100, 100, 10)
    batch: int = 64
    steps: int = 1500
    records: int = 15
    seeds: tuple[int, ...] = (0, 1, 2)


def layer_angle(first: Tensor, second: Tensor) -> Tensor:
    """|W2 W1|_F / (|W2|_F |W1|_F) of adjacent layers (..., out, in) (...): how well they are aligned."""
    norm = lambda M: M.square().sum((-1, -2)).sqrt()  # noqa: E731
    return norm(second @ first) / (norm(second) * norm(first))


def real(config: DigitsConfig) -> Part:
    """R9 on digits: a small start aligns the layers, a start of the usual size does not move them, a large one does not align them."""
    split, draws, count = digits(), Ensemble(config.seeds), len(config.starts)
    mean = split.x.mean(0)
    x, test = split.x - mean, split.x_test - mean
    onehot = torch.nn.functional.one_hot(split.y, 10).float()
    base = [draws.normal(b, a, dtype=torch.float32) * (2 / a) ** 0.5 for a, b in zip(config.sizes[:-1], config.sizes[1:], strict=True)]
    weights = [torch.cat([c * w for c, _ in config.starts]).requires_grad_() for w in base]
    rate = torch.tensor([lr for _, lr in config.starts]).repeat_interleave(len(config.seeds))[:, None, None]
    angle, accuracy = [], []

    def forward(inputs: Tensor) -> Tensor:
        for w in weights[:-1]:
            inputs = torch.relu(inputs @ w.mT)
        return inputs @ weights[-1].mT

    for step in range(config.steps + 1):
        if step % (config.steps // config.records) == 0:
            with torch.no_grad():
                angle.append(layer_angle(weights[-2], weights[-1]))
                accuracy.append((forward(test.expand(len(rate), -1, -1)).argmax(-1) == split.y_test).float().mean(-1))
        pick = draws.integers(len(x), config.batch).repeat(count, 1)
        loss = 0.5 * (forward(x[pick]) - onehot[pick]).square().sum((-1, -2)).div(config.batch).sum()
        for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            w.data -= rate * g
    turned = torch.stack(angle).reshape(-1, count, len(config.seeds)).double()
    growth, right = turned[-1] / turned[0], accuracy[-1].reshape(count, -1).double()
    by_c = {c: growth[i] for i, (c, _) in enumerate(config.starts)}
    checks = (
        holds("c = .3: angle of the last pair, end over start", by_c[0.3], at_least=1.8, source=f"{SLUG} real data", spread=by_c[0.3]),
        holds("c = .3: test accuracy", right[0], at_least=0.85, source=f"{SLUG} real data", spread=right[0]),
        control("c = 1: the angle changes by less", (by_c[1.0] - 1).abs(), at_most=0.15, source=f"{SLUG} real data", spread=by_c[1.0]),
        control("c = 1.6: the angle does not rise", by_c[1.6], at_most=1.0, source=f"{SLUG} real data", spread=by_c[1.6]),
    )
    steps = [float(v) for v in torch.linspace(0, config.steps, len(angle))]
    series = [{"name": f"c = {c:g}", "x": steps, "y": plain(turned[:, i].mean(1)), "low": plain(turned[:, i].amin(1)),
               "high": plain(turned[:, i].amax(1))} for i, (c, _) in enumerate(config.starts)]  # fmt: skip
    return Part(checks, (Figure("alignment of the last layers on digits", {"series": series, "x": "step", "y": "angle"}, curves),))


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    runs: RunConfig | None = RunConfig()
    phases: PhaseConfig | None = PhaseConfig()
    controls: ControlConfig | None = ControlConfig()
    real: DigitsConfig | None = DigitsConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Three Mechanisms of Feature Learning in a Linear Network",
    paper="Yizhou Xu, Liu Ziyin, ICLR 2025, arXiv 2401.07085",
    claims=(
        "On data along a line the whole run of a two-layer linear network follows one scalar that is known in closed form.",
        "Layers turn together, turn apart, or only grow; in the lazy phase they do none of it.",
        "One identity gives the growth of the kernel, and with it the phase diagram of widths, scales and rates.",
        "A ReLU network on digits aligns its layers from a small start only.",
    ),
    presets={
        "smoke": Config(
            runs=RunConfig(settings=SETTINGS, seeds=(0, 1, 3)),
            phases=PhaseConfig(grid=11, map_width=300, seeds=tuple(range(20))),
            controls=ControlConfig(seeds=(0, 1, 3)),
            real=None,
        ),
        "default": Config(),
        "full": Config(
            runs=RunConfig(seeds=tuple(range(20))),
            controls=ControlConfig(seeds=tuple(range(8))),
            real=DigitsConfig(steps=6000, seeds=tuple(range(6))),
        ),
    },
    experiments={"runs": runs, "phases": phases, "controls": controls, "real": real},
)
