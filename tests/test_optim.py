"""LaProp and volumization: the authors' recurrence, the limits, the promises of torch.optim, and what must be refused."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from parasym.optim import (
    LaProp,
    Volumize,
    binarize_,
    clip_bias_variance,
    flip_convention,
    resting_offset,
    ternarize_,
    volumize_,
    wall_alpha,
    wall_occupancy,
    wall_penalty,
)

F64 = torch.float64
FORMS: dict[str, dict[str, Any]] = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "capturable": {"capturable": True, "foreach": False},
    "capturable foreach": {"capturable": True, "foreach": True},
    "tensor lr": {"capturable": True, "lr": torch.tensor(1.0, dtype=F64)},
    "differentiable": {"differentiable": True},
}
RATES = [1e-3] * 60 + [1e-4] * 60 + [0.0] * 5 + [2e-3] * 75


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def official(gradients: list[float], rates: list[float], start: float, *, decay: float, centered: bool, amsgrad: bool) -> list[float]:
    """laprop R1 in plain numbers."""
    b1, b2 = 0.9, 0.999
    v = m = l1 = l2 = mean = top = 0.0
    x, path = start, []
    for step, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
        v = b2 * v + (1 - b2) * g * g
        l1, l2 = b1 * l1 + (1 - b1) * lr, b2 * l2 + (1 - b2)
        correction = l1 / lr if lr != 0 else 1.0
        d = v
        if centered:
            mean = b2 * mean + (1 - b2) * g
            d = v - mean * mean if step > 10 else v
        if amsgrad and not (centered and step <= 10):
            top = max(top, d)
            d = top
        m = b1 * m + (1 - b1) * lr * g / (math.sqrt(max(d, 0.0) / l2) + 1e-15)
        x -= m / correction
        x -= decay * x
        path.append(x)
    return path


def walk(optimizer: torch.optim.Optimizer, p: Tensor, gradients: list[float], rates: list[float]) -> list[float]:
    path = []
    for g, lr in zip(gradients, rates, strict=True):
        held = optimizer.param_groups[0]["lr"]
        if isinstance(held, Tensor):
            held.fill_(lr)
        else:
            optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.full_like(p, g)
        optimizer.step()
        path.append(float(p.detach().flatten()[0]))
    return path


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------ the recurrence


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("centered", "amsgrad", "decay"), list(itertools.product([False, True], [False, True], [0.0, 1e-2])))
def test_every_form_is_the_authors_recurrence(form: str, centered: bool, amsgrad: bool, decay: float) -> None:
    gradients = torch.randn(200, generator=generator(), dtype=F64).tolist()
    start = torch.full((3,), 0.3, dtype=F64)
    p = start if form == "differentiable" else nn.Parameter(start)
    options = copy.deepcopy(FORMS[form])
    optimizer = LaProp([p], weight_decay=decay, centered=centered, amsgrad=amsgrad, decoupled="official", **options)
    expected = official(gradients, RATES, 0.3, decay=decay, centered=centered, amsgrad=amsgrad)
    assert difference(walk(optimizer, p, gradients, RATES), expected) <= 1e-12


def test_the_learning_rate_inside_or_outside_the_momentum() -> None:
    gradients = torch.randn(200, generator=generator(), dtype=F64).tolist()
    paths = []
    for inside, rates in itertools.product([True, False], [[1e-3] * 200, RATES]):
        p = nn.Parameter(torch.zeros(1, dtype=F64))
        paths.append(walk(LaProp([p], lr_in_momentum=inside), p, gradients, rates))
    assert difference(paths[0], paths[2]) <= 1e-15  # constant rate: the textbook form
    assert difference(paths[1], paths[3]) > 1e-5  # a schedule: not
    textbook, m, v, x = [], 0.0, 0.0, 0.0
    for t, (g, lr) in enumerate(zip(gradients, RATES, strict=True), 1):
        v = 0.999 * v + 0.001 * g * g
        m = 0.9 * m + 0.1 * g / math.sqrt(v / (1 - 0.999**t))
        x -= lr * m / (1 - 0.9**t)
        textbook.append(x)
    assert difference(paths[3], textbook) <= 1e-12


def test_a_rate_of_zero_lets_the_momentum_run_out() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=F64))
    path = walk(LaProp([p]), p, [1.0] * 5 + [0.0], [1e-3] * 5 + [0.0])
    assert path[5] < path[4]
    q = nn.Parameter(torch.zeros(1, dtype=F64))
    assert walk(LaProp([q], lr_in_momentum=False), q, [1.0] * 5 + [0.0], [1e-3] * 5 + [0.0])[5] == q.item()
    still = walk(LaProp([q], lr_in_momentum=False), q, [1.0, 1.0], [1e-3, 0.0])
    assert still[1] == still[0]


def test_limits() -> None:
    gradients = torch.randn(100, generator=generator(3), dtype=F64).tolist()
    rates = [1e-2] * 100
    p = nn.Parameter(torch.zeros(1, dtype=F64))
    path, m, x, signs = walk(LaProp([p], betas=(0.9, 0.0)), p, gradients, rates), 0.0, 0.0, []
    for t, g in enumerate(gradients, 1):
        m = 0.9 * m + 0.1 * math.copysign(1, g)
        x -= 1e-2 * m / (1 - 0.9**t)
        signs.append(x)
    assert difference(path, signs) <= 1e-12  # b2 = 0: momentum of signs
    a, b = (nn.Parameter(torch.zeros(1, dtype=F64)) for _ in range(2))
    ours, adam = LaProp([a], betas=(0.0, 0.99)), torch.optim.Adam([b], betas=(0.0, 0.99), eps=1e-15)
    assert difference(walk(ours, a, gradients, rates), walk(adam, b, gradients, rates)) <= 1e-12  # b1 = 0: Adam
    c = nn.Parameter(torch.zeros(1, dtype=F64))
    assert difference(walk(LaProp([c], betas=(0.9, 0.99)), c, gradients, rates), walk(adam, b, gradients, rates)) > 1e-3


@settings(max_examples=30, deadline=None)
@given(
    st.floats(0, 0.99),
    st.floats(0, 0.999),
    st.lists(st.floats(-1e6, 1e6).filter(lambda g: g == 0 or abs(g) > 1e-6), min_size=1, max_size=30),
)
def test_updates_are_bounded_for_every_pair_of_betas(b1: float, b2: float, gradients: list[float]) -> None:
    p = nn.Parameter(torch.zeros(1, dtype=F64))
    optimizer = LaProp([p], lr=1.0, betas=(b1, b2))
    assert optimizer.updates() == []
    for g in gradients:
        before = p.item()
        p.grad = torch.tensor([g], dtype=F64)
        optimizer.step()
        assert abs(p.item() - before) <= (1 - b2) ** -0.5 * (1 + 1e-9) + 1e-9 * abs(before)
        assert optimizer.updates()[0].item() == pytest.approx(before - p.item(), abs=1e-9 * max(1, abs(before)))


def test_weight_decay_means_what_its_name_says() -> None:
    moved = {}
    for decoupled in ("lr", "official", "l2"):
        p = nn.Parameter(torch.ones(1, dtype=F64))
        optimizer = LaProp([p], lr=0.1, weight_decay=0.5, decoupled=decoupled)  # type: ignore[arg-type]
        p.grad = torch.zeros(1, dtype=F64)
        optimizer.step()
        moved[decoupled] = p.item()
    assert moved["lr"] == pytest.approx(0.95)
    assert moved["official"] == pytest.approx(0.5)
    assert moved["l2"] == pytest.approx(0.9)  # the decay is then the whole gradient, and is normalised


# ------------------------------------------------------------------------------------------------ torch.optim's promises


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


DATA = torch.randn(32, 6, generator=generator(1)), torch.randint(3, (32,), generator=generator(2))


def backward(model: nn.Module, rows: slice = slice(None), scale: float = 1.0) -> Tensor:
    x, y = DATA[0][rows], DATA[1][rows]
    loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y) * scale
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def saved(state: Any) -> Any:
    """Through a file and back, as a user would."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def make_laprop(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return LaProp(model.parameters(), lr=1e-2, **options)


