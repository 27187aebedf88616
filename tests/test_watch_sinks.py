"""Sinks: what they forward is read back from what they wrote; a failing one is dropped with one warning; the run is not touched."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parasym.watch.sinks as room
from parasym.core.errors import InputError, MissingExtraError
from parasym.watch.record import Alert, Row
from parasym.watch.sinks import MLflow, Sinks, TensorBoard, WandB, numbers

META = {"model": "gpt", "every": 10, "optimizer": {"name": "SGD", "lr": 0.1}}
ALERT = Alert(20, 0.0, "high", "h.0.mlp", "41 % of units are dead", "parasym.methods.revive", "collapse")
STEPS = (0, 10, 20)
TAG = "parasym-charge/h.0.attn/QK [head 0]"
EXPECTED = {
    "parasym-loss/loss": [3.0, 2.0, 1.0],
    TAG: [1.0, 1.5, math.nan],
    f"{TAG}/predicted": [1.25, 1.75, math.inf],
    f"{TAG}/stderr": [0.5, 0.5, 0.5],
}


@pytest.fixture(autouse=True)
def no_trackers_of_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def rows(index: int) -> list[Row]:
    at = {tag: values[index] for tag, values in EXPECTED.items()}
    return [
        Row("loss", "", "loss", at["parasym-loss/loss"]),
        Row("QK [head 0]", "h.0.attn", "charge", at[TAG], at[f"{TAG}/predicted"], at[f"{TAG}/stderr"]),
    ]


def forward(sinks: Sequence[Any], folder: Path, start: int = 0) -> list[str]:
    """A short run through the sinks; what failed. Also: no generator of random numbers moved."""
    torch.manual_seed(0)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    fan = Sinks(sinks, META, folder, start)
    failures = []
    for index, step in enumerate(STEPS):
        failures += fan.write(step + start, rows(index))
    failures += fan.alert(ALERT)
    failures += fan.close()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    return failures


def same(found: dict[str, list[float]]) -> bool:
    return found.keys() == EXPECTED.keys() and all(np.array_equal(found[tag], EXPECTED[tag], equal_nan=True) for tag in EXPECTED)


# -- TensorBoard -------------------------------------------------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}, purge_orphaned_data=True)
    found.Reload()
    return found


def test_tensorboard(tmp_path: Path) -> None:
    assert forward(["tensorboard"], tmp_path) == []
    found = events(tmp_path / "tensorboard")
    assert same({tag: [item.value for item in found.Scalars(tag)] for tag in found.Tags()["scalars"]})
    assert [item.step for item in found.Scalars(TAG)] == list(STEPS)
    (text,) = found.Tensors("parasym/alerts/high/text_summary")
    assert text.step == 20
    assert text.tensor_proto.string_val[0].decode() == "h.0.mlp: 41 % of units are dead (see: parasym.methods.revive)"
    (run,) = found.Tensors("parasym/run/text_summary")
    assert json.loads(run.tensor_proto.string_val[0].decode().strip("`json\n")) == META


def test_tensorboard_of_a_resumed_run_hides_what_was_superseded(tmp_path: Path) -> None:
    forward(["tensorboard"], tmp_path)
    time.sleep(1.1)  # event files are ordered by the second in their name
    forward(["tensorboard"], tmp_path, start=10)
    assert [item.step for item in events(tmp_path / "tensorboard").Scalars(TAG)] == [0, 10, 10, 20, 30]


def test_tensorboard_with_a_writer_of_yours(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "mine"))
    writer.add_scalar("loss/train", 7.0, 0)
    assert forward([TensorBoard(writer=writer)], tmp_path) == []
    writer.add_scalar("loss/train", 6.0, 1)  # not closed
    writer.close()
    assert {"loss/train", *EXPECTED} == set(events(tmp_path / "mine").Tags()["scalars"])
    assert not (tmp_path / "tensorboard").exists()


# -- Weights & Biases --------------------------------------------------------------------------------------------------------------------


def offline_run(folder: Path) -> list[Any]:
    """The records of the one offline run in this folder; its file is written by a process of W&B's, which may lag behind."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for _ in range(200):
        records = list(log_file(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.05)
    raise AssertionError(f"{path} was not finished: {[record.WhichOneof('record_type') for record in records]}")


def log_file(path: Path) -> Iterator[Any]:
    """The protocol buffers in an offline run's file: a header of 7 bytes, then LevelDB's log format (pieces in blocks of 32 kB)."""
    internal = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, position, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        body = data[position + 7 : position + 7 + length]
        parts = body if kind in (1, 2) else parts + body
        position += 7 + length
        if kind in (1, 4):
            record = internal.Record()
            record.ParseFromString(parts)
            yield record


def history(records: Sequence[Any]) -> tuple[list[int], dict[str, list[float]]]:
    lines = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    found: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith("parasym-"):
                found.setdefault(key, []).append(float(value))
    return [line["parasym/step"] for line in lines if "parasym/step" in line], found


def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    assert forward(["wandb"], tmp_path) == []
    assert wandb.run is None  # its own run was finished
    records = offline_run(tmp_path)
    steps, found = history(records)
    assert steps == list(STEPS)
    assert same(found)
    kinds = {record.WhichOneof("record_type") for record in records}
    assert {"run", "history", "metric", "alert", "exit"} <= kinds
    (alert,) = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert alert.level == "ERROR" and "41 % of units" in alert.text
    config = {
        "/".join(item.nested_key) or item.key: item.value_json
        for record in records
        if record.WhichOneof("record_type") in ("config", "run")
        for item in (record.config if record.WhichOneof("record_type") == "config" else record.run.config).update
    }
    assert json.loads(config["parasym"])["optimizer"] == META["optimizer"]


def test_wandb_beside_your_own_logging(tmp_path: Path) -> None:
    """Your run is used and left open, and your step counter keeps its meaning."""
    wandb = pytest.importorskip("wandb")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="mine")
    fan = Sinks([WandB()], META, tmp_path)
    for index, step in enumerate(STEPS):
        run.log({"mine": float(step), "global_step": step})
        fan.write(step, rows(index))
        while not fan._queue.empty():
            time.sleep(0.01)
    fan.close()
    assert wandb.run is run
    run.log({"mine": 30.0, "global_step": 30})
    run.finish()
    records = offline_run(tmp_path)
    steps, found = history(records)
    assert steps == list(STEPS)
    assert same(found)
    lines = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    mine = [json.loads(item.value_json) for line in lines for item in line.item if "mine" in (item.key, *item.nested_key)]
    assert mine == [0.0, 10.0, 20.0, 30.0]


