"""Every update rule with every way of drawing a batch: moments of the weights after a few steps against all paths, one by one.

The data set is so small that every sequence of batches can be written down. The reference walks all of them with torch's own
optimisers (or, where torch has none, with the definition in numpy's words) and averages; a replica of the simulator walks one at random.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parasym.simulate import (
    SGD,
    Adam,
    Covariance,
    Ensemble,
    LaProp,
    Momentum,
    Preconditioned,
    descent,
    diffusion,
    quadratic,
    student,
    table_regression,
    two_layer,
)

NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not NUMBA, reason="numba is not installed: the compiled engine is not tested")
ENGINES = [pytest.param("lanes", marks=needs_numba), "torch"]
SIZE, BATCH, STEPS, REPLICAS = 5, 2, 3, 40_000
X = np.random.default_rng(0).normal(size=(SIZE, 2))
Y = np.random.default_rng(1).normal(size=SIZE)
START = [0.6, -0.4]
MATRIX = np.array([[0.3, 0.05], [0.02, 0.2]])
Path = Callable[[Callable[[Tensor, int], Tensor], Tensor], Tensor]


def by_torch(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Path:
    """Walk all paths (n, d) with a torch optimiser; all of them act entry by entry."""

    def walk(gradient: Callable[[Tensor, int], Tensor], start: Tensor) -> Tensor:
        w = start.clone().requires_grad_()
        optimizer = make([w])
        for t in range(STEPS):
            w.grad = gradient(w.detach(), t)
            optimizer.step()
        return w.detach()

    return walk


def by_hand(update: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Path:
    """Walk all paths with ``update(w, m, v, g, t)``, t from 1."""

    def walk(gradient: Callable[[Tensor, int], Tensor], start: Tensor) -> Tensor:
        w, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
        for t in range(STEPS):
            w, m, v = update(w, m, v, gradient(w, t), t + 1)
        return w

    return walk


def dampened(w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    m = 0.7 * m + 0.3 * g
    return w - 0.3 * m, m, v


def preconditioned(w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    m = 0.5 * m + g
    return w - m @ torch.from_numpy(MATRIX).T, m, v


def laprop(w: Tensor, m: Tensor, v: Tensor, g: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    v = 0.8 * v + 0.2 * g.square()
    m = 0.6 * m + 0.4 * g / ((v / (1 - 0.8**t)).sqrt() + 0.1)
    return w - 0.2 * m / (1 - 0.6**t), m, v


ADAPTIVE = {"lr": 0.2, "beta1": 0.6, "beta2": 0.8, "eps": 0.1}
RULES: dict[str, tuple[Any, dict[str, float], Path]] = {
    "sgd": (SGD(), {"lr": 0.3}, by_torch(lambda w: torch.optim.SGD(w, lr=0.3))),
    "momentum": (Momentum(), {"lr": 0.2, "momentum": 0.7}, by_torch(lambda w: torch.optim.SGD(w, lr=0.2, momentum=0.7))),
    "dampened": (Momentum(dampened=True), {"lr": 0.3, "momentum": 0.7}, by_hand(dampened)),
    "nesterov": (
        Momentum(nesterov=True),
        {"lr": 0.2, "momentum": 0.7},
        by_torch(lambda w: torch.optim.SGD(w, lr=0.2, momentum=0.7, nesterov=True)),
    ),
    "preconditioned": (Preconditioned(MATRIX), {"momentum": 0.5}, by_hand(preconditioned)),
    "adam": (Adam(), ADAPTIVE, by_torch(lambda w: torch.optim.Adam(w, lr=0.2, betas=(0.6, 0.8), eps=0.1))),
    "rmsprop": (
        Adam(corrected=False),
        ADAPTIVE | {"beta1": 0.0},
        by_torch(lambda w: torch.optim.RMSprop(w, lr=0.2, alpha=0.8, eps=0.1)),
    ),
    "amsgrad": (Adam(maximum=True), ADAPTIVE, by_torch(lambda w: torch.optim.Adam(w, lr=0.2, betas=(0.6, 0.8), eps=0.1, amsgrad=True))),
    "laprop": (LaProp(), ADAPTIVE, by_hand(laprop)),
}


def paths(sampling: str) -> Tensor:
    """All sequences of batches, (paths, steps, batch) row numbers, each as likely as any other."""
    if sampling == "epoch":
        per = SIZE // BATCH
        epochs = [list(itertools.permutations(range(SIZE), BATCH * min(per, STEPS - k))) for k in range(0, STEPS, per)]
        every: Any = [sum(orders, ()) for orders in itertools.product(*epochs)]
    else:
        batches = itertools.product(range(SIZE), repeat=BATCH) if sampling == "replacement" else itertools.combinations(range(SIZE), BATCH)
        every = list(itertools.product(batches, repeat=STEPS))
    return torch.tensor(every).reshape(-1, STEPS, BATCH)


def regression_paths(rows: Tensor, noise: Tensor | float = 0.0) -> Callable[[Tensor, int], Tensor]:
    """Gradient of each path at step t; ``noise`` (paths, steps, batch) is added to the labels."""
    x, y = torch.from_numpy(X)[rows], torch.from_numpy(Y)[rows] + noise
    return lambda w, t: (((x[:, t] * w[:, None]).sum(-1) - y[:, t])[..., None] * x[:, t]).mean(1)


def moments(w: Tensor) -> Tensor:
    """(n, 7) what is averaged: both weights, their squares and product, and their cubes."""
    a, b = w[:, 0], w[:, 1]
    return torch.stack([a, b, a * a, a * b, b * b, a**3, b**3], 1)


def gap(w: Tensor, expected: Tensor, extra: Tensor | float = 0.0) -> float:
    """Largest distance of the mean moments of replicas (n, 2) from the expected ones, in standard errors."""
    seen = moments(w)
    error = (seen.var(0) / len(seen) + extra).sqrt()
    return float(((seen.mean(0) - expected).abs() / (error + 1e-12)).max())


def simulated(rule: Any, params: dict[str, float], gradient: Any, engine: str, seed: int) -> Tensor:
    system = descent("few steps", gradient, rule, START)
    run = Ensemble(system, REPLICAS, params, seed, engine=engine, precision="float64").run(STEPS)  # type: ignore[arg-type]
    assert run.diverged == 0
    return run.final[:, :2]


def start(count: int) -> Tensor:
    return torch.tensor(START, dtype=torch.float64).expand(count, 2)


SAMPLINGS = ("replacement", "subset", "epoch")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_with_every_sampling_has_the_moments_of_all_its_paths(name: str, sampling: str) -> None:
    rule, params, walk = RULES[name]
    expected = {kind: moments(walk(regression_paths(rows), start(len(rows)))).mean(0) for kind in SAMPLINGS for rows in [paths(kind)]}
    w = simulated(rule, params, table_regression(X, Y, BATCH, sampling), "torch", 3)
    assert gap(w, expected[sampling]) < 5
    for other in set(SAMPLINGS) - {sampling}:  # negative control: the other ways of drawing are told apart
        assert gap(w, expected[other]) > 8, other
    for other in ("sgd", "adam"):  # and so are other rules
        if other != name:
            rows = paths(sampling)
            assert gap(w, moments(RULES[other][2](regression_paths(rows), start(len(rows)))).mean(0)) > 8, other


@needs_numba
@pytest.mark.parametrize(("name", "sampling"), [("momentum", "replacement"), ("laprop", "subset"), ("adam", "epoch")])
def test_the_lanes_have_them_too(name: str, sampling: str) -> None:
    rule, params, walk = RULES[name]
    rows = paths(sampling)
    w = simulated(rule, params, table_regression(X, Y, BATCH, sampling), "lanes", 4)
    assert gap(w, moments(walk(regression_paths(rows), start(len(rows)))).mean(0)) < 5


@pytest.mark.parametrize("name", RULES)
def test_every_rule_with_noise_on_the_labels(name: str) -> None:
    """The reference samples batches and noise with numpy's generator: two samples, one law."""
    rule, params, walk = RULES[name]
    draw = np.random.default_rng(7)
    rows = torch.from_numpy(draw.integers(SIZE, size=(10 * REPLICAS, STEPS, BATCH)))
    noise = torch.from_numpy(draw.normal(size=rows.shape))
    w = simulated(rule, params | {"sigma": 0.5}, table_regression(X, Y, BATCH, label_noise=True), "torch", 5)
    seen = moments(walk(regression_paths(rows, 0.5 * noise), start(len(rows))))
    assert gap(w, seen.mean(0), seen.var(0) / len(seen)) < 5
    quiet = moments(walk(regression_paths(rows), start(len(rows))))  # negative control: without the noise
    assert gap(w, quiet.mean(0), quiet.var(0) / len(quiet)) > 8


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_two_layer_net_has_the_moments_of_all_its_paths(sampling: str) -> None:
    x, y = torch.from_numpy(X[:, 0]), torch.from_numpy(Y)

    def gradient(rows: Tensor) -> Callable[[Tensor, int], Tensor]:
        def at(w: Tensor, t: int) -> Tensor:
            a, b = x[rows[:, t]], y[rows[:, t]]
            first = (((w[:, :1] * w[:, 1:]) * a - b) * a).mean(1)
            return torch.stack([first * w[:, 1], first * w[:, 0]], 1)

        return at

    walk = RULES["sgd"][2]
    w = simulated(SGD(), {"lr": 0.3}, two_layer(X[:, 0], Y, BATCH, sampling), "torch", 6)  # type: ignore[arg-type]
    for kind in SAMPLINGS:
        rows = paths(kind)
        distance = gap(w, moments(walk(gradient(rows), start(len(rows)))).mean(0))
        assert distance < 5 if kind == sampling else distance > 8, kind


