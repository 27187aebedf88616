"""A watched run: it is the unwatched run to the last bit, its books are the exact ledgers, and nothing that fails reaches training."""

from __future__ import annotations

import copy
import math
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parasym
import parasym.watch.observer as observer
from parasym.core.errors import InputError, RecordError
from parasym.laws import Ledger
from parasym.laws.charges import Charge, rescale, scale
from parasym.watch import Watch
from parasym.watch.books import Books
from parasym.watch.budget import Budget, Meter
from parasym.watch.noise import MicroNoise, PairNoise
from parasym.watch.record import Record
from parasym.watch.summary import summary

N = 96


def mlp(seed: int = 0, act: Callable[[], nn.Module] = nn.ReLU, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), act(), nn.Linear(12, 10), act(), nn.Linear(10, 4)).to(dtype)


def charges_of(model: nn.Module) -> list[Charge]:
    p = dict(model.named_parameters())
    return [rescale(p, ["0.weight", "0.bias"], ["2.weight"], "first"), rescale(p, ["2.weight", "2.bias"], ["4.weight"], "second")]


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randn(N, 6, generator=g, dtype=dtype), torch.randint(4, (N,), generator=g)


def draw(x: Tensor, y: Tensor, size: int = 16) -> tuple[Tensor, Tensor]:
    """A batch from torch's global generator: a watcher that touches it changes the run."""
    at = torch.randint(len(x), (size,))
    return x[at], y[at]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, before: Callable[[], None] | None = None) -> None:
    x, y = data(next(model.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        a, b = draw(x, y)
        F.cross_entropy(model(a), b).backward()
        if before is not None:
            before()
        optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything a run consists of."""
    out: list[Any] = [*model.state_dict().items()]
    for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        out.append((f"grad {i}", p.grad))
        out += [(f"{k} {i}", v) for k, v in sorted(optimizer.state[p].items(), key=lambda kv: str(kv[0]))]
    kind, keys, *rest = np.random.get_state()
    return [*out, ("torch", torch.get_rng_state()), ("numpy", (kind, keys.tolist(), *rest)), ("python", random.getstate())]


def same(a: list[Any], b: list[Any]) -> str:
    """The name of the first thing that differs; empty where none does."""
    assert [k for k, _ in a] == [k for k, _ in b]
    for (name, x), (_, y) in zip(a, b, strict=True):
        if isinstance(x, Tensor):
            if not (x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))):
                return str(name)
        elif isinstance(x, list) and any(isinstance(s, Tensor) for s in x):
            if same([(name, s) for s in x], [(name, t) for t in y]):
                return str(name)
        elif x != y and not (x is None or y is None or callable(x)):
            return str(name)
    return ""


def rows(path: Path, kind: str | None = None) -> dict[str, list[Any]]:
    with Record.open(path) as record:
        return record.table(kind)


def series(path: Path, name: str, where: str = "") -> Any:
    with Record.open(path) as record:
        return record.series(name, where)


# ---------------------------------------------------------------------------------------------------- the run is not changed

Loop = Callable[[nn.Module, torch.optim.Optimizer], None]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    train(model, optimizer, 9)


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    train(model, optimizer, 9, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3))


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = data()
    for _ in range(9):
        optimizer.zero_grad()
        for _ in range(3):
            a, b = draw(x, y)
            (F.cross_entropy(model(a), b) / 3).backward()
        optimizer.step()


def autocast(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = data()
    for _ in range(9):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            a, b = draw(x, y)
            loss = F.cross_entropy(model(a), b)
        loss.backward()
        optimizer.step()


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Float16 with a loss scale that overflows at first, so that steps are skipped."""
    x, y = data()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=3)
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            a, b = draw(x, y)
            loss = F.cross_entropy(model(a), b)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def closures(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = data()
    for _ in range(5):
        a, b = draw(x, y, 64)

        def closure(a: Tensor = a, b: Tensor = b) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(a), b)
            loss.backward()
            return loss

        optimizer.step(closure)


def scheduled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for _ in range(9):
        train(model, optimizer, 1)
        schedule.step()


class Norms(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 4))


