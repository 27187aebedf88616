"""Snake, the gambler's loss, abstention, smoothing and label noise: derivatives, closed forms against brute force, refusals."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from parasym.nn import (
    AbstainHead,
    GamblerLoss,
    PlateauStop,
    SmoothCE,
    Snake,
    aurc,
    auto_payoff,
    compose_symmetric_noise,
    convert_smoothing,
    dropout_variance,
    e_aurc,
    effective_neighbours,
    entropy,
    extrapolation,
    flip_labels,
    forward_corrected_loss,
    fourier_snake,
    gambler_loss,
    gambler_plateau,
    init_snake_,
    inverse_symmetric_noise,
    kelly_reserve,
    logit_gap,
    margin,
    memorisation,
    neighbour_agreement,
    noise_matrix,
    noisy_agreement,
    optimal_smoothing,
    periodic,
    reserve,
    risk_coverage,
    selective_loss,
    smoothing_test_loss,
    snake,
    snake_moments,
    softmax_response,
)

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------ snake


@pytest.mark.parametrize("shape", [(), (4, 1), (1, 4, 1), (5,), (3, 4, 5)])
@pytest.mark.parametrize("piece", [1 << 16, 8])
def test_snake_derivatives(shape: tuple[int, ...], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periodic, "_PIECE", piece)
    x = normal(3, 4, 5).requires_grad_()
    a, beta = ((0.3 + normal(*shape, seed=s).abs()).requires_grad_() for s in (1, 2))
    assert torch.autograd.gradcheck(snake, (x, a), check_forward_ad=True)
    assert torch.autograd.gradcheck(snake, (x, a, beta), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(snake, (x, a))
    assert torch.autograd.gradgradcheck(snake, (x, a, beta))
    assert torch.autograd.gradcheck(lambda t: snake(t, 0.7), (x,))


def test_snake_is_the_formula_and_not_its_wrong_relatives() -> None:
    x, a = normal(50), 3.0
    assert torch.allclose(snake(x, a), x + torch.sin(a * x) ** 2 / a, atol=1e-15)
    assert torch.allclose(snake(x, a), x + (1 - torch.cos(2 * a * x)) / (2 * a), atol=1e-15)
    assert not torch.allclose(snake(x, a), x + torch.sin(a * x) ** 2)
    assert not torch.allclose(snake(x, a), (x + 1 - torch.cos(2 * a * x)) / (2 * a))


def test_snake_at_zero_and_at_negative_frequency() -> None:
    x = normal(20).requires_grad_()
    a = torch.zeros((), dtype=F64, requires_grad=True)
    y = snake(x, a)
    assert torch.equal(y, x)
    assert torch.allclose(torch.autograd.grad(y.sum(), a)[0], x.square().sum())
    assert torch.allclose(snake(x, -2.0) - x, -(snake(x, 2.0) - x))
    for tiny in (1e-12, 1e-8, 1e-4):
        small = torch.tensor(tiny, dtype=torch.float32, requires_grad=True)
        wide = x.detach().float()
        grad = torch.autograd.grad(snake(wide, small).sum(), small)[0]
        assert grad.item() == pytest.approx(wide.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_snake_keeps_its_phase_in_half_precision(dtype: torch.dtype) -> None:
    x = torch.linspace(1, 4, 100).to(dtype)
    assert torch.equal(snake(x, 1000.0, 1.0), snake(x.float(), 1000.0, 1.0).to(dtype))
    rough = x + torch.sin(x * 1000).square()
    assert (snake(x, 1000.0, 1.0) - rough).abs().max() > 0.5
    layer = Snake(4, learnable=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(nn.functional.linear(torch.ones(2, 4), torch.eye(4)))
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.a.grad.dtype == torch.float32


def test_snake_holds_one_tensor() -> None:
    x, kept = torch.randn(16, 8, 32, requires_grad=True), []
    layer = Snake(8, learnable=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert sorted(t.numel() for t in kept) == [8, x.numel()]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _ = x + torch.sin(layer.a[:, None] * x) ** 2 / layer.a[:, None]
    assert sum(t.numel() for t in kept) >= 3 * x.numel()  # what the plain expression holds


@pytest.mark.parametrize("beta", [None, 1.7])
@pytest.mark.parametrize("a", [0.2, 0.5, 0.56, 1.0, 2.0, 5.0, 20.0])
def test_snake_moments_by_quadrature(a: float, beta: float | None) -> None:
    nodes, w = np.polynomial.hermite_e.hermegauss(180)
    x, weight = torch.tensor(nodes), torch.tensor(w / w.sum())
    if a > 2:  # too many turns for Gauss nodes
        x = torch.linspace(-12, 12, 20_001, dtype=F64)
        weight = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    x.requires_grad_()
    y = snake(x, a, beta)
    slope = torch.autograd.grad(y.sum(), x)[0]
    mean, second = (weight * y).sum(), (weight * y * y).sum()
    moments = snake_moments(a, beta)
    seen = (mean, second - mean**2, second, (weight * slope * slope).sum())
    for value, expected in zip(seen, moments, strict=True):
        assert float(value.detach()) == pytest.approx(float(expected), abs=1e-10)


def test_moments_peak_where_the_paper_says_and_the_correction_uses_them() -> None:
    grid = torch.linspace(0.4, 0.8, 400_001, dtype=F64)
    moments = snake_moments(grid)
    assert grid[moments.variance.argmax()].item() == pytest.approx(0.560452, abs=1e-4)
    assert grid[moments.second.argmax()].item() == pytest.approx(0.657970, abs=1e-4)
    x = normal(400_000)
    for layer in (Snake(a=0.56, corrected=True), Snake(a=0.8, beta=0.4, corrected=True)):
        assert layer(x).var().item() == pytest.approx(1.0, abs=0.01)
    assert Snake(a=0.56)(x).var().item() == pytest.approx(1.2036, abs=0.01)


def test_init_keeps_the_second_moment_through_a_deep_net() -> None:
    x = normal(500, 400)

    def last(gain: Callable[[nn.Module], object]) -> float:
        layers = [layer for _ in range(12) for layer in (nn.Linear(400, 400, dtype=F64), Snake(a=0.66))]
        net = nn.Sequential(*layers)
        gain(net)
        return net(x).square().mean().item()

    assert 0.5 < last(lambda net: init_snake_(net, 0.66, generator=generator())) * snake_moments(0.66).second.item() ** -1 < 2
    assert last(lambda net: init_snake_(net, generator=generator())) > 10  # gain 1 with uncorrected activations grows
    assert last(lambda net: None) < 0.3  # torch's default shrinks
    conv = nn.Conv2d(8, 64, 3)
    init_snake_(conv, generator=generator())
    assert conv.weight.var().item() == pytest.approx(1 / 72, rel=0.05)


def test_fourier_sums_are_snake_nets() -> None:
    odd = [2 * k + 1 for k in range(4)]
    heights = [8 / (math.pi * n) ** 2 if n in odd else 0.0 for n in range(1, 8)]
    for a, start in itertools.product((1.0, 3.7), (-10.0, 1e5)):
        net = fourier_snake(0.25, heights, [0.3 * n for n in range(1, 8)], frequency=1.5, a=a)
        x = torch.linspace(start, start + 20, 500, dtype=F64)[:, None]
        truth = 0.25 + sum(height * torch.cos(1.5 * n * x + 0.3 * n) for n, height in enumerate(heights, 1))
        assert (net(x) - truth).abs().max() < (1e-12 if start < 0 else 1e-9)
    assert (fourier_snake(0.0, [1.0], [0.0]).float()(x.float()) - torch.cos(x)).abs().max() > 1e-4  # float32 is not promised
    with pytest.raises(ValueError, match="phases"):
        fourier_snake(0.0, [1.0], [])


def test_asymptotes() -> None:
    def net(activation: nn.Module) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(2, 16), activation, nn.Linear(16, 16), activation, nn.Linear(16, 2)).double()

    u, z = normal(2), torch.linspace(1e3, 3e3, 50, dtype=F64)
    straight, flat, wavy = (extrapolation(net(f), u, z) for f in (nn.ReLU(), nn.Tanh(), Snake(a=1.0)))
    assert (straight.kind, flat.kind, wavy.kind) == ("linear", "constant", "other")
    assert straight.residual < 1e-8
    assert wavy.residual > 1e-2
    assert straight.to_dict()["kind"] == "linear"
    line = extrapolation(lambda x: 2 * x[:, 0] + 3, torch.tensor([1.0], dtype=F64), z)
    assert (line.slope[0], line.intercept[0]) == (pytest.approx(2.0), pytest.approx(3.0))
    with pytest.raises(ValueError, match="three different"):
        extrapolation(lambda x: x, u, z[:2])
    with pytest.raises(ValueError, match="finite"):
        extrapolation(lambda x: x / 0, u, z)


def test_the_symmetries_of_snake() -> None:
    x, w, b, a, v = normal(40, 2), normal(6, 2, seed=1), normal(6, seed=2), 0.5 + normal(6, seed=3).abs(), normal(6, seed=4)

    def net(w: Tensor, b: Tensor, a: Tensor, v: Tensor, c: Tensor) -> Tensor:
        return snake(x @ w.T + b, a) @ v + c

    zero = torch.zeros((), dtype=F64)
    scale = 1 + torch.rand(6, generator=generator(), dtype=F64)
    base = net(w, b, a, v, zero)
    assert torch.allclose(net(w / scale[:, None], b / scale, a * scale, v * scale, zero), base, atol=1e-13)
    assert torch.allclose(net(w, b + math.pi / a, a, v, -(v * math.pi / a).sum()), base, atol=1e-12)
    assert not torch.allclose(net(w / scale[:, None], b / scale, a, v * scale, zero), base, atol=1e-2)  # not like ReLU


@pytest.mark.parametrize(
    "options", [{}, {"learnable": True}, {"channels": 4, "learnable": True, "log_scale": True}, {"channels": 4, "beta": 0.5}]
)
def test_snake_state_round_trip(options: dict[str, Any]) -> None:
    layer, x = Snake(a=1.3, **options), normal(3, 4, dtype=torch.float32)
    other = Snake(a=0.7, **options)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert len(list(layer.parameters())) == (1 if options.get("learnable") else 0)
    assert repr(layer).startswith("Snake(")
    assert all(p.no_weight_decay for p in layer.parameters())


def test_snake_trains_and_log_scale_stays_positive() -> None:
    layer = Snake(2, a=0.1, learnable=True, log_scale=True, beta=0.2, dim=-1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=5.0)
    for _ in range(20):
        optimizer.zero_grad()
        layer(torch.randn(8, 3, 2, generator=generator())).sum().backward()
        optimizer.step()
    assert bool((layer.log_a.exp() > 0).all())
    assert layer.log_a.exp().min() < 0.1  # downhill is towards zero
    assert bool(layer(torch.ones(1, 3, 2)).isfinite().all())


def test_snake_under_the_transforms() -> None:
    x, a = normal(5, 3), torch.tensor(2.0, dtype=F64)

    def total(t: Tensor, f: Tensor) -> Tensor:
        return snake(t, f).sum()

    expected = 1 + torch.sin(4 * x)
    assert torch.allclose(torch.func.vmap(torch.func.grad(total), (0, None))(x, a), expected)
    assert torch.allclose(torch.func.jvp(lambda t: snake(t, a), (x,), (torch.ones_like(x),))[1], expected)
    curved = torch.func.hessian(total)(x[0], a)
    assert torch.allclose(curved, torch.diag(4 * torch.cos(4 * x[0])))
    per_sample = torch.func.vmap(torch.func.grad(total, argnums=1), (0, None))(x, a)
    assert torch.allclose(per_sample, (x * torch.sin(4 * x) / 2 - torch.sin(2 * x) ** 2 / 4).sum(1))
    pull = torch.func.vjp(lambda t: snake(t, a), x)[1]
    rows = torch.func.vmap(lambda g: pull(g)[0])(normal(4, 5, 3, seed=1))
    assert torch.allclose(rows, normal(4, 5, 3, seed=1) * expected)


@pytest.mark.slow
def test_compiled_and_exported_snake() -> None:
    x = normal(4, 8, 16, dtype=torch.float32).requires_grad_()
    for options in ({}, {"beta": 0.7}, {"log_scale": True, "corrected": True}):
        layer = Snake(8, a=1.5, learnable=True, **options)  # type: ignore[arg-type]
        other = copy.deepcopy(layer)
        torch.compile(layer, fullgraph=True)(x).square().sum().backward()
        grad, x.grad = x.grad, None
        other(x).square().sum().backward()
        assert torch.allclose(grad, x.grad, atol=1e-5)
        for p, q in zip(layer.parameters(), other.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-4)
        x.grad = None
        exported = torch.export.export(other, (x.detach(),), strict=False).module()
        assert torch.allclose(exported(x.detach()), other(x))
    batched = torch.compile(lambda t: torch.func.vmap(torch.func.grad(lambda u: snake(u, 2.0).sum()))(t))
    assert torch.allclose(batched(x.detach()), 1 + torch.sin(4 * x), atol=1e-5)


@pytest.mark.slow
def test_compiled_losses_agree() -> None:
    y = torch.randint(4, (8,), generator=generator())
    for loss in (GamblerLoss(2.5), GamblerLoss("mid"), GamblerLoss(2.5, pretrain_epochs=1), SmoothCE(0.1)):
        z, other = (normal(8, 5, dtype=torch.float32).requires_grad_() for _ in range(2))
        classes = slice(None, 4) if isinstance(loss, SmoothCE) else slice(None)
        torch.compile(loss, fullgraph=True)(z[:, classes], y).backward()
        loss(other[:, classes], y).backward()
        assert torch.allclose(z.grad, other.grad, atol=1e-6)


def test_losses_in_mixed_precision() -> None:
    x, y = torch.randn(16, 6, generator=generator()), torch.randint(4, (16,), generator=generator())
    for loss, width in ((GamblerLoss(2.5), 5), (GamblerLoss("mid"), 5), (SmoothCE(0.1), 4)):
        model = nn.Linear(6, width)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model(x), y)
        value.backward()
        assert value.dtype == torch.float32
        assert model.weight.grad.dtype == torch.float32
        assert value.item() == pytest.approx(loss(model(x), y).item(), abs=0.02)


def test_bad_snakes_are_refused() -> None:
    for options, message in (
        ({"a": math.nan}, "a = nan"),
        ({"a": math.inf}, "a = inf"),
        ({"a": -1.0, "log_scale": True}, "positive in log scale"),
        ({"beta": 0.0}, "beta not zero"),
        ({"channels": 0}, "channels"),
    ):
        with pytest.raises(ValueError, match=message):
            Snake(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.int64"):
        snake(torch.arange(3))
    with pytest.raises(ValueError, match="does not broadcast"):
        snake(torch.ones(3), torch.ones(2, 3))
    for shape in ((2, 5), (4,)):
        with pytest.raises(ValueError, match=r"axis 1 of size 4"):
            Snake(4)(torch.ones(*shape))


# ------------------------------------------------------------------------------------------------ the gambler's loss


def test_gambler_loss_and_gradient() -> None:
    logits, y, o = normal(64, 7).mul(3).requires_grad_(), torch.randint(6, (64,), generator=generator()), 2.5
    f = torch.softmax(logits, -1)
    p_y, k = f.gather(1, y[:, None])[:, 0], f[:, -1]
    losses = gambler_loss(logits, y, o, reduction="none")
    assert torch.allclose(losses, -(p_y + k / o).log(), atol=1e-13)
    grad = torch.autograd.grad(losses.sum(), logits)[0]
    w = p_y / (p_y + k / o)
    soft_target = torch.zeros_like(f).scatter(1, y[:, None], w[:, None])
    soft_target[:, -1] = 1 - w
    assert (grad - (f - soft_target)).abs().max() < 1e-12  # R2: cross-entropy with a soft target
    assert gambler_loss(logits, y, o).item() == pytest.approx(losses.mean().item())
    assert gambler_loss(logits, y, o, reduction="sum").item() == pytest.approx(losses.sum().item())
    hot = torch.eye(6, dtype=F64)[y]
    assert torch.allclose(gambler_loss(logits, hot, o, reduction="none"), losses)
    assert torch.allclose(gambler_loss(logits, y, torch.full((6,), o), reduction="none"), losses, atol=1e-7)
    assert torch.allclose(gambler_loss(logits, y, torch.full((64, 1), o), reduction="none"), losses, atol=1e-7)
    pixels = logits.detach().reshape(4, 16, 7).movedim(-1, 1)
    assert torch.allclose(gambler_loss(pixels, y.reshape(4, 16), o, reduction="none").flatten(), losses)
    assert gambler_loss(logits[0], y[0], o).item() == pytest.approx(losses[0].item())


def test_payoffs_of_classes_and_samples() -> None:
    logits, y = normal(5, 4), torch.tensor([0, 1, 2, 1, 0])
    f = torch.softmax(logits, -1)
    by_class, by_sample = torch.tensor([1.5, 2.0, 3.0], dtype=F64), torch.linspace(1.5, 3, 5, dtype=F64)[:, None]
    p_y = f.gather(1, y[:, None])[:, 0]
    assert torch.allclose(gambler_loss(logits, y, by_class, reduction="none"), -(p_y + f[:, -1] / by_class[y]).log())
    assert torch.allclose(gambler_loss(logits, y, by_sample, reduction="none"), -(p_y + f[:, -1] / by_sample[:, 0]).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gambler_loss_at_extreme_logits(dtype: torch.dtype) -> None:
    for signs in itertools.product((-1e4, 0.0, 1e4), repeat=3):
        logits = torch.tensor([signs], dtype=dtype, requires_grad=True)
        loss = gambler_loss(logits, torch.tensor([0]), 1.8)
        loss.backward()
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite()) and bool(logits.grad.isfinite().all())
    naive = -(torch.softmax(torch.tensor([-1e4, 1e4, -1e4]), 0)[0] + 0.0).log()
    assert not naive.isfinite()


def test_gambler_loss_refuses() -> None:
    logits, y = normal(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"m \+ 1 columns"):
        gambler_loss(logits[:, :3], y, 1.5)  # no reserve column
    for labels in (torch.tensor([0, 1, 3]), torch.tensor([-1, 0, 0])):
        with pytest.raises(ValueError, match="labels run from"):
            gambler_loss(logits, labels, 1.5)
    with pytest.raises(ValueError, match="expected"):
        gambler_loss(logits, torch.ones(3, 4), 1.5)
    for payoff in (1.0, 0.5, math.nan, torch.tensor([1.5, 0.9, 2.0])):
        with pytest.raises(ValueError, match="above 1"):
            gambler_loss(logits, y, payoff)
    with pytest.raises(ValueError, match="neither a number"):
        gambler_loss(logits, y, torch.full((5,), 2.0))
    with pytest.raises(ValueError, match="two classes"):
        gambler_loss(normal(3, 2), y, 1.5)
    for call in (lambda: GamblerLoss(0.9), lambda: GamblerLoss("best"), lambda: GamblerLoss(2.0, reduction="most")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"above 1|payoff rule|reduction"):
            call()


def test_gambler_module_warms_up_and_remembers() -> None:
    logits, y = normal(8, 5).float(), torch.randint(4, (8,), generator=generator())
    loss = GamblerLoss(2.5, pretrain_epochs=2)
    warm = nn.functional.cross_entropy(logits[:, :4], y)
    assert torch.equal(loss(logits, y), warm)
    with pytest.raises(ValueError, match="labels run"):
        loss(logits, torch.full((8,), 4))
    loss.set_epoch(2)
    assert torch.equal(loss(logits, y), gambler_loss(logits, y, 2.5))
    other = GamblerLoss(2.5, pretrain_epochs=2)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(logits, y), loss(logits, y))
    assert "2.5" in repr(other)


def test_automatic_payoffs() -> None:
    logits = normal(6, 5).requires_grad_()
    f = torch.softmax(logits, -1)
    p, s = f[:, :4], 1 - f[:, 4:]
    assert torch.allclose(auto_payoff(logits, "euc"), (s**2 / p.square().sum(1, keepdim=True)).clamp_min(1 + 1e-6))
    assert torch.allclose(auto_payoff(logits), s / p.square().sum(1, keepdim=True))
    assert torch.allclose(auto_payoff(logits, "exp"), (-(p / s * (p / s).log()).sum(1, keepdim=True)).exp() / s)
    assert not auto_payoff(logits).requires_grad
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.allclose(GamblerLoss("mid")(logits, y), gambler_loss(logits, y, auto_payoff(logits)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 7), st.floats(1.01, 9.0))
def test_no_bet_beats_the_closed_form(seed: int, m: int, o: float) -> None:
    q = torch.softmax(2 * normal(m, seed=seed), 0)
    best = kelly_reserve(q, o)
    assert best.p.sum().item() + best.k.item() == pytest.approx(1.0, abs=1e-9)
    assert best.value.item() == pytest.approx(-(q * (best.p + best.k / o).log()).sum().item())
    # the loss is convex in (p, k): no step towards any corner goes down
    for corner in torch.eye(m + 1, dtype=F64):
        bet = 0.999 * torch.cat([best.p, best.k[None]]) + 0.001 * corner
        assert -(q * (bet[:-1] + bet[-1] / o).log()).sum().item() >= best.value.item() - 1e-12


def test_boundaries_of_the_bet() -> None:
    q = torch.softmax(normal(5, 6), -1)
    assert torch.equal(kelly_reserve(q, 1.0).k, torch.ones(5, dtype=F64))
    never = kelly_reserve(q, 6.5)
    assert never.k.abs().max() < 1e-12
    assert torch.allclose(never.p, q)
    both = kelly_reserve(q, torch.tensor([1.0, 6.5, 2.0, 3.0, 4.0], dtype=F64))
    assert both.k[0] == 1
    assert both.k[1] < 1e-12
    free = q.clone().requires_grad_()
    kelly_reserve(free / free.sum(-1, keepdim=True), 2.5).value.sum().backward()
    assert bool(free.grad.isfinite().all())
    for bad, payoff in ((q * 2, 2.0), (-q, 2.0), (q, 0.5)):
        with pytest.raises(ValueError, match=r"sum to 1|at least 1"):
            kelly_reserve(bad, payoff)


@pytest.mark.parametrize(("e", "o"), [(0.0, 5.0), (0.2, 8.0), (0.5, 8.0), (0.5, 2.0), (0.3, 10.0)])
def test_the_plateau_is_the_optimum_under_symmetric_noise(e: float, o: float) -> None:
    q = torch.full((10,), e / 9, dtype=F64)
    q[0] = 1 - e
    plateau, best = gambler_plateau(e, o, 10), kelly_reserve(q, o)
    assert plateau.loss == pytest.approx(best.value.item(), abs=1e-12)
    if o < 10:
        assert (plateau.k, plateau.p) == (pytest.approx(best.k.item(), abs=1e-12), pytest.approx(best.p[0].item(), abs=1e-12))
    else:  # o = m: abstaining is betting on all alike, and the loss is the entropy bound of cross-entropy
        assert plateau.loss == pytest.approx(-(1 - e) * math.log(1 - e) - e * math.log(e / 9), abs=1e-12)
    for noise, payoff in ((0.5, 1.5), (0.2, 11.0), (1.0, 5.0)):
        with pytest.raises(ValueError, match=r"plateau|noise"):
            gambler_plateau(noise, payoff, 10)


def test_the_stop_waits_for_the_plateau_from_above() -> None:
    level = gambler_plateau(0.2, 8.0, 10).loss
    stop = PlateauStop(0.2, 8.0, 10, warmup=1)
    assert [stop.update(level + d) for d in (5.0, -0.1, 0.2, 0.1)] == [False] * 4  # below before ever above: not yet
    resumed = PlateauStop(0.2, 8.0, 10, warmup=1)
    resumed.load_state_dict(stop.state_dict())
    assert resumed.update(level - 0.01)
    assert not PlateauStop(0.2, 8.0, 10).update(level - 0.01)
    patient = PlateauStop(0.2, 8.0, 10, patience=2)
    assert [patient.update(level + d) for d in (1.0, -0.1, 0.1, -0.1, -0.1)] == [False, False, False, False, True]
    with pytest.raises(ValueError, match="nan"):
        stop.update(math.nan)
    with pytest.raises(ValueError, match="patience"):
        PlateauStop(0.2, 8.0, 10, patience=0)


def test_abstain_head() -> None:
    head = AbstainHead(nn.Linear(4, 3))
    y = head(torch.randn(2, 5, 4))
    assert y.shape == (2, 5, 4)
    assert torch.equal(y[..., 3], torch.full((2, 5), -3.0))
    assert reserve(y).max() < 0.2


def test_training_with_a_small_payoff_collapses_without_warm_up_only() -> None:
    x = normal(300, 8)
    y = (x @ normal(8, 5, seed=1)).argmax(-1)
    kept = []
    for epochs in (0, 20):
        model = nn.Linear(8, 6, dtype=F64)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), GamblerLoss(1.5, pretrain_epochs=epochs)
        for epoch in range(100):
            loss.set_epoch(epoch)
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        kept.append(reserve(model(x)).mean().item())
    assert kept[0] > kept[1] + 0.1


# ------------------------------------------------------------------------------------------------ abstention


def test_risk_and_coverage_by_hand() -> None:
    score, correct = torch.tensor([0.1, 0.4, 0.2, 0.9]), torch.tensor([True, False, True, False])
    assert risk_coverage(score, correct, [0.25, 0.75, 1.0]) == {0.25: 0.0, 0.75: pytest.approx(1 / 3), 1.0: 0.5}
    assert aurc(score, correct) == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)
    assert e_aurc(score, correct) == pytest.approx(0.0)
    assert e_aurc(-score, correct) > 0.3
    ties = risk_coverage(torch.zeros(4), correct, [0.5])
    assert ties[0.5] == 0.5  # stable: in the given order
    for bad, message in (
        (lambda: risk_coverage(score, correct, [0.0]), "undefined"),
        (lambda: aurc(score[:2], correct), "same non-empty"),
        (lambda: aurc(score[:0], correct[:0]), "same non-empty"),
        (lambda: aurc(torch.full((4,), math.nan), correct), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()


def test_scores_rank_the_uncertain_last() -> None:
    sure, unsure = torch.tensor([5.0, 0.0, 0.0]), torch.tensor([0.1, 0.0, 0.0])
    logits = torch.stack([sure, unsure])
    for score in (softmax_response, entropy, margin):
        assert score(logits)[0] < score(logits)[1]
    p = torch.softmax(unsure, 0)
    assert entropy(logits)[1].item() == pytest.approx(-(p * p.log()).sum().item())
    assert margin(logits)[1].item() == pytest.approx(1 - (p[0] - p[1]).item())
    model = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 3)).eval()
    x, state = torch.randn(4, 3), torch.random.get_rng_state()
    spread = dropout_variance(model, x)
    assert spread.min() > 0
    assert not model[1].training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(dropout_variance(model, x), spread)
    assert not torch.equal(dropout_variance(model, x, seed=1), spread)
    with pytest.raises(ValueError, match="dropout"):
        dropout_variance(nn.Linear(3, 3), torch.randn(4, 3))
    target = torch.tensor([0, 0])
    full = selective_loss(logits, torch.ones(2), target, 0.8)
    assert full.item() == pytest.approx(nn.functional.cross_entropy(logits, target).item())
    assert selective_loss(logits, torch.full((2,), 0.5), target, 0.8).item() == pytest.approx(full.item() + 32 * 0.09, rel=1e-5)
    with pytest.raises(ValueError, match="coverage"):
        selective_loss(logits, torch.ones(2), target, 1.5)


# ------------------------------------------------------------------------------------------------ smoothing


def test_smoothing_loss_in_both_conventions() -> None:
    logits, y, m = normal(20, 6), torch.randint(6, (20,), generator=generator()), 6
    p = 0.3
    target = torch.full((20, m), p / (m - 1), dtype=F64).scatter(1, y[:, None], 1 - p)
    expected = -(target * torch.log_softmax(logits, -1)).sum(1).mean()
    assert torch.allclose(SmoothCE(p)(logits, y), expected)
    eps = convert_smoothing(p, m, "uniform")
    assert torch.allclose(SmoothCE(eps, convention="uniform")(logits, y), expected)
    assert torch.allclose(SmoothCE(p)(logits, torch.eye(m, dtype=F64)[y]), expected)
    assert convert_smoothing(eps, m, "offdiag") == pytest.approx(p)
    assert not torch.allclose(SmoothCE(p, convention="uniform")(logits, y), expected)
    assert "0.3" in repr(SmoothCE(p))
    with pytest.raises(ValueError, match="least likely"):
        SmoothCE(0.9)(logits, y)
    for call in (lambda: SmoothCE(-0.1), lambda: SmoothCE(0.1, convention="torch")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"smoothing|convention"):
            call()


def test_the_optimum_of_a_smoothed_fit_is_finite() -> None:
    z = torch.zeros(1, 10, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = SmoothCE(0.1)(z, torch.tensor([3]))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (z[0, 3] - z[0, 0]).item() == pytest.approx(logit_gap(0.1, 10), abs=1e-6)
    assert logit_gap(0.0, 10) == math.inf


def test_best_smoothing_of_the_dossier() -> None:
    table = {0.1: (0.1, 0.0102, 0.0010), 0.2: (0.2, 0.0415, 0.0084), 0.4: (0.4, 0.171, 0.071), 0.6: (0.6, 0.392, 0.251)}
    for r, row in table.items():
        for k, expected in enumerate(row, 1):
            best = optimal_smoothing(r, 10, k)
            assert best == pytest.approx(expected, abs=6e-4)
            value = smoothing_test_loss(best, r, 10, k)
            assert value <= min(smoothing_test_loss(best * f, r, 10, k) for f in (0.95, 1.05))
            assert effective_neighbours(best, r, 10) == pytest.approx(k, abs=1e-3)
    assert smoothing_test_loss(0.0, 0.2, 10) == math.inf
    assert optimal_smoothing(0.3, 10, 1, 0.9) == pytest.approx(1 - neighbour_agreement(0.3, 10, 0.9))
    for a, expected in zip((0.9, 0.8, 0.7, 0.5), (0.811, 0.644, 0.5, 0.278), strict=True):
        assert noisy_agreement(1 - a, 10) == pytest.approx(expected, abs=5e-4)
        assert optimal_smoothing(1 - a, 10, target="noisy") == pytest.approx(1 - expected, abs=5e-4)
    for bad in (
        lambda: optimal_smoothing(0.95, 10),
        lambda: smoothing_test_loss(0.95, 0.1, 10),
        lambda: optimal_smoothing(0.1, 10, 2, target="noisy"),
    ):
        with pytest.raises(ValueError, match=r"amount|noisy"):
            bad()


def test_smoothing_composes_like_channels() -> None:
    for r, p in itertools.product((0.0, 0.1, 0.45), (0.0, 0.2, 0.6)):
        joint = noise_matrix(r, 10) @ noise_matrix(p, 10)
        assert torch.allclose(joint, noise_matrix(compose_symmetric_noise(r, p, 10), 10), atol=1e-15)
        assert compose_symmetric_noise(r, inverse_symmetric_noise(r, 10), 10) == pytest.approx(0.0, abs=1e-15)
    logits, y = normal(30, 10), torch.randint(10, (30,), generator=generator())
    through = torch.softmax(logits, -1) @ noise_matrix(0.3, 10)
    assert torch.allclose(forward_corrected_loss(logits, y, 0.3), -through.gather(1, y[:, None]).log().mean())


# ------------------------------------------------------------------------------------------------ label noise


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_flipped_labels_follow_the_matrix(kind: Any) -> None:
    y = torch.randint(5, (200_000,), generator=generator())
    noisy, wrong = flip_labels(y, 0.3, 5, kind, generator=generator(1))
    assert torch.equal(wrong, noisy != y)
    assert wrong.double().mean().item() == pytest.approx(0.3, abs=0.01)
    seen = torch.zeros(5, 5, dtype=F64).index_put_((y, noisy), torch.ones(1, dtype=F64), accumulate=True)
    assert torch.allclose(seen / seen.sum(1, keepdim=True), noise_matrix(0.3, 5, kind), atol=0.01)
    again, _ = flip_labels(y, 0.0, 5, noise_matrix(0.3, 5, kind), generator=generator(1))
    assert torch.equal(again, noisy)
    assert torch.equal(flip_labels(y, 0.0, 5, kind, generator=generator())[0], y)


def test_bad_label_noise_is_refused() -> None:
    y = torch.tensor([0, 1])
    for call in (
        lambda: flip_labels(y, 1.5, 3, generator=generator()),
        lambda: flip_labels(y, 0.1, 1, generator=generator()),
        lambda: flip_labels(torch.tensor([3]), 0.1, 3, generator=generator()),
        lambda: flip_labels(y, 0.1, 3, "odd", generator=generator()),  # type: ignore[arg-type]
        lambda: flip_labels(y, 0.1, 3, torch.ones(3, 3), generator=generator()),
        lambda: memorisation(normal(2, 3), y, y),
    ):
        with pytest.raises(ValueError, match=r"rate|labels|kind|rows"):
            call()


def test_memorisation_by_hand() -> None:
    true, given_labels = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 1])
    logits = torch.tensor([[9.0, 0, 0, -9], [0, 9.0, 0, -9], [9.0, 0, 0, 8], [9.0, 0, 0, 8]])
    seen = memorisation(logits, true, given_labels, has_reserve=True)
    assert (seen.on_wrong, seen.recovered, seen.on_clean, seen.separation) == (0.5, 0.5, 1.0, 1.0)
    assert seen.reserve_wrong > seen.reserve_clean
    plain = memorisation(logits[:, :3], true, given_labels)
    assert math.isnan(plain.to_dict()["reserve_clean"])
