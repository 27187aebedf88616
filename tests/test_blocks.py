"""Models without a twin: symmetries found block by block, in the names of the whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parasym
from judge import change
from known_answers import fresh, generic_
from parasym.core.graph import trace
from parasym.symmetry import full
from parasym.symmetry.blocks import ACROSS, by_blocks, record


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tower(nn.Module):
    """Three blocks alike, and a weight that the model reads beside its module."""

    def __init__(self, width: int = 4, hidden: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(3))
        self.gain = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x) * self.gain
        for block in self.blocks:
            y = block(y)
        return F.linear(y, self.stem[2].weight.T)


def tower() -> tuple[Tower, Tensor]:
    with fresh(0):
        return generic_(Tower()).double().eval(), torch.randn(20, 3).double()


def test_each_block_gives_its_symmetries_to_the_model() -> None:
    model, x = tower()
    asked: list[str] = []

    def solve(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> parasym.SymmetrySet:
        asked.append(type(block).__name__)
        return parasym.symmetries(block, args, kwargs)

    found = by_blocks(model, (x,), None, trace(model, (x,)), solve)
    assert asked == ["Sequential", "Block"]  # three blocks alike are searched once
    for i in range(3):
        inside = [s for s in found if all(p.startswith(f"blocks.{i}.") for p in s.parameters)]
        assert {s.group for s in inside} >= {"R+^5", "S_5"}
        assert sum(s.dim for s in inside) == sum(s.dim for s in found if s.where.startswith("blocks.0"))
    generator = torch.Generator().manual_seed(1)
    for s in found:
        residual, moved = change(model, s, [(x,)], generator)
        assert residual <= 1e-10, s
        assert moved >= 1e-3, s
        assert "found within" in s.note
    assert any(u["why"] == ACROSS for u in found.undecided)


def test_a_parameter_read_outside_its_block_is_not_claimed() -> None:
    model, x = tower()
    found = by_blocks(model, (x,), None, trace(model, (x,)), parasym.symmetries)
    assert not any("stem.2.weight" in s.parameters for s in found)
    held = [u for u in found.undecided if "stem.2.weight" in u["parameters"]]
    assert any("outside this block" in u["why"] for u in held)
    alone = parasym.symmetries(model.stem, (x,))  # and rightly: the rescaling of the stem alone changes the model
    (scale,) = [s for s in alone if s.group == "R+^5"]
    params = {n: p.detach() for n, p in model.named_parameters()}
    moved = scale.act({n.removeprefix("stem."): p for n, p in params.items() if n.startswith("stem.")}, torch.full((5,), 0.3))
    with torch.no_grad():
        before, after = model(x), torch.func.functional_call(model, params | {f"stem.{n}": p for n, p in moved.items()}, (x,))
    assert float((after - before).abs().max()) > 1e-2


def test_what_cannot_be_searched_is_listed() -> None:
    model, x = tower()

    def solve(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> parasym.SymmetrySet:
        raise parasym.ParasymError("too strange")

    found = by_blocks(model, (x,), None, trace(model, (x,)), solve)
    assert len(found) == 0
    listed = {p for u in found.undecided if "too strange" in u["why"] for p in u["parameters"]}
    assert listed == {n for n, _ in model.named_parameters()} - {"gain"}


@pytest.mark.parametrize("training", [True, False])
def test_recording_leaves_the_model_alone(training: bool) -> None:
    with fresh(0):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train(training)
        x = torch.randn(6, 3)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    calls = record(model, (x,), {})
    assert set(calls) == {"0", "1", "2"}
    assert calls["1"].args[0].shape == (6, 4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training == training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_audit_falls_back_to_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights at hand each family of a block is certified on the whole model; nothing is called complete."""
    with fresh(0):
        model, x = generic_(Tower(width=8, hidden=40)).double().eval(), torch.randn(20, 3).double()
    twins = full.find_twin
    monkeypatch.setattr(full, "find_twin", lambda m, *rest: None if isinstance(m, Tower) else twins(m, *rest))
    audit = parasym.audit(model, (x,))
    assert audit.completeness.explained is None
    assert "each block" in audit.completeness.method
    assert sum(1 for s in audit.symmetries if s.group == "R+^40" and s.certified) == 3
    assert all(s.residual <= 1e-10 for s in audit.symmetries)
    assert any(u["why"] == ACROSS for u in audit.undecided)
    assert audit.classified["rigid"] == 0
    assert sum(audit.classified.values()) == sum(p.numel() for p in model.parameters())
    false = Scaled.only(audit.symmetries[0])
    monkeypatch.setattr(full, "by_blocks", lambda *rest: parasym.SymmetrySet((false,)))  # the whole model is the judge
    refuted = parasym.audit(model, (x,))
    assert refuted.symmetries == []
    assert any("full model's outputs" in r["why"] for r in refuted.refuted)


class Scaled:
    """An action that is none: it doubles one weight."""

    dim = 1

    @classmethod
    def only(cls, like: parasym.Symmetry) -> parasym.Symmetry:
        return replace(like, action=cls(), parameters=("blocks.0.up.weight",), dim=1, name="false")

    def act(self, params: dict[str, Tensor], element: Tensor) -> dict[str, Tensor]:
        return {"blocks.0.up.weight": 2 * params["blocks.0.up.weight"]}

    def generators(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"blocks.0.up.weight": params["blocks.0.up.weight"][None]}
