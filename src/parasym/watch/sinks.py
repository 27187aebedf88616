"""Where a watched run's rows go beside its record: TensorBoard, Weights & Biases, MLflow.

Each is a `Sink` of a few lines; anything with the same four methods is one too. `Sinks` hands rows to them on a thread of its own,
so that a slow tracker never makes training wait, and drops one that fails: the record has everything anyway.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import queue
import re
import threading
import time as clock
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from parasym.core.errors import InputError, MissingExtraError
from parasym.core.guards import rng_state
from parasym.core.results import plain
from parasym.watch.record import Alert, Row

log = logging.getLogger("parasym")

QUEUE = 4096
"""Writes that may wait for slow sinks; what comes after is left out of them, with a warning."""


class Sink(Protocol):
    """A place rows are forwarded to. A method that raises gets the sink dropped, with one warning; training goes on."""

    def begin(self, meta: Mapping[str, Any], step: int, folder: Path) -> None:
        """Take the facts about the run, the step it starts or resumes from (0 for a new run), and a folder for files; called once."""

    def write(self, step: int, rows: Sequence[Row]) -> None:
        """Take the rows of one step."""

    def alert(self, alert: Alert) -> None:
        """Take an alert."""

    def close(self) -> None:
        """Write out what is held back; nothing is called after it."""


class Sinks:
    """All sinks of a run, fed by one thread.

    Args:
        sinks: `Sink` objects, or the names "tensorboard", "wandb", "mlflow" for those with their defaults.
        meta: facts about the run, as in its record.
        folder: where sinks put their files: beside the record.
        step: the step the run starts or resumes from.

    Raises:
        InputError: a name is unknown, or an object is no sink.
        MissingExtraError: the package a sink needs is not installed.
    """

    def __init__(self, sinks: Sequence[Sink | str], meta: Mapping[str, Any], folder: Path, step: int = 0) -> None:
        self._sinks = ready(sinks)
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(QUEUE)
        self._failures: list[str] = []
        self._left_out = 0
        self._thread: threading.Thread | None = None
        with rng_state():  # trackers draw run names from the global generators
            self._tell("begin", plain(meta), step, folder)
        self._warn()
        if self._sinks:
            self._thread = threading.Thread(target=self._work, name="parasym-sinks", daemon=True)
            self._thread.start()

    @property
    def alive(self) -> list[str]:
        """The names of the sinks that have not failed."""
        return [type(sink).__name__ for sink in self._sinks]

    def write(self, step: int, rows: Sequence[Row]) -> list[str]:
        """Forward rows without waiting; returns what has failed since the last call, one sentence each (also warned of)."""
        return self._put("write", step, tuple(rows))

    def alert(self, alert: Alert) -> list[str]:
        """Forward an alert without waiting; returns as `write` does."""
        return self._put("alert", alert)

    def close(self, patience: float = 30.0) -> list[str]:
        """Let the sinks finish, at most ``patience`` seconds; returns as `write` does. Closing twice does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return self._warn()
        deadline = clock.monotonic() + patience
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=patience)
        thread.join(max(0.0, deadline - clock.monotonic()))
        if thread.is_alive():
            self._failures.append(f"Sinks ({', '.join(self.alive)}) did not finish within {patience:g} s; the record has everything.")
        return self._warn()

    def _put(self, method: str, *arguments: Any) -> list[str]:
        if self._thread is not None and self._sinks:
            try:
                self._queue.put_nowait((method, arguments))
            except queue.Full:
                self._left_out += 1
                if self._left_out == 1:
                    names = ", ".join(self.alive)
                    self._failures.append(f"Sinks ({names}) are slower than the run: some rows are left out of them; the record has all.")
        return self._warn()

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            self._tell(task[0], *task[1])
        self._tell("close")

    def _tell(self, method: str, *arguments: Any) -> None:
        for sink in list(self._sinks):
            try:
                getattr(sink, method)(*arguments)
            except Exception as error:
                self._sinks.remove(sink)
                self._failures.append(
                    f"The sink {type(sink).__name__} failed and is no longer written to: {type(error).__name__}: {error}. "
                    "The record has everything."
                )

    def _warn(self) -> list[str]:
        """Warn on the caller's thread, not on the one that feeds the sinks."""
        failures, self._failures = self._failures, []
        for failure in failures:
            try:
                warnings.warn(failure, RuntimeWarning, stacklevel=4)
            except RuntimeWarning:  # warnings are errors here, and no error of a sink may reach the training loop
                log.warning("watch: %s", failure)
        return failures


