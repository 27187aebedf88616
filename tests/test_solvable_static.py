"""The models with closed-form minima, and the engines they share, each against an independent route."""

from __future__ import annotations

import dataclasses
import json
import math
import time

import mpmath
import numpy as np
import pytest
import torch
from scipy import optimize

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.solvable import NotSolvable, engines
from parasym.solvable.autoencoder import RegularizedLAE, exact_tied, exact_untied, principal_directions, tied_descent, transpose_gap
from parasym.solvable.joint_embedding import GaussianInfoNCE, SSLQuartic, monte_carlo_infonce, view_covariances, views
from parasym.solvable.landscape import Landscape
from parasym.solvable.latent import LinearLVM
from parasym.solvable.linear_nets import DeepLinear, DeepLinearMulti
from parasym.solvable.scale import Scale, infinite_depth, isotropic

F64 = torch.float64


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ engines


def test_restarts_find_the_global_minimum_and_say_how_often() -> None:
    def loss(theta: engines.Params) -> torch.Tensor:
        x = theta["x"]
        return (x**4 - 2 * x**2 + 0.3 * x).sum()  # two wells, the left one lower

    starts = [{"x": torch.tensor([x], dtype=F64)} for x in (-1.5, -0.2, 0.5, 1.5)]
    found = engines.lbfgs_restarts(loss, starts)
    left = np.roots([4, 0, -4, 0.3]).real.min()
    assert found.converged and abs(float(found.best["x"]) - left) < 1e-10
    assert found.fraction() == 0.5 and found.gradient.max() < 1e-9
    with pytest.raises(InputError, match="not finite at start 1"):
        engines.lbfgs_restarts(loss, [starts[0], {"x": torch.tensor([math.nan], dtype=F64)}])
    with pytest.raises(InputError, match="at least one start"):
        engines.lbfgs_restarts(loss, [])


def test_flow_follows_the_logistic_curve() -> None:
    # L = (ab - m)^2 / 2 from a balanced start: s = ab is logistic (TwoLayerLinear of the catalogue)
    m, s0 = 1.7, 1e-3
    start = {"a": torch.tensor(s0**0.5, dtype=F64), "b": torch.tensor(s0**0.5, dtype=F64)}
    path = engines.flow(lambda w: 0.5 * (w["a"] * w["b"] - m) ** 2, start, np.linspace(0, 6, 30))
    grown = torch.exp(2 * m * path.times)
    assert path.ok and (path.theta["a"] * path.theta["b"] - m * grown / (grown - 1 + m / s0)).abs().max() < 1e-8
    with pytest.raises(InputError, match="increasing"):
        engines.flow(lambda w: w["a"], start, [0.0, 0.0])


def test_a_flow_that_blows_up_is_not_ok() -> None:
    path = engines.follow(lambda t, w: {"x": w["x"] ** 2}, {"x": torch.ones(1, dtype=F64)}, [0.0, 0.5, 2.0])
    assert not path.ok and path.theta["x"][1].isfinite() and path.theta["x"][2].isnan() and path.message


def test_normalised_flow_keeps_the_path_of_gradient_flow() -> None:
    x = torch.tensor([[1.0, 0.2], [0.3, 1.0]], dtype=F64)
    log_loss = lambda w: torch.logsumexp(-(x @ w["w"]), 0)  # noqa: E731
    start = {"w": torch.zeros(2, dtype=F64)}
    slow = engines.flow(lambda w: log_loss(w).exp(), start, [0.0, 20.0])
    fast = engines.normalised_flow(log_loss, start, np.linspace(0, 1.6, 2000))
    gap = (fast.theta["w"] - slow.theta["w"][-1]).norm(dim=-1).min()
    assert gap < 2e-3 < slow.theta["w"][-1].norm()


def test_descent_of_many_is_descent_of_each() -> None:
    loss = lambda w: (w["x"] ** 4).sum() + w["y"] ** 2  # noqa: E731
    many = {"x": torch.randn(3, 2, generator=draws(0), dtype=F64), "y": torch.randn(3, generator=draws(1), dtype=F64)}
    rates = torch.tensor([0.01, 0.02, 0.05], dtype=F64)
    together = engines.descend(loss, many, rates, 50)
    whole = engines.descend(lambda w: (w["x"] ** 4).sum(-1) + w["y"] ** 2, many, rates, 50, broadcasts=True)
    assert all(torch.allclose(whole[name], together[name], rtol=1e-14) for name in many)
    for k in range(3):
        one = {name: w[k : k + 1] for name, w in many.items()}
        alone = engines.descend(loss, one, float(rates[k]), 50)
        assert all(torch.equal(alone[name][0], together[name][k]) for name in many)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("g", [0.0, 0.05, 0.3, 0.6, 2.0])
