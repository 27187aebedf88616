"""Acceptance of the laws room as specified (T1-T4), on digits and real architectures; and what bad input does to `predict` and `Ledger`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.gallery import law_of_balance, neural_thermodynamics, noise_equilibrium
from parasym.gallery.digits import digits
from parasym.laws.charges import Charge, charges, rescale, scale, translation
from parasym.laws.drift import charge_moments, expected_change
from parasym.laws.equilibrium import noise_equilibrium as balanced_point
from parasym.laws.flow import noether_flow
from parasym.laws.ledger import Ledger
from parasym.laws.predict import predict
from parasym.measure.gradients import Objective
from parasym.simulate import SGD, Ensemble, Snapshots, descent, dot, log
from parasym.solvable.balance import log_density, reduced_sde, sparsity_transition

CE = nn.functional.cross_entropy


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    split = digits()
    return split.x.double(), split.y


def net(seed: int, act: type[nn.Module] = nn.ReLU, norm: bool = False) -> tuple[nn.Module, list[Charge]]:
    """64-32-10 with its charges: rescaling (or scale and affine rescaling behind a batch norm) and softmax translation."""
    torch.manual_seed(seed)
    if norm:
        model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32, eps=1e-300), act(), nn.Linear(32, 10)).double()
        P = dict(model.named_parameters())
        return model, [scale(P, ["0.weight"]), rescale(P, ["1.weight", "1.bias"], ["3.weight"]), translation(P, ["3.weight", "3.bias"])]
    model = nn.Sequential(nn.Linear(64, 32), act(), nn.Linear(32, 10)).double()
    P = dict(model.named_parameters())
    return model, [rescale(P, ["0.weight", "0.bias"], ["2.weight"]), translation(P, ["2.weight", "2.bias"])]


def steps(model: nn.Module, data: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer, count: int, batch: int, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        index = torch.randint(len(data[0]), (batch,), generator=g)
        optimizer.zero_grad()
        CE(model(data[0][index]), data[1][index]).backward()
        optimizer.step()


RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "sgd with decay": lambda p: torch.optim.SGD(p, 0.1, weight_decay=1e-2),
    "heavy ball": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=1e-2),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rule", list(RULES))
def test_t1_ledgers_on_digits(rule: str, norm: bool, images: tuple[Tensor, Tensor]) -> None:
    model, found = net(0, norm=norm)
    optimizer = RULES[rule](model.parameters())
    with Ledger(optimizer, found, model) as ledger:
        steps(model, images, optimizer, 300, 64)
    for account in ledger.accounts():
        assert account.residual <= 1e-12, (account.charge.name, account.residual)
        assert account.exact == (rule != "adamw")
        if account.charge.kind != "linear":
            assert float((account.measured[-1] - account.measured[0]).abs().max()) > 1e-4


def one_step(
    model: nn.Module, charge: Charge, data: tuple[Tensor, Tensor], seed: int, batches: int = 400, size: int = 8
) -> tuple[float, float]:
    """z and correlation of T2: 400 batches of 8 from a net trained for 200 steps."""
    steps(model, data, torch.optim.SGD(model.parameters(), 0.1), 200, size, seed)
    objective, eta, g = Objective(model, CE), 0.05, torch.Generator().manual_seed(100 + seed)
    (moments, *_), gradient = charge_moments(objective, data, [charge])
    predicted = expected_change(moments, gradient.factor(size), eta).value
    assert isinstance(predicted, Tensor)
    point, index = dict(objective.params), torch.randint(len(data[0]), (batches, size), generator=g)
    slopes = torch.func.vmap(torch.func.grad(lambda p, a, b: objective(p, (a, b))), (None, 0, 0))(point, data[0][index], data[1][index])
    seen = torch.func.vmap(lambda gs: charge({n: p - eta * gs[n] for n, p in point.items()}))(slopes) - charge(point)
    live = seen.std(0) > 1e-12
    mean, theory = seen.mean(0)[live], predicted[live]
    z = (mean - theory) / (seen.std(0)[live] / batches**0.5)
    return float(z.square().mean().sqrt()), float(torch.corrcoef(torch.stack([mean, theory]))[0, 1])


def test_t2_the_statistical_law_on_digits(images: tuple[Tensor, Tensor]) -> None:
    """z over the units of three nets together: the units of one net share their batches, so theirs alone wanders (0.77 to 1.45)."""
    found = []
    for seed in range(3):
        model, made = net(seed)
        found.append(one_step(model, made[0], images, seed))
    pooled = math.sqrt(sum(z**2 for z, _ in found) / 3)
    assert 0.7 <= pooled <= 1.4 and min(c for _, c in found) > 0.97


def test_t2_fails_for_tanh_units(images: tuple[Tensor, Tensor]) -> None:
    model, found = net(0, nn.Tanh)
    z, correlation = one_step(model, found[0], images, 0)
    assert z > 10 and correlation < 0.5


def test_t3_osborne_on_digits(images: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 10)).double()
    P = dict(model.named_parameters())
    found = [rescale(P, ["0.weight", "0.bias"], ["2.weight"]), rescale(P, ["2.weight", "2.bias"], ["4.weight"])]
    result = balanced_point(model, CE, images, found, batch_size=8)
    assert result.residual < 1e-10 * result.start and abs(result.loss_after - result.loss_before) < 1e-12


def test_t4_sgd_and_rmsprop_end_at_their_own_balance() -> None:
    """d = 3: |u|^2 / w^2 is d for SGD, within 5 %, and d^2 for a slow RMSprop, within 8 %, from both sides; three seeds."""
    result = neural_thermodynamics.rules(neural_thermodynamics.RulesConfig())
    assert all(c.passed for c in result.checks), [(c.claim, c.measured) for c in result.checks if not c.passed]
    assert any("l1 balance" in c.claim and c.tolerance == 0.08 for c in result.checks)
    d, unit = 3, 3**-0.5

    def gradient(w: Any, p: Any, draws: Any) -> Any:
        x, across_at = draws.normals(d), w[:d]
        across = dot(across_at, x)
        r = w[d] * across - unit * dot([1.0] * d, x) - draws.normal()
        return [*(r * w[d] * a for a in x), r * across]

    config = noise_equilibrium.RankOneConfig()
    times = tuple(config.steps // 2 + k * config.steps // 40 for k in range(20))
    for ratio in (1.0, 4.0 * d):
        size = ratio**-0.25
        for seed in (0, 1, 2):
            run = Ensemble(descent("rank one", gradient, SGD(), [unit / size] * d + [size]), 500, {"lr": config.eta}, seed)
            found = run.run(times[-1] + 1, [Snapshots(times, lambda s, p: [log(dot(s[:d], s[:d])) - log(s[d] * s[d])])])
            assert float(found[0].value.mean().exp()) == pytest.approx(d, rel=0.05)


# ------------------------------------------------------------------------------------------------ real architectures


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["heavy ball", "nesterov", "adamw"])
def test_ledgers_on_a_gpt2_from_its_config(rule: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20,
        n_positions=8,
        n_embd=12,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
        use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config).double().train()
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (64, 8), generator=g)
    found = charges(model, (), {"input_ids": ids[:4]}, approximate=False)
    matrices = [c for c in found if c.kind == "matrix"]
    assert len(matrices) >= 2  # query-key and value-output of both heads
    optimizer = RULES[rule](model.parameters())
    with Ledger(optimizer, list(found), model) as ledger:
        for _ in range(100):
            batch = ids[torch.randint(64, (8,), generator=g)]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    for account in ledger.accounts():
        assert account.residual < 1e-12, (account.charge.name, account.residual)
        assert account.exact == (rule != "adamw"), account.note
    assert any(float((a.measured[-1] - a.measured[0]).abs().max()) > 1e-4 for a in ledger.accounts() if a.charge.kind == "matrix")


class Residual(nn.Module):
    """A residual stage of a batch-norm network: two convolutions and a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.m, self.n = (nn.BatchNorm2d(channels, eps=1e-300) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.n(self.b(torch.relu(self.m(self.a(x))))))


