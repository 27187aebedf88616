"""Phase diagrams: where papers of the gallery put a boundary in closed form, a run of every cell beside it.

A cell computes both sides on its own: the prediction from the paper's formula, the measurement from a simulation or a minimisation
that knows nothing of it. The number a quantity predicts is positive on one side of the boundary and negative on the other, zero on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from parasym.core.errors import InputError
from parasym.gallery.sweep import Quantity, Sweep, cell_seed
from parasym.simulate import SGD, Average, Ensemble, Increments, Momentum, descent, dot, quadratic, regression
from parasym.solvable.balance import Moments, sparsity_transition
from parasym.solvable.contract import number, positive
from parasym.solvable.joint_embedding import SSLQuartic
from parasym.solvable.latent import LinearLVM
from parasym.solvable.linear_nets import DeepLinear
from parasym.solvable.stationary import stability_limit, stationary_covariance

Cell = dict[str, dict[str, float]]
_ALIVE = 1e-3  # a mode whose weight is below this is dead: L-BFGS leaves 1e-6 or less of it


def _span(low: float, high: float, count: int) -> tuple[float, ...]:
    return tuple(np.linspace(low, high, count).tolist())


# ------------------------------------------------------------------------------------------------ law-of-balance


@dataclass(frozen=True)
class BalanceCell:
    """f = u w x, loss (f - y)^2, y = x + sigma eps, x, eps ~ N(0, 1); one fresh sample a step at T = eta = t T_c. Starts near zero at
    u = w = ``start`` and runs ``horizon`` times 1 / (4 eta E[xy]) steps, in which |u w| grows by e^horizon without noise."""

    t: float = 1.0
    sigma: float = 20.0
    start: float = 1e-6
    horizon: float = 10.0
    replicas: int = 1024
    seed: int = 0


def balance_cell(config: BalanceCell) -> Cell:
    """law-of-balance R8: log|u w| near 0 grows at 4 eta (E[xy] - T Var[xy]) a step, so that SGD stays at 0 above T_c."""
    positive(t=config.t, sigma=config.sigma, start=config.start, horizon=config.horizon)
    moments = Moments(a1=2.0, a2=2.0, a3=2 + config.sigma**2, b1=1.0, b2=1.0)
    eta = config.t * sparsity_transition(moments)[0]
    steps = max(1, round(config.horizon / (4 * eta * moments.b2)))

    def gradient(w, p, draws):  # type: ignore[no-untyped-def]
        x = draws.normal()
        slope = 2 * (w[0] * w[1] * x - (x + p.sigma * draws.normal())) * x
        return [slope * w[1], slope * w[0]]

    system = descent("u w x", gradient, SGD(), [config.start, config.start])
    run = Ensemble(system, config.replicas, {"lr": eta, "sigma": config.sigma}, cell_seed(config)).run(steps)
    grown = (run.final.abs().log().sum(-1) - 2 * math.log(config.start))[run.sound] / (4 * eta * moments.b2 * steps)
    seen = {"measured": float(grown.mean()), "stderr": float(grown.std() / max(len(grown), 1) ** 0.5)}
    return {"rate": {"predicted": 1 - config.t, **seen, "diverged": run.diverged}}


BALANCE = Sweep(
    title="does noise hold a two-layer net at zero",
    config=BalanceCell(),
    cell=balance_cell,
    quantities=(Quantity("rate", "growth of log|u w| near 0 over 4 eta E[xy] (below 0: SGD collapses); theory 1 - T/T_c", 0.0, 0.08),),
    axes={"t": _span(0.1, 2.0, 20), "sigma": tuple(np.geomspace(8.0, 80.0, 12).tolist())},
)


# ------------------------------------------------------------------------------------------------ posterior-collapse


@dataclass(frozen=True)
class CollapseCell:
    """A linear VAE on data of variances 4, 1 and .25, two latents: KL weight beta, decoder standard deviation sigma."""

    beta: float = 1.0
    sigma: float = 1.0
    restarts: int = 2
    seed: int = 0


def collapse_cell(config: CollapseCell) -> Cell:
    """posterior-collapse R2: mode i lives if and only if zeta_i^2 > beta sigma^2."""
    second = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64))
    model = LinearLVM(second, second, second, 2, beta=config.beta, decoder=config.sigma)
    seen = torch.linalg.svdvals(model.minimise(config.seed, config.restarts).best["U"]).tolist()
    return {
        name: {"predicted": math.log(4.0 ** (1 - k) / (config.beta * config.sigma**2)), "measured": math.log(max(value, 1e-12) / _ALIVE)}
        for k, (name, value) in enumerate(zip(("first", "second"), seen, strict=True))
    }


COLLAPSE = Sweep(
    title="which modes of a linear VAE collapse",
    config=CollapseCell(),
    cell=collapse_cell,
    quantities=(
        Quantity("first", "log of the decoder's first singular value over .001 (below 0: all is collapsed)", 0.0, 0.01),
        Quantity("second", "log of the decoder's second singular value over .001 (below 0: the second mode is dead)", 0.0, 0.01),
    ),
    axes={"beta": tuple(np.geomspace(0.1, 10.0, 12).tolist()), "sigma": tuple(np.geomspace(0.3, 3.0, 12).tolist())},
)


# ------------------------------------------------------------------------------------------- exact-phase-transitions, deep-linear-exact


@dataclass(frozen=True)
class DepthCell:
    """A linear net with ``hidden`` hidden layers of ``width``, L2 gamma on every layer, neuron noise of variance ``noise``;
    E[x x^T] = diag(2.2, 1, .5), E[x y] of length ``size`` along (.9, .5, -.4)."""

    gamma: float = 0.1
    size: float = 1.0
    noise: float = 0.0
    hidden: int = 2
    width: int = 4
    restarts: int = 6
    seed: int = 0


def depth_cell(config: DepthCell) -> Cell:
    """deep-linear-exact R5, R6 and exact-phase-transitions R4, R6: zero is the global minimum if and only if gamma >= gamma_c."""
    positive(gamma=config.gamma, size=config.size)
    if config.hidden < 1:
        raise InputError("a linear regressor has no transition: hidden must be at least 1")
    a = torch.diag(torch.tensor([2.2, 1.0, 0.5], dtype=torch.float64))
    e = torch.tensor([0.9, 0.5, -0.4], dtype=torch.float64)
    e = e * (config.size / float(e.norm()))
    power = float(e @ torch.linalg.solve(a, e)) + 0.5
    noise = (config.noise,) * config.hidden
    model = DeepLinear(a, e, power, (config.width,) * config.hidden, noise, config.gamma)
    best = model.minimise(config.seed, config.restarts)
    size = float(model.moments(best.best)[0].norm())
    critical = number(model.scale.critical_decay())
    return {"learned": {"predicted": math.log(critical / config.gamma), "measured": math.log(max(size, 1e-12) / _ALIVE)}}


_LEARNED = Quantity("learned", "log of |end-to-end map| over .001 at the lowest minimum found (below 0: nothing is learned)", 0.0, 0.01)
DEPTH = Sweep(
    title="does a net with two hidden layers learn anything",
    config=DepthCell(),
    cell=depth_cell,
    quantities=(_LEARNED,),
    axes={"gamma": tuple(np.geomspace(0.02, 2.0, 12).tolist()), "size": _span(0.2, 2.0, 12)},
)
DROPOUT = Sweep(
    title="does a net with dropout learn anything",
    config=DepthCell(width=2),
    cell=depth_cell,
    quantities=(_LEARNED,),
    axes={"gamma": _span(0.05, 0.5, 12), "noise": _span(0.0, 4.0, 12)},
)


# ------------------------------------------------------------------------------------------------ ssl-landscape


@dataclass(frozen=True)
class SSLCell:
    """InfoNCE to fourth order on a linear encoder: data variances 2, 1, .5, augmentation variances .5, 1, .3 along the same axes;
    weight decay ``decay``, weight ``align`` on the alignment term."""

    decay: float = 0.0
    align: float = 0.0
    restarts: int = 2
    seed: int = 0


def ssl_cell(config: SSLCell) -> Cell:
    """ssl-landscape R2: direction i is learned if and only if a_i > decay + align c_i."""
    a, c = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64), torch.tensor([0.5, 1.0, 0.3], dtype=torch.float64)
    model = SSLQuartic.infonce(torch.diag(a), torch.diag(c), 3, decay=config.decay, align=config.align)
    w = model.minimise(config.seed, config.restarts).best["W"]
    return {
        name: {
            "predicted": float(a[k] - config.decay - config.align * c[k]),
            "measured": math.log(max(float(w[:, k].norm()), 1e-12) / _ALIVE),
        }
        for k, name in enumerate(("first", "second", "third"))
    }


SSL = Sweep(
    title="which directions self-supervised learning keeps",
    config=SSLCell(),
    cell=ssl_cell,
    quantities=tuple(
        Quantity(name, f"log of the encoder's length along the {name} axis over .001 (below 0: collapsed)", 0.0, 0.01)
        for name in ("first", "second", "third")
    ),
    axes={"decay": _span(0.0, 2.4, 13), "align": _span(0.0, 3.0, 13)},
)


# ------------------------------------------------------------------------------------------------ finite-lr-noise


@dataclass(frozen=True)
class DivergenceCell:
    """Heavy ball on (w1^2 + .3 w2^2) / 2 with unit gradient noise: learning rate eta, momentum mu. A replica beyond ``far`` has left."""

    eta: float = 1.0
    momentum: float = 0.0
    far: float = 1e4
    replicas: int = 256
    steps: int = 2000
    seed: int = 0


def divergence_cell(config: DivergenceCell) -> Cell:
    """finite-lr-noise R4, R5: stable if and only if eta h_max < 2 (1 + mu); the variance of w1 where it is."""
    positive(eta=config.eta, far=config.far)
    h, eye = np.diag([1.0, 0.3]), np.eye(2)
    limit, exact = stability_limit(h, config.momentum), stationary_covariance(h, eye, config.eta, config.momentum)
    system = descent("heavy ball", quadratic(h, eye), Momentum(), [0.0, 0.0])
    params = {"lr": config.eta, "momentum": config.momentum}
    run = Ensemble(system, config.replicas, params, cell_seed(config)).run(
        config.steps, [Average(lambda s, p: [s[0] * s[0]])], burn=config.steps
    )
    left = float((~(run.final[:, :2].abs().amax(-1) < config.far)).double().mean())
    stable = run[0].ok and left == 0
    variance = {"measured": float(run[0].value[0]), "stderr": float(run[0].stderr[0])} if stable else {"measured": math.nan}
    variance["predicted"] = float(torch.as_tensor(exact.value)[0, 0]) if exact.ok else math.nan
    return {"stable": {"predicted": limit - config.eta, "measured": 0.5 - left, "diverged": run.diverged}, "variance": variance}


DIVERGENCE = Sweep(
    title="where heavy ball diverges, and how wide it is before",
    config=DivergenceCell(),
    cell=divergence_cell,
    quantities=(
        Quantity("stable", "1/2 - share of replicas that left (below 0: diverged)", 0.0, 0.02),
        Quantity("variance", "stationary variance along the steepest direction"),
    ),
    axes={"eta": _span(0.1, 4.5, 23), "momentum": _span(0.0, 0.95, 20)},
)


# ------------------------------------------------------------------------------------------------ minibatch-noise-strength


@dataclass(frozen=True)
class BatchCell:
    """Linear regression on fresh x ~ N(0, 1_dim) without noise on the labels: one step of SGD with batches of S from a unit vector."""

    eta: float = 0.5
    S: int = 4
    dim: int = 4
    replicas: int = 50_000
    seed: int = 0


def batch_cell(config: BatchCell) -> Cell:
    """minibatch-noise-strength R5: |w|^2 shrinks in the mean if and only if t < S, which for A = 1 is eta (S + dim + 1) < 2 S."""
    positive(eta=config.eta)
    if min(config.S, config.dim) < 1:
        raise InputError(f"a batch and a dimension are at least 1, not S = {config.S}, dim = {config.dim}")
    eta, size, d = config.eta, config.S, config.dim
    gradient = regression(np.eye(d), size, label_noise=False)
    system = descent("regression", gradient, SGD(), [1.0] + [0.0] * (d - 1))
    # the law has no preferred direction, so one step from any unit vector is the mean growth of every step; not worth a kernel for each S
    watch = Increments(lambda old, new, p: [dot(new, new)])
    run = Ensemble(system, config.replicas, {"lr": eta}, cell_seed(config), engine="torch").run(1, [watch])
    grown, error = float(run[0].value[0]), float(run[0].stderr[0])
    theory = eta * (2 - eta * (1 + (d + 1) / size))
    return {"shrinks": {"predicted": theory, "measured": 1 - grown, "stderr": error, "diverged": run.diverged}}


BATCH = Sweep(
    title="where the mean square of SGD on regression diverges",
    config=BatchCell(),
    cell=batch_cell,
    quantities=(Quantity("shrinks", "1 - E|w'|^2 / |w|^2 (below 0: the mean square diverges)", 0.0, 0.05),),
    axes={"eta": _span(0.05, 2.4, 24), "S": tuple(float(s) for s in range(1, 17))},
)
