"""Defects that were found and mended: each test failed before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.gallery import parameter_symmetry_unifies as unifies
from parasym.gallery import spred as spred_gallery
from parasym.gallery import syre as syre_gallery
from parasym.gallery import topological_invariance as topological
from parasym.gallery.contract import Part
from parasym.measure.topology import bilipschitz, critical_rate, crossings, orientation_flips, pair_hessians, self_intersections
from parasym.methods.compress import compress
from parasym.methods.moments import compress_dataset
from parasym.methods.prune import Pruner, prune
from parasym.methods.revive import revive
from parasym.methods.teleport import teleport


def normed(track: bool = False) -> tuple[nn.Module, Tensor]:
    """Rows 0 and 1 differ by their biases alone: a batch's statistics hide that, fresh running ones do not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double().train()
    x = torch.randn(64, 5, dtype=torch.float64)
    with torch.no_grad():
        net[0].weight[1] = net[0].weight[0]  # type: ignore[union-attr, operator, index]
        net[0].bias[1] = net[0].bias[0] + 2  # type: ignore[union-attr, operator, index]
        if track:
            net[1].momentum = 1.0  # type: ignore[assignment]
            net(x)
    return net, x


def change(net: nn.Module, new: nn.Module, x: Tensor, train: bool) -> float:
    a, b = copy.deepcopy(net).train(train)(x), copy.deepcopy(new).train(train)(x)
    return float((a - b).detach().abs().max() / a.detach().abs().max())


@pytest.mark.parametrize("method", [compress, revive])
def test_what_only_the_statistics_of_a_batch_hide_is_left_and_named(method: object) -> None:
    net, x = normed()
    edit = method(net, (x,))  # type: ignore[operator]
    assert edit.certificate.ok and change(net, edit.edited(), x, False) < 1e-12 and change(net, edit.edited(), x, True) < 1e-12
    assert any("eval mode" in str(row.get("why")) for row in edit.summary["left"])
    tracked, x = normed(track=True)  # running statistics that follow the biases: the copies are copies in both modes
    edit = method(tracked, (x,))  # type: ignore[operator]
    assert edit.certificate.ok and edit.after
    assert change(tracked, edit.edited(), x, False) < 1e-12 and change(tracked, edit.edited(), x, True) < 1e-12


@pytest.mark.parametrize("to", ["balance", "minimum-norm"])
def test_teleport_in_train_mode_keeps_what_eval_mode_computes(to: str) -> None:
    net, x = normed(track=True)
    edit = teleport(net, (x,), to=to)
    assert edit.certificate.ok and change(net, edit.edited(), x, False) < 1e-12 and change(net, edit.edited(), x, True) < 1e-12
    assert any("train mode only" in row["why"] for row in edit.summary["left_out"])


@pytest.mark.parametrize("shape", [(300,), (300, 1), (300, 2), (300, 1, 2)])
def test_integer_targets_of_any_shape_keep_the_mass_of_every_class(shape: tuple[int, ...]) -> None:
    stream = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 2, generator=stream, dtype=torch.float64), torch.randint(0, 2, shape, generator=stream)
    found = compress_dataset(x, y, order=2)
    assert found.objects.moment_error.ok and float(found.weights.sum()) == pytest.approx(300, abs=1e-8)
    for row in y.reshape(300, -1).unique(dim=0):
        kept = (found.y.reshape(len(found), -1) == row).all(1)
        assert float(found.weights[kept].sum()) == pytest.approx(int((y.reshape(300, -1) == row).all(1).sum()), abs=1e-8)
    with pytest.raises(InputError, match="one target"):
        compress_dataset(x, y[:-1], order=2)
    with pytest.raises(InputError, match="one target"):
        compress_dataset(x[:0], y[:0], order=2)


def deep(layers: int) -> nn.Module:
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(64, 64), nn.ReLU())])


def test_a_deep_network_is_pruned_without_overflow_and_a_cut_is_seen() -> None:
    torch.manual_seed(0)
    net = deep(200)
    edit = prune(net, (torch.randn(1, 64),), keep=0.9, score="magnitude")
    assert edit.certificate.ok and edit.summary["kept"] == round(0.9 * 200 * 64 * 64)
    pruner = Pruner.of(deep(3), (torch.randn(1, 64),))
    masks = {n: torch.ones(w.shape, dtype=torch.bool) for n, w in pruner.weights.items()}
    first, second = list(masks)[:2]
    masks[first][32:], masks[second][:, :32] = False, False  # weights are left in every layer, but no path
    assert not pruner.connected(masks)
    masks[second][0, 0] = True
    assert pruner.connected(masks)


