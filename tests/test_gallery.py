"""The gallery: the contract's arithmetic, the store, the page, the measures, and entries sabotaged."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parasym import gallery
from parasym.core.errors import InputError
from parasym.gallery import dcs_mirror_symmetry as dcs
from parasym.gallery import equivariance_toolbox as toolbox
from parasym.gallery import stochastic_collapse as collapse
from parasym.gallery.contract import Check, Entry, Figure, Part, Result, control, holds, match, refuted
from parasym.gallery.drawings import agreement, bars, curves
from parasym.gallery.ensemble import Ensemble, slope
from parasym.gallery.runner import cell_key, run_entry
from parasym.gallery.store import Store
from parasym.measure.identities import (
    Equivariance,
    discrete_residual,
    equivariances,
    finite_noether,
    first_order_residual,
    hvp,
    mirror_force,
    null_basis,
    orbit_residual,
    second_order_residual,
)
from parasym.measure.neurons import effective_rank, independent_neurons, neuron_vectors, spectral_entropy
from parasym.symmetry.symmetry import Symmetry

# ------------------------------------------------------------------------------------------------ checks


def test_match_computes_the_error_and_the_verdict() -> None:
    good = match("a", [1.0, 2.0], torch.tensor([1.0, 2.1]), 0.2, source="s")
    assert good.passed
    assert good.error == pytest.approx(0.1)
    assert not match("a", 1.0, 1.3, 0.2, source="s").passed
    assert match("a", -2.0, -2.1, 0.06, relative=True, source="s").error == pytest.approx(0.05)
    assert match("one prediction for many", 0.0, [1e-3, -2e-3], 1e-2, source="s").error == pytest.approx(2e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_never_passes(value: float) -> None:
    assert not match("a", 0.0, value, 1e9, source="s").passed
    assert not match("a", value, value, 1e9, source="s").passed
    assert not match("a", 0.0, [0.0, value], 1e9, source="s").passed
    assert not holds("a", value, at_most=1.0, source="s").passed
    assert not control("a", value, at_least=-1.0, source="s").passed


def test_inequalities_and_controls() -> None:
    assert holds("a", [0.5, 0.9], at_least=0.5, source="s").passed
    missed = control("a", [0.5, 0.2], at_least=0.3, source="s")
    assert missed.kind == "control"
    assert missed.error == pytest.approx(0.1)
    assert not missed.passed
    assert holds("one bound each", [1.0, 2.0], at_most=[1.0, 2.0], source="s").passed
    with pytest.raises(ValueError, match="exactly one"):
        holds("a", 1.0, source="s")
    with pytest.raises(ValueError, match="exactly one"):
        holds("a", 1.0, at_least=0.0, at_most=2.0, source="s")


def test_a_refuted_demand_passes_only_while_it_is_missed() -> None:
    found = refuted("a", [0.5, 0.2], at_least=0.3, source="s")
    assert found.passed and found.kind == "refuted" and found.error == pytest.approx(0.1)
    assert not refuted("it holds after all", [0.5, 0.3], at_least=0.3, source="s").passed
    assert not refuted("not a number", [0.1, math.nan], at_least=0.3, source="s").passed
    assert not refuted("not finite", math.inf, at_most=1.0, source="s").passed


@pytest.mark.parametrize("measured", [[], [1.0, 2.0, 3.0]])
def test_unpaired_values_are_refused(measured: list[float]) -> None:
    with pytest.raises(ValueError, match="for"):
        match("a", [1.0, 2.0], measured, 1.0, source="s")
    with pytest.raises(ValueError, match="for"):
        holds("a", measured, at_least=[1.0, 2.0], source="s")


def test_a_relative_error_of_a_zero_prediction_fails_unless_exact() -> None:
    assert not match("a", 0.0, 1e-9, 1.0, relative=True, source="s").passed


def _result(**more: object) -> Result:
    figure = Figure("f", {"series": [{"name": "n", "x": [1, 2], "y": [1.0, 3.0]}], "x": "t", "y": "q"}, curves)
    checks = (match("m", 1.0, 1.0, 0.1, source="s", spread=[1.0, 1.0]), control("c", math.inf, at_least=1.0, source="s"))
    return Result(**{"slug": "p", "preset": "smoke", "config": {"seed": 1}, "seeds": (1,), "checks": checks, "figures": (figure,), **more})  # type: ignore[arg-type]


def test_a_result_passes_only_if_every_check_does_and_there_are_some() -> None:
    result = _result()
    assert not result.passed
    assert replace(result, checks=result.checks[:1]).passed
    assert not replace(result, checks=()).passed


def test_results_survive_json() -> None:
    result = _result(seconds=1.5, environment={"torch": "2"}, title="T", paper="P")
    again = Result.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again.to_dict() == result.to_dict()
    assert again.figures[0].draw is curves
    assert again.checks[1].measured == (math.inf,)


def test_the_drawings_draw() -> None:
    series = {"name": "a", "x": [1, 2], "y": [1, 2], "low": [0, 1], "high": [2, 3], "mark": "dash"}
    assert len(curves({"series": [series], "log": "xy"}).data) == 2
    assert len(agreement({"series": [{"name": "a", "predicted": [1.0], "measured": [1.1]}]}).data) == 2
    assert len(bars({"labels": ["a"], "series": [{"name": "s", "y": [1.0]}]}).data) == 1
    with pytest.raises(ValueError, match="not a registered drawing"):
        Figure("f", {}, lambda data: None).to_dict()


# ------------------------------------------------------------------------------------------------ the store and the runner


@dataclass(frozen=True)
class _Cell:
    value: float = 1.0
    seeds: tuple[int, ...] = (3,)
    log: str = ""


@dataclass(frozen=True)
class _Config:
    first: _Cell | None = _Cell()
    second: _Cell | None = _Cell(2.0, (5, 4))


def _measure(cell: _Cell) -> Part:
    torch.manual_seed(cell.seeds[0])  # an experiment may; its run may not show it
    if cell.log:
        with Path(cell.log).open("a") as file:
            file.write("x")
    return Part((match("value", cell.value, cell.value, 0.0, source="s"),))


def _entry() -> Entry:
    return Entry("toy", "Toy", "nobody", ("claim",), {"smoke": _Config()}, {"first": _measure, "second": _measure})


def test_a_run_gathers_its_parts() -> None:
    state = torch.get_rng_state()
    result = _entry().run(_Config())
    assert result.passed and torch.equal(torch.get_rng_state(), state)
    assert result.seeds == (3, 4, 5)
    assert [check.measured for check in result.checks] == [(1.0,), (2.0,)]
    assert [check.measured for check in _entry().run(_Config(first=None)).checks] == [(2.0,)]
    with pytest.raises(KeyError, match="no preset"):
        _entry().config("enormous")
    with pytest.raises(KeyError, match="stochastic-collapse"):
        gallery.run("no-such-paper")


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    config = _Config(_Cell(1.0, (3,), str(log)), _Cell(2.0, (5,), str(log)))
    first = run_entry(_entry(), config, store=tmp_path / "store")
    again = run_entry(_entry(), config, store=tmp_path / "store", jobs=2)
    assert log.read_text() == "xx"
    assert again.to_dict() == first.to_dict()
    run_entry(_entry(), replace(config, first=_Cell(9.0, (3,), str(log))), store=tmp_path / "store")
    assert log.read_text() == "xxx"


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "foreign", "binary"])
def test_a_torn_file_is_ignored_with_a_warning(tmp_path: Path, damage: str) -> None:
    store, cell = Store(tmp_path), _Cell()
    run_entry(_entry(), _Config(cell, None), store=store)
    path = store.path(cell_key(_measure, cell, "toy/first"))
    whole = path.read_text()
    harm = {"cut": whole[: len(whole) // 2], "empty": "", "changed": whole.replace("1.0", "7.0"), "foreign": "[1, 2]", "binary": "\x00\x01"}
    path.write_text(harm[damage])
    with pytest.warns(RuntimeWarning, match="will be run again"):
        result = run_entry(_entry(), _Config(cell, None), store=store)
    assert result.checks[0].measured == (1.0,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get(path.stem) is not None


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        store.put("key", {"value": math.nan})
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import sys, time
from dataclasses import dataclass
from parasym.gallery.contract import Entry, Part, match
from parasym.gallery.runner import run_entry

@dataclass(frozen=True)
class Cell:
    value: int

@dataclass(frozen=True)
class Config:
    first: Cell = Cell(1)
    second: Cell = Cell(2)

def measure(cell):
    print("run", cell.value, flush=True)
    if cell.value == 2 and sys.argv[2] == "hang":
        time.sleep(60)
    return Part((match("value", cell.value, cell.value, 0.0, source="s"),))

entry = Entry("toy", "", "", (), {}, {"first": measure, "second": measure})
print("passed", run_entry(entry, Config(), store=sys.argv[1]).passed, flush=True)
"""


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    command = [sys.executable, str(script), str(tmp_path / "store")]
    with subprocess.Popen([*command, "hang"], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "run 1\n"
        assert running.stdout.readline() == "run 2\n"
        running.send_signal(signal.SIGKILL)
    finished = subprocess.run([*command, "on"], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stdout == "run 2\npassed True\n"


def test_a_seed_has_its_own_stream() -> None:
    both, alone = Ensemble((1, 2)), Ensemble((2,))
    assert torch.equal(both.normal(3)[1], alone.normal(3)[0])
    assert torch.equal(both.integers(9, 4)[1], alone.integers(9, 4)[0])
    assert torch.equal(both.permutation(5)[1], alone.permutation(5)[0])
    times = torch.arange(5.0)
    assert slope(times, 3 * times[:, None] + 1).item() == pytest.approx(3.0)


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_loads_nothing_and_escapes(tmp_path: Path) -> None:
    from plotly.offline import get_plotlyjs

    evil = "<script>alert(1)</script>"
    figure = Figure(evil, {"series": [{"name": f"</script>{evil}", "x": [1], "y": [2.0]}], "x": "a", "y": "b"}, curves, evil)
    check = match(evil, 1.0, 2.0, 0.1, source="s")
    path = gallery.report(
        tmp_path / "new" / "dir", [_result(title=evil, paper=evil, checks=(check,), figures=(figure,), config={"a": evil}), _result()]
    )
    page = path.read_text(encoding="utf-8")
    assert page.count(get_plotlyjs()) == 1
    own = page.replace(get_plotlyjs(), "")
    assert evil not in own
    assert "</script><script>alert" not in own
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?!#)\S*//|@import|https?://(?!www\.w3\.org)", own)
    assert "FAIL" in own


def test_a_page_without_figures_carries_no_plotting_code(tmp_path: Path) -> None:
    path = gallery.report(tmp_path, [replace(_result(), figures=()).to_dict()])
    assert path.stat().st_size < 20_000


# ------------------------------------------------------------------------------------------------ the measures


def test_identities_name_what_does_not_apply() -> None:
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    scale = Equivariance(lambda point, step: {"w": torch.exp(step) * point["w"]})
    assert first_order_residual(lambda point: point["w"].sum(), params, scale).status == "not_applicable"
    with pytest.raises(ValueError, match="give an action or a tangent"):
        Equivariance()


def test_identities_agree_with_dense_derivatives() -> None:
    params = {"a": torch.tensor([0.3, -0.7], dtype=torch.float64), "b": torch.tensor(1.1, dtype=torch.float64)}

    def loss(point: dict[str, torch.Tensor]) -> torch.Tensor:
        return (point["a"] * point["b"]).sin().sum() + point["b"] ** 3

    dense = torch.func.hessian(lambda v: loss({"a": v[:2], "b": v[2]}))(torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64))
    product = hvp(loss, params, {"b": torch.tensor(2.0, dtype=torch.float64)})
    assert torch.allclose(torch.cat([product["a"], product["b"][None]]), 2 * dense[:, 2], atol=1e-14)
    stretch = Equivariance(lambda point, step: {"a": torch.exp(step) * point["a"], "b": torch.exp(-step) * point["b"]})
    first, second = first_order_residual(loss, params, stretch), second_order_residual(loss, params, stretch)
    assert first.relative > 0.05
    assert second.relative > 0.05
    assert orbit_residual(loss, params, stretch.action, step=1e-2).relative > 0.05
    given = Equivariance(stretch.action, tangent=lambda point: {"a": point["a"], "b": -point["b"]})
    assert first_order_residual(loss, params, given).value == pytest.approx(first.value, abs=1e-14)


class _Opaque(torch.autograd.Function):
    """x^2 with a backward but no forward-mode derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, slope: Any) -> Any:  # type: ignore[override]
        return 2 * slope * ctx.saved_tensors[0]


def test_identities_fall_back_to_reverse_mode() -> None:
    params = {"w": torch.tensor([0.5, -1.5], dtype=torch.float64)}
    turn = Equivariance(tangent=lambda point: {"w": torch.stack([point["w"][1], -point["w"][0]])})
    found = first_order_residual(lambda point: _Opaque.apply(point["w"]).sum(), params, turn)
    assert found.value < 1e-15
    assert first_order_residual(lambda point: _Opaque.apply(point["w"]), params, turn).left == pytest.approx(1.5 * 2**0.5)


class _Rotation:
    """SO(2) on a vector, as a symmetry's action."""

    dim = 1

    def act(self, params: Any, element: torch.Tensor) -> dict[str, torch.Tensor]:
        cosine, sine = element[0].cos(), element[0].sin()
        x, y = params["w"]
        return {"w": torch.stack([cosine * x - sine * y, sine * x + cosine * y])}

    def generators(self, params: Any) -> dict[str, torch.Tensor]:
        return {"w": torch.stack([-params["w"][1], params["w"][0]])[None]}


def test_identities_take_any_symmetry() -> None:
    params = {"w": torch.tensor([0.5, -1.5], dtype=torch.float64), "b": torch.tensor([1.0], dtype=torch.float64)}
    rotation = Symmetry("rotation", "SO(2)", 1, "linear", ("w",), "function", 0.0, True, _Rotation())
    (item,) = equivariances(rotation, params)
    config = toolbox.DiscoveredConfig()

    def round_loss(point: Any) -> torch.Tensor:
        return point["w"].square().sum().sin() * point["b"][0]

    def skew_loss(point: Any) -> torch.Tensor:
        return round_loss(point) + point["w"][0] ** 3

    assert second_order_residual(round_loss, params, item).value < 1e-14
    assert null_basis(params, [item, item]).shape == (3, 1)
    ((first, second),) = toolbox.of_symmetries([rotation], round_loss, params, config)
    assert first < 1e-14
    assert second < 1e-8
    ((first, second),) = toolbox.of_symmetries([rotation], skew_loss, params, config)
    assert min(first, second) > 1e-2
    assert equivariances(replace(rotation, kind="discrete"), params) == []


def test_the_orbit_identity_needs_only_the_finite_action() -> None:
    params = {"u": torch.tensor(1.3, dtype=torch.float64), "v": torch.tensor(-0.4, dtype=torch.float64)}

    def action(point: dict[str, torch.Tensor], step: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = math.exp(float(step))  # no derivative passes through
        return {"u": point["u"] * scale, "v": point["v"] / scale}

    found = orbit_residual(lambda point: (point["u"] * point["v"] - 1) ** 2, params, action, step=1e-2)
    assert found.relative < 1e-8
    assert found.left > 0.1


def test_discrete_identities_refuse_what_is_no_symmetry() -> None:
    params = {"w": torch.tensor([0.3, -0.7], dtype=torch.float64)}

    def even(point: dict[str, torch.Tensor]) -> torch.Tensor:
        return point["w"].square().prod() + point["w"][1].cos()

    def flip(point: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"w": point["w"] * torch.tensor([1.0, -1.0], dtype=torch.float64)}

    def exchange(point: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"w": point["w"].flip(0)}

    assert discrete_residual(even, params, flip).gradient.value < 1e-14
    assert discrete_residual(even, params, exchange).gradient.value > 0.1
    measured, predicted = finite_noether(even, params, flip)
    assert torch.allclose(measured["w"], predicted["w"], atol=1e-13)
    force, averaged = mirror_force(even, params, [{"w": torch.tensor([0.0, 1.0], dtype=torch.float64)}])
    assert torch.allclose(force, averaged, atol=1e-13)


def test_independent_neurons_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.0, 1.0], [0.01, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    found = independent_neurons(rows)
    assert found.groups == (0, 0, 2, -1, -1, 5)
    assert (found.independent, found.zeros, found.fraction) == (3, 2, 0.5)
    assert independent_neurons(rows, dup_tol=1e-4).independent == 4
    assert independent_neurons(torch.zeros(3, 2)).independent == 0


@pytest.mark.parametrize("rows", [torch.zeros(0, 3), torch.zeros(3), torch.tensor([[math.nan]])])
def test_bad_neurons_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(InputError):
        independent_neurons(rows)


def test_neuron_vectors_join_convolution_and_reader() -> None:
    rows = neuron_vectors(torch.randn(6, 3, 2, 2), torch.randn(4, 6, 5), torch.randn(6))
    assert rows.shape == (6, 12 + 1 + 20)
    with pytest.raises(InputError, match="6 neurons"):
        neuron_vectors(torch.randn(6, 3), torch.randn(4, 5))


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(5)).item() == pytest.approx(5.0)
    assert spectral_entropy(torch.ones(3, 4)).item() == pytest.approx(0.0, abs=1e-6)
    assert torch.isfinite(spectral_entropy(torch.zeros(2, 2)))


# ------------------------------------------------------------------------------------------------ the entries


def test_runs_are_reproducible() -> None:
    config = collapse.MaximumConfig(etas=(0.4, 0.6), repelled=(0.4,), collapsing=(0.6,), chains=50, steps=300)
    assert collapse.maximum(config) == collapse.maximum(config)


def _failed(part: Part) -> list[Check]:
    return [check for check in part.checks if check.kind == "match" and not check.passed]


def test_sabotage_stochastic_collapse_without_noise() -> None:
    quiet = collapse.QuarticConfig(zetas=(1.0,), collapsing=(2.5,), chains=20, noise=0.0)
    assert len(_failed(collapse.quartic(quiet))) == 2
    still = collapse.MaximumConfig(curvatures=(-0.5,), etas=(0.4, 0.6), repelled=(0.4,), collapsing=(0.6,), chains=20, steps=1500)
    with pytest.raises(ValueError, match="sign"):
        collapse.maximum(still)
    split = collapse.InvariantConfig(rules=("sgd",), steps=50, split=0.1, seeds=(0,))
    assert len(_failed(collapse.invariant(split))) == 4
    gentle = collapse.MergeConfig(apart=(0.02,), between=(), merging=(0.1,), many_seeds=(0, 1), seeds=(0, 1))
    assert _failed(collapse.merge(gentle))


def test_sabotage_dcs_without_decay_or_symmetry(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _failed(dcs.constraint(dcs.ConstraintConfig(above=0.8, steps=3000)))
    monkeypatch.setattr(dcs, "reflect", lambda theta, basis: theta)
    assert len(_failed(dcs.mirror(dcs.MirrorConfig(points=10)))) >= 3


def test_sabotage_plasticity_without_a_random_point() -> None:
    same = dcs.PlasticityConfig(shift=0.0, spread=0.0, tasks=2, steps=30, images=50, seeds=(0,))
    assert len(_failed(dcs.plasticity(same))) >= 2


def test_sabotage_attraction_away_from_the_minimum() -> None:
    assert _failed(dcs.attraction(dcs.AttractionConfig(settle=5)))


def test_sabotage_dcs_neurons_with_another_loss_convention() -> None:
    halved = dcs.NeuronsConfig(decay=0.0, steps=2000)
    assert _failed(dcs.neurons(halved))


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_sabotage_equivariance_with_an_activation_that_breaks_it(activation: str) -> None:
    assert len(_failed(toolbox.continuous(toolbox.NetConfig(activation=activation)))) >= 8


def test_sabotage_discrete_with_an_activation_that_is_not_odd() -> None:
    wrong = toolbox.DiscreteConfig(net=toolbox.NetConfig(activation="gelu"))
    assert len(_failed(toolbox.discrete(wrong))) >= 2
    coarse = toolbox.DiscreteConfig(nodes=3)
    assert _failed(toolbox.discrete(coarse))


def test_sabotage_training_with_a_large_eps() -> None:
    assert _failed(toolbox.training(toolbox.TrainingConfig(eps=1.0, steps=0, seeds=(0,))))


def test_plasticity_needs_scikit_learn_for_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(dcs.MissingExtraError, match="scikit-learn"):
        dcs.plasticity(dcs.PlasticityConfig(data="digits"))
