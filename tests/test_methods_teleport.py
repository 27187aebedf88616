"""Teleport: the objective falls, the function stays, and what belongs to the weights moves along."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import parasym
from parasym.core.errors import InputError, NotASymmetryError
from parasym.methods import Edit
from parasym.methods import teleport as public
from parasym.methods.objectives import Function, Int8, MinimumNorm, NoiseEquilibrium, Sharpness
from parasym.methods.orbit import Move, back, orbit_of
from parasym.methods.rebasin import Agreement, Matrices
from parasym.methods.teleport import find_symmetries, teleport
from parasym.symmetry.dictionary import DictionaryAction
from parasym.symmetry.symmetry import Symmetry


def net(seed: int = 0, act: type[nn.Module] = nn.ReLU, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(5, 8), act(), nn.Linear(8, 6), act(), nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        made[0].weight *= torch.linspace(0.2, 5, 8).to(dtype)[:, None]
    return made


def batch(dtype: torch.dtype = torch.float64, n: int = 32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 5, generator=g, dtype=torch.float64).to(dtype), torch.randint(3, (n,), generator=g)


X, Y = batch()


class Attention(nn.Module):
    """One head of attention without bias after two-layer embedding: GL(4) between query and key, and between value and output."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 4, bias=False) for _ in range(3))
        self.o = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.o((self.q(x) @ self.k(x).mT / 2).softmax(-1) @ self.v(x))


def attention(seed: int = 0) -> tuple[Attention, Tensor]:
    torch.manual_seed(seed)
    model = Attention().double()
    with torch.no_grad():
        model.q.weight *= torch.tensor([4.0, 1.0, 0.3, 1.0])[:, None]
    return model, torch.randn(6, 7, 5, dtype=torch.float64)


@functools.cache
def known(kind: str) -> tuple[Symmetry, ...]:
    """Found once for each architecture; the weights do not matter."""
    model, x = attention() if kind == "Attention" else (net(act=getattr(nn, kind)), X)
    return tuple(find_symmetries(model, (x,), None, 0, lambda s, f: None))


def move(model: nn.Module, args: tuple[Tensor, ...], **options: Any) -> Edit:
    kind = "Attention" if isinstance(model, Attention) else type(model[1]).__name__  # type: ignore[index]
    return teleport(model, args, symmetries=known(kind), **options)


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "balance": lambda x, y: "balance",
    "minimum-norm": lambda x, y: "minimum-norm",
    "int8": lambda x, y: "int8",
    "sharpness": lambda x, y: Sharpness(F.cross_entropy, (x, y), iterations=6),
    "noise-equilibrium": lambda x, y: NoiseEquilibrium(F.cross_entropy, (x, y), batch_size=4),
    "function": lambda x, y: lambda p: p["0.weight"].square().sum() + p["2.weight"].pow(4).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("to", OBJECTIVES)
def test_the_objective_falls_and_the_function_stays(to: str, dtype: torch.dtype) -> None:
    model, (x, y) = net(dtype=dtype), batch(dtype)
    before = copy.deepcopy(model.state_dict())
    edit = move(model, (x,), to=OBJECTIVES[to](x, y))
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())  # nothing is touched
    assert edit.summary["after"] < 0.95 * edit.summary["before"]
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert edit.certificate.ok and edit.certificate.value <= limit and edit.summary["exact"] <= 1e-12
    old = model(x)
    with edit:
        assert float(((model(x) - old).abs().max() / old.abs().max()).detach()) < (1e-5 if dtype == torch.float32 else 1e-12)
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_balance_is_what_its_name_says() -> None:
    edit = move(net(), (X,), to="balance")
    assert edit.summary["after"] < 1e-12
    moved = edit.edited()
    for inward, outward in ((moved[0], moved[2]), (moved[2], moved[4])):
        received = inward.weight.square().sum(1) + inward.bias.square()
        assert torch.allclose(received, outward.weight.square().sum(0), rtol=1e-9)
    head, x = attention()
    moved = move(head, (x,), to="balance").edited()
    for a, b in (
        (moved.q.weight @ moved.q.weight.T, moved.k.weight @ moved.k.weight.T),
        (moved.v.weight @ moved.v.weight.T, moved.o.weight.T @ moved.o.weight),
    ):
        assert torch.allclose(a, b, atol=1e-8)