def test_a_mode_by_grid_search(depth: int, g: float) -> None:
    m = 1.3
    cost = lambda s: s**2 - 2 * m * s + (depth + 1) * g * s ** (2 / (depth + 1))  # noqa: E731
    grid = np.linspace(0, 2, 4001)
    k = int(np.argmin(cost(grid)))
    around = optimize.minimize_scalar(cost, bounds=(grid[max(k - 1, 0)], grid[k + 1]), method="bounded", options={"xatol": 1e-12})
    s, value = engines.per_mode_min(m, depth, g)
    assert abs(value - min(around.fun, 0.0)) < 1e-12
    assert abs(s - (around.x if around.fun < -1e-12 else 0.0)) < 1e-6
    assert engines.per_mode_min(-0.4, depth, g) == (0.0, 0.0)


@pytest.mark.parametrize(("total", "slots"), [(0.1, None), (1.0, None), (1.0, 2), (30.0, None), (30.0, 3)])
def test_waterfilling_by_quadratic_programming(total: float, slots: int | None) -> None:
    b, q = np.array([0.4, 1.0, -0.3, 0.9, 0.1]), 0.75
    allowed = np.argsort(-b)[:slots]

    def cost(n: np.ndarray) -> float:
        return float(-b[allowed] @ n + q * n @ n)

    start = np.full(len(allowed), total / len(allowed))
    bounds = [(0, None)] * len(allowed)
    found = optimize.minimize(
        cost, start, jac=lambda n: -b[allowed] + 2 * q * n, bounds=bounds, method="SLSQP",
        constraints={"type": "eq", "fun": lambda n: n.sum() - total}, options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    filled, mu = engines.waterfill(b, q, total, slots)
    assert abs(filled.sum() - total) < 1e-12 and np.abs(filled[allowed] - found.x).max() < 1e-5
    assert (np.abs(b[filled > 0] - mu - 2 * q * filled[filled > 0]) < 1e-12).all() and (filled > 0).sum() <= (slots or 5)
    with pytest.raises(InputError, match="positive total"):
        engines.waterfill(b, q, 0.0)
    with pytest.raises(InputError, match="slot"):
        engines.waterfill(b, q, 1.0, 0)


def test_roots_finds_them_all() -> None:
    found = engines.roots(lambda x: (x - 1e-4) * (x - 3.0) * (x - 3.2), 1e-8, 1e3, 800)
    assert np.allclose(found, [1e-4, 3.0, 3.2], rtol=1e-12)
    with pytest.raises(InputError, match="0 < low"):
        engines.roots(lambda x: x, 0.0, 1.0)


def test_index_and_nullity_of_a_saddle() -> None:
    loss = lambda w: w["a"] ** 2 - 3 * w["b"][0] ** 2 + 0 * w["b"][1]  # noqa: E731
    assert engines.morse(loss, {"a": torch.zeros((), dtype=F64), "b": torch.zeros(2, dtype=F64)}) == (1, 1)
    rotate = lambda w: {"b": torch.stack([w["b"][1], -w["b"][0]])}  # noqa: E731
    point = {"b": torch.tensor([0.3, 1.2], dtype=F64)}
    assert abs(engines.tangent_derivative(lambda w: w["b"].square().sum(), point, rotate)) < 1e-15
    assert abs(engines.tangent_derivative(lambda w: w["b"][0] ** 2, point, rotate)) > 0.1


def test_weights_survive_the_round_trip() -> None:
    theta = {"a": torch.randn(2, 3, generator=draws(0), dtype=F64), "b": torch.randn((), generator=draws(1), dtype=F64)}
    back = engines.unflatten(engines.flatten(theta), theta)
    assert all(torch.equal(theta[name], back[name]) for name in theta)
    assert torch.equal(engines.pick(engines.stack([theta, theta]), 1)["a"], theta["a"])


# ------------------------------------------------------------------------------------------------ the shared battery


RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 4)) * [1.5, 1, 0.7, 0.4]
Y = X @ RNG.normal(size=4) + 0.3 * RNG.normal(size=50)
TARGETS = 0.6 * X @ (RNG.normal(size=(4, 3)) * [1.5, 1.0, 0.6]) + 0.2 * RNG.normal(size=(50, 3))