def groups(model: nn.Module) -> torch.optim.Optimizer:
    p = list(model.parameters())
    return torch.optim.SGD([{"params": p[:2], "lr": 0.02}, {"params": p[2:], "momentum": 0.5}], lr=0.1)


RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.optim.Optimizer], Loop]] = {
    "sgd": (mlp, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), plain),
    "momentum": (mlp, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2), clipped),
    "nesterov": (mlp, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True), scheduled),
    "groups": (mlp, groups, accumulated),
    "adam": (mlp, lambda m: torch.optim.Adam(m.parameters(), lr=1e-2), plain),
    "adamw": (Norms, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), accumulated),
    "norms and dropout": (Norms, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), plain),
    "norms compiled": (Norms, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), plain),
    "autocast": (mlp, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), autocast),
    "scaled": (mlp, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), scaled),
    "scaled and fused": (mlp, lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, fused=True), scaled),
    "lbfgs": (mlp, lambda m: torch.optim.LBFGS(m.parameters(), lr=0.3, max_iter=4), closures),
    "sgd with a closure": (mlp, lambda m: torch.optim.SGD(m.parameters(), lr=0.1), closures),
}


def both(name: str, folder: Path, wrap: Callable[[nn.Module], nn.Module] = lambda m: m, **options: Any) -> tuple[str, Path]:
    """Run a case unwatched and watched from one start; what differs, and the record."""
    build, make, loop = RUNS[name]
    results = []
    for watched in (False, True):
        model = build()
        optimizer = make(model)
        called = wrap(model)
        random.seed(3), np.random.seed(3), torch.manual_seed(3)
        if watched:
            x, y = data()
            settings = {"budget": None, "batch": (x[:24], y[:24]), "path": folder / "run.sqlite", **options}
            with parasym.watch(called, optimizer, F.cross_entropy, **settings):
                loop(called, optimizer)
        else:
            loop(called, optimizer)
        results.append(state_of(model, optimizer))
    return same(*results), folder / "run.sqlite"


