"""Symmetry Induces Structure and Constraint of Learning: mirrors, what they force, and constraints by gradient descent.

Slug dcs-mirror-symmetry. A mirror is a reflection R = 1 - 2 O O^T of the parameters that leaves every per-sample loss
unchanged. Its surface O^T theta = 0 is stationary in the normal direction, decouples in the Hessian, and attracts training
under weight decay or gradient noise. Put in on purpose, a mirror is a hard constraint that plain gradient descent meets
exactly (DCS).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

from parasym.core.errors import MissingExtraError, NotASymmetryError
from parasym.core.graph import trace
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import agreement, bars, curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.gallery.stochastic_collapse import MaximumConfig, sgd_exponent, simulate_maximum
from parasym.methods.dcs import Dcs
from parasym.methods.dcs import dcs as constrain
from parasym.symmetry.discrete import discrete_symmetries
from parasym.symmetry.mirror import Mirror

SLUG = "dcs-mirror-symmetry"


# ------------------------------------------------------------------------------------------------ A1: DCS


@dataclass(frozen=True)
class ConstraintConfig:
    """Least squares sum (X theta - y)^2 / (2 n) with r random constraints O^T theta = 0; gradient descent from w = 0, u, v ~ N(0, .25).

    X, the true weights ~ N(0, 1), label noise N(0, noise^2). Decays are multiples of the predicted thresholds; they multiply
    (|u|^2 + |v|^2) / 2. The comparison with the penalised problem uses ``long_eta``: the same flow, followed for longer.
    """

    samples: int = 200
    dim: int = 12
    rank: int = 3
    noise: float = 0.5
    eta: float = 0.02
    long_eta: float = 0.15
    steps: int = 6000
    above: float = 1.1
    below: float = 0.9
    far_below: float = 0.5
    start: float = 0.5
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Regression:
    """A batch of least-squares problems by their moments: gram (b, d, d), target (b, d), basis O (b, d, r)."""

    gram: Tensor
    target: Tensor
    basis: Tensor

    def gradient(self, theta: Tensor) -> Tensor:
        """Gradient of the loss at theta (b, d)."""
        return (self.gram @ theta[..., None])[..., 0] - self.target

    def constrained(self) -> Tensor:
        """The least-squares solution with O^T theta = 0, (b, d)."""
        free = torch.linalg.svd(self.basis)[0][..., self.basis.shape[-1] :]
        inner = torch.linalg.solve(free.mT @ self.gram @ free, free.mT @ self.target[..., None])
        return (free @ inner)[..., 0]

    def multipliers(self) -> Tensor:
        """lambda = O^T gradient at the constrained optimum (b, r): the thresholds of R5."""
        return (self.basis.mT @ self.gradient(self.constrained())[..., None])[..., 0]

    def repeat(self, count: int) -> Regression:
        """Each problem ``count`` times."""
        return Regression(*(tensor.repeat_interleave(count, 0) for tensor in (self.gram, self.target, self.basis)))


def regression(config: ConstraintConfig) -> Regression:
    """One problem for each seed."""
    draws = Ensemble(config.seeds)
    x, truth = draws.normal(config.samples, config.dim), draws.normal(config.dim)
    y = (x @ truth[..., None])[..., 0] + config.noise * draws.normal(config.samples)
    basis = torch.linalg.qr(draws.normal(config.dim, config.rank))[0]
    return Regression(x.mT @ x / config.samples, (x.mT @ y[..., None])[..., 0] / config.samples, basis)


def dcs(w: Tensor, u: Tensor, v: Tensor, basis: Tensor) -> Tensor:
    """theta = (1 - O O^T) w + O (u v): the DCS parametrisation (R5); v of size 1 gives the group form.

    Args:
        w: (b, d) free weights; u: (b, r); v: (b, r) or (b, 1); basis: (b, d, r) orthonormal.
    """
    return w - _lift(basis, _coordinates(basis, w)) + _lift(basis, u * v)


def train_dcs(problem: Regression, decay: Tensor, eta: Tensor, steps: int, group: bool, start: tuple[Tensor, Tensor]) -> Tensor:
    """theta (b, d) after descent at rates eta (b,) on the loss at `dcs` plus decay (|u|^2 + |v|^2) / 2, decay (b,), on u and v only."""
    u, v = start
    w, rate, size = torch.zeros_like(problem.target), decay[:, None], eta[:, None]
    for _ in range(steps):
        gradient = problem.gradient(dcs(w, u, v, problem.basis))
        normal = _coordinates(problem.basis, gradient)
        push = (normal * u).sum(-1, keepdim=True) if group else normal * u
        w = w - size * (gradient - _lift(problem.basis, normal))
        u, v = u - size * (normal * v + rate * u), v - size * (push + rate * v)
    return dcs(w, u, v, problem.basis)


def penalised(problem: Regression, decay: Tensor, group: bool, steps: int = 4000) -> Tensor:
    """argmin loss + decay |O^T theta|_1 (or _2 in the group form) by accelerated proximal steps, (b, d): what DCS is predicted to solve."""
    size = 1 / torch.linalg.eigvalsh(problem.gram)[..., -1:]
    theta = ahead = torch.zeros_like(problem.target)
    momentum = 1.0
    for _ in range(steps):
        free = ahead - size * problem.gradient(ahead)
        c, limit = _coordinates(problem.basis, free), size * decay[:, None]
        shrunk = c * (1 - limit / c.norm(dim=-1, keepdim=True)).clamp_min(0) if group else c.sign() * (c.abs() - limit).clamp_min(0)
        new = free + _lift(problem.basis, shrunk - c)
        follow = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead, theta, momentum = new + (momentum - 1) / follow * (new - theta), new, follow
    return theta


def constraint(config: ConstraintConfig) -> Part:
    """A1: the constraint is met exactly once the decay exceeds the largest multiplier, and not below it."""
    base = regression(config)
    parts = [_constrain(config, base, group) for group in (False, True)]
    return Part(tuple(check for part in parts for check in part.checks), tuple(figure for part in parts for figure in part.figures))


def _constrain(config: ConstraintConfig, base: Regression, group: bool) -> Part:
    """Train at three decays, at the rate of A1 and at the longer one, and compare."""
    thresholds = base.multipliers().abs()
    top = thresholds.norm(dim=-1) if group else thresholds.amax(-1)
    low = top if group else thresholds.amin(-1)
    decays = torch.stack([config.above * top, config.below * top, config.far_below * low], dim=-1).repeat(1, 2)
    etas = torch.tensor([config.eta] * 3 + [config.long_eta] * 3, dtype=torch.float64).repeat(len(config.seeds))
    draws, problem = Ensemble(config.seeds), base.repeat(6)
    start = [config.start * draws.normal(size).repeat_interleave(6, 0) for size in (config.rank, 1 if group else config.rank)]
    theta = train_dcs(problem, decays.flatten(), etas, config.steps, group, (start[0], start[1]))
    solution = penalised(problem, decays.flatten(), group)
    normal = [_coordinates(problem.basis, point).reshape(len(config.seeds), 6, -1) for point in (theta, solution)]
    gap = (theta.reshape(len(config.seeds), 6, -1)[:, 0] - base.constrained()).norm(dim=-1)
    return Part(
        tuple(_constraint_checks(config, normal[0], normal[1], gap, group)), (_constraint_figure(normal[0], normal[1], thresholds, group),)
    )


def _constraint_checks(config: ConstraintConfig, measured: Tensor, predicted: Tensor, gap: Tensor, group: bool) -> list[Check]:
    """``measured``, ``predicted`` (seeds, 6, r): O^T theta at three decays and two rates; ``gap`` (seeds,) from the constrained optimum."""
    residual, off = measured.abs().amax(-1), (measured - predicted)[:, 3:].abs().amax(-1)
    name, cost = ("group DCS", "group-norm") if group else ("DCS", "L1")
    top, low = ("|lambda|_2", "|lambda|_2") if group else ("max |lambda|", "min |lambda|")
    return [
        holds(
            f"{name}, decay {config.above} x {top}: largest |O^T theta|",
            residual[:, 0],
            at_most=1e-6,
            source=f"{SLUG} A1",
            spread=residual[:, 0],
        ),
        match(f"{name}, decay {config.above} x {top}: distance to constrained least squares", 0.0, gap, 1e-6, source=f"{SLUG} A1"),
        control(f"{name}, decay {config.below} x {top}: largest |O^T theta|", residual[:, 1], at_least=1e-2, source=f"{SLUG} A1"),
        control(f"{name}, decay {config.far_below} x {low}: largest |O^T theta|", residual[:, 2], at_least=1e-2, source=f"{SLUG} A1"),
        match(
            f"{name}: O^T theta against the {cost}-penalised problem, largest difference at each decay", 0.0, off, 1e-6, source=f"{SLUG} R5"
        ),
    ]


def _constraint_figure(measured: Tensor, predicted: Tensor, thresholds: Tensor, group: bool) -> Figure:
    names = ("above the threshold", "just below", "far below")
    series = [
        {"name": name, "predicted": plain(predicted[:, 3 + i].abs().flatten()), "measured": plain(measured[:, 3 + i].abs().flatten())}
        for i, name in enumerate(names)
    ]
    kind = "group form" if group else "elementwise"
    return Figure(
        f"DCS, {kind}: distance from the constraint",
        {"series": series, "x": "|O^T theta| of the penalised problem", "y": "measured"},
        agreement,
        f"Thresholds |lambda| of the first seed: {', '.join(f'{value:.3f}' for value in plain(thresholds[0]))}.",
    )


def _coordinates(basis: Tensor, theta: Tensor) -> Tensor:
    return (basis.mT @ theta[..., None])[..., 0]


def _lift(basis: Tensor, c: Tensor) -> Tensor:
    return (basis @ c[..., None])[..., 0]


# ------------------------------------------------------------------------------------------------ A2: the mirror theorem


@dataclass(frozen=True)
class MirrorConfig:
    """l = (g(theta, x) + g(R theta, x)) / 2 with g a random tanh network of theta and x; points theta ~ N(0, 1)."""

    dim: int = 10
    rank: int = 3
    hidden: int = 16
    samples: int = 8
    points: int = 200
    nodes: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)


def random_loss(config: MirrorConfig, seed: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """A random smooth g(theta, x), a basis O (d, r) and samples x (n, hidden)."""
    draws = Ensemble((seed,))
    weight, readout = draws.normal(config.hidden, config.dim)[0] / config.dim**0.5, draws.normal(config.hidden)[0]
    basis = torch.linalg.qr(draws.normal(config.dim, config.rank)[0])[0]

    def loss(theta: Tensor, x: Tensor) -> Tensor:
        return (readout * torch.tanh(weight @ theta + x)).sum()

    return loss, basis, draws.normal(config.samples, config.hidden)[0]


def reflect(theta: Tensor, basis: Tensor) -> Tensor:
    """R theta = theta - 2 O O^T theta, theta (..., d), basis (d, r)."""
    return theta - 2 * (theta @ basis) @ basis.T


def project(theta: Tensor, basis: Tensor) -> Tensor:
    """The nearest point of the mirror surface, theta - O O^T theta."""
    return theta - (theta @ basis) @ basis.T


def mirror(config: MirrorConfig) -> Part:
    """A2: on the mirror surface every per-sample gradient is tangent and the Hessian is block-diagonal; decay makes it the minimum."""
    rows = [_mirror_numbers(config, seed) for seed in config.seeds]
    table = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    checks = (
        match("on the surface: largest normal gradient |O^T grad l| of a sample", 0.0, table["gradient"], 1e-12, source=f"{SLUG} A2, R1.1"),
        match(
            "on the surface: largest off-block Hessian |O^T H (1 - P)| of a sample", 0.0, table["block"], 1e-12, source=f"{SLUG} A2, R1.2"
        ),
        match(
            "l(theta) - l(P theta) = int (1 - s) c.O^T H O c ds, worst of all points", 0.0, table["average"], 1e-10, source=f"{SLUG} R1.3"
        ),
        holds(
            "decay g0 = -inf lambda_min(O^T H O) / 2: smallest l_g(theta) - l_g(P theta)",
            table["decayed"],
            at_least=0.0,
            source=f"{SLUG} R1.3",
        ),
        control("not symmetrised: largest normal gradient on the surface", table["bare_gradient"], at_least=0.1, source=f"{SLUG} A2"),
        control("not symmetrised: largest off-block Hessian on the surface", table["bare_block"], at_least=0.1, source=f"{SLUG} A2"),
        control("no decay: smallest l(theta) - l(P theta) is negative", table["undecayed"], at_most=-1e-3, source=f"{SLUG} R1.3"),
    )
    return Part(checks)


def _mirror_numbers(config: MirrorConfig, seed: int) -> dict[str, Tensor]:
    bare, basis, x = random_loss(config, seed)

    def loss(theta: Tensor, sample: Tensor) -> Tensor:
        return 0.5 * (bare(theta, sample) + bare(reflect(theta, basis), sample))

    theta = Ensemble((seed + 1000,)).normal(config.points, config.dim)[0]
    surface = project(theta, basis)
    gradient, block = _surface(loss, surface, basis, x)
    bare_gradient, bare_block = _surface(bare, surface, basis, x)
    rise, average, floor = _rise(lambda point: vmap(loss, (None, 0))(point, x).mean(), theta, basis, config.nodes)
    distance = (theta @ basis).square().sum(-1)
    return {
        "gradient": gradient,
        "block": block,
        "bare_gradient": bare_gradient,
        "bare_block": bare_block,
        "average": (rise - average).abs().max(),
        "undecayed": rise.min(),
        "decayed": (rise + 0.5 * (-floor).clamp_min(0) * distance).min(),
    }


def _surface(loss: Callable[[Tensor, Tensor], Tensor], surface: Tensor, basis: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest normal gradient and largest off-block Hessian entry over points and samples."""
    slopes = vmap(vmap(grad(loss), (None, 0)), (0, None))(surface, x)
    curved = vmap(vmap(hessian(loss), (None, 0)), (0, None))(surface, x)
    normal = basis.T @ curved
    return (slopes @ basis).abs().max(), (normal - normal @ basis @ basis.T).abs().max()