def basis(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def spectral(values: list[float], seed: int) -> np.ndarray:
    q = basis(len(values), seed)
    return q * np.array(values) @ q.T


A, C = spectral([2, 1.2, 0.6, 0.2], 1), spectral([0.9, 0.1, 0.5, 0.3], 2)
SCATTER = spectral([25, 16, 9, 4, 1], 3)
MODELS: dict[str, Landscape] = {
    "ridge": DeepLinear.of_data(X, Y, decay=0.3),
    "one hidden layer": DeepLinear.of_data(X, Y, (5,), noise=(0.8,), decay=(0.3, 0.2)),
    "two hidden layers": DeepLinear.of_data(X, Y, (3, 4), noise=(0.5, 0.3), decay=(0.1, 0.15, 0.2)),
    "two hidden layers without noise": DeepLinear.of_data(X, Y, (2, 3), decay=0.3),
    "several outputs": DeepLinearMulti(RNG.normal(size=(3, 4)), (3, 5), 0.3, 20.0),
    "several outputs, narrow": DeepLinearMulti(RNG.normal(size=(3, 4)), (2,), 0.2),
    "linear VAE": LinearLVM.of_data(X, latents=3, beta=0.6),
    "latent model": LinearLVM.of_data(X, TARGETS, latents=2, beta=0.2, encoder=1.3, decoder=0.7),
    "latent model, fixed variances": LinearLVM.of_data(X, TARGETS, latents=3, beta=0.3, sigma=(0.3, 1.1, 0.6)),
    "latent model, equal variances": LinearLVM.of_data(X, TARGETS, latents=2, beta=0.3, sigma=(0.5, 0.5)),
    "latent model, learned decoder": LinearLVM.of_data(X, TARGETS, latents=3, learn_decoder=True),
    "autoencoder": RegularizedLAE(SCATTER, 2, penalty="none"),
    "autoencoder, product": RegularizedLAE(SCATTER, 2, 3.0, "product"),
    "autoencoder, sum": RegularizedLAE(SCATTER, 3, 6.0),
    "infonce": SSLQuartic.infonce(A, C, 3),
    "spectral, decay": SSLQuartic.spectral(A, C, 5, decay=0.7),
    "alignment": SSLQuartic.infonce(A, C, 3, align=1.0),
    "barlow": SSLQuartic.barlow(A, 4, decay=0.3),
    "normalised": SSLQuartic(A, A + C, 3, 0.75, power=0.5),
    "normalised with bias": SSLQuartic(0.3 * A, A + C, 4, 0.75, power=1.0, bias=True),
    "exact infonce": GaussianInfoNCE(A, C, 3),
}
CASES = [(name, kind) for name, model in MODELS.items() for kind in model.kinds]
ABSENT = {("ridge", "phase"), ("ridge", "variance"), ("two hidden layers without noise", "variance"),
          ("latent model, learned decoder", "phase"), ("normalised", "critical points"), ("normalised", "phase"),
          ("normalised with bias", "critical points"), ("normalised with bias", "phase")}  # fmt: skip
LONG = {(name, "phase") for name in ("two hidden layers", "two hidden layers without noise", "linear VAE", "barlow", "alignment",
                                      "spectral, decay", "latent model, fixed variances")}  # fmt: skip


def marked(cases: list[tuple[str, str]]) -> list:
    return [pytest.param(*c, id="-".join(c), marks=[pytest.mark.slow] if c in LONG else []) for c in cases]


@pytest.mark.parametrize(("name", "kind"), marked([c for c in CASES if c not in ABSENT]))
def test_a_model_meets_its_run_and_the_control_does_not(name: str, kind: str) -> None:
    model, began = MODELS[name], time.process_time()
    found = model.compare(kind, seed=1)
    assert found.ok, found.to_markdown()
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["status"] == "ok" and found.worst.observable in found.to_markdown()
    if kind == "minimum":
        assert found.measurement.values["loss"].details["fraction at best"] > 0
    try:
        wrong = model._control(kind)
    except NotSolvable:
        wrong = None
    if wrong is not None and (name, kind) != ("ridge", "minimum"):
        from parasym.solvable import beside

        assert beside(wrong, found.measurement, 0.0, model.tolerance.get(kind, 0.0)).status == "violated"
    assert time.process_time() - began < 60


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_the_mean_of_its_samples(name: str) -> None:
    model = MODELS[name]
    for seed, scale in ((3, 0.5), (4, 1.0)):
        theta = model.init(seed, scale)
        seen = model.sample_losses(theta, 40_000, seed)
        assert seen.shape == (40_000,)
        assert abs(float(seen.mean() - model.loss(theta))) < 5 * float(seen.std()) / 40_000**0.5, seed


@pytest.mark.parametrize("name", MODELS)
def test_generators_leave_the_loss_alone(name: str) -> None:
    model = MODELS[name]
    theta = model.init(5)
    scale = float(engines.norm(torch.func.grad(model.loss)(theta)))
    for generator in model.generators().values():
        assert abs(engines.tangent_derivative(model.loss, theta, generator)) < 1e-11 * max(scale, 1.0)
    stretch = lambda w: {n: (v if i == 0 else 0 * v) for i, (n, v) in enumerate(w.items())}  # noqa: E731  control: not a symmetry
    if model.generators() and name != "normalised":
        assert abs(engines.tangent_derivative(model.loss, theta, stretch)) > 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_the_representative_is_a_minimum_with_the_predicted_loss(name: str) -> None:
    model = MODELS[name]
    expected = float(model.predict("minimum").values["loss"])
    for seed in (0, 1):
        theta = model.representative(seed)
        assert abs(float(model.loss(theta)) - expected) < 1e-10 * max(1, abs(expected))
        assert max(float(g.abs().max()) for g in torch.func.grad(model.loss)(theta).values()) < 1e-6
    values = torch.linalg.eigvalsh(engines.hessian(model.loss, theta))
    assert values[0] > -1e-6 * max(1.0, float(values[-1]))


@pytest.mark.parametrize(("name", "kind"), sorted(ABSENT - {("ridge", "variance"), ("two hidden layers without noise", "variance")}))
def test_what_has_no_closed_form_says_so(name: str, kind: str) -> None:
    found = MODELS[name].compare(kind)
    assert found.status == "not_applicable" and all(value.note for value in found.prediction.values.values())


@pytest.mark.parametrize("name", MODELS)
def test_unknown_kinds_are_refused_with_a_list(name: str) -> None:
    with pytest.raises(NotSolvable, match="minimum"):
        MODELS[name].predict("no such kind")


def test_a_search_that_failed_is_not_a_theory_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["one hidden layer"]
    lazy = lambda self, seed=0, restarts=6: engines.lbfgs_restarts(self.loss, [self.init(0)], max_iter=2)  # noqa: E731
    monkeypatch.setattr(DeepLinear, "minimise", lazy)
    assert model.compare("minimum").status == "not_converged"
    monkeypatch.undo()
    monkeypatch.setattr(Scale, "minimum", lambda self, g: dataclasses.replace(self.stationary(g)[-1], loss=-0.1))
    assert model.compare("minimum").status == "violated"


# ------------------------------------------------------------------------------------------------ bad and degenerate input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DeepLinear(np.eye(2), [1, math.nan], 2.0), "NaN"),
        (lambda: DeepLinear([[1, 0.5], [0, 1]], [1, 0], 2.0), "not symmetric"),
        (lambda: DeepLinear(-np.eye(2), [1, 0], 2.0), "semidefinite"),
        (lambda: DeepLinear(np.diag([1.0, 0]), [1, 1], 2.0), "outside the range"),
        (lambda: DeepLinear(np.eye(2), [1, 1], 1.0), "no data"),
        (lambda: DeepLinear(np.eye(2), [1, 1], 3.0, (0,)), "positive whole"),
        (lambda: DeepLinear(np.eye(2), [1, 1], 3.0, (4,), noise=(-1,)), "noise"),
        (lambda: DeepLinear(np.eye(2), [1, 1], 3.0, (4,), decay=(0.1,)), "decay"),
        (lambda: DeepLinear(np.eye(3), [1, 1], 3.0), "shape 3"),
        (lambda: DeepLinear.of_data(X, Y[:-1]), "50 samples"),
        (lambda: DeepLinear(np.eye(2), [1, 1], 3.0, (4,), decay=(0.0, 0.1)).global_minimum(), "without decay"),
        (lambda: DeepLinearMulti(np.eye(2), (3,), 0.0), "gamma > 0"),
        (lambda: DeepLinearMulti(np.eye(2), (3,), 0.1, 1.0), "no data"),
        (lambda: DeepLinear(np.eye(2), [1, 1], 3.0, (4,), decay=math.nan), "decay"),
        (lambda: DeepLinearMulti(np.full((2, 2), math.nan), (3,), 0.1), "NaN"),
        (lambda: DeepLinearMulti(np.eye(2), (0,), 0.1), "positive whole"),
        (lambda: LinearLVM.of_data(X, latents=2, beta=math.nan), "beta"),
        (lambda: LinearLVM.of_data(X, latents=2, sigma=(1.0, math.nan)), "each of 2"),
        (lambda: RegularizedLAE(np.full((3, 3), math.nan), 2), "NaN"),
        (lambda: RegularizedLAE(SCATTER, 0), "positive whole"),
        (lambda: SSLQuartic.infonce(np.full((2, 2), math.nan), np.eye(2), 1), "NaN"),
        (lambda: SSLQuartic.infonce(A, C, 0), "positive whole"),
        (lambda: GaussianInfoNCE(A * math.nan, C, 2), "NaN"),
        (lambda: LinearLVM.of_data(X, latents=0), "positive whole"),
        (lambda: LinearLVM.of_data(X, latents=2, decoder=0.0), "decoder"),
        (lambda: LinearLVM.of_data(X, latents=2, sigma=(1.0,)), "each of 2"),
        (lambda: LinearLVM.of_data(X, latents=2, sigma=(1.0, 1.0), learn_decoder=True), "leave sigma out"),
        (lambda: LinearLVM(np.eye(2), [[3.0, 0]], [[1.0]], 1), "no data"),
        (lambda: LinearLVM.of_data(np.full((5, 2), np.inf), latents=1), "NaN or infinite"),
        (lambda: RegularizedLAE(SCATTER, 2, 0.0), "lam must be positive"),
        (lambda: RegularizedLAE(SCATTER, 2, 1.0, "both"), "penalty must be"),  # type: ignore[arg-type]
        (lambda: RegularizedLAE(SCATTER[:3], 2), "square"),
        (lambda: SSLQuartic(A, np.diag([1.0, 1, 1, 0]), 2), "singular"),
        (lambda: SSLQuartic(A, A + C, 2, bias=True), "give power"),
        (lambda: SSLQuartic(A, A + C, 2, power=-1.0), "power"),
        (lambda: SSLQuartic.infonce(A, C[:2, :2], 2), "shape"),
        (lambda: GaussianInfoNCE(0 * A, 0 * C, 2), "singular"),
        (lambda: view_covariances(X, X[:-1]), "one shape"),
        (lambda: Scale(np.eye(2), np.ones(2), 1, 0.5), "at least 1"),
        (lambda: Scale(np.eye(2), np.ones(2), 1).stationary(0.0), "g must be"),
        (lambda: isotropic(1.0, 1.0, 0), "no transition"),
    ],
)  # fmt: skip
def test_bad_input_says_what_is_wrong(call, message: str) -> None:
    with pytest.raises((InputError, NotSolvable), match=message):
        call()


