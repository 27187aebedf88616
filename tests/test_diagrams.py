"""Phase diagrams of the papers: the measured boundary is the predicted one, and would not be another."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from parasym.core.errors import InputError
from parasym.gallery import diagrams, entries
from parasym.gallery.sweep import Diagram, Quantity, sweep
from parasym.solvable.contract import number
from parasym.solvable.regression import label_noise_fluctuation
from parasym.solvable.scale import Scale

Wrong = Callable[[Mapping[str, float]], float]
CROSS = np.array([0.9, 0.5, -0.4])
WITHOUT_DROPOUT = number(Scale(np.diag([2.2, 1.0, 0.5]), CROSS / np.linalg.norm(CROSS), 2).critical_decay())
# paper, a small grid, the boundary of a theory that leaves something out (positive where the true prediction is)
CASES: dict[str, tuple[dict[str, tuple[float, ...]], dict[str, Wrong]]] = {
    "law-of-balance": (
        {"t": tuple(np.linspace(0.1, 2.0, 9)), "sigma": (10.0, 20.0, 40.0)},
        {"rate": lambda c: 1 / 3 - c["t"]},  # T_c / 3, where the mode of the density leaves 0, is another transition
    ),
    "posterior-collapse": (
        {"beta": tuple(np.geomspace(0.1, 10, 6)), "sigma": tuple(np.geomspace(0.3, 3, 5))},
        # the decoder's deviation instead of its variance
        {"first": lambda c: math.log(4 / (c["beta"] * c["sigma"])), "second": lambda c: math.log(1 / c["beta"])},
    ),
    "exact-phase-transitions": (
        {"gamma": tuple(np.geomspace(0.03, 2, 6)), "size": (0.3, 1.0, 2.0)},
        {"learned": lambda c: math.log(c["size"] / c["gamma"])},  # the boundary of one hidden layer
    ),
    "deep-linear-exact": (
        {"gamma": tuple(np.linspace(0.05, 0.4, 8)), "noise": (0.5, 2.0, 4.0)},
        {"learned": lambda c: WITHOUT_DROPOUT - c["gamma"]},
    ),
    "ssl-landscape": (
        {"decay": tuple(np.linspace(0.05, 2.1, 6)), "align": tuple(np.linspace(0.1, 1.5, 6))},
        # without the augmentation's shape: the alignment term pulls every direction alike
        {name: lambda c, a=a: a - c["decay"] - c["align"] for name, a in (("first", 2.0), ("third", 0.5))},
    ),
    "finite-lr-noise": (
        {"eta": tuple(np.linspace(0.15, 4.5, 13)), "momentum": (0.0, 0.3, 0.6, 0.9)},
        {"stable": lambda c: 2 * (1 - c["momentum"]) - c["eta"]},  # momentum as a larger learning rate only
    ),
    "minibatch-noise-strength": (
        {"eta": tuple(np.linspace(0.05, 2.4, 12)), "S": (1.0, 2.0, 4.0, 8.0)},
        {"shrinks": lambda c: 2 - c["eta"]},  # gradient descent
    ),
}


def swept(slug: str) -> Diagram:
    return sweep(slug, next(iter(entries()[slug].sweeps.values())), CASES[slug][0])


def under(diagram: Diagram, quantity: Quantity, wrong: Wrong) -> dict[str, Any]:
    """The agreement with another theory."""
    points = (
        dict(zip(diagram.axes, point, strict=True))
        for point in np.stack(np.meshgrid(*diagram.axes.values(), indexing="ij"), -1).reshape(-1, len(diagram.axes))
    )
    cells = tuple({quantity.name: {**c[quantity.name], "predicted": wrong(p)}} for c, p in zip(diagram.cells, points, strict=True))
    found = dataclasses.replace(diagram, cells=cells).agreement(dataclasses.replace(quantity, level=0.0))
    assert found is not None
    return found


@pytest.mark.parametrize("slug", CASES)
def test_the_boundary_is_where_the_paper_puts_it_and_not_where_a_cruder_theory_does(slug: str) -> None:
    found = swept(slug)
    assert found.diverged == 0 or slug == "finite-lr-noise"
    for quantity in found.quantities:
        side = found.agreement(quantity)
        if side is None:
            continue
        assert side["share"] >= 0.97 and side["void"] == 0 and side["chance"] < 0.9, (quantity.name, side)
        if quantity.name in CASES[slug][1]:
            wrong = under(found, quantity, CASES[slug][1][quantity.name])
            assert wrong["share"] < side["share"] - 0.08, (quantity.name, side, wrong)


def test_the_variance_of_heavy_ball_is_the_exact_one_up_to_its_boundary() -> None:
    found = sweep("finite-lr-noise", diagrams.DIVERGENCE, {"eta": (0.3, 1.5, 1.95, 2.5), "momentum": (0.0, 0.5)})
    z = (found.values("variance") - found.values("variance", "predicted")) / found.values("variance", "stderr")
    known = np.isfinite(found.values("variance", "predicted"))
    assert known.tolist() == [[True, True]] * 3 + [[False, True]] and np.abs(z[known]).max() < 5 and np.isnan(z[~known]).all()


def test_the_mean_square_shrinks_where_the_stationary_law_exists() -> None:
    """The cell's own form of the boundary against the general one (t < S and G > 0)."""
    for eta in (0.3, 0.7, 0.95, 1.2, 1.6):
        for size in (1, 2, 4, 16):
            cell = diagrams.batch_cell(diagrams.BatchCell(eta=eta, S=size, replicas=10))
            assert (cell["shrinks"]["predicted"] > 0) == label_noise_fluctuation([1.0] * 4, eta, size, 0.1).ok


@pytest.mark.parametrize(
    ("offered", "settings", "said"),
    [
        (diagrams.BALANCE, {"sigma": -1.0}, "sigma must be a positive number"),
        (diagrams.COLLAPSE, {"sigma": 0.0}, "decoder must be a positive number"),
        (diagrams.DEPTH, {"hidden": 0}, "no transition"),
        (diagrams.DEPTH, {"width": 0}, "width"),
        (diagrams.DROPOUT, {"width": -2}, "width"),
        (diagrams.DIVERGENCE, {"far": -1.0}, "far must be a positive number"),
        (diagrams.BATCH, {"dim": 0}, "at least 1"),
        (diagrams.SSL, {"restarts": 0}, "at least one start"),
    ],
)
def test_impossible_numbers_are_named_with_their_cell(offered: Any, settings: dict[str, Any], said: str) -> None:
    field = next(name for name in offered.axes if name not in settings)
    with pytest.raises(InputError, match=rf"the cell .*{said}"):
        sweep("paper", offered, {field: offered.axes[field][:1]}, settings)