def _rise(loss: Callable[[Tensor], Tensor], theta: Tensor, basis: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """l(theta) - l(P theta) (n,), its value by the averaged Hessian (n,), and the lowest normal curvature met on the segments."""
    s, weight = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(nodes))
    s, weight = 0.5 * (1 + s), 0.5 * weight
    surface, c = project(theta, basis), theta @ basis
    spots = surface + s[:, None, None] * (theta - surface)
    normal = basis.T @ vmap(vmap(hessian(loss)))(spots) @ basis
    forms = torch.einsum("ni,snij,nj->sn", c, normal, c)
    return vmap(loss)(theta) - vmap(loss)(surface), ((1 - s) * weight) @ forms, torch.linalg.eigvalsh(normal).min()


# ------------------------------------------------------------------------------------------------ R1.4: the local threshold


@dataclass(frozen=True)
class AttractionConfig:
    """Two tanh neurons on a teacher of three, loss mean (f - y)^2 + gamma |theta|^2, full-batch descent; the mirror is the sign of unit 0.

    x (samples, inputs), all weights ~ N(0, 1). Unit 0 starts at zero, on the mirror, and stays there while unit 1 settles; then
    unit 0 is put at ``kick`` along its softest direction and its growth is fitted over ``fit`` steps. gamma is the convention
    of the paper: torch's weight_decay is 2 gamma.
    """

    inputs: int = 3
    teachers: int = 3
    samples: int = 50
    gammas: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0, 2.0)
    eta: float = 0.1
    settle: int = 5000
    fit: int = 40
    kick: float = 1e-7
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Pairs:
    """Batched problems of two neurons: x (b, n, d), y (b, n), gamma (b,); theta (b, 2, d + 1) holds w and v of each unit."""

    x: Tensor
    y: Tensor
    gamma: Tensor

    def errors(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """f - y (b, n) and the hidden values (b, n, 2)."""
        hidden = torch.tanh(self.x @ theta[..., :-1].mT)
        return (hidden * theta[:, None, :, -1]).sum(-1) - self.y, hidden

    def gradient(self, theta: Tensor) -> Tensor:
        """Gradient of mean (f - y)^2 + gamma |theta|^2."""
        error, hidden = self.errors(theta)
        steep = error[..., None] * (1 - hidden * hidden) * theta[:, None, :, -1]
        inner = torch.cat([steep.mT @ self.x, (hidden.mT @ error[..., None])], dim=-1)
        return 2 * inner / self.y.shape[1] + 2 * self.gamma[:, None, None] * theta

    def softest(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest eigenvalue (b,) and direction (b, d + 1) of O^T H O, the Hessian without decay in the block of unit 0."""

        def loss(unit: Tensor, other: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return (unit[-1] * torch.tanh(x @ unit[:-1]) + other[-1] * torch.tanh(x @ other[:-1]) - y).square().mean()

        values, vectors = torch.linalg.eigh(vmap(hessian(loss))(theta[:, 0], theta[:, 1], self.x, self.y))
        return values[:, 0], vectors[..., 0]


def attraction(config: AttractionConfig) -> Part:
    """R1.4: a mirror attracts training exactly when the decay exceeds its local threshold, at the predicted rate."""
    draws, shape = Ensemble(config.seeds), (len(config.seeds), len(config.gammas))
    x, teacher = draws.normal(config.samples, config.inputs), draws.normal(config.teachers, config.inputs)
    y = torch.tanh(x @ teacher.mT).sum(-1)
    gamma = torch.tensor(config.gammas, dtype=torch.float64).repeat(shape[0])
    problem = Pairs(x.repeat_interleave(shape[1], 0), y.repeat_interleave(shape[1], 0), gamma)
    theta = draws.normal(2, config.inputs + 1).repeat_interleave(shape[1], 0)
    theta[:, 0] = 0
    for _ in range(config.settle):
        theta = theta - config.eta * problem.gradient(theta)
    left, stayed = problem.gradient(theta).abs().amax((1, 2)), theta[:, 0].abs().max()
    softest, direction = problem.softest(theta)
    closed = -2 * (problem.errors(theta)[0][..., None] * problem.x).mean(1).norm(dim=-1)
    theta = theta + config.kick * torch.stack([direction, torch.zeros_like(direction)], dim=1)
    for _ in range(config.fit):
        theta = theta - config.eta * problem.gradient(theta)
    measured = ((theta[:, 0].norm(dim=-1) / config.kick).log() / config.fit).reshape(shape)
    predicted = (1 - config.eta * (softest + 2 * gamma)).log().reshape(shape)
    return _attraction_part(config, predicted, measured, {"left": left, "stayed": stayed, "softest": softest, "closed": closed})


def _attraction_part(config: AttractionConfig, predicted: Tensor, measured: Tensor, seen: Mapping[str, Tensor]) -> Part:
    gamma = torch.tensor(config.gammas, dtype=torch.float64)
    attracted = (gamma > -0.5 * seen["softest"].reshape(predicted.shape)).double()
    checks = (
        match("unit 0 never leaves its mirror while the rest trains: largest weight", 0.0, seen["stayed"], 0.0, source=f"{SLUG} R1.1"),
        match("lambda_min(O^T H O) = -2 |mean (f - y) x| for a tanh unit", seen["closed"], seen["softest"], 1e-12, source=f"{SLUG} R1.4"),
        match(
            "growth of |c| per step = log(1 - eta (lambda_min + 2 gamma)), every gamma and seed",
            predicted,
            measured,
            1e-6,
            source=f"{SLUG} R1.4",
        ),
        match("c shrinks exactly where gamma > -lambda_min / 2", attracted, (measured < 0).double(), 0.0, source=f"{SLUG} R1.4"),
        holds("the rest has settled: largest gradient", seen["left"], at_most=1e-8, source=f"{SLUG} R1.4"),
        control("smallest gamma, below the threshold: growth of |c| per step", measured[:, 0], at_least=1e-4, source=f"{SLUG} R1.4"),
    )
    x = list(config.gammas)
    marks = [
        {"name": f"seed {seed}", "x": x, "y": plain(measured[i]), "mark": "points", "colour": i} for i, seed in enumerate(config.seeds)
    ]
    lines = [{"name": f"predicted, seed {seed}", "x": x, "y": plain(predicted[i]), "colour": i} for i, seed in enumerate(config.seeds)]
    data = {"series": marks + lines, "x": "gamma", "y": "log growth of |c|", "log": "x"}
    return Part(checks, (Figure("Distance to a mirror: growth per step", data, curves, "Below zero the mirror attracts."),))


# ------------------------------------------------------------------------------------------------ R4: the dictionary of mirrors


@dataclass(frozen=True)
class DictionaryConfig:
    """Small models with N(0, 1) weights and inputs, per-sample loss (f - y)^2; one mirror for each kind of symmetry."""

    samples: int = 6
    seeds: tuple[int, ...] = (0, 1, 2)


Model = Callable[[Tensor, Tensor], Tensor]


def _neurons(activation: Callable[[Tensor], Tensor]) -> Model:
    """f(theta, x): 3 neurons, 4 inputs; theta = (W (3, 4), v (3,)) as one vector of 15."""
    return lambda theta, x: (theta[12:] * activation(theta[:12].reshape(3, 4) @ x)).sum()


def _product(theta: Tensor, x: Tensor) -> Tensor:
    """f = x.(U V) x' with U (4, 3), V (3, 4), theta of 24."""
    return x @ theta[:12].reshape(4, 3) @ theta[12:].reshape(3, 4) @ x.flip(0)


def _bilinear(theta: Tensor, x: Tensor) -> Tensor:
    """A bilinear GLU, f = v.(A x * B x), A, B (2, 4), v (2,), theta of 18."""
    return (theta[16:] * (theta[:8].reshape(2, 4) @ x) * (theta[8:16].reshape(2, 4) @ x)).sum()


def mirrors(seed: int) -> dict[str, tuple[Model, Tensor]]:
    """name -> (model, mirror basis O (N, r)): the dictionary of R4."""
    eye = torch.eye(24, dtype=torch.float64)
    neuron = [[4 * j + i for i in range(4)] + [12 + j] for j in range(3)]
    unit = torch.nn.functional.normalize(Ensemble((seed,)).normal(3)[0], dim=0)
    rotation = [torch.kron(eye[i, :4], unit) for i in range(4)]
    rotation = [torch.cat([column, torch.zeros_like(column)]) for column in rotation]
    rotation += [torch.cat([torch.zeros(12, dtype=torch.float64), torch.kron(unit, eye[i, :4])]) for i in range(4)]
    small = eye[:15, :15]
    return {
        "rescaling (u, v) -> (v, u)": (
            lambda theta, x: theta[0] * theta[1] * x[0],
            torch.tensor([[1.0], [-1.0]], dtype=torch.float64) / 2**0.5,
        ),
        "rescaling (u, v) -> (-v, -u)": (
            lambda theta, x: theta[0] * theta[1] * x[0],
            torch.tensor([[1.0], [1.0]], dtype=torch.float64) / 2**0.5,
        ),
        "sign of a tanh neuron": (_neurons(torch.tanh), small[:, neuron[0]]),
        "permutation of two neurons": (_neurons(torch.nn.functional.gelu), (small[:, neuron[0]] - small[:, neuron[1]]) / 2**0.5),
        "rotation of a factorisation": (_product, torch.stack(rotation, dim=1)),
        "branches of a bilinear GLU": (_bilinear, (eye[:18, :8] - eye[:18, 8:16]) / 2**0.5),
    }


def dictionary(config: DictionaryConfig) -> Part:
    """R4: each kind of symmetry contains a mirror; its surface is stationary and decoupled for every sample."""
    rows: dict[str, list[Tensor]] = {}
    for seed in config.seeds:
        for name, (model, basis) in mirrors(seed).items():
            rows.setdefault(name, []).append(_mirror_of(model, basis, seed, config))
    checks = [
        match(
            f"{name}: |l(R theta) - l(theta)|, normal gradient and off-block Hessian on its surface (relative)",
            0.0,
            torch.stack(values).amax(0),
            1e-12,
            source=f"{SLUG} R4, R1",
        )
        for name, values in rows.items()
    ]
    sign = mirrors(0)["sign of a tanh neuron"][1]
    wrong = torch.stack([_mirror_of(_neurons(torch.nn.functional.gelu), sign, seed, config)[0] for seed in config.seeds])
    checks.append(
        control("the sign mirror is none for a gelu neuron: |l(R theta) - l(theta)| (relative)", wrong, at_least=1e-3, source=f"{SLUG} R4")
    )
    return Part(tuple(checks))


def _mirror_of(model: Model, basis: Tensor, seed: int, config: DictionaryConfig) -> Tensor:
    draws = Ensemble((seed,))
    theta, x, y = draws.normal(basis.shape[0])[0], draws.normal(config.samples, 4)[0], draws.normal(config.samples)[0]

    def loss(point: Tensor, sample: Tensor, target: Tensor) -> Tensor:
        return (model(point, sample) - target).square()

    batched = vmap(loss, (None, 0, 0))
    value, moved = batched(theta, x, y), batched(reflect(theta, basis), x, y)
    surface = project(theta, basis)
    slopes, curved = vmap(grad(loss), (None, 0, 0))(surface, x, y), vmap(hessian(loss), (None, 0, 0))(surface, x, y)
    normal = basis.T @ curved
    gaps = (
        (moved - value).abs().max() / value.abs().max(),
        (slopes @ basis).abs().max() / slopes.abs().max().clamp_min(1),
        (normal - normal @ basis @ basis.T).abs().max() / curved.abs().max().clamp_min(1),
    )
    return torch.stack(gaps)


# ------------------------------------------------------------------------------------------------ R4, R5: discovered mirrors


@dataclass(frozen=True)
class DiscoveredConfig:
    """A tanh net inputs-width-2 on two teacher units, loss mean (f - y)^2 / 2, torch's start; mirrors are found, then imposed by `dcs`.

    Full batch; Adam at ``eta`` on a cosine to zero, decay in the gradient of u and v only. Signs: one mirror for each unit, decay
    ``decay``. Merging: the first three units equal, ``merge``.
    """

    inputs: int = 4
    width: int = 6
    samples: int = 60
    decay: float = 0.03
    merge: float = 0.5
    eta: float = 0.02
    steps: int = 1000
    seeds: tuple[int, ...] = (0, 1, 2)


def discovered(config: DiscoveredConfig) -> Part:
    """R4, R5: mirrors found in a network and put in as constraints empty it unit by unit, or merge units, as the multipliers say."""
    rows = [_discovered(config, seed) for seed in config.seeds]
    alive = torch.cat([row["residual"] > 1e-6 for row in rows])
    size, multiplier = torch.cat([row["residual"] for row in rows]), torch.cat([row["multiplier"] for row in rows])
    units = torch.tensor([float((row["residual"] > 1e-6).sum()) for row in rows])
    merged = torch.stack([row["merged"] for row in rows])
    checks = (
        holds("emptied units: |O^T theta|", torch.where(alive, 0.0, size), at_most=1e-10, source=f"{SLUG} R5"),
        holds("all or nothing: |O^T theta| of the others", torch.where(alive, size, size.max()), at_least=0.1, source=f"{SLUG} R5"),
        match(
            "units that are left: |O^T grad l| = decay",
            config.decay,
            torch.where(alive, multiplier, config.decay),
            1e-3 * config.decay,
            source=f"{SLUG} R5",
        ),
        holds(
            "units that are emptied: |O^T grad l| / decay",
            torch.where(alive, 0.0, multiplier / config.decay),
            at_most=1.0,
            source=f"{SLUG} R5",
        ),
        holds("some units go", config.width - units, at_least=1, source=f"{SLUG} R4", spread=units),
        match("merged units: largest difference of their weights", 0.0, merged[:, 0], 1e-10, source=f"{SLUG} R4"),
        holds("merged units are not empty: their norm", merged[:, 1], at_least=0.05, source=f"{SLUG} R4"),
        match("the baked network computes what the constrained one did (largest change)", 0.0, merged[:, 2], 1e-10, source=f"{SLUG} R5"),
        match("reflections that change a GELU network are refused (1 for refused)", 1.0, merged[:, 3], 0.0, source=f"{SLUG} R4"),
        control("before training the units differ", merged[:, 4], at_least=0.1, source=f"{SLUG} R4"),
    )
    series = [
        {"name": f"seed {s}", "x": plain(r["residual"]), "y": plain(r["multiplier"]), "mark": "points"}
        for s, r in zip(config.seeds, rows, strict=True)
    ]
    data = {"series": series, "x": "|O^T theta| of a unit", "y": "|O^T grad l|"}
    return Part(checks, (Figure("Units and their multipliers", data, curves, "Left units sit at the decay, emptied ones below it."),))


def _discovered(config: DiscoveredConfig, seed: int) -> dict[str, Tensor]:
    draws = Ensemble((seed,))
    x, teacher = draws.normal(config.samples, config.inputs)[0], draws.normal(2, config.inputs)[0]
    y = torch.tanh(x @ teacher.T) @ torch.tensor([[1.0, 0.5], [-1.0, 1.0]], dtype=torch.float64)

    def build(activation: nn.Module) -> list[Any]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return [nn.Linear(config.inputs, config.width).double(), activation, nn.Linear(config.width, 2).double()]

    def settle(model: nn.Module, plan: Dcs) -> Callable[[], Tensor]:
        plan.apply()
        optimizer = torch.optim.Adam(plan.param_groups(lr=config.eta))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)

        def loss() -> Tensor:
            return 0.5 * (model(x) - y).square().mean()

        for _ in range(config.steps):
            optimizer.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return loss

    model = nn.Sequential(*build(nn.Tanh()))
    found = {type(s.action).__name__: s for s in discrete_symmetries(trace(model, (x,)), [[x]], torch.Generator().manual_seed(seed))[0]}
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((x,), {})]
    signs = Mirror.of(found["Signs"], params)
    plan = constrain(model, signs, config.decay, inputs=inputs)
    loss = settle(model, plan)
    pull = plan.multipliers(loss)
    multiplier = torch.zeros(config.width, dtype=torch.float64).index_add(0, signs.groups, pull.square()).sqrt()
    residual = plan.residuals()
    try:
        constrain(nn.Sequential(*build(nn.GELU())), signs, config.decay, inputs=inputs)
        refused = 0.0
    except NotASymmetryError:
        refused = 1.0
    first, activation, last = build(nn.Tanh())
    other = nn.Sequential(first, activation, last)
    mirror = Mirror.merged(found["Permutations"], params, [0, 1, 2])
    apart = float(mirror.distances(params).max())
    plan = constrain(other, mirror, config.merge, inputs=inputs)
    settle(other, plan)
    plan.snap(1e-8)
    before = other(x).detach()
    plan.bake()
    vectors = torch.cat([p.detach() for p in (first.weight, first.bias[:, None], last.weight.T)], 1)[:3]
    merged = [(vectors - vectors[0]).abs().max(), vectors[0].norm(), (other(x) - before).detach().abs().max()]
    return {
        "residual": residual,
        "multiplier": multiplier,
        "merged": torch.tensor([*map(float, merged), refused, apart], dtype=torch.float64),
    }


