"""Gallery entries of the models with closed-form minima: checks fail when their theory is tampered with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.gallery import deep_linear_exact, exact_phase_transitions, posterior_collapse, regularized_lae, ssl_landscape
from parasym.gallery import stochastic_networks_deterministic as stochastic
from parasym.gallery.contract import Part
from parasym.measure.phases import PhaseCurve, classify, layer_balance, origin_curvature, phase_sweep
from parasym.measure.posterior import effective_beta, recommend_beta
from parasym.measure.posterior import posterior_collapse as collapse
from parasym.methods.principal import LAEPCA
from parasym.methods.replicate import marginal_dropout_loss, predictive_variance, replicate, variance_bound
from parasym.solvable import DeepLinear, GaussianInfoNCE, LinearLVM, RegularizedLAE, SSLQuartic
from parasym.solvable.scale import Scale


def failed(part: Part) -> set[str]:
    return {check.source for check in part.checks if not check.passed}


# ------------------------------------------------------------------------------------------------ sabotage


def test_a_wrong_kappa_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    config = deep_linear_exact.MinimumConfig(nets=(((5,), (0.8,), (0.3, 0.2)),), restarts=3, seeds=(0,))
    monkeypatch.setattr(DeepLinear, "kappa", property(lambda self: 1.0 + sum(self.noise)))
    assert {"deep-linear-exact A1, R3", "deep-linear-exact R8"} <= failed(deep_linear_exact.minimum(config))


def test_levels_without_the_barrier_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    config = deep_linear_exact.MinimumConfig(nets=deep_linear_exact.MinimumConfig.nets[:2], restarts=3, seeds=(0,))
    right = Scale.stationary
    monkeypatch.setattr(Scale, "stationary", lambda self, g: right(self, g)[:1])
    assert {"deep-linear-exact A1, R3", "deep-linear-exact R3, R6"} <= failed(deep_linear_exact.minimum(config))


def test_a_shrinkage_of_another_size_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_linear_exact.DeepLinearMulti, "g", property(lambda self: 1.02 * self.decay[0]))
    part = deep_linear_exact.modes(deep_linear_exact.ModeConfig(nets=(((4,), 0.6),), restarts=2, seeds=(0,)))
    assert failed(part) == {"deep-linear-exact R9"} and part.checks[-1].passed  # the soft threshold does not read g


def test_a_wrong_bound_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Scale.beta
    monkeypatch.setattr(Scale, "beta", lambda self, tau: 3 * right(self, tau))
    part = deep_linear_exact.bounds(deep_linear_exact.BoundConfig(problems=30, trained=6, seeds=(0,)))
    assert "deep-linear-exact R7" in failed(part)


def test_a_wrong_transition_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = exact_phase_transitions.isotropic
    wrong = lambda a, e, depth, kappa=1.0: right(a, e, depth, kappa) | {"critical": 1.01 * right(a, e, depth, kappa)["critical"]}  # noqa: E731
    monkeypatch.setattr(exact_phase_transitions, "isotropic", wrong)
    part = exact_phase_transitions.forms(exact_phase_transitions.FormConfig(depths=(2,), grid=50_001))
    assert "exact-phase-transitions A1, R5" in failed(part)


def test_a_wrong_threshold_of_the_vae_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearLVM, "critical_beta", lambda self: 0.98 * self.zeta.square() / self.decoder**2)
    checks = exact_phase_transitions._posterior(exact_phase_transitions.FormConfig(seeds=(0,)))
    assert [check.passed for check in checks] == [True, False, False]


def test_a_wrong_branch_is_caught() -> None:
    short = exact_phase_transitions.DescentConfig(depths=(2,), deep_shares=(1.02,), edges=(), steps=200, seeds=(0,))
    assert "exact-phase-transitions A2" in failed(exact_phase_transitions.descent(short))


def test_copies_that_do_not_divide_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def undivided(model, layer, copies):
        wide = replicate(model, layer, copies)
        wide[3].weight.data *= copies**0.5
        return wide

    monkeypatch.setattr(stochastic, "replicate", undivided)
    part = stochastic.copies(stochastic.CopyConfig(samples=500, tail_copies=(8, 16), seeds=(0,)))
    assert "stochastic-networks-deterministic R1" in failed(part)


def test_growth_without_copies_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stochastic, "double", lambda w: {"W": w["W"].repeat_interleave(2, 0), "u": w["u"].repeat_interleave(2)})
    config = stochastic.GrowthConfig(doublings=2, restarts=1, steps=400, polish=3, data_seeds=(0,))
    assert "stochastic-networks-deterministic R2" in failed(stochastic.growth(config))


def test_a_wrong_output_variance_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearLVM.predicted_output_variance
    monkeypatch.setattr(LinearLVM, "predicted_output_variance", lambda self: (1 + 1e-4) * right(self))
    part = stochastic.latent(stochastic.LatentConfig(latents=(2, 4, 8), falling=(0.03,), small=(1e-4, 3e-5), seeds=(1,)))
    assert [c for c in part.checks if not c.passed and "below every mode's threshold" in c.claim]


def test_a_threshold_that_needs_a_learned_variance_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearLVM.loss
    # a penalty on the mean of a quarter the size, for fixed variances only
    kept = lambda self, w: right(self, w) - (0.375 * self.beta * (w["W"].T @ self.second @ w["W"]).trace() if self.sigma else 0.0)  # noqa: E731
    monkeypatch.setattr(LinearLVM, "loss", kept)
    config = posterior_collapse.ModeConfig(settings=(), restarts=1, seeds=(1,))
    assert any("living modes below and above" in c.claim for c in posterior_collapse.modes(config).checks if not c.passed)


def test_a_start_that_sticks_at_a_saddle_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RegularizedLAE.init
    stuck = lambda self, seed, scale=1.0: right(self, seed, scale) if seed % 2 else self.weights((0, 2), seed)  # noqa: E731
    monkeypatch.setattr(RegularizedLAE, "init", stuck)
    part = regularized_lae.minima(regularized_lae.MinimumConfig(lams=(2.0,), restarts=2, seeds=(0,)))
    assert any("share of restarts" in c.claim for c in part.checks if not c.passed)


def test_a_wrong_threshold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearLVM._modes
    monkeypatch.setattr(LinearLVM, "_modes", lambda self: right(self if self.sigma else dataclasses.replace(self, beta=1.05 * self.beta)))
    config = posterior_collapse.ModeConfig(settings=((1.0, 1.0, 0.5),), restarts=2, seeds=(1,))
    assert {"posterior-collapse R1", "posterior-collapse R0, R1"} <= failed(posterior_collapse.modes(config))


def test_a_wrong_decoder_variance_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearLVM.decoder_variance
    monkeypatch.setattr(LinearLVM, "decoder_variance", lambda self: (right(self)[0], 1.01 * right(self)[1]))
    config = posterior_collapse.DecoderConfig(betas=(1.0,), restarts=2, seeds=(1,))
    assert "posterior-collapse R6" in failed(posterior_collapse.decoder(config))


def test_a_wrong_index_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RegularizedLAE.critical_points

    def wrong(self, limit=None):
        return (replace(p, index=p.index + (len(p.modes) == 1)) for p in right(self, limit))

    monkeypatch.setattr(RegularizedLAE, "critical_points", wrong)
    assert "regularized-lae A2, R5" in failed(regularized_lae.saddles(regularized_lae.MorseConfig(limit=4, seeds=(0,))))


def test_a_wrong_shrinkage_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RegularizedLAE, "shrinkage", lambda self, square: square / (square + self.lam))
    config = regularized_lae.MinimumConfig(lams=(2.0,), restarts=1, seeds=(0,))
    assert "regularized-lae A1, R1" in failed(regularized_lae.minima(config))


def test_a_wrong_spectrum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ssl_landscape.MinimumConfig(settings=("InfoNCE, d = 4", "weight decay .4"), restarts=2, seeds=(0,))
    monkeypatch.setattr(SSLQuartic, "levels", property(lambda self: self._modes[0] * 1.01))
    assert "ssl-landscape A1, R1" in failed(ssl_landscape.minima(config))


def test_a_wrong_infonce_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GaussianInfoNCE.strengths
    monkeypatch.setattr(GaussianInfoNCE, "strengths", lambda self: 1.001 * right(self))
    config = ssl_landscape.InfoNCEConfig(restarts=1, pairs=500, negatives=500, dictionary_pairs=20_000, seeds=(0,))
    assert "ssl-landscape R3" in failed(ssl_landscape.infonce(config))


def test_a_probe_whose_rank_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    part = ssl_landscape.benign(ssl_landscape.BenignConfig(labels=400, trials=20, seeds=(0,)))
    assert all(check.passed for check in part.checks if check.relation == "=")
    monkeypatch.setattr(SSLQuartic, "learned_rank", lambda self: 20)
    assert "ssl-landscape A5, R8" in failed(ssl_landscape.benign(ssl_landscape.BenignConfig(seeds=(0,))))


# ------------------------------------------------------------------------------------------------ phases


def landau(first: bool):
    """w^2 (g - 1) + w^4, or with a barrier w^2 g - 1.5 w^4 + w^6: a metastable zero until g = 0."""
    if first:
        return lambda w, g: ((g * w["x"] ** 2) - 1.5 * w["x"] ** 4 + w["x"] ** 6).sum()
    return lambda w, g: ((g - 1) * w["x"] ** 2 + w["x"] ** 4).sum()


def both(loss, controls) -> tuple[PhaseCurve, PhaseCurve]:
    order = lambda w: w["x"].abs().max()  # noqa: E731
    up = phase_sweep(loss, order, controls, {"x": torch.ones(1, dtype=torch.float64)}, direction="up")
    return up, phase_sweep(loss, order, controls, {"x": torch.zeros(1, dtype=torch.float64)}, direction="down")


def test_sweeps_tell_the_order() -> None:
    controls = np.linspace(0.6, 1.2, 21).tolist()
    up, down = both(landau(False), controls)
    second = classify(up, down)
    assert float(second) == 2 and abs(second.details["exponent"] - 0.5) < 0.05 and abs(second.details["critical"][0] - 1) < 0.03
    expected = ((1 - up.control).clamp_min(0) / 2).sqrt()
    assert (up.order_parameter - expected).abs().max() < 1e-4
    up, down = both(landau(True), np.linspace(-0.1, 0.9, 21).tolist())
    first = classify(up, down)
    assert float(first) == 1 and first.details["hysteresis"] > 8
    assert abs(first.details["critical"][0] - 0.75) < 0.06 and abs(first.details["critical"][1]) < 0.06
    # dL_min / dg = |theta|^2 along a branch
    slope = np.gradient(up.loss.numpy(), up.control.numpy())
    assert np.abs(slope - up.norm2.numpy())[2:14].max() < 0.02
    up, down = both(lambda w, g: ((w["x"] - 1 / (1 + g)) ** 2).sum(), controls)
    assert float(classify(up, down)) == 0
    with pytest.raises(InputError, match="two different"):
        phase_sweep(landau(True), lambda w: w["x"], [1.0], {"x": torch.ones(1)})
    with pytest.raises(InputError, match="same controls"):
        classify(up, both(landau(False), controls[1:])[0])
    flat = replace(up, order_parameter=0 * up.order_parameter)
    assert classify(flat, flat).status == "not_applicable"


def test_origin_and_balance_of_a_chain() -> None:
    model = DeepLinear(np.diag([2.2, 1.0]), [0.9, 0.5], 2.0, (3,), decay=0.4)
    theta = model.init(0)
    assert float(origin_curvature(model.loss, theta)) == pytest.approx(2 * (0.4 - np.hypot(0.9, 0.5)))
    deep = DeepLinear(np.diag([2.2, 1.0]), [0.9, 0.5], 2.0, (3, 2), decay=0.1)
    assert float(origin_curvature(deep.loss, deep.init(0))) == pytest.approx(0.2)
    assert deep.trapped({name: 0.05 * w for name, w in deep.init(0).items()}) and not deep.trapped(deep.representative())
    there = layer_balance(list(deep.representative().values()), deep.decays)
    assert there.details["spread"] < 1e-12 < 1e-2 < layer_balance(list(deep.init(1).values()), 0.1).details["spread"]
    with pytest.raises(InputError, match="no stationary point"):
        origin_curvature(lambda w: (w["b"] - 1).square(), {"b": torch.zeros(())})
    with pytest.raises(InputError, match="as many decays"):
        layer_balance(list(theta.values()), [0.1])


# ------------------------------------------------------------------------------------------------ copies and dropout


def dropout_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2)).double()


def test_copies_keep_the_function_and_divide_the_variance() -> None:
    model, x = dropout_net(), torch.randn(5, 3, dtype=torch.float64)
    wide = replicate(model, 0, 3)
    assert torch.allclose(wide.eval()(x), model.eval()(x), atol=1e-14) and len(wide[0].weight) == 24 and wide[3].in_features == 24
    own = predictive_variance(model, x, exact=True)
    assert torch.allclose(predictive_variance(wide, x, exact=True) * 3, own) and not own.requires_grad
    model.train()
    state, params = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    sampled = predictive_variance(model, x, 40_000, seed=1)
    assert model.training and torch.equal(state, torch.get_rng_state()) and all(map(torch.equal, params, model.parameters()))
    assert ((sampled / own - 1).abs() < 5 * (3 / 40_000) ** 0.5).all()
    conv = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dropout2d(), nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)
    ).double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for layer in (0, 3):
        assert torch.allclose(replicate(conv, layer, 4).eval()(images), conv.eval()(images), atol=1e-12)


def test_the_marginal_loss_is_the_mean_of_sampled_losses() -> None:
    model, x, y = dropout_net(1), torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    model.train()
    with torch.no_grad():
        losses = torch.stack([(model(x) - y).square().sum(-1).mean() for _ in range(4000)])
    exact = marginal_dropout_loss(model, x, y)
    assert abs(float(losses.mean() - exact.detach())) < 5 * float(losses.std()) / 4000**0.5
    exact.backward()
    assert model[0].weight.grad is not None and variance_bound(0.3, 16, 64) == pytest.approx(0.075)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: replicate(m, 0, 0), "at least 1"),
        (lambda m: replicate(m, 1, 2), "no Linear"),
        (lambda m: replicate(m, 3, 2), "nothing reads"),
        (lambda m: replicate(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)), 0, 2), "has weights"),
        (lambda m: predictive_variance(m, torch.zeros(1, 3), 1), "two samples"),
        (lambda m: predictive_variance(m[:2], torch.zeros(1, 3), exact=True), "Dropout, Linear"),
        (lambda m: marginal_dropout_loss(nn.Sequential(nn.Dropout(), *m), torch.zeros(1, 3), torch.zeros(1, 2)), "only the last"),
        (lambda m: variance_bound(0.1, 8, 4), "wider"),
    ],
)  # fmt: skip
def test_networks_that_cannot_be_copied_are_refused(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(dropout_net())


# ------------------------------------------------------------------------------------------------ posterior collapse, principal directions


def test_collapsed_latents_are_counted() -> None:
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    encode = lambda b: (torch.stack([b[:, 0], 0 * b[:, 0], b[:, 1] * 1e-3], 1), torch.stack([0 * b[:, 0] - 1] + [0 * b[:, 0]] * 2, 1))  # noqa: E731
    found = collapse(encode, x.split(100))
    assert found.active == 1 and found.collapsed.tolist() == [False, True, True] and found.samples == 500
    assert json.loads(json.dumps(found.to_dict()))["active"] == 1
    with pytest.raises(InputError, match="at least one batch"):
        collapse(encode, [])
    with pytest.raises(InputError, match="NaN"):
        collapse(lambda b: (b * torch.nan, b), [x])
    with pytest.raises(InputError, match="means and log variances"):
        collapse(lambda b: (b, b[:, :1]), [x])


def test_the_recommended_beta_keeps_what_was_asked() -> None:
    x = np.random.default_rng(0).normal(size=(200, 5)) * [3, 2, 1, 0.5, 0.2]
    for keep in (1, 2, 3, 5):
        beta = recommend_beta(x, keep)
        assert LinearLVM.of_data(x, latents=5, beta=float(beta)).active() == keep
    assert recommend_beta(np.concatenate([np.eye(3), -np.eye(3)]), 1).status == "not_applicable"
    with pytest.raises(InputError, match="keep between"):
        recommend_beta(x, 6)
    assert effective_beta(0.1, 64, reduction="mean") == pytest.approx(6.4) and effective_beta(1.0, 3, half=False) == 0.5


def test_the_autoencoder_finds_principal_components() -> None:
    x = np.random.default_rng(1).normal(size=(300, 6)) * [3, 2.2, 1.5, 1, 0.5, 0.2]
    fitted = LAEPCA(3, lam=300.0).fit(x)
    _, values, directions = np.linalg.svd(x - x.mean(0), full_matrices=False)
    assert fitted.converged_ and np.allclose(fitted.singular_values_, values[:3], rtol=1e-8)
    assert (np.abs((fitted.components_ * directions[:3]).sum(1)) > 1 - 1e-9).all() and fitted.transform(x).shape == (300, 3)
    assert len(LAEPCA(5, lam=1.2 * float(values[2] ** 2)).fit(x).singular_values_) == 2  # lam cuts the rest
    for call, message in ((lambda: LAEPCA(9).fit(x), "codes between"), (lambda: LAEPCA(2, 1e9).fit(x), "cuts every direction"),
                          (lambda: LAEPCA(2, -1.0).fit(x), "positive"), (lambda: LAEPCA(2).fit(x * np.nan), "NaN")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()


def test_an_absent_prediction_is_no_number() -> None:
    found = LinearLVM.of_data(np.eye(3), latents=1, learn_decoder=True).predict("phase").values["critical beta"]
    assert isinstance(found, Estimate) and found.status == "not_applicable"