def make_walled(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    Volumize(optimizer, 0.8, **options)
    return optimizer


MAKERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "laprop": make_laprop,
    "laprop foreach": lambda model: make_laprop(model, foreach=True),
    "laprop centered": lambda model: make_laprop(model, centered=True, amsgrad=True, weight_decay=0.1),
    "walls": make_walled,
    "bouncing walls": lambda model: make_walled(model, alpha=-0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("maker", MAKERS)
def test_resumes_bitwise(maker: str, dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    optimizer = MAKERS[maker](model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, optimizer, 12)
    schedule.step()
    kept = saved({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(model, optimizer, 5)
    other = network(seed=9, dtype=dtype)
    resumed = MAKERS[maker](other)
    other.load_state_dict(kept["model"])
    resumed.load_state_dict(kept["optimizer"])
    train(other, resumed, 5)
    assert torch.equal(weights(model), weights(other))
    fresh = network(seed=9, dtype=dtype)
    fresh.load_state_dict(kept["model"])
    train(fresh, MAKERS[maker](fresh), 5)
    assert not torch.equal(weights(model), weights(fresh))  # the state matters


def test_low_precision_parameters_keep_their_state_in_float32() -> None:
    model = network(dtype=torch.bfloat16)
    optimizer = make_laprop(model)
    train(model, optimizer, 3)
    states = [optimizer.state[p] for p in model.parameters()]
    assert {s["exp_avg"].dtype for s in states} == {torch.float32}
    assert {s["exp_avg_lr_1"].dtype for s in states} == {F64}
    half = nn.Parameter(torch.ones(1, dtype=torch.float16))
    half.grad = torch.zeros(1, dtype=torch.float16)
    LaProp([half]).step()
    assert half.item() == 1.0  # eps = 1e-15 is zero in float16, and 0 / 0 is not


def test_a_checkpoint_of_the_authors_class_loads() -> None:
    gradients = torch.randn(40, generator=generator(), dtype=F64).tolist()
    p = nn.Parameter(torch.full((2,), 0.3, dtype=F64))
    walk(LaProp([p], weight_decay=1e-2, decoupled="official"), p, gradients[:20], [1e-3] * 20)
    optimizer = LaProp([p], weight_decay=1e-2, decoupled="official")
    v = m = l1 = l2 = 0.0
    for g in gradients[:20]:
        v, l1, l2 = 0.999 * v + 0.001 * g * g, 0.9 * l1 + 0.1 * 1e-3, 0.999 * l2 + 0.001
        m = 0.9 * m + 0.1 * 1e-3 * g / (math.sqrt(v / l2) + 1e-15)
    state = {
        "step": 20,
        "exp_avg": torch.full((2,), m, dtype=F64),
        "exp_avg_sq": torch.full((2,), v, dtype=F64),
        "exp_avg_lr_1": l1,
        "exp_avg_lr_2": l2,
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-15, "weight_decay": 1e-2, "amsgrad": False, "params": [0]}
    optimizer = LaProp([p])
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [group]})
    assert optimizer.param_groups[0]["decoupled"] == "official"
    path = walk(optimizer, p, gradients[20:], [1e-3] * 20)
    expected = official(gradients, [1e-3] * 40, 0.3, decay=1e-2, centered=False, amsgrad=False)
    assert difference(path, expected[20:]) <= 1e-12


@pytest.mark.parametrize("maker", ["laprop", "laprop foreach"])
def test_copies_and_pickles(maker: str) -> None:
    model = network()
    optimizer = MAKERS[maker](model)
    train(model, optimizer, 3)
    again = pickle.loads(pickle.dumps(optimizer))
    assert torch.equal(again.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    both = copy.deepcopy((model, optimizer))
    train(model, optimizer, 2)
    train(*both, 2)
    assert torch.equal(weights(model), weights(both[0]))


@pytest.mark.parametrize("maker", MAKERS)
def test_gradient_accumulation_is_the_large_batch(maker: str) -> None:
    model, other = network(dtype=F64), network(dtype=F64)
    optimizer, accumulating = MAKERS[maker](model), MAKERS[maker](other)
    train(model, optimizer, 4)
    for _ in range(4):
        accumulating.zero_grad()
        for rows in (slice(0, 16), slice(16, 32)):
            backward(other, rows, scale=0.5)
        accumulating.step()
    assert torch.allclose(weights(model), weights(other), atol=1e-10)


def test_parameter_groups_override_every_option() -> None:
    a, b = nn.Parameter(torch.ones(2, dtype=F64)), nn.Parameter(torch.ones(2, dtype=F64))
    alone = nn.Parameter(torch.ones(2, dtype=F64))
    special = {
        "lr": 0.1,
        "betas": (0.5, 0.9),
        "eps": 1e-3,
        "weight_decay": 0.1,
        "decoupled": "l2",
        "lr_in_momentum": False,
        "amsgrad": True,
    }
    optimizer = LaProp([{"params": [a]}, {"params": [b], **special}], lr=1e-3)
    single = LaProp([alone], **special)  # type: ignore[arg-type]
    for g in torch.randn(20, generator=generator()).tolist():
        for p in (a, b, alone):
            p.grad = torch.full_like(p, g)
        optimizer.step()
        single.step()
    assert torch.equal(b, alone)
    assert not torch.equal(a, b)


def test_frozen_tied_and_unused_parameters() -> None:
    model = network()
    model[2].weight.requires_grad_(False)
    before = weights(model)[-27:-3].clone()
    tied = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    tied[1].weight = tied[0].weight
    for make in MAKERS.values():
        train(model, make(model), 2)
        assert torch.equal(weights(model)[-27:-3], before)
        optimizer = make(tied)
        assert sum(len(group["params"]) for group in optimizer.param_groups) == 1
        tied(DATA[0]).square().sum().backward()
        optimizer.step()
        assert tied[1].weight is tied[0].weight


def test_closure_maximize_and_late_groups() -> None:
    model, other = network(), network()
    optimizer, rising = LaProp(model.parameters()), LaProp(other.parameters(), maximize=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward(model)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.requires_grad
    backward(other, scale=-1.0)
    rising.step()
    assert torch.equal(weights(model), weights(other))
    late = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [late], "lr": 0.5})
    late.grad = torch.ones(1)
    optimizer.step()
    assert late.item() == pytest.approx(0.5)
    for p, q in zip(model.parameters(), optimizer.updates(), strict=False):
        assert p.shape == q.shape


@pytest.mark.parametrize("form", ["loop", "foreach", "capturable", "capturable foreach"])
def test_complex_parameters_are_pairs_of_reals(form: str) -> None:
    pair = torch.randn(5, 2, generator=generator(), dtype=F64)
    z, p = nn.Parameter(torch.view_as_complex(pair.clone())), nn.Parameter(pair.clone())
    options = {"amsgrad": True, "weight_decay": 0.1, **FORMS[form]}
    both = LaProp([z], **options), LaProp([p], **options)
    for seed in range(5):
        g = torch.randn(5, 2, generator=generator(seed), dtype=F64)
        z.grad, p.grad = torch.view_as_complex(g.clone()), g.clone()
        for optimizer in both:
            optimizer.step()
    assert torch.equal(torch.view_as_real(z.detach()), p.detach())


@pytest.mark.parametrize("form", FORMS)
def test_scalars_and_empty_tensors(form: str) -> None:
    options, tensors = FORMS[form], [torch.tensor(1.0), torch.ones(0, 3), torch.ones(1)]
    params = tensors if form == "differentiable" else [nn.Parameter(t) for t in tensors]
    optimizer = LaProp(params, **{"lr": 0.1, **copy.deepcopy(options)})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [tuple(p.shape) for p in params] == [(), (0, 3), (1,)]
    assert params[0].item() == pytest.approx(params[2].item(), abs=1e-6)
    assert params[0].item() < 1.0


def test_differentiable_in_the_learning_rate_and_the_weights() -> None:
    def outcome(lr: Tensor, start: Tensor, capturable: bool) -> Tensor:
        p = start.clone()
        optimizer = LaProp([p], lr=lr, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, differentiable=True, capturable=capturable)
        for t in range(4):
            p.grad = (p * (t + 1)).cos()
            optimizer.step()
        return p

    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    start = torch.randn(3, generator=generator(), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: outcome(a, b, capturable=False), (lr, start))
    assert torch.autograd.gradcheck(lambda a, b: outcome(a, b, capturable=True), (lr, start))


@pytest.mark.parametrize("maker", MAKERS)
def test_mixed_precision_with_a_scaler(maker: str) -> None:
    model, plain = network(), network()
    optimizer, reference = MAKERS[maker](model), MAKERS[maker](plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(3):
        optimizer.zero_grad()
        x, y = DATA
        loss = nn.functional.cross_entropy(model(x * (float("inf") if step == 1 else 1.0)), y)
        scaler.scale(loss).backward()
        kept = weights(model)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weights(model), kept) == (step == 1)  # infinities: no step, no wall
    train(plain, reference, 2)
    assert torch.allclose(weights(model), weights(plain), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(DATA[0]), DATA[1])
    loss.backward()
    optimizer.step()
    assert bool(weights(model).isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"centered": True, "amsgrad": True, "weight_decay": 0.1}, {"walls": True}])
def test_compiled_steps_agree(options: dict[str, Any]) -> None:
    model, other = network(dtype=F64), network(dtype=F64)
    walls = options.pop("walls", False)
    eager, optimizer = (LaProp(m.parameters(), lr=torch.tensor(1e-2, dtype=F64), capturable=True, **options) for m in (model, other))
    if walls:
        for each in (eager, optimizer):
            Volumize(each, 0.8)
    compiled = torch.compile(optimizer.step)
    for step in range(14):
        for each in (eager, optimizer):
            each.param_groups[0]["lr"].fill_(1e-2 / (1 + step))
        for m, each, go in ((model, eager, eager.step), (other, optimizer, compiled)):
            each.zero_grad()
            backward(m)
            go()
    assert torch.allclose(weights(model), weights(other), atol=1e-12)
    if walls:
        assert (other[0].weight.abs() == optimizer.param_groups[0]["walls"][0]).any()


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"lr": math.nan}, "Invalid learning rate"),
        ({"lr": torch.ones(2)}, "1-element"),
        ({"lr": torch.tensor(1.0), "foreach": True}, "capturable=False and foreach=True"),
        ({"betas": (1.0, 0.9)}, "beta parameter at index 0"),
        ({"betas": (0.9, -0.1)}, "beta parameter at index 1"),
        ({"betas": (0.9, math.nan)}, "beta parameter at index 1"),
        ({"betas": (0.9,)}, "a pair"),
        ({"eps": -1e-8}, "Invalid epsilon"),
        ({"weight_decay": -1.0}, "Invalid weight_decay"),
        ({"weight_decay": math.inf}, "Invalid weight_decay"),
        ({"weight_decay": 2.0, "decoupled": "official"}, "turn their sign"),
        ({"decoupled": "adamw"}, "decoupled must be"),
        ({"centered_warmup": -1}, "centered_warmup"),
        ({"fused": True}, "torch.compile"),
        ({"foreach": True, "differentiable": True}, "does not support"),
    ],
)
def test_invalid_options_are_refused_for_all_and_for_a_group(options: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.ones(1))
    with pytest.raises((ValueError, RuntimeError), match=message):
        LaProp([p], **options)
    with pytest.raises((ValueError, RuntimeError), match=message):
        LaProp([{"params": [p], **options}])
    optimizer = LaProp([nn.Parameter(torch.ones(1))])
    with pytest.raises((ValueError, RuntimeError), match=message):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1


