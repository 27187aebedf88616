"""Per-sample gradients and their moments against loops over samples, and the models and losses that have none."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.measure.balance import heads, layers, units
from parasym.measure.gradients import Objective, batch_size, gradient_moments, layerwise, per_sample
from parasym.measure.ntk import kernel

CE = F.cross_entropy


class Tokens(nn.Module):
    """Embedding, a position table held as a bare parameter, layer norm, linear layers over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.place = nn.Embedding(11, 8, padding_idx=0), nn.Parameter(torch.randn(6, 8))
        self.n, self.f, self.h = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.h(torch.relu(self.f(self.n(self.e(x) + self.place)))).mT
        return out


def cases() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(1)

    def floats(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    y = torch.randint(4, (7,), generator=g)
    tokens = torch.randint(11, (7, 6), generator=g)
    mlp = nn.Sequential(nn.Linear(5, 9), nn.ReLU(inplace=True), nn.Linear(9, 4))
    conv = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3), nn.GroupNorm(2, 6), nn.GELU(), nn.Conv2d(6, 4, 2), nn.Flatten(), nn.Linear(36, 4)
    )
    frozen = nn.Sequential(nn.Conv1d(3, 6, 3, padding="same"), nn.BatchNorm1d(6), nn.Tanh(), nn.Flatten(), nn.Linear(30, 4)).eval()
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(shared, nn.Tanh(), shared)
    return {
        "mlp": (mlp.double(), floats(7, 5), y),
        "conv": (conv.double(), floats(7, 3, 8, 8), y),
        "batch norm in eval mode": (frozen.double(), floats(7, 3, 5), y),
        "tokens": (Tokens().double(), tokens, tokens),
        "tied": (tied.double(), floats(7, 4), y),
        "lstm": (Last().double(), floats(7, 3, 5), y),
    }


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.r = nn.LSTM(5, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.r(x)[0][:, -1]
        return out


def by_hand(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    rows = []
    for i in range(len(x)):
        rows.append(torch.autograd.grad(CE(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters())))
    return {n: torch.stack([r[k] for r in rows]) for k, (n, _) in enumerate(model.named_parameters())}


EXPECTED = {"mlp": "one backward pass", "conv": "one backward pass", "batch norm in eval mode": "one backward pass",
            "tokens": "one backward pass", "tied": "vmap", "lstm": "one by one"}  # fmt: skip


@pytest.mark.parametrize("name", list(EXPECTED))
@pytest.mark.parametrize("fast", [True, False])
def test_moments_equal_those_of_a_loop_over_samples(name: str, fast: bool) -> None:
    model, x, y = cases()[name]
    before = [p.clone() for p in model.parameters()], torch.get_rng_state()
    G = by_hand(model, x, y)
    found = gradient_moments(Objective(model, CE), [(x[:4], y[:4]), (x[4:], y[4:])], layers=fast, chunk=None if fast else 3)
    if fast:
        assert found.backend == EXPECTED[name], found.reason
    for n, g in G.items():
        assert torch.allclose(found.mean[n], g.mean(0), atol=1e-12)
        assert torch.allclose(found.square[n], g.square().mean(0), atol=1e-12), n
    norms = sum(g.flatten(1).square().sum(1) for g in G.values())
    assert isinstance(norms, Tensor) and torch.allclose(found.norms, norms, rtol=1e-10)
    flat = torch.cat([g.flatten(1) for g in G.values()], 1)
    assert found.noise_trace().value == pytest.approx(float(flat.T.cov().trace()), rel=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert torch.equal(before[1], torch.get_rng_state()) and all(p.grad is None for p in model.parameters())


def test_forms_and_batch_moments() -> None:
    model, x, y = cases()["mlp"]
    G = by_hand(model, x, y)
    found = gradient_moments(Objective(model, CE), (x, y), forms={"w": lambda g: g["0.weight"].square().sum(1)}, chunk=2)
    exact = G["0.weight"].square().sum(2)
    assert torch.allclose(found.forms["w"][0], exact.mean(0)) and torch.allclose(found.forms["w"][1], exact.std(0) / 7**0.5)
    assert found.factor(2) == 0.5 and found.factor(7, replace=False) == 0 and found.factor(2, replace=False) == pytest.approx(5 / 12)
    second = found.second(2)["0.bias"]
    pairs = torch.stack([(G["0.bias"][i] + G["0.bias"][j]) / 2 for i in range(7) for j in range(7)])
    assert torch.allclose(second, pairs.square().mean(0))
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_noise_scale_is_the_batch_size_of_equal_signal_and_noise() -> None:
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.ones(4000, 1, dtype=torch.float64)
    y = 3 * torch.randn(4000, 1, dtype=torch.float64) + 1  # gradient of (w - y)^2 / 2 is w - y
    with torch.no_grad():
        model.weight.zero_()
    found = gradient_moments(Objective(model, lambda a, b: 0.5 * (a - b).square().mean()), (x, y))
    scale = found.noise_scale()
    assert float(scale) == pytest.approx(9.0, rel=0.3) and scale.stderr is not None
    drowned = gradient_moments(Objective(model, lambda a, b: 0.5 * (a - b).square().mean()), (x, y - y.mean()))
    assert drowned.noise_scale().status == "not_applicable" and drowned.mean_norm_square().status == "not_converged"


def test_losses_that_are_no_mean_over_samples_are_refused() -> None:
    model, x, y = cases()["mlp"]
    bad: dict[str, Any] = {
        "sum over the 7": lambda a, b: CE(a, b, reduction="sum"),
        "not a mean over samples": lambda a, b: CE(a, b, weight=torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)),
        "one number": lambda a, b: CE(a, b, reduction="none"),
    }
    for message, loss in bad.items():
        for fast in (True, False):
            with pytest.raises(InputError, match=message):
                gradient_moments(Objective(model, loss), (x, y), layers=fast)


def test_batch_coupled_layers_are_refused_by_name_and_measured_between_batches() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)).double()
    x, y = torch.randn(24, 5, dtype=torch.float64), torch.randint(4, (24,))
    loader = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match="normalises by batch statistics"):
        gradient_moments(Objective(model, CE), loader)
    found = gradient_moments(Objective(model, CE), loader, unit="batch")
    assert found.count == 3 and found.size == 8 and found.noise_trace().ok
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="drop_last"):
        gradient_moments(Objective(model, CE), [*loader, (x[:3], y[:3])], unit="batch")
    gradient_moments(Objective(model.eval(), CE), loader)