def test_measures_of_a_cloud_refuse_what_has_no_answer() -> None:
    loss, nan = (lambda c: c.square().sum() ** 2), torch.full((4, 2), torch.nan, dtype=torch.float64)
    point = torch.zeros(4, 2, dtype=torch.float64)
    for bad in (torch.randn(1, 2, dtype=torch.float64), nan):
        with pytest.raises(InputError, match="at least two points"):
            critical_rate(loss, bad)
        with pytest.raises(InputError, match="at least two points"):
            pair_hessians(loss, bad, torch.tensor([[0, 1]]))
    with pytest.raises(InputError, match="coincide"):
        bilipschitz(point, point + torch.arange(4)[:, None])
    with pytest.raises(InputError, match="one shape"):
        bilipschitz(torch.randn(4, 2), torch.randn(5, 2))
    with pytest.raises(InputError, match="finite Jacobians"):
        orientation_flips(nan.expand(3, 4, 2)[:, :2])
    with pytest.raises(InputError, match="finite lines"):
        crossings(torch.tensor([0.0, torch.nan]), torch.tensor([0.0, 1.0]))
    with pytest.raises(InputError, match="finite corners"):
        self_intersections(nan)
    with pytest.raises(InputError, match="not finite"):
        critical_rate(lambda c: (c - c.detach()).abs().sqrt().sum(), torch.randn(3, 2, dtype=torch.float64))


def test_the_critical_rate_refines_its_path_until_it_stands_still() -> None:
    for seed in range(2):
        stream = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 3, generator=stream, dtype=torch.float64)
        cloud = 2 * torch.randn(6, 5, generator=stream, dtype=torch.float64)

        def loss(c: Tensor, x: Tensor = x) -> Tensor:
            return ((torch.tanh(2 * (c[:, :3] @ x.T + c[:, 3:4])) * c[:, 4:]).mean(0) - x.sum(1).sin()).square().mean() / 2

        M = pair_hessians(loss, cloud, torch.combinations(torch.arange(6)), 192)
        exact = 1 / float(torch.linalg.eigvalsh((M + M.mT) / 2).max())
        found = critical_rate(loss, cloud)
        assert isinstance(found.value, float) and isinstance(found.residual, float)
        assert abs(found.value - exact) <= found.residual + 1e-9 and (found.status == "ok") == (found.residual <= 1e-3 * found.value * 1.01)
        assert critical_rate(loss, cloud, nodes=1, tol=1e-12).status == "not_converged"


# ------------------------------------------------------------------------------------------------ checks of the gallery that could not fail


def failing(part: Part) -> list[str]:
    return [c.claim for c in part.checks if not c.passed]


def test_the_critical_rate_of_the_line_is_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    config = topological.LineConfig(etas=(0.3, 1.0, 2.0), steps=40, seeds=(0, 1, 2), adam=(1e-3,))
    assert not [c for c in failing(topological.line(config)) if "if and only if" in c]
    right = topological.Line.between
    monkeypatch.setattr(topological.Line, "between", lambda self, w, nodes: 0.7 * right(self, w, nodes))
    assert {c[:20] for c in failing(topological.line(config))} >= {"no crossing if and o", "K of neighbours in c"}


def test_the_homology_of_the_ring_and_its_folds_above_1_3_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    config = topological.RingConfig(etas=(0.05, 0.7), steps=100)
    assert not [c for c in failing(topological.ring(config)) if "loops" in c or "inside out" in c]
    monkeypatch.setattr(topological, "orientation_flips", lambda jacobians: 0)
    right = topological.barcode
    monkeypatch.setattr(topological, "barcode", lambda cloud: right(cloud * torch.tensor([1.0, 0.05], dtype=torch.float64)))
    found = failing(topological.ring(config))
    assert any("loops" in c for c in found) and any("inside out" in c for c in found)


def test_every_plateau_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    config = unifies.StairConfig(seeds=(0, 1, 2), scales=(1e-3, 1e-6))
    assert not failing(unifies.stairs(config))
    right, off = unifies.plateau_losses, torch.tensor([1.0, 1.0, 1.05, 1.0, 1.0], dtype=torch.float64)
    monkeypatch.setattr(unifies, "plateau_losses", lambda s: right(s) * off)
    assert any("every plateau" in c for c in failing(unifies.stairs(config)))


def test_a_metric_that_is_the_identity_keeps_every_frame_of_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failing(syre_gallery.identity(syre_gallery.IdentityConfig()))
    right = syre_gallery.Syre.excess
    monkeypatch.setattr(syre_gallery.Syre, "excess", lambda self, name: None if right(self, name) is None else 0 * right(self, name))
    assert any("frame" in c for c in failing(syre_gallery.identity(syre_gallery.IdentityConfig())))


def test_the_curvature_and_growth_at_zero_are_those_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    config = spred_gallery.LandscapeConfig(horizon=42.0)
    assert not [c for c in failing(spred_gallery.landscape(config)) if "Hessian" in c or "near zero" in c]
    right = spred_gallery.factored
    monkeypatch.setattr(spred_gallery, "factored", lambda c, x, y: lambda z: 1.01 * right(c, x, y)(z))
    found = failing(spred_gallery.landscape(config))
    assert any("Hessian" in c for c in found) and any("near zero" in c for c in found)
