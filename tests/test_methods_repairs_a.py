"""Methods under use they once failed: signs that must change, interrupts, groups added later, and the way back to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.methods import lasso, solve, spred, syre
from parasym.methods.edit import Edit


def regression(seed: int, bias: bool = False) -> tuple[nn.Linear, Callable[[], Tensor], np.ndarray]:
    """A lasso of 50 samples and 8 weights, a random start, and the solution of coordinate-free `lasso`."""
    stream = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 8, generator=stream, dtype=torch.float64)
    y = x @ torch.randn(8, 1, generator=stream, dtype=torch.float64) + 0.3 * torch.randn(50, 1, generator=stream, dtype=torch.float64)
    torch.manual_seed(seed)
    model = nn.Linear(8, 1, bias=bias).double()
    return model, lambda: 0.5 * (model(x) - y).square().sum() / 50, lasso(x.numpy(), y.numpy()[:, 0], 0.1).weights


# ------------------------------------------------------------------------------------------------ spred


@pytest.mark.parametrize("seed", range(8))
def test_solve_reaches_the_lasso_from_any_start(seed: int) -> None:
    model, loss, expected = regression(seed)
    certificate = solve(model, loss, 0.1)
    assert certificate.residual <= 1e-6
    np.testing.assert_allclose(model.weight.detach().numpy()[0], expected, atol=1e-6)


@pytest.mark.parametrize("start", ["random", "zeros"])
@pytest.mark.parametrize("options", [{}, {"group": "out"}, {"ratio": 4.0}])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_trained_factors_change_signs(rule: str, options: dict[str, Any], start: str) -> None:
    flips = 0
    for seed in range(2):
        model, loss, expected = regression(seed)
        if start == "zeros":
            nn.init.zeros_(model.weight)
        flips += int((np.sign(model.weight.detach().numpy()[0]) * np.sign(expected) < 0).sum())
        handle = spred(model, 0.1, **options).apply()
        groups = handle.param_groups()
        optimizer: Any = torch.optim.SGD(groups, 0.1, momentum=0.9) if rule == "sgd" else torch.optim.Adam(groups, 0.02)
        for _ in range(1000):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        if not options.get("group"):
            np.testing.assert_allclose(model.weight.detach().numpy()[0], expected, atol=1e-4)
        else:
            assert handle.report(loss).residual < 1e-3
    assert flips >= 4 or start == "zeros"


def test_three_factors_change_signs() -> None:
    """(w - 1)^2 / 2 from w = -1 with a small penalty ends near 1; balanced factors of it stop at zero."""
    ends = []
    for lift in ("split", "balanced"):
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(model.weight, -1.0)
        handle = spred(model, 1e-3, factors=3).apply()
        with torch.no_grad():
            for p, part in zip(handle.originals("weight"), getattr(handle.lifts["weight"], lift)(model.weight), strict=True):
                p.copy_(part)
        optimizer = torch.optim.SGD(handle.param_groups(lr=0.05))
        for _ in range(1500):
            optimizer.zero_grad()
            (0.5 * (model.weight - 1).square().sum()).backward()
            optimizer.step()
        ends.append(float(model.weight.detach()))
    assert abs(ends[0] - 1) < 0.01 and abs(ends[1]) < 0.05


def test_a_failed_solve_leaves_the_model_as_it_was() -> None:
    for error in (KeyboardInterrupt, InputError):
        model, loss, _ = regression(0, bias=True)
        with torch.no_grad():
            model.weight[0, 0] = 0.0
        before, weight, calls = copy.deepcopy(model.state_dict()), model.weight, 0

        def broken(loss: Callable[[], Tensor] = loss, error: type[BaseException] = error) -> Tensor:
            nonlocal calls
            calls += 1
            if calls < 8:
                return loss()
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
            return loss() * float("nan")

        with pytest.raises(error):
            solve(model, broken, 0.1)
        assert calls == 8 and type(model) is nn.Linear and model.weight is weight and model.weight.grad is None
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and list(before) == list(model.state_dict())


def test_the_certificate_asks_for_the_parameters_without_penalty() -> None:
    model, loss, _ = regression(0, bias=True)
    assert solve(model, loss, 0.1).estimate().ok
    with torch.no_grad():
        model.bias += 1.0  # the weights are near their conditions, the bias is far from any
    report = spred(model, 0.1).apply().report(loss)
    assert report.free["bias"] == pytest.approx(10, rel=1e-5) and report.residual >= report.free["bias"] and not report.estimate().ok


@pytest.mark.parametrize("group", [None, "out"])
def test_pruning_with_ties_and_without_numbers(group: Any) -> None:
    model = nn.Linear(10, 10, bias=False)
    nn.init.constant_(model.weight, 0.5)
    handle = spred(model, 1e-2, group=group).apply()
    assert handle.prune(keep=0.1)["weight"] == pytest.approx(0.1) and int((model.weight != 0).sum()) == 10
    with torch.no_grad():
        handle.originals("weight")[0][0, 0] = float("nan")
    for options in ({"keep": 0.1}, {"tol": 0.1}):
        with pytest.raises(InputError, match="not finite"):
            handle.prune(**options)


# ------------------------------------------------------------------------------------------------ the way back


def trained(make: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, 1e-2)) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    optimizer = make(model.parameters())
    step(model, optimizer)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)).square().sum().backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: Any) -> list[Tensor]:
    grads = [p.grad if p.grad is not None else torch.tensor(-1.0) for p in model.parameters()]
    held = [torch.as_tensor(v) for p in model.parameters() for v in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*model.parameters(), *grads, *held)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", ["spred", "syre"])
@pytest.mark.parametrize("verb", ["undo", "bake"])
def test_groups_added_by_the_user_stay(method: str, verb: str) -> None:
    model, optimizer = trained()
    handle = spred(model, 1e-2) if method == "spred" else syre(model, 0.1).shift()
    handle.apply(optimizer)
    new = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [new], "lr": 0.5})
    getattr(handle, verb)()
    assert [g["lr"] for g in optimizer.param_groups] == [1e-2, 0.5] and optimizer.param_groups[1]["params"][0] is new
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_an_edit_is_undone_beside_a_group_added_since() -> None:
    model, optimizer = trained()
    before = state_of(model, optimizer)
    edit = Edit("test", model, {"0.weight": 2 * model[0].weight.detach()}, Estimate(0.0))
    edit.apply(optimizer)
    new = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [new]})
    optimizer.state[new] = {"step": torch.tensor(1.0)}
    edit.undo()
    assert same(state_of(model, optimizer), before) and len(optimizer.param_groups) == 2 and new in optimizer.state


@pytest.mark.parametrize("method", ["spred", "syre"])
def test_a_reparametrisation_undone_gives_gradients_and_state_back(method: str) -> None:
    model, optimizer = trained()
    before = state_of(model, optimizer)
    handle = spred(model, 1e-2) if method == "spred" else syre(model, 0.1).shift()
    handle.apply(optimizer)
    for state in optimizer.state.values():  # a step that is taken back in the weights only
        for value in state.values():
            value.add_(1.0)
    handle.undo()
    after = state_of(model, optimizer)
    if method == "syre":  # the biases are lifted, too
        assert same(after, before)
    for p, g in zip(model.parameters(), before[4:8], strict=True):
        assert p.grad is not None and torch.equal(p.grad, g)
    weight = optimizer.state[model[0].weight]
    assert all(torch.equal(torch.as_tensor(v), w) for v, w in zip(weight.values(), before[8:11], strict=True))
