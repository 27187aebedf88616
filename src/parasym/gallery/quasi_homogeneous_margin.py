"""The Asymmetric Maximum Margin Bias of Quasi-Homogeneous Neural Networks: only the parameters of the largest exponent are minimised.

Slug quasi-homogeneous-margin. Exponential loss (1/N) sum exp(-q_n), followed past separation by the loss-normalised flow (an adaptive
solver on log q). Exponents come from traced architectures. Neural collapse: cross-entropy on free features of unit norm and a linear head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.solvable.contract import number
from parasym.solvable.margin import TwoBalls, asymmetric_angle, growth_exponents, hard_margin, neural_collapse, simplex_margin
from parasym.symmetry.quasi import QuasiHomogeneity, exponents

SLUG = "quasi-homogeneous-margin"

# ------------------------------------------------------------------------------------------------ A1: architectures


class Residual(nn.Module):
    """o(h + c relu(b h)), h = a x."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.o = nn.Linear(5, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 5) -> (n, 3)."""
        h = self.a(x)
        out: Tensor = self.o(h + self.c(torch.relu(self.b(h))))
        return out


class SmallResNet(nn.Module):
    """Two residual blocks of convolutions with batch norm, as in ResNet-18, at small width; the second with a shortcut of its own."""

    def __init__(self) -> None:
        super().__init__()
        conv = lambda i, o, s=1, k=3: nn.Conv2d(i, o, k, s, k // 2, bias=False)  # noqa: E731
        self.stem, self.norm = conv(1, 4), nn.BatchNorm2d(4)
        self.one = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4))
        self.two = nn.Sequential(conv(4, 6, 2), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 6), nn.BatchNorm2d(6))
        self.short = nn.Sequential(conv(4, 6, 2, 1), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 25) -> (n, 3)."""
        h = torch.relu(self.norm(self.stem(x.unflatten(1, (1, 5, 5)))))
        h = torch.relu(h + self.one(h))
        h = torch.relu(self.short(h) + self.two(h))
        out: Tensor = self.head(h.mean((2, 3)))
        return out


def _mlp(bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7, bias=bias), nn.ReLU(), nn.Linear(7, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3, bias=bias))


def _normed(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), norm, nn.ReLU(), nn.Linear(7, 3))


def _head(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), *last)


_HALVES = (0.0, 0.0, 0.5, 0.5, 0.5, 1.0)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[float, ...], int]] = {
    # exponents in the order of the parameters, by the rules of R2: degree of a linear layer = its lambda + the degree of its input, a
    # bias has the degree of its pre-activation, sums agree, what a norm layer erases is free, the output has degree 1
    "linear": (lambda: nn.Linear(5, 3), (1.0, 1.0), 0),
    "three-layer ReLU": (lambda: _mlp(False), (1 / 3, 1 / 3, 1 / 3), 2),
    "three-layer ReLU with biases": (lambda: _mlp(True), (0.25, 0.25, 0.25, 0.5, 0.5, 1.0), 2),
    "residual block": (Residual, (0.5, 0.5, 0.0, 0.0, 0.5, 1.0), 2),
    "layer norm": (lambda: _normed(nn.LayerNorm(7)), _HALVES, 1),
    "layer norm, eps = 0": (lambda: _normed(nn.LayerNorm(7, eps=0.0)), _HALVES, 2),
    "batch norm, training": (lambda: _normed(nn.BatchNorm1d(7)), _HALVES, 2),
    "batch norm, training, eps = 1e-12": (lambda: _normed(nn.BatchNorm1d(7, eps=1e-12)), _HALVES, 3),
    "batch norm, eval": (lambda: _normed(nn.BatchNorm1d(7)).eval(), (0.25, 0.25, 0.25, 0.5, 0.5, 1.0), 2),
    "tanh trunk": (lambda: _head(), (0.0, 0.0, 1.0, 1.0), 0),
}


@dataclass(frozen=True)
class TableConfig:
    """Each architecture at random weights; three seeds of weights, inputs and draws."""

    names: tuple[str, ...] = tuple(ARCHITECTURES)
    resnet: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)


def _found(make: Callable[[], nn.Module], size: int, seed: int, **more: object) -> QuasiHomogeneity:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return exponents(make(), torch.randn(16, size), seed=seed, **more)  # type: ignore[arg-type]


def table(config: TableConfig) -> Part:
    """A1, R1-R3, R5: exponents from traced graphs, with their certificates, and what has none."""
    checks: list[Check] = []
    residual, certificate = [], []
    for name in config.names:
        make, expected, nullity = ARCHITECTURES[name]
        found = [_found(make, 5, seed) for seed in config.seeds]
        seen = [[float(v) for v in f.exponents.values()] for f in found]
        checks.append(match(f"{name}: exponents", list(expected) * len(found), seen, 1e-3, source=f"{SLUG} A1, R2, R3"))
        checks.append(match(f"{name}: rescaling symmetries", float(nullity), [float(f.nullity) for f in found], 0.0, source=f"{SLUG} R2"))
        residual += [f.residual for f in found]
        certificate += [f.certificate if f.certificate is not None else float("nan") for f in found]
    checks += [
        match("Euler's identity, relative residual, all", 0.0, residual, 1e-8, source=f"{SLUG} A1, R1"),
        match("f(e^{alpha lambda} theta) = e^alpha f(theta), relative, all", 0.0, certificate, 1e-8, source=f"{SLUG} R1, R2"),
    ]
    for name, last in (("tanh", nn.Tanh), ("softplus", nn.Softplus)):
        bad = [_found(lambda last=last: _head(last()), 5, seed).residual for seed in config.seeds]  # type: ignore[misc]
        checks.append(control(f"{name} output: residual of Euler's identity", bad, at_least=0.05, source=f"{SLUG} control", spread=bad))
    if config.resnet:
        free = _found(SmallResNet, 25, config.seeds[0])
        pinned = _found(SmallResNet, 25, config.seeds[0], pin={"head.weight": 1.0, "head.bias": 1.0})
        gains = [float(v.max()) for n, v in pinned.exponents.items() if not n.startswith("head")]
        checks += [
            match("residual network with batch norm: certificate", 0.0, [free.certificate or 0.0, pinned.certificate or 0.0],
                  1e-8, source=f"{SLUG} R2, R3"),
            match("pinned to a last layer of exponent 1, everything before it has 0", 0.0, gains, 1e-6, source=f"{SLUG} R3"),
        ]  # fmt: skip
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ A2, A4: two balls


@dataclass(frozen=True)
class BallsConfig:
    """Radius 1, 200 points on each circle, from weights of about .3 to a margin of ``margin``; f = a x1 + u v x2, or t^3 x2."""

    centres: tuple[tuple[float, float], ...] = ((2.0, 0.5), (2.0, 0.8), (1.5, 0.9))
    margin: float = 2000.0
    discarded: tuple[float, float] = (1.5, 1.3)


def balls(config: BallsConfig) -> Part:
    """A2, A4, R3-R6: the direction the flow ends at, the growth of its weights, charges, and what is discarded."""
    products: list[float] = []
    cubes: list[float] = []
    homogeneous: list[float] = []
    series: list[dict[str, Any]] = []
    normalised: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]] = ([], [])
    theory, euclid, svm, rates, charges, norms = [], [], [], [], [], []
    for mu in config.centres:
        runs = [
            TwoBalls(mu, powers=powers, shared=shared, margin=config.margin)
            for powers, shared in (((1, 2), False), ((1, 3), True), ((1, 1), False))
        ]
        paths = [run.path() for run in runs]
        angles = [_angles(run, path) for run, path in zip(runs, paths, strict=True)]
        theory.append(number(asymmetric_angle(mu, 1.0, (1.0, 0.5))))
        euclid.append(number(asymmetric_angle(mu, 1.0, (1.0, 1.0))))
        for kept, (q, phi) in zip((products, cubes, homogeneous), angles, strict=True):
            assert float(q[-1]) > 0.5 * config.margin
            kept.append(float(phi[-1]))
        full = TwoBalls(mu, points=3000).full()
        w = hard_margin(full["x"], full["y"])
        svm.append(float(torch.rad2deg(torch.atan2(w[1], w[0]))))
        q, phi = angles[0]
        series.append({"name": f"mu = {mu}", "x": plain(q[q > 1]), "y": plain(phi[q > 1]), "colour": len(series)})
        series.append(
            {"name": "asymmetric margin", "x": [1.0, float(q[-1])], "y": [theory[-1]] * 2, "mark": "dash", "colour": len(series) - 1}
        )
        growth = growth_exponents({"a": paths[0]["a"][:, 0], "u": paths[0]["b"][:, 0], "v": paths[0]["b"][:, 1]}, q)
        rates.append([growth[n] for n in ("a", "u", "v")])
        late = paths[0]["b"].square()
        charges.append(float(((late[:, 0] - late[:, 1]) - (late[0, 0] - late[0, 1])).abs().max()))
        norms.append(_identity(runs[0], paths[0]))
        for pairs, run, path in zip(normalised, runs[::2], paths[::2], strict=True):
            pairs.append(_normalised(run, path))
    gone, bias = _discarded(config)
    checks = (
        match("f = a x1 + u v x2: angle at the end (degrees)", theory, products, 0.5, source=f"{SLUG} A2, R6"),
        match("f = a x1 + t^3 x2: angle at the end (degrees)", theory, cubes, 0.5, source=f"{SLUG} A2, R6"),
        control("homogeneous f = a x1 + b x2 ends at the Euclidean margin instead: off it by (degrees)",
                [abs(a - b) for a, b in zip(homogeneous, euclid, strict=True)], at_most=0.3, source=f"{SLUG} A2 control"),
        match("Euclidean margin: closed form against the quadratic programme (degrees)", euclid, svm, 0.1, source=f"{SLUG} R6"),
        control("the two directions are far apart (degrees)", [a - b for a, b in zip(theory, euclid, strict=True)], at_least=10.0,
                source=f"{SLUG} R6"),
        match("growth exponents of a, u, v", [1.0, 0.5, 0.5] * len(rates), rates, 0.02, source=f"{SLUG} A4, R3"),
        match("u^2 - v^2 over the run", 0.0, charges, 1e-5, source=f"{SLUG} R5"),
        match("rate of the seminorm against E e^-q q, relative", 0.0, norms, 1e-8, source=f"{SLUG} R5"),
        holds("homogeneous: the smoothed normalised margin, -log sum e^-q over the norm, never falls: least change of a record, q > 2",
              [float(soft.diff().min()) for _, soft in normalised[1]], at_least=0.0, source=f"{SLUG} R5"),
        control("f = a x1 + u v x2: no law for the margin itself, which falls, normalised, from q = 2 to the end by",
                [float(h[0] - h[-1]) for h, _ in normalised[0]], at_least=0.01, source=f"{SLUG} R5"),
        holds("both: the smoothed one rises over the same stretch by",
              [float(soft[-1] - soft[0]) for rows in normalised for _, soft in rows], at_least=0.1, source=f"{SLUG} R5"),
        match(f"mu = {config.discarded}: the coordinate of the large exponent is discarded, angle (degrees)", 90.0, gone, 0.5,
              source=f"{SLUG} A2, R4, R6"),
        match("f = w g x + b: exponents of w and g", 0.5, bias[:2], 0.02, source=f"{SLUG} R3"),
        holds("f = w g x + b: b / q over a decade of q falls by", bias[2], at_least=3.0, source=f"{SLUG} R3, R4"),
    )  # fmt: skip
    data = {"series": series, "x": "margin q", "y": "angle (degrees)", "log": "x"}
    return Part(
        checks,
        (Figure("margin directions, f = a x1 + u v x2", data, curves, "The flow turns from the Euclidean to the asymmetric margin."),),
    )


def _angles(run: TwoBalls, path: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    seen = [run.observables({n: w[i] for n, w in path.items()}) for i in range(len(path["a"]))]
    return torch.stack([o["margin"] for o in seen]), torch.stack([o["angle"] for o in seen])


def _identity(run: TwoBalls, path: dict[str, Tensor]) -> float:
    """d |theta|_lambda^2 / dt / 2 by the gradient, over E e^-q q, less one, at the weights where the margin passes 2."""
    q, _ = _angles(run, path)
    at = int((q > 2).nonzero()[0])
    theta = {n: w[at] for n, w in path.items()}
    push = torch.func.grad(run.loss)(theta)
    first, second = run.exponents
    rate = -(first * (theta["a"] * push["a"]).sum() + second * (theta["b"] * push["b"]).sum())
    full = run.full()
    margins = full["y"] * (full["x"] @ run.direction(theta))
    return float(rate / (margins * (-margins).exp()).mean() - 1)


def _normalised(run: TwoBalls, path: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """e^-alpha times the least margin and times -log sum e^-q, at the records with q > 2; alpha from |psi_-alpha(theta)|_lambda = 1."""
    full = run.full()
    found = exponents(run.module(), full["x"].float())
    hard, soft = [], []
    for i in range(len(path["a"])):
        theta = {n: w[i] for n, w in path.items()}
        q = full["y"] * (full["x"] @ run.direction(theta))
        if float(q.min()) > 2:
            unit = math.exp(-found.normaliser(theta))
            hard.append(unit * q.min())
            soft.append(-unit * torch.logsumexp(-q, 0))
    return torch.stack(hard), torch.stack(soft)


def _discarded(config: BallsConfig) -> tuple[list[float], list[float]]:
    run = TwoBalls(config.discarded, powers=(1, 3), shared=True, margin=config.margin)
    _, phi = _angles(run, run.path())
    # f = w g x + b on the line: classes at distances 1 and 2 from 0
    from parasym.solvable.engines import follow

    def rhs(_: float, t: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.tensor([1.0, -2.0], dtype=torch.float64)
        y = torch.tensor([1.0, -1.0], dtype=torch.float64)
        q = y * (t["w"] * t["g"] * x + t["b"])
        p = torch.softmax(-q, 0) * y
        g = {"w": (p * x).sum() * t["g"], "g": (p * x).sum() * t["w"], "b": p.sum()}
        speed = q.min().clamp_min(1e-2) / torch.stack([v.square() for v in g.values()]).sum()
        return {n: speed * v for n, v in g.items()}

    start = {
        "w": torch.tensor(0.4, dtype=torch.float64),
        "g": torch.tensor(0.3, dtype=torch.float64),
        "b": torch.tensor(0.0, dtype=torch.float64),
    }
    path = follow(rhs, start, torch.linspace(0, 12, 200, dtype=torch.float64), method="LSODA", rtol=1e-8, atol=1e-10).theta
    q = torch.minimum(path["w"] * path["g"] + path["b"], 2 * path["w"] * path["g"] - path["b"])
    growth = growth_exponents({"w": path["w"], "g": path["g"]}, q)
    late, early = int(len(q) - 1), int((q > 0.1 * q[-1]).nonzero()[0])
    share = (path["b"] / q).abs()
    return [float(phi[-1])], [growth["w"], growth["g"], float(share[early] / share[late])]


# ------------------------------------------------------------------------------------------------ A3: neural collapse


@dataclass(frozen=True)
class CollapseConfig:
    """C classes of ``per_class`` free features on the unit sphere in d = 6, linear head without bias; cross-entropy; normalised steps of
    2 / it for W and 10 (it + 10)^-1.5 for the features along grad log L."""

    classes: tuple[int, ...] = (3, 4)
    dim: int = 6
    per_class: int = 8
    steps: int = 4000
    seeds: tuple[int, ...] = (0, 1, 2)


def _collapse(config: CollapseConfig, classes: int, frozen: bool = False) -> tuple[list[list[float]], list[float]]:
    """Collapse meters and margin / |W|_F of each seed."""
    draws, n = Ensemble(config.seeds), classes * config.per_class
    labels = torch.arange(classes).repeat_interleave(config.per_class)
    unit = lambda v: v / v.norm(dim=-1, keepdim=True)  # noqa: E731
    H, W = unit(draws.normal(n, config.dim)), 0.1 * draws.normal(classes, config.dim)
    onehot = torch.nn.functional.one_hot(labels, classes).double()
    for step in range(1, config.steps + 1):
        z = H @ W.mT
        p = torch.softmax(z, -1) - onehot
        g_W, g_H = -(p.mT @ H), -(p @ W)
        g_H = g_H - (g_H * H).sum(-1, keepdim=True) * H
        W = W + 2 * g_W / g_W.norm(dim=(1, 2), keepdim=True) / step
        if not frozen:
            H = unit(H + unit(g_H) * 10 * (step + 10) ** -1.5)
    z = H @ W.mT
    own = z[:, torch.arange(n), labels]
    rest = (z - 1e9 * onehot).amax(-1)
    margins = ((own - rest).amin(-1) / W.norm(dim=(1, 2))).tolist()
    found = [neural_collapse(H[i], labels, W[i]) for i in range(len(config.seeds))]
    return [[f.within, f.cosine, f.spread, f.alignment, f.agreement] for f in found], margins


def collapse(config: CollapseConfig) -> Part:
    """A3, R7: the features fall on a simplex frame and the head aligns with it; frozen features do not."""
    checks: list[Check] = []
    for classes in config.classes:
        meters, margins = _collapse(config, classes)
        limit = simplex_margin(classes)
        source = f"{SLUG} A3, R7"
        checks += [
            match(f"C = {classes}: mean cosine of class means", -1 / (classes - 1), [m[1] for m in meters], 0.01, source=source),
            match(f"C = {classes}: spread of the cosines (NC2)", 0.0, [m[2] for m in meters], 0.02, source=source),
            match(f"C = {classes}: within-class variance (NC1)", 0.0, [m[0] for m in meters], 1e-7, source=source),
            match(
                f"C = {classes}: margin / |W| over sqrt(C) / (C - 1)",
                1.0,
                [m / limit for m in margins],
                0.01,
                source=source,
                spread=margins,
            ),
            holds(f"C = {classes}: and not above it", margins, at_most=limit * (1 + 1e-9), source=source),
            match(f"C = {classes}: head rows along class means (NC3)", 1.0, [m[3] for m in meters], 0.01, source=source),
            match(f"C = {classes}: nearest class mean decides like the head (NC4)", 1.0, [m[4] for m in meters], 0.0, source=source),
        ]
    meters, margins = _collapse(config, config.classes[-1], frozen=True)
    checks += [
        control("frozen random features: spread of the cosines (NC2), mean of the seeds", sum(m[2] for m in meters) / len(meters),
                at_least=0.1, source=f"{SLUG} control", spread=[m[2] for m in meters]),
        control("frozen random features: margin / |W| over the limit", [m / limit for m in margins], at_most=0.9,
                source=f"{SLUG} control"),
    ]  # fmt: skip
    return Part(tuple(checks))


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    table: TableConfig | None = TableConfig()
    balls: BallsConfig | None = BallsConfig()
    collapse: CollapseConfig | None = CollapseConfig()


ENTRY = Entry(
    slug=SLUG,
    title="The Asymmetric Maximum Margin Bias of Quasi-Homogeneous Neural Networks",
    paper="D. Kunin, A. Yamamura, C. Ma, S. Ganguli, ICLR 2023, arXiv 2210.03820",
    claims=(
        "Networks with biases, norms and skips scale covariantly, with an exponent for each parameter that is read off the traced graph.",
        "Gradient flow minimises the norm of the parameters with the largest exponent only: robustness is lost.",
        "With normalised features and a linear head the maximum margin is a simplex frame: neural collapse.",
    ),
    presets={
        "smoke": Config(
            table=TableConfig(names=("linear", "three-layer ReLU with biases", "residual block", "batch norm, training"), resnet=False),
            balls=BallsConfig(centres=((2.0, 0.5),)),
            collapse=CollapseConfig(classes=(3,), steps=3000),
        ),
        "default": Config(),
        "full": Config(collapse=CollapseConfig(classes=(3, 4, 5), steps=20_000, seeds=tuple(range(8)))),
    },
    experiments={"table": table, "balls": balls, "collapse": collapse},
)
