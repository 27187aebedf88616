"""Topological Invariance and Breakdown in Learning.

Slug topological-invariance. Loss L = mse / 2 (mean over samples), full batch. A layer of n neurons in mean-field form f = c mean_i
phi(theta_i, x); the step is theta_i -= eta n dL/dtheta_i, so that rates do not depend on n. Inputs: a grid on [-2, 2] (A1, A3) or 100
Gaussian points (A2). Everything is deterministic given the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parasym.gallery.contract import Entry, Figure, Part, control, holds, match
from parasym.gallery.digits import digits
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.measure.topology import (
    barcode,
    bilipschitz,
    critical_rate,
    crossings,
    distinct,
    orientation_flips,
    pair_hessians,
    self_intersections,
)

SLUG = "topological-invariance"


# ------------------------------------------------------------------------------------------------ A1, A3: neurons on a line


@dataclass(frozen=True)
class LineConfig:
    """f = mean tanh(w_i x), y = tanh 2x - .4 sin 3x, start 1.5 N(0, 1) sorted; the rates of each seed straddle 1 / K."""

    neurons: int = 30
    samples: int = 25
    etas: tuple[float, ...] = (0.3, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 2.0)
    steps: int = 400
    nodes: int = 16
    own_rate: float = 0.3
    adam: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Line:
    """The scalar problem; clouds are (n,)."""

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, samples: int) -> Line:
        x = torch.linspace(-2, 2, samples, dtype=torch.float64)
        return cls(x, torch.tanh(2 * x) - 0.4 * torch.sin(3 * x))

    def velocity(self, w: Tensor) -> Tensor:
        """n dL/dw."""
        h = torch.tanh(w[:, None] * self.x)
        return ((1 - h.square()) * self.x * (h.mean(0) - self.y)).mean(1)

    def between(self, w: Tensor, nodes: int) -> Tensor:
        """n Mbar of the neighbours (n - 1,) of a sorted cloud: the antisymmetric Hessian, averaged from the cloud with both exchanged
        to the cloud. From second derivatives alone, never from the difference of two velocities (see `pair_hessians`, which agrees)."""
        t, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
        back = (0.5 * (1 - t))[:, None] * (w[:-1] - w[1:])  # (nodes, n - 1): how far along the way back
        h = torch.tanh(w[:, None] * self.x)
        hi, hj = (torch.tanh((v - sign * back)[..., None] * self.x) for v, sign in ((w[:-1], 1), (w[1:], -1)))
        residual = h.mean(0) - self.y + (hi + hj - h[:-1] - h[1:]) / len(w)
        si, sj = ((1 - a.square()) * self.x for a in (hi, hj))
        hessian = (-2 * hi * si * self.x * residual + si * (si - sj) / len(w)).mean(-1)
        return (weights / 2) @ hessian

    def loss(self, w: Tensor) -> float:
        """mse / 2."""
        return float((torch.tanh(w[:, None] * self.x).mean(0) - self.y).square().mean() / 2)

    def curvature(self, w: Tensor) -> float:
        """Largest eigenvalue of n times the Hessian, that is of the Jacobian of the velocity."""
        h = torch.tanh(w[:, None] * self.x)
        slope = (1 - h.square()) * self.x
        bend = ((-2 * h * (1 - h.square())) * self.x.square() * (h.mean(0) - self.y)).mean(1)
        jacobian = slope @ slope.T / (len(self.x) * len(w)) + torch.diag(bend)
        return float(torch.linalg.eigvalsh(jacobian)[-1])


def _start(neurons: int, seed: int) -> Tensor:
    return torch.from_numpy(np.sort(1.5 * np.random.default_rng(seed).standard_normal(neurons)))


def _descend(line: Line, w: Tensor, rate: float | Tensor, steps: int, nodes: int) -> tuple[Tensor, float, int, float]:
    """Where it ends, the largest rate times K of neighbours over all steps (K from Hessians), crossings, log of the product bound on gaps.

    With a rate for each neuron there is no K, and crossings alone are counted.
    """
    worst, crossed, bound = 0.0, 0, 0.0
    for _ in range(steps):
        if not isinstance(rate, Tensor):
            ordered = w.sort().values
            pull = rate * float(line.between(ordered, nodes)[ordered.diff() > 1e-9].max())
            worst, bound = max(worst, pull), bound + (math.log1p(-pull) if pull < 1 else -math.inf)
        new = w - rate * line.velocity(w)
        crossed += crossings(w, new)
        w = new
    return w, worst, crossed, bound


def _path(line: Line, w: Tensor) -> tuple[float, float]:
    """The closed form of Mbar at the nodes of `LineConfig` and at 96 against `pair_hessians` at 96: largest difference over largest."""
    n, index = len(w), torch.arange(len(w) - 1)

    def loss(cloud: Tensor) -> Tensor:
        return (torch.tanh(cloud * line.x).mean(0) - line.y).square().mean() / 2

    exact = n * pair_hessians(loss, w[:, None], torch.stack([index, index + 1], 1), 96)[:, 0, 0]
    coarse, fine = (float((line.between(w, k) - exact).abs().max() / exact.abs().max()) for k in (LineConfig().nodes, 96))
    return coarse, fine


def line(config: LineConfig) -> Part:
    """A1, A3, R2, R4, R5: the order of neurons survives exactly while eta times the contraction stays below one."""
    problem = Line.of(config.samples)
    agree, bounds, below, above_loss, sharp, own, still, adam, path = ([] for _ in range(9))  # type: ignore[var-annotated]
    points: list[tuple[float, int]] = []
    for seed in config.seeds:
        start = _start(config.neurons, seed)
        path.append(_path(problem, start))
        for eta in config.etas:
            w, worst, crossed, bound = _descend(problem, start, eta, config.steps, config.nodes)
            agree.append(float((crossed == 0) == (worst < 1)))
            points.append((worst, crossed))
            if worst < 1:
                below.append(crossed)
                gaps = w.sort().values.diff() / start.diff()
                bounds.append(float(gaps.min().log()) - bound)
            else:
                above_loss.append(problem.loss(w) / problem.loss(start))
                sharp.append(eta * problem.curvature(w))
        rates = config.own_rate * (
            1 + 0.5 * torch.randn(config.neurons, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        )
        own.append(float(_descend(problem, start, rates, config.steps, config.nodes)[2]))
        still.append(_twins(problem, start, config))
        adam.append([_adam(problem, start, lr, config.steps)[0] for lr in config.adam])
    low, high = [a[0] for a in adam], [a[-1] for a in adam]
    checks = (
        match("K of neighbours in closed form against the measure's, 96 nodes", 0.0, [p[1] for p in path], 1e-12, source=f"{SLUG} R1"),
        match("and at the nodes used along the run", 0.0, [p[0] for p in path], 1e-6, source=f"{SLUG} R1"),
        match("no crossing if and only if eta K < 1, K from Hessians: runs that agree", 1.0, agree, 0.0, source=f"{SLUG} A1"),
        holds("the rates lie on both sides: runs below and above", [len(below), len(above_loss)], at_least=3, source=f"{SLUG} A1"),
        holds("log of the smallest gap ratio less sum log(1 - eta_t K_t)", bounds, at_least=-1e-9, source=f"{SLUG} R2"),
        holds("above the critical rate descent is still stable: loss at the end over start", above_loss, at_most=0.5, source=f"{SLUG} R4"),
        holds("and eta lambda_max at the end", sharp, at_most=2.0, source=f"{SLUG} R4"),
        match("two equal neurons stay equal under descent, momentum and Adam: largest drift", 0.0, still, 0.0, source=f"{SLUG} R5, R0"),
        holds(f"Adam at {config.adam[0]:g}: crossings", low, at_most=0, source=f"{SLUG} R5", spread=low),
        control(f"Adam at {config.adam[-1]:g}: crossings", high, at_least=100, source=f"{SLUG} R5", spread=high),
        control("a rate for each neuron, far below the critical one: crossings", own, at_least=20, source=f"{SLUG} A3", spread=own),
    )
    series = [
        {"name": "runs", "x": [p[0] for p in points], "y": [p[1] for p in points], "mark": "points"},
        {"name": "critical", "x": [1, 1], "y": [0, max(p[1] for p in points)], "mark": "dash"},
    ]
    data = {"series": series, "x": "eta K, largest over the run", "y": "crossings"}
    return Part(checks, (Figure("Order of the neurons", data, curves, "No crossing left of the line."),))


def _twins(problem: Line, start: Tensor, config: LineConfig) -> float:
    """Largest distance that two equal neurons gain, at a large rate, over three rules."""
    doubled = torch.cat([start, start[:1]])
    drift = 0.0
    for kind, options in (("SGD", {"lr": 2.0}), ("SGD", {"lr": 0.5, "momentum": 0.9}), ("Adam", {"lr": 0.1})):
        w = doubled.clone().requires_grad_()
        optimizer = getattr(torch.optim, kind)([w], **options)
        for _ in range(300):
            w.grad = problem.velocity(w.detach())
            optimizer.step()
            drift = max(drift, float((w[0] - w[-1]).abs().detach()))
    return drift


def _adam(problem: Line, start: Tensor, lr: float, steps: int) -> tuple[float, Tensor]:
    w, crossed = start.clone().requires_grad_(), 0
    optimizer = torch.optim.Adam([w], lr=lr)
    for _ in range(steps):
        before = w.detach().clone()
        w.grad = problem.velocity(before)
        optimizer.step()
        crossed += crossings(before, w.detach())
    return float(crossed), w.detach()


# ------------------------------------------------------------------------------------------------ A2: a ring


@dataclass(frozen=True)
class RingConfig:
    """60 neurons on the unit circle, f = 3 mean tanh(w.x), y = tanh(1.5 x1 - .5 x2) - tanh(-.5 x1 + x2).

    ``folds``: eta K above which neurons must turn inside out; between 1 and it they may. ``loop``: length above which a bar is a loop of
    the cloud, that of the longest one of a Gaussian blob.
    """

    neurons: int = 60
    samples: int = 100
    etas: tuple[float, ...] = (0.05, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0, 1.5, 2.0, 4.0)
    steps: int = 200
    folds: float = 1.3
    loop: float = 0.2
    seeds: tuple[int, ...] = (0, 1, 2)


def ring(config: RingConfig) -> Part:
    """A2, R3, R6: below one the step turns no neuron inside out and the ring stays a ring; above, it folds."""
    safe, folded, torn, loops = [], [], [], []
    table: dict[float, list[tuple[float, int, int]]] = {eta: [] for eta in config.etas}
    drawn = []
    for seed in config.seeds:
        x = torch.randn(config.samples, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        y = torch.tanh(x @ torch.tensor([1.5, -0.5], dtype=torch.float64)) - torch.tanh(x @ torch.tensor([-0.5, 1.0], dtype=torch.float64))
        angle = torch.arange(config.neurons, dtype=torch.float64) * 2 * math.pi / config.neurons
        start = torch.stack([angle.cos(), angle.sin()], 1)
        for eta in config.etas:
            w, top, flips, crossed = start, 0.0, 0, 0
            for _ in range(config.steps):
                h = torch.tanh(w @ x.T)
                r = 3 * h.mean(0) - y
                slope = 3 * (1 - h.square()) * r / config.samples
                second = -2 * h * slope
                jacobian = torch.einsum("ns,sa,sb->nab", second, x, x)  # of the velocity at a frozen f
                top = max(top, float(torch.linalg.eigvalsh(jacobian).max()))
                flips = max(flips, orientation_flips(torch.eye(2, dtype=torch.float64) - eta * jacobian))
                w = w - eta * slope @ x
                crossed = max(crossed, self_intersections(w))
            table[eta].append((eta * top, flips, crossed))
            if eta * top < 1:
                safe += [flips, crossed]
                loops.append(int((barcode(w).lengths(1) > config.loop).sum()))
            elif eta * top > config.folds:
                folded.append(flips)
                torn.append(crossed)
            if seed == config.seeds[0] and eta in (config.etas[1], config.etas[-1]):
                closed = torch.cat([w, w[:1]])
                drawn.append({"name": f"eta K = {eta * top:.2g}", "x": plain(closed[:, 0]), "y": plain(closed[:, 1])})
    checks = (
        holds("eta K < 1: flips and self-intersections", safe, at_most=0, source=f"{SLUG} A2, R3"),
        match(
            f"eta K < 1: loops of the cloud at the end, longer than {config.loop:g}", 1, loops, 0.0, source=f"{SLUG} A2, R6", spread=loops
        ),
        control(f"eta K > {config.folds:g}: neurons turned inside out", folded, at_least=1, source=f"{SLUG} A2, R3", spread=folded),
        holds("runs below and above", [len(safe) // 2, len(folded)], at_least=len(config.seeds), source=f"{SLUG} A2"),
        control("and self-intersections, most of any run", max(torn, default=0), at_least=1, source=f"{SLUG} A2", spread=torn),
    )
    data = {"series": drawn, "x": "w1", "y": "w2"}
    return Part(checks, (Figure("The ring of neurons after training", data, curves),))


# ------------------------------------------------------------------------------------------------ R1, R2: the pair identity


@dataclass(frozen=True)
class PairConfig:
    """6 tanh units with 3 inputs, bias and out-weight, N(0, 1); one step at each multiple of 1 / K."""

    units: int = 6
    inputs: int = 3
    samples: int = 40
    nodes: int = 96
    shares: tuple[float, ...] = (0.3, 0.9)
    lr: float = 0.7
    seeds: tuple[int, ...] = (0, 1, 2)


def pairs(config: PairConfig) -> Part:
    """R0, R1, R2: one step moves differences by exactly I - eta Mbar, so distances change by factors in [1 - eta K, 1 + eta K]."""
    error, coarse, without, inside, wide = (list[float]() for _ in range(5))
    series = []
    for seed in config.seeds:
        draws = Ensemble((seed,))
        x = draws.normal(config.samples, config.inputs)[0]
        y = torch.sin(x.sum(1))
        cloud = draws.normal(config.units, config.inputs + 2)[0]

        def loss(c: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            hidden = torch.tanh(c[:, :-2] @ x.T + c[:, -2:-1])
            return ((c[:, -1] @ hidden) / config.units - y).square().mean() / 2

        gradient = config.units * torch.func.grad(loss)(cloud)
        every = torch.combinations(torch.arange(config.units))
        apart = cloud[every[:, 0]] - cloud[every[:, 1]]
        after = apart - config.lr * (gradient[every[:, 0]] - gradient[every[:, 1]])
        for nodes, out in ((config.nodes, error), (config.nodes // 8, coarse)):
            M = config.units * pair_hessians(loss, cloud, every, nodes)
            out.append(float((after - apart + config.lr * (M @ apart[..., None])[..., 0]).norm(dim=1).div(apart.norm(dim=1)).max()))
        hessian = torch.func.hessian(loss)(cloud)
        local = config.units * torch.stack([hessian[i, :, i] - hessian[i, :, j] for i, j in every.tolist()])
        without.append(float((after - apart + config.lr * (local @ apart[..., None])[..., 0]).norm(dim=1).div(apart.norm(dim=1)).max()))
        M = config.units * pair_hessians(loss, cloud, every, config.nodes)
        K = float(torch.linalg.eigvalsh((M + M.mT) / 2).abs().max())
        for share in config.shares:
            eta = share / K
            moved = cloud - eta * gradient
            low, high = bilipschitz(cloud, moved)
            inside += [low - (1 - share), (1 + share) - high]
            wide.append(distinct(moved))
            series.append({"name": f"seed {seed}, eta K = {share:g}", "x": [share, share], "y": [low, high]})
    shares = [0.0, *config.shares]
    series += [
        {"name": "1 - eta K", "x": shares, "y": [1 - s for s in shares], "mark": "dash"},
        {"name": "1 + eta K", "x": shares, "y": [1 + s for s in shares], "mark": "dash"},
    ]
    checks = (
        match("difference after a step - (I - eta Mbar) difference, relative", 0.0, error, 1e-12, source=f"{SLUG} R1"),
        control("a rule of an eighth of the nodes: error", coarse, at_least=1e-10, source=f"{SLUG} R1"),
        control("the Hessian at the point instead of along the path: error", without, at_least=1e-3, source=f"{SLUG} R1"),
        holds("pair ratios less 1 - eta K, and 1 + eta K less pair ratios", inside, at_least=0.0, source=f"{SLUG} R2"),
        match("neurons stay distinct", float(config.units), wide, 0.0, source=f"{SLUG} R2, R6"),
        match("K of a quadratic loss, measured over closed form", 1.0, _rates(config), 1e-9, source=f"{SLUG} R2"),
    )
    return Part(checks, (Figure("Smallest and largest pair ratio of a step", {"series": series, "x": "eta K", "y": "ratio"}, curves),))


def _rates(config: PairConfig) -> list[float]:
    """The measure's K on a quadratic loss, whose antisymmetric block is known in closed form."""
    out = []
    for seed in config.seeds:
        draws = Ensemble((seed,))
        root, bend = draws.normal(3, 3)[0], draws.normal(3, 3)[0]
        A, B = root @ root.T, bend @ bend.T

        def loss(c: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            mean = c.sum(0)
            return (torch.einsum("na,ab,nb->", c, A, c) + mean @ B @ mean) / 2

        found = critical_rate(loss, draws.normal(5, 3)[0], nodes=4)
        out.append(found.details["K"] / float(torch.linalg.eigvalsh(A)[-1]))
    return out


# ------------------------------------------------------------------------------------------------ homology


@dataclass(frozen=True)
class HomologyConfig:
    """Clouds whose homology is known: a regular polygon of ``corners`` (a multiple of 3), a figure eight, a Gaussian blob."""

    corners: int = 60
    points: int = 80
    seeds: tuple[int, ...] = (0, 1, 2)


def homology(config: HomologyConfig) -> Part:
    """The measure on known shapes: one bar of the polygon in closed form, two loops of an eight, none of a blob."""
    angle = torch.arange(config.corners, dtype=torch.float64) * 2 * math.pi / config.corners
    found = barcode(torch.stack([angle.cos(), angle.sin()], 1))
    bar = found.bars[1]
    eight, blob = [], []
    for seed in config.seeds:
        stream = torch.Generator().manual_seed(seed)
        turn = (
            (torch.arange(config.points) + torch.rand(config.points, generator=stream, dtype=torch.float64)) * 2 * math.pi / config.points
        )
        lengths = barcode(torch.stack([turn.sin(), turn.sin() * turn.cos()], 1)).lengths(1)
        eight += plain(lengths[:2])
        noise = torch.randn(config.points, 2, generator=stream, dtype=torch.float64)
        blob.append(float(torch.cat([barcode(noise / noise.norm(dim=1).max()).lengths(1), torch.zeros(1, dtype=torch.float64)]).max()))
    exact = [2 * math.sin(math.pi / config.corners), math.sqrt(3.0)]
    checks = (
        match("polygon: number of loops", 1.0, float(len(bar)), 0.0, source=f"{SLUG} measures"),
        match("polygon: birth 2 sin(pi / n), death sqrt 3", exact, bar[0], 1e-12, source=f"{SLUG} measures"),
        holds("figure eight: its two longest loops", eight, at_least=0.25, source=f"{SLUG} measures", spread=eight),
        control("Gaussian blob in the unit disc: its longest loop", blob, at_most=0.2, source=f"{SLUG} measures", spread=blob),
    )
    return Part(checks)


# ------------------------------------------------------------------------------------------------ neurons of a net on images


@dataclass(frozen=True)
class SphereConfig:
    """Two-layer sigmoid net on digits, neurons on a random 2-sphere in their 75-dimensional space; Betti numbers at diameter / 4."""

    neurons: int = 80
    adam: tuple[float, ...] = (1e-5, 1e-2)
    steps: int = 400
    scale: float = 0.25
    seeds: tuple[int, ...] = (0, 1, 2)


def sphere(config: SphereConfig) -> Part:
    """Headline: at a small rate the Betti numbers stay; at a large one the cloud falls into pieces at a fixed scale.

    The theorem neither forbids nor predicts this fragmentation of a finite cloud (distances may stretch, too): it is reported as
    seen. What it does say is checked: the neurons stay distinct.
    """
    split = digits()
    x, y = split.x.double(), split.y
    start, end, apart = [], {lr: [] for lr in config.adam}, []  # type: ignore[var-annotated]
    series = []
    for seed in config.seeds:
        stream = torch.Generator().manual_seed(seed)
        point = torch.nn.functional.normalize(torch.randn(config.neurons, 3, generator=stream, dtype=torch.float64), dim=1)
        frame = torch.linalg.qr(torch.randn(75, 3, generator=stream, dtype=torch.float64))[0]
        cloud = point @ frame.T
        before = barcode(cloud)
        start.append(before.betti(0, config.scale))
        for lr in config.adam:
            w = cloud.clone().requires_grad_()
            optimizer, seen = torch.optim.Adam([w], lr=lr), []
            for step in range(config.steps + 1):
                if step % max(1, config.steps // 4) == 0:
                    seen.append(barcode(w.detach(), (0,)).betti(0, config.scale))
                optimizer.zero_grad()
                with torch.enable_grad():
                    hidden = torch.sigmoid(x @ w[:, :64].T + w[:, 64])
                    torch.nn.functional.cross_entropy(hidden @ w[:, 65:], y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            end[lr].append(seen[-1])
            apart.append(distinct(w.detach()))
            if seed == config.seeds[0]:
                axis = [k * max(1, config.steps // 4) for k in range(len(seen))]
                series.append({"name": f"Adam {lr:g}", "x": axis, "y": seen})
    small, large = config.adam[0], config.adam[-1]
    checks = (
        match(
            f"Adam {small:g}: components at diameter / 4, end = start", start, end[small], 0.0, source=f"{SLUG} headline", spread=end[small]
        ),
        control(f"Adam {large:g}: components at the end", end[large], at_least=2, source=f"{SLUG} headline", spread=end[large]),
        match("neurons stay distinct", float(config.neurons), apart, 0.0, source=f"{SLUG} R6"),
    )
    return Part(checks, (Figure("Components at diameter / 4", {"series": series, "x": "step", "y": "Betti number 0"}, curves),))


# ------------------------------------------------------------------------------------------------ the entry


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    line: LineConfig | None = LineConfig()
    ring: RingConfig | None = RingConfig()
    pairs: PairConfig | None = PairConfig()
    homology: HomologyConfig | None = HomologyConfig()
    sphere: SphereConfig | None = SphereConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {"line": line, "ring": ring, "pairs": pairs, "homology": homology, "sphere": sphere}
_MANY: Sequence[int] = tuple(range(6))

ENTRY = Entry(
    slug=SLUG,
    title="Topological Invariance and Breakdown in Learning",
    paper="Yongyi Yang, Tomaso Poggio, Isaac Chuang, Liu Ziyin, 2025, arXiv 2510.02670; ICLR 2026",
    claims=(
        "A step moves the difference of two neurons by exactly I - eta Mbar, the mean antisymmetric Hessian between them.",
        "Below eta* = 1/K the cloud of neurons is only stretched: order, orientation and topology are kept.",
        "Between 1/K and 2/lambda_max descent is stable and the cloud may fold and merge; equal neurons stay equal at any rate.",
    ),
    presets={
        "smoke": Config(
            line=LineConfig(etas=(0.3, 0.6, 1.2, 2.0), steps=200),
            ring=RingConfig(etas=(0.05, 0.1, 0.7, 0.8, 2.0), steps=100),
            pairs=PairConfig(units=4),
            sphere=None,
        ),
        "default": Config(),
        "full": Config(
            line=LineConfig(seeds=tuple(_MANY)),
            ring=RingConfig(seeds=tuple(_MANY)),
            sphere=SphereConfig(neurons=300, adam=(1e-5, 1e-3, 1e-2), steps=4000, seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
)
