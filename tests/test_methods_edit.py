"""The handle every method returns: it puts an edit in, moves what belongs to the weights along, and takes it out bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.methods import Edit, edited, linear_transport, output_change, sliced_transport
from parasym.optim import LaProp

Made = Callable[[Any], torch.optim.Optimizer]
KNOWN: dict[str, Made] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-12, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-12, weight_decay=0.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01, eps=1e-12),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, eps=1e-12),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "laprop": lambda p: LaProp(p, lr=0.01),
}
ORDER = torch.tensor([3, 0, 4, 1, 2])


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 4, generator=g, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - x[:, :2].sin()).square().mean().backward()
        optimizer.step()


def permuted(model: nn.Module, back: bool = False) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    order = torch.argsort(ORDER) if back else ORDER
    return lambda p: {"0.weight": p["0.weight"][order], "0.bias": p["0.bias"][order], "2.weight": p["2.weight"][:, order]}


def swap(model: nn.Module) -> Edit:
    params = {n: p.detach() for n, p in model.named_parameters()}
    after = permuted(model)(params)
    certificate = output_change(model, after, [((torch.randn(8, 4),), {})])
    return Edit("permute", model, after, certificate, linear_transport(permuted(model, back=True), after, monomial=True))


def scale(model: nn.Module, by: Tensor, monomial: bool = True) -> Edit:
    def act(p: dict[str, Tensor], s: Tensor) -> dict[str, Tensor]:
        return {"0.weight": s[:, None] * p["0.weight"], "0.bias": s * p["0.bias"], "2.weight": p["2.weight"] / s}

    after = act({n: p.detach() for n, p in model.named_parameters()}, by)
    transport = linear_transport(lambda p: act(p, 1 / by), after, monomial=monomial)
    return Edit("rescale", model, after, output_change(model, after, [((torch.randn(8, 4),), {})]), transport)


@pytest.mark.parametrize("name", KNOWN)
def test_training_goes_on_as_it_would_have_in_permuted_weights(name: str) -> None:
    model = net()
    optimizer = KNOWN[name](model.parameters())
    train(model, optimizer, 5, 1)
    plain = copy.deepcopy(model)
    other = KNOWN[name](plain.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    edit = swap(model)
    assert edit.certificate.ok and float(edit.certificate) < 1e-15
    assert edit.apply(optimizer).moved == ("0.weight", "0.bias", "2.weight")
    train(model, optimizer, 5, 2)
    train(plain, other, 5, 2)
    want = permuted(plain)(dict(plain.named_parameters()))
    for n, p in model.named_parameters():
        assert torch.allclose(p, want.get(n, dict(plain.named_parameters())[n]), rtol=1e-10, atol=1e-12), n


def test_momentum_moves_by_the_inverse_transpose() -> None:
    """SGD with momentum on a rescaled net, at the learning rates the metric of the new point asks for, follows the same functions."""
    model, by = net(), torch.tensor([2.0, 0.5, 3.0, 1.0, 0.25], dtype=torch.float64)
    optimizer = KNOWN["sgd"](model.parameters())
    train(model, optimizer, 3, 1)
    before = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    scale(model, by).apply(optimizer)
    after = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    assert torch.allclose(after["0.weight"], before["0.weight"] / by[:, None])
    assert torch.allclose(after["2.weight"], before["2.weight"] * by)
    assert not torch.allclose(after["0.weight"], before["0.weight"] * by[:, None])


def test_adams_second_moment_moves_by_the_square_and_is_reset_where_the_map_is_not_monomial() -> None:
    model, by = net(), torch.tensor([2.0, 0.5, 3.0, 1.0, 0.25], dtype=torch.float64)
    optimizer = KNOWN["adamw"](model.parameters())
    train(model, optimizer, 3, 1)
    w = model[0].weight
    before = optimizer.state[w]["exp_avg_sq"].clone()
    edit = scale(model, by)
    edit.apply(optimizer)
    assert torch.allclose(optimizer.state[w]["exp_avg_sq"], before / by[:, None] ** 2)
    edit.bake()
    reset = scale(model, by, monomial=False).apply(optimizer)
    assert reset.reset == ("0.weight", "0.bias", "2.weight") and w not in optimizer.state and model[2].bias in optimizer.state


@pytest.mark.parametrize("name", KNOWN)
def test_undo_is_bit_by_bit(name: str) -> None:
    model = net()
    optimizer = KNOWN[name](model.parameters())
    train(model, optimizer, 3, 1)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    edit = scale(model, torch.linspace(0.3, 3, 5).double())
    edit.apply(optimizer)
    edit.undo()
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in weights.items())
    assert all(torch.equal(a, b) for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
    now = optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"] and now["state"].keys() == state["state"].keys()
    for i, entry in state["state"].items():
        for k, v in entry.items():
            assert torch.equal(torch.as_tensor(v), torch.as_tensor(now["state"][i][k])), k


def cut(model: nn.Module, keep: list[int]) -> Edit:
    slices: dict[str, Callable[[Tensor], Tensor]] = {
        "0.weight": lambda t: t[keep],
        "0.bias": lambda t: t[keep],
        "2.weight": lambda t: t[:, keep],
    }
    after = {n: slices[n](dict(model.named_parameters())[n].detach()) for n in slices}
    attributes = {"0.out_features": len(keep), "2.in_features": len(keep)}
    certificate = output_change(model, after, [((torch.randn(8, 4),), {})], attributes=attributes)
    return Edit("cut", model, after, certificate, sliced_transport(slices), attributes)


def test_an_edit_that_changes_shapes_trains_on_and_comes_back() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    optimizer = KNOWN["adamw"](model.parameters())
    old = [*model.parameters()]
    train(model, optimizer, 1, 1)
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    buffer = optimizer.state[model[0].weight]["exp_avg"].clone()
    edit = cut(model, [0, 2, 3, 4])
    assert edit.certificate.ok
    assert cut(model, [0, 1, 3, 4]).certificate.status == "violated"  # unit 2 is alive
    edit.apply(optimizer)
    assert model[0].weight.shape == (4, 4) and model[0].out_features == 4
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], buffer[[0, 2, 3, 4]])
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    edit.undo()
    assert [id(p) for p in model.parameters()] == [id(p) for p in old] and model[0].out_features == 5
    edit.apply(optimizer)
    train(model, optimizer, 2, 3)
    with pytest.raises(InputError, match=r"trained after"):
        edit.undo()
    edit.bake()
    model.load_state_dict(edited(model, {}).state_dict())


def test_a_while_inside_with_and_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)}).double()
    model["b"].weight = model["a"].weight
    before = model["a"].weight.detach().clone()
    edit = Edit("double", model, {"a.weight": 2 * before}, Estimate(0.0))
    assert torch.equal(model["a"].weight, before) and not edit.applied
    with edit:
        assert torch.equal(model["b"].weight, 2 * before) and model["a"].weight is model["b"].weight
    assert torch.equal(model["b"].weight, before)
    narrow = Edit("narrow", model, {"a.weight": before[:2]}, Estimate(0.0))
    narrow.apply()
    assert model["a"].weight is model["b"].weight and model["b"].weight.shape == (2, 3)


def test_errors_say_what_to_do() -> None:
    model = net()
    with pytest.raises(InputError, match=r"no parameter or buffer 'x'"):
        Edit("m", model, {"x": torch.zeros(1)}, Estimate(0.0))
    edit = swap(model)
    with pytest.raises(InputError, match=r"not applied"):
        edit.undo()
    train(model, KNOWN["sgd"](model.parameters()), 1, 0)
    with pytest.raises(InputError, match=r"changed since"):
        edit.apply()
    edit = swap(model)
    edit.apply()
    with pytest.raises(InputError, match=r"applied already"):
        edit.apply()
    edit.undo()

    class Strange(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for p in model.parameters():
                self.state[p]["secret"] = torch.ones_like(p)

    strange = Strange(model.parameters(), lr=0.1)
    train(model, strange, 1, 0)
    edit, before = swap(model), copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"Strange is not an optimiser.*secret.*unknown='reset'"):
        edit.apply(strange)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in before.items())
    assert edit.apply(strange, unknown="reset").reset
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"NaN|nan"):
        Edit("m", model, {"0.weight": torch.zeros(5, 4)}, Estimate(0.0))
