"""Charges and their laws: exact ledgers (T1), the statistical law (T2), balancing (T3), closed forms, and what each refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.laws.adaptive import AdaptiveLedger
from parasym.laws.charges import Charge, ChargeSet, charges, matrix, rescale, scale, translation
from parasym.laws.drift import charge_moments, expected_change, imbalance
from parasym.laws.equilibrium import (
    chain_equilibrium,
    chain_fluctuation,
    noise_equilibrium,
    osborne,
    pair_from_product,
    solve_generator,
    solve_pair,
)
from parasym.laws.flow import ModifiedFlow, NormFlow, modified_flow
from parasym.laws.geometry import gradient_geometry, hessian_geometry, tangent
from parasym.laws.ledger import Account, Ledger
from parasym.laws.predict import predict
from parasym.measure.gradients import Objective, gradient_moments

CE = nn.functional.cross_entropy


def data(n: int = 256, d: int = 12, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64)
    return X, (X[:, :classes] + 0.5 * torch.randn(n, classes, generator=g, dtype=torch.float64)).argmax(1)


def mlp(seed: int = 0, act: type[nn.Module] = nn.ReLU) -> tuple[nn.Module, list[Charge]]:
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Linear(12, 16), act(), nn.Linear(16, 5)).double()
    P = dict(m.named_parameters())
    return m, [rescale(P, ["0.weight", "0.bias"], ["2.weight"]), translation(P, ["2.weight", "2.bias"])]


def normed(seed: int = 0, eps: float = 1e-30) -> tuple[nn.Module, list[Charge]]:
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16, eps=eps), nn.ReLU(), nn.Linear(16, 5)).double()
    P = dict(m.named_parameters())
    return m, [scale(P, ["0.weight"]), rescale(P, ["1.weight", "1.bias"], ["3.weight"]), translation(P, ["3.weight", "3.bias"])]


def train(
    model: nn.Module, found: Sequence[Charge], optimizer: torch.optim.Optimizer, steps: int = 300, batch: int = 32, clip: float = 0.0,
    schedule: Callable[[int], float] | None = None, loss: Any = CE,
) -> list[Account]:  # fmt: skip
    X, y = data()
    g = torch.Generator().manual_seed(5)
    rates = [group["lr"] for group in optimizer.param_groups]
    with Ledger(optimizer, found, model) as ledger:
        for k in range(steps):
            index = torch.randint(len(X), (batch,), generator=g)
            optimizer.zero_grad()
            loss(model(X[index]), y[index]).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (schedule(k) if schedule else 1.0)
            optimizer.step()
    return ledger.accounts()


RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "decay": lambda p: torch.optim.SGD(p, 0.1, weight_decay=1e-2),
    "heavy-ball": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "nesterov-foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True),
    "maximize": lambda p: torch.optim.SGD(p, 0.001, momentum=0.5, maximize=True),
}


# ------------------------------------------------------------------------------------------------------------------- T1: ledgers


@pytest.mark.parametrize("make", [mlp, normed])
@pytest.mark.parametrize("rule", list(RULES))
def test_the_ledger_of_sgd_is_exact(make: Any, rule: str) -> None:
    model, found = make()
    for account in train(model, found, RULES[rule](model.parameters())):
        assert account.exact and account.status == "ok", account.note
        assert account.residual < 1e-12
        assert account.verdict in ("predicted", "conserved")
        if account.charge.kind != "linear" and rule != "maximize":
            assert float((account.measured[-1] - account.measured[0]).abs().max()) > 1e-3  # something happened to be predicted


def test_clipping_schedules_and_group_rates_keep_the_ledger_exact() -> None:
    model, found = mlp()
    P = dict(model.named_parameters())
    groups = [
        {"params": [P["0.weight"], P["0.bias"]], "lr": 0.03, "weight_decay": 2e-2},
        {"params": [P["2.weight"], P["2.bias"]], "lr": 0.06, "weight_decay": 1e-2},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.8)
    accounts = train(model, found, optimizer, clip=0.3, schedule=lambda k: 1 / (1 + 0.01 * k))
    assert all(a.exact and a.residual < 1e-12 for a in accounts), [a.note for a in accounts]
    assert accounts[0].metric == {"0.weight": 1.0, "0.bias": 1.0, "2.weight": 0.5}


@pytest.mark.parametrize(
    "rule",
    [
        lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    ],
)
def test_other_rules_have_a_measured_cross_term_that_closes_the_balance(rule: Any) -> None:
    model, found = mlp()
    optimizer = rule(model.parameters())
    X, y = data()
    with Ledger(optimizer, found, model) as ledger:
        for _ in range(20):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = CE(model(X), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    account = ledger.accounts()[0]
    assert not account.exact and account.status == "not_applicable" and account.verdict == "measured"
    assert account.residual < 1e-12
    assert float(account.cross.abs().max()) > 1e-6  # the asymmetry is there, not hidden in the other columns
    if isinstance(optimizer, torch.optim.AdamW):
        decay = (1 - 1e-3) ** 2 - 1
        assert torch.allclose(account.decay[1], decay * account.measured[0], atol=1e-13)


def test_a_closure_evaluated_once_keeps_sgd_exact() -> None:
    model, found = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    X, y = data()
    with Ledger(optimizer, found, model) as ledger:
        for _ in range(20):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = CE(model(X), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    assert all(a.exact and a.residual < 1e-13 for a in ledger.accounts())


@pytest.mark.parametrize("act", [nn.Tanh, nn.GELU])
def test_a_charge_without_its_symmetry_is_broken(act: type[nn.Module]) -> None:
    model, found = mlp(act=act)
    account = train(model, found, torch.optim.SGD(model.parameters(), 0.1))[0]
    assert account.status == "violated" and account.verdict == "broken"
    assert account.residual > 1e-3


def test_a_wrong_sign_and_a_wrong_loss_are_broken() -> None:
    model, _ = mlp()
    P = dict(model.named_parameters())
    wrong = rescale(P, ["0.weight", "0.bias", ("2.weight", 1)], [])
    assert train(model, [wrong], torch.optim.SGD(model.parameters(), 0.1))[0].verdict == "broken"
    model, found = mlp()
    mse = lambda out, y: (out - nn.functional.one_hot(y, 5)).square().sum(-1).mean()  # noqa: E731
    accounts = train(model, found, torch.optim.SGD(model.parameters(), 0.02), loss=mse)
    assert [a.verdict for a in accounts] == ["predicted", "broken"]


def test_frozen_parameters_missing_gradients_and_steps_to_nan_are_told() -> None:
    model, found = mlp()
    model[2].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    account = train(model, found, torch.optim.SGD(model.parameters(), 0.1), steps=3)[0]
    assert account.status == "not_applicable" and "frozen" in account.note
    model, found = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    X, y = data()
    with Ledger(optimizer, found, model) as ledger:
        for k in range(5):
            optimizer.zero_grad()
            (CE(model(X), y) * (math.nan if k == 3 else 1)).backward()
            optimizer.step()
    account = ledger.accounts()[0]
    assert len(account.steps) == 4 and "not finite" in account.note and bool(torch.isfinite(account.measured).all())
    with pytest.raises(InputError, match="no parameter"):
        Ledger(optimizer, found, normed()[0])


def test_the_ledger_does_not_change_the_run() -> None:
    plain, _ = mlp()
    train(plain, [], torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=True))
    watched, found = mlp()
    train(watched, found, torch.optim.SGD(watched.parameters(), 0.1, momentum=0.9, nesterov=True, foreach=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))


def test_float32_runs_are_judged_by_their_own_round_off() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    P = dict(model.named_parameters())
    found = [rescale(P, ["0.weight", "0.bias"], ["2.weight"])]
    X, y = data()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with Ledger(optimizer, found, model, every=10) as ledger:
        for _ in range(200):
            optimizer.zero_grad()
            CE(model(X.float()), y).backward()
            optimizer.step()
    account = ledger.accounts()[0]
    assert account.verdict == "predicted" and 1e-12 < account.residual < account.limit
    assert account.steps.tolist() == list(range(0, 201, 10)) and len(ledger.table()["step"]) == 16 * 21


# ------------------------------------------------------------------------------------- charges found on real architectures


class Block(nn.Module):
    """A pre-norm transformer block with fused query, key, value, a ReLU feed-forward part and a classifier."""

    def __init__(self, d: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.l1, self.l2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.o = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.f, self.g, self.u = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.l1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = (q @ k.mT / (d // self.heads) ** 0.5).softmax(-1)
        x = x + self.o((a @ v).transpose(1, 2).reshape(b, t, d))
        x = x + self.g(torch.relu(self.f(self.l2(x))))
        out: Tensor = self.u(x.mean(1))
        return out


def logits(y: Tensor) -> Tensor:
    return y.log_softmax(-1)


@pytest.fixture(scope="module")
def block_charges() -> ChargeSet:
    torch.manual_seed(0)
    return charges(Block().double(), (torch.randn(8, 5, 8, dtype=torch.float64),), head=logits)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["decay", "heavy-ball", "nesterov"])
def test_ledgers_of_every_charge_found_on_a_transformer_block(rule: str, block_charges: ChargeSet) -> None:
    torch.manual_seed(0)
    model = Block().double()
    g = torch.Generator().manual_seed(1)
    X, y = torch.randn(64, 5, 8, generator=g, dtype=torch.float64), torch.randint(4, (64,), generator=g)
    found = block_charges
    kinds = [c.kind for c in found]
    assert kinds.count("matrix") == 2 and found.numbers >= 2 * 2 * 10 + 8 + 8 + 16 + 8 + 9
    optimizer = RULES[rule](model.parameters())
    with Ledger(optimizer, list(found), model) as ledger:
        for _ in range(200):
            index = torch.randint(64, (16,), generator=g)
            optimizer.zero_grad()
            CE(model(X[index]), y[index]).backward()
            optimizer.step()
    for account in ledger.accounts():
        assert account.exact and account.residual < 1e-12, (account.charge.name, account.residual)
    assert any(float((a.measured[-1] - a.measured[0]).abs().max()) > 1e-3 for a in ledger.accounts() if a.charge.kind == "matrix")


@pytest.mark.slow
def test_ledgers_of_every_charge_found_on_a_batch_norm_cnn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).double()  # fmt: skip
    g = torch.Generator().manual_seed(1)
    X, y = torch.randn(64, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(5, (64,), generator=g)
    found = charges(model, (X[:8],), head=logits)
    scales = [c for c in found if c.approximate]
    assert {c.parameters for c in scales} == {("0.weight",), ("3.weight",)}  # the eps of the norm breaks these a little
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)
    with Ledger(optimizer, list(found), model) as ledger:
        for _ in range(200):
            index = torch.randint(64, (16,), generator=g)
            optimizer.zero_grad()
            CE(model(X[index]), y[index]).backward()
            optimizer.step()
    for account in ledger.accounts():
        if account.charge.approximate:
            assert account.verdict == "broken" and 1e-12 < account.residual < 1e-2
        else:
            assert account.exact and account.residual < 1e-12, (account.charge.name, account.residual)


def test_matrix_and_generator_agree() -> None:
    torch.manual_seed(0)
    P = {"W": torch.randn(4, 6, dtype=torch.float64), "U": torch.randn(3, 4, dtype=torch.float64)}
    c = matrix(P, [("W", 0)], [("U", 1)])
    assert torch.allclose(c(P)[0], P["W"] @ P["W"].T - P["U"].T @ P["U"])
    lam = torch.randn(1, 4, 4, dtype=torch.float64)
    lam = lam + lam.mT
    moved = {**P, **c.act(P, lam)}
    assert torch.allclose(moved["U"] @ moved["W"], P["U"] @ P["W"])
    assert c.numbers == 10 and len(c.labels()) == 10 and len(c.flat(c(P))) == 10


# -------------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("lr", "mu", "damp", "gamma", "limit"),
    [
        (0.1, 0.0, 0.0, 0.0, 1e-12),
        (0.1, 0.0, 0.0, 5e-3, 1.5e-3),
        (0.05, 0.9, 0.0, 1e-3, 2e-2),
        (0.02, 0.9, 0.0, 5e-3, 2e-2),
        (0.05, 0.9, 0.5, 1e-3, 1e-2),
    ],
)
def test_the_modified_flow_follows_the_charges(lr: float, mu: float, damp: float, gamma: float, limit: float) -> None:
    model, found = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=mu, dampening=damp, weight_decay=gamma)
    for account in train(model, found, optimizer, steps=600):
        curve = modified_flow(account, lr, mu, damp, gamma)
        error = (curve - account.measured).abs().amax(1) / account.measured.abs().amax(1)
        assert float(error.max()) < limit
    flow = ModifiedFlow(lr, mu, damp, gamma)
    assert flow.regime == ("first order" if not mu else "over-damped" if flow.damping**2 > flow.frequency_square else "under-damped")


def test_the_three_regimes_of_the_oscillator_meet_at_the_critical_one() -> None:
    times = torch.linspace(0, 40, 200, dtype=torch.float64)
    critical = (1 - 0.9) ** 2 / (4 * 0.05 * 1.9)
    curves = [ModifiedFlow(0.05, 0.9, 0.0, critical * f).homogeneous(times) for f in (1 - 1e-6, 1.0, 1 + 1e-6)]
    assert [ModifiedFlow(0.05, 0.9, 0.0, critical * f).regime for f in (0.5, 1.0, 2.0)] == ["over-damped", "critical", "under-damped"]
    gamma = ModifiedFlow(0.05, 0.9).damping
    assert torch.allclose(curves[1], torch.exp(-gamma * times) * (1 + gamma * times), atol=1e-9)
    assert float((curves[0] - curves[2]).abs().max()) < 1e-5
    with pytest.raises(InputError):
        ModifiedFlow(0.1, 1.5)


def test_norms_of_scale_invariant_weights() -> None:
    flow = NormFlow(0.02, 0.9, 0.01)
    assert flow.angular_update() == pytest.approx(math.sqrt(2 * 0.02 * 0.01 / 1.9))
    assert NormFlow(0.02, 0.0, 0.01, noise=True).stationary(1.5) == pytest.approx(0.02 * 1.5 / 0.02)
    assert flow.overdamped(1.0, 1.0) is False and flow.overdamped(1.0, 25.0) is True
    with pytest.raises(InputError):
        NormFlow(0.02).rmsprop()


# ------------------------------------------------------------------------------------------------------- T2: the statistical law


def one_step(act: type[nn.Module], seed: int, batches: int = 400, size: int = 8) -> tuple[float, float]:
    """Root-mean-square z score and correlation of the mean one-step change over batches with the prediction, over live units."""
    model, found = mlp(seed, act)
    X, y = data(seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    g = torch.Generator().manual_seed(seed)
    for _ in range(200):
        index = torch.randint(len(X), (size,), generator=g)
        optimizer.zero_grad()
        CE(model(X[index]), y[index]).backward()
        optimizer.step()
    objective = Objective(model, CE)
    (moments, _), gradient = charge_moments(objective, (X, y), found)
    eta = 0.05
    predicted = expected_change(moments, gradient.factor(size), eta).value
    assert isinstance(predicted, Tensor)
    point = dict(objective.params)
    start, changes = found[0](point), []
    for _ in range(batches):
        index = torch.randint(len(X), (size,), generator=g)
        gs = torch.autograd.grad(CE(model(X[index]), y[index]), list(model.parameters()))
        moved = {n: p - eta * gi for (n, p), gi in zip(point.items(), gs, strict=True)}
        changes.append(found[0](moved) - start)
    seen = torch.stack(changes)
    live = seen.std(0) > 1e-12
    z = ((seen.mean(0) - predicted) / (seen.std(0) / batches**0.5))[live]
    return float(z.square().mean().sqrt()), float(torch.corrcoef(torch.stack([seen.mean(0), predicted]))[0, 1])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_statistical_law_gives_the_mean_step(seed: int) -> None:
    z, correlation = one_step(nn.ReLU, seed)
    assert 0.7 < z < 1.4 and correlation > 0.97


def test_the_statistical_law_fails_without_the_symmetry() -> None:
    z, correlation = one_step(nn.Tanh, 0)
    assert z > 5 and correlation < 0.5


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_mean_recursion_of_momentum_reaches_the_slow_manifold(nesterov: bool) -> None:
    from parasym.laws.drift import MeanLedger

    model, found = mlp()
    (moments, _), gradient = charge_moments(Objective(model, CE), data(), found)
    mean = MeanLedger.at(moments.value)
    eta, mu = 1e-3, 0.9
    for _ in range(400):
        before = mean.value
        mean.advance(moments, gradient.factor(8), eta, mu, nesterov=nesterov)
    expected = expected_change(moments, gradient.factor(8), eta, mu, nesterov=nesterov).value
    assert isinstance(expected, Tensor)
    gap = (mean.value - before - expected).norm() / expected.norm()
    assert float(gap) < 1e-9


def test_momentum_noise_drives_a_charge_as_the_mean_recursion_says() -> None:
    from parasym.laws.drift import MeanLedger

    g = torch.Generator().manual_seed(0)
    gs = torch.randn(20000, 60, 3, generator=g, dtype=torch.float64)  # replicas x steps x (u, u, w), white: a flat loss with noise
    for nesterov in (False, True):
        theta, v = torch.zeros(20000, 3, dtype=torch.float64), torch.zeros(20000, 3, dtype=torch.float64)
        a = torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64)
        for k in range(60):
            d = gs[:, k]
            v = d if k == 0 else 0.8 * v + 0.7 * d
            theta = theta - 0.1 * (d + 0.8 * v if nesterov else v)
        seen = (theta.square() @ a).mean()
        P = {"u": torch.zeros(1, 2, dtype=torch.float64), "w": torch.zeros(1, 1, dtype=torch.float64)}
        charge = rescale(P, [("u", 0)], [("w", 1)])
        zero, one = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1.5, dtype=torch.float64)
        from parasym.laws.drift import ChargeMoments

        moments = ChargeMoments(charge, zero, zero, one, zero, one, zero, zero, zero)
        mean = MeanLedger.at(zero)
        for _ in range(60):
            mean.advance(moments, 1.0, 0.1, 0.8, 0.0, 0.3, nesterov)
        # theta is not on a loss with a symmetry here, so <A theta, g> is zero in the mean only: the same expectation
        assert float(mean.value) == pytest.approx(float(seen), rel=0.03), nesterov


# ---------------------------------------------------------------------------------------------------------- T3 and the solvers


def test_one_generator_has_one_root_where_noise_meets_noise_or_decay() -> None:
    root = solve_generator(torch.tensor([1.0, -1.0]), torch.tensor([3.0, 0.5]))
    assert root.value == pytest.approx(0.25 * math.log(6)) and root.residual < 1e-12
    root = solve_generator(torch.tensor([2.0, 1.0, -1.0]), torch.tensor([0.3, 1.0, 0.5], dtype=torch.float64), torch.ones(3), pull=0.2)
    lam, force = root.value, 0.0
    for a, s in zip((2.0, 1.0, -1.0), (0.3, 1.0, 0.5), strict=True):
        force += a * s * math.exp(-2 * a * lam) - 0.2 * a * math.exp(2 * a * lam)
    assert abs(force) < 1e-12
    alone = solve_generator(torch.tensor([1.0]), torch.tensor([1.0]))
    assert alone.status == "not_applicable" and alone.value == math.inf
    decayed = solve_generator(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0]), pull=0.1)
    assert decayed.value == pytest.approx(0.25 * math.log(2.0 / 0.3)) and decayed.status == "ok"
    assert solve_generator(torch.tensor([1.0, -1.0]), torch.zeros(2)).status == "not_applicable"


def deep(seed: int, act: type[nn.Module] = nn.ReLU) -> tuple[nn.Module, list[Charge]]:
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Linear(12, 12), act(), nn.Linear(12, 9), act(), nn.Linear(9, 5)).double()
    P = dict(m.named_parameters())
    return m, [rescale(P, ["0.weight", "0.bias"], ["2.weight"]), rescale(P, ["2.weight", "2.bias"], ["4.weight"])]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_osborne_balances_all_rescalings_and_keeps_the_function(seed: int) -> None:
    model, found = deep(seed)
    X, y = data()
    result = noise_equilibrium(model, CE, (X, y), found, batch_size=8)
    assert result.status == "ok" and result.residual < 1e-10 * result.start
    assert abs(result.loss_after - result.loss_before) < 1e-12
    assert result.fluctuation_after < result.fluctuation_before
    other, _ = deep(seed)
    before = other(X)
    result.apply(other)
    assert torch.allclose(before, other(X), atol=1e-12)
    moments, gradient = charge_moments(Objective(other, CE), (X, y), found)  # measured again from scratch at the new weights
    dead = {j for name, j, _ in result.no_root}
    for m in moments:
        gap = imbalance(m, gradient.factor(8))
        assert all(abs(float(v)) < 1e-10 for j, v in enumerate(gap) if j not in dead)


def test_the_balanced_point_is_not_balanced_without_the_symmetry() -> None:
    model, found = deep(0, nn.Tanh)
    X, y = data()
    result = noise_equilibrium(model, CE, (X, y), found, batch_size=8)
    assert abs(result.loss_after - result.loss_before) > 1e-6  # a tanh unit is no symmetry: the loss tells


def test_adam_balances_the_root_mean_squares() -> None:
    model, found = deep(0)
    moments = gradient_moments(Objective(model, CE), data())
    second = moments.second(8)
    result = osborne(dict(model.named_parameters()), second, found, rule="adam")
    for c in found:
        roots = {n: result.second[n].sqrt().sqrt() for n in c.parameters}
        plus, minus = c.split(roots, roots)
        live = (plus > 0) & (minus > 0)
        assert float(((plus - minus)[live] / plus[live]).abs().max()) < 1e-12
    with pytest.raises(InputError):
        osborne(dict(model.named_parameters()), second, found, rule="adam", pull=0.1)


@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("hidden", [3, 5])
def test_a_linear_pair_is_balanced_in_closed_form(decay: float, hidden: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, hidden, bias=False), nn.Linear(hidden, 3, bias=False)).double()
    c = matrix(dict(model.named_parameters()), [("0.weight", 0)], [("1.weight", 1)])
    X, Y = torch.randn(200, 5, dtype=torch.float64), torch.randn(200, 3, dtype=torch.float64)
    mse = lambda a, b: (a - b).square().sum(-1).mean()  # noqa: E731
    result = noise_equilibrium(model, mse, (X, Y), [c], batch_size=4, lr=0.1, weight_decay=decay)
    assert result.status == "ok" and result.residual < 1e-10
    assert abs(result.loss_after - result.loss_before) < 1e-11
    P = result.params
    moments, gradient = charge_moments(_at(model, mse, P), (X, Y), [c])
    _, up, down = moments[0].of_batch(gradient.factor(4))
    grow, shrink = c.split(P, P)
    force = up - down - 2 * decay / 0.1 * (grow - shrink)
    assert float(force.norm() / (up.norm() + down.norm())) < 1e-10


def _at(model: nn.Module, loss: Any, params: dict[str, Tensor]) -> Objective:
    objective = Objective(model, loss)
    objective.params.update(params)
    return objective


def test_pair_from_product_and_chain_meet_their_conditions() -> None:
    g = torch.Generator().manual_seed(0)
    E, X = (q @ q.T + torch.eye(len(q), dtype=q.dtype) for q in (torch.randn(n, n, generator=g, dtype=torch.float64) for n in (3, 4)))
    M = torch.randn(3, 4, generator=g, dtype=torch.float64)
    U, W = pair_from_product(M, E, X, hidden=5)
    assert torch.allclose(U @ W, M) and torch.allclose(U.T @ E @ U, W @ X @ W.T, atol=1e-12)
    weights = chain_equilibrium(M, X, E, (5, 4, 6))
    product = weights[0]
    for W in weights[1:]:
        product = W @ product
    assert torch.allclose(product, M)
    best = chain_fluctuation(weights, X, E)
    for _ in range(50):
        B = torch.eye(5, dtype=torch.float64) + 0.3 * torch.randn(5, 5, generator=g, dtype=torch.float64)
        moved = [B @ weights[0], weights[1] @ torch.linalg.inv(B), *weights[2:]]
        assert chain_fluctuation(moved, X, E) >= best * (1 - 1e-12)
    assert torch.allclose(solve_pair(X, X), torch.zeros(4, 4, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("decades", [1, 4, 8, 11])
def test_a_pair_of_ill_conditioned_noises_is_balanced(decades: int) -> None:
    """Roots of products would lose the small directions, and send the weights to 1e149."""
    g = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(6, 6, generator=g, dtype=torch.float64)).Q for _ in range(2))
    d = torch.logspace(0, -decades, 6, dtype=torch.float64)
    inward, outward = (Q * d) @ Q.T, (P * d.flip(0)) @ P.T
    B = torch.linalg.matrix_exp(solve_pair(inward, outward))
    a, b = B @ outward @ B, torch.linalg.solve(B, torch.linalg.solve(B, inward).T)
    assert float((a - b).norm()) < 1e-12 * float(a.norm() + b.norm()) and float((inward - outward).norm()) > 0.1 * float(inward.norm())


# --------------------------------------------------------------------------------------------------------------- one call


def test_one_call_gives_predicted_and_measured_curves() -> None:
    model, found = mlp()
    X, y = data()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), batch_size=16, shuffle=True)
    before = [p.clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.02, weight_decay=1e-3)
    result = predict(model, CE, loader, optimizer, 120, charges_of=found, moments=(X, y))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and not optimizer.state
    first = result.curves[0]
    assert first.verdict == "predicted" and first.error["ledger"] < 1e-12
    assert first.error["modified_flow"] < 1e-3 and first.error["statistical"] < 0.5
    assert "without replacement" in result.assumptions[0] and "rescale" in str(result)
    adam = predict(model, CE, loader, torch.optim.Adam(model.parameters(), 1e-3), 5, charges_of=found)
    assert adam.curves[0].verdict == "measured" and "statistical" in adam.curves[0].notes
    import json

    json.dumps(result.to_dict(), allow_nan=False)


def test_bad_input_to_predict_is_refused() -> None:
    model, found = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match="level"):
        predict(model, CE, data(), optimizer, 5, charges_of=found, levels=("wrong",))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="none of the model"):
        predict(mlp()[0], CE, data(), optimizer, 5, charges_of=found)
    with pytest.raises(InputError, match="different lengths"):
        rescale(dict(model.named_parameters()), ["0.weight"], [("2.weight", 0)])
    with pytest.raises(InputError, match="no parameter"):
        scale(dict(model.named_parameters()), ["nothing"])


# ------------------------------------------------------------------------------------------------------------ identities


def test_gradient_and_hessian_identities_tell_exact_approximate_and_broken_apart() -> None:
    batch = data()
    for make, kinds in ((mlp, ["ok", "ok"]), (normed, ["ok", "ok", "ok"])):
        model, found = make()
        for check in (gradient_geometry, hessian_geometry):
            assert [e.status for e in check(Objective(model, CE), batch, found)] == kinds
    model, found = normed(eps=1e-5)
    for check in (gradient_geometry, hessian_geometry):
        first = check(Objective(model, CE), batch, found)[0]
        assert first.status == "violated" and ("approximate" in first.note or check is hessian_geometry)
    for act in (nn.Tanh, nn.GELU):
        model, found = mlp(act=act)
        for check in (gradient_geometry, hessian_geometry):
            assert check(Objective(model, CE), batch, found)[0].note == "broken on this loss"
    model, found = mlp()
    mse = lambda out, y: (out - nn.functional.one_hot(y, 5)).square().sum(-1).mean()  # noqa: E731
    assert [e.status for e in gradient_geometry(Objective(model, mse), batch, found)] == ["ok", "violated"]
    model[2].requires_grad_(False)  # type: ignore[index]
    assert all(e.status == "not_applicable" for e in hessian_geometry(Objective(model, CE), batch, found))


def test_the_tangent_is_the_derivative_of_the_action() -> None:
    torch.manual_seed(0)
    P = {"W": torch.randn(4, 6, dtype=torch.float64), "U": torch.randn(3, 4, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    for c in (matrix(P, [("W", 0)], [("U", 1)]), rescale(P, ["W", "b"], ["U"]), translation(P, ["U"]), rescale(P, [("W", 1)], [("W", 1)])):
        lam = torch.randn(c.shape, dtype=torch.float64)
        lam = lam + lam.mT if c.kind == "matrix" else lam
        up, down = c.act(P, 1e-6 * lam), c.act(P, -1e-6 * lam)
        for n, v in tangent(c, P, lam).items():
            assert torch.allclose(v, (up[n] - down[n]) / 2e-6, atol=1e-8)


# -------------------------------------------------------------------------------------------------------- adaptive rules


ADAPTIVE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-3),
    "Adam, coupled decay": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.1, betas=(0.8, 0.95)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, alpha=0.9, weight_decay=0.01),
}


def adapt(rule: str, act: type[nn.Module], steps: int = 200) -> AdaptiveLedger:
    model, found = mlp(act=act)
    X, y = data()
    optimizer = ADAPTIVE[rule](model.parameters())
    g = torch.Generator().manual_seed(5)
    with AdaptiveLedger(optimizer, found[:1], model) as ledger:
        for _ in range(steps):
            index = torch.randint(len(X), (32,), generator=g)
            optimizer.zero_grad()
            CE(model(X[index]), y[index]).backward()
            optimizer.step()
    return ledger


@pytest.mark.parametrize("rule", list(ADAPTIVE))
def test_the_charge_weighted_by_the_inverse_preconditioner_has_an_exact_law(rule: str) -> None:
    (account,) = adapt(rule, nn.ReLU).accounts()
    assert account.status == "ok" and account.residual < 1e-12
    assert float(account.metric.abs().sum()) > 0 and float(account.source.abs().max()) > 1e-9
    (broken,) = adapt(rule, nn.Tanh).accounts()
    assert broken.status == "violated" and broken.residual > 1e-5


def test_rules_without_an_adaptive_law_are_refused() -> None:
    model, found = mlp()
    P = list(model.parameters())
    for optimizer in (torch.optim.SGD(P, 0.1), torch.optim.Adam(P, amsgrad=True), torch.optim.RMSprop(P, momentum=0.9)):
        with pytest.raises(InputError):
            AdaptiveLedger(optimizer, found[:1], model)
    with pytest.raises(InputError, match="matrix"):
        AdaptiveLedger(torch.optim.Adam(P), found, model)


@pytest.mark.slow
def test_a_transformer_block_is_moved_to_its_noise_equilibrium(block_charges: ChargeSet) -> None:
    torch.manual_seed(0)
    model = Block().double()
    g = torch.Generator().manual_seed(1)
    X, y = torch.randn(200, 5, 8, generator=g, dtype=torch.float64), torch.randint(4, (200,), generator=g)
    found = [c for c in block_charges if c.kind != "linear"]  # query-key and value-output GL, gains, and ReLU units: they share weights
    result = noise_equilibrium(model, CE, (X, y), found, batch_size=8, passes=40, tol=1e-8)
    assert result.status == "ok" and abs(result.loss_after - result.loss_before) < 1e-12
    before = model(X)
    result.apply(model)
    assert torch.allclose(before, model(X), atol=1e-11) and result.fluctuation_after < 0.95 * result.fluctuation_before
    moments, gradient = charge_moments(Objective(model, CE), (X, y), found)
    assert max(float(imbalance(m, gradient.factor(8)).abs().max()) for m in moments) < 1e-7
    stopped = noise_equilibrium(Block().double(), CE, (X, y), found, batch_size=8, passes=2)
    assert stopped.status == "not_converged" and "after 2 passes" in stopped.note


def test_charges_are_found_with_the_reasons_where_there_are_none() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 5)).double()
    found = charges(model, (torch.randn(8, 6, dtype=torch.float64),), head=logits)
    assert sorted((c.kind, c.numbers, c.level) for c in found) == [
        ("linear", 1, "loss"), ("linear", 8, "loss"), ("quadratic", 8, "function")
    ]  # fmt: skip
    assert isinstance(model[2], nn.Dropout) and model[2].p == 0.3
    linear = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5)).double()
    pair = charges(linear, (torch.randn(8, 6, dtype=torch.float64),))
    assert any("no total derivative" in why for _, why in pair.without)  # a shift that moves with the weights
    kinds = {c.kind: c for c in pair}
    assert kinds["matrix"].numbers == 6
    X, y = data(d=6)
    for net, these in ((model, list(found)), (linear, [kinds["matrix"]])):
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
        with Ledger(optimizer, these, net) as ledger:
            for _ in range(100):
                optimizer.zero_grad()
                CE(net(X), y).backward()
                optimizer.step()
        assert all(a.exact and a.residual < 1e-12 for a in ledger.accounts())


def test_a_direction_that_dropout_masks_has_no_charge_in_training() -> None:
    """A norm takes the mean out of a stream, and not out of a masked one: the gradient tells which charges are left."""

    def network(p: float) -> nn.Sequential:
        torch.manual_seed(0)
        parts = [nn.Linear(4, 6), nn.Dropout(p), nn.LayerNorm(6), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(p), nn.Linear(8, 3)]
        return nn.Sequential(*parts)

    x, y = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3
    trained = network(0.3)
    kept, all_ = charges(trained, (x,)), charges(network(0.0), (x,))
    nn.functional.cross_entropy(trained(x), y).backward()
    params = dict(trained.named_parameters())
    along = {}
    for c in all_:
        gradient = {n: params[n].grad for n in c.parameters}
        along[c.name, c.parameters] = float(c.form(gradient, {n: params[n].detach() for n in c.parameters}).abs().max())
    left = {(c.name, c.parameters) for c in kept}
    assert len(left) == 3 and {k for k, v in along.items() if v < 1e-5} == left
    assert len(along) == 5 and min(v for k, v in along.items() if k not in left) > 1e-3
    assert sum("dropout" in why for _, why in kept.without) == 2
    assert {(c.name, c.parameters) for c in charges(trained.eval(), (x,))} == set(along)  # the evaluated network has them all