def sound(model: Landscape) -> None:
    """The minimum of a degenerate model is met by a run, or is said not to be unique; never NaN."""
    found = model.compare("minimum", seed=2)
    assert all(row.status in ("ok", "not_applicable") for row in found.rows), found.to_markdown()
    assert next(row for row in found.rows if row.observable == "loss").status == "ok"


@pytest.mark.parametrize(
    "model",
    [
        DeepLinear(np.diag([1.0, 0.5]), [0.0, 0.0], 1.0, (3, 3), decay=0.1),  # nothing to learn
        DeepLinear(np.diag([1.0, 1.0]), [0.8, 0.3], 1.0, (3,), decay=0.1),  # repeated eigenvalues
        DeepLinear(np.diag([1.0, 0.0]), [0.8, 0.0], 1.0, (3, 2), decay=0.05),  # singular covariance
        DeepLinearMulti(np.diag([1.0, 1.0, 1.0])[:, :2], (4, 1), 0.05),
        LinearLVM(np.diag([1.0, 1.0, 0.0]), np.diag([1.0, 1.0, 0.0]), np.diag([1.0, 1.0, 0.0]), 1, beta=0.3),  # degenerate, singular
        LinearLVM.of_data(X, latents=6, beta=0.3),  # more latents than inputs
        RegularizedLAE(np.diag([4.0, 4.0, 1.0]), 1, 1.0),  # the kept mode is not unique
        RegularizedLAE(np.diag([4.0, 2.0, 0.0]), 5, 1.0),  # singular, more codes than inputs
        RegularizedLAE(np.diag([4.0, 2.0, 1.0]), 2, 7.0),  # every mode cut
        SSLQuartic(-np.asarray(C), A + C, 3),  # complete collapse
        SSLQuartic(np.eye(4), np.eye(4), 2),
        SSLQuartic.infonce(A, C, 9),
    ],
    ids=["E=0", "repeated", "singular", "narrow repeated", "LVM degenerate", "LVM wide", "LAE repeated", "LAE singular", "LAE cut",
         "collapse", "SSL repeated", "SSL wide"],
)  # fmt: skip
def test_degenerate_models_are_sound(model: Landscape) -> None:
    sound(model)


