"""Thresholds of a mirror against closed forms, and against training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.laws.mirror import mirror_thresholds, normal_hessians, syre_gap
from parasym.symmetry.mirror import Mirror


class Quadratic(nn.Module):
    """f = a t^2 / 2 with a the input: t -> -t is a mirror of every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Parameter(torch.tensor([0.7]))

    def forward(self, a: Tensor) -> Tensor:
        return 0.5 * a * self.t.square()


def mean(out: Tensor, target: Tensor) -> Tensor:
    return (out - 0 * target).mean()


ZERO = Mirror.zeros({"t": torch.tensor([True])})


@pytest.mark.parametrize("lr", [0.3, 1.2])
def test_exponent_and_threshold_of_a_scalar(lr: float) -> None:
    a = torch.tensor([1.0, -1.4, 0.5, -0.7], dtype=torch.float64)
    found = mirror_thresholds(Quadratic(), mean, (a[:, None], a[:, None]), ZERO, lr=lr, batch_size=1, steps=3000, replicas=64)
    expected = float((1 - lr * a).abs().log().mean())
    assert float(found.decay) == pytest.approx(-float(a.mean()), abs=1e-12)
    assert float(found.rate) == pytest.approx(math.log(1 - lr * float(a.mean())), abs=1e-12)
    assert abs(float(found.exponent) - expected) < 4 * float(found.exponent.stderr)  # type: ignore[arg-type]
    assert found.collapsed is (expected < 0)
    assert found.escape_steps(1e-3) == pytest.approx(math.log(1e3) / float(found.rate))


def test_decay_above_the_threshold_lets_nothing_escape() -> None:
    a = torch.tensor([1.0, -1.4], dtype=torch.float64)[:, None]
    found = mirror_thresholds(Quadratic(), mean, (a, a), ZERO, lr=0.1, batch_size=1, weight_decay=0.21, steps=100)
    assert float(found.decay) == pytest.approx(0.2) and float(found.rate) < 0 and found.escape_steps(0.1) == math.inf


def test_hessians_are_those_on_the_surface_and_the_model_is_left_alone() -> None:
    model = Quadratic()
    a = torch.tensor([2.0, 3.0])[:, None]
    assert normal_hessians(model, mean, (a, a), ZERO).flatten().tolist() == [2.0, 3.0]
    assert float(model.t) == pytest.approx(0.7)


def test_a_mirror_of_other_weights_is_refused() -> None:
    with pytest.raises(InputError, match="no trainable parameter"):
        normal_hessians(Quadratic(), mean, (torch.ones(1, 1), torch.ones(1, 1)), Mirror.zeros({"s": torch.tensor([True])}))


def test_what_a_random_centre_leaves_of_a_mirror() -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.randn(2, 5, generator=g, dtype=torch.float64)
    mirror = Mirror.linear({"w": basis})
    w, w0 = ({"w": torch.randn(5, generator=g, dtype=torch.float64)} for _ in range(2))

    def cost(p: dict[str, Tensor]) -> Tensor:
        return 0.3 * (p["w"] - w0["w"]).square().sum()

    assert float(cost(mirror.reflect(w)) - cost(w)) == pytest.approx(float(syre_gap(mirror, w, w0, 0.3)), abs=1e-12)
    assert float(syre_gap(mirror, w, mirror.project(w0), 0.3)) == pytest.approx(0.0, abs=1e-12)
