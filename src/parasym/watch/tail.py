"""A live run in the terminal: what to show of each step, and when to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from parasym.core.results import plain
from parasym.report import words
from parasym.watch.record import Alert, Point, Record
from parasym.watch.summary import NOT_LOST, share, state

COLUMNS = ("loss", "charges", "collapsed", "noise scale", "sharpness", "of the limit", "weight norm", "rate", "overhead")


@dataclass
class Step:
    """What was recorded of one step since it was last looked at.

    Attributes:
        step: the training step.
        points: its rows.
        alerts: its alerts.
    """

    step: int
    points: list[Point] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers JSON cannot hold are the texts "nan", "inf", "-inf"."""
        rows = [plain(point.row) for point in self.points]
        return {"step": self.step, "time": self.points[-1].time if self.points else None, "rows": rows, "alerts": plain(self.alerts)}


def follow(record: Record, interval: float = 1.0, backlog: int = 10) -> Iterator[Step | str | None]:
    """Yield each observed step of a run as it is recorded, then how the run ended.

    A step is yielded once the next one begins, or once nothing was added to it for an interval.

    Args:
        record: open for reading.
        interval: seconds between two looks.
        backlog: how many of the steps recorded before to begin with.

    Yields:
        Steps; None at each look that found nothing new, so that the caller can redraw; at the end the state of the run
        ("finished", "killed", ...).
    """
    last, told = record.before_last(backlog), len(record.alerts(superseded=True))
    pending: Step | None = None
    while True:
        now = state(record.segments)  # before the rows: what is written after it is seen in the next look
        fresh = False
        for point in record.since(last):
            last, fresh = point.id, True
            if pending is not None and pending.step != point.step:
                yield pending
                pending = None
            pending = pending or Step(point.step)
            pending.points.append(point)
        alerts = record.alerts(superseded=True)
        if alerts[told:]:
            pending = pending or Step(alerts[-1].step)
            pending.alerts += alerts[told:]
            told, fresh = len(alerts), True
        if pending is not None and (not fresh or now != "running"):
            yield pending
            pending = None
        if now != "running":
            yield now
            return
        yield None
        time.sleep(interval)


def columns(step: Step) -> dict[str, str]:
    """The numbers of a step worth a column, in words; those of `COLUMNS` that were recorded."""
    rows = [point.row for point in step.points]
    out: dict[str, str] = {}
    errors = [row.value for row in rows if row.kind == "charge" and row.name.endswith(": prediction error")]
    broken = sum(row.kind == "charge" and row.status == "violated" for row in rows)
    lost = [row.value for row in rows if row.kind == "collapse" and row.name not in NOT_LOST]
    if errors or broken:
        out["charges"] = f"{broken} break their law" if broken else f"{len(errors)}, error up to {share(max(errors))}"
    if lost:
        out["collapsed"] = share(max(lost))
    for row in rows:
        value = words.number(row.value, 4) if math.isfinite(row.value) else str(row.value)
        if row.kind == "loss" and (row.name == "loss" or "loss" not in out):
            out["loss"] = value
        elif row.kind == "noise" and row.name.startswith("gradient noise scale") and row.status == "ok":
            out["noise scale"] = value
        elif row.kind == "sharpness" and row.status == "ok":
            out["of the limit" if row.name.endswith("limit") else "sharpness"] = value
        elif row.kind == "norm" and row.name == "weight norm" and not row.where:
            out["weight norm"] = value
        elif row.kind == "rate" and row.name == "learning rate":
            out.setdefault("rate", f"{row.value:.3g}")
        elif row.kind == "cost" and row.name == "overhead":
            out["overhead"] = share(row.value)
    return {key: out[key] for key in COLUMNS if key in out}


def line(step: Step) -> str:
    """One line for a pipe."""
    return f"step {step.step:>8,}  " + "  ".join(f"{key} {value}" for key, value in columns(step).items())
