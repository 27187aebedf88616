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
from parasym.laws.backward import (
    adam,
    adaptive_field,
    circulation,
    corrected,
    flow,
    heavy_ball,
    momentum_condition,
    momentum_field,
)
from parasym.laws.charges import rescale
from parasym.laws.entropy import dominance, effective_loss, entropic_force, entropy, equipartition, rates, temperature
from parasym.laws.equilibrium import noise_equilibrium
from parasym.laws.irreversibility import KINDS, EntropyProduction, irreversibility, retrace, retrace_rule, reversal
from parasym.measure.gradients import Objective, gradient_moments
from parasym.methods.entropic import EntropicRegularizer, cancel_entropy

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


# ------------------------------------------------------------------------------------- rates, the effective loss of an optimiser


def digits_like(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    return model, (torch.randn(40, 6, dtype=torch.float64), torch.randint(3, (40,)))


def test_rates_are_those_of_the_step() -> None:
    model, (X, y) = digits_like()
    for make in (lambda p: torch.optim.Adam(p, 1e-3, betas=(0.0, 0.9)), lambda p: torch.optim.RMSprop(p, 1e-3, alpha=0.9)):
        optimizer = make(model.parameters())
        F.cross_entropy(model(X), y).backward()
        with pytest.raises(InputError, match="before its first step"):
            rates(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.grad is not None
            assert torch.allclose(old - rates(optimizer)[p] * p.grad, p, atol=1e-14)  # the metric is the step itself
    groups = [{"params": [model[0].weight], "lr": 0.1}, {"params": [model[2].weight], "lr": 0.3}]  # type: ignore[index, union-attr]
    assert sorted(rates(torch.optim.SGD(groups)).values()) == [0.1, 0.3]  # type: ignore[type-var]
    with pytest.raises(InputError, match="not known"):
        rates(torch.optim.Adagrad(model.parameters()))


def test_the_effective_loss_of_an_optimiser_is_the_mean_over_all_its_batches() -> None:
    model, (X, y) = digits_like()
    P = dict(model.named_parameters())
    by_name = {"0.weight": 0.1, "0.bias": 0.1, "2.weight": 0.4, "2.bias": 0.4}
    groups = [{"params": [p], "lr": by_name[n]} for n, p in P.items()]
    found = effective_loss(model, F.cross_entropy, (X, y), torch.optim.SGD(groups, weight_decay=0.02), batch_size=1)
    exact = 0.0
    for i in range(40):
        gs = torch.autograd.grad(F.cross_entropy(model(X[i : i + 1]), y[i : i + 1]), list(P.values()))
        exact += sum(by_name[n] * float(g.square().sum()) for n, g in zip(P, gs, strict=True)) / 4 / 40
    assert found.mean + float(found.noise) == pytest.approx(exact, rel=1e-12) == pytest.approx(sum(found.parts.values()), rel=1e-12)
    penalty = 0.01 * sum(float(p.detach().square().sum()) for p in P.values())
    assert found.penalty == pytest.approx(penalty, rel=1e-12) and found.total == pytest.approx(found.loss + exact + penalty, rel=1e-12)
    json.dumps(found.to_dict(), allow_nan=False)
    heavy = effective_loss(model, F.cross_entropy, (X, y), torch.optim.SGD(P.values(), 0.1, momentum=0.5), batch_size=4)
    plain = entropy(gradient_moments(Objective(model, F.cross_entropy), (X, y)), 0.1, 4, momentum=0.5)
    assert heavy.mean == pytest.approx(plain.mean) and float(heavy.noise) == pytest.approx(float(plain.noise))
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    F.cross_entropy(model(X), y).backward()
    adam.step()
    assert effective_loss(model, F.cross_entropy, (X, y), adam, batch_size=4).mean > 0
    model[0].requires_grad_(False)  # type: ignore[index]
    part = effective_loss(model, F.cross_entropy, (X, y), torch.optim.SGD(model.parameters(), 0.1), batch_size=4)
    assert set(part.parts) == {"2.weight", "2.bias"}  # frozen parameters are left out
    mixed = torch.optim.SGD([{"params": [P["2.weight"]], "momentum": 0.9}, {"params": [P["2.bias"]]}], lr=0.1)
    with pytest.raises(InputError, match="different momentum"):
        effective_loss(model, F.cross_entropy, (X, y), mixed, batch_size=4)


def test_the_effective_loss_of_a_batch_norm_network_is_measured_between_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    loader = [(torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(6)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = effective_loss(model, F.cross_entropy, loader, torch.optim.SGD(model.parameters(), 0.1), batch_size=8)
    exact = 0.0
    for x, y in loader:
        gs = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        exact += 0.1 / 4 * sum(float(g.square().sum()) for g in gs) / 6
    model.load_state_dict(before)
    assert found.mean + float(found.noise) == pytest.approx(exact, rel=1e-10)


def test_the_entropic_term_cancels_the_defect_of_a_step() -> None:
    objective, found, _ = tanh_net(0)
    model, batch, eta = objective.model, found[0], 0.02
    layout = Layout.of(objective.params)
    start = layout.flatten(objective.params)

    def gradient(x: Tensor) -> Tensor:
        return -torch.func.grad(lambda t: objective(layout.unflatten(t), batch))(x)

    gaps = {}
    for coef in (0.0, -eta, eta):
        term = EntropicRegularizer(coef, model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), eta)
        term(mse(model(batch[0]), batch[1])).backward()
        assert (term.value == 0.0) == (coef == 0.0)
        optimizer.step()
        end = layout.flatten(dict(model.named_parameters())).detach()
        gaps[coef] = float((end - flow(gradient, start, eta)).norm())
        with torch.no_grad():
            for p, v in zip(model.parameters(), layout.unflatten(start).values(), strict=True):
                p.copy_(v)
                p.grad = None
    assert gaps[-eta] < 0.1 * gaps[0.0] and gaps[eta] == pytest.approx(2 * gaps[0.0], rel=0.1)
    assert cancel_entropy(eta, model.parameters()).coef == -eta
    for call, message in (
        (lambda: EntropicRegularizer(float("nan"), model.parameters()), "finite"),
        (lambda: EntropicRegularizer(0.1, []), "no trainable"),
        (lambda: EntropicRegularizer(0.1, model.parameters())(torch.ones(2)), "one number"),
        (lambda: cancel_entropy(-1.0, model.parameters()), "positive"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_dominance_and_temperature() -> None:
    objective, found, _ = tanh_net(0)
    assert float(dominance(objective, found, 0.02)) == pytest.approx(2 * float(dominance(objective, found, 0.01)))
    assert temperature(0.4, 0.5) == pytest.approx(0.2)
    with pytest.raises(InputError):
        entropic_force(objective, found, {"0.weight": 0.1})


# ------------------------------------------------------------------------------------------------ backward error analysis


def test_corrections_match_a_flow_that_is_known() -> None:
    """x' = -a x has the step 1 - eta a = exp(eta log(1 - eta a) / eta): the corrections are its Taylor series."""
    a = torch.tensor([0.7, -0.3, 2.0], dtype=torch.float64)
    field = lambda x: -a * x  # noqa: E731
    x = torch.ones(3, dtype=torch.float64)
    for eta in (1e-2, 1e-3):
        exact = torch.log(1 - eta * a) / eta
        for order in (0, 1, 2):
            assert float((corrected(field, eta, order)(x) - exact).abs().max()) < 5 * (2 * eta) ** (order + 1)
    assert torch.allclose(flow(field, x, 0.5), torch.exp(-0.5 * a), atol=1e-11)
    whole, halved = corrected(field, 0.1), corrected(field, 0.1, 1, 2)
    assert torch.allclose(halved(x) - field(x), 0.5 * (whole(x) - field(x)))
    for bad in ({"order": 3}, {"order": 2, "parts": 2}, {"parts": 0}):
        with pytest.raises(InputError):
            corrected(field, 0.1, **bad)  # type: ignore[arg-type]


def test_momentum_and_adam_flows_on_a_quadratic() -> None:
    h = torch.tensor([1.0, 0.3], dtype=torch.float64)
    gradient = lambda x: h * x  # noqa: E731
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    eta, mu = 1e-3, 0.6
    # heavy ball on h x^2 / 2 decays by the larger root of r^2 - (1 + mu - eta h) r + mu, per step
    b = 1 + mu - eta * h
    rate = torch.log((b + (b * b - 4 * mu).sqrt()) / 2) / eta
    plain, fixed = (momentum_field(gradient, eta, mu, c)(x) / x for c in (False, True))
    assert float((fixed - rate).abs().max()) < 0.02 * float((plain - rate).abs().max())
    end, _ = heavy_ball(gradient, x, eta, mu, 2000)
    assert float((end / x - torch.exp(rate * eta * 2000)).abs().max()) < 0.01
    assert momentum_condition(1e-3, 0.9, 1.0).ok and momentum_condition(0.05, 0.9, 1.0).status == "not_converged"
    # eps large against g^2: Adam is SGD at the rate lr / sqrt(eps), whose correction is the SGD one
    big, lr = 1e8, 1e-2 * 1e4
    sgd = corrected(lambda x: -gradient(x), 1e-2)(x)
    assert torch.allclose(adaptive_field(gradient, lr, 0.0, 0.9, big)(x) * 1e4, sgd, rtol=1e-4)
    x1, _ = adam(gradient, x, 1e-3, 0.9, 0.99, 1e-2, 1)
    assert torch.allclose(x1, x - 1e-3 * gradient(x) / (gradient(x) ** 2 + 1e-2).sqrt())  # bias corrected
    for call in (
        lambda: momentum_field(gradient, 0.1, 1.0), lambda: adaptive_field(gradient, 0.1, 0.9, 0.99, 0.0),
        lambda: momentum_condition(-1.0, 0.5, 1.0),
    ):  # fmt: skip
        with pytest.raises(InputError):
            call()


def test_circulation_is_zero_for_gradients_and_one_for_rotations() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert float(circulation(lambda x: -x * torch.tensor([1.0, 3.0], dtype=torch.float64), x)) < 1e-15
    J = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert float(circulation(lambda x: J @ x, x)) == pytest.approx(1.0)
    assert circulation(lambda x: 0 * x + 1, x).status == "not_applicable"


def test_entropy_production_is_counted_without_changing_the_run() -> None:
    runs = []
    for watched in (False, True):
        model, (X, y) = digits_like()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5)
        meter = EntropyProduction(optimizer) if watched else None
        total = 0.0
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            total += sum(0.1 * float(p.grad.square().sum()) for p in model.parameters())  # type: ignore[union-attr]
            optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters()])
        if meter is not None:
            meter.close()
            optimizer.step()
            assert meter.steps == 5 and meter.total == pytest.approx(total) and float(meter.cost) == pytest.approx(0.1 * total / 4)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    with pytest.raises(InputError, match="not known"):
        EntropyProduction(torch.optim.Adagrad(model.parameters()))


def test_reversal_of_descent_and_of_a_reversible_rule() -> None:
    h = torch.tensor([1.0, 3.0], dtype=torch.float64)
    x, eta = torch.tensor([1.0, -1.0], dtype=torch.float64), 0.01
    force = reversal(lambda x, b: x - eta * h * x, lambda x, b: x + eta * h * x, x, None, eta)
    assert torch.allclose(force, -eta / 2 * h**2 * x)
    assert float(retrace_rule(lambda x, b: x + b, lambda x, b: x - b, x, [0.5, 0.25, 1.0])) == 0.0


def test_equipartition_names_what_is_not_balanced() -> None:
    model, data = digits_like()
    charge = rescale(dict(model.named_parameters()), ["0.weight", "0.bias"], ["2.weight"])
    found = equipartition(Objective(model, F.cross_entropy), data, [charge, charge], lr=0.1, batch_size=4)
    assert len(found.charges) == 2 and found.worst > 0.1 and set(found.layers) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    noise_equilibrium(model, F.cross_entropy, data, [charge], batch_size=4).apply(model)
    assert equipartition(Objective(model, F.cross_entropy), data, [charge], lr=0.1, batch_size=4).worst < 1e-12
    json.dumps(found.to_dict(), allow_nan=False)