@pytest.mark.parametrize("engine", ENGINES)
def test_student_noise_has_variance_one_and_its_kurtosis(engine: str) -> None:
    """One step of SGD from 0 is the noise itself: 10 degrees of freedom have the fourth moment 3 * 8 / 6 = 4, the normal 3."""
    system = descent("student", quadratic([[1.0]], [[1.0]], student(10)), SGD(), [0.0])
    z = Ensemble(system, 400_000, {"lr": 1.0}, seed=2, engine=engine).run(1).final[:, 0]  # type: ignore[arg-type]
    for power, exact in ((1, 0.0), (2, 1.0), (4, 4.0)):
        seen = z**power
        assert abs(float(seen.mean()) - exact) < 5 * float(seen.std()) / len(z) ** 0.5
    assert abs(float((z**4).mean()) - 3) > 5 * float((z**4).std()) / len(z) ** 0.5


@pytest.mark.parametrize("engine", ENGINES)
def test_euler_maruyama_has_the_stationary_covariance_of_its_own_steps(engine: str) -> None:
    """x' = x - k dt x + s sqrt(dt) z: variance s^2 dt / (1 - (1 - k dt)^2), not yet the s^2 / 2k of the limit."""
    k, s, dt = np.array([1.0, 2.0]), np.array([1.0, 0.5]), 0.2
    system = diffusion("ou", lambda x, p: [-k[0] * x[0], -k[1] * x[1]], lambda x, p: [s[0], s[1]], [0.0, 0.0])
    found = Ensemble(system, 4000, {"dt": dt}, engine=engine).run(150, [Covariance()], burn=60)[0]  # type: ignore[arg-type]
    exact = np.diag(s**2 * dt / (1 - (1 - k * dt) ** 2))
    error = np.abs(np.asarray(found.value) - exact) / np.asarray(found.stderr)
    assert found.status == "ok" and error.max() < 5
    assert (np.abs(np.asarray(found.value) - np.diag(s**2 / (2 * k))) / np.asarray(found.stderr)).max() > 8
