"""The seven stochastic papers of the gallery: checks that fail when the mechanism is wrong."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from parasym.gallery.contract import Entry
from parasym.gallery.probabilistic_stability import ExponentConfig, NetworkConfig, exponents, network


def entry(file: str) -> Entry:
    return importlib.import_module(f"parasym.gallery.{file}").ENTRY


def failed(part) -> set[str]:
    return {check.source for check in part.checks if not check.passed}


def test_a_wrong_exponent_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.solvable.factors import Normal

    small = ExponentConfig(replicas=500, steps=500)
    monkeypatch.setattr(Normal, "log_factor", lambda self, lr: -lr * self.mean - 0.45 * lr**2 * self.square + 0.01 * lr**3)
    assert "probabilistic-stability A2" in failed(exponents(small))


def test_a_net_that_should_die_and_does_not_is_caught() -> None:
    lively = replace(NetworkConfig(), chi=(1.0, 0.5), replicas=300, steps=2000)
    assert {"probabilistic-stability R6", "probabilistic-stability A3"} <= failed(network(lively))


def test_a_wrong_stationary_law_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import finite_lr_noise as gallery

    config = replace(gallery.SampleConfig(), settings=((1.2, 0.0),), replicas=2000, snapshots=3)
    monkeypatch.setattr(gallery.theory, "stationary_covariance", lambda h, c, lr, mu=0.0: _continuous(gallery, h, c, lr, mu))
    assert "finite-lr-noise A2" in failed(gallery.samples(config))


def _continuous(gallery, h, c, lr, mu):
    from parasym.core.results import Estimate

    return Estimate(torch.from_numpy(gallery.theory.continuous_covariance(h, c, lr, mu)))


def test_a_wrong_moment_of_the_step_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import adaptive_gradient_distribution as gallery

    config = replace(gallery.MomentsConfig(), replicas=20_000, later=(), betas=(), means=())
    bound = gallery.theory.uniform_moments
    monkeypatch.setattr(gallery.theory, "uniform_moments", lambda t: bound(t + 1))
    assert "adaptive-gradient-distribution A1" in failed(gallery.moments(config))


def test_a_wrong_tail_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.core.results import Estimate
    from parasym.gallery import minibatch_noise_strength as gallery

    config = replace(gallery.TailConfig(), replicas=100_000, kept=250)
    monkeypatch.setattr(gallery.theory, "kesten_index", lambda rate, batch: Estimate(gallery.theory.continuous_index(rate, batch)))
    assert "minibatch-noise-strength A4" in failed(gallery.tails(config))


def test_wrong_currents_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import limiting_dynamics as gallery

    right = gallery.Underdamped.area_rate
    monkeypatch.setattr(gallery.Underdamped, "area_rate", lambda self: right(self) * 2 / (1 + self.momentum))
    part = gallery.stationary(replace(gallery.StationaryConfig(), replicas=8000, steps=400, seeds=(0, 1, 2)))
    assert failed(part) == {"limiting-dynamics A4"}


def test_a_net_whose_noise_is_not_the_measured_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the digits need scikit-learn (extra data)")
    from parasym.gallery import limiting_dynamics as gallery

    small = gallery.NetworkConfig(hidden=3, replicas=128, steps=100, kicked=64, seeds=(0,))
    claims = {check.claim for check in gallery.network(small).checks if not check.passed}
    assert not any("stiffest" in claim or "deviation" in claim for claim in claims)
    right = gallery.spreading
    monkeypatch.setattr(gallery, "spreading", lambda d, noise, steps: right(d, 2 * noise, steps))
    assert sum("stiffest modes" in c.claim or "deviation" in c.claim for c in gallery.network(small).checks if not c.passed) == 2


def test_a_wrong_escape_power_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import power_law_escape as gallery

    monkeypatch.setattr(gallery.theory, "limiting_slope", lambda dim, t: 1 / t + 1)
    assert "power-law-escape A2" in failed(gallery.formulas(replace(gallery.FormulaConfig(), wells=(1.0,))))


def test_slow_escape_measures_the_rate_it_was_designed_for() -> None:
    from parasym.gallery import sgd_local_maxima as gallery

    part = gallery.slow(gallery.SlowConfig(replicas=200, steps=20_000))
    matches = [check for check in part.checks if check.kind == "match"]
    assert len(matches) == 5 and all(check.passed for check in matches)
    matches = matches[:4]  # the last one is gradient descent
    # the four rates are told apart, so the check could fail
    assert np.ptp([check.predicted[0] for check in matches]) > 10 * max(check.tolerance for check in matches)
    assert not math.isclose(matches[0].predicted[0], matches[1].predicted[0])


def test_a_first_moment_whose_fate_is_not_that_of_its_exponent_is_caught() -> None:
    from parasym.gallery import sgd_local_maxima as gallery

    config = replace(gallery.AdaptiveConfig(), held=(0.005,), left=(0.2,), replicas=100, steps=4000, seeds=(0,))
    assert all(not check.passed for check in gallery._averaged(config))


def test_a_mean_of_the_factors_that_does_not_grow_is_caught() -> None:
    part = exponents(replace(ExponentConfig(), mean=0.1, replicas=200, steps=200, seeds=(0,)))
    assert "probabilistic-stability R4" in failed(part)
