"""What every method that edits weights must survive, and what all methods refuse.

| | resume | AMP | compile | accumulation | groups | DDP, FSDP2 | tied | frozen |
|---|---|---|---|---|---|---|---|---|
| syre, spred, dcs | breakers | breakers | breakers | breakers | breakers | breakers_distributed | breakers | breakers |
| teleport | teleport | teleport | teleport | here | teleport | teleport_distributed | teleport | teleport |
| compress | here | here | here | here | here | cuts_distributed | compress | compress |
| revive | here | here | here | here | here | cuts_distributed | here | here |
| thin | here | here | here | here | here | cuts_distributed | here | here |
| prune | cuts, here | cuts, here | cuts, here | here | here | cuts_distributed | cuts | cuts |
| volumization, LaProp | optim | optim | optim | optim | optim | parts_distributed | optim | optim |

(the files are tests/test_methods_*.py, tests/test_optim.py and tests/test_parts_distributed.py)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from parasym.core.errors import InputError
from parasym.methods import compress, dcs, prune, revive, spred, syre, teleport, thin
from parasym.symmetry.mirror import Mirror

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(2))
EDITS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "teleport": lambda model, x: teleport(model, (x,), to="balance"),
    "compress": lambda model, x: compress(model, (x,)),
    "revive": lambda model, x: revive(model, (x,)),
    "thin": lambda model, x: thin(model, (x,), where="0", order=1, components=4),
    "prune": lambda model, x: prune(model, (x,), keep=0.5),
}
EACH = pytest.mark.parametrize("method", list(EDITS))


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Unit 2 is dead for ever, unit 7 the twin of unit 4 for ever."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)).to(dtype)
    with torch.no_grad():
        model[0].weight[2], model[0].bias[2], model[2].weight[:, 2] = 0, 0, 0
        model[0].weight[7], model[0].bias[7], model[2].weight[:, 7] = model[0].weight[4], model[0].bias[4], model[2].weight[:, 4]
    return model


def grouped(model: nn.Module) -> torch.optim.Optimizer:
    wide, narrow = ([p for p in model.parameters() if (p.dim() > 1) == both] for both in (True, False))
    return torch.optim.Adam([{"params": wide, "weight_decay": 0.1}, {"params": narrow, "lr": 3e-3}], lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: Tensor = X) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), Y).backward()
        optimizer.step()


def members(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {p: n.replace(".parametrizations", "").replace(".original", "") for n, p in model.named_parameters()}
    return [sorted(names[p] for p in g["params"]) for g in optimizer.param_groups]


@EACH
def test_groups_stay_and_a_resumed_run_is_bitwise_the_same(method: str) -> None:
    model = net()
    optimizer = grouped(model)
    before = members(model, optimizer)
    train(model, optimizer, 2)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    EDITS[method](model, X).apply(optimizer)
    assert members(model, optimizer) == before and [g["lr"] for g in optimizer.param_groups] == [1e-2, 3e-3]
    now = dict(model.named_parameters())
    assert any(n not in now or now[n].shape != w.shape or not torch.equal(now[n], w) for n, w in weights.items())
    train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again = copy.deepcopy(model)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    resumed = grouped(again)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(model, optimizer, 3)
    train(again, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert not torch.equal(model[4].bias, saved[0]["4.bias"])


@pytest.mark.parametrize("method", ["teleport", "compress"])
def test_an_edit_amid_accumulation_carries_the_gradients(method: str) -> None:
    """Half a batch before the edit and half after it give the gradient of the whole batch at the new point."""
    model = net()
    for part in (slice(0, 12), slice(12, 24)):
        (F.cross_entropy(model(X[part]), Y[part]) / 2).backward()
        if part.start == 0:
            EDITS[method](model, X).apply()
    found = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(found[n], p.grad, atol=1e-12, rtol=1e-9, msg=n)
    assert model[0].weight.shape[0] == (10 if method == "compress" else 12)


@pytest.mark.parametrize("method", ["revive", "thin", "prune"])
def test_an_edit_amid_accumulation_leaves_gradients_of_the_right_shape(method: str) -> None:
    model = net()
    F.cross_entropy(model(X), Y).backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    EDITS[method](model, X).apply(optimizer)
    F.cross_entropy(model(X), Y).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    optimizer.step()


@EACH
def test_mixed_precision_and_a_compiled_model(method: str) -> None:
    model, x = net(torch.float32), X.float()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    old = compiled(x).detach()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    train(model, optimizer, 1, x)
    model.load_state_dict(net(torch.float32).state_dict())
    EDITS[method](model, x).apply(optimizer)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    if method not in ("thin", "prune"):
        torch.testing.assert_close(compiled(x), old, atol=1e-5, rtol=1e-4)
    else:
        assert not torch.allclose(compiled(x), old, atol=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), Y) * (float("inf") if step == 1 else 1.0)
        scaler.scale(loss).backward()
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (step == 1)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("method", ["revive", "thin"])
def test_frozen_weights_keep_their_values(method: str) -> None:
    """revive leaves a frozen layer alone; thin, asked for it, cuts it: what stays has its values, and is not trained."""
    model = net()
    model[0].weight.requires_grad_(False)
    kept = model[0].weight.detach().clone()
    edit = EDITS[method](model, X)
    edit.apply()
    assert torch.equal(model[0].weight, kept[edit.kept] if method == "thin" else kept)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 2)
    assert torch.equal(model[0].weight, kept[edit.kept] if method == "thin" else kept)


class Twice(nn.Module):
    """A layer read twice through one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.again = nn.Linear(5, 12), nn.Linear(12, 3), nn.Linear(12, 3, bias=False)
        self.again.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.up(x))
        return self.down(h) + self.again(h.square())