def test_where_there_is_no_minimum_it_is_said() -> None:
    no_decay = DeepLinear(np.eye(2), [1, 1], 3.0, (4,), decay=(0.0, 0.1)).predict("minimum")
    runaway = GaussianInfoNCE(A, np.diag([0.5, 0.5, 0.5, 0.0]) * 0, 2).predict("minimum")
    free = LinearLVM.of_data(X, latents=2, beta=0.0).predict("minimum")
    for found, words in ((no_decay, "without decay"), (runaway, "no augmentation"), (free, "beta = 0")):
        assert found.status == "not_applicable" and words in found.values["loss"].note


def test_learned_decoder_is_unbounded_where_the_modes_explain_everything() -> None:
    """posterior-collapse R6: with no residual the loss falls without bound iff d2 > beta n (the dossier has the sign reversed)."""
    vae = lambda beta: LinearLVM.of_data(X, latents=4, beta=beta, learn_decoder=True)  # noqa: E731  y = x, d1 = d0 = 4
    assert "falls without bound" in vae(0.9).predict("minimum").values["loss"].note
    assert vae(1.3).predict("minimum").status == "ok"
    for beta, falls in ((0.9, True), (1.3, False)):
        losses = []
        for e in (1e-2, 1e-4, 1e-6):
            fixed = LinearLVM.of_data(X, latents=4, beta=beta, decoder=e**0.5)
            losses.append(fixed.minimal_loss() + 0.5 * 4 * math.log(e))
        assert (losses[2] < losses[1] < losses[0]) is falls


def test_learned_decoder_where_the_data_lack_directions() -> None:
    """posterior-collapse R6: only modes that can live count: rank 2 in four outputs has no minimum up to beta = 2, not 1."""
    flat = X @ np.diag([1.0, 1.0, 0.0, 0.0])
    for beta, falls in ((0.9, True), (1.5, True), (2.5, False)):
        found = LinearLVM.of_data(flat, latents=4, beta=beta, learn_decoder=True).predict("minimum")
        assert (found.status == "not_applicable" and "without bound" in found.values["loss"].note) is falls
        losses = []
        for e in (1e-2, 1e-4, 1e-6):  # the loss of weights, not the closed form: it falls along the minima at fixed e_d
            fixed = LinearLVM.of_data(flat, latents=4, beta=beta, decoder=e**0.5)
            losses.append(float(fixed.loss(fixed.representative())) + 0.5 * 4 * math.log(e))
        assert (losses[2] < losses[1] < losses[0]) is falls


def test_directions_without_data_are_not_learned() -> None:
    """ssl-landscape R2: the rank is that of A, not of its round-off."""
    for seed in range(6):
        turn = basis(4, seed)
        model = SSLQuartic.infonce(turn[:, :2] @ np.diag([1.0, 0.4]) @ turn[:, :2].T, 0.3 * np.eye(4), 4)
        assert model.learned_rank() == 2 and len(list(model.stationary())) == 4