@pytest.mark.parametrize("rule", ["sgd with decay", "heavy ball", "nesterov"])
def test_ledgers_on_a_residual_batch_norm_network(rule: str, images: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)
    model = nn.Sequential(
        stem, nn.BatchNorm2d(6, eps=1e-300), nn.ReLU(), Residual(6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10)
    )
    model = model.double()
    P = dict(model.named_parameters())
    found = [
        scale(P, ["0.weight"]), scale(P, ["3.a.weight"]), scale(P, ["3.b.weight"]),
        rescale(P, ["3.m.weight", "3.m.bias"], ["3.b.weight"], "affine"), translation(P, ["6.weight", "6.bias"]),
    ]  # fmt: skip
    data = images[0].reshape(-1, 1, 8, 8), images[1]
    optimizer = RULES[rule](model.parameters())
    with Ledger(optimizer, found, model) as ledger:
        steps(model, data, optimizer, 60, 16)
    for account in ledger.accounts():
        assert account.exact and account.residual < 1e-12, (account.charge.name, account.residual)
        if account.charge.kind == "quadratic":
            assert float((account.measured[-1] - account.measured[0]).abs().max()) > 1e-4


# ------------------------------------------------------------------------------------------------ bad input


def loader(images: tuple[Tensor, Tensor], size: int, count: int = 128, drop: bool = True) -> torch.utils.data.DataLoader[Any]:
    data = torch.utils.data.TensorDataset(images[0][:count], images[1][:count])
    return torch.utils.data.DataLoader(data, batch_size=size, drop_last=drop)