@pytest.mark.parametrize("method", ["revive", "thin"])
def test_weights_tied_across_layers_stay_tied(method: str) -> None:
    torch.manual_seed(0)
    model = Twice().double()
    with torch.no_grad():
        model.up.bias[1] = -100
    old = model(X).detach()
    edit = revive(model, (X,)) if method == "revive" else thin(model, (X,), where="up", order=1, components=4)
    edit.apply(torch.optim.SGD(model.parameters(), 0.1))
    weights = model.down.parametrizations.weight.original if method == "thin" else model.down.weight
    assert weights is (model.again.parametrizations.weight.original if method == "thin" else model.again.weight)
    if method == "revive":
        assert edit.summary["units"] == 1
        torch.testing.assert_close(model(X), old, atol=1e-12, rtol=0)
    model = edit.bake()
    assert model.down.weight is model.again.weight and model.down.weight.shape == (3, 5 if method == "thin" else 12)


# ------------------------------------------------------------------------------------------------------------------- bad input

METHODS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    **EDITS,
    "syre": lambda model, x: syre(model).shift(),
    "spred": lambda model, x: spred(model, 1e-3),
    "dcs": lambda model, x: dcs(model, Mirror.zeros({"0.weight": torch.ones(12, 5) > 0}), 1e-3, imposed=True),
}


def not_finite() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return model


def whole_numbers() -> nn.Module:
    model = net()
    for layer in (model[0], model[2], model[4]):
        layer.weight = nn.Parameter(torch.ones_like(layer.weight, dtype=torch.int64), requires_grad=False)
        layer.bias = nn.Parameter(torch.ones_like(layer.bias, dtype=torch.int64), requires_grad=False)
    return model


def parametrized() -> nn.Module:
    model = net()
    for layer in (model[0], model[2], model[4]):
        for name in ("weight", "bias"):
            parametrize.register_parametrization(layer, name, nn.Identity())
    return model


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize(
    ("sick", "says"),
    [(not_finite, "NaN|not finite"), (whole_numbers, "integer|int64|trainable|float|have none"), (parametrized, "parametri")],
)
def test_bad_models_are_refused_with_the_reason(method: str, sick: Callable[[], nn.Module], says: str) -> None:
    model = sick()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=says):
        METHODS[method](model, X)
    assert all(torch.equal(v.nan_to_num(), before[n].nan_to_num()) for n, v in model.state_dict().items())


class Strange(torch.optim.Optimizer):
    """An optimiser of a class of its own, with a memory that nobody knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["memory"] = torch.ones_like(p)


@pytest.mark.parametrize("method", list(METHODS))
def test_an_optimiser_of_an_unknown_class_is_refused_and_nothing_moves(method: str) -> None:
    model = net()
    optimizer = Strange(model.parameters())
    optimizer.step()
    handle, before = METHODS[method](model, X), copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="Strange"):
        handle.apply(optimizer)
    assert list(model.state_dict()) == list(before) and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
