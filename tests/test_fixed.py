"""Collapsed states of continuous families: distances see planted collapse, projections put weights exactly there."""

from __future__ import annotations

import torch

from known_answers import CASES
from parasym.core.graph import trace
from parasym.symmetry.search import Search, search
from parasym.symmetry.symmetry import Symmetry


def found_on(name: str) -> Search:
    model, inputs = CASES[name].build()
    return search(trace(model, inputs[0]), [list(b) for b in inputs], torch.Generator().manual_seed(0), grow=False)


def first(found: Search, group: str) -> Symmetry:
    return next(s for s in found.symmetries if s.group.startswith(group) and s.fixed_set is not None)


def test_a_zeroed_unit_lies_on_the_fixed_set_of_its_scale() -> None:
    found = found_on("mlp-relu-bias")
    params, s = found.graph.params, first(found, "R+")
    assert s.fixed_set is not None
    assert s.fixed_set.distance(params).shape == (6,)
    assert float(s.fixed_set.distance(params).min()) > 0.05
    moved = {**params, **s.fixed_set.project(params, 2)}
    assert (s.fixed_set.distance(moved) == 0).nonzero().flatten().tolist() == [2]
    assert not moved["0.weight"][2].any()
    assert not moved["2.weight"][:, 2].any()
    assert torch.equal(moved["0.weight"][1], params["0.weight"][1])
    # the fixed set is what the group leaves alone: any element fixes what it moves of that unit
    again = s.act(moved, torch.tensor([0, 0, 0.7, 0, 0, 0], dtype=torch.float64))
    assert all(torch.equal(again[n], moved[n]) for n in moved)


def test_a_rank_drop_in_one_head_is_seen_in_that_head_only() -> None:
    found = found_on("gpt-design")
    params, s = found.graph.params, first(found, "GL(2)^2")
    assert s.fixed_set is not None
    before = s.fixed_set.distance(params)
    moved = {**params, **s.fixed_set.project(params, 1)}
    after = s.fixed_set.distance(moved)
    assert float(before.min()) > 1e-3
    assert float(after[1]) < 1e-7
    assert torch.allclose(after[0], before[0])
    # the orbit keeps the rank: a finite element moves the weights and not the drop
    element = 0.3 * torch.randn(s.action.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turned = s.fixed_set.distance(s.act(moved, element))
    assert float(turned[1]) < 1e-6
    assert torch.allclose(turned[0], before[0])


def test_shifts_and_invisible_directions_collapse_nothing() -> None:
    assert all(s.fixed_set is None for s in found_on("gpt-design").symmetries if s.kind in ("pure", "translation"))
