"""The entropic potential and force, and the four measures of irreversibility (thermodynamic-irreversibility E1-E3)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.operators import Layout
from parasym.laws.charges import rescale
from parasym.laws.entropy import KINDS, entropic_force, entropy, irreversibility, retrace
from parasym.laws.equilibrium import noise_equilibrium
from parasym.measure.gradients import Objective, gradient_moments

Batches = list[tuple[Tensor, Tensor]]


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean()


def tanh_net(seed: int) -> tuple[Objective, Batches, tuple[Tensor, Tensor]]:
    """3-4-1, N(0, 1 / fan_in), 16 samples, 6 batches of 4."""
    g = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            fan = p.shape[1] if p.ndim > 1 else 3
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / fan**0.5)
    X, Y = (torch.randn(16, k, generator=g, dtype=torch.float64) for k in (3, 1))
    picks = [torch.randperm(16, generator=g)[:4] for _ in range(6)]
    return Objective(model, mse), [(X[i], Y[i]) for i in picks], (X, Y)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_four_measures_agree_and_their_error_halves_with_the_rate(seed: int) -> None:
    objective, found, _ = tanh_net(seed)
    rates = (0.05, 0.025, 0.0125)
    runs = [irreversibility(objective, found, eta) for eta in rates]
    for kind in KINDS:
        errors = [r.error(kind) for r in runs]
        assert all(1.7 < a / b < 2.4 for a, b in zip(errors, errors[1:], strict=False)), (kind, errors)  # noqa: RUF007
    assert runs[-1].error("DE") < 0.05 and runs[-1].error("ST") < 0.1
    json.dumps(runs[0].to_dict(), allow_nan=False)


def test_the_force_is_the_gradient_of_the_potential() -> None:
    objective, found, _ = tanh_net(0)
    run = irreversibility(objective, found, 0.05, kinds=("DE",))
    force = entropic_force(objective, found, 0.05)
    assert torch.allclose(run.layout.flatten(force), run.reference, atol=1e-14)
    eps, name = 1e-5, "0.weight"

    def potential(shift: float) -> float:
        objective.params[name] = objective.params[name] + shift
        total = 0.0
        for batch in found:
            leaves = {n: p.detach().requires_grad_() for n, p in objective.params.items()}
            total += sum(float(g.square().sum()) for g in torch.autograd.grad(objective(leaves, batch), list(leaves.values())))
        objective.params[name] = objective.params[name] - shift
        return 0.05 / 4 * total / len(found)

    slope = (potential(eps) - potential(-eps)) / (2 * eps)
    assert slope == pytest.approx(-float(force[name].sum()), rel=1e-6)


def test_a_preconditioner_is_part_of_the_potential() -> None:
    objective, found, _ = tanh_net(1)
    g = torch.Generator().manual_seed(0)
    P = {n: torch.rand(p.shape, generator=g, dtype=torch.float64) + 0.5 for n, p in objective.params.items()}
    errors = [irreversibility(objective, found, eta, preconditioner=P) for eta in (0.025, 0.0125)]
    for kind in KINDS:
        assert 1.6 < errors[0].error(kind) / errors[1].error(kind) < 2.5


def test_another_batch_on_the_way_back_breaks_the_equality() -> None:
    objective, found, _ = tanh_net(0)
    ratios, limits = [], []
    for eta in (0.0125, 0.00625):
        right = irreversibility(objective, found, eta, kinds=("TA",))
        layout = right.layout
        theta, total = layout.flatten(objective.params), torch.zeros(right.layout.size, dtype=torch.float64)

        def gradient(x: Tensor, batch: Any, layout: Layout = layout) -> Tensor:
            leaf = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(objective(layout.unflatten(leaf), batch), leaf)
            return g

        for a, b in zip(found, found[1:] + found[:1], strict=True):
            one = theta - eta * gradient(theta, a)
            total += (one + eta * gradient(one, b) - theta) / (2 * eta)
        ratios.append(float((total / len(found) - right.reference).norm() / right.reference.norm()))
        limits.append(right.error("TA"))
    assert ratios[0] > 4 * limits[0] and ratios[1] > 8 * limits[1]  # no convergence as eta falls
    assert 0.8 < ratios[1] / ratios[0] < 1.25


def test_the_potential_is_split_and_grows_with_momentum() -> None:
    objective, _, whole = tanh_net(0)
    moments = gradient_moments(objective, whole)
    plain, heavy = entropy(moments, 0.1, 4), entropy(moments, 0.1, 4, momentum=0.9)
    X, Y = whole
    squares = [gradient_moments(objective, (X[i : i + 1], Y[i : i + 1]), check=False).norms[0] for i in range(16)]
    exact = 0.1 / 4 * (moments.mean_square + (float(torch.stack(squares).mean()) - moments.mean_square) / 4)
    assert isinstance(plain.noise.value, float) and isinstance(heavy.noise.value, float)
    assert plain.mean + plain.noise.value == pytest.approx(exact) == pytest.approx(sum(plain.parts.values()))
    assert heavy.noise.value == pytest.approx(10 * plain.noise.value) and heavy.mean == pytest.approx(190 * plain.mean)


def test_the_potential_is_convex_along_an_orbit_with_its_minimum_at_the_noise_equilibrium() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 3)).double()
    X, y = torch.randn(64, 6, dtype=torch.float64), torch.randint(3, (64,))
    charge = rescale(dict(model.named_parameters()), ["0.weight", "0.bias"], ["2.weight"])
    start = noise_equilibrium(model, F.cross_entropy, (X, y), [charge], batch_size=1)
    objective = Objective(model, F.cross_entropy)
    lam = next(iter(start.elements.values()))
    base, values = dict(objective.params), []
    for shift in torch.linspace(-1, 1, 21, dtype=torch.float64):
        objective.params.update(charge.act(base, lam + shift))
        m = gradient_moments(objective, (X, y))
        values.append(float(m.norms.mean()))
    S = torch.tensor(values, dtype=torch.float64)
    assert int(S.argmin()) == 10 and float((S[2:] - 2 * S[1:-1] + S[:-2]).min()) > 0
    objective.params.update(charge.act(base, lam))
    force = entropic_force(objective, [(X[i : i + 1], y[i : i + 1]) for i in range(64)], 1.0)
    along = charge.form(objective.params, force)
    scale = charge.split(objective.params, objective.params)[0].sqrt() * sum(float(f.square().sum()) for f in force.values()) ** 0.5
    assert float(along.abs() / scale) < 1e-8


def test_retracing_measures_the_same_force() -> None:
    objective, found, _ = tanh_net(0)
    gaps = [retrace(objective, found[0], eta, 3) for eta in (0.02, 0.01)]
    assert isinstance(gaps[0].value, float) and isinstance(gaps[1].value, float)
    assert 3.5 < gaps[0].value / gaps[1].value < 4.5 and 1.6 < gaps[0].residual / gaps[1].residual < 2.4  # type: ignore[operator]


def test_what_cannot_be_measured_is_refused() -> None:
    objective, found, _ = tanh_net(0)
    with pytest.raises(InputError, match="float64"):
        irreversibility(Objective(objective.model.float(), mse), found, 0.1)
    for options in ({"lr": 0.0}, {"refine": 1}, {"kinds": ("XX",)}, {"temperature": 0.0}):
        with pytest.raises(InputError):
            irreversibility(objective, found, **{"lr": 0.1, **options})  # type: ignore[arg-type]
    moments = gradient_moments(tanh_net(0)[0], found)
    with pytest.raises(InputError):
        entropy(moments, 0.1, 4, momentum=1.0)
