"""The controls are no symmetries, and the moves beside them are."""

from __future__ import annotations

import pytest

from controls import CONTROLS, MOVES, Control, Move, relative_change


@pytest.mark.parametrize("control", CONTROLS.values(), ids=list(CONTROLS))
def test_a_control_changes_the_output(control: Control) -> None:
    model, args = control.build()
    assert relative_change(model, args, control.transform) >= control.change


@pytest.mark.parametrize("move", MOVES.values(), ids=list(MOVES))
def test_a_move_leaves_the_output(move: Move) -> None:
    model, args = move.build()
    assert relative_change(model, args, move.transform) <= move.error


def test_every_move_is_far() -> None:
    """A move that hardly changes a parameter would prove nothing."""
    for move in MOVES.values():
        model, _ = move.build()
        before = dict(model.named_parameters()) | dict(model.named_buffers())
        after = move.transform({name: t.detach() for name, t in before.items()})
        assert max(float((after[n] - before[n]).detach().norm() / before[n].detach().norm()) for n in after) > 0.1, move.name