def numbers(rows: Sequence[Row], prefix: str = "parasym") -> Iterator[tuple[str, float]]:
    """Tag and value of every number of these rows: ``parasym-charge/h.0.attn/QK``, and the same with ``/predicted`` and ``/stderr``."""
    for row in rows:
        tag = "/".join(filter(None, (f"{prefix}-{row.kind}", row.where, row.name)))
        yield tag, row.value
        for extra in ("predicted", "stderr"):
            if (value := getattr(row, extra)) is not None:
                yield f"{tag}/{extra}", value


class TensorBoard:
    """TensorBoard event files.

    Args:
        log_dir: where to; ``tensorboard`` beside the record if None.
        writer: a ``SummaryWriter`` of your own to write with; it is flushed, not closed.

    Raises:
        MissingExtraError: tensorboard is not installed.
    """

    def __init__(self, log_dir: str | Path | None = None, writer: Any = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("the sink 'tensorboard' needs tensorboard: pip install 'parasym[tensorboard]'") from error
        self._make, self._log_dir, self._writer, self._own = SummaryWriter, log_dir, writer, writer is None

    def begin(self, meta: Mapping[str, Any], step: int, folder: Path) -> None:
        """Open the event file; a resumed run hides what older files hold beyond its checkpoint."""
        if self._own:
            where = str(self._log_dir or folder / "tensorboard")
            self._writer = self._make(where, purge_step=step + 1 if step else None)
        self._writer.add_text("parasym/run", f"```json\n{json.dumps(meta, indent=1)}\n```", step)

    def write(self, step: int, rows: Sequence[Row]) -> None:
        """Add a scalar for each number."""
        for tag, value in numbers(rows):
            self._writer.add_scalar(tag, value, step)

    def alert(self, alert: Alert) -> None:
        """Add the alert as text."""
        self._writer.add_text(f"parasym/alerts/{alert.severity}", _sentence(alert), alert.step)

    def close(self) -> None:
        """Write out and close."""
        self._writer.flush()
        if self._own:
            self._writer.close()


class WandB:
    """Weights & Biases: the run that is active, or else a new one.

    Rows are logged against ``parasym/step``, so that they neither need nor disturb the step counter of your own logging.

    Args:
        run: the run to log to; if None, ``wandb.run``, or else a run made with ``settings``, which is finished at the end.
        **settings: for ``wandb.init``; unless they say otherwise the project is "parasym" and the run is offline, beside the record:
            nothing leaves the machine until ``wandb sync``.

    Raises:
        MissingExtraError: wandb is not installed.
    """

    def __init__(self, run: Any = None, **settings: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("the sink 'wandb' needs wandb: pip install 'parasym[wandb]'") from error
        self._wandb, self._run, self._settings, self._own = wandb, run, settings, False

    def begin(self, meta: Mapping[str, Any], step: int, folder: Path) -> None:
        """Find or make the run, and put the facts into its config."""
        self._run = self._run or self._wandb.run
        if self._run is None:
            folder.mkdir(parents=True, exist_ok=True)
            self._run = self._wandb.init(**{"project": "parasym", "mode": "offline", "dir": str(folder), **self._settings})
            self._own = True
        self._run.config.update({"parasym": dict(meta)}, allow_val_change=True)
        self._run.define_metric("parasym/step", hidden=True)
        self._known: set[str] = set()

    def write(self, step: int, rows: Sequence[Row]) -> None:
        """Log one line of history."""
        for kind in {row.kind for row in rows} - self._known:
            self._run.define_metric(f"parasym-{kind}/*", step_metric="parasym/step")
            self._known.add(kind)
        self._run.log({"parasym/step": step, **dict(numbers(rows))})

    def alert(self, alert: Alert) -> None:
        """Send what is worth a person's time as a W&B alert."""
        if alert.severity != "info":
            level = {"warn": "WARN", "high": "ERROR"}[alert.severity]
            self._run.alert(title=f"parasym: {alert.where or 'the run'}"[:64], text=_sentence(alert), level=level)

    def close(self) -> None:
        """Finish the run, if it was made here."""
        if self._own:
            self._run.finish()


class MLflow:
    """MLflow: the run that is active, or else a new one.

    Args:
        tracking_uri: where to; if None, what MLflow is set to if that was chosen (``MLFLOW_TRACKING_URI``, ``set_tracking_uri``), or
            else a database ``mlflow.db`` beside the record.
        run_id: the run to log to; if None, the active run, or else a new one, which is ended at the end.
        experiment: the experiment a new run belongs to.

    Raises:
        MissingExtraError: mlflow is not installed.
    """

    def __init__(self, tracking_uri: str | None = None, run_id: str | None = None, experiment: str = "parasym") -> None:
        try:
            import mlflow
        except ImportError as error:
            raise MissingExtraError("the sink 'mlflow' needs mlflow: pip install 'parasym[mlflow]'") from error
        self._mlflow, self._uri, self.run_id, self._experiment, self._own = mlflow, tracking_uri, run_id, experiment, False
        self._names: dict[str, str] = {}
        self._client: Any = None

    def begin(self, meta: Mapping[str, Any], step: int, folder: Path) -> None:
        """Find or make the run, and log the facts as parameters."""
        if self.run_id is None and self._uri is None and (active := self._mlflow.active_run()) is not None:
            self.run_id = active.info.run_id
        artifacts = None
        if self.run_id is None and self._uri is None and not self._mlflow.is_tracking_uri_set():
            folder.mkdir(parents=True, exist_ok=True)
            self._uri, artifacts = f"sqlite:///{(folder / 'mlflow.db').resolve()}", (folder / "mlflow-artifacts").resolve().as_uri()
        self._client = self._mlflow.MlflowClient(self._uri)
        if self.run_id is None:
            known = self._client.get_experiment_by_name(self._experiment)
            experiment = known.experiment_id if known else self._client.create_experiment(self._experiment, artifacts)
            self.run_id, self._own = self._client.create_run(experiment).info.run_id, True
        for key, value in meta.items():
            self._client.set_tag(self.run_id, f"parasym.{_permitted(key)}", (value if isinstance(value, str) else json.dumps(value))[:5000])

    def write(self, step: int, rows: Sequence[Row]) -> None:
        """Log one batch of metrics for each thousand numbers, as many as MLflow takes."""
        metric, moment = self._mlflow.entities.Metric, int(clock.time() * 1000)
        metrics = [metric(self._name(tag), value, moment, step) for tag, value in numbers(rows)]
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(self.run_id, metrics[start : start + 1000])

    def alert(self, alert: Alert) -> None:
        """Set the alert as a tag."""
        tag = f"parasym.alert.{alert.step:09d}.{hashlib.sha256(alert.message.encode()).hexdigest()[:6]}"
        self._client.set_tag(self.run_id, tag, f"{alert.severity}: {_sentence(alert)}"[:5000])

    def close(self) -> None:
        """End the run, if it was made here."""
        if self._own:
            self._client.set_terminated(self.run_id)

    def _name(self, tag: str) -> str:
        """A name MLflow permits; two tags that would share one are told apart by a digest."""
        if tag not in self._names:
            name = _permitted(tag)
            if len(name) > 240 or name in self._names.values():
                name = f"{name[:230]}-{hashlib.sha256(tag.encode()).hexdigest()[:6]}"
            self._names[tag] = name
        return self._names[tag]


def _permitted(name: str) -> str:
    """MLflow permits letters, digits and a few signs in names."""
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)


def _sentence(alert: Alert) -> str:
    return f"{alert.where + ': ' if alert.where else ''}{alert.message}{f' (see: {alert.remedy})' if alert.remedy else ''}"


_BY_NAME = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def ready(sinks: Sequence[Sink | str]) -> list[Sink]:
    """The sinks themselves, nothing begun.

    Raises:
        InputError: a name is unknown, or an object is no sink.
        MissingExtraError: the package a sink needs is not installed.
    """
    return [_make(sink) for sink in sinks]


def _make(sink: Sink | str) -> Sink:
    if isinstance(sink, str):
        if sink not in _BY_NAME:
            raise InputError(f"There is no sink {sink!r}: use one of {', '.join(_BY_NAME)}, or an object with the methods of a Sink.")
        return _BY_NAME[sink]()
    lacking = [name for name in ("begin", "write", "alert", "close") if not callable(getattr(sink, name, None))]
    if lacking:
        raise InputError(f"{type(sink).__name__} is no sink: it lacks {', '.join(lacking)}.")
    return sink