# ------------------------------------------------------------------------------------------------ A3: rotation, nuclear norm


@dataclass(frozen=True)
class RotationConfig:
    """|U V - T|^2 / 2 + (decay / 2)(|U|^2 + |V|^2), T (size, size) ~ N(0, 1); gradient descent from U, V ~ N(0, start^2)."""

    size: int = 8
    decay: float = 1.5
    eta: float = 0.1
    steps: int = 20_000
    start: float = 0.3
    seeds: tuple[int, ...] = (0, 1, 2)


def factorise(config: RotationConfig, targets: Tensor, decays: Tensor) -> Tensor:
    """U V (settings, seeds, size, size) after gradient descent at each of the decays (settings,)."""
    both = config.start * Ensemble([seed + 1000 for seed in config.seeds]).normal(2, config.size, config.size)
    u, v = (both[:, i].expand(len(decays), -1, -1, -1) for i in (0, 1))
    keep = (1 - config.eta * decays)[:, None, None, None]
    for _ in range(config.steps):
        error = config.eta * (u @ v - targets)
        u, v = keep * u - error @ v.mT, keep * v - u.mT @ error
    return u @ v


def rotation(config: RotationConfig) -> Part:
    """A3, R3: weight decay on a product is a nuclear norm: singular values are thresholded and the rank falls."""
    targets = Ensemble(config.seeds).normal(config.size, config.size)
    solved, free = factorise(config, targets, torch.tensor([config.decay, 0.0], dtype=torch.float64))
    values = torch.linalg.svdvals(targets)
    predicted = (values - config.decay).clamp_min(0)
    measured = torch.linalg.svdvals(solved)
    nuclear, balanced, moved = _orbit_cost(targets)
    checks = (
        match("singular values of U V = (s - decay)_+", predicted, measured, 1e-10, source=f"{SLUG} A3"),
        match("rank of U V = #{s > decay}", (values > config.decay).sum(-1), (measured > 1e-6).sum(-1), 0.0, source=f"{SLUG} A3"),
        match(
            "cost (|U|^2 + |V|^2) / 2 of the balanced factors = nuclear norm (relative)",
            0.0,
            balanced / nuclear - 1,
            1e-13,
            source=f"{SLUG} R3",
        ),
        holds("cost of other points of the orbit / nuclear norm", moved / nuclear, at_least=1.0, source=f"{SLUG} R3"),
        control("no decay: rank of U V", (torch.linalg.svdvals(free) > 1e-6).sum(-1), at_least=float(config.size), source=f"{SLUG} A3"),
    )
    series = [
        {"name": f"seed {seed}", "predicted": plain(predicted[i]), "measured": plain(measured[i])} for i, seed in enumerate(config.seeds)
    ]
    figure = Figure("Singular values under decay", {"series": series, "x": "(s - decay)_+", "y": "measured"}, agreement)
    return Part(checks, (figure,))