def test_a_loss_that_is_no_mean_is_refused_where_it_matters(images: tuple[Tensor, Tensor]) -> None:
    model, found = net(0)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for reduction, message in (("sum", "sum over"), ("none", "one number")):
        loss = lambda a, b, r=reduction: CE(a, b, reduction=r)  # noqa: E731
        with pytest.raises(InputError, match=message):
            predict(model, loss, loader(images, 16), optimizer, 3, charges_of=found)
    exact = predict(model, lambda a, b: CE(a, b, reduction="sum"), loader(images, 16), optimizer, 3, charges_of=found, levels=("ledger",))
    assert exact.curves[0].status == "ok" and exact.curves[0].error["ledger"] < 1e-12  # the ledger holds for any loss


def test_batch_norm_is_predicted_from_batches_and_uneven_ones_are_refused(images: tuple[Tensor, Tensor]) -> None:
    model, found = net(0, norm=True)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    result = predict(model, CE, loader(images, 16), optimizer, 20, charges_of=found)
    assert result.curves[0].status == "ok" and math.isfinite(result.curves[0].error["statistical"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="drop_last"):
        predict(model, CE, loader(images, 48, drop=False), optimizer, 3, charges_of=found)


def test_frozen_parameters_take_the_charge_out_of_the_law(images: tuple[Tensor, Tensor]) -> None:
    model, found = net(0)
    model[2].weight.requires_grad_(False)  # type: ignore[index, union-attr]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    result = predict(model, CE, loader(images, 16), optimizer, 5, charges_of=found, levels=("ledger",))
    assert [c.status for c in result.curves] == ["not_applicable", "not_applicable"]
    assert all("frozen" in c.notes["ledger"] for c in result.curves)
    full = predict(model, CE, loader(images, 16), optimizer, 5, charges_of=found)  # the statistical law has nothing to say there
    assert all(c.status == "not_applicable" for c in full.curves)


def test_a_step_to_nan_ends_the_books_with_what_was_earned(images: tuple[Tensor, Tensor]) -> None:
    model, found = net(0)
    whole = list(loader(images, 16))
    poisoned = [*whole[:3], (whole[3][0] * math.nan, whole[3][1]), *whole[4:]]
    result = predict(
        model, CE, poisoned, torch.optim.SGD(model.parameters(), 0.1), 8, charges_of=found, levels=("ledger", "statistical"), moments=whole
    )
    curve = result.curves[0]
    assert len(curve.steps) == 4 and "not finite" in curve.notes["ledger"] and bool(torch.isfinite(curve.measured).all())
    assert curve.predicted["statistical"].shape == curve.measured.shape and curve.error["ledger"] < 1e-12
    with pytest.raises(InputError, match="not finite"):  # a poisoned batch in the noise's own data is an error, not a number
        predict(model, CE, poisoned, torch.optim.SGD(model.parameters(), 0.1), 8, charges_of=found)


def test_rules_that_need_a_closure_are_stepped_with_one(images: tuple[Tensor, Tensor]) -> None:
    model, found = net(0)
    result = predict(model, CE, loader(images, 64), torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3), 4, charges_of=found)
    first = result.curves[0]
    assert first.verdict == "measured" and first.error["ledger"] < 1e-12 and "LBFGS" in first.notes["ledger"]
    assert float(result.losses[-1]) < float(result.losses[0])


def test_a_resumed_run_keeps_its_books_exact(images: tuple[Tensor, Tensor]) -> None:
    model, found = net(0)
    make = RULES["heavy ball"]
    optimizer = make(model.parameters())
    steps(model, images, optimizer, 30, 32)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, _ = net(1)
    again.load_state_dict(saved[0])
    fresh = make(again.parameters())
    fresh.load_state_dict(saved[1])
    with Ledger(fresh, found, again) as ledger:
        steps(again, images, fresh, 30, 32, seed=1)
    assert all(a.exact and a.residual < 1e-12 for a in ledger.accounts()), [a.note for a in ledger.accounts()]
    forgotten = make(again.parameters())  # a restart without the optimiser's state is another run, and its books close too
    with Ledger(forgotten, found, again) as ledger:
        steps(again, images, forgotten, 10, 32, seed=2)
    assert all(a.exact and a.residual < 1e-12 for a in ledger.accounts())