def test_minimum_norm_is_found_by_no_other_way_lower() -> None:
    """Descent on the norm over all coordinates ends where the closed forms do."""
    model, x = attention()
    closed = move(model, (x,), to="minimum-norm")
    by_descent = move(model, (x,), to=Function(lambda p: sum(v.square().sum() for v in p.values()), iterations=400))
    assert closed.summary["after"] ** 2 == pytest.approx(by_descent.summary["after"], rel=1e-6)
    assert closed.summary["after"] < 0.95 * closed.summary["before"]


def test_noise_equilibrium_is_the_least_fluctuation_on_the_orbit() -> None:
    model = net()
    edit = move(model, (X,), to=NoiseEquilibrium(F.cross_entropy, (X, Y), batch_size=4))
    moved = edit.edited()
    problem_value = edit.summary["after"]
    for scale in (0.9, 1.1):  # any further move makes it worse
        other = copy.deepcopy(moved)
        with torch.no_grad():
            other[0].weight *= scale
            other[0].bias *= scale
            other[2].weight /= scale
        again = move(other, (X,), to=NoiseEquilibrium(F.cross_entropy, (X, Y), batch_size=4))
        assert again.summary["before"] > problem_value * (1 + 1e-4)
        assert again.summary["after"] == pytest.approx(problem_value, rel=1e-6)


def test_a_wrong_symmetry_is_refused_and_named() -> None:
    """Rescalings of a ReLU net do not hold in a tanh net of the same shapes; nothing is moved."""
    relu, tanh = net(), net(act=nn.Tanh)
    symmetries = [s for s in parasym.symmetries(relu, (X,)) if s.kind == "diagonal"]
    before = copy.deepcopy(tanh.state_dict())
    with pytest.raises(NotASymmetryError, match="rescaling"):
        teleport(tanh, (X,), to="balance", symmetries=symmetries)
    assert all(torch.equal(v, before[n]) for n, v in tanh.state_dict().items())


def test_bad_input_says_what_and_what_to_do() -> None:
    model = net()
    with pytest.raises(InputError, match="balance, minimum-norm, int8"):
        teleport(model, (X,), to="flatness")
    with pytest.raises(InputError, match="to must be"):
        teleport(model, (X,), to=3)  # type: ignore[arg-type]
    other = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    with pytest.raises(InputError, match="audit this model"):
        teleport(other, (X,), to="balance", symmetries=known("ReLU"))
    with pytest.raises(InputError, match="symmetries"):
        teleport(model, (X,), to="balance", symmetries=["rescale"])  # type: ignore[list-item]
    broken = net()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"0\.weight"):
        teleport(broken, (X,), to="balance")
    whole = nn.Module()
    whole.w = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(InputError, match="integer"):
        teleport(whole, (X,), to="balance")
    whole.w = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(InputError, match="complex"):
        teleport(whole, (X,), to="balance")
    frozen = net().requires_grad_(False)
    with pytest.raises(InputError, match="trainable"):
        teleport(frozen, (X,), to="balance")
    normed = net()
    nn.utils.parametrizations.weight_norm(normed[0])
    with pytest.raises(InputError, match="remove_parametrizations"):
        teleport(normed, (X,), to="balance")
    with pytest.raises(InputError, match="one number"):
        teleport(model, (X,), to=lambda p: p["0.weight"])
    with pytest.raises(InputError, match="no gradient"):
        teleport(model, (X,), to=lambda p: p["0.weight"].detach().sum())
    with pytest.raises(InputError, match="shape"):
        teleport(
            model, (X,), to=Agreement(other.state_dict() | {n: v for n, v in model.state_dict().items() if n not in other.state_dict()})
        )
    with pytest.raises(InputError, match="no parameter"):
        teleport(model, (X,), to=Agreement({}))
    with pytest.raises(InputError, match="state dict"):
        teleport(model, (X,), to=Agreement("best.safetensors"))  # type: ignore[arg-type]


