"""What ordinary runs do to a watcher: errors of its own, odd values, warm-up from zero, resumption, ranks that run out of data."""

from __future__ import annotations

import copy
import os
import sqlite3
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import parasym
from parasym.core.errors import InputError, RecordError
from parasym.laws.charges import rescale
from parasym.watch.budget import Budget
from parasym.watch.noise import MicroNoise
from parasym.watch.record import Record, Row
from parasym.watch.summary import summary


def net(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), act(), nn.Linear(8, 6), act(), nn.Linear(6, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    g = torch.Generator().manual_seed(i)
    x, y = (torch.randn(16, n, generator=g).to(next(model.parameters()).dtype) for n in (5, 3))
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


_P = dict(net().named_parameters())
CHARGES = [rescale(_P, ["0.weight", "0.bias"], ["2.weight"], "first"), rescale(_P, ["2.weight", "2.bias"], ["4.weight"], "second")]


def watch(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path | None, **options: Any) -> parasym.watch.Watch:
    return parasym.watch(model, optimizer, path=path, **{"budget": None, "measure": ("core",), "charges": CHARGES, **options})


def told(path: Path) -> dict[str, Any]:
    with Record.open(path) as record:
        return summary(record)


@pytest.fixture(autouse=True)
def no_search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The charges are given: the search adds seconds and nothing that is tested here."""
    if "inference" not in request.node.name:
        monkeypatch.setattr(parasym.watch.Watch, "_search", lambda self, call: None)


# -- ranks -----------------------------------------------------------------------------------------------------------------------------


def ranks(rank: int, folder: str, case: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    plain = net()
    model = nn.parallel.DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run = watch(model, optimizer, Path(folder) / "run.sqlite" if not rank else None)
    if case == "join":
        with model.join():
            for i in range(5 if not rank else 2):
                step(model, optimizer, 2 * i + rank)
    else:
        if case == "plan" and not rank:
            run.budget.plan = lambda step: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        for i in range(3):
            if case == "log":
                run.log(loss=torch.ones(4))
            step(model, optimizer, 2 * i + rank)
        assert run._silent == (case == "plan")
    run.close()
    dist.destroy_process_group()


@pytest.mark.parametrize("case", ["log", "plan", "join"])
def test_ranks_train_on_whatever_the_watcher_meets(case: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(ranks, (str(tmp_path), case), nprocs=2)
    found = told(tmp_path / "run.sqlite")
    kinds = [a["kind"] for a in found["alerts"]]
    assert {"log": "log" in kinds, "plan": "failed" in kinds, "join": not kinds}[case]
    assert found["last_step"] == (None if case == "plan" else 5 if case == "join" else 3)


# -- predictions -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [31, 34])
def test_a_resumed_run_loses_no_step_of_its_prediction(at: int, tmp_path: Path) -> None:
    def part(path: Path, stop: int | None) -> dict[str, Any]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=0.01)
        run = watch(model, optimizer, path, every=10)
        for i in range(60):
            if i == stop:
                state = run.state_dict()
                run.close()
                run = watch(model, optimizer, path, every=10, resume=True, step=i)
                run.load_state_dict(state)
            step(model, optimizer, i)
        run.close()
        return told(path)

    whole, resumed = part(tmp_path / "a.sqlite", None), part(tmp_path / "b.sqlite", at)
    for a, b in zip(whole["charges"], resumed["charges"], strict=True):
        assert b["predicted"] == pytest.approx(a["predicted"], rel=1e-12)


def test_an_observed_step_without_a_rate_says_nothing_of_the_gap(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.05)
    with watch(model, optimizer, tmp_path / "run.sqlite", every=20):
        for i in range(20):
            if i == 1:
                optimizer.param_groups[0]["lr"] = 0.05
            step(model, optimizer, i)
    for c in told(tmp_path / "run.sqlite")["charges"]:
        assert abs(c["predicted"] - c["first"]) > 0.8 * abs(c["last"] - c["first"])  # half of it, when the zero counts as a rate


@pytest.mark.parametrize("scheduled", [True, False])
def test_groups_that_warm_up_from_zero_get_their_metric(scheduled: bool, tmp_path: Path) -> None:
    """In float64: the charges move by 1e-5 of their size of 0.3, and the rounding of float32 weights alone is 4e-3 of that."""
    model = net().double()
    groups = [{"params": list(model[0].parameters()), "lr": 0.05}, {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.02}]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, s / 5))
    if not scheduled:
        for g in optimizer.param_groups:
            del g["initial_lr"]
    with watch(model, optimizer, tmp_path / "run.sqlite"):
        for i in range(10):
            if scheduled:
                step(model, optimizer, i)
                schedule.step()
            else:
                for g, lr in zip(optimizer.param_groups, (0.05, 0.02), strict=True):
                    g["lr"] = lr * min(1, i / 5)
                step(model, optimizer, i)
    charges = told(tmp_path / "run.sqlite")["charges"]
    assert len(charges) == 2 and {c["status"] for c in charges} == {"ok"}
    assert max(c["error"] for c in charges) < 1e-9 and min(c["moved"] for c in charges) > 1e-6
    assert sum("weighted" in c["note"] for c in charges) == 1


def test_a_charge_without_law_or_gap_is_not_called_confirmed(tmp_path: Path) -> None:
    model = net(nn.Tanh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with watch(model, optimizer, tmp_path / "run.sqlite"):
        for i in range(6):
            step(model, optimizer, i)
    found = told(tmp_path / "run.sqlite")
    assert all(c["follows"] is None and c["violated"] for c in found["charges"])
    assert not found["verdict"]["good"]


# -- failures --------------------------------------------------------------------------------------------------------------------------


def test_a_failure_is_in_the_record_at_once_and_in_the_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run = watch(model, optimizer, tmp_path / "run.sqlite", measure=("core", "noise"), budget=0.05)
    step(model, optimizer, 0)
    monkeypatch.setattr(run, "_norms", lambda: 1 / 0)
    run.budget.meters["core"].next = 2
    with pytest.warns(RuntimeWarning, match="stops watching"):
        step(model, optimizer, 1)
    found = told(tmp_path / "run.sqlite")  # before it is closed
    assert "ZeroDivisionError" in found["verdict"]["sentence"] and not found["verdict"]["good"]
    run.close()
    assert not any("was not measured" in a["message"] for a in told(tmp_path / "run.sqlite")["alerts"])


def test_planning_that_fails_between_observations_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer, tmp_path / "run.sqlite", every=100) as run:
        for i in range(7):
            step(model, optimizer, i)
        monkeypatch.setattr(Budget, "plan", lambda self, step: 1 / 0)
        with pytest.warns(RuntimeWarning, match="failed planning"):
            step(model, optimizer, 7)
        assert run._silent


def test_a_batch_that_cannot_be_copied_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parasym.watch.observer.few", lambda *a: 1 / 0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with watch(model, optimizer, tmp_path / "run.sqlite") as run:
            for i in range(3):
                step(model, optimizer, i)
            monkeypatch.setattr(run, "_norms", lambda: 1 / 0)
            step(model, optimizer, 3)
    texts = [str(w.message) for w in heard if "parasym.watch" in str(w.message)]
    assert len(texts) == 2 and "stops watching" not in texts[0] and "stops watching" in texts[1]
    assert told(tmp_path / "run.sqlite")["last_step"] == 3


# -- ordinary conditions -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "abc", torch.ones(4)])
def test_a_logged_value_that_is_no_number_is_left_out(value: Any, tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer, tmp_path / "run.sqlite") as run:
        for i in range(3):
            run.log(loss=1.0, odd=value)
            step(model, optimizer, i)
    found = told(tmp_path / "run.sqlite")
    assert [a["kind"] for a in found["alerts"]] == ["log"] and found["last_step"] == 3
    assert [item["name"] for item in found["loss"]] == ["loss"]


class Rateless(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": None, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for g in self.param_groups:
            for p in g["params"]:
                p.sub_(p.grad, alpha=0.01)


def test_an_optimiser_without_a_stated_rate_is_watched(tmp_path: Path) -> None:
    model = net()
    optimizer = Rateless(model.parameters())
    with watch(model, optimizer, tmp_path / "run.sqlite", every=4):
        for i in range(12):
            step(model, optimizer, i)
    found = told(tmp_path / "run.sqlite")
    assert found["last_step"] == 12 and not found["alerts"]
    assert all("states no learning rate" in c["note"] for c in found["charges"])
    assert not [item for item in found["rate"] if item["name"] == "learning rate"]


def test_a_group_may_join_during_the_run(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.05)
    with watch(model, optimizer, tmp_path / "run.sqlite", every=3, measure=("core", "noise")) as run:
        for i in range(4):
            step(model, optimizer, i)
        optimizer.add_param_group({"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.01})
        for i in range(4, 9):
            step(model, optimizer, i)
        assert not run._silent and len(run._trained) == 6
    found = told(tmp_path / "run.sqlite")
    assert found["last_step"] == 9
    assert any("joined the optimiser" in c["note"] for c in found["charges"])


def test_half_and_double_precision_together(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(5, 8).double(), nn.Linear(8, 3).bfloat16()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, optimizer, tmp_path / "run.sqlite", charges=[]):
        for _ in range(2):
            optimizer.zero_grad()
            model[1](model[0](torch.randn(4, 5).double()).bfloat16()).float().square().mean().backward()
            norm = sum(float(p.detach().double().square().sum()) for p in model.parameters()) ** 0.5
            optimizer.step()
    with Record.open(tmp_path / "run.sqlite") as record:
        assert record.series("weight norm").value[-1] == pytest.approx(norm, rel=1e-5)


def test_a_first_call_in_inference_mode_is_a_batch_like_others(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with watch(model, optimizer, tmp_path / "run.sqlite", charges=None, measure=("core", "collapse")) as run:
        with torch.inference_mode():
            model(torch.randn(4, 5))
        assert run._captured is not None and not run._captured[0][0].is_inference()
        for i in range(3):
            step(model, optimizer, i)
    found = told(tmp_path / "run.sqlite")
    assert found["charges"] and found["collapse"] and not [a for a in found["alerts"] if a["kind"] in ("failed", "watch")]


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_were_reset_are_no_micro_batches(to_none: bool) -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], lr=0.1)
    noise = MicroNoise()
    for passes, found in ((1, False), (2, True)):
        noise.arm([p])
        for _ in range(3):
            (p * torch.randn(3)).sum().backward()
        optimizer.zero_grad(set_to_none=to_none)  # another model's step went before
        for _ in range(passes):
            (p * torch.randn(3)).sum().backward()
        assert p.grad is not None
        assert bool(noise.read(float(p.grad.square().sum()))) == found
        assert not found or set(noise._count.values()) == {2}
        optimizer.zero_grad(set_to_none=to_none)


# -- sinks and records -------------------------------------------------------------------------------------------------------------------


class Broken:
    def begin(self, *_: Any) -> None: ...

    def write(self, *_: Any) -> None:
        raise OSError("no network")

    def alert(self, *_: Any) -> None: ...

    def close(self) -> None: ...


def test_an_unknown_sink_leaves_no_record(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(InputError, match="tensorbord"):
        watch(model, optimizer, tmp_path / "run.sqlite", sinks=["tensorbord"])
    assert not (tmp_path / "run.sqlite").exists()


def test_a_broken_sink_ends_nothing_where_warnings_are_errors(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch(model, optimizer, tmp_path / "run.sqlite", sinks=[Broken()]) as run:
            for i in range(3):
                step(model, optimizer, i)
                while i == 0 and run.sinks.alive:
                    pass
            assert not run._silent
    assert told(tmp_path / "run.sqlite")["last_step"] == 3


@pytest.mark.parametrize("damage", ["UPDATE meta SET value = '{oops'", "DELETE FROM segments"])
def test_a_damaged_record_is_a_record_error(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with Record.create(path, {"model": "m"}) as record:
        record.write(1, [Row("loss", "", "loss", 1.0)])
    with sqlite3.connect(path) as connection:
        connection.execute(damage)
    connection.close()
    with pytest.raises(RecordError, match="damaged"), Record.open(copy.copy(path)) as record:
        summary(record)
