"""Eigenpairs, trace, density and stability against dense matrices; what has not converged says so."""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from parasym.core.errors import InputError, NonDeterministicError
from parasym.core.operators import LinearOperator
from parasym.measure.curvature import dense_eigenvalues, density, eigenpairs, hessian, sharpness, stability, trace

Which = Literal["LM", "LA", "SA"]


class Matrix(LinearOperator):
    """A dense symmetric matrix as an operator."""

    def __init__(self, M: Tensor) -> None:
        self.M, self.shape, self.dtype, self.device, self.backend = M, tuple(M.shape), M.dtype, M.device, "dense"  # type: ignore[assignment]
        self.tried, self.residual = [], None

    def _matmat(self, x: Tensor) -> Tensor:
        return self.M @ x

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self.M @ y


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return (Q * values) @ Q.T


def problem(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,))


def best(values: np.ndarray, which: str, k: int) -> np.ndarray:
    key = {"LM": -abs(values), "LA": -values, "SA": values}[which]
    out: np.ndarray = values[np.argsort(key, kind="stable")][:k]
    return out


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize(("block", "basis"), [(1, None), (3, None), (1, 12), (2, 14)])
def test_eigenpairs_of_a_network_equal_the_dense_ones(which: Which, block: int, basis: int | None) -> None:
    model, x, y = problem()
    op = hessian(model, F.cross_entropy, (x, y))
    exact = dense_eigenvalues(op)
    found = eigenpairs(op, 5, which=which, tol=1e-8, block=block, basis=basis, max_products=600)
    assert found.status == "ok" and np.allclose(found.values, best(exact, which, 5), atol=1e-12)
    true = (op @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert bool((true <= 1.01 * found.residuals + 1e-13).all())  # the residual reported is the residual
    assert torch.allclose(found.vectors.T @ found.vectors, torch.eye(5, dtype=torch.float64), atol=1e-12)
    json.dumps(found.to_dict(), allow_nan=False)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 60), k=st.integers(1, 8), seed=st.integers(0, 10_000), which=st.sampled_from(["LM", "LA", "SA"]),
    block=st.integers(1, 3), spread=st.floats(0.1, 3),
)  # fmt: skip
def test_a_pair_called_converged_is_an_eigenpair(n: int, k: int, seed: int, which: Which, block: int, spread: float) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp() ** spread
    values = values * torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    op, k = Matrix(symmetric(values, seed)), min(k, n)
    found = eigenpairs(op, k, which=which, tol=1e-6, block=block, seed=seed)
    true = (op.M @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert bool((true[found.converged] <= 1e-6 * found.values.abs()[found.converged] + 1e-11 * values.abs().max()).all())
    if found.status == "ok":
        assert np.allclose(found.values, best(values.numpy(), which, k), rtol=1e-6, atol=1e-9 * float(values.abs().max()))


def test_what_has_not_converged_is_marked() -> None:
    op = Matrix(symmetric(1 + 1e-3 * torch.rand(300, dtype=torch.float64)))
    found = eigenpairs(op, 5, tol=1e-9, max_products=20)
    assert found.status == "not_converged" and not bool(found.converged.all()) and "NOT CONVERGED" in repr(found)
    bad = int((~found.converged).nonzero()[0])
    with pytest.raises(InputError):
        float(found.estimate(bad))
    assert found.estimate(bad).status == "not_converged"


def test_repeated_eigenvalues_need_a_block_and_null_directions_can_be_left_out() -> None:
    values = torch.tensor([5.0, 5.0, 5.0, 3.0, 1.0] + [0.1] * 40, dtype=torch.float64)
    op = Matrix(symmetric(values))
    assert torch.allclose(eigenpairs(op, 4, block=3, tol=1e-8).values, values[:4])
    first = eigenpairs(op, 3, block=3, tol=1e-10)
    rest = eigenpairs(op, 2, tol=1e-8, orthogonal_to=first.vectors)
    assert torch.allclose(rest.values, values[3:5]) and float((first.vectors.T @ rest.vectors).abs().max()) < 1e-9
    small = eigenpairs(Matrix(torch.diag(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))), 3, tol=1e-8)
    assert small.status == "ok" and torch.allclose(small.values, torch.tensor([2.0, 0, 0], dtype=torch.float64), atol=1e-12)