# ------------------------------------------------------------------------------------------------ closed forms, other routes


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@pytest.mark.parametrize("share", [0.3, 0.999999, 1.000001])
def test_the_reduced_minimum_in_fifty_digits(depth: int, share: float) -> None:
    """Scalar problem, E along one axis: roots of its derivative by mpmath, near the transition too."""
    a, e, kappa = 1.3, 0.9, 1.2
    g = share * isotropic(a, e, depth, kappa)["critical"]
    found = Scale(np.diag([a, 0.4]), np.array([e, 0.0]), depth, kappa).minimum(g)
    with mpmath.workdps(50):
        p = mpmath.mpf(2) / (depth + 1)
        slope = lambda b: 2 * kappa * a * b - 2 * e + (depth + 1) * g * p * b ** (p - 1)  # noqa: E731
        value = lambda b: kappa * a * b**2 - 2 * e * b + (depth + 1) * g * b**p  # noqa: E731
        bottom = ((1 - p) * (depth + 1) * g * p / (2 * kappa * a)) ** (1 / (2 - p)) if depth > 1 else mpmath.mpf(10) ** -40
        top = mpmath.mpf(e / (kappa * a))
        exact = mpmath.findroot(slope, (bottom, top), solver="anderson", tol=1e-60, maxsteps=300) if slope(bottom) < 0 else mpmath.mpf(0)
        if exact == 0 or value(exact) > 0:
            exact = mpmath.mpf(0)
        assert abs(found.norm - float(exact)) < 1e-9
        assert abs(found.loss - float(value(exact) if exact else 0)) < 1e-14


@pytest.mark.parametrize(("depth", "critical", "spinodal", "jump"), [(2, 0.297332, 0.353989, 0.288), (3, 0.186052, 0.263117, 0.385),
                                                                     (5, 0.107501, 0.203164, 0.462)])  # fmt: skip
def test_isotropic_transition_against_the_general_one_and_a_scan(depth: int, critical: float, spinodal: float, jump: float) -> None:
    closed = isotropic(1.3, 0.9, depth, 1.2)
    assert abs(closed["critical"] - critical) < 1e-6 and abs(closed["spinodal"] - spinodal) < 1e-6 and abs(closed["jump"] - jump) < 1e-3
    general = Scale(np.diag([1.3, 0.2]), np.array([0.9, 0.0]), depth, 1.2)
    assert abs(float(general.critical_decay()) - closed["critical"]) < 1e-12
    assert abs(float(general.spinodal()) - closed["spinodal"]) < 1e-12 and abs(float(general.jump()) - closed["jump"]) < 1e-9
    b = np.linspace(1e-4, 1.0, 200_001)
    cost = lambda g: 1.2 * 1.3 * b**2 - 2 * 0.9 * b + (depth + 1) * g * b ** (2 / (depth + 1))  # noqa: E731
    assert cost(closed["critical"] * 0.9999).min() < 0 < cost(closed["critical"] * 1.0001).min()
    inner = lambda g: ((np.diff(np.sign(np.diff(cost(g)))) > 0).sum()) > 0  # noqa: E731  a minimum inside
    assert inner(closed["spinodal"] * 0.9995) and not inner(closed["spinodal"] * 1.0005)


def test_general_transition_by_brute_force() -> None:
    scale = Scale(np.diag([2.2, 1, 0.5, 0.2]), np.array([0.9, 0.5, -0.4, 0.3]), 2)
    critical, edge = float(scale.critical_decay()), float(scale.spinodal())
    assert abs(critical - 0.427945) < 1e-6 and abs(edge - 0.499316) < 1e-6
    assert scale.minimum(critical * 0.9999).loss < -1e-6 and scale.minimum(critical * 1.0001).norm == 0
    assert len(scale.stationary(edge * 0.9999)) == 2 and not scale.stationary(edge * 1.0001)
    taus = np.geomspace(1e-6, 1e4, 400_000)
    assert abs(np.exp(scale.log_decay(np.log(taus))).max() / edge - 1) < 1e-8
    assert scale.critical_decay().residual is not None and Scale(scale.second, scale.cross, 0).critical_decay().status == "not_applicable"


def test_width_form_landau_and_depth_limit() -> None:
    a, e = np.diag([2.2, 1, 0.5, 0.2]), np.array([0.9, 0.5, -0.4, 0.3])
    for depth, width, variance in ((1, 5, 0.4), (2, 4, 0.7), (3, 6, 0.2)):
        scale = Scale(a, e, depth, (1 + variance / width) ** depth)
        best = scale.minimum(0.2)
        b = best.norm ** (1 / (depth + 1)) / width
        assert abs(scale.width_form(b, 0.2, width, variance) - best.loss) < 1e-12
    one = Scale(a, e, 1, 1.08)
    slope, bend = one.landau(5, 0.4)
    gap = 1e-5
    near = one.minimum(np.linalg.norm(e) - gap)
    assert abs(near.norm / 25 / gap / slope - 1) < 1e-4 and abs(near.loss / gap**2 / bend - 1) < 1e-4
    errors = [abs(isotropic(1.3, 0.9, d)["critical"] * (d + 1) / infinite_depth(1.3, 0.9) - 1) for d in (100, 1000, 10_000)]
    assert errors[2] < 2e-4 and errors[1] < 0.2 * errors[0]