class Strange(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["memory"] = torch.ones_like(p)


def test_an_unknown_optimiser_is_refused_and_nothing_moves() -> None:
    model = net()
    optimizer = Strange(model.parameters())
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    edit = move(model, (X,), to="balance")
    with pytest.raises(InputError, match="Strange"):
        edit.apply(optimizer)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 1, seed: int = 0) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(n):
        i = torch.randint(len(X), (8,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(X[i]), Y[i]).backward()
        optimizer.step()


def test_momentum_goes_along_as_a_gradient_does() -> None:
    """The momentum of a model stepped with lr 0 is a mean of gradients: at the new point it is the same mean of the gradients there."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    step(model, optimizer, 5)
    moved = copy.deepcopy(model)
    other = torch.optim.SGD(moved.parameters(), lr=0.0, momentum=0.9)
    edit = move(moved, (X,), to="balance")
    edit.bake()
    step(moved, other, 5)  # what the same batches give there
    again = move(model, (X,), to="balance")
    assert set(again.apply(optimizer).moved) == set(again.after)
    for (n, p), q in zip(model.named_parameters(), moved.parameters(), strict=True):
        assert torch.allclose(optimizer.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"], rtol=1e-8, atol=1e-12), n


def test_adams_squares_go_along_rescalings_and_start_afresh_after_mixing() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    step(model, optimizer, 5)
    moved = copy.deepcopy(model)
    other = torch.optim.Adam(moved.parameters(), lr=0.0)
    move(moved, (X,), to="balance").bake()
    step(moved, other, 5)
    assert not move(model, (X,), to="balance").apply(optimizer).reset
    for (n, p), q in zip(model.named_parameters(), moved.parameters(), strict=True):
        assert torch.allclose(optimizer.state[p]["exp_avg_sq"], other.state[q]["exp_avg_sq"], rtol=1e-8, atol=1e-18), n
    head, x = attention()
    adam = torch.optim.Adam(head.parameters(), lr=0.0)
    head(x).square().mean().backward()
    adam.step()
    edit = move(head, (x,), to="balance")
    assert "afresh" in edit.summary["note"] and edit.apply(adam).reset


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_goes_on_after_a_state_dict_round_trip_bit_by_bit(kind: Any) -> None:
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    model = net()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2]},
    ]
    optimizer = kind(groups, lr=0.05, **extra)
    step(model, optimizer, 3)
    move(model, (X,), to="minimum-norm").apply(optimizer)
    step(model, optimizer, 2, seed=1)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    step(model, optimizer, 4, seed=2)
    resumed = net(seed=9)
    groups = [
        {"params": [p for p in resumed.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in resumed.parameters() if p.dim() < 2]},
    ]
    other = kind(groups, lr=0.05, **extra)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    step(resumed, other, 4, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_a_compiled_model_and_autocast_see_the_new_weights() -> None:
    model, (x, _) = net(dtype=torch.float32), batch(torch.float32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    old = compiled(x)
    edit = teleport(compiled, (x,), to="balance")
    edit.apply()
    assert torch.allclose(compiled(x), old, rtol=1e-4, atol=1e-5) and not torch.equal(compiled(x), old)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(x).float(), half.float(), atol=0.05)


def test_frozen_weights_stay_and_tied_ones_move_together() -> None:
    model = net()
    model[2].weight.requires_grad_(False)
    assert "2.weight" not in teleport(model, (X,), to="minimum-norm").after
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)).double()
    tied[2].weight = tied[0].weight
    x = torch.randn(16, 6, dtype=torch.float64)
    edit = teleport(tied, (x,), to="minimum-norm")
    edit.apply()
    assert tied[2].weight is tied[0].weight and edit.certificate.ok


def test_moves_go_back() -> None:
    model, _x = attention()
    params = {n: p.detach() for n, p in model.named_parameters()}
    orbit = orbit_of(known("Attention"), params, {})
    g = torch.Generator().manual_seed(0)
    for s in (*orbit.families, *orbit.discrete):
        move = Move(s.name, s.action, s.random_element(g))
        there = move.act(params)
        again = back([move], there)
        assert any(not torch.equal(there[n], params[n]) for n in params)
        assert all(torch.allclose(again[n], params[n], rtol=1e-10, atol=1e-12) for n in params), s.name


def test_gradients_are_carried_along_a_descent_exactly() -> None:
    """act_both against the gradient at the new point; with the sign of the dual wrong it fails."""
    model, x = attention()
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    orbit = orbit_of(known("Attention"), params, {}).only(
        lambda s: isinstance(s.action, DictionaryAction) and s.action.entry.algebra in ("scale", "gl", "so")
    )
    c = 0.3 * torch.randn(orbit.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = [n for n, p in params.items() if p.dim() > 1]

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: v.clone().requires_grad_() for n, v in at.items()}
        out = torch.func.functional_call(model, leaves, (x,)).sin().sum()
        return dict(zip(names, torch.autograd.grad(out, [leaves[n] for n in names]), strict=True))

    point, (along,) = orbit.act_both(params, [gradient(params)], c)
    want = gradient(point)
    assert all(torch.allclose(along[n], want[n], rtol=1e-9, atol=1e-12) for n in names)
    _, (wrong,) = orbit.act_both(params, [gradient(params)], -c)
    assert not all(torch.allclose(wrong[n], want[n], rtol=1e-3) for n in names)


# -- agreement -----------------------------------------------------------------------------------------------------------------


def scrambled(model: nn.Sequential, scale: bool = True) -> nn.Sequential:
    """The same function, units permuted and rescaled."""
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for i in (0, 2):
            a, b = other[i], other[i + 2]
            order = torch.randperm(a.out_features, generator=g)
            s = torch.exp(torch.randn(a.out_features, generator=g).double()) if scale else torch.ones(a.out_features).double()
            a.weight.copy_(s[:, None] * a.weight[order])
            a.bias.copy_(s * a.bias[order])
            b.weight.copy_(b.weight[:, order] / s)
    return other


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_agreement_undoes_a_scramble(act: type[nn.Module]) -> None:
    model = net(act=act)
    other = scrambled(model, scale=act is nn.ReLU)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    step(other, optimizer, 1)
    with torch.no_grad():
        other.load_state_dict(scrambled(model, scale=act is nn.ReLU).state_dict())
    edit = move(other, (X,), to=Agreement(model))
    assert edit.summary["before"] > 0.3 and edit.summary["after"] < 1e-6
    assert set(edit.apply(optimizer).moved) == set(edit.after)


def test_agreement_turns_heads_back() -> None:
    """Attention whose query and key, value and output were turned (one of them reflected) is brought back."""
    model, x = attention()
    other = copy.deepcopy(model)
    q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    q[:, 0] *= -torch.linalg.det(q).sign()
    with torch.no_grad():
        other.q.weight.copy_(q @ other.q.weight)
        other.k.weight.copy_(q @ other.k.weight)
        other.v.weight.copy_(q @ other.v.weight)
        other.o.weight.copy_(other.o.weight @ q.T)
    edit = move(other, (x,), to=Agreement(model))
    assert edit.summary["before"] > 0.3 and edit.summary["after"] < 1e-5
    plain = move(other, (x,), to=Agreement(model, continuous=False))
    assert plain.summary["after"] > 10 * edit.summary["after"]  # permutations and signs are not enough


def test_matrices_are_the_exponential_of_the_family() -> None:
    model, _x = attention()
    params = {n: p.detach() for n, p in model.named_parameters()}
    for s in known("Attention"):
        if isinstance(s.action, DictionaryAction) and s.action.entry.algebra == "gl":
            c = 0.3 * torch.randn(s.action.dim, dtype=torch.float64)
            n = s.action.entry.size
            one, two = s.action.act(params, c), Matrices(s.action).act(params, torch.linalg.matrix_exp(c.reshape(-1, n, n)))
            assert all(torch.allclose(one[k], two[k]) for k in one)


def weight_matching(a: nn.Sequential, b: nn.Sequential, seed: int) -> nn.Sequential:
    """git-re-basin's weight matching for a stack of linear layers, permutations only: the reference to be met."""
    ours = [(m.weight.detach(), m.bias.detach()) for m in a if isinstance(m, nn.Linear)]
    held = [[m.weight.detach().clone(), m.bias.detach().clone()] for m in b if isinstance(m, nn.Linear)]
    g = torch.Generator().manual_seed(seed)
    changed = True
    while changed:
        changed = False
        for k in torch.randperm(len(ours) - 1, generator=g).tolist():
            score = ours[k][0] @ held[k][0].T + ours[k][1][:, None] * held[k][1] + ours[k + 1][0].T @ held[k + 1][0]
            order = torch.tensor(linear_sum_assignment(score.numpy(), maximize=True)[1])
            if float(score[range(len(order)), order].sum()) > float(score.trace()) + 1e-9:
                changed = True
                held[k] = [held[k][0][order], held[k][1][order]]
                held[k + 1][0] = held[k + 1][0][:, order]
    out = copy.deepcopy(b)
    with torch.no_grad():
        for m, (w, c) in zip([m for m in out if isinstance(m, nn.Linear)], held, strict=True):
            m.weight.copy_(w)
            m.bias.copy_(c)
    return out


def distance(a: nn.Module, b: nn.Module) -> float:
    gap = sum(float((p - q).detach().square().sum()) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    return (gap / sum(float(p.detach().square().sum()) for p in a.parameters())) ** 0.5


def test_agreement_is_at_least_as_close_as_weight_matching() -> None:
    a, b = net(1), net(2)
    best = min(distance(a, weight_matching(a, b, seed)) for seed in range(6))
    found = move(b, (X,), to=Agreement(a))
    assert found.summary["after"] <= best + 1e-9
    assert distance(a, found.edited()) == pytest.approx(found.summary["after"], rel=1e-9)


def test_int8_helps_a_rotatable_stream_and_reports_the_weights() -> None:
    """A plain residual stream with an outlier channel: a rotation spreads it."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.up, self.down, self.out = (
                nn.Linear(6, 16, bias=False),
                nn.Linear(16, 24),
                nn.Linear(24, 16, bias=False),
                nn.Linear(16, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            h = self.read(x)
            h = h + self.down(torch.tanh(self.up(h)))
            return self.out(h)

    model = Block().double()
    with torch.no_grad():
        model.read.weight[3] *= 25
        model.down.weight[3] *= 25
        model.up.weight[:, 3] /= 25
        model.out.weight[:, 3] /= 25
    edit = teleport(model, (torch.randn(32, 6, dtype=torch.float64),), to=Int8(iterations=40))
    assert edit.summary["after"] < edit.summary["before"] / 2 and edit.certificate.ok


def test_the_same_seed_gives_the_same_edit() -> None:
    one, two = (move(net(), (X,), to="int8", seed=4) for _ in range(2))
    assert all(torch.equal(one.after[n], two.after[n]) for n in one.after)


def test_local_claims_are_left_out_with_the_reason() -> None:
    model = net()
    symmetries = known("ReLU")
    local = [replace(s, radius=0.1) for s in symmetries]
    edit = teleport(model, (X,), to=MinimumNorm(), symmetries=local)
    assert not edit.after and any("near these weights" in row["why"] for row in edit.summary["left_out"])


def test_it_is_public() -> None:
    assert public is teleport


def test_running_statistics_go_along_with_their_channels() -> None:
    """A permuted batch-norm net in eval mode is brought back, statistics included; with data the middle is judged on fresh statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    model(torch.randn(64, 5, dtype=torch.float64))
    other, order = copy.deepcopy(model.eval()), torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    with torch.no_grad():
        for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            other.state_dict()[name].copy_(model.state_dict()[name][order])
        other[3].weight.copy_(model[3].weight[:, order])
    edit = teleport(other, (X,), to=Agreement(model))
    assert edit.summary["after"] < 1e-12 and edit.certificate.ok
    assert torch.equal(edit.edited()[1].running_mean, model[1].running_mean)
    judged = teleport(other, (X,), to=Agreement(model, loss_fn=F.cross_entropy, data=(X, model(X).argmax(1)), restarts=2))
    assert judged.certificate.ok and judged.summary["after"] < judged.summary["before"]
    assert torch.equal(judged.edited()[1].running_mean.sort().values, model[1].running_mean.sort().values)