def test_float32_and_loaders() -> None:
    model, x, y = problem()
    op = hessian(model, F.cross_entropy, (x, y))
    exact = best(dense_eigenvalues(op), "LM", 4)
    single = hessian(model.float(), F.cross_entropy, (x.float(), y))
    found = eigenpairs(single, 4, tol=1e-3)
    assert found.vectors.dtype == torch.float32 and np.allclose(found.values, exact, rtol=1e-4)
    wide = hessian(model, F.cross_entropy, [(x[:10].float(), y[:10]), (x[10:].float(), y[10:])], dtype=torch.float64)
    assert np.allclose(eigenpairs(wide, 4, tol=1e-8).values, exact, rtol=1e-6)


def test_trace_and_density() -> None:
    values = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:3] = torch.tensor([60.0, 40.0, 30.0])
    op = Matrix(symmetric(values))
    total = float(values.sum())
    plain = trace(op, rtol=0.02, probes=300)
    assert plain.ok and plain.stderr is not None and abs(plain.value - total) < 5 * plain.stderr  # type: ignore[operator]
    deflated = trace(op, rtol=0.02, probes=300, deflate=eigenpairs(op, 3, tol=1e-8))
    assert abs(deflated.value - total) < 5 * deflated.stderr and deflated.details["products"] <= plain.details["products"]  # type: ignore[operator]
    assert trace(op, rtol=1e-6, probes=8).status == "not_converged"
    exact = trace(op, probes=500)
    assert exact.value == pytest.approx(total, rel=1e-12) and exact.residual == 0
    found = density(op, steps=40, probes=6)
    assert float(found.density.sum() * (found.grid[1] - found.grid[0])) == pytest.approx(1.0, abs=1e-3)
    squares = found.mean(torch.square)
    assert abs(squares.value - float(values.square().mean())) < 6 * squares.stderr  # type: ignore[operator]


def _descend(momentum: float, nesterov: bool, eta: float, top: float) -> float:
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([p], eta, momentum=momentum, nesterov=nesterov)
    for _ in range(4000):
        optimizer.zero_grad()
        (0.5 * top * p.square().sum()).backward()
        optimizer.step()
        if float(p.detach().abs()) > 1e6:
            break
    return float(p.detach().abs())


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_the_edge_of_stability_is_where_a_quadratic_starts_to_diverge(momentum: float, nesterov: bool) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    op = hessian(model, lambda a, b: 0.5 * (a - b).square().mean(), (x, x))
    at = stability(op, torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, nesterov=nesterov))
    assert at.sharpness.value == pytest.approx(1.0) and at.stable
    assert _descend(momentum, nesterov, 0.1, 0.98 * at.limit) < 1e-3
    assert _descend(momentum, nesterov, 0.1, 1.02 * at.limit) > 1e3


def test_stability_of_a_preconditioned_rule_and_refusals() -> None:
    model, x, y = problem()
    op = hessian(model, F.cross_entropy, (x, y))
    adam = torch.optim.Adam(model.parameters(), 1e-2)
    with pytest.raises(InputError, match="take a step first"):
        stability(op, adam, model)
    F.cross_entropy(model(x), y).backward()
    adam.step()
    found = stability(op, adam, model, tol=1e-8)
    v = torch.cat([(adam.state[p]["exp_avg_sq"] / (1 - 0.999)).sqrt().reshape(-1) + 1e-8 for p in model.parameters()])
    P = v.rsqrt()
    exact = torch.linalg.eigvalsh(P[:, None] * op.dense() * P).max()
    assert found.sharpness.value == pytest.approx(float(exact), rel=1e-6) and found.limit == pytest.approx(2 * 1.9 / (0.1 * 1e-2))
    with pytest.raises(InputError, match="No stability limit"):
        stability(op, torch.optim.Rprop(model.parameters()), model)
    with pytest.raises(InputError, match="one learning rate"):
        stability(op, torch.optim.SGD([{"params": p, "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]))
    assert sharpness(op).ok


def test_bad_input_is_refused() -> None:
    model, x, y = problem()
    op = hessian(model, F.cross_entropy, (x, y))
    bad: list[dict[str, Any]] = [{"k": 0}, {"k": 1000}, {"which": "XX"}, {"tol": 0.0}, {"block": 0}]
    for options in bad:
        with pytest.raises(InputError):
            eigenpairs(op, **{"k": 2, **options})
    with pytest.raises(InputError):
        trace(op, probes=1)
    with pytest.raises(InputError):
        density(op, steps=0)
    dropping = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    with pytest.raises(NonDeterministicError):
        hessian(dropping, F.cross_entropy, (x, y))
    with pytest.raises(InputError, match="no batch"):
        hessian(model, F.cross_entropy, [])


def test_measuring_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    _, x, y = problem()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    eigenpairs(hessian(model, F.cross_entropy, (x, y)), 2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert torch.equal(rng, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
