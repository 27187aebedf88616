"""The gallery entries on removing and using symmetries: checks fail when their mechanism is tampered with."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch

from parasym.gallery.contract import Entry, Part


def entry(file: str) -> Entry:
    return importlib.import_module(f"parasym.gallery.{file}").ENTRY


def failed(part: Part) -> set[str]:
    return {check.source for check in part.checks if not check.passed}


def smoke(file: str, name: str, **changes: Any) -> Any:
    return dataclasses.replace(getattr(entry(file).config("smoke"), name), **changes)


# ------------------------------------------------------------------------------------------------ syre


def test_decay_towards_zero_is_not_taken_for_syre(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import syre as gallery
    from parasym.methods.syre import Syre

    monkeypatch.setattr(Syre, "theta0", lambda self, name: torch.zeros_like(self.parameters[name]))
    config = smoke("syre", "trap", steps=200, sigmas=(0.0045, 0.1))
    assert {"syre A2", "syre R2", "syre R6", "syre R1"} <= failed(gallery.trap(config))
    assert {"syre A1, R3", "syre R3", "syre R4"} & failed(gallery.identity(gallery.IdentityConfig()))


def test_a_pull_of_the_wrong_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import syre as gallery
    from parasym.methods import syre as method_module
    from parasym.methods.syre import Pull

    assert method_module is not None
    right = Pull._pull
    monkeypatch.setattr(Pull, "_pull", lambda self, params, names: [-m for m in right(self, params, names)])
    assert "syre R3" in failed(gallery.trap(smoke("syre", "trap", steps=200, sigmas=(0.0045, 0.1))))


def test_a_wrong_gap_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import syre as gallery
    from parasym.methods.syre import Syre

    right = Syre.penalty
    monkeypatch.setattr(Syre, "penalty", lambda self: 1.001 * right(self))
    assert "syre A1, R3" in failed(gallery.identity(gallery.IdentityConfig()))


# ------------------------------------------------------------------------------------------------ spred


def test_a_decay_off_by_two_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the data come with scikit-learn (extra data)")
    from parasym.gallery import spred as gallery

    right = gallery.fit

    def wrong(slope_of: Any, shape: Any, decays: Any, **options: Any) -> Any:
        return right(slope_of, shape, (2 * decays[0], 2 * decays[1]), **options)

    monkeypatch.setattr(gallery, "fit", wrong)
    assert {"spred A1", "spred R1"} <= failed(gallery.lasso(smoke("spred", "lasso", steps=1500)))
    assert "spred A2" in failed(gallery.wide(smoke("spred", "wide", steps=1000)))


def test_a_false_certificate_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the data come with scikit-learn (extra data)")
    from parasym.gallery import spred as gallery

    right = gallery.certified
    monkeypatch.setattr(gallery, "certified", lambda x, y, alpha, **options: right(x, y, 1.01 * alpha, **options))
    assert "spred solver" in failed(gallery.solver(smoke("spred", "solver")))


def test_a_saddle_left_at_another_rate_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import spred as gallery
    from parasym.methods.spred import Product

    right = Product.balanced
    monkeypatch.setattr(Product, "balanced", lambda self, w: (2 * right(self, w)[0], 0.5 * right(self, w)[1], *right(self, w)[2:]))
    config = smoke("spred", "landscape", horizon=2.0, late=(1.0, 2.0))
    assert {"spred R6"} <= failed(gallery.landscape(config))


# ------------------------------------------------------------------------------------------------ parameter-symmetry-unifies


def test_wrong_half_times_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import parameter_symmetry_unifies as gallery

    right = gallery.half_times
    monkeypatch.setattr(gallery, "half_times", lambda s, start: right(s, start.sqrt()))
    assert "parameter-symmetry-unifies A1, R1" in failed(gallery.stairs(smoke("parameter_symmetry_unifies", "stairs")))


def test_a_start_that_is_not_small_has_no_staircase() -> None:
    from parasym.gallery import parameter_symmetry_unifies as gallery

    config = smoke("parameter_symmetry_unifies", "stairs", start=0.5, steps=600)
    assert "parameter-symmetry-unifies A1" in failed(gallery.stairs(config))
    loud = smoke("parameter_symmetry_unifies", "teacher", start=0.5, steps=600)
    assert "parameter-symmetry-unifies A3" in failed(gallery.teacher(loud))


def test_a_wrong_threshold_of_decay_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import parameter_symmetry_unifies as gallery

    right = gallery.modes_under_decay
    monkeypatch.setattr(gallery, "modes_under_decay", lambda s, decay: right(s, 2 * decay))
    assert "parameter-symmetry-unifies A2, R2" in failed(gallery.levels(smoke("parameter_symmetry_unifies", "levels")))


def test_the_tracker_sees_units_leave_and_return() -> None:
    from parasym import audit
    from parasym.core.errors import InputError
    from parasym.measure.hierarchy import SymmetryTracker

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    found = audit(model, (x,), completeness="none").symmetries
    tracker = SymmetryTracker(found)
    params = dict(model.named_parameters())
    units = [p.detach().clone() for p in (model[0].weight[1], model[0].bias[1], model[2].weight[:, 1])]
    for step, size in enumerate((1.0, 0.1, 0.0, 0.1, 1.0)):
        with torch.no_grad():
            model[0].weight[1], model[0].bias[1], model[2].weight[:, 1] = (size * u for u in units)
        tracker.observe(step, params, loss=size)
    signs = [e for e in tracker.events() if "sign" in e.symmetry]
    assert [(e.step, e.kind) for e in signs] == [(2, "restore"), (4, "break")]
    name = signs[0].symmetry
    assert tracker.level(0.05)[name] == [0, 0, 1, 0, 0]
    with pytest.raises(InputError):
        SymmetryTracker([s for s in found if s.fixed_set is None])


def test_measures_of_features() -> None:
    from parasym.measure.hierarchy import distinct_directions, feature_rank, gram_agreement, within_over_between

    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    means = torch.randn(3, 8, generator=stream, dtype=torch.float64)
    tight = means[labels]
    assert float(within_over_between(tight, labels)) < 1e-20 and float(feature_rank(tight)) <= 2 + 1e-9
    noisy = tight + 0.5 * torch.randn(60, 8, generator=stream, dtype=torch.float64)
    assert float(within_over_between(noisy, labels)) > 0.05 and float(feature_rank(noisy)) > 2.5
    turn = torch.linalg.qr(torch.randn(8, 8, generator=stream, dtype=torch.float64))[0]
    assert float(gram_agreement(noisy, noisy @ turn)) == pytest.approx(1.0) and float(gram_agreement(noisy, noisy.flip(0))) < 0.9
    rows = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [1e-3, 1e-3]], dtype=torch.float64)
    assert distinct_directions(rows, 0.05) == 2


# ------------------------------------------------------------------------------------------------ dcs-mirror-symmetry


def test_discovered_mirrors_are_met_and_a_wrong_multiplier_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from parasym.gallery import dcs_mirror_symmetry as gallery
    from parasym.methods.dcs import Dcs

    config = gallery.DiscoveredConfig(steps=1000, seeds=(0,))
    assert not failed(gallery.discovered(config))
    right = Dcs.multipliers
    monkeypatch.setattr(Dcs, "multipliers", lambda self, loss: 2 * right(self, loss))
    assert "dcs-mirror-symmetry R5" in failed(gallery.discovered(config))
