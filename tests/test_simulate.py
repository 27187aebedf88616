"""The simulator: random streams, elementary functions, both engines, rules and sampling against exact moments, observables."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov

from parasym.core.errors import InputError, MissingExtraError
from parasym.simulate import (
    SGD,
    Adam,
    Average,
    Covariance,
    Displacement,
    Ensemble,
    FirstPassage,
    Histogram,
    Increments,
    LaProp,
    Lyapunov,
    Momentum,
    Preconditioned,
    Snapshots,
    System,
    Table,
    TorchSystem,
    cos,
    descent,
    diffusion,
    diffusion_exponent,
    dot,
    exp,
    gradient,
    grid,
    kernel,
    log,
    quadratic,
    reference,
    regression,
    rng,
    sin,
    sqrt,
    student,
    table_regression,
    tanh,
    two_layer,
    where,
)
from parasym.simulate import ensemble as ensemble_module
from parasym.simulate.expr import Tape, evaluate
from parasym.simulate.system import trace, trace_start

NUMBA = importlib.util.find_spec("numba") is not None
needs_numba = pytest.mark.skipif(not NUMBA, reason="numba is not installed: the compiled engine is not tested")
ENGINES = [pytest.param("lanes", marks=needs_numba), "torch"]


def within(estimate, expected, errors: float = 5.0) -> bool:
    """Every entry within ``errors`` of its own standard errors."""
    assert estimate.status == "ok", estimate
    value, stderr = torch.as_tensor(estimate.value), torch.as_tensor(estimate.stderr)
    gap = (value - torch.as_tensor(expected, dtype=torch.float64)).abs()
    return bool((gap <= errors * stderr + 1e-12).all())


# ------------------------------------------------------------------------------------------------ random streams


def test_streams_depend_on_seed_and_replica_alone() -> None:
    few, many = rng.streams(3, np.arange(10)), rng.streams(3, np.arange(1000))
    assert (few == many[:, :10]).all()
    assert len({tuple(column) for column in many.T}) == 1000
    assert (rng.streams(4, np.arange(10)) != few).any(0).all()


def test_generator_follows_its_definition() -> None:
    # xoshiro128++ from state 1, 2, 3, 4, by hand with Python integers
    state = [1, 2, 3, 4]
    mask = 0xFFFFFFFF

    def turn(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    expected = []
    for _ in range(20):
        expected.append((turn((state[0] + state[3]) & mask, 7) + state[0]) & mask)
        shifted = (state[1] << 9) & mask
        state[2] ^= state[0]
        state[3] ^= state[1]
        state[1] ^= state[2]
        state[0] ^= state[3]
        state[2] ^= shifted
        state[3] = turn(state[3], 11)
    words = np.array([[1], [2], [3], [4]], np.uint32)
    assert [int(rng.next_words(words)[0]) for _ in range(20)] == expected


@pytest.mark.parametrize(("sizes", "words"), [([64] * 4, 1), ([64] * 6, 2), ([100] * 4, 2), ([1 << 20], 1), ([3] * 10, 1), ([3] * 11, 2)])
def test_row_numbers_share_words_only_while_nearly_exact(sizes: list[int], words: int) -> None:
    groups = rng.packed(sizes)
    assert len(groups) == words and [s for group in groups for s in group] == sizes


@needs_numba
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_moments_and_tails_of_a_hundred_million_normals(precision: str) -> None:
    replicas, steps = (65536, 1536) if precision == "float32" else (65536, 320)
    levels = (2.0, 3.0, 4.0, 5.0)

    def watch(old, new, p):
        z = new[0]
        return (
            z,
            z * z,
            z**3,
            z**4,
            new[1],
            new[1] * new[1],
            new[0] * new[1],
            z * z * new[1] * new[1],
            old[0] * z,
            *(where(abs(z) > v, 1.0, 0.0) for v in levels),
        )

    system = System("normals", lambda p, d: [0.0, 0.0], lambda s, p, d: d.normals(2))
    found = Ensemble(system, replicas, {}, seed=11, precision=precision, engine="lanes").run(steps, [Increments(watch)], burn=1)[0]  # type: ignore[arg-type]
    tails = [math.erfc(v / math.sqrt(2)) for v in levels]
    assert within(found, [0, 1, 0, 3, 0, 1, 0, 1, 0, *tails])
    assert replicas * steps * 2 >= (2e8 if precision == "float32" else 4e7)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_uniforms(engine: str, precision: str) -> None:
    system = System("uniforms", lambda p, d: [0.5], lambda s, p, d: [d.uniform()])
    found = Ensemble(system, 20000, {}, engine=engine, precision=precision).run(  # type: ignore[arg-type]
        100, [Increments(lambda old, new, p: (new[0], new[0] ** 2, new[0] ** 3, old[0] * new[0], -1.0 * log(new[0])))], burn=1
    )[0]
    assert within(found, [1 / 2, 1 / 3, 1 / 4, 1 / 4, 1])


# ------------------------------------------------------------------------------------------------ expressions


FUNCTIONS = {
    "log": (log, np.log, np.concatenate([np.geomspace(1e-38, 1e38, 4000), [0.0, -1.0, np.inf, np.nan, 1.0]])),
    "exp": (exp, np.exp, np.concatenate([np.linspace(-110, 95, 4000), [np.inf, -np.inf, np.nan, 0.0]])),
    "sin": (sin, np.sin, np.linspace(-300, 300, 5000)),
    "cos": (cos, np.cos, np.linspace(-300, 300, 5000)),
    "tanh": (tanh, np.tanh, np.concatenate([np.geomspace(1e-20, 60, 2000), -np.geomspace(1e-20, 60, 2000), [0.0, np.nan]])),
    "sqrt": (sqrt, np.sqrt, np.concatenate([np.geomspace(1e-30, 1e30, 500), [0.0, -1.0]])),
}


@needs_numba
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_elementary_functions_of_the_lanes(name: str, precision: str) -> None:
    ours, exact, points = FUNCTIONS[name]
    if precision == "float64" and name == "exp":
        points = np.concatenate([points, np.linspace(-760, 720, 3000)])
    kind = np.float64 if precision == "float64" else np.float32
    x = points.astype(kind)
    system = System(name, lambda p, d: [0.0, 0.0], lambda s, p, d: [s[0], ours(s[0])])
    program, _, _ = trace(system, 2, [])
    with np.errstate(all="ignore"):
        expected = exact(x.astype(np.float64)).astype(kind)
    engine = ensemble_module.LaneEngine(program, np.stack([x, np.zeros_like(x)]), rng.streams(0, np.arange(len(x))), {}, 1)
    engine.advance(1, 0, lambda done: None)
    found = engine.read()[0][1]
    finite = np.isfinite(expected)
    same = found[~finite] == expected[~finite]
    assert (same | (np.isnan(found[~finite]) & np.isnan(expected[~finite]))).all()
    scale = np.maximum(np.abs(expected[finite]), 1.0 if name in ("sin", "cos") else np.finfo(kind).tiny * 4)
    error = np.abs(found[finite].astype(np.float64) - expected[finite].astype(np.float64)) / scale
    assert error.max() < 6 * np.finfo(kind).eps, (points[finite][error.argmax()], error.max())


def random_expression(draw: np.random.Generator, symbols: list, depth: int):
    """A random piece of arithmetic on symbols, kept in the range where every function is smooth."""
    if depth == 0:
        return symbols[draw.integers(len(symbols))] if draw.random() < 0.8 else float(draw.normal())
    a, b = (random_expression(draw, symbols, depth - 1) for _ in range(2))
    if not hasattr(a, "tape"):
        a = symbols[0] + a
    kind = draw.integers(12)
    choices = [
        lambda: a + b,
        lambda: a - b,
        lambda: a * b,
        lambda: a / (2.0 + tanh(b) if hasattr(b, "tape") else 2.0),
        lambda: -a,
        lambda: abs(a),
        lambda: sqrt(abs(a) + 0.1),
        lambda: exp(tanh(a)),
        lambda: log(abs(a) + 0.5),
        lambda: sin(tanh(a) * 3.0) + cos(tanh(a) * 5.0),
        lambda: where((a < b) | ~(a <= 1.0), a, b),
        lambda: where((a >= 0.0) & (a > b), b - a, tanh(a)),
    ]
    return choices[kind]()


@needs_numba
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_programs_give_the_same_numbers_in_both_engines(seed: int) -> None:
    draw = np.random.default_rng(seed)
    size = 10
    shape = draw.integers(2**31)

    def step(s, p, d):
        symbols = [*s[:4], p.a, d.normal(), d.uniform()]
        here = np.random.default_rng(shape)
        return [random_expression(here, symbols, 3) for _ in range(size)]

    system = System("random", lambda p, d: [0.1 * k - 1.0 for k in range(size)], step)
    params = {"a": 0.7}
    run = Ensemble(system, 67, params, seed=9, precision="float64", engine="lanes").run(3)
    program, _, _ = trace(system, size, [])
    source = rng.LaneDraws(rng.streams(9, np.arange(67)), True)
    rows = [np.full(67, 0.1 * k - 1.0) for k in range(size)]
    for _ in range(3):
        rows = reference.step(program, rows, source, {"a": np.full(67, 0.7)})[0]
    expected = np.stack([np.broadcast_to(row, 67) for row in rows], axis=1)
    assert np.allclose(run.final.numpy(), expected, rtol=1e-8, atol=1e-8)


def test_gradient_is_that_of_torch() -> None:
    def value(a, b, lib):
        return lib.log(a * a + 1) * lib.tanh(b) / lib.sqrt(b + 3) - lib.exp(-1.0 * a) * lib.sin(a * b) + lib.cos(a) * abs(b - 1)

    class Ours:
        log, tanh, sqrt, exp, sin, cos = (staticmethod(f) for f in (log, tanh, sqrt, exp, sin, cos))

    tape = Tape()
    a, b = tape.symbol("state", 0), tape.symbol("state", 1)
    ours = gradient(value(a, b, Ours), [a, b])
    at = torch.tensor([0.7, 0.4], dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(value(at[0], at[1], torch), at)[0]
    found = evaluate(ours, lambda kind, key: float(at.detach()[key]))
    assert np.allclose(found, expected.numpy(), rtol=1e-13)


def test_a_step_may_not_branch_and_says_how_to() -> None:
    system = System("branch", lambda p, d: [0.0], lambda s, p, d: [s[0] if s[0] > 0 else 0.0])
    with pytest.raises(InputError, match="where"):
        Ensemble(system, 10, {}).run(1)


# ------------------------------------------------------------------------------------------------ the two engines agree


def adam_like(w, p, draws):
    return [w[0] * p.h + draws.normal(), w[1] + draws.uniform() - 0.5]


TABLE = np.random.default_rng(0).normal(size=(12, 3))
SYSTEMS = {
    "sgd": (descent("sgd", regression(np.diag([1.0, 0.5]), 3), SGD(), [0.5, -0.5]), {"lr": 0.1, "sigma": 0.3}),
    "momentum": (descent("m", quadratic(np.diag([1.0, 0.3]), np.eye(2)), Momentum(), [1.0, 1.0]), {"lr": 0.05, "momentum": 0.9}),
    "nesterov": (
        descent("n", quadratic(np.diag([1.0, 0.3]), np.eye(2)), Momentum(nesterov=True), [1.0, 1.0]),
        {"lr": 0.05, "momentum": 0.9},
    ),
    "preconditioned": (
        descent("p", quadratic([[1.0, 0.2], [0.2, 0.5]], np.eye(2)), Preconditioned([[0.1, 0.02], [0.0, 0.2]]), [1.0, 1.0]),
        {"momentum": 0.5},
    ),
    "adam": (descent("a", adam_like, Adam(), [1.0, 0.2]), {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "h": 1.0}),
    "amsgrad": (
        descent("a", adam_like, Adam(corrected=False, maximum=True), [1.0, 0.2]),
        {"lr": 0.01, "beta1": 0.0, "beta2": 0.9, "eps": 1e-3, "h": 1.0},
    ),
    "laprop": (descent("l", adam_like, LaProp(), [1.0, 0.2]), {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "h": 1.0}),
    "replacement": (descent("r", table_regression(TABLE[:, :2], TABLE[:, 2], 5), SGD(), [0.0, 0.0]), {"lr": 0.1}),
    "subset": (descent("s", table_regression(TABLE[:, :2], TABLE[:, 2], 5, "subset"), SGD(), [0.0, 0.0]), {"lr": 0.1}),
    "epoch": (descent("e", table_regression(TABLE[:, :2], TABLE[:, 2], 5, "epoch"), SGD(), [0.0, 0.0]), {"lr": 0.1}),
    "label noise": (
        descent("ln", table_regression(TABLE[:, :2], TABLE[:, 2], 3, label_noise=True), SGD(), [0.0, 0.0]),
        {"lr": 0.1, "sigma": 0.2},
    ),
    "two layer": (
        descent("t", two_layer([1.0, 0.5, -1.0], [0.4, 0.3, -0.6], 2), SGD(), lambda p, d: [0.3 + 0.1 * d.normal(), 0.3]),
        {"lr": 0.1},
    ),
    "student": (descent("st", quadratic([[1.0]], [[1.0]], student(5)), SGD(), [0.0]), {"lr": 0.2}),
    "diffusion": (diffusion("ou", lambda x, p: [-1.0 * x[0], -2.0 * x[1]], lambda x, p: [1.0, 0.5], [0.0, 0.0]), {"dt": 0.01}),
}


@needs_numba
@pytest.mark.parametrize("name", SYSTEMS)
def test_lanes_follow_the_reference_path_by_path(name: str) -> None:
    """On the lanes' own words, in double precision, the interpreter walks the same paths to rounding."""
    system, params = SYSTEMS[name]
    count, steps = 70, 30
    run = Ensemble(system, count, params, seed=5, precision="float64", engine="lanes").run(steps)
    first, draws, _ = trace_start(system)
    program, _, _ = trace(system, len(first), [])
    generators = rng.streams(5, np.arange(count))
    source = rng.LaneDraws(generators, True)
    values = {key: np.full(count, value) for key, value in params.items()}
    rows = [np.broadcast_to(np.asarray(v, float), count) for v in evaluate(first, reference.draw_inputs(draws, source, values))]
    sizes = [d.table.size for d in program.draws.row_draws if d.sampling == "epoch"]
    source.orders = np.tile(np.arange(sizes[0], dtype=np.int32)[:, None], (1, count)) if sizes else None
    for _ in range(steps):
        rows = reference.step(program, rows, source, values)[0]
    expected = np.stack([np.broadcast_to(row, count) for row in rows], axis=1)
    assert np.abs(run.final.numpy() - expected).max() < 1e-9 * max(1.0, np.abs(expected).max())