def _orbit_cost(targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nuclear norm of each target, the cost of its balanced factors, and of those factors moved by a random invertible matrix."""
    left, values, right = torch.linalg.svd(targets)
    u, v = left * values.sqrt()[:, None, :], values.sqrt()[:, :, None] * right
    move = torch.linalg.matrix_exp(0.3 * Ensemble((0,)).normal(*targets.shape)[0])
    moved = (u @ move, torch.linalg.solve(move, v))

    def cost(pair: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (pair[0].square().sum((-2, -1)) + pair[1].square().sum((-2, -1)))

    return values.sum(-1), cost((u, v)), cost(moved)


# ------------------------------------------------------------------------------------------------ A4: neurons


@dataclass(frozen=True)
class NeuronsConfig:
    """f = sum_k v_k tanh(w_k x) fitting tanh(slope x), x = linspace(-2, 2, points); loss mean((f - y)^2) without 1/2, N(0, 1) start.

    ``decay`` is torch's: it adds decay theta to the gradient, (decay / 2) theta^2 to the loss.
    """

    width: int = 6
    slope: float = 1.5
    points: int = 50
    decay: float = 0.03
    eta: float = 0.1
    steps: int = 20_000
    zero: float = 1e-4
    seeds: tuple[int, ...] = (0, 1, 2)


def fit_neurons(config: NeuronsConfig, factors: Tensor, decays: Tensor) -> Tensor:
    """(settings, seeds, 2, width): w and v after gradient descent on factor * mean square + (decay / 2) theta^2."""
    x = torch.linspace(-2, 2, config.points, dtype=torch.float64)
    target = torch.tanh(config.slope * x)
    theta = Ensemble(config.seeds).normal(2, config.width).expand(len(factors), -1, -1, -1).clone()
    gain = (2 * factors / config.points)[:, None, None, None]
    keep = 1 - config.eta * decays[:, None, None, None]
    for _ in range(config.steps):
        hidden = torch.tanh(theta[:, :, 0, :, None] * x)
        error = gain * ((theta[:, :, 1, None, :] @ hidden) - target)
        steep = (error * x) * (1 - hidden * hidden)
        slope_in, slope_out = steep.sum(-1) * theta[:, :, 1], (hidden @ error.mT)[..., 0]
        theta = keep * theta - config.eta * torch.stack([slope_in, slope_out], dim=2)
    return theta


def one_neuron(config: NeuronsConfig) -> tuple[float, float]:
    """|w| and |v| of the best single neuron under the same loss and decay: the predicted survivor."""
    x = torch.linspace(-2, 2, config.points, dtype=torch.float64).numpy()

    def cost(theta: np.ndarray) -> float:
        error = theta[1] * np.tanh(theta[0] * x) - np.tanh(config.slope * x)
        return float(np.mean(error**2) + 0.5 * config.decay * np.sum(theta**2))

    best = minimize(cost, np.ones(2), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-14, "maxiter": 4000})
    return abs(float(best.x[0])), abs(float(best.x[1]))


def distinct(theta: Tensor, zero: float) -> tuple[Tensor, Tensor]:
    """Numbers of vanishing neurons and of distinct others (up to the sign of (w, v)), for theta (..., 2, width)."""
    size = theta.norm(dim=-2)
    signed = theta * torch.where(theta[..., :1, :] < 0, -1.0, 1.0)
    gap = (signed[..., :, None] - signed[..., None, :]).norm(dim=-3)
    width = theta.shape[-1]
    earlier = torch.ones(width, width, dtype=torch.bool).tril(-1)
    alive = size > zero
    copied = ((gap < 1e-2) & earlier & alive[..., None, :]).any(-1)
    return (~alive).sum(-1), (alive & ~copied).sum(-1)


def neurons(config: NeuronsConfig) -> Part:
    """A4: decay on the sign and permutation mirrors empties the layer down to one neuron; without it all stay distinct."""
    factors = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    decays = torch.tensor([config.decay, 0.0, config.decay], dtype=torch.float64)
    theta = fit_neurons(config, factors, decays)
    zeros, others = distinct(theta, config.zero)
    survivor = theta[0].abs().amax(-1)
    predicted = one_neuron(config)
    checks = (
        match("decay: vanishing neurons = width - 1", config.width - 1, zeros[0], 0.0, source=f"{SLUG} A4", spread=zeros[0].double()),
        match("decay: distinct active neurons", 1, others[0], 0.0, source=f"{SLUG} A4", spread=others[0].double()),
        match(
            "decay: |w|, |v| of the survivor = the best single neuron",
            predicted,
            survivor.mean(0),
            1e-4,
            source=f"{SLUG} A4",
            spread=survivor,
        ),
        control("no decay: distinct neurons", others[1], at_least=float(config.width), source=f"{SLUG} A4"),
        control(
            "with 1/2 in the loss the same decay leaves another structure: distinct active neurons",
            others[2],
            at_least=2,
            source=f"{SLUG} A4",
        ),
    )
    names = ("decay", "no decay", "decay, loss with 1/2")
    series = [
        {"name": name, "x": plain(theta[i, :, 0].flatten()), "y": plain(theta[i, :, 1].flatten()), "mark": "points"}
        for i, name in enumerate(names)
    ]
    return Part(checks, (Figure("Neurons after training", {"series": series, "x": "w", "y": "v"}, curves, "Every neuron of every seed."),))


# ------------------------------------------------------------------------------------------------ A5: noise and plasticity


def noise(config: MaximumConfig) -> Part:
    """A5, R2: gradient noise alone, no decay, collapses onto a mirror that is a maximum of the mean loss."""
    _, _, fraction = simulate_maximum(config)
    exponent = sgd_exponent(
        torch.tensor(config.curvatures, dtype=torch.float64)[None], torch.tensor(config.etas, dtype=torch.float64)[:, None]
    )
    checks = (
        holds(
            "mirror t -> -t, exponent < 0: collapsed fraction",
            fraction[:, exponent < 0],
            at_least=0.99,
            source=f"{SLUG} A5, R2",
            spread=fraction[:, exponent < 0],
        ),
        control(
            "mirror t -> -t, exponent > 0: collapsed fraction",
            fraction[:, exponent > 0],
            at_most=0.1,
            source=f"{SLUG} A5, R2",
            spread=fraction[:, exponent > 0],
        ),
    )
    return Part(checks)


@dataclass(frozen=True)
class PlasticityConfig:
    """A ReLU network on ``tasks`` tasks of permuted pixels and random labels over the same images; full-batch Adam, its state kept.

    The penalty is coefficient sum D (theta - theta0)^2 over weights and biases: D = 1, theta0 = 0 is decay; syre draws
    D ~ U(1, 1.1), theta0 ~ N(0, shift^2) once. ``data``: "digits" (8 x 8 digits of scikit-learn over 16) or "blobs"
    (8 x 8 sums of three bumps in [0, 1], drawn from the seed). float32.
    """

    data: str = "blobs"
    images: int = 400
    width: int = 64
    classes: int = 10
    tasks: int = 12
    steps: int = 250
    eta: float = 3e-3
    coefficient: float = 5e-3
    shift: float = 0.05
    spread: float = 0.1
    rank_above: float = 1e-2
    seeds: tuple[int, ...] = (0, 1, 2)


def images(config: PlasticityConfig, draws: Ensemble) -> Tensor:
    """(seeds, images, 64) pixels in [0, 1].

    Raises:
        MissingExtraError: the digits need scikit-learn.
    """
    if config.data == "digits":
        try:
            from sklearn.datasets import load_digits  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise MissingExtraError("the digits come with scikit-learn: pip install scikit-learn, or run with data='blobs'") from error
        pixels = torch.tensor(load_digits().data[: config.images] / 16, dtype=torch.float32)
        return pixels.expand(len(config.seeds), -1, -1)
    centre = 1 + 5 * draws.uniform(config.images, 3, 2, dtype=torch.float32)
    grid = torch.arange(8, dtype=torch.float32)
    across, down = (torch.exp(-0.7 * (grid - centre[..., axis, None]).square()) for axis in (0, 1))
    return torch.einsum("snki,snkj->snij", across, down).clamp(max=1).flatten(2)


def train_tasks(config: PlasticityConfig) -> dict[str, Tensor]:
    """Accuracy at the end of each task (tasks, methods, seeds); dead fraction and rank at the end (methods, seeds); decay, then syre."""
    draws, seeds = Ensemble(config.seeds), len(config.seeds)
    pixels = images(config, draws)
    sizes = [pixels.shape[-1], config.width, config.width, config.classes]
    start = [(2 * draws.uniform(a + 1, b, dtype=torch.float32) - 1) / a**0.5 for a, b in pairwise(sizes)]
    shifts = [torch.stack([torch.zeros_like(w), config.shift * draws.normal(*w.shape[1:], dtype=torch.float32)]) for w in start]
    metric = [torch.stack([torch.ones_like(w), 1 + config.spread * draws.uniform(*w.shape[1:], dtype=torch.float32)]) for w in start]
    weights = [torch.stack([w, w]).requires_grad_() for w in start]
    optimizer = torch.optim.Adam(weights, lr=config.eta)
    accuracy: list[Tensor] = []
    hidden: list[Tensor] = []
    for _ in range(config.tasks):
        order, labels = draws.permutation(pixels.shape[-1]), draws.integers(config.classes, config.images)
        x = pixels.gather(2, order[:, None, :].expand_as(pixels))
        for _ in range(config.steps):
            optimizer.zero_grad()
            logits, hidden = _network(weights, x)
            fit = (
                torch.nn.functional.cross_entropy(logits.flatten(0, 2), labels.expand(2, -1, -1).flatten(), reduction="sum") / config.images
            )
            pull = sum(((d * (w - s).square()).sum() for w, s, d in zip(weights, shifts, metric, strict=True)), torch.zeros(()))
            (fit + config.coefficient * pull).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        accuracy.append((logits.argmax(-1) == labels).float().mean(-1).detach())
    dead = torch.stack([(layer == 0).all(2).float().mean(-1) for layer in hidden]).mean(0)
    rank = (torch.linalg.svdvals(weights[1].detach()[:, :, :-1]) > config.rank_above).sum(-1)
    return {"accuracy": torch.stack(accuracy).reshape(-1, 2, seeds), "dead": dead, "rank": rank.double()}


def _network(weights: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits (2, seeds, n, classes) and the hidden layers; the last row of a weight is its bias."""
    hidden, value = [], x
    for index, weight in enumerate(weights):
        value = value @ weight[:, :, :-1] + weight[:, :, -1:]
        if index < len(weights) - 1:
            value = torch.relu(value)
            hidden.append(value)
    return value, hidden


def plasticity(config: PlasticityConfig) -> Part:
    """A5, R6: on collapsed mirrors no task brings a dimension back; decay towards a random point keeps units, rank and accuracy."""
    run = train_tasks(config)
    last = run["accuracy"][-1]
    checks = (
        holds("dead units, syre / decay", run["dead"][1] / run["dead"][0], at_most=0.5, source="syre A4", spread=run["dead"]),
        holds(
            "rank of the second weight, syre / decay",
            run["rank"][1] / run["rank"][0].clamp_min(1),
            at_least=3.0,
            source="syre A4",
            spread=run["rank"],
        ),
        holds("accuracy on the last task, syre - decay", last[1] - last[0], at_least=0.0, source="syre A4", spread=last),
        control(
            "decay loses plasticity: accuracy on the first task - on the last",
            run["accuracy"][0, 0] - last[0],
            at_least=0.05,
            source="syre A4",
        ),
    )
    x = list(range(1, config.tasks + 1))
    series = []
    for i, name in enumerate(("decay to zero", "decay to a random point")):
        values = run["accuracy"][:, i]
        series.append({"name": name, "x": x, "y": plain(values.mean(1)), "low": plain(values.amin(1)), "high": plain(values.amax(1))})
    figure = Figure(
        "Accuracy on task after task",
        {"series": series, "x": "task", "y": "train accuracy"},
        curves,
        "Band: smallest and largest of the seeds.",
    )
    labels = [f"{name}, seed {seed}" for name in ("decay", "syre") for seed in config.seeds]
    counts = {"labels": labels, "series": [{"name": "dead units", "y": plain(run["dead"].flatten())}], "y": "dead fraction"}
    return Part(checks, (figure, Figure("Dead units after the last task", counts, bars)))


# ------------------------------------------------------------------------------------------------ the entry


NOISE = MaximumConfig(etas=(0.4, 0.6), repelled=(0.4,), collapsing=(0.6,))


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    constraint: ConstraintConfig | None = ConstraintConfig()
    mirror: MirrorConfig | None = MirrorConfig()
    attraction: AttractionConfig | None = AttractionConfig()
    dictionary: DictionaryConfig | None = DictionaryConfig()
    discovered: DiscoveredConfig | None = DiscoveredConfig()
    rotation: RotationConfig | None = RotationConfig()
    neurons: NeuronsConfig | None = NeuronsConfig()
    noise: MaximumConfig | None = NOISE
    plasticity: PlasticityConfig | None = PlasticityConfig()


_EXPERIMENTS: Mapping[str, Callable[..., Part]] = {
    "constraint": constraint,
    "mirror": mirror,
    "attraction": attraction,
    "dictionary": dictionary,
    "discovered": discovered,
    "rotation": rotation,
    "neurons": neurons,
    "noise": noise,
    "plasticity": plasticity,
}

ENTRY = Entry(
    slug=SLUG,
    title="Symmetry Induces Structure and Constraint of Learning",
    paper="Liu Ziyin, ICML 2024, arXiv 2309.16932",
    claims=(
        "A mirror surface is stationary in its normal direction, decouples in the Hessian, and is the minimum under enough decay.",
        "Decay on a product acts like a non-smooth penalty: sparse, low-rank, duplicated solutions.",
        "Mirrors found in a network, imposed on it, empty or merge its units exactly as the multipliers say.",
        "A mirror put in on purpose (DCS) makes gradient descent meet a constraint exactly above a threshold that the multipliers give.",
        "Gradient noise alone collapses onto a mirror; what has collapsed no later task restores.",
    ),
    presets={
        "smoke": Config(
            mirror=MirrorConfig(points=20, samples=4, nodes=24),
            discovered=None,
            noise=replace(NOISE, chains=500, steps=3000),
            plasticity=None,
        ),
        "default": Config(),
        "full": Config(
            constraint=ConstraintConfig(steps=20_000, seeds=tuple(range(10))),
            mirror=MirrorConfig(points=1000, seeds=tuple(range(5))),
            dictionary=DictionaryConfig(samples=50, seeds=tuple(range(10))),
            rotation=RotationConfig(seeds=tuple(range(6))),
            neurons=NeuronsConfig(seeds=tuple(range(10))),
            noise=replace(NOISE, chains=8000, seeds=tuple(range(5))),
            plasticity=replace(PlasticityConfig(), data="digits", seeds=tuple(range(5))),
        ),
    },
    experiments=_EXPERIMENTS,
)