def test_the_published_equation_of_the_scale() -> None:
    """deep-linear-exact R4: b = |beta|^(1/(D+1)) / d solves the printed scalar equation, and with other layers of noise it does not."""
    a, e = np.diag([2.2, 1, 0.5, 0.2]), np.array([0.9, 0.5, -0.4, 0.3])
    for depth, d, s2, gamma in ((2, 4, 0.7, 0.1), (3, 3, 0.4, 0.1), (4, 5, 1.5, 0.02)):
        for point in Scale(a, e, depth, (1 + s2 / d) ** depth).stationary(gamma):
            b = point.norm ** (1 / (depth + 1)) / d
            sides = [
                np.linalg.norm(np.linalg.solve(d**depth * (s + d) ** depth * b ** (2 * depth) * a + gamma * np.eye(4), e))
                * (d * b) ** (depth - 1)
                for s in (s2, 0.0)
            ]
            assert abs(sides[0] - 1) < 1e-10 and abs(sides[1] - 1) > 1e-6
    # one hidden layer with two decays
    model = DeepLinear(a, e, 2.0, (3,), (0.8,), (0.3, 0.2))
    b = float(model.layers(model.global_minimum().beta)["U"][0, 0])
    left = np.linalg.solve(b**2 * (0.8 + 3) * a + 0.3 * np.eye(4), e)
    assert abs(left @ left - 0.2 / 0.3) < 1e-10


def test_bounds_on_the_uniform_scale() -> None:
    """deep-linear-exact R7 with the smallest eigenvalue of A; with the largest one it is violated."""
    rng, inside, outside = np.random.default_rng(4), 0, 0
    for _ in range(60):
        depth, d, s2, gamma = int(rng.integers(2, 5)), int(rng.integers(1, 8)), float(rng.uniform(0, 2)), float(rng.uniform(0.01, 0.5))
        x = rng.normal(size=(12, 3)) * [1.5, 1, 0.5]
        a, e = x.T @ x / 12, x.T @ (x @ rng.normal(size=3)) / 12
        eigenvalues, size = np.linalg.eigvalsh(a), np.linalg.norm(e)
        for point in Scale(a, e, depth, (1 + s2 / d) ** depth).stationary(gamma):
            b = point.norm ** (1 / (depth + 1)) / d
            low = (gamma / size) ** (1 / (depth - 1)) / d
            high = [(size / (d * (s2 + d) ** depth * a_)) ** (1 / (depth + 1)) for a_ in (eigenvalues[0], eigenvalues[-1])]
            inside += low <= b * (1 + 1e-9) and b <= high[0] * (1 + 1e-9)
            outside += b > high[1]
            assert low <= b * (1 + 1e-9) and b <= high[0] * (1 + 1e-9)
    assert inside > 30 and outside > 5


def test_predictive_variance_and_noise_average_by_sampling() -> None:
    model = MODELS["two hidden layers"]
    theta, x = model.representative(), torch.from_numpy(X[:1])
    outputs = model.sample_outputs(theta, x.expand(400_000, -1), 0)
    exact = float(model.predictive_variance(X[:1])[0])
    spread = (outputs - outputs.mean()).square()
    assert abs(float(spread.mean()) - exact) < 5 * float(spread.std()) / 400_000**0.5 and exact > 0.01


def test_origin_and_barrier() -> None:
    a, e = np.diag([2.2, 1, 0.5, 0.2]), [0.9, 0.5, -0.4, 0.3]
    one = DeepLinear(a, e, 2.0, (4,), decay=0.5)
    assert one.origin() == "saddle" and one.with_decay(2.3).origin() == "global minimum" and one.barrier() == 0
    two = DeepLinear(a, e, 2.0, (3, 3), decay=0.3)
    assert two.origin() == "bad minimum"
    zero = {name: torch.zeros_like(w) for name, w in two.init(0).items()}
    assert torch.allclose(engines.hessian(two.loss, zero), 0.6 * torch.eye(24, dtype=F64))  # diag(2 gamma)
    values = torch.linalg.eigvalsh(engines.hessian(one.loss, {n: torch.zeros_like(w) for n, w in one.init(0).items()}))
    assert values[0] < 0
    below, above = (two.layers(np.asarray(two.scale.stationary(0.3)[0].beta) * f) for f in (0.97, 1.03))
    ends = [engines.settle(two.loss, start) for start in (below, above)]
    assert float(two.observables(ends[0])["map"].norm()) < 1e-6
    assert abs(float(two.loss(ends[1])) - float(two.predict("minimum").values["loss"])) < 1e-9


