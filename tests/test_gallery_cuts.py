"""The gallery entries of cutting and compressing: each sabotaged; and the measures they rest on."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parasym.core.errors import InputError, MissingExtraError
from parasym.gallery import synflow, topological_invariance, universal_compression
from parasym.gallery.contract import Part
from parasym.laws.compression import (
    best_order,
    compressed_power_law,
    compression_bound,
    monomial_count,
    order_for_size,
    stretched_exponential_law,
)
from parasym.laws.topology import topological_critical_lr, two_phase_lr
from parasym.measure.topology import (
    barcode,
    bilipschitz,
    components,
    critical_rate,
    crossings,
    distinct,
    neuron_cloud,
    pair_hessians,
    self_intersections,
)
from parasym.methods.moments import Objects, compress_dataset, compress_objects, monomials, scaled

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'parasym[data]'")
pytest.importorskip("gudhi", reason="homology comes with GUDHI: pip install 'parasym[topology]'")


def failed(part: Part) -> list[str]:
    return [check.claim for check in part.checks if not check.passed]


# ------------------------------------------------------------------------------------------------ sabotage


def test_sabotage_synflow(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(synflow.ENTRY.config("smoke").critical, steps=2)
    assert any("critical compression of SynFlow" in claim for claim in failed(synflow.critical(small)))
    hasty = replace(synflow.ENTRY.config("smoke").schedule, steps=(1, 2))
    assert len(failed(synflow.schedule(hasty))) >= 2
    honest = synflow.synaptic_saliency

    def gradient(model: nn.Module, *rest: Any) -> dict[str, Tensor]:
        held = dict(model.named_parameters())
        return {n: s / held[n].detach().double() for n, s in honest(model, *rest).items()}

    monkeypatch.setattr(synflow, "synaptic_saliency", gradient)  # without the weight
    assert len(failed(synflow.conservation(synflow.ConservationConfig(scales=(1.0,))))) >= 3


def test_sabotage_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    line = topological_invariance.LineConfig(etas=(0.3, 2.0), steps=100)
    honest = topological_invariance.pair_hessians
    monkeypatch.setattr(topological_invariance, "pair_hessians", lambda *a, **k: 2 * honest(*a, **k))
    pairs = topological_invariance.PairConfig(units=3, samples=10)
    assert any("I - eta Mbar" in claim for claim in failed(topological_invariance.pairs(pairs)))
    monkeypatch.setattr(topological_invariance, "crossings", lambda a, b: 0)
    assert len(failed(topological_invariance.line(line))) >= 3
    monkeypatch.setattr(topological_invariance, "orientation_flips", lambda j: 1)
    ring = topological_invariance.RingConfig(etas=(0.1, 2.0), steps=5)
    assert any("eta K < 1" in claim for claim in failed(topological_invariance.ring(ring)))
    monkeypatch.setattr(topological_invariance, "barcode", lambda cloud: barcode(cloud * torch.tensor([1.0, 0.2], dtype=torch.float64)))
    assert len(failed(topological_invariance.homology(topological_invariance.HomologyConfig()))) >= 1


def test_sabotage_compression(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = universal_compression.compress_objects

    def even(z: Tensor, w: Tensor | None = None, **options: Any) -> Objects:
        found = honest(z, w, **options)
        return replace(found, weights=torch.full_like(found.weights, float(found.weights.sum()) / len(found.weights)))

    monkeypatch.setattr(universal_compression, "compress_objects", even)
    config = universal_compression.NetworkConfig(orders=(2, 4), demanded=(4,), steps=100, subsets=2)
    assert len(failed(universal_compression.network(config))) >= 3


# ------------------------------------------------------------------------------------------------ moments


@pytest.mark.parametrize(("m", "order"), [(1, 9), (2, 5), (3, 4), (5, 2)])
def test_moments_are_kept_by_few_objects_of_positive_weight(m: int, order: int) -> None:
    z = torch.randn(1500, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.rand(1500, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1
    found = compress_objects(z, w, order=order)
    assert len(found.index) == monomial_count(m, order) and bool((found.weights > 0).all()) and found.moment_error.ok
    A = monomials(z, order)
    torch.testing.assert_close((found.weights[:, None] * A[found.index]).sum(0), (w[:, None] * A).sum(0), rtol=1e-10, atol=1e-9)
    assert A.shape[1] == monomial_count(m, order)


def test_coincident_and_degenerate_objects() -> None:
    z = torch.zeros(50, 3)
    found = compress_objects(z, order=2)
    assert len(found.index) == 1 and float(found.weights) == pytest.approx(50)
    line = torch.linspace(0, 1, 80)[:, None] * torch.tensor([[1.0, 2.0, -1.0]])
    assert len(compress_objects(line, order=3).index) == 4  # a line needs the moments of a line
    few = torch.randn(4, 2)
    assert len(compress_objects(few, order=5).index) == 4
    assert bool((scaled(line).abs() <= 1 + 1e-12).all())


def test_cells_shrink_the_error_and_classes_keep_their_share() -> None:
    stream = torch.Generator().manual_seed(0)
    z = torch.rand(2000, 2, generator=stream, dtype=torch.float64)
    f = torch.tanh(5 * z[:, 0] - 3 * z[:, 1])
    errors = []
    for cells in (1, 16):
        found = compress_objects(z, order=2, cells=cells)
        assert len(found.index) <= found.bound and found.moment_error.ok
        errors.append(abs(float((found.weights * f[found.index]).sum() / 2000 - f.mean())))
    assert errors[1] < errors[0]
    y = (z[:, 0] > 0.3).long()
    small = compress_dataset(z, y, order=3)
    for label in (0, 1):
        assert float(small.weights[small.y == label].sum()) == pytest.approx(float((y == label).sum()))
    batch = next(iter(torch.utils.data.DataLoader(small, batch_size=8, sampler=small.sampler(8))))
    assert [len(part) for part in batch] == [8, 8, 8]
    each = f[small.objects.index]
    assert float(small.loss(each)) == pytest.approx(float(f.mean()), abs=0.02)


def test_bad_objects() -> None:
    z = torch.randn(10, 2)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (z[0], {"order": 2}, "shape"),
        (torch.full((4, 2), math.nan), {"order": 2}, "finite"),
        (z, {"order": -1}, "order"),
        (z, {"order": 2, "cells": 11}, "cells"),
        (z, {"order": 2, "weights": torch.zeros(10)}, "positive"),
        (torch.randn(10, 60), {"order": 5}, "principal components"),
    ]
    for objects, options, message in cases:
        with pytest.raises(InputError, match=message):
            compress_objects(objects, **options)
    with pytest.raises(InputError, match="targets"):
        compress_dataset(z, torch.zeros(3), order=1)
    assert order_for_size(2, 66) == 10 and order_for_size(3, 9) == 1
    assert float(compression_bound(2.0, 0.1, 1)) == pytest.approx(0.02)


def test_a_power_law_in_data_gets_steeper_in_compressed_data() -> None:
    d, alpha = 10**5, 0.7
    for sigma in (0.5, 1.0):
        assert compressed_power_law(3.0, d**sigma, alpha, sigma) == pytest.approx(3.0 * d**-alpha)
    for m in (1, 2, 3):
        assert stretched_exponential_law(120 * math.log(d) ** m, m, alpha, scale=120) == pytest.approx(d**-alpha)
    k = best_order(2, 200, 1.5)  # Theorem 5: log k = (log(m! d' rho)) / m - 1
    assert math.log(k) == pytest.approx(math.log(2 * 200 * 1.5) / 2 - 1)


# ------------------------------------------------------------------------------------------------ topology


def test_known_homology_and_scales() -> None:
    angle = torch.arange(12, dtype=torch.float64) * math.pi / 6
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    found = barcode(ring)
    assert found.bars[1].tolist() == [pytest.approx([2 * math.sin(math.pi / 12), math.sqrt(3)], abs=1e-12)]
    assert (found.betti(0, 0.1), found.betti(0, 0.3), found.betti(1, 0.3), found.betti(1, 0.99)) == (12, 1, 1, 0)
    two = torch.cat([ring, ring + 10])
    assert barcode(two, (0,)).betti(0, 0.2) == 2 and len(components(two, 0.2)) == 2
    assert distinct(torch.cat([ring, ring])) == 12


def test_orders_crossings_and_ratios() -> None:
    a = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert crossings(a, a) == 0 and crossings(a, torch.tensor([0.0, 2.0, 1.0, 3.0])) == 1
    assert crossings(a.flip(0), a) == 3
    low, high = bilipschitz(a[:, None], 2 * a[:, None])
    assert (low, high) == (2.0, 2.0)
    assert self_intersections(torch.tensor([[0.0, 0], [1, 1], [1, 0], [0, 1]])) == 1


def test_pair_identity_and_critical_rate_wide_and_narrow() -> None:
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(6, 65, generator=stream, dtype=torch.float64)
    cloud = torch.randn(4, 66, generator=stream, dtype=torch.float64) / 4

    def loss(c: Tensor) -> Tensor:
        return ((torch.tanh(c[:, :65] @ x.T) * c[:, 65:]).mean(0) - 1).square().mean() / 2

    pairs = torch.combinations(torch.arange(4))
    M = pair_hessians(loss, cloud, pairs, 24)
    g = torch.func.grad(loss)(cloud)
    for (i, j), m in zip(pairs.tolist(), M, strict=True):
        torch.testing.assert_close(g[i] - g[j], m @ (cloud[i] - cloud[j]), rtol=1e-6, atol=1e-9)
    wide = critical_rate(loss, cloud, nodes=24, iterations=60, generator=stream)  # 66 numbers: by the power method
    K = float(torch.linalg.eigvalsh((M + M.mT) / 2)[:, -1].max())
    assert wide.details["K"] == pytest.approx(K, rel=2e-2)
    assert critical_rate(lambda c: -c.square().sum(), cloud).status == "not_applicable"
    assert critical_rate(loss, cloud, pairs=3, nodes=4, iterations=2).details["pairs"] == [3, 6]


def test_clouds_of_a_layer_and_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    cloud = neuron_cloud(model, (torch.rand(4, 3),), "0")
    assert cloud.shape == (5, 3 + 1 + 2)
    torch.testing.assert_close(cloud[:, :3], model[0].weight.detach().double())
    with pytest.raises(InputError, match="no layer"):
        neuron_cloud(model, (torch.rand(4, 3),), "7")
    with pytest.raises(InputError, match="two points"):
        barcode(torch.zeros(1, 2))
    monkeypatch.setitem(sys.modules, "gudhi", None)
    with pytest.raises(MissingExtraError, match=r"parasym\[topology\]"):
        barcode(cloud)


def test_the_critical_rate_of_a_layer_keeps_its_neurons_apart_and_a_schedule_crosses_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        x, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 2, dtype=torch.float64)

    def loss(out: Tensor) -> Tensor:
        return (out - y).square().mean() / 2

    found = topological_critical_lr(model, loss, (x,), where="0", nodes=24)

    def of_cloud(c: Tensor) -> Tensor:
        hidden = torch.tanh(x @ c[:, :3].T + c[:, 3])
        return loss(hidden @ c[:, 4:] + model[2].bias.detach())

    before = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1).detach()
    M = pair_hessians(of_cloud, before, torch.combinations(torch.arange(5)), 24)
    K = float(torch.linalg.eigvalsh((M + M.mT) / 2)[:, -1].max())
    assert found.value == pytest.approx(1 / K, rel=1e-9) and found.details["pairs"] == [10, 10]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = two_phase_lr(optimizer, 0.5 * found.value, 2 * found.value, 1)
    loss(model(x)).backward()
    optimizer.step()
    after = torch.cat([model[0].weight, model[0].bias[:, None], model[2].weight.T], 1).detach()
    assert bilipschitz(before, after)[0] >= 0.5 - 1e-9
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * found.value)
    with pytest.raises(InputError, match="no layer"):
        topological_critical_lr(model, loss, (x,), where="9")
    with pytest.raises(InputError, match="low"):
        two_phase_lr(optimizer, 2.0, 1.0, 3)
