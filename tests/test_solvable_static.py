"""The models with closed-form minima, and the engines they share, each against an independent route."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from parasym.core.errors import InputError
from parasym.solvable import engines

F64 = torch.float64


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ engines


def test_restarts_find_the_global_minimum_and_say_how_often() -> None:
    def loss(theta: engines.Params) -> torch.Tensor:
        x = theta["x"]
        return (x**4 - 2 * x**2 + 0.3 * x).sum()  # two wells, the left one lower

    starts = [{"x": torch.tensor([x], dtype=F64)} for x in (-1.5, -0.2, 0.5, 1.5)]
    found = engines.lbfgs_restarts(loss, starts)
    left = np.roots([4, 0, -4, 0.3]).real.min()
    assert found.converged and abs(float(found.best["x"]) - left) < 1e-10
    assert found.fraction() == 0.5 and found.gradient.max() < 1e-9
    with pytest.raises(InputError, match="not finite at start 1"):
        engines.lbfgs_restarts(loss, [starts[0], {"x": torch.tensor([math.nan], dtype=F64)}])
    with pytest.raises(InputError, match="at least one start"):
        engines.lbfgs_restarts(loss, [])


def test_flow_follows_the_logistic_curve() -> None:
    # L = (ab - m)^2 / 2 from a balanced start: s = ab is logistic (TwoLayerLinear of the catalogue)
    m, s0 = 1.7, 1e-3
    start = {"a": torch.tensor(s0**0.5, dtype=F64), "b": torch.tensor(s0**0.5, dtype=F64)}
    path = engines.flow(lambda w: 0.5 * (w["a"] * w["b"] - m) ** 2, start, np.linspace(0, 6, 30))
    grown = torch.exp(2 * m * path.times)
    assert path.ok and (path.theta["a"] * path.theta["b"] - m * grown / (grown - 1 + m / s0)).abs().max() < 1e-8
    with pytest.raises(InputError, match="increasing"):
        engines.flow(lambda w: w["a"], start, [0.0, 0.0])


def test_a_flow_that_blows_up_is_not_ok() -> None:
    path = engines.follow(lambda t, w: {"x": w["x"] ** 2}, {"x": torch.ones(1, dtype=F64)}, [0.0, 0.5, 2.0])
    assert not path.ok and path.theta["x"][1].isfinite() and path.theta["x"][2].isnan() and path.message


def test_normalised_flow_keeps_the_path_of_gradient_flow() -> None:
    x = torch.tensor([[1.0, 0.2], [0.3, 1.0]], dtype=F64)
    log_loss = lambda w: torch.logsumexp(-(x @ w["w"]), 0)  # noqa: E731
    start = {"w": torch.zeros(2, dtype=F64)}
    slow = engines.flow(lambda w: log_loss(w).exp(), start, [0.0, 20.0])
    fast = engines.normalised_flow(log_loss, start, np.linspace(0, 1.6, 2000))
    gap = (fast.theta["w"] - slow.theta["w"][-1]).norm(dim=-1).min()
    assert gap < 2e-3 < slow.theta["w"][-1].norm()


def test_descent_of_many_is_descent_of_each() -> None:
    loss = lambda w: (w["x"] ** 4).sum() + w["y"] ** 2  # noqa: E731
    many = {"x": torch.randn(3, 2, generator=draws(0), dtype=F64), "y": torch.randn(3, generator=draws(1), dtype=F64)}
    rates = torch.tensor([0.01, 0.02, 0.05], dtype=F64)
    together = engines.descend(loss, many, rates, 50)
    for k in range(3):
        one = {name: w[k : k + 1] for name, w in many.items()}
        alone = engines.descend(loss, one, float(rates[k]), 50)
        assert all(torch.equal(alone[name][0], together[name][k]) for name in many)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("g", [0.0, 0.05, 0.3, 0.6, 2.0])
def test_a_mode_by_grid_search(depth: int, g: float) -> None:
    m = 1.3
    cost = lambda s: s**2 - 2 * m * s + (depth + 1) * g * s ** (2 / (depth + 1))  # noqa: E731
    grid = np.linspace(0, 2, 4001)
    k = int(np.argmin(cost(grid)))
    around = optimize.minimize_scalar(cost, bounds=(grid[max(k - 1, 0)], grid[k + 1]), method="bounded", options={"xatol": 1e-12})
    s, value = engines.per_mode_min(m, depth, g)
    assert abs(value - min(around.fun, 0.0)) < 1e-12
    assert abs(s - (around.x if around.fun < -1e-12 else 0.0)) < 1e-6
    assert engines.per_mode_min(-0.4, depth, g) == (0.0, 0.0)


@pytest.mark.parametrize(("total", "slots"), [(0.1, None), (1.0, None), (1.0, 2), (30.0, None), (30.0, 3)])
def test_waterfilling_by_quadratic_programming(total: float, slots: int | None) -> None:
    b, q = np.array([0.4, 1.0, -0.3, 0.9, 0.1]), 0.75
    allowed = np.argsort(-b)[:slots]

    def cost(n: np.ndarray) -> float:
        return float(-b[allowed] @ n + q * n @ n)

    start = np.full(len(allowed), total / len(allowed))
    bounds = [(0, None)] * len(allowed)
    found = optimize.minimize(
        cost, start, jac=lambda n: -b[allowed] + 2 * q * n, bounds=bounds, method="SLSQP",
        constraints={"type": "eq", "fun": lambda n: n.sum() - total}, options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    filled, mu = engines.waterfill(b, q, total, slots)
    assert abs(filled.sum() - total) < 1e-12 and np.abs(filled[allowed] - found.x).max() < 1e-5
    assert (np.abs(b[filled > 0] - mu - 2 * q * filled[filled > 0]) < 1e-12).all() and (filled > 0).sum() <= (slots or 5)
    with pytest.raises(InputError, match="positive total"):
        engines.waterfill(b, q, 0.0)
    with pytest.raises(InputError, match="slot"):
        engines.waterfill(b, q, 1.0, 0)


def test_roots_finds_them_all() -> None:
    found = engines.roots(lambda x: (x - 1e-4) * (x - 3.0) * (x - 3.2), 1e-8, 1e3, 800)
    assert np.allclose(found, [1e-4, 3.0, 3.2], rtol=1e-12)
    with pytest.raises(InputError, match="0 < low"):
        engines.roots(lambda x: x, 0.0, 1.0)


def test_index_and_nullity_of_a_saddle() -> None:
    loss = lambda w: w["a"] ** 2 - 3 * w["b"][0] ** 2 + 0 * w["b"][1]  # noqa: E731
    assert engines.morse(loss, {"a": torch.zeros((), dtype=F64), "b": torch.zeros(2, dtype=F64)}) == (1, 1)
    rotate = lambda w: {"b": torch.stack([w["b"][1], -w["b"][0]])}  # noqa: E731
    point = {"b": torch.tensor([0.3, 1.2], dtype=F64)}
    assert abs(engines.tangent_derivative(lambda w: w["b"].square().sum(), point, rotate)) < 1e-15
    assert abs(engines.tangent_derivative(lambda w: w["b"][0] ** 2, point, rotate)) > 0.1


def test_weights_survive_the_round_trip() -> None:
    theta = {"a": torch.randn(2, 3, generator=draws(0), dtype=F64), "b": torch.randn((), generator=draws(1), dtype=F64)}
    back = engines.unflatten(engines.flatten(theta), theta)
    assert all(torch.equal(theta[name], back[name]) for name in theta)
    assert torch.equal(engines.pick(engines.stack([theta, theta]), 1)["a"], theta["a"])
