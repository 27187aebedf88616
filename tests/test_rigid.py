"""Every trainable parameter is symmetric, rigid, or undecided with the reason; none is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parasym
from parasym.core.graph import trace
from parasym.symmetry.rigid import at_full_size, nowhere
from parasym.symmetry.spaces import find_spaces
from parasym.symmetry.symmetry import Classified, Symmetry, SymmetrySet


@torch.library.custom_op("parasym_test::strange", mutates_args=())
def strange(x: Tensor) -> Tensor:
    """An operator that no index rule knows."""
    return torch.tanh(x) * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)


@strange.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    (x,) = ctx.saved_tensors
    return grad * (1 - torch.tanh(x) ** 2) * torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)


strange.register_autograd(_backward, setup_context=_setup)


class Three(nn.Module):
    """A hidden layer (symmetric), an output bias (rigid), and weights behind an operator without a rule (undecided)."""

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.up, self.down, self.side = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 5, bias=False)
        self.known = known

    def forward(self, x: Tensor) -> Tensor:
        y = self.side(x)
        z = torch.tanh(y) * torch.arange(1, 6, dtype=y.dtype) if self.known else strange(y)
        return torch.cat([self.down(torch.relu(self.up(x))), z], 1)


def classes(model: nn.Module, x: Tensor) -> dict[str, Classified]:
    found = parasym.symmetries(model, (x,))
    out = found.classify()
    assert set(out) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n: c.size for n, c in out.items()} == {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(found.counts().values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(r["count"] for r in found.reasons()) == found.counts()["undecided"]
    assert all(c.why for c in out.values() if c.kind != "symmetric")
    assert all(bool(c.by) == (c.kind == "symmetric") for c in out.values())
    return out


def test_all_three_kinds_and_the_control_in_which_nothing_is_undecided() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3)
    kinds = {n: c.kind for n, c in classes(Three(known=False), x).items()}
    hidden = {"up.weight": "symmetric", "up.bias": "symmetric", "down.weight": "symmetric"}
    assert kinds == {**hidden, "down.bias": "rigid", "side.weight": "undecided"}
    found = classes(Three(known=False), x)
    assert "strange" in found["side.weight"].why
    assert "rescaling of each channel" in found["up.weight"].by or any("rescaling" in name for name in found["up.weight"].by)
    kinds = {n: c.kind for n, c in classes(Three(known=True), x).items()}
    assert kinds == {**hidden, "down.bias": "rigid", "side.weight": "rigid"}


def test_a_model_without_symmetries_is_rigid_throughout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.GELU(), nn.Linear(1, 2))
    assert {c.kind for c in classes(model, torch.randn(7, 3)).values()} == {"rigid"}


def test_frozen_parameters_are_not_classified() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)  # type: ignore[union-attr]
    assert "2.weight" not in classes(model, torch.randn(7, 3))


def test_a_large_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 10))
    found = classes(model, torch.randn(4, 64))
    assert {n for n, c in found.items() if c.kind == "rigid"} == {"4.bias"}
    assert all(c.kind == "symmetric" for n, c in found.items() if n != "4.bias")
    assert "twin" in found["4.bias"].why


def test_without_a_twin_nothing_is_called_rigid(monkeypatch: pytest.MonkeyPatch) -> None:
    import parasym.symmetry.full as full

    monkeypatch.setattr(full, "find_twin", lambda *args, **kwargs: None)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    found = classes(model, torch.randn(4, 64))
    assert {c.kind for c in found.values()} == {"undecided"}
    assert "no twin of the whole model" in found["0.weight"].why


def test_the_audit_counts_the_same() -> None:
    torch.manual_seed(0)
    audit = parasym.audit(Three(known=False), (torch.randn(7, 3),)).to_dict()
    assert audit["classified"] == {"symmetric": 24, "rigid": 2, "undecided": 15}
    assert [(r["count"], r["parameters"]) for r in audit["reasons"]] == [(15, ["side.weight"])]


def test_a_proof_does_not_pass_to_a_parameter_without_a_counterpart() -> None:
    graph = trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), (torch.randn(7, 3),))
    proven = {"t": Classified("rigid", 2, "proof")}
    found = at_full_size(find_spaces(graph), {"1.bias": "t", "0.bias": "elsewhere"}, proven)
    assert found["1.bias"] == Classified("rigid", 2, "in the twin proof")
    assert {n: c.kind for n, c in found.items() if n != "1.bias"} == dict.fromkeys(("0.weight", "0.bias", "1.weight"), "undecided")


def test_an_uncertified_symmetry_classifies_nothing() -> None:
    graph = trace(nn.Linear(3, 2), (torch.randn(7, 3),))
    claim: Any = None
    for certified, kind in ((True, "symmetric"), (False, "undecided")):
        s = Symmetry("claim", "R", 1, "pure", ("bias",), "function", 0.0, certified, claim)
        found = SymmetrySet((s,), rest=nowhere(graph, "no reason"))
        assert found.classify()["bias"].kind == kind
        assert sum(found.counts().values()) == 8
        assert found.to_dict()["classified"] == found.counts()