@needs_numba
@pytest.mark.parametrize("name", ["sgd", "epoch", "adam"])
def test_numbers_do_not_depend_on_threads_bit_for_bit(name: str) -> None:
    system, params = SYSTEMS[name]
    runs = [Ensemble(system, 5000, params, seed=1, threads=n, engine="lanes").run(200, [Covariance(), Lyapunov(1)]) for n in (1, 2, 5)]
    for other in runs[1:]:
        assert torch.equal(runs[0].final, other.final)
        assert torch.equal(runs[0][0].value, other[0].value) and torch.equal(runs[0][1].value, other[1].value)


@pytest.mark.parametrize("engine", ENGINES)
def test_same_seed_same_numbers_and_other_seed_other_numbers(engine: str) -> None:
    system, params = SYSTEMS["sgd"]
    runs = [Ensemble(system, 300, params, seed=seed, engine=engine).run(50) for seed in (7, 7, 8)]  # type: ignore[arg-type]
    assert torch.equal(runs[0].final, runs[1].final) and not torch.equal(runs[0].final, runs[2].final)


@needs_numba
def test_a_replica_does_not_depend_on_how_many_there_are() -> None:
    system, params = SYSTEMS["two layer"]
    few, many = (Ensemble(system, n, params, seed=2, engine="lanes").run(100).final for n in (10, 1000))
    assert torch.equal(few, many[:10])


