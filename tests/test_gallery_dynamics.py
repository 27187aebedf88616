"""The papers on exactly solvable dynamics: checks that fail when the mechanism is wrong."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from parasym.gallery.contract import Entry


def entry(file: str) -> Entry:
    return importlib.import_module(f"parasym.gallery.{file}").ENTRY


def failed(part: Any) -> list[str]:
    return [check.claim for check in part.checks if not check.passed]


def test_a_wrong_riccati_matrix_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import lazy_to_rich as gallery
    from parasym.solvable import balanced_net

    right = balanced_net.two_layer_matrix
    monkeypatch.setattr(balanced_net, "two_layer_matrix", lambda target, lam: right(target, -lam))
    config = replace(entry("lazy_to_rich").config("smoke").trajectories, lams=(-1.0,), steps=3000)
    assert any("Q Q^T of descent" in claim for claim in failed(gallery.trajectories(config)))


def test_a_wrong_rate_of_the_line_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import three_mechanisms as gallery
    from parasym.solvable.line_net import LineFlow

    monkeypatch.setattr(LineFlow, "k", property(lambda self: 0.5 * self.v * self.gamma * self.c))
    config = replace(entry("three_mechanisms").config("smoke").runs, settings=gallery.SETTINGS[:1])
    claims = failed(gallery.runs(config))
    assert any("output along the run" in c for c in claims) and any("against the ODE" in c for c in claims)


def test_wrong_mechanisms_and_powers_of_the_width_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import three_mechanisms as gallery
    from parasym.solvable.line_net import LineFlow, scaling_phase

    smoke = entry("three_mechanisms").config("smoke")
    monkeypatch.setattr(gallery, "scaling_phase", lambda *e: replace(found := scaling_phase(*e), richness=1.5 * found.richness))
    assert sum("power of the width" in c or "exponent of Theta" in c for c in failed(gallery.phases(smoke.phases))) == 2
    monkeypatch.setattr(LineFlow, "cosine", lambda self, t: torch.linspace(0, 1, len(t), dtype=torch.float64))
    claims = failed(gallery.runs(replace(smoke.runs, settings=gallery.SETTINGS[1:2])))
    assert any("mechanism of every seed" in c for c in claims)


def test_a_wrong_neuron_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import get_rich_quick as gallery
    from parasym.solvable.minimal_rich import NeuronFlow

    config = entry("get_rich_quick").config("smoke").neuron
    monkeypatch.setattr(NeuronFlow, "final_sign", lambda self: self.a.sign())
    monkeypatch.setattr(gallery, "mirror", lambda beta, delta: 2 * beta)
    claims = failed(gallery.neuron(replace(config, cases=3, charges=(2.0,))))
    assert any("sign of a" in c for c in claims) and any("grad Psi" in c for c in claims)


def test_networks_without_imbalance_do_not_pass_for_unbalanced(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import get_rich_quick as gallery

    config = entry("get_rich_quick").config("smoke").networks
    right = gallery.doubled_start
    monkeypatch.setattr(gallery, "doubled_start", lambda config, draws: right(replace(config, deltas=(0.0,) * len(config.deltas)), draws))
    assert any("Hamming" in claim for claim in failed(gallery.networks(replace(config, steps=500, records=10))))


def test_wrong_exponents_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import quasi_homogeneous_margin as gallery
    from parasym.symmetry import quasi

    right = quasi._least
    monkeypatch.setattr(quasi, "_least", lambda *a: right(*a) ** 2)
    config = replace(entry("quasi_homogeneous_margin").config("smoke").table, names=("three-layer ReLU with biases",))
    assert any("exponents" in claim for claim in failed(gallery.table(config)))


def test_the_euclidean_margin_does_not_pass_for_the_asymmetric_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import quasi_homogeneous_margin as gallery

    right = gallery.asymmetric_angle
    monkeypatch.setattr(gallery, "asymmetric_angle", lambda mu, radius, exponents: right(mu, radius, (1.0, 1.0)))
    claims = failed(gallery.balls(entry("quasi_homogeneous_margin").config("smoke").balls))
    assert sum("angle at the end" in claim for claim in claims) == 2


def test_steps_without_the_order_of_learning_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import stepwise_ssl as gallery
    from parasym.solvable.barlow import BarlowFlow

    def naive(self: Any, W0: Any) -> Any:
        M = W0 @ self.directions[:, : self.d]
        return M / M.norm(dim=0), M.norm(dim=0)

    monkeypatch.setattr(BarlowFlow, "start", naive)
    claims = failed(gallery.linear(replace(entry("stepwise_ssl").config("smoke").linear, seeds=(0, 1))))
    assert any("final W" in claim for claim in claims) and any("growth rate of descent" in claim for claim in claims)


def test_the_slope_of_infonce_is_that_of_its_loss() -> None:
    from parasym.gallery.stepwise_ssl import infonce_slope
    from parasym.solvable import GaussianInfoNCE

    draws = torch.Generator().manual_seed(0)
    A, C = (torch.randn(4, 6, generator=draws, dtype=torch.float64) for _ in range(2))
    A, C = A @ A.mT, C @ C.mT
    W = torch.randn(3, 4, generator=draws, dtype=torch.float64)
    right = torch.func.grad(GaussianInfoNCE(A, C, 3).loss)({"W": W})["W"]
    assert float((infonce_slope(W, A, C) - right).abs().max()) < 1e-12
    assert float((infonce_slope(W, A, 2 * C) - right).abs().max()) > 0.1


def test_ties_without_an_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import stepwise_ssl as gallery

    config = entry("stepwise_ssl").config("smoke").linear
    assert all(check.passed for check in gallery._tied(config))
    right = gallery.rotated
    monkeypatch.setattr(gallery, "rotated", lambda spectrum, draws: right((1.0, 0.9, *spectrum[2:]), draws))
    assert sum(not check.passed for check in gallery._tied(config)) >= 2


def test_kernels_of_the_student_are_those_of_autograd() -> None:
    from parasym.gallery.get_rich_quick import _kernel
    from parasym.measure.ntk import kernel

    draws = torch.Generator().manual_seed(0)
    x, W, a = (torch.randn(*shape, generator=draws, dtype=torch.float64) for shape in ((7, 3), (5, 3), (5,)))
    net = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.ReLU(), torch.nn.Linear(5, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(W), net[2].weight.copy_(a[None])
    assert torch.allclose(_kernel(x, W, a, True), kernel(net, x).matrix, atol=1e-12)


def test_upstream_starts_keep_the_function() -> None:
    from torch import nn

    from parasym.core.errors import InputError
    from parasym.methods.upstream import upstream

    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 2)).double(),
        torch.randn(9, 4).double(),
    )
    before, weights = model(x), [p.detach().clone() for p in model.parameters()]
    edit = upstream(model, x, 3.0)
    assert edit.certificate.ok and not edit.applied
    edit.apply(torch.optim.SGD(model.parameters(), 0.1))
    ratios = [float((p.detach() / w).mean()) for p, w in zip(model.parameters(), weights, strict=True)]
    assert ratios == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 9, 9.0, 1.0])
    assert torch.allclose(model(x), before, atol=1e-13)
    edit.undo()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for refused in (
        nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)),
        nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
    ):
        with pytest.raises(InputError, match="no rescaling symmetry"):
            upstream(refused, torch.randn(9, 4), 2.0)
    with pytest.raises(InputError, match="tau"):
        upstream(model, x, 0.0)