def test_bad_parameters_and_gradients_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.int64"):
        LaProp([torch.ones(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match="empty parameter list"):
        LaProp([])
    broken = nn.Parameter(torch.tensor([1.0, math.nan]))
    broken.grad = torch.ones(2)
    with pytest.raises(ValueError, match="NaN or infinity"):
        LaProp([broken]).step()
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        LaProp(embedding.parameters()).step()


# ------------------------------------------------------------------------------------------------ volumization


def test_the_wall_is_the_formula() -> None:
    w, m = torch.tensor([-3.0, -1.0, 0.2, 1.5], dtype=F64), torch.ones(4, dtype=F64)
    for alpha in (0.5, 0.0, -0.5):
        p, momentum = w.clone(), m.clone()
        volumize_([p], [1.0], alpha, [momentum])
        expected = [-(1 + alpha * 2), -1.0, 0.2, 1 + alpha * 0.5]
        assert p.tolist() == pytest.approx(expected)
        assert momentum.tolist() == [alpha, 1.0, 1.0, alpha]
    p = torch.tensor([5.0])
    volumize_([p], [1.0], -1.0)
    assert p.item() == -1.0  # a bounce that would leave by the opposite wall stops there


def test_limits_of_the_wall() -> None:
    model, decayed = network(dtype=F64), network(dtype=F64)
    walled = torch.optim.SGD(model.parameters(), lr=0.1)
    Volumize(walled, 0.0, 1 - 0.1 * 0.3, exclude=lambda name, p: False)
    train(model, walled, 5)
    plain = torch.optim.SGD(decayed.parameters(), lr=0.1)
    for _ in range(5):
        plain.zero_grad()
        backward(decayed)
        plain.step()
        with torch.no_grad():
            for p in decayed.parameters():
                p.mul_(1 - 0.1 * 0.3)
    assert torch.allclose(weights(model), weights(decayed), atol=1e-14)  # V = 0: decoupled weight decay
    a, b, c = network(), network(), network()
    optimizer = torch.optim.Adam(a.parameters(), lr=0.05)
    Volumize(optimizer, 0.5, 1.0)
    train(a, optimizer, 5)
    train(b, torch.optim.Adam(b.parameters(), lr=0.05), 5)
    assert torch.equal(weights(a), weights(b))  # alpha = 1: nothing, bit for bit
    train(c, make_walled(c), 5)
    assert not torch.equal(weights(c), weights(b))


@pytest.mark.parametrize(("wall", "alpha"), [(0.0, 0.99), (0.5, 0.9), (0.5, 0.0), (0.7, 0.999)])
def test_a_soft_wall_is_a_proximal_step(wall: float, alpha: float) -> None:
    root = torch.randn(8, 8, generator=generator(), dtype=F64)
    hessian, target = root @ root.T / 8 + 0.5 * torch.eye(8, dtype=F64), torch.randn(8, generator=generator(1), dtype=F64)
    ends = []
    for eta in (0.02, 0.05):
        lam = wall_penalty(alpha, 0.05)
        share = alpha if math.isinf(lam) else wall_alpha(lam, eta)
        w = torch.zeros(8, dtype=F64)
        for _ in range(4000):
            w = w - eta * (hessian @ w - target)
            volumize_([w], [wall], share)
        ends.append(w)
        force = target - hessian @ w
        excess = w.abs() - wall
        if alpha > 0:
            penalty = torch.where(excess > 0, lam * excess * w.sign(), 0.0)
            assert torch.allclose(force, penalty, atol=1e-8)  # stationary for L + R
        else:
            assert w.abs().max() <= wall
            assert torch.allclose(torch.where(excess < 0, force, 0.0), torch.zeros_like(force), atol=1e-8)
    assert torch.allclose(*ends, atol=1e-8)  # and independent of the learning rate


@pytest.mark.parametrize("alpha", [0.6, 0.0, -0.5, -1.0])
def test_where_a_pushed_weight_rests(alpha: float) -> None:
    w, eta, force = torch.tensor([0.5], dtype=F64), 0.01, 0.7
    for _ in range(4000):
        w = w + eta * (force - 3.0 * (w - 0.5))
        volumize_([w], [0.5], alpha)
    rest = w.item()
    pushed = force - 3.0 * (rest - 0.5)
    if alpha >= 0:
        assert rest - 0.5 == pytest.approx(resting_offset(alpha, eta, pushed), abs=1e-10)
    else:  # inside: before the step it is at 0.5 + offset, where the force acts
        assert rest - 0.5 == pytest.approx(alpha * (rest - 0.5 + eta * pushed), abs=1e-10)
        assert rest - 0.5 == pytest.approx(resting_offset(alpha, eta, pushed), abs=1e-10)


@pytest.mark.parametrize(
    ("u", "s", "wall", "alpha"), [(1, 1, 0.9, 0), (1, 1, 0.5, -1), (0.3, 2, 1, 0.5), (2, 1, 0.5, -0.5), (1, 1, 0, 0.5)]
)
def test_bias_and_variance_against_samples(u: float, s: float, wall: float, alpha: float) -> None:
    x = u + s * torch.randn(400_000, generator=generator(), dtype=F64)
    inside = x.clamp(-wall, wall)
    seen = inside + alpha * (x - inside)
    bias, variance = clip_bias_variance(u, s, wall, alpha)
    error = float((seen - u).square().std()) / len(x) ** 0.5
    assert bias == pytest.approx(float(seen.mean() - u) ** 2, abs=5 * error)
    assert variance == pytest.approx(float(seen.var()), abs=5 * error)
    assert sum(clip_bias_variance(u, s, 0, 0.5)) == pytest.approx(u * u / 4 + s * s / 4)  # V = 0: shrinkage


def test_walls_follow_groups_names_and_exclusions() -> None:
    model = network()
    optimizer = torch.optim.Adam(
        [{"params": list(model[0].named_parameters()), "volume": 0.5, "wall_alpha": 0.3}, {"params": list(model[2].named_parameters())}],
        lr=0.1,
    )
    tops = [model[0].weight.abs().max().item(), model[2].weight.abs().max().item()]
    box = Volumize(optimizer, 2.0, exclude=lambda name, p: "bias" in name)
    assert list(box.walls().values()) == pytest.approx([0.5 * tops[0], 2 * tops[1]])
    train(model, optimizer, 8)
    assert model[2].weight.abs().max() <= 2 * tops[1]
    assert model[0].weight.abs().max() > 0.5 * tops[0]  # its wall is soft
    extra = nn.Parameter(torch.full((2, 2), 0.1))
    optimizer.add_param_group({"params": [("extra", extra)]})
    extra.grad = torch.full((2, 2), -1.0)
    for _ in range(5):
        optimizer.step()
    assert extra.max().item() == pytest.approx(0.2)  # a late group gets walls at its first step
    box.remove()
    train(model, optimizer, 20)
    assert model[2].weight.abs().max() > 2 * tops[1]
    Volumize(optimizer)


def test_second_moments_are_left_alone_and_momentum_is_scaled() -> None:
    runs = []
    for walled in (True, False):
        p = nn.Parameter(torch.tensor([[1.0, 0.5]]))
        optimizer = torch.optim.Adam([p], lr=0.1)
        if walled:
            Volumize(optimizer, 1.0, -0.5)
        p.grad = torch.tensor([[-1.0, -1.0]])
        optimizer.step()
        runs.append(optimizer.state[p])
    assert torch.equal(runs[0]["exp_avg_sq"], runs[1]["exp_avg_sq"])
    assert (runs[0]["exp_avg"] / runs[1]["exp_avg"]).tolist() == [[-0.5, 1.0]]


def test_lam_follows_the_learning_rate() -> None:
    p = nn.Parameter(torch.tensor([[2.0]], dtype=F64))
    optimizer = torch.optim.SGD([p], lr=0.5)
    Volumize(optimizer, 1.0, lam=2.0, absolute=True)
    p.grad = torch.zeros(1, 1, dtype=F64)
    optimizer.step()
    assert p.item() == pytest.approx(1 + wall_alpha(2.0, 0.5))
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert p.item() == pytest.approx(1 + wall_alpha(2.0, 0.5) * wall_alpha(2.0, 0.1))
    assert wall_penalty(wall_alpha(2.0, 0.1), 0.1) == pytest.approx(2.0)
    assert flip_convention(flip_convention(0.3)) == 0.3


def test_quantisers_and_occupancy() -> None:
    w = torch.tensor([-1.0, -0.3, 0.0, 0.6, 0.99], dtype=F64)
    assert wall_occupancy([w], [1.0]) == [pytest.approx(0.4)]
    binary, ternary = w.clone(), w.clone()
    binarize_([binary], [1.1])
    ternarize_([ternary], [1.0])
    assert binary.tolist() == [-1.1, -1.1, 1.1, 1.1, 1.1]
    assert ternary.tolist() == [-1.0, 0.0, 0.0, 1.0, 1.0]


def test_bad_walls_are_refused() -> None:
    def optimizer(value: float = 1.0) -> torch.optim.Optimizer:
        return torch.optim.SGD([nn.Parameter(torch.full((2, 2), value))], lr=0.1)

    for options, message in (
        ({"alpha": 1.5}, "alpha"),
        ({"volume": -1.0}, "volume"),
        ({"volume": math.nan}, "volume"),
        ({"lam": -1.0}, "lam"),
    ):
        with pytest.raises(ValueError, match=message):
            Volumize(optimizer(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="freeze"):
        Volumize(optimizer(0.0))
    with pytest.raises(ValueError, match="NaN"):
        Volumize(optimizer(math.nan))
    twice = optimizer()
    Volumize(twice)
    with pytest.raises(RuntimeError, match="walls already"):
        Volumize(twice)
    for call in (lambda: wall_penalty(-0.5, 0.1), lambda: resting_offset(1.0, 0.1, 1.0), lambda: clip_bias_variance(1, 0, 1, 0)):
        with pytest.raises(ValueError, match=r"alpha|s > 0"):
            call()