# ------------------------------------------------------------------------------------------------ rules against exact moments


def linear_stationary(f: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Covariance of z' = F z + noise of covariance Q, by scipy."""
    return solve_discrete_lyapunov(f, q)


H = np.array([[1.0, 0.3], [0.3, 0.6]])
C = np.array([[1.0, -0.2], [-0.2, 0.4]])
LAM = np.array([[0.3, 0.05], [0.02, 0.5]])


def heavy_ball(lam: np.ndarray, mu: float, dampening: float = 0.0, nesterov: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Map and noise covariance of (w, m), written from the definition of each rule."""
    d, eye = len(H), np.eye(len(H))
    k = 1 - dampening
    if nesterov:
        f = np.block([[eye - lam @ H * (1 + mu * k), -(mu**2) * lam], [k * H, mu * eye]])
        b = np.vstack([-lam * (1 + mu * k), k * eye])
    else:
        f = np.block([[eye - k * lam @ H, -mu * lam], [k * H, mu * eye]])
        b = np.vstack([-k * lam, k * eye])
    assert f.shape == (2 * d, 2 * d)
    return f, b @ C @ b.T


RULES = {
    "sgd": (SGD(), {"lr": 0.4}, (np.eye(2) - 0.4 * H, 0.16 * C)),
    "momentum": (Momentum(), {"lr": 0.2, "momentum": 0.7}, heavy_ball(0.2 * np.eye(2), 0.7)),
    "dampened": (Momentum(dampened=True), {"lr": 0.4, "momentum": 0.7}, heavy_ball(0.4 * np.eye(2), 0.7, dampening=0.7)),
    "nesterov": (Momentum(nesterov=True), {"lr": 0.2, "momentum": 0.7}, heavy_ball(0.2 * np.eye(2), 0.7, nesterov=True)),
    "preconditioned": (Preconditioned(LAM), {"momentum": 0.5}, heavy_ball(LAM, 0.5)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RULES)
def test_stationary_covariance_of_every_linear_rule(name: str, engine: str) -> None:
    rule, params, (f, q) = RULES[name]
    system = descent(name, quadratic(H, C), rule, [0.0, 0.0])
    replicas, steps = (20000, 300) if engine == "lanes" else (4000, 100)
    found = Ensemble(system, replicas, params, seed=3, engine=engine).run(steps, [Covariance(), Average()], burn=100)  # type: ignore[arg-type]
    assert within(found[0], linear_stationary(f, q)) and within(found[1], np.zeros(len(f)))
    if name != "sgd":  # negative control: plain SGD's law is told apart
        plain = linear_stationary(np.eye(2) - 0.4 * H, 0.16 * C)
        gap = (torch.as_tensor(found[0].value)[:2, :2] - torch.from_numpy(plain)).abs() / torch.as_tensor(found[0].stderr)[:2, :2]
        assert float(gap.max()) > 8


def adam_by_torch(cls, seed: int, **options) -> tuple[torch.Tensor, list[float]]:
    """Weights and gradients of a run of a torch optimiser on w^2/2 with known noise."""
    w = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = cls([w], **options)
    noise = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for z in noise:
        w.grad = (w.detach() + z).clone()
        optimizer.step()
    return w.detach(), noise.tolist()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("rule", "cls", "options"),
    [
        (Adam(), torch.optim.Adam, {"betas": (0.9, 0.99), "eps": 1e-8}),
        (Adam(corrected=False), torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-8}),
        (Momentum(), torch.optim.SGD, {"momentum": 0.8}),
        (Momentum(dampened=True), torch.optim.SGD, {"momentum": 0.8, "dampening": 0.8}),
        (Momentum(nesterov=True), torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    ],
)
def test_rules_are_those_of_torch(engine: str, rule, cls, options) -> None:
    """Fed the noise of a torch run, the weights agree to rounding."""
    final, noise = adam_by_torch(cls, 0, lr=0.03, **options)
    params = {"lr": 0.03}
    if isinstance(rule, Adam):
        betas = options.get("betas", (0.0, options.get("alpha")))
        params |= {"beta1": betas[0], "beta2": betas[1], "eps": options["eps"]}
    else:
        params |= {"momentum": 0.8}
    system = descent("one", lambda s, p, d: [s[0] + p.z], rule, [1.0])
    w = None
    for k, z in enumerate(noise):
        w = Ensemble(system, 1, params | {"z": z}, precision="float64", engine=engine).run(1, start=w).final  # type: ignore[arg-type]
        if k == 0 and isinstance(rule, Momentum) and rule.dampened:  # torch starts the buffer at the first gradient, undampened
            w = torch.tensor([[1.0 - 0.03 * (1.0 + z), 1.0 + z]], dtype=torch.float64)
    assert w is not None and abs(float(w[0, 0]) - float(final)) < 1e-12


def test_laprop_is_its_definition() -> None:
    beta1, beta2, lr, eps = 0.8, 0.95, 0.05, 1e-6
    noise = np.random.default_rng(0).normal(size=30)
    w, m, v = 1.0, 0.0, 0.0
    state = None
    for t, z in enumerate(noise, 1):
        g = w + z
        v = beta2 * v + (1 - beta2) * g * g
        m = beta1 * m + (1 - beta1) * g / (math.sqrt(v / (1 - beta2**t)) + eps)
        w -= lr * m / (1 - beta1**t)
        system = descent("one", lambda s, p, d: [s[0] + p.z], LaProp(), [1.0])
        params = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "z": z}
        state = Ensemble(system, 1, params, precision="float64", engine="torch").run(1, start=state).final
    assert state is not None and abs(float(state[0, 0]) - w) < 1e-13


@pytest.mark.parametrize("engine", ENGINES)
def test_adam_and_laprop_first_step_moments(engine: str) -> None:
    """One corrected step is lr sign(g) exactly, whatever the gradient: E|dw| = lr, E dw = -lr E sign."""
    for rule in (Adam(), LaProp()):
        system = descent("first", lambda s, p, d: [0.5 + d.normal()], rule, [0.0])
        run = Ensemble(system, 20000, {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-12}, engine=engine).run(1)  # type: ignore[arg-type]
        moved = run.final[:, 0]
        assert torch.allclose(moved.abs(), torch.full_like(moved, 0.1), rtol=1e-5)
        expected = -0.1 * math.erf(0.5 / math.sqrt(2))
        assert abs(float(moved.mean()) - expected) < 5 * 0.1 / math.sqrt(20000)


def second_step(name: str, g: np.ndarray, b1: float, b2: float) -> np.ndarray:
    """The second step, at learning rate 1, for gradients g (2, n): each rule from its definition, without eps."""
    v1 = (1 - b2) * g[0] ** 2
    v2 = b2 * v1 + (1 - b2) * g[1] ** 2
    m2 = b1 * (1 - b1) * g[0] + (1 - b1) * g[1]
    if name == "adam":
        return m2 / (1 - b1**2) / np.sqrt(v2 / (1 - b2**2))
    if name == "rmsprop":
        return g[1] / np.sqrt(v2)
    if name == "amsgrad":
        return g[1] / np.sqrt(np.maximum(v1, v2))
    return (b1 * (1 - b1) * np.sign(g[0]) + (1 - b1) * g[1] / np.sqrt(v2 / (1 - b2**2))) / (1 - b1**2)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "rule", "b1"),
    [
        ("adam", Adam(), 0.6),
        ("rmsprop", Adam(corrected=False), 0.0),
        ("amsgrad", Adam(corrected=False, maximum=True), 0.0),
        ("laprop", LaProp(), 0.6),
    ],
)
def test_moments_of_every_adaptive_rule(engine: str, name: str, rule, b1: float) -> None:
    """On pure noise the second step depends only on the angle of the two gradients: its moments by integration."""
    angle = (np.arange(400_000) + 0.5) / 400_000 * 2 * np.pi
    exact = second_step(name, np.stack([np.cos(angle), np.sin(angle)]), b1, 0.5)
    system = descent("noise", lambda w, p, d: [d.normal()], rule, [0.0])
    params = {"lr": 1.0, "beta1": b1, "beta2": 0.5, "eps": 1e-12}
    watch = Increments(lambda old, new, p: [abs(new[0] - old[0]), (new[0] - old[0]) ** 2, (new[0] - old[0]) ** 4])
    found = Ensemble(system, 100_000, params, seed=6, engine=engine, precision="float64").run(1, [watch], burn=1)[0]  # type: ignore[arg-type]
    assert within(found, [np.abs(exact).mean(), (exact**2).mean(), (exact**4).mean()])
    others = [n for n in ("adam", "rmsprop", "amsgrad", "laprop") if n != name]
    for other in others:  # negative control: no other rule fits
        wrong = second_step(other, np.stack([np.cos(angle), np.sin(angle)]), 0.6, 0.5)
        assert not within(found, [np.abs(wrong).mean(), (wrong**2).mean(), (wrong**4).mean()])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("sampling", ["replacement", "subset", "epoch"])
def test_batch_mean_moments_of_every_sampling(engine: str, sampling: str) -> None:
    """Mean and variance of a batch mean; over an epoch the batch means add up exactly."""
    values = np.random.default_rng(1).exponential(size=12)
    size, batch = len(values), 4
    table = Table(values)

    def step(s, p, draws):
        mean = dot([1.0 / batch] * batch, [row[0] for row in draws.rows(table, batch, sampling)])
        return [mean, s[0]]

    system = System("batch", lambda p, d: [0.0, 0.0], step)
    observe = [Increments(lambda old, new, p: (new[0], new[0] ** 2, new[0] * old[0]))]
    # an even number of epochs, so that every place in an epoch is seen equally often
    found = Ensemble(system, 20000, {}, engine=engine, seed=4, precision="float64").run(60, observe, burn=3)[0]  # type: ignore[arg-type]
    mean, spread = values.mean(), values.var()
    factor = 1.0 if sampling == "replacement" else (size - batch) / (size - 1)
    variance = spread / batch * factor
    # two batches of one epoch are disjoint: Cov = -spread / (size - 1); two of three neighbours share an epoch
    neighbours = -(2 / 3) * spread / (size - 1) if sampling == "epoch" else 0.0
    assert within(found, [mean, mean**2 + variance, mean**2 + neighbours])
    wrong = spread / batch * (1.0 if sampling != "replacement" else (size - batch) / (size - 1))
    gap = abs(float(found.value[1]) - mean**2 - wrong) / float(found.stderr[1])
    assert gap > 8  # negative control: the other sampling's variance is told apart


@pytest.mark.parametrize("engine", ENGINES)
def test_every_epoch_uses_every_row_once(engine: str) -> None:
    table = Table(2.0 ** np.arange(12))

    def step(s, p, draws):
        return [s[0] + dot([1.0] * 4, [row[0] for row in draws.rows(table, 4, "epoch")])]

    run = Ensemble(System("sum", lambda p, d: [0.0], step), 200, {}, engine=engine, precision="float64").run(30)  # type: ignore[arg-type]
    assert (run.final == 10 * (2.0**12 - 1)).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_subsets_are_distinct_and_uniform(engine: str) -> None:
    table = Table(np.arange(5.0))

    def step(s, p, draws):
        a, b, c = (row[0] for row in draws.rows(table, 3, "subset"))
        same = where((abs(a - b) < 0.5) | (abs(b - c) < 0.5) | (abs(a - c) < 0.5), 1.0, 0.0)
        return [
            same,
            *(where(abs(a - k) < 0.5, 1.0, 0.0) + where(abs(b - k) < 0.5, 1.0, 0.0) + where(abs(c - k) < 0.5, 1.0, 0.0) for k in range(5)),
        ]

    found = Ensemble(System("subset", lambda p, d: [0.0] * 6, step), 20000, {}, engine=engine).run(20, [Average()])[0]  # type: ignore[arg-type]
    assert float(found.value[0]) == 0.0 and within(found, [0.0, *([0.6] * 5)])


# ------------------------------------------------------------------------------------------------ observables


@pytest.mark.parametrize("engine", ENGINES)
def test_label_noise_regression_has_its_exact_covariance(engine: str) -> None:
    """Sigma_i = (lr/S)(T + s^2)/(2 - lr h_i (1 + 1/S)), T = s^2 K/(1-K) (_solvable-models section 3)."""
    lr, batch, s2, h = 0.3, 2, 0.25, np.array([1.0, 0.5, 0.2])
    g = 2 - lr * h * (1 + 1 / batch)
    k = lr / batch * (h / g).sum()
    exact = np.diag(lr / batch * s2 / (1 - k) / g)
    system = descent("labels", regression(np.diag(h), batch), SGD(), [0.0] * 3)
    replicas, steps = (20000, 400) if engine == "lanes" else (3000, 150)
    found = Ensemble(system, replicas, {"lr": lr, "sigma": 0.5}, engine=engine).run(steps, [Covariance()], burn=300)[0]  # type: ignore[arg-type]
    assert within(found, exact)
    continuous = np.diag(np.full(3, lr * s2 / (2 * batch)))
    assert not within(found, continuous)  # negative control


@pytest.mark.parametrize("engine", ENGINES)
def test_grid_runs_every_point_at_its_own_parameters(engine: str) -> None:
    points = grid(lr=[0.1, 0.5], sigma=[1.0, 2.0])
    system = System("ar", lambda p, d: [0.0], lambda s, p, d: [s[0] - p.lr * s[0] + p.sigma * d.normal()])
    found = Ensemble(system, 5000, points, engine=engine).run(100, [Covariance(), Snapshots([100], lambda s, p: [s[0] ** 2])], burn=60)  # type: ignore[arg-type]
    exact = torch.tensor([s**2 / (1 - (1 - lr) ** 2) for lr, s in zip(points["lr"], points["sigma"], strict=True)], dtype=torch.float64)
    assert within(found[0], exact[:, None, None]) and within(found[1], exact[:, None, None])
    assert found.final.shape == (4, 5000, 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_lyapunov_spectrum_of_a_constant_matrix_is_its_eigenvalues(engine: str) -> None:
    m = np.array([[0.9, 0.4, 0.1], [0.0, 0.7, 0.3], [0.0, 0.0, -0.2]])
    system = System("matrix", lambda p, d: [1.0, 1.0, 1.0], lambda s, p, d: [dot([float(x) for x in row], s) for row in m])
    found = Ensemble(system, 3, {}, engine=engine).run(600, [Lyapunov(3)], burn=100)[0]  # type: ignore[arg-type]
    assert np.allclose(found.value.numpy(), np.log([0.9, 0.7, 0.2]), atol=2e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_lyapunov_exponents_sum_to_the_log_determinant(engine: str) -> None:
    """Rank-one factors 1 - lr x x^T: sum of exponents = E log|1 - lr |x|^2|, here by quadrature over chi-square."""
    from scipy.integrate import quad
    from scipy.stats import chi2

    lr, d = 0.3, 4
    exact = sum(quad(lambda s: chi2.pdf(s, d) * math.log(abs(1 - lr * s)), a, b, limit=400)[0] for a, b in ((0, 1 / lr), (1 / lr, 200)))

    def step(s, p, draws):
        x = draws.normals(d)
        along = dot(x, s)
        return [a - p.lr * along * b for a, b in zip(s, x, strict=True)]

    system = System("rank one", lambda p, draws: [1.0] * d, step)
    replicas = 4096 if engine == "lanes" else 200
    per_replica = Ensemble(system, replicas, {"lr": lr}, engine=engine).run(500, [Lyapunov(d)], burn=50)[0]  # type: ignore[arg-type]
    value, error = per_replica.value, per_replica.stderr
    assert abs(float(value.sum()) - exact) < 5 * float(error.sum())
    assert bool((value[:-1] > value[1:]).all()) and float(error.max()) < 0.02


@needs_numba
def test_products_of_a_million_steps_neither_under_nor_overflow() -> None:
    system = System("growth", lambda p, d: [1.0], lambda s, p, d: [s[0] * (p.a + 0.0 * d.normal())])
    for a in (0.5, 2.0):
        run = Ensemble(system, 64, {"a": a}, engine="lanes").run(1_000_000, [Lyapunov(1)], start=[0.0])
        assert run.diverged == 0 and abs(float(run[0].value[0]) - math.log(a)) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_first_passage_of_a_random_walk(engine: str) -> None:
    """Steps of +-1 from 0 leave (-n, n) after n^2 steps on average."""

    def step(s, p, draws):
        return [s[0] + where(draws.uniform() < 0.5, 1.0, -1.0)]

    system = System("walk", lambda p, d: [0.0], step)
    run = Ensemble(system, 4000, {"n": [3.0, 6.0]}, engine=engine).run(2000, [FirstPassage(lambda s, p: abs(s[0]) > p.n - 0.5)])  # type: ignore[arg-type]
    assert within(run[0].mean, [9.0, 36.0])
    assert bool(run[0].out.all()) and torch.equal(
        run.final.abs()[..., 0], torch.tensor([3.0, 6.0], dtype=torch.float64)[:, None].expand(2, 4000)
    )
    short = Ensemble(system, 4000, {"n": 6.0}, engine=engine).run(30, [FirstPassage(lambda s, p: abs(s[0]) > p.n - 0.5)])  # type: ignore[arg-type]
    mean = short[0].mean
    assert int(mean.details["passed"] + mean.details["censored"]) == 4000 and int(mean.details["censored"]) > 0
    none = Ensemble(system, 100, {"n": 60.0}, engine=engine).run(30, [FirstPassage(lambda s, p: abs(s[0]) > p.n)])[0].mean  # type: ignore[arg-type]
    assert none.status == "not_converged" and "no replica passed" in none.note


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_stops_during_burn_in(engine: str) -> None:
    """A clock that has passed the level before recording starts is out after one step, and has run all of the burn-in."""
    clock = System("clock", lambda p, d: [0.0], lambda s, p, d: [s[0] + 1.0])
    run = Ensemble(clock, 10, {}, engine=engine).run(100, [FirstPassage(lambda s, p: s[0] > 50.0)], burn=70)  # type: ignore[arg-type]
    assert (run[0].times == 1).all() and (run.final == 71).all()
    run = Ensemble(clock, 10, {}, engine=engine).run(100, [FirstPassage(lambda s, p: s[0] > 50.0)], burn=20)  # type: ignore[arg-type]
    assert (run[0].times == 31).all() and (run.final == 51).all()


@needs_numba
def test_letting_go_of_finished_replicas_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    system = System("walk", lambda p, d: [0.0], lambda s, p, d: [s[0] + d.normal()])
    observe = [FirstPassage(lambda s, p: abs(s[0]) > p.n), Average(lambda s, p: [s[0] ** 2])]
    packed = Ensemble(system, 1000, {"n": 8.0}, engine="lanes").run(3000, observe)
    write = ensemble_module.LaneEngine.write
    monkeypatch.setattr(
        ensemble_module.LaneEngine, "write", lambda self, rows, keep: write(self, rows, None if keep is None else keep | True)
    )
    monkeypatch.setattr(ensemble_module._Recorder, "_compact", lambda self, done, lost: False)
    whole = Ensemble(system, 1000, {"n": 8.0}, engine="lanes").run(3000, observe)
    assert packed.updates < 0.6 * whole.updates
    assert torch.equal(packed[0].times, whole[0].times) and torch.equal(packed.final, whole.final)
    assert torch.equal(packed[1].value, whole[1].value)


@pytest.mark.parametrize("engine", ENGINES)
def test_displacement_and_diffusion_exponent(engine: str) -> None:
    lags = [1, 2, 4, 8, 16, 32, 64]
    walk = System("walk", lambda p, d: [0.0, 0.0], lambda s, p, d: [s[0] + d.normal(), s[1] + 2.0 * d.normal()])
    run = Ensemble(walk, 8000, {}, engine=engine).run(64, [Displacement(lags)], burn=5)  # type: ignore[arg-type]
    assert within(run[0], [5.0 * k for k in lags])
    assert abs(float(diffusion_exponent(run[0], lags).value) - 1) < 0.03
    straight = System("line", lambda p, d: [d.normal(), 0.0], lambda s, p, d: [s[0], s[1] + s[0]])
    ballistic = Ensemble(straight, 500, {}, engine=engine).run(64, [Displacement(lags)])[0]  # type: ignore[arg-type]
    assert abs(float(diffusion_exponent(ballistic, lags).value) - 2) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_histogram_counts_everything_once(engine: str) -> None:
    system = System("normal", lambda p, d: [0.0], lambda s, p, d: [d.normal()])
    counts = Ensemble(system, 50000, {}, engine=engine).run(20, [Histogram([-1.0, 0.0, 2.0], [10, 20])])[0]  # type: ignore[arg-type]
    from scipy.stats import norm

    assert int(counts.total) == 100000 and int(counts.diverged) == 0
    for seen, probability in zip(
        [int(counts.below), *counts.counts.tolist(), int(counts.above)], np.diff([0, norm.cdf(-1), 0.5, norm.cdf(2), 1]), strict=True
    ):
        assert abs(seen - 1e5 * probability) < 5 * math.sqrt(1e5 * probability)


@needs_numba
def test_bridge_finds_the_crossings_between_steps() -> None:
    """Brownian motion from 0 leaves (-1, 1) after 1 on average; a watch every dt alone is late by about .58 sqrt(dt) in the level."""
    dt = 0.02
    plain = diffusion("bm", lambda x, p: [0.0], lambda x, p: [1.0], [0.0])
    bridged = diffusion("bm", lambda x, p: [0.0], lambda x, p: [1.0], [0.0], bridge=lambda x, p: 1.0 - x[0] * x[0])
    late = Ensemble(plain, 40000, {"dt": dt}).run(2000, [FirstPassage(lambda s, p: abs(s[0]) >= 1.0)])[0].mean
    exact = Ensemble(bridged, 40000, {"dt": dt}).run(2000, [FirstPassage(lambda s, p: s[1] > 0.5)])[0].mean
    assert float(late.value) * dt > 1.12
    assert abs(float(exact.value) * dt - 1) < 0.03


def test_a_torch_step_of_a_large_state_has_its_exact_covariance() -> None:
    """d = 40, beyond what one writes by hand: same observables, freezing and bad-input messages as a symbolic step."""
    d = 40
    h = torch.linspace(0.2, 1.0, d, dtype=torch.float64)

    def step(w: torch.Tensor, p, generator: torch.Generator) -> torch.Tensor:
        return w - p["lr"][:, None] * (h * w + torch.randn(w.shape, generator=generator, dtype=w.dtype))

    system = TorchSystem("many", d, lambda generator, n: torch.zeros(n, d, dtype=torch.float64), step, ("lr",))
    lr = 0.5
    ensemble = Ensemble(system, 2000, {"lr": lr}, precision="float64")
    run = ensemble.run(40, [Average(lambda s, p: [x * x for x in s]), FirstPassage(lambda s, p: s[0] > 50.0)], burn=60)
    assert run.engine == "torch" and within(run[0], lr / (h * (2 - lr * h)), 5.5)
    assert not bool(run[1].out.any())
    assert torch.equal(run.final, ensemble.run(40, burn=60).final)
    with pytest.raises(InputError, match="symbolic derivative"):
        ensemble.run(5, [Lyapunov(1)])
    with pytest.raises(InputError, match="engine='torch'"):
        Ensemble(system, 10, {"lr": 0.1}, engine="lanes", precision="float64").run(2)
    wrong = TorchSystem("wrong", d, system.start, lambda w, p, g: w[:, :3])
    with pytest.raises(InputError, match="expected"):
        Ensemble(wrong, 10, {}, precision="float64").run(2)


# ------------------------------------------------------------------------------------------------ divergence and bad input


@pytest.mark.parametrize("engine", ENGINES)
def test_diverged_replicas_are_counted_and_never_averaged_in_silence(engine: str) -> None:
    system = System("cubic", lambda p, d: [d.normal()], lambda s, p, d: [s[0] - p.lr * s[0] ** 3])
    observe = [Average(), Snapshots([0, 200]), Histogram([-2.0, 2.0], [200]), Displacement([1, 2, 200])]
    run = Ensemble(system, 2000, {"lr": 1.0}, engine=engine).run(200, observe)  # type: ignore[arg-type]
    # x' = x (1 - x^2) escapes from |x0| > sqrt 2
    expected = 2000 * math.erfc(1.0)
    assert abs(run.diverged - expected) < 5 * math.sqrt(expected)
    assert run[0].status == "not_converged" and f"{run.diverged} of 2000" in run[0].note
    assert run[1].status == run[3].status == "not_converged" and f"{run.diverged} of 2000" in run[3].note
    assert int(run[2].diverged) == run.diverged and int(run[2].total) == 2000
    assert run.to_dict()["diverged"] == run.diverged
    with pytest.raises(InputError):
        float(run[0])
    safe = Ensemble(system, 2000, {"lr": 1.0}, engine=engine).run(200, [Average()], start=[0.5])  # type: ignore[arg-type]
    assert safe.diverged == 0 and safe[0].status == "ok"


@pytest.mark.parametrize("engine", ENGINES)
def test_unstable_learning_rate_is_reported(engine: str) -> None:
    system = descent("q", quadratic([[1.0]], [[1.0]]), SGD(), [0.0])
    run = Ensemble(system, 100, {"lr": [0.5, 2.5]}, engine=engine).run(2000, [Covariance()])  # type: ignore[arg-type]
    assert run.sound.sum(1).tolist() == [100, 0] and run[0].status == "not_converged"


def test_a_zero_factor_is_minus_infinity_and_not_a_number_in_disguise() -> None:
    system = System("zero", lambda p, d: [1.0], lambda s, p, d: [s[0] * where(d.uniform() < 0.5, 0.0, 2.0)])
    found = Ensemble(system, 50, {}).run(100, [Lyapunov(1)])[0]
    assert found.status == "not_converged" and float(found.value[0]) == -math.inf and "zero" in found.note


def test_tangents_that_are_dependent_up_to_rounding_have_no_exponent() -> None:
    """A factor of rank one: the second exponent is minus infinity, and what rounding leaves of it is not reported as a number."""
    system = System("rank 1", lambda p, d: [1.0, 1.0], lambda s, p, d: [0.9 * s[0] + 0.3 * s[1], 0.3 * s[0] + 0.1 * s[1]])
    for precision in ("float32", "float64"):
        found = Ensemble(system, 50, {}, engine="torch", precision=precision).run(100, [Lyapunov(2), Lyapunov(1)], burn=9, start=[0.0, 0.0])  # type: ignore[arg-type]
        assert found[0].status == "not_converged" and "100.0% of the steps" in found[0].note
        assert found[1].status == "ok" and abs(float(found[1].value[0])) < 2e-3  # the first is log 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mean_far_from_zero_costs_the_covariance_no_digits(engine: str) -> None:
    """In single precision the square of 3000 is known to .5 only; the variance here is .05."""
    system = System("far", lambda p, d: [p.m], lambda s, p, d: [p.m + 0.9 * (s[0] - p.m) + 0.1 * d.normal()])
    found = Ensemble(system, 2000, {"m": [0.0, 3000.0]}, engine=engine).run(300, [Covariance()], burn=100)[0]  # type: ignore[arg-type]
    assert within(found, torch.full((2, 1, 1), 0.01 / 0.19)) and float(found.stderr.max()) < 1e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_of_which_nothing_is_left_after_burn_in_says_so(engine: str) -> None:
    system = System("exploding", lambda p, d: [1.0 + d.uniform()], lambda s, p, d: [3.0 * s[0]])
    observe = [Average(), Covariance(), Lyapunov(1), Snapshots([0, 50]), Histogram([0.0, 1.0], [50]), Displacement([1, 2])]
    run = Ensemble(system, 100, {}, engine=engine, threads=2).run(50, [*observe, FirstPassage(lambda s, p: s[0] < 0.0)], burn=1000)  # type: ignore[arg-type]
    assert run.diverged == 100 and int(run[4].diverged) == 100 and int(run[4].total) == 100
    assert all(run[k].status == "not_converged" and "100 of 100" in run[k].note for k in (0, 1, 2, 3, 5))
    assert run[6].mean.status == "not_converged" and run[6].to_dict()["diverged"] == 100 and run[6].to_dict()["passed"] == 0


WALK = System("walk", lambda p, d: [0.0], lambda s, p, d: [s[0] + p.step * d.normal()])
BAD = [
    (lambda: Ensemble(WALK, 0, {"step": 1.0}), "replicas"),
    (lambda: Ensemble(WALK, 10, {"step": math.nan}), "finite"),
    (lambda: Ensemble(WALK, 10, {"step": 1.0}, seed=-1), "seed"),
    (lambda: Ensemble(WALK, 10, {"step": 1.0}, engine="cuda"), "engine"),  # type: ignore[arg-type]
    (lambda: Ensemble(WALK, 10, {"step": [1.0, 2.0], "other": [1.0, 2.0, 3.0]}), "equally long"),
    (lambda: Ensemble(WALK, 10, {}).run(1), "missing: step"),
    (lambda: Ensemble(WALK, 10, {"step": 1.0, "lr": 1.0}).run(1), "no parameter lr"),
    (lambda: Ensemble(WALK, 10, {"step": 1.0}).run(-1), "steps"),
    (lambda: Ensemble(WALK, 10, {"step": 1.0}).run(0, [Average()]), "at least one"),
    (lambda: Ensemble(WALK, 10, {"step": 1.0}).run(5, [Snapshots([9])]), "0..5"),
    (lambda: Ensemble(WALK, 10, {"step": 1.0}).run(5, start=[1.0, 2.0]), "shape"),
    (lambda: Ensemble(WALK, 10, {"step": 1.0}).run(5, start=[math.inf]), "finite"),
    (lambda: Ensemble(WALK, 1 << 40, {"step": 1.0}).run(5), "GiB"),
    (lambda: Ensemble(WALK, 10, {"step": 1.0}).run(5, [Lyapunov(2)]), "dimensions"),
    (lambda: Table([[1.0, math.nan]]), "clean the data"),
    (lambda: Table(np.zeros((0, 2))), "shape"),
    (lambda: quadratic(np.eye(2), [[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalue"),
    (lambda: quadratic(np.eye(2), np.eye(3)), "one size"),
    (lambda: regression(np.eye(2), 0), "batch"),
    (lambda: student(2), "variance"),
    (lambda: Preconditioned([[1.0, 2.0]]), "square"),
    (lambda: Histogram([1.0, 0.0], [1]), "increasing"),
    (
        lambda: Ensemble(descent("t", table_regression(TABLE[:, :2], TABLE[:, 2], 13, "subset"), SGD(), [0.0, 0.0]), 5, {"lr": 0.1}).run(1),
        "13 rows",
    ),
    (lambda: Ensemble(System("two", lambda p, d: [0.0], lambda s, p, d: [s[0], s[0]]), 5, {}).run(1), "returns 2"),
    (lambda: Ensemble(System("nan", lambda p, d: [0.0], lambda s, p, d: [s[0] * math.nan]), 5, {}).run(1), "constants must be finite"),
    (lambda: Ensemble(System("log", lambda p, d: [0.0], lambda s, p, d: [s[0] + log(0.0 * s[0])]), 5, {}).run(1), "log of the constant 0"),
    (lambda: Ensemble(System("exp", lambda p, d: [0.0], lambda s, p, d: [s[0] + exp(1e3)]), 5, {}).run(1), "exp of the constant 1000"),
    (lambda: quadratic(np.eye(2), [[1.0, math.nan], [math.nan, 1.0]]), "finite square"),
    (lambda: quadratic([[1.0, math.inf], [0.0, 1.0]], np.eye(2)), "finite"),
    (lambda: regression([[1.0, 0.5], [0.0, 1.0]], 1), "not symmetric"),
    (lambda: table_regression([[1.0, math.nan]], [1.0], 1), "clean the data"),
    (lambda: table_regression(TABLE[:, :2], TABLE[:5, 2], 1), r"x must be \(n, d\)"),
    (lambda: two_layer([1.0, math.inf], [1.0, 2.0], 1), "clean the data"),
    (
        lambda: Ensemble(
            descent("t", table_regression(TABLE[:, :2], TABLE[:, 2], 1, "shuffle"), SGD(), [0.0, 0.0]),
            5,
            {"lr": 0.1},  # type: ignore[arg-type]
        ).run(1),
        "'shuffle' is unknown",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_says_what_is_wrong(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_singular_noise_covariance_is_fine(engine: str) -> None:
    singular = np.array([[1.0, 1.0], [1.0, 1.0]])
    system = descent("s", quadratic(np.eye(2), singular), SGD(), [0.0, 0.0])
    found = Ensemble(system, 2000, {"lr": 0.5}, engine=engine).run(50, [Covariance()], burn=40)[0]  # type: ignore[arg-type]
    assert within(found, singular / 3)


def test_a_step_too_long_for_a_kernel_goes_to_torch_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LARGEST", 3)
    system, params = SYSTEMS["sgd"]
    assert Ensemble(system, 10, params).run(2).engine == "torch"
    if NUMBA:
        with pytest.raises(InputError, match="operations"):
            Ensemble(system, 10, params, engine="lanes").run(2)


def test_without_numba_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "available", lambda: False)
    system, params = SYSTEMS["sgd"]
    with pytest.raises(MissingExtraError, match=r"parasym\[simulate\]"):
        Ensemble(system, 10, params, engine="lanes").run(2)
    assert Ensemble(system, 10, params).run(2).engine == "torch"


def test_importing_the_simulator_does_not_import_numba() -> None:
    import subprocess
    import sys

    code = "import sys, parasym.simulate; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path), "PATH": ""}).returncode == 0


def test_a_progress_bar_does_not_change_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    system, params = SYSTEMS["sgd"]
    ensemble = Ensemble(system, 100, params)
    quiet, shown = ensemble.run(64), ensemble.run(64, progress=True)
    assert torch.equal(quiet.final, shown.final) and "simulating" in capsys.readouterr().out


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_does_not_grow_with_steps(engine: str) -> None:
    import tracemalloc

    system, params = SYSTEMS["sgd"]
    ensemble = Ensemble(system, 512, params, engine=engine)  # type: ignore[arg-type]
    ensemble.run(10, [Covariance(), Lyapunov(1)])  # compiled and imported
    peaks = []
    for steps in (100, 2000) if engine == "torch" else (1000, 100_000):
        tracemalloc.start()
        ensemble.run(steps, [Covariance(), Lyapunov(1)])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_observable_may_read_a_parameter_the_step_does_not(engine: str) -> None:
    system = System("still", lambda p, d: [2.0], lambda s, p, d: [s[0]])
    run = Ensemble(system, 3, {"level": [1.0, 5.0]}, engine=engine).run(4, [Snapshots([4], lambda s, p: [s[0] * p.level])])  # type: ignore[arg-type]
    assert run[0].value.flatten().tolist() == [2.0, 10.0]


def test_results_are_plain_data() -> None:
    import json

    system, params = SYSTEMS["sgd"]
    run = Ensemble(system, 50, params).run(
        20, [Average(), Covariance(), Histogram([0.0, 1.0], [20]), FirstPassage(lambda s, p: s[0] < 0.0)]
    )
    json.dumps(run.to_dict(), allow_nan=False)