def test_bad_batches_and_models_are_refused_with_the_reason() -> None:
    model, x, y = cases()["mlp"]
    objective = Objective(model, CE)
    for batch, message in (
        ((x[:0], y[:0]), "empty"),
        ((x, y[:3]), "share their first"),
        ((x * float("nan"), y), "not finite"),
        ([], "no batch"),
    ):
        with pytest.raises(InputError, match=message):
            gradient_moments(objective, batch)
    with pytest.raises(InputError, match="pair"):
        objective(objective.params, (x,))
    with pytest.raises(InputError, match="no trainable"):
        Objective(nn.Linear(2, 2).requires_grad_(False), CE)
    model[0].requires_grad_(False)  # type: ignore[index]
    part = Objective(model, CE)
    assert part.frozen == ("0.bias", "0.weight") and set(gradient_moments(part, (x, y)).mean) == {"2.weight", "2.bias"}
    with pytest.raises(InputError, match=r"returned Tensor|without a loss|one number"):
        gradient_moments(Objective(model, None), (x,))
    assert batch_size((x, y)) == 7


def test_an_operator_without_batching_rule_falls_back_to_a_loop() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *g: Tensor) -> Tensor:
            return 2 * g[0]

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = Twice.apply(x @ self.w)
            return out

    model = Odd()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(4, (6,))
    (chunk,) = list(per_sample(Objective(model, CE), (x, y)))
    assert chunk.backend == "one by one" and chunk.reason
    assert torch.allclose(chunk.gradients["w"], by_hand(model, x, y)["w"])


def test_a_weight_used_behind_the_layers_back_is_found_out() -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = torch.tanh(self.l(x)) @ self.l.weight
            return out

    model = Sneaky().double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(4, (5,))
    assert not isinstance(layerwise(Objective(model, CE), (x, y)), str)  # wrong by itself
    found = gradient_moments(Objective(model, CE), (x, y))  # confirmed on two samples, so caught
    assert found.backend == "vmap" and "do not account" in found.reason
    assert torch.allclose(found.square["l.weight"], by_hand(model, x, y)["l.weight"].square().mean(0))


# ------------------------------------------------------------------------------------------------------------ tangent kernel


@pytest.mark.parametrize("averaged", [False, True])
def test_the_tangent_kernel_is_that_of_the_jacobian(averaged: bool) -> None:
    model, x, _ = cases()["mlp"]
    rows = []
    for i in range(7):
        out = model(x[i : i + 1])[0]
        rows += [torch.cat([g.reshape(-1) for g in torch.autograd.grad(o, list(model.parameters()), retain_graph=True)]) for o in out]
    J = torch.stack(rows)
    K = kernel(model, x, averaged=averaged, chunk=3)
    full = J @ J.T
    exact = full.reshape(7, 4, 7, 4).diagonal(dim1=1, dim2=3).mean(-1) if averaged else full
    assert torch.allclose(K.matrix, exact, atol=1e-12) and sum(K.parts.values()) == pytest.approx(float(exact.trace()))
    assert K.distance(K) == pytest.approx(0, abs=1e-12) and 1 <= K.effective_rank() <= len(K.matrix)
    y = torch.eye(4, dtype=torch.float64)[torch.arange(7) % 4]
    assert 0 < float(K.alignment(y)) < 1
    json.dumps(K.to_dict(), allow_nan=False)


def test_kernels_that_make_no_sense_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(InputError, match="batch statistics"):
        kernel(model, torch.randn(4, 3))
    with pytest.raises(InputError, match="no trainable parameter"):
        kernel(nn.Linear(3, 3), torch.randn(4, 3), parameters=["x"])


# ------------------------------------------------------------------------------------------------------------ balance


def test_layers_units_and_heads() -> None:
    model, x, y = cases()["mlp"]
    params = dict(model.named_parameters())
    found = gradient_moments(Objective(model, CE), (x, y))
    rows = {r.name: r for r in layers(params, found)}
    assert rows["0.weight"].energy == pytest.approx(rows["0.weight"].noise + rows["0.weight"].gradient ** 2)
    b = units(params, found.square, ["0.weight", "0.bias"], ["2.weight"])
    w = params["0.weight"].square().sum(1) + params["0.bias"].square()
    assert torch.allclose(b.inward, w.detach()) and bool((b.noise.abs() <= 1).all())
    moved = {**params, "0.weight": 2 * params["0.weight"], "0.bias": 2 * params["0.bias"], "2.weight": params["2.weight"] / 2}
    assert bool((units(moved, found.square, ["0.weight", "0.bias"], ["2.weight"]).weights > b.weights).all())
    with pytest.raises(InputError, match="different lengths"):
        units(params, found.square, ["0.weight"], [("2.weight", 0), ("2.weight", 1)])
    q = torch.randn(8, 6, dtype=torch.float64)
    same = heads(q, q, 2)
    assert [r.imbalance for r in same] == [0.0, 0.0] and same[0].rank <= 4
    with pytest.raises(InputError, match="equal heads"):
        heads(q, q, 3)
