"""The gallery entries on charges and laws: checks fail when their mechanism is tampered with."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from parasym.gallery import (
    flatness_or_sharpness,
    law_of_balance,
    neural_mechanics,
    neural_thermodynamics,
    noether_learning_dynamics,
    noise_equilibrium,
    perfect_platonic,
    thermodynamic_irreversibility,
)
from parasym.gallery.contract import Entry, Result
from parasym.gallery.runner import run_entry
from parasym.solvable import balance, edln
from parasym.solvable.chains import Chain


def only(entry: Entry, **parts: Any) -> Result:
    """Run some experiments of an entry, the others left out."""
    config = dataclasses.replace(entry.config("smoke"), **{n: parts.get(n) for n in entry.experiments})
    return run_entry(entry, config)


def failed(result: Result) -> list[str]:
    return [c.claim for c in result.checks if not c.passed]


def test_a_wrong_sign_in_the_charge_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = neural_mechanics.rescale

    def wrong(params: Any, inward: Any, outward: Any, name: str = "rescale") -> Any:
        return right(params, [*inward, *((o, 1) for o in outward)], [], name)

    monkeypatch.setattr(neural_mechanics, "rescale", wrong)
    entry = neural_mechanics.ENTRY
    claims = failed(only(entry, geometry=entry.config("smoke").geometry, flow=entry.config("smoke").flow))
    assert any("ReLU rescale" in c for c in claims) and any("relu, gradient flow" in c for c in claims)


def test_a_forgotten_factor_in_the_density_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = balance.log_density
    monkeypatch.setattr(balance, "log_density", lambda m, t, L, x, width=1, sign=1: right(m, 2 * t, L, x, width, sign))
    entry = law_of_balance.ENTRY
    assert any("mean of v" in c for c in failed(only(entry, two=entry.config("smoke").two)))


def test_a_wrong_growth_rate_of_the_norm_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = noether_learning_dynamics.NormFlow
    monkeypatch.setattr(flow, "gain", property(lambda self: self.lr))
    entry = noether_learning_dynamics.ENTRY
    assert failed(only(entry, norm=entry.config("smoke").norm))


def test_an_unbalanced_closed_form_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = noise_equilibrium.pair_from_product
    monkeypatch.setattr(noise_equilibrium, "pair_from_product", lambda *a: (1.1 * right(*a)[0], right(*a)[1] / 1.1))
    entry = noise_equilibrium.ENTRY
    assert any("linear pair" in c for c in failed(only(entry, solvers=entry.config("smoke").solvers)))


def test_the_flattest_minimum_in_place_of_the_noise_equilibrium_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Chain.weights

    def wrong(self: Chain, widths: Any, generator: Any = None) -> Any:
        flat = Chain(self.target, self.inputs, torch.eye(len(self.noise), dtype=torch.float64), self.depth)
        return right(flat, widths, generator)

    monkeypatch.setattr(Chain, "weights", wrong)
    entry = perfect_platonic.ENTRY
    claims = failed(only(entry, closed=entry.config("smoke").closed))
    assert any("tr(G_(i+1))" in c for c in claims) and any("whitened spectrum" in c for c in claims)
    assert any("autograd one" in c for c in failed(only(flatness_or_sharpness.ENTRY, algebra=flatness_or_sharpness.AlgebraConfig())))


def test_noise_that_misses_the_label_covariance_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = edln.sgd_ensemble

    def isotropic(models: Any, *args: Any, **kwargs: Any) -> Any:
        """SGD whose label noise has the same trace in every direction."""
        even = [dataclasses.replace(m, noise=torch.eye(3, dtype=torch.float64) * m.noise.trace() / 3) for m in models]
        return right(even, *args, **kwargs)

    monkeypatch.setattr(edln, "sgd_ensemble", isotropic)
    entry = flatness_or_sharpness.ENTRY
    claims = failed(only(entry, stationary=entry.config("smoke").stationary, sharpening=entry.config("smoke").sharpening))
    assert any(c.startswith("kappa 50.0: tr H of SGD against") for c in claims) and any("rise of tr H" in c for c in claims)
    assert any("Platonic" in c for c in failed(only(perfect_platonic.ENTRY, sgd=perfect_platonic.ENTRY.config("smoke").sgd)))


def test_a_wrong_entropic_force_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = neural_thermodynamics.entropic_force
    half = lambda *a, **k: {n: g / 2 for n, g in right(*a, **k).items()}  # noqa: E731
    monkeypatch.setattr(neural_thermodynamics, "entropic_force", half)
    entry = neural_thermodynamics.ENTRY
    claims = failed(only(entry, defect=entry.config("smoke").defect, orbits=entry.config("smoke").orbits))
    assert any("double backward" in c for c in claims) and any("rates by parameter" in c for c in claims)


def test_a_wrong_correction_of_the_flow_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = neural_thermodynamics.corrected
    monkeypatch.setattr(neural_thermodynamics, "corrected", lambda f, eta, *rest: right(f, 2 * eta, *rest))
    entry = neural_thermodynamics.ENTRY
    claims = failed(only(entry, defect=entry.config("smoke").defect))
    assert any("first and with the second" in c for c in claims) and any("against one step" in c for c in claims)
    momentum = thermodynamic_irreversibility.momentum_field
    wrong = lambda g, eta, mu, fix=True: momentum(g, 3 * eta, mu, fix)  # noqa: E731
    monkeypatch.setattr(thermodynamic_irreversibility, "momentum_field", wrong)
    entry = thermodynamic_irreversibility.ENTRY
    assert any("heavy ball" in c for c in failed(only(entry, rules=entry.config("smoke").rules)))


def test_a_potential_without_its_noise_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """S of the full batch in place of the mean over batches."""
    right = thermodynamic_irreversibility.effective_loss
    monkeypatch.setattr(thermodynamic_irreversibility, "effective_loss", lambda *a, **k: right(*a, **{**k, "batch_size": 10**9}))
    monkeypatch.setattr(neural_thermodynamics, "effective_loss", lambda *a, **k: right(*a, **{**k, "batch_size": 10**9}))
    entry = thermodynamic_irreversibility.ENTRY
    assert any("entropy production counted" in c for c in failed(only(entry, path=entry.config("smoke").path)))
    entry = neural_thermodynamics.ENTRY
    assert any("per-sample gradients against" in c for c in failed(only(entry, network=entry.config("smoke").network)))


def test_reversal_with_a_wrong_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = thermodynamic_irreversibility.reversal
    monkeypatch.setattr(thermodynamic_irreversibility, "reversal", lambda *a: -right(*a))
    entry = thermodynamic_irreversibility.ENTRY
    assert any("defect of a step" in c for c in failed(only(entry, controls=entry.config("smoke").controls)))


def test_equal_label_noise_does_not_sharpen_a_network() -> None:
    config = dataclasses.replace(flatness_or_sharpness.StudentConfig(), kappas=(1.0, 1.0), steps=3000, replicas=2, probe=64)
    claims = failed(only(flatness_or_sharpness.ENTRY, mlp=config))
    assert any("every seed" in c for c in claims)


def test_closed_forms_of_the_law_of_balance() -> None:
    m = law_of_balance.moments_of(20.0)
    critical, _ = balance.sparsity_transition(m)
    t = 0.34 * critical
    v = torch.linspace(0.05, 3, 40, dtype=torch.float64)
    k = m.a1 * v**2 - 2 * m.a2 * v + m.a3
    delta = (m.a1 * m.a3 - m.a2**2) ** 0.5
    angle = torch.arctan((m.a1 * v - m.a2) / delta)
    closed = v ** (m.b2 / (2 * m.a3 * t) - 1.5) * k ** (-1 - m.b2 / (4 * t * m.a3))  # law-of-balance R6
    closed = closed * torch.exp(-(m.a3 * m.b1 - m.a2 * m.b2) / (2 * t * m.a3 * delta) * angle)
    ratio = balance.density(m, t, 2, v) / closed
    assert float((ratio / ratio[0] - 1).abs().max()) < 1e-6
    mean, var = balance.mean_and_variance(m, t, 1)  # linear regression: the mean is b2 / b1
    assert mean == pytest.approx(m.b2 / m.b1, rel=1e-3) and var > 0
    x, y = torch.randn(200_000, dtype=torch.float64), torch.randn(200_000, dtype=torch.float64)
    assert balance.Moments.of(x, x + 2 * y).a3 == pytest.approx(6.0, rel=0.05)
    assert balance.mean_and_variance(m, 2 * critical, 2) == (0.0, 0.0)