def test_an_empty_or_malformed_loader_is_refused(images: tuple[Tensor, Tensor]) -> None:
    model, found = net(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def nothing() -> Iterator[Any]:
        return iter(())

    for data, message in (
        ([], "no batch"),
        (nothing(), "no batch"),
        (3, "loader"),
        ([(images[0][:4], images[1][:3])], "share their first"),
    ):
        with pytest.raises(InputError, match=message):
            predict(model, CE, data, optimizer, 2, charges_of=found)


# ------------------------------------------------------------------------------------------------ flows without training


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_the_noether_flow_is_where_sgd_carries_a_charge_along_the_minimum(decay: float) -> None:
    """f = w (u.x) from a global minimum, |u|^2 / w^2 = 1: the mean charge of SGD against the flow, and its end."""
    d, eta = 3, 0.01
    unit, g = d**-0.5, torch.Generator().manual_seed(0)

    class Rank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.w = nn.Parameter(torch.full((d,), unit, dtype=torch.float64)), nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * (x @ self.u)

    model = Rank()
    raw = torch.linalg.qr(torch.randn(4096, d + 1, generator=g, dtype=torch.float64)).Q * 64
    x, e = raw[:, :d], raw[:, d]
    charge = rescale({"u": model.u[None], "w": model.w[None]}, [("u", 0)], [("w", 1)])
    objective = Objective(_Row(model), lambda a, b: 0.5 * (a - b).square().mean())
    (found,), gradient = charge_moments(objective, (x, x @ model.u.detach() + e), [charge])
    times = [0.0, 2.0, 5.0, 10.0]
    flow = noether_flow(found, objective.params, gradient.factor(1), eta, times, decay)
    theory = flow.charge[:, 0]
    assert float(flow.limit) == pytest.approx(0.25 * math.log((d + 2 * decay / eta) / (1 + 2 * decay / eta)), rel=0.05)

    def step(w: Any, p: Any, draws: Any) -> list[Any]:
        z = draws.normals(d)
        across = dot(w[:d], z)
        r = w[d] * across - unit * dot([1.0] * d, z) - draws.normal()
        return [*(r * w[d] * a + p.decay * b for a, b in zip(z, w[:d], strict=True)), r * across + p.decay * w[d]]

    at = tuple(round(t / eta) for t in times)
    run = Ensemble(descent("rank one", step, SGD(), [unit] * d + [1.0]), 20_000, {"lr": eta, "decay": decay}, 0)
    seen = run.run(at[-1] + 1, [Snapshots(at, lambda s, p: [dot(s[:d], s[:d]) - s[d] * s[d]])])[0].value[:, 0]
    if decay:  # decay also moves the loss off its minimum, which the flow leaves out
        assert float(seen[1]) == pytest.approx(float(theory[1]), abs=0.15 * abs(float(theory[-1])))
    else:
        assert torch.allclose(seen, theory, atol=0.06 * float(theory[-1].abs()))
    assert abs(float(theory[-1])) > 0.05
    with pytest.raises(InputError, match="quadratic"):
        noether_flow(
            charge_moments(objective, (x, e), [translation(objective.params, [("u", 1)])])[0][0], objective.params, 1.0, eta, times
        )
    with pytest.raises(InputError, match="lr > 0"):
        noether_flow(found, objective.params, 1.0, 0.0, times)


class _Row(nn.Module):
    """The rank-one model with its weights as matrices, so that the units run over one axis."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.u, self.w = nn.Parameter(model.u.detach()[None].clone()), nn.Parameter(model.w.detach()[None].clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.u.T * self.w)[:, 0]


@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_the_reduced_sde_has_the_closed_density_as_its_stationary_law(factors: int) -> None:
    """No probability flows: drift p = (b^2 p)' / 2 (law-of-balance R4 against R5), from the logarithmic derivative of b^2 p."""
    m = law_of_balance.moments_of(20.0)
    t = 0.3 * sparsity_transition(m)[0]
    drift, square = reduced_sde(m, t, factors)
    x = torch.linspace(-2.0, 1.0, 30_001, dtype=torch.float64)
    v = x.exp()
    logs = log_density(m, t, factors, x) + square(v).log()
    slope = (logs[2:] - logs[:-2]) / (v[2:] - v[:-2])
    gap = (2 * drift(v) / square(v))[1:-1] - slope
    assert float(gap.abs().max() / slope.abs().max()) < 1e-5
    _, hot = reduced_sde(m, 2 * t, factors)
    assert float(((2 * drift(v) / hot(v))[1:-1] - slope).abs().max() / slope.abs().max()) > 1e-2
    with pytest.raises(InputError):
        reduced_sde(m, 0.0, 2)