# -- MLflow ------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MLflow]:
    """A run forwarded to a new database (made once: its migrations take MLflow seconds)."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("mlflow")
    sink = MLflow()
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert forward([sink], folder / "run") == []
    return folder, sink


def metrics(client: Any, run_id: str) -> dict[str, list[float]]:
    names = client.get_run(run_id).data.metrics
    return {name: [item.value for item in sorted(client.get_metric_history(run_id, name), key=lambda item: item.step)] for name in names}


def test_mlflow_database_beside_the_record(finished: tuple[Path, MLflow]) -> None:
    mlflow = pytest.importorskip("mlflow")
    folder, sink = finished
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'run' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "parasym"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == sink.run_id and run.info.status == "FINISHED"
    found = metrics(client, run.info.run_id)
    # MLflow permits no brackets in names, and its database keeps infinity as the largest number
    renamed = {tag.replace("[", "_").replace("]", "_"): values for tag, values in EXPECTED.items()}
    assert found.keys() == renamed.keys()
    for tag, values in renamed.items():
        np.testing.assert_array_equal(found[tag], np.clip(values, -sys.float_info.max, sys.float_info.max))
    assert [item.step for item in client.get_metric_history(run.info.run_id, "parasym-loss/loss")] == list(STEPS)
    assert json.loads(run.data.tags["parasym.optimizer"]) == META["optimizer"]
    (alert,) = [value for tag, value in run.data.tags.items() if tag.startswith("parasym.alert.000000020.")]
    assert alert == "high: h.0.mlp: 41 % of units are dead (see: parasym.methods.revive)"
    assert [path.name for path in folder.iterdir()] == ["run"]  # nothing beside it


def test_mlflow_in_your_own_run(finished: tuple[Path, MLflow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{finished[0] / 'run' / 'mlflow.db'}")
    with mlflow.start_run() as run:
        assert forward(["mlflow"], tmp_path) == []
        assert mlflow.active_run().info.run_id == run.info.run_id  # left open
    assert run.info.run_id != finished[1].run_id
    assert "parasym-loss/loss" in metrics(mlflow.MlflowClient(), run.info.run_id)
    assert list(tmp_path.iterdir()) == []


def test_mlflow_names_that_would_collide_are_told_apart() -> None:
    pytest.importorskip("mlflow")
    sink = MLflow()
    names = [sink._name(tag) for tag in ("a?b", "a_b", "a!b", "x" * 300, "x" * 301)]
    assert len(set(names)) == 5 and all(len(name) <= 250 for name in names)
    assert names == [sink._name(tag) for tag in ("a?b", "a_b", "a!b", "x" * 300, "x" * 301)]


# -- what goes wrong ---------------------------------------------------------------------------------------------------------------------


class Memory:
    """A sink that remembers; fails at the n-th write."""

    def __init__(self, fails_at: int | None = None, where: str = "write", wait: float = 0.0) -> None:
        self.seen: list[tuple[int, Sequence[Row]]] = []
        self.alerts: list[Alert] = []
        self.calls: list[str] = []
        self.fails_at, self.where, self.wait = fails_at, where, wait

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.where and self.fails_at is not None and self.calls.count(name) > self.fails_at:
            raise ConnectionError("tracker is gone")
        time.sleep(self.wait)

    def begin(self, meta: Any, step: int, folder: Path) -> None:
        self._call("begin")
        random.random()
        torch.rand(1)

    def write(self, step: int, rows: Sequence[Row]) -> None:
        self._call("write")
        self.seen.append((step, rows))

    def alert(self, alert: Alert) -> None:
        self._call("alert")
        self.alerts.append(alert)

    def close(self) -> None:
        self._call("close")


def test_a_sink_of_your_own(tmp_path: Path) -> None:
    sink = Memory()
    assert forward([sink], tmp_path) == []
    assert [step for step, _ in sink.seen] == list(STEPS)
    assert sink.seen[1][1] == tuple(rows(1))
    assert sink.alerts == [ALERT]
    assert sink.calls == ["begin", "write", "write", "write", "alert", "close"]


@pytest.mark.parametrize("where", ["begin", "write", "alert", "close"])
def test_a_failing_sink_warns_once_and_is_dropped(tmp_path: Path, where: str) -> None:
    bad, good = Memory(0, where), Memory()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failures = forward([bad, good], tmp_path)
    texts = [str(warning.message) for warning in caught if "sink" in str(warning.message)]
    assert len(texts) == 1 and "Memory failed" in texts[0] and "tracker is gone" in texts[0]
    assert failures == texts or (where == "begin" and failures == [])
    assert bad.calls.count(where) == 1 and bad.calls[-1] == where
    assert good.calls == ["begin", "write", "write", "write", "alert", "close"]


def test_a_slow_sink_does_not_hold_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "QUEUE", 4)
    gate, sink = threading.Event(), Memory()
    monkeypatch.setattr(sink, "write", lambda step, rows: gate.wait(30))
    fan = Sinks([sink], META, tmp_path)
    with pytest.warns(RuntimeWarning, match="slower than the run") as caught:
        failures = [fan.write(step, rows(0)) for step in range(50)]  # would last 50 x 30 s if it waited
    assert len(caught) == 1 and sum(map(len, failures)) == 1
    with pytest.warns(RuntimeWarning, match="did not finish within 0.05 s"):
        fan.close(patience=0.05)
    gate.set()
    assert fan.close() == []


def test_unknown_sinks_and_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no sink 'comet': use one of tensorboard, wandb, mlflow"):
        Sinks(["comet"], META, tmp_path)
    with pytest.raises(InputError, match="is no sink: it lacks begin, write, alert, close"):
        Sinks([object()], META, tmp_path)  # type: ignore[list-item]
    for name, module in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf"pip install 'parasym\[{name}\]'"):
            Sinks([name], META, tmp_path)


def test_no_tracker_is_imported_before_it_is_wanted() -> None:
    code = "import sys, parasym.watch.sinks; print([m for m in ('tensorboard', 'wandb', 'mlflow', 'torchvision') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(Path(room.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_tags_leave_out_what_is_not_there() -> None:
    assert dict(numbers([Row("norm", "", "norm", 2.0), Row("QK", "h.1", "charge", 1.0, predicted=0.5)])) == {
        "parasym-norm/norm": 2.0,
        "parasym-charge/h.1/QK": 1.0,
        "parasym-charge/h.1/QK/predicted": 0.5,
    }