@pytest.mark.parametrize("name", [n for n in RUNS if "compiled" not in n])
def test_the_watched_run_is_the_unwatched_one(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        difference, path = both(name, tmp_path)
    assert difference == ""
    seen = rows(path)
    assert max(seen["step"]) >= 5 and "charge" in seen["kind"] and "norm" in seen["kind"]
    assert ("sharpness" in seen["kind"]) and ("noise" in seen["kind"])


def test_a_watcher_that_draws_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the comparison above notices one number drawn from a generator."""
    before = Watch._plan

    def careless(self: Watch, due: Any) -> None:
        torch.rand(1)
        before(self, due)

    monkeypatch.setattr(Watch, "_plan", careless)
    assert both("sgd", tmp_path, measure=("core",))[0] != ""


def test_what_fails_in_watching_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, step: int) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr("parasym.watch.books.Books.after", broken)
    with pytest.warns(RuntimeWarning, match="stops watching; training goes on: ValueError: no such thing") as seen:
        assert both("momentum", tmp_path)[0] == ""
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # even where warnings are errors
        (tmp_path / "again").mkdir()
        assert both("momentum", tmp_path / "again")[0] == ""


# --------------------------------------------------------------------------------------------------------------- the books

SGDS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.1},
    "decay": {"lr": 0.1, "weight_decay": 1e-2},
    "heavy ball": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "dampening": 0.3},
    "nesterov": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True},
    "ascent": {"lr": 0.03, "momentum": 0.5, "maximize": True},
}


def watched(
    folder: Path,
    options: dict[str, Any],
    steps: int,
    act: Callable[[], nn.Module] = nn.ReLU,
    rule: Any = torch.optim.SGD,
    seed: int = 1,
    **more: Any,
) -> tuple[nn.Module, Ledger, Watch]:
    """A float64 run with the watch and the ledger of `laws` on it."""
    model = mlp(seed, act, torch.float64)
    optimizer = rule(model.parameters(), **options)
    charges = charges_of(model)
    ledger = Ledger(optimizer, charges, model)
    settings = {"budget": None, "charges": charges, "measure": ("core",), **more}
    watch = parasym.watch(model, optimizer, path=folder / "run.sqlite", **settings)
    train(model, optimizer, steps, lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7))
    return model, ledger, watch


@pytest.mark.parametrize("name", SGDS)
def test_watched_at_every_step_the_books_are_the_exact_ledger(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, ledger, watch = watched(tmp_path, SGDS[name], 60)
    watch.close()
    for account, (label, where) in zip(ledger.accounts(), (("first", "0"), ("second", "2")), strict=True):
        assert account.exact and account.residual <= 1e-12
        seen = series(tmp_path / "run.sqlite", label, where)
        assert len(seen.step) == 60 and set(seen.status) == {"ok"}
        np.testing.assert_allclose(seen.value, account.measured.mean(1)[1:], rtol=0, atol=1e-12)
        np.testing.assert_allclose(seen.predicted, account.predicted.mean(1)[1:], rtol=0, atol=1e-12)
        assert series(tmp_path / "run.sqlite", f"{label}: residual of the step", where).value.max() <= 1e-12
        assert float((account.measured[-1] - account.measured[0]).abs().max()) > 1e-3  # something was there to predict


def test_groups_with_rates_of_their_own_conserve_a_weighted_charge(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp(1, dtype=torch.float64)
    p = list(model.parameters())
    optimizer = torch.optim.SGD([{"params": p[:2], "lr": 0.02}, {"params": p[2:]}], lr=0.1, momentum=0.8)
    with parasym.watch(model, optimizer, path=tmp_path / "run.sqlite", budget=None, charges=charges_of(model), measure=("core",)):
        train(model, optimizer, 40)
    seen = series(tmp_path / "run.sqlite", "first", "0")
    np.testing.assert_allclose(seen.value, seen.predicted, rtol=0, atol=1e-12)
    assert "weighted by the inverse learning rates" in seen.note[-1] and abs(seen.value[-1] - seen.value[0]) > 1e-3


def test_a_charge_the_network_does_not_conserve_is_told(tmp_path: Path) -> None:
    """Control: a tanh network has no rescaling."""
    torch.manual_seed(0)
    _, _, watch = watched(tmp_path, SGDS["plain"], 10, nn.Tanh)
    watch.close()
    residual = series(tmp_path / "run.sqlite", "first: residual of the step", "0")
    assert set(residual.status) == {"violated"} and residual.value.min() > 1e-6
    with Record.open(tmp_path / "run.sqlite") as record:
        assert [a.where for a in record.alerts() if "more than its law" in a.message] == ["0", "2"]


@pytest.mark.parametrize("rule", [torch.optim.Adam, torch.optim.AdamW])
def test_the_law_that_holds_under_any_rule(rule: Any, tmp_path: Path) -> None:
    """The gradient is orthogonal to the orbit, whatever the optimiser makes of it; in a tanh network it is not."""
    for act, status in ((nn.ReLU, {"ok"}), (nn.Tanh, {"violated"})):
        _, _, watch = watched(tmp_path / act.__name__, {"lr": 1e-2}, 5, act, rule)
        watch.close()
        seen = series(tmp_path / act.__name__ / "run.sqlite", "first: gradient along the orbit", "0")
        assert set(seen.status) == status and (seen.value.max() <= 1e-14) == (act is nn.ReLU)


def line_searches(path: Path, act: Callable[[], nn.Module], search: str | None) -> None:
    """Three watched steps of a rule that calls its closure several times."""
    model = mlp(0, act, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=search)
    x, y = data(torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        (loss := F.cross_entropy(model(x), y)).backward()
        return loss

    with parasym.watch(model, optimizer, path=path, budget=None, measure=("core",), charges=charges_of(model)) as watch:
        for _ in range(3):
            optimizer.step(closure)
    assert not watch._silent


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_rule_that_calls_its_closure_again_is_held_to_that_law_too(search: str | None, tmp_path: Path) -> None:
    for act, status in ((nn.ReLU, {"ok"}), (nn.Tanh, {"violated"})):  # in a tanh network the charges are false
        path = tmp_path / act.__name__ / "run.sqlite"
        line_searches(path, act, search)
        seen = series(path, "first: gradient along the orbit", "0")
        assert len(seen.step) == 3 and set(seen.status) == status and (seen.value.max() <= 1e-14) == (act is nn.ReLU)
        with Record.open(path) as record:
            assert all(c["violated"] == (act is nn.Tanh) for c in summary(record)["charges"])


@pytest.mark.parametrize("rule", [torch.optim.Adam, torch.optim.AdamW])
def test_another_rule_is_measured_with_its_cross_term(rule: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, ledger, watch = watched(tmp_path, {"lr": 1e-2, "weight_decay": 1e-2}, 30, rule=rule)
    watch.close()
    seen = series(tmp_path / "run.sqlite", "first", "0")
    account = ledger.accounts()[0]
    assert not account.exact and set(seen.status) == {"not_applicable"} and "cross term is measured" in seen.note[0]
    np.testing.assert_allclose(seen.predicted, account.predicted.mean(1)[1:], rtol=0, atol=1e-12)
    assert set(series(tmp_path / "run.sqlite", "first: gradient along the orbit", "0").status) == {"ok"}  # the law that is left


def scores(folder: Path, name: str, seeds: int) -> list[float]:
    """(measured - predicted) / standard error at the end of runs of 240 steps of which every 8th was observed."""
    out = []
    for seed in range(seeds):
        _, _, watch = watched(folder / str(seed), SGDS[name], 240, seed=seed, every=8)
        watch.close()
        for label, where in (("first", "0"), ("second", "2")):
            seen = series(folder / str(seed) / "run.sqlite", label, where)
            assert len(seen.step) == 31
            out.append(float((seen.value[-1] - seen.predicted[-1]) / seen.stderr[-1]))
    return out


@pytest.mark.parametrize("name", ["plain", "heavy ball"])
def test_between_observed_steps_the_prediction_keeps_its_error_bar(name: str, tmp_path: Path) -> None:
    found = scores(tmp_path, name, 4)
    assert 0.1 < float(np.sqrt(np.mean(np.square(found)))) < 2.5 and max(map(abs, found)) < 5, found  # with momentum it is cautious


def errors(folder: Path, measure: tuple[str, ...], seed: int) -> list[float]:
    """Errors at the end of a run that is looked at every 40th step, and glanced at every 4th where it is asked for."""
    every = {"core": 40, "drift": 4}
    _, _, watch = watched(folder, {"lr": 3e-3}, 130, rule=torch.optim.AdamW, seed=seed, every=every, measure=measure)
    watch.close()
    found = []
    for label, where in (("first", "0"), ("second", "2")):
        seen = series(folder / "run.sqlite", f"{label}: prediction error", where)
        assert list(seen.step) == [1, 40, 80, 120, 130]  # and once more at the end
        found.append(float(seen.value[-1]))
    return found


def test_glances_between_looks_tell_what_the_charges_did(tmp_path: Path) -> None:
    with_, without = [], []
    for seed in range(3):
        with_ += errors(tmp_path / f"{seed} glances", ("core", "drift"), seed)
        without += errors(tmp_path / f"{seed} looks", ("core",), seed)
    assert float(np.median(with_)) < 0.2 and float(np.median(without)) > 2 * float(np.median(with_)), (with_, without)


def test_a_prediction_without_the_size_of_the_step_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the source taken with the wrong sign is far outside of the error bar."""
    law = Books._law

    def wrong(self: Books, book: Any, *given: Any) -> None:
        law(self, book, *given)
        book.parts["source"] = -book.parts["source"]

    monkeypatch.setattr(Books, "_law", wrong)
    assert float(np.sqrt(np.mean(np.square(scores(tmp_path, "plain", 2))))) > 6


def test_the_search_finds_what_the_hand_writes_and_tells_what_it_cost(tmp_path: Path) -> None:
    model = mlp(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with parasym.watch(model, optimizer, path=tmp_path / "run.sqlite", budget=None, measure=("core",)) as watch:
        train(model, optimizer, 4)
        assert watch.found is not None and {c.parameters for c in watch.found.charges} == {c.parameters for c in charges_of(model)}
    with Record.open(tmp_path / "run.sqlite") as record:
        assert record.meta["set-up seconds"]["finding symmetries"] > 0 and len(record.meta["charges"]) == 2
        assert not model._forward_pre_hooks and not optimizer._optimizer_step_pre_hooks  # nothing is left behind


def test_a_scale_invariant_group_has_an_effective_learning_rate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, eps=1e-30), nn.ReLU(), nn.Linear(8, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    charge = scale(dict(model.named_parameters()), ["0.weight"])
    with parasym.watch(model, optimizer, path=tmp_path / "run.sqlite", budget=None, charges=[charge], measure=("core",)):
        train(model, optimizer, 5)
    rate = series(tmp_path / "run.sqlite", "effective learning rate", "0.weight").value[-1]
    assert rate == pytest.approx(float((0.1 / model[0].weight.detach().square().sum(1)).median()), rel=1e-12)


# -------------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("costs", [{"core": 0.3}, {"core": 0.02, "collapse": 8.0}, {"core": 2.0, "noise": 0.1, "sharpness": 40.0}])
def test_measurements_thin_out_to_stay_inside_the_budget(costs: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one second on a clock of ours; each measurement takes what it takes."""
    now = [0.0]
    monkeypatch.setattr("parasym.watch.budget.perf_counter", lambda: now[0])
    budget = Budget(0.05, {n: Meter(observer._SHARES[n], 1, observer._PRIORS[n]) for n in costs})
    for m in budget.meters.values():
        m.next = 3 if m.prior else 1
    steps, worst = 20_000, 0.0
    for step in range(1, steps + 1):
        with budget.hook():
            due = [n for n, m in budget.meters.items() if m.next <= step]
        now[0] += 5.0 if step % 500 == 0 else 1.0  # an evaluation now and then
        with budget.hook(ends_step=True):
            for n in due:
                with budget.measuring(n):
                    now[0] += costs[n]
                budget.finished(n, step)
            if due:
                budget.plan(step)
        if step > 4000:
            worst = max(worst, budget.overhead)
    assert worst <= 0.052 and budget.overhead >= 0.03  # used, and not overrun
    assert all(m.times >= 2 for m in budget.meters.values())


def test_one_off_work_is_reported_and_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("parasym.watch.budget.perf_counter", lambda: now[0])
    budget = Budget(0.05, {"core": Meter(1.0)})
    for _ in range(10):
        now[0] += 1.0
        with budget.hook(ends_step=True), budget.measuring("core"), budget.setting_up("search"):
            now[0] += 50.0
    assert budget.once == {"search": 500.0} and budget.hooks == 0.0 and budget.meters["core"].spent == 0.0
    assert budget.steps == pytest.approx(9.0) and budget.step_time == pytest.approx(1.0)


# --------------------------------------------------------------------------------------------------------------------- noise


def gaussian(scale: float, generator: torch.Generator, mean: Tensor) -> Tensor:
    return mean + scale * torch.randn(mean.shape, generator=generator, dtype=torch.float64)


def test_noise_of_pairs_and_of_micro_batches() -> None:
    """Gradients of known mean and covariance: both estimators find tr Sigma and the scale within their standard errors."""
    g, mean = torch.Generator().manual_seed(0), 0.5 * torch.ones(200, dtype=torch.float64)
    p = nn.Parameter(torch.zeros(200, dtype=torch.float64))
    trace, square = 200 * 0.3**2, float(mean.square().sum())
    pairs = PairNoise(lambda parts: float(sum(parts)))
    for _ in range(40):
        p.grad = gaussian(0.3, g, mean)
        pairs.keep([p])
        p.grad = gaussian(0.3, g, mean)
        found = pairs.compare([p])
    micro = MicroNoise()
    for _ in range(40):
        micro.arm([p])
        p.grad = None
        for _ in range(4):
            (p * gaussian(0.3, g, mean)).sum().div(4).mul(1024.0).backward()  # a mean of four, under a loss scale
        assert p.grad is not None
        small = micro.read(float((p.grad / 1024).square().sum()))
    for rows_of, unit in ((found, "batches"), (small, "micro-batches")):
        by = {r.name: r for r in rows_of}
        for name, exact in ((f"trace of the gradient covariance ({unit})", trace), (f"gradient noise scale ({unit})", trace / square)):
            row = by[name]
            assert row.status == "ok" and row.stderr is not None and 0 < row.stderr < 0.1 * exact
            assert abs(row.value - exact) < 5 * row.stderr, row
    assert not p._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def test_accumulated_steps_show_their_micro_batches(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with parasym.watch(model, optimizer, path=tmp_path / "run.sqlite", budget=None, charges=(), args=(data()[0][:4],), measure=("noise",)):
        accumulated(model, optimizer)
        accumulated(model, optimizer)
    seen = rows(tmp_path / "run.sqlite", "noise")["name"]
    assert "trace of the gradient covariance (micro-batches)" in seen and "trace of the gradient covariance (batches)" in seen
    whole = series(tmp_path / "run.sqlite", "trace of the gradient covariance (batches)").value[-1]
    part = series(tmp_path / "run.sqlite", "trace of the gradient covariance (micro-batches)").value[-1]
    assert 1 < part / whole < 9  # three micro-batches a batch: three times the covariance, from few pairs


# ------------------------------------------------------------------------------------------------------- what goes wrong


def test_steps_that_a_loss_scaler_skips_are_no_steps(tmp_path: Path) -> None:
    x, y = data()
    for fused in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        path = tmp_path / f"{fused}.sqlite"
        with parasym.watch(model, optimizer, path=path, budget=None, charges=charges_of(model), args=(x[:4],), measure=("core",)) as watch:
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            for k in range(6):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                scaler.scale(loss * math.inf if k in (2, 3) else loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert watch.step == 4
        seen = series(path, "first", "0")
        assert seen.step.tolist() == [1, 2, 3, 4] and set(seen.status) == {"ok"}  # the fused rule's gradients are unscaled for its law
        np.testing.assert_allclose(seen.value, seen.predicted, atol=1e-6)
        assert series(path, "gradient norm").value.max() < 10  # not times 2^10


def test_weights_that_are_not_finite_are_told_and_training_goes_on(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with parasym.watch(model, optimizer, path=tmp_path / "run.sqlite", budget=None, charges=charges_of(model)) as watch:
            train(model, optimizer, 3)
            kept = copy.deepcopy(model.state_dict())
            with torch.no_grad():
                model[0].weight[0, 0] = math.nan
            train(model, optimizer, 3)
            model.load_state_dict(kept)
            train(model, optimizer, 3)
    seen = series(tmp_path / "run.sqlite", "first", "0")
    assert watch.step == 9 and [s == "ok" for s in seen.status] == [True] * 3 + [False] * 3 + [True] * 3
    np.testing.assert_allclose(seen.value[6:], seen.predicted[6:], atol=1e-6)  # the books are opened anew
    with Record.open(tmp_path / "run.sqlite") as record:
        assert [(a.step, a.severity) for a in record.alerts() if a.kind == "nan"] == [(4, "high")]


def test_frozen_parameters_leave_the_orbit(tmp_path: Path) -> None:
    model = mlp()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    x, y = data()
    settings: dict[str, Any] = {"budget": None, "batch": (x[:16], y[:16]), "charges": charges_of(model)}
    with parasym.watch(model, optimizer, F.cross_entropy, path=tmp_path / "run.sqlite", **settings):
        train(model, optimizer, 4)
    notes = rows(tmp_path / "run.sqlite", "charge")["note"]
    assert any("2.weight is frozen or not in the optimiser" in n for n in notes)
    assert "sharpness" in rows(tmp_path / "run.sqlite")["kind"]


def test_losses_and_layers_without_single_samples_are_stated(tmp_path: Path) -> None:
    """A loss that is a sum, and batch norm in train mode: no per-sample noise, said so once, and the noise of pairs goes on."""
    x, y = data()
    for name, build, loss_fn in (
        ("sum", mlp, lambda out, target: F.cross_entropy(out, target, reduction="sum")),
        ("norm", Norms, F.cross_entropy),
    ):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        path = tmp_path / f"{name}.sqlite"
        with parasym.watch(
            model, optimizer, loss_fn, batch=(x[:16], y[:16]), path=path, budget=None, charges=(), measure=("samples", "noise")
        ):
            train(model, optimizer, 5)
        seen = series(path, "gradient noise scale (samples)")
        assert seen.status == ("not_applicable",) and ("sum over the 16" in seen.note[0] or "batch statistics" in seen.note[0])
        assert len(series(path, "trace of the gradient covariance (batches)").step) >= 3
        with Record.open(path) as record:
            assert any("samples is not measured" in a.message for a in record.alerts())


def test_a_disk_that_fills_up_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(self: Record, step: int, rows: Any, time: float | None = None) -> None:
        written.append(step)
        raise RecordError("run.sqlite cannot be written: the disk is full")

    monkeypatch.setattr(Record, "write", full)
    with pytest.warns(RuntimeWarning, match="the record is no longer written.*disk is full") as seen:
        assert both("sgd", tmp_path)[0] == ""
    assert len(seen) == 1 and written == [1]


def test_a_model_compiled_in_place_asks_for_arguments(tmp_path: Path) -> None:
    """Hooks of a compiled module are not called: the watcher notices, says so, and watches what it can."""
    x, _ = data()
    for args in (None, (x[:8],)):
        model = mlp()
        model.compile(backend="eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        path = tmp_path / f"{args is None}.sqlite"
        with parasym.watch(model, optimizer, path=path, budget=None, args=args, measure=("core",)):
            train(model, optimizer, 3)
        with Record.open(path) as record:
            asked = [a.remedy for a in record.alerts() if "no batch was seen" in a.message]
        assert ("charge" in rows(path)["kind"]) == (args is not None) and bool(asked) == (args is None)
        assert len(series(path, "weight norm").step) == 3


def test_a_copy_of_the_model_is_not_watched(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with parasym.watch(model, optimizer, path=tmp_path / "run.sqlite") as watch:
        average = copy.deepcopy(model)
        average(data()[0])
        torch.save(model, tmp_path / "model.pt")
        assert watch._captured is None
        model(data()[0])
        assert watch._captured is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0.0}, "budget"),
        ({"every": 0}, "every"),
        ({"every": {"charges": 3}}, "Unknown measurement 'charges'"),
        ({"measure": ("loss",)}, "Unknown measurement 'loss'"),
        ({"loss_fn": 3}, "loss_fn"),
        ({"step": -1}, "step"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)}, "holds none of the model's parameters"),
        ({"optimizer": 3}, "torch.optim.Optimizer"),
        ({"model": 3}, "torch.nn.Module"),
    ],
)
def test_bad_options_are_refused_at_the_start(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = mlp()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "path": tmp_path / "run.sqlite", **options}
    with pytest.raises(InputError, match=message):
        parasym.watch(**given)
    assert not (tmp_path / "run.sqlite").exists()


def test_units_that_collapse_during_the_run_are_told(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with parasym.watch(model, optimizer, path=tmp_path / "run.sqlite", budget=None, measure=("collapse",)):
        train(model, optimizer, 3)
        with torch.no_grad():
            model[0].weight[:5] = 0
            model[0].bias[:5] = -1
        train(model, optimizer, 3)
    with Record.open(tmp_path / "run.sqlite") as record:
        told = [a for a in record.alerts() if a.kind == "collapse"]
        before = [a for a in told if a.step <= 3]
        (after,) = [a for a in told if a.step == 4 and a.where == "0"]
    assert after.severity == "high" and "of units entered a collapsed set (dead) at step 4" in after.message
    assert ("parasym.methods.syre" in after.remedy and "42%" in after.message) or any(a.where == "0" for a in before)
    assert series(tmp_path / "run.sqlite", "dead", "0").value[-1] >= 5 / 12 - 1e-9


# --------------------------------------------------------------------------------------------------------- going on, and ending


def test_a_resumed_run_goes_on_with_its_books(tmp_path: Path) -> None:
    """Stopped and continued through state dicts, the record holds what one run would have written."""

    def start(path: Path, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Watch]:
        model = mlp(dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        settings = {"budget": None, "every": 3, "charges": charges_of(model), "measure": ("core",), **options}
        return model, optimizer, parasym.watch(model, optimizer, path=path, **settings)

    model, optimizer, watch = start(tmp_path / "whole.sqlite")
    torch.manual_seed(1)
    train(model, optimizer, 40)
    watch.close()
    model, optimizer, watch = start(tmp_path / "parts.sqlite")
    torch.manual_seed(1)
    train(model, optimizer, 20)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), watch.state_dict(), torch.get_rng_state()))
    torch.save(kept[2], tmp_path / "watch.pt")
    train(model, optimizer, 7)  # lost with the process: killed after step 27, resumed from the checkpoint of step 20
    watch.close(None)
    model, optimizer, watch = start(tmp_path / "parts.sqlite", resume=True, step=20)
    model.load_state_dict(kept[0]), optimizer.load_state_dict(kept[1])
    watch.load_state_dict(torch.load(tmp_path / "watch.pt", weights_only=True))
    torch.set_rng_state(kept[3])
    train(model, optimizer, 20)
    watch.close()
    for label, where in (("first", "0"), ("second", "2")):
        one, two = (series(tmp_path / f"{n}.sqlite", label, where) for n in ("whole", "parts"))
        assert one.step.tolist() == two.step.tolist()
        np.testing.assert_allclose(one.value, two.value, rtol=0, atol=1e-13)
        np.testing.assert_allclose(one.predicted, two.predicted, rtol=0, atol=1e-13)
        np.testing.assert_allclose(one.stderr[1:], two.stderr[1:], rtol=1e-9)
    with pytest.raises(InputError, match="not the state of a watch"):
        watch.load_state_dict({"step": 3})


KILLED = """
import sys, torch, torch.nn.functional as F
sys.path.insert(0, {tests!r})
import parasym
from test_watch import charges_of, draw, data, mlp
model = mlp()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
watch = parasym.watch(model, optimizer, path={path!r}, budget=None, charges=charges_of(model), measure=("core", "noise"))
x, y = data()
print("ready", flush=True)
while True:
    optimizer.zero_grad()
    a, b = draw(x, y)
    F.cross_entropy(model(a), b).backward()
    optimizer.step()
    print(watch.step, flush=True)
"""


def test_a_killed_run_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    """kill -9 at a random step: every step the process said it had finished is in the record, whole, and the run can be resumed."""
    rng = random.Random()
    for trial in range(2):
        path = tmp_path / f"{trial}.sqlite"
        code = KILLED.format(tests=str(Path(__file__).parent), path=str(path))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        target, last = rng.randint(3, 60), 0
        for line in process.stdout:
            last = int(line) if line.strip().isdigit() else last
            if last >= target:
                time.sleep(rng.random() * 5e-3)
                break
        process.send_signal(signal.SIGKILL)
        rest = [int(x) for x in process.stdout.read().split() if x.isdigit()]
        process.wait()
        last = max([last, *rest])
        with Record.open(path) as record:
            seen = record.series("first", "0")
            assert record.last_step is not None and record.last_step in (last, last + 1)
            assert seen.step.tolist() == list(range(1, record.last_step + 1))
            steps = record.table()["step"]
            each = [steps.count(s) for s in range(2, last + 1)]
            assert len(set(each)) <= 2 and record.segments[-1].ended is None  # no half-written step
        np.testing.assert_allclose(seen.value, seen.predicted, atol=1e-5)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with parasym.watch(model, optimizer, path=path, resume=True, step=last, budget=None, charges=charges_of(model), measure=("core",)):
            train(model, optimizer, 2)
        with Record.open(path) as record:
            assert record.series("first", "0").step.tolist() == [*range(1, last + 3)]


def test_the_package_is_the_function() -> None:
    import parasym.watch.record

    assert callable(parasym.watch) and "Observe a training run" in (parasym.watch.watch.__doc__ or "")


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
def test_a_compiled_run_is_not_changed(given: bool, tmp_path: Path) -> None:
    """Compiled by the default back end before it is watched; the batch comes from the first call, or is given."""
    options: dict[str, Any] = {} if given else {"batch": None, "measure": ("core", "noise", "collapse")}
    difference, path = both("norms compiled", tmp_path, torch.compile, **options)
    assert difference == ""
    seen = rows(path)
    assert "charge" in seen["kind"] and max(seen["step"]) == 9 and ("sharpness" in seen["kind"]) == given


@pytest.mark.slow
def test_units_that_a_twin_does_not_read_do_not_end_the_search(tmp_path: Path) -> None:
    """A CNN of which a draw of the twin has vectors nothing reads: the rescalings are found all the same."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 1, 28, 28), torch.randint(10, (32,))
    layers = [nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with parasym.watch(model, optimizer, F.cross_entropy, batch=(x, y), path=tmp_path / "run.sqlite", measure=("core",)) as watch:
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert watch.found is not None and len(watch.found.charges) == 3
