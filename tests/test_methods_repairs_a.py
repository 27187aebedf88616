"""Methods under use they once failed: signs that must change, interrupts, groups added later, and the way back to the last bit."""

from __future__ import annotations

import copy
import importlib
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
from parasym.methods.masks import Masking
from parasym.methods.width import thin
from parasym.optim import LaProp


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
    params = sorted(model.parameters(), key=id)  # a parametrised module names its parameters in another order
    grads = [p.grad if p.grad is not None else torch.tensor(-1.0) for p in params]
    held = [torch.as_tensor(v) for p in params for v in optimizer.state[p].values()]
    return [t.detach().clone() for t in (*params, *grads, *held)]


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
    first = [torch.as_tensor(v).clone() for v in optimizer.state[model[0].weight].values()]
    handle = spred(model, 1e-2) if method == "spred" else syre(model, 0.1).shift()
    handle.apply(optimizer)
    for state in optimizer.state.values():  # a step that is taken back in the weights only
        for value in state.values():
            value.add_(1.0)
    handle.undo()
    after = state_of(model, optimizer)
    if method == "syre":  # the biases are lifted, too
        assert same(after, before)
    for a, b in zip(after[:8], before[:8], strict=True):  # weights and gradients
        assert torch.equal(a, b)
    assert all(torch.equal(torch.as_tensor(v), w) for v, w in zip(optimizer.state[model[0].weight].values(), first, strict=True))


# ------------------------------------------------------------------------------------------------ syre


@pytest.mark.parametrize("rule", ["sgd", "adam", "adamw", "laprop"])
@pytest.mark.parametrize("named", [False, True])
def test_the_pull_acts_in_a_step_with_a_closure(rule: str, named: bool) -> None:
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
        "laprop": lambda p: LaProp(p, 1e-2, weight_decay=0.1),
    }

    def run(how: str) -> Tensor:
        model, loss, _ = regression(0, bias=True)
        optimizer = makers[rule](model.parameters())
        if how != "plain":
            syre(model, 0.3).attach(optimizer)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        for _ in range(5):
            if how == "closure":
                value = optimizer.step(closure=closure) if named else optimizer.step(closure)
                assert isinstance(value, Tensor)
            else:
                closure()
                optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    assert torch.equal(run("closure"), run("step")) and not torch.allclose(run("closure"), run("plain"), atol=1e-5)


@pytest.mark.parametrize("rate", [1.0, torch.tensor(1.0)])
def test_a_decay_that_wipes_the_weights_is_refused(rate: Any) -> None:
    model, loss, _ = regression(0)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1.0, foreach=False)
    syre(model, 0.3).attach(optimizer)
    loss().backward()
    before = model.weight.detach().clone()
    with pytest.raises(InputError, match="lr \\* weight_decay = 1"):
        optimizer.step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("metric", ["identity", "random"])
def test_a_state_that_was_not_stored_gives_its_own_point(metric: Any) -> None:
    model = nn.Linear(4, 3)
    lean = syre(model, 0.2, metric=metric, seed=5, stored=False)
    other = syre(model, 0.1, metric=metric, seed=9)
    other.load_state_dict(lean.state_dict())
    assert other.seed == 5
    for n in lean.parameters:
        assert torch.equal(other.theta0(n), lean.theta0(n))
        if metric == "random":
            assert torch.equal(other.excess(n), lean.excess(n))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ masks and multiplicities

RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adam fused": lambda p: torch.optim.Adam(p, 1e-2, fused=True),
    "adam foreach": lambda p: torch.optim.Adam(p, 1e-2, foreach=True),
}


@pytest.mark.parametrize("rule", list(RULES))
def test_masks_taken_away_give_momentum_and_gradients_back(rule: str) -> None:
    model, optimizer = trained(RULES[rule])
    before = state_of(model, optimizer)
    masks = {n: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) > 0.5 for n, p in model.named_parameters() if p.dim() > 1}
    edit = Masking("prune", model, {}, Estimate(0.0), masks=masks)
    edit.apply(optimizer)
    assert not same(state_of(model, optimizer), before)
    edit.undo()
    assert same(state_of(model, optimizer), before)
    edit = Masking("prune", model, {}, Estimate(0.0), masks=masks)
    edit.apply(optimizer)
    step(model, optimizer)
    left = state_of(model, optimizer)
    edit.undo()
    assert same(state_of(model, optimizer), left)  # what was trained stays as training left it


def test_a_refused_undo_leaves_the_multiplicities_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    x = torch.randn(16, 2, dtype=torch.float64)
    whole = {n: v.clone() for n, v in model.state_dict().items()}
    edit = thin(model, (x,), where="0", order=2)
    edit.apply()
    names, output = list(model.state_dict()), model(x).detach()
    for p in model.parameters():  # any one of them
        with torch.no_grad():
            p.add_(0.1)
        with pytest.raises(InputError, match="trained after"):
            edit.undo()
        assert list(model.state_dict()) == names
        with torch.no_grad():
            p.sub_(0.1)
        torch.testing.assert_close(model(x), output, atol=1e-12, rtol=0)
    edit.bake()
    torch.testing.assert_close(model(x), output, atol=1e-12, rtol=0)
    model.load_state_dict(model.state_dict())
    fresh = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 1)).double()
    fresh.load_state_dict(whole)
    edit = thin(fresh, (x,), where="0", order=2)
    edit.apply()
    edit.undo()
    assert all(torch.equal(v, whole[n]) for n, v in fresh.state_dict().items())


def test_solve_goes_on_where_the_line_search_drowns_in_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def residual() -> float:
        g = torch.Generator().manual_seed(0)
        x, truth = torch.randn(80, 30, generator=g, dtype=torch.float64), torch.randn(6, 3, generator=g, dtype=torch.float64)
        y = x[:, :6] @ truth + 0.3 * torch.randn(80, 3, generator=g, dtype=torch.float64)
        model = nn.Linear(30, 3, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(0.3 * torch.randn(3, 30, generator=g, dtype=torch.float64))
        return solve(model, lambda: 0.5 * (model(x) - y).square().sum() / 80, 0.15, group="in", tol=1e-12).residual

    polished = residual()
    module = importlib.import_module("parasym.methods.spred")  # the package has a function of that name
    monkeypatch.setattr(module, "_polished", lambda plan, loss, closure, limit, reached: reached)
    assert polished < 1e-9 < residual()