def test_published_losses() -> None:
    """Dossier values, data of its seed: deep-linear-exact A1."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4)) * [1.5, 1, 0.7, 0.4]
    y = x @ rng.normal(size=4) + 0.3 * rng.normal(size=50)
    for widths, noise, decay, value in (((5,), (0.8,), (0.3, 0.2), 1.09453081), ((4, 6), (0.5, 0.3), (0.1, 0.15, 0.2), 1.02384967),
                                        ((4, 6), (0.5, 0.3), 0.6, 2.32468248), ((3, 3, 3), (0.4,) * 3, 0.15, 1.49585850)):  # fmt: skip
        found = DeepLinear.of_data(x, y, widths, noise=noise, decay=decay).predict("minimum").values["loss"]
        assert abs(float(found) - value) < 6e-9


def test_posterior_collapse_by_the_mode_potential() -> None:
    """posterior-collapse R5: c zeta^2 / s + k log s has its minimum over s >= c where the closed form says."""
    k, c = 0.7, 0.4
    for zeta2 in (0.3, 0.69, 0.71, 2.0, 9.0):
        found = optimize.minimize_scalar(lambda s, z=zeta2: c * z / s + k * math.log(s), bounds=(c, 50), method="bounded",
                                         options={"xatol": 1e-12})  # fmt: skip
        assert abs(found.x - (max(0.0, zeta2 - k) * c / k + c)) < 1e-5
    model = MODELS["linear VAE"]
    assert model.active(0.0) == 3 and model.active(1e9) == 0
    assert (model.phase_diagram([0.1, 1.0, 10.0], [0.5, 1.0]).diff(dim=0) <= 0).all()


def test_output_variance_does_not_fall_with_latents() -> None:
    for latents in (2, 3, 8):
        model = LinearLVM.of_data(X, TARGETS, latents=latents, beta=0.3)
        assert abs(float(model.output_variance(model.representative())) - model.predicted_output_variance()) < 1e-12
    values = [LinearLVM.of_data(X, TARGETS, latents=n, beta=0.3).predicted_output_variance() for n in (3, 8, 30)]
    assert max(values) - min(values) < 1e-12


def test_probabilistic_pca_is_the_learned_decoder() -> None:
    """posterior-collapse R6 at beta = 1, y = x: the noise is the mean of the discarded eigenvalues; regularized-lae R7: lam = n s^2."""
    values = np.linalg.eigvalsh(np.cov(X.T, bias=True))[::-1]
    n, s2 = LinearLVM.of_data(X, latents=2, learn_decoder=True).decoder_variance()
    assert n == 2 and abs(s2 - values[2:].mean()) < 1e-12
    lae = RegularizedLAE.of_data(X, 2, lam=len(X) * s2)
    w2 = lae.representative()["W2"]
    loading = torch.linalg.svdvals(w2) * torch.from_numpy(np.sqrt(values[:2]).copy())  # sigma / sqrt n times sqrt(1 - lam / sigma^2)
    assert np.allclose(loading.numpy(), np.sqrt(values[:2] - s2), atol=1e-10)


@pytest.mark.parametrize("synced", [False, True])
def test_autoencoder_algorithms_reach_the_minimum(synced: bool) -> None:
    model = MODELS["autoencoder, sum"]
    scatter = torch.from_numpy(SCATTER)
    start = model.init(3)
    lam = model.lam
    tied = exact_tied(scatter, start["W2"], lam, 400)
    oja = tied_descent(scatter, 0.5 * start["W2"], lam, 5e-3, 4000)
    pair = exact_untied(scatter, start, lam, 400, synced=synced)
    top = math.sqrt(25), math.sqrt(16), math.sqrt(9)
    for w2, limit in ((tied, 1e-6), (oja, 1e-6), (pair["W2"], 1e-6)):
        directions, values = principal_directions(w2, lam)
        assert np.allclose(values.numpy(), top, atol=limit)
        assert ((directions.T @ torch.from_numpy(np.linalg.eigh(SCATTER)[1])).abs().amax(1) > 1 - 1e-9).all()
    assert transpose_gap(pair["W1"], pair["W2"]) < 1e-6 < transpose_gap(start["W1"], start["W2"])


def test_infonce_by_monte_carlo() -> None:
    model = MODELS["exact infonce"]
    w = model.representative()["W"]
    first, second, others = views(torch.from_numpy(A), torch.from_numpy(C), 20_000, 0, 2000)
    assert abs(float(monte_carlo_infonce(w, first[:4000], second[:4000], others)) - float(model.loss({"W": w}))) < 0.05
    a, c = view_covariances(first, second)
    assert np.abs(a.numpy() - A).max() < 0.1 and np.abs(c.numpy() - C).max() < 0.06


def test_the_quartic_form_is_the_small_limit_of_infonce() -> None:
    exact, quartic = MODELS["exact infonce"], MODELS["infonce"]
    w = exact.init(0)["W"]
    gaps = [abs(float(exact.loss({"W": s * w}) - quartic.loss({"W": s * w}))) / s**4 for s in (0.2, 0.1)]
    assert gaps[1] < 0.35 * gaps[0]  # the next order is the sixth


def test_an_estimate_of_the_spinodal_is_kept_apart_from_the_transition() -> None:
    found = MODELS["two hidden layers"].predict("phase").values
    assert isinstance(found["spinodal"], Estimate) and float(found["spinodal"]) > float(found["critical decay"])
