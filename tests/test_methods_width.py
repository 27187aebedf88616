"""Lossy compression of a layer: fewer units that learn like all of them; plasticity; paths between weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from known_answers import fresh
from parasym.core.errors import InputError
from parasym.core.functional import functional
from parasym.measure.paths import curved_path, straight_path
from parasym.measure.plasticity import plasticity, plasticity_signs
from parasym.methods import thin
from zoo import ZOO

WIDTH = 300


def wide(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    with fresh(seed):
        model = nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1, bias=False)).double()
        model[0].weight.data.normal_(std=0.5)
        model[0].bias.data.normal_(std=0.3)
        model[2].weight.data.normal_(std=1.0)
        model[2].weight.data /= WIDTH**0.5
        x = torch.linspace(-2, 2, 40)[:, None]
        return model, x, torch.sin(2 * x)


def descend(model: nn.Module, x: Tensor, y: Tensor, steps: int = 150, kind: str = "SGD", lr: float = 2e-3) -> Tensor:
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=lr)
    out = []
    for _ in range(steps):
        optimizer.zero_grad()
        f = model(x)
        out.append(f.detach())
        ((f - y).square().mean() / 2).backward()
        optimizer.step()
    return torch.stack(out)


def test_a_thinned_layer_learns_like_the_whole_one_and_the_folded_one_does_not() -> None:
    model, x, y = wide()
    whole = descend(copy.deepcopy(model), x, y)
    assert (whole[-1] - whole[0]).abs().max() > 0.3  # it learns
    small = copy.deepcopy(model)
    edit = thin(small, (x,), where="0", order=6)
    assert edit.certificate.ok and 0 < edit.certificate.value < 0.2
    assert float(edit.multiplicity.sum()) == pytest.approx(WIDTH) and len(edit.kept) == 84 == edit.summary["units"][0]
    edit.apply()
    ours = descend(small, x, y)
    folded = descend(edit_of(model, x).bake(), x, y)
    gap = (ours - whole).abs().max()
    assert gap < 0.2 * (folded - whole).abs().max() and gap < 0.05 * (whole[-1] - whole[0]).abs().max()
    worn = small(x).detach()
    plain = edit.bake()
    torch.testing.assert_close(plain(x), worn)
    assert list(plain.state_dict()) == list(model.state_dict()) and plain[0].out_features == 84


def edit_of(model: nn.Module, x: Tensor) -> Any:
    return thin(copy.deepcopy(model), (x,), where="0", order=6)


def test_undo_is_bitwise_and_refuses_trained_weights() -> None:
    model, x, y = wide()
    before = copy.deepcopy(model.state_dict())
    edit = thin(model, (x,), where="0", width=90)
    assert edit.summary["order"] == 6
    edit.apply()
    assert "2.parametrizations.weight.original" in model.state_dict()
    edit.undo()
    assert list(model.state_dict()) == list(before) and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    edit.apply()
    descend(model, x, y, 2)
    with pytest.raises(InputError, match="trained after"):
        edit.undo()


def test_optimiser_state_checkpoints_autocast_and_compile() -> None:
    model, x, y = wide()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ((model(x) - y).square().mean() / 2).backward()
    optimizer.step()
    edit = thin(model, (x,), where="0", order=4)
    moved = edit.apply(optimizer)
    assert "2.weight" in moved.moved
    for p in model.parameters():
        assert optimizer.state[p]["exp_avg"].shape == p.shape
    again, _, _ = wide()
    other = thin(again, (x,), where="0", order=4)
    other.apply()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))
    low = model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low(x.float()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in low.parameters())


def test_heads_and_principal_components() -> None:
    if not ZOO["hf-bert"].available:
        pytest.skip("needs transformers")
    model, args, kwargs = ZOO["hf-bert"].build()
    where = "model.encoder.layer.0.intermediate.dense"
    edit = thin(model, args, kwargs, where=where, order=1, components=2)
    assert len(edit.kept) == 3 and edit.certificate.ok
    with pytest.raises(InputError, match="components="):
        thin(model, args, kwargs, where=where, order=2)


def test_bad_input() -> None:
    model, x, _ = wide()
    for options, message in (
        ({"where": "7", "order": 1}, "no layer"),
        ({"where": "0"}, "either order= .* or width="),
        ({"where": "0", "order": 1, "width": 3}, "either order= .* or width="),
        ({"where": "0", "width": 0}, "between 1 and"),
        ({"where": "0", "order": 30}, "lower the order"),
    ):
        with pytest.raises(InputError, match=message):
            thin(model, (x,), **options)
    normed, args, kwargs = ZOO["layernorm"].build()
    with pytest.raises(InputError, match="layer_norm"):
        thin(normed, args, kwargs, where="0", order=0)


# ------------------------------------------------------------------------------------------------ plasticity and paths


def test_signs_and_plasticity_of_a_net_that_died() -> None:
    with fresh(0):
        model = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3))
        x = torch.randn(64, 5)
    healthy = plasticity_signs(model, (x,))["0"]
    dead = copy.deepcopy(model)
    dead[0].bias.data[4:] = -30.0
    sick = plasticity_signs(dead, (x,))["0"]
    assert healthy.dormant < 0.1 and sick.dormant == pytest.approx(0.8) and sick.rank < healthy.rank
    before = copy.deepcopy(dead.state_dict())
    well, ill = (plasticity(net, (x,), steps=60, lr=1e-2) for net in (model, dead))
    assert well.ok and ill.value < 0.6 * well.value and 0.5 < well.value < 1.5
    assert all(torch.equal(v, before[n]) for n, v in dead.state_dict().items())
    with pytest.raises(InputError, match="tasks"):
        plasticity(model, (x,), tasks=1)


def test_a_permuted_net_is_behind_a_barrier_that_a_curve_goes_round() -> None:
    with fresh(0):
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        x = torch.randn(100, 3)
    y = torch.sin(x.sum(1, keepdim=True))
    descend(model, x, y, 400, "Adam", 1e-2)
    f = functional(model)
    a = dict(f.params)
    order = torch.arange(15, -1, -1)
    b = {"0.weight": a["0.weight"][order], "0.bias": a["0.bias"][order], "2.weight": a["2.weight"][:, order], "2.bias": a["2.bias"]}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (f(params, (x,))[0] - y).square().mean()

    straight = straight_path(loss, a, b)
    assert float(straight.loss[0]) == pytest.approx(float(straight.loss[-1])) and straight.barrier.value > 10 * float(straight.loss[0])
    assert straight_path(loss, a, a).barrier.value == pytest.approx(0, abs=1e-12)
    bent, middle = curved_path(loss, a, b, steps=300, lr=3e-2)
    assert bent.barrier.value < 0.5 * straight.barrier.value and set(middle) == set(a)
    with pytest.raises(InputError, match="same names"):
        straight_path(loss, a, {"0.bias": a["0.bias"]})
