"""Deep linear chains under label noise: closed forms against gauge minimisation, autograd, direct evaluation, and SGD."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.measure.alignment import alignment
from parasym.measure.curvature import dense_eigenvalues, eigenpairs, hessian
from parasym.solvable import EDLN, LinearRegressionNetwork, NotSolvable
from parasym.solvable.chains import (
    Chain,
    balance_gap,
    chain_fluctuation,
    curvature_kernel,
    hessian_trace,
    layer_fluctuations,
    minimise_gauge,
    product,
    random_gauges,
    regauge,
    signals,
)
from parasym.solvable.edln import kernel_cosine, run_sgd, sgd_ensemble


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def covariance(g: torch.Generator, n: int) -> Tensor:
    A = normal(g, n, n)
    return A @ A.T / n + 0.2 * torch.eye(n, dtype=torch.float64)


def problem(seed: int, depth: int, o: int = 3, i: int = 4) -> Chain:
    g = generator(seed)
    return Chain(normal(g, o, i), covariance(g, i), covariance(g, o), depth)


SHAPES = [(2, (5,)), (3, (3, 3)), (4, (6, 4, 7))]


# ------------------------------------------------------------------------------------------------ the closed forms


@pytest.mark.parametrize(("depth", "widths"), SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_minimiser_is_that_of_lbfgs_over_all_gauges(depth: int, widths: tuple[int, ...], seed: int) -> None:
    c = problem(seed, depth)
    W = c.weights(widths, generator(seed))
    start = regauge(W, random_gauges(widths, 0.5, generator(seed + 10)))
    assert torch.allclose(product(W), c.target, atol=1e-12) and torch.allclose(product(start), c.target, atol=1e-10)
    layers = layer_fluctuations(W, c.inputs, c.noise)
    assert torch.allclose(layers, torch.full_like(layers, 4 * c.energy), rtol=1e-11)
    assert float(balance_gap(W, c.inputs, c.noise)) < 1e-12 < 1e-2 < float(balance_gap(start, c.inputs, c.noise))
    found = minimise_gauge(start, lambda V: chain_fluctuation(V, c.inputs, c.noise) / c.fluctuation(), seed)
    assert float(chain_fluctuation(found, c.inputs, c.noise)) / c.fluctuation() - 1 == pytest.approx(0, abs=1e-8)
    K, R = c.kernel(), None
    for V in found[:-1]:
        R = V if R is None else V @ R
        seen = R.T @ R
        assert float((seen / seen.norm() - K / K.norm()).abs().max()) < 1e-6
    H, G = signals(W, c.inputs, c.noise)
    for h, back, a in zip(H[1:], G, c.scales(), strict=False):
        assert torch.allclose(h, a**2 * back, atol=1e-10)  # H_i = a O s O^T, G_i = O s O^T / a
    many = [chain_fluctuation(regauge(W, random_gauges(widths, 0.3, generator(k))), c.inputs, c.noise) for k in range(200)]
    assert min(float(v) for v in many) >= c.fluctuation() * (1 - 1e-12)


@pytest.mark.parametrize(("depth", "widths"), [(1, ()), *SHAPES])
@pytest.mark.parametrize("outward", [False, True])
def test_sharpness_is_that_of_the_autograd_hessian(depth: int, widths: tuple[int, ...], outward: bool) -> None:
    g = generator(depth)
    V, X, noise = normal(g, 3, 4), covariance(g, 4), covariance(g, 3)
    out = normal(g, 3, 3) if outward else None
    model = EDLN(V, X, noise, widths, read_out=out)
    c = model.chain
    for W in (model.noise_equilibrium(), model.random_minimum(generator(1))):
        theta = torch.cat([w.reshape(-1) for w in W])
        H = torch.func.hessian(model.loss)(theta)
        values = torch.linalg.eigvalsh(H)
        assert float(hessian_trace(W, c.inputs, c.outward)) == pytest.approx(float(H.trace()), rel=1e-12)
        kernel = torch.linalg.eigvalsh(curvature_kernel(W, c.inputs, c.outward))
        rank = min(len(kernel), len(values))
        assert torch.allclose(values[-rank:], kernel[-rank:], atol=1e-9 * float(values[-1]))
    W = model.noise_equilibrium()
    H = torch.func.hessian(model.loss)(torch.cat([w.reshape(-1) for w in W]))
    assert c.sharpness() == pytest.approx(float(H.trace()), rel=1e-11)
    assert c.top_curvature() == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-10)


def test_the_gradient_of_a_sample_has_the_energy_that_is_claimed() -> None:
    model = EDLN(normal(generator(0), 2, 3), covariance(generator(1), 3), covariance(generator(2), 2), (4, 3))
    theta = torch.cat([w.reshape(-1) for w in model.random_minimum(generator(3))])
    data = model.data(100_000, 0)

    def one(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return model.sample_loss(t, {"x": x[None], "y": y[None]})

    g = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(theta, data["x"], data["y"])
    square = g.square().sum(1)
    expected = float(chain_fluctuation(model.unflatten(theta), model.chain.inputs, model.chain.noise))
    assert abs(float(square.mean()) - expected) < 5 * float(square.std()) / math.sqrt(len(square))
    losses = torch.func.vmap(one, (None, 0, 0))(theta, data["x"], data["y"])
    assert abs(float(losses.mean() - model.loss(theta))) < 5 * float(losses.std()) / math.sqrt(len(losses))


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_isotropic_noise_is_flattest_and_imbalance_sharpens(depth: int, seed: int) -> None:
    c = problem(seed, depth)
    iso = replace(c, noise=torch.eye(3, dtype=torch.float64) * 0.7)
    assert iso.sharpness() == pytest.approx(iso.flattest_sharpness(), rel=1e-12)
    W = iso.weights((4,) * (depth - 1))
    assert float(hessian_trace(W, iso.inputs)) == pytest.approx(iso.fluctuation() / 1.4, rel=1e-12)  # E|g|^2 = 2 s2 tr H
    ratios = []
    for kappa in (1, 10, 100, 1e4):
        w = torch.logspace(0, -math.log10(kappa), 3, dtype=torch.float64)
        ratios.append((lambda d: d.sharpness() / d.flattest_sharpness())(replace(c, noise=torch.diag(w / w.sum()))))
    assert ratios == sorted(ratios) and ratios[-1] > 2
    # tr H is linear in the depth for a fixed spectrum (Cor. 1), here at t_e = t_x = s_bar = 1 up to the common factor
    low = minimise_gauge(c.weights((4,) * (depth - 1)), lambda V: hessian_trace(V, c.inputs) / c.flattest_sharpness(), seed)
    assert float(hessian_trace(low, c.inputs)) == pytest.approx(c.flattest_sharpness(), rel=1e-8)


def test_a_rank_one_target_is_the_edge_case_of_the_iff() -> None:
    g = generator(0)
    p, c = (torch.nn.functional.normalize(normal(g, n), dim=0) for n in (3, 4))
    X, sigma = covariance(g, 4), 1.7
    V = sigma * torch.outer(p, c)
    for noise in (covariance(g, 3), torch.diag(torch.tensor([1.0, 0.2, 0.05], dtype=torch.float64))):
        chain, al, te = Chain(V, X, noise, 2), float(p @ noise @ p), float(noise.trace())
        half = float((c @ X @ c).sqrt()) * sigma * float(X.trace()) ** 0.5
        assert chain.sharpness() == pytest.approx(2 * half * ((te / al) ** 0.5 + 3 * (al / te) ** 0.5), rel=1e-11)
        assert chain.flattest_sharpness() == pytest.approx(4 * 3**0.5 * half, rel=1e-11)
    q = normal(g, 3)
    q = torch.nn.functional.normalize(q - (q @ p) * p, dim=0)
    r = torch.linalg.cross(p, q)
    noise = torch.outer(p, p) + 1.5 * torch.outer(q, q) + 0.5 * torch.outer(r, r)  # anisotropic, with p.Sigma p = te / d_y
    chain = Chain(V, X, noise, 2)
    assert chain.sharpness() == pytest.approx(chain.flattest_sharpness(), rel=1e-11)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_kernel_knows_neither_widths_depth_view_nor_embedding(seed: int) -> None:
    g = generator(seed)
    V, X, noise = normal(g, 3, 3), covariance(g, 3), covariance(g, 3)
    plain = EDLN(V, X, noise, (4,))
    K = plain.platonic_kernel() / plain.platonic_kernel().norm()
    for widths in ((3,), (5, 3), (4, 6, 3)):
        model = EDLN(V, X, noise, widths, read_in=normal(g, 3, 3), read_out=normal(g, 3, 3))
        for seen in model.kernels(model.noise_equilibrium(g)):
            assert torch.allclose(seen / seen.norm(), K, atol=1e-10)
            assert float(kernel_cosine(seen, plain.platonic_kernel(), X)) == pytest.approx(1, abs=1e-12)
        worst = min(float(kernel_cosine(seen, K, X)) for seen in model.kernels(model.random_minimum(g)))
        assert worst < 0.99


# ------------------------------------------------------------------------------------------------ the models


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def setting(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(seed)
    turn = torch.linalg.qr(normal(g, 3, 3)).Q
    return diagonal(1, 0.8, 0.6) @ turn, diagonal(1, 0.7, 0.5), diagonal(1, 0.4, 0.15) * (3 / 1.55)


MODELS = {
    "pair": EDLN(*setting(0), (4,)),
    "embedded": EDLN(*setting(1), (3, 5), read_in=normal(generator(5), 3, 3), read_out=normal(generator(6), 3, 3)),
    "regression": LinearRegressionNetwork(*setting(2), (4,)),
    "deep regression": LinearRegressionNetwork(*setting(3), (4, 5)),
}


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n, m in MODELS.items() for k in m.kinds if k not in ("sgd", "stationary")])
def test_models_meet_their_simulation_and_the_control_does_not(name: str, kind: str) -> None:
    found = MODELS[name].compare(kind, seed=1, relative=1e-6)
    assert found.ok, found.to_markdown()
    assert MODELS[name].control(kind, seed=1).status == "violated"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["status"] == "ok"
    with pytest.raises(NotSolvable, match=MODELS[name].kinds[0]):
        MODELS[name].predict("trajectory")


def test_sgd_ends_at_the_platonic_kernel_and_at_the_predicted_sharpness() -> None:
    found = MODELS["pair"].compare("sgd", seed=0, relative=0.02)
    assert found.ok, found.to_markdown()
    assert MODELS["pair"].control("sgd", seed=0).status == "violated"
    model = MODELS["regression"]
    found = model.compare("stationary", seed=0, relative=0.04)
    assert found.ok, found.to_markdown()
    assert model.control("stationary", seed=0).status == "violated"  # it is not the flattest minimum
    gaps = []
    for lr in (0.008, 0.004, 0.002):  # an asymptotic claim: the error falls with the rate
        slow = replace(model, lr=lr)
        run = run_sgd([slow], [slow.noise_equilibrium()], steps=round(1500 / lr), replicas=100, seed=0).average
        assert run is not None and isinstance(run.value, Tensor)
        gaps.append(abs(float(run.value[0, 0]) / slow.chain.sharpness() - 1))
    assert gaps[0] > 1.5 * gaps[1] > 2.2 * gaps[2]


@pytest.mark.parametrize("name", ["embedded", "deep regression"])
def test_the_compiled_step_is_the_gradient_of_the_sample_loss(name: str) -> None:
    model = replace(MODELS[name], lr=1.0)
    start = [1.1 * W for W in model.random_minimum(generator(0))]  # off the manifold, so the mean gradient is not zero
    theta = torch.cat([w.reshape(-1) for w in start])
    final = sgd_ensemble([model], 20_000, 0, "float64").run(1, start=theta).final.reshape(-1, len(theta))
    seen, mean = theta - final, torch.func.grad(model.loss)(theta)
    z = (seen.mean(0) - mean) / (seen.std(0) / len(seen) ** 0.5)
    assert float(z.abs().max()) < 5
    data = model.data(20_000, 1)

    def one(x: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(lambda t: model.sample_loss(t, {"x": x[None], "y": y[None]}))(theta)

    each = torch.func.vmap(one)(data["x"], data["y"])
    a, b = seen.square().sum(1), each.square().sum(1)
    assert abs(float(a.mean() - b.mean())) < 5 * float((a.var() + b.var()) / len(a)) ** 0.5


def test_module_and_curvature_room_agree() -> None:
    model = MODELS["embedded"]
    net = model.module()
    assert {n for n, _ in net.named_buffers()} == {"read_in", "read_out"} and len(list(net.parameters())) == 3
    data = model.data(50, 0)
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    mean = lambda f, y: (f - y).square().sum(-1).mean()  # noqa: E731
    assert float(mean(net(data["x"]), data["y"]).detach()) == pytest.approx(float(model.sample_loss(theta, data)), rel=1e-12)
    op = hessian(net, mean, (data["x"], data["y"]))
    top = eigenpairs(op, 1, tol=1e-8).values[0]
    assert float(top) == pytest.approx(float(dense_eigenvalues(op).max()), rel=1e-8)
    into = data["x"] @ model.read_in.T  # type: ignore[union-attr]
    reps = []
    for W in net.layers:  # type: ignore[union-attr, attr-defined]
        into = into @ W.T
        reps.append(into)
    assert float(alignment(reps[:-1], reps[:-1]).value.min()) > 1 - 1e-10  # type: ignore[union-attr]


def test_bad_chains_are_refused() -> None:
    V, X, noise = setting(0)
    cases = [
        (lambda: Chain(V, X[:2, :2], noise, 2), "covariance"),
        (lambda: Chain(V, -X, noise, 2), "positive semi-definite"),
        (lambda: Chain(V, X, diagonal(1, 1, 0), 2), "without label noise"),
        (lambda: Chain(V * math.nan, X, noise, 2), "finite"),
        (lambda: Chain(V, X, noise, 0), "depth"),
        (lambda: Chain(V, X, noise, 2).weights((2,)), "rank 3"),
        (lambda: Chain(V, X, noise, 2).weights((4, 4)), "1 hidden"),
        (lambda: EDLN(V, X, noise, (2,)), "rank 3"),
        (lambda: EDLN(V, X, noise, (4,), read_in=torch.zeros(3, 3)), "invertible"),
        (lambda: EDLN(V, X, noise, (4,), lr=0.0), "lr"),
        (lambda: run_sgd([EDLN(V, X, noise, (4,)), EDLN(V, X, noise, (5,))], [], steps=1, replicas=1, seed=0), "same widths"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    low = Chain(diagonal(1, 0.5, 0), X, diagonal(1, 1, 0), 3)  # rank 2, without noise where there is no target
    W = low.weights((4, 2))
    assert torch.allclose(product(W), low.target, atol=1e-12) and math.isfinite(low.sharpness())
    zero = Chain(torch.zeros(3, 3), X, noise, 2)
    assert zero.fluctuation() == 0 and all(float(w.abs().max()) == 0 for w in zero.weights((4,)))


# ------------------------------------------------------------------------------------------------ alignment


def test_alignment_of_representations() -> None:
    g = generator(0)
    X = normal(g, 200, 5) @ normal(g, 5, 5)
    turn = torch.linalg.qr(normal(g, 8, 8)).Q[:, :5]
    same, other = 3 * X @ turn.T, normal(g, 200, 6)
    for metric in ("kernel_cos", "cka", "mutual_knn", "procrustes"):
        found = alignment([X, other], [same, other], metric).value  # type: ignore[arg-type]
        assert isinstance(found, Tensor) and found.shape == (2, 2)
        assert float(found[0, 0]) == pytest.approx(1, abs=1e-10) and float(found[1, 1]) == pytest.approx(1, abs=1e-10)
        assert float(found[0, 1]) < 0.6
    K, L = X @ X.T, other @ other.T
    assert float(alignment([X], [other]).value) == pytest.approx(float((K * L).sum() / K.norm() / L.norm()))  # type: ignore[arg-type]
    for first, second, metric, message in (
        ([X], [other[:5]], "cka", "same samples"), ([], [X], "cka", "at least one"), ([X], [X], "wrong", "Unknown metric"),
        ([X * math.nan], [X], "cka", "not finite"), ([torch.ones(200, 2)], [X], "cka", "same for all"),
        ([X[:5]], [X[:5]], "mutual_knn", "k < 5"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            alignment(first, second, metric)  # type: ignore[arg-type]
