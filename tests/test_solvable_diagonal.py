"""The diagonal linear network: the closed density beside SGD at several depths and widths, its transition, and an independent route."""

from __future__ import annotations

import pytest
import torch
from scipy import integrate

from parasym.core.errors import InputError
from parasym.solvable import DiagonalLinear
from parasym.solvable.balance import density, reduced_sde


@pytest.mark.parametrize(
    "model",
    [
        DiagonalLinear(temperature=0.34),
        DiagonalLinear(temperature=0.2, width=2),
        DiagonalLinear(temperature=0.6, factors=3, sigma=40.0),
        DiagonalLinear(temperature=0.34, batch=4),
    ],
    ids=["two factors", "two units", "three factors", "batch of four"],
)
def test_sgd_ends_in_the_closed_density(model: DiagonalLinear) -> None:
    found = model.compare("stationary", seed=1, budget=0.5, relative=0.05)
    assert found.ok, found.to_markdown()
    assert not model.control("stationary", seed=1, budget=0.5).ok
    assert found.prediction.condition["T / T_c"] == model.temperature and not found.prediction.exact


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_all_mass_is_at_zero_above_the_transition_only(temperature: float) -> None:
    model = DiagonalLinear(temperature=temperature)
    assert model.compare("phase", budget=0.2).ok and not model.control("phase", budget=0.2).ok


def test_the_density_is_the_zero_current_state_of_the_reduced_equation() -> None:
    """Independent of the formula: (drift p)' = (square p / 2)'' with no current, log p = int 2 a / b^2 - log b^2."""
    model = DiagonalLinear(temperature=0.5)
    T = model.temperature * model.critical
    drift, square = reduced_sde(model.moments, T, model.factors)

    def one(f: object, v: float) -> float:
        return float(f(torch.tensor(v, dtype=torch.float64)))  # type: ignore[operator]

    at = torch.tensor([0.3, 0.7, 1.0, 1.6], dtype=torch.float64)
    p = density(model.moments, T, model.factors, at)
    for a, b, pa, pb in zip(at[:-1], at[1:], p[:-1], p[1:], strict=True):
        grown = integrate.quad(lambda v: 2 * one(drift, v) / one(square, v), float(a), float(b), epsabs=1e-13, epsrel=1e-12)[0]
        expected = grown - float((square(b) / square(a)).log())
        assert float((pb / pa).log()) == pytest.approx(expected, abs=1e-6)


def test_loss_is_the_mean_over_data_and_bad_numbers_are_refused() -> None:
    model = DiagonalLinear(sigma=2.0, width=2, factors=3)
    theta = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = model.data(400_000, seed=0)
    each = (theta.view(2, 3).prod(-1).sum() * data["x"] - data["y"]).square()
    assert abs(float(each.mean() - model.loss(theta))) < 5 * float(each.std()) / 400_000**0.5
    for wrong in ({"sigma": 0.0}, {"temperature": -1.0}, {"factors": 0}, {"factors": 5}, {"width": 1.5}, {"batch": True}):
        with pytest.raises(InputError):
            DiagonalLinear(**wrong)  # type: ignore[arg-type]
    assert DiagonalLinear(factors=3).compare("phase").status == "not_applicable"
