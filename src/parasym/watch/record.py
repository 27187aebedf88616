"""The record of a watched run: one SQLite file that is read while it is written and survives ``kill -9``.

A `Record.write` is one transaction: after it returns, the rows are there whatever happens to the process (write-ahead log,
``synchronous=NORMAL``: a power cut may lose the newest transactions, never damage older ones). Nothing is ever deleted: a run that
goes back to a checkpoint starts a new *segment*, and what older segments hold beyond that step is superseded: kept, but left out of
what is read unless asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import sqlite3
import threading
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np

from parasym.core.errors import RecordError
from parasym.core.results import Status, plain

Kind = Literal["charge", "collapse", "noise", "sharpness", "norm", "rate", "loss", "cost"]
Severity = Literal["info", "warn", "high"]

FILE_NAME = "watch.sqlite"
"""The record's name inside a run folder, where a folder is given instead of a file."""

SCHEMA = 1
"""Version of the tables below; a record of a newer version is refused."""

_APPLICATION = 0x5061536D  # "PaSm" in the file header marks a record of parasym
_PATIENCE = 5.0  # seconds to wait for another process's transaction
_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE segments (
  id INTEGER PRIMARY KEY, started REAL NOT NULL, ended REAL, outcome TEXT, pid INTEGER NOT NULL, host TEXT NOT NULL,
  first INTEGER,  -- the first step it covers; NULL before anything is known
  until INTEGER   -- a later segment covers the steps from here on; NULL while none does
);
CREATE TABLE series (id INTEGER PRIMARY KEY, name TEXT NOT NULL, place TEXT NOT NULL, kind TEXT NOT NULL, UNIQUE (name, place, kind));
CREATE TABLE points (
  id INTEGER PRIMARY KEY, segment INTEGER NOT NULL REFERENCES segments, step INTEGER NOT NULL, time REAL NOT NULL,
  series INTEGER NOT NULL REFERENCES series, value, predicted, stderr, status TEXT NOT NULL, note TEXT NOT NULL
);
CREATE INDEX points_of_series ON points (series, step);
CREATE INDEX points_of_step ON points (step);
CREATE TABLE alerts (
  id INTEGER PRIMARY KEY, segment INTEGER NOT NULL REFERENCES segments, step INTEGER NOT NULL, time REAL NOT NULL,
  severity TEXT NOT NULL, place TEXT NOT NULL, kind TEXT NOT NULL, message TEXT NOT NULL, remedy TEXT NOT NULL
);
"""
_LIVE = "(segments.until IS NULL OR {0}.step < segments.until)"


@dataclass(frozen=True)
class Row:
    """One number seen at one step.

    Attributes:
        name: what it is ("QK head 0", "gradient noise scale"); the same name at the same place is one series.
        where: the module or parameter it belongs to; "" for the whole model.
        kind: the section it is shown in. ``charge``: measured beside predicted; ``collapse``: a share of units, 0..1; ``noise``,
            ``sharpness``, ``norm``, ``rate`` (effective learning rate), ``loss``; ``cost``: what watching costs.
        value: what was measured; NaN and infinities are kept.
        predicted: what the theory says it is; None where it says nothing.
        stderr: standard error of ``value``; None where nothing was sampled.
        status: as in `parasym.core.results.Estimate`.
        note: one sentence; why, when the status is not ``ok``.

    Raises:
        RecordError: the kind or the status is unknown, or a number is not one.
    """

    name: str
    where: str
    kind: Kind
    value: float
    predicted: float | None = None
    stderr: float | None = None
    status: Status = "ok"
    note: str = ""

    def __post_init__(self) -> None:
        _one_of(self.kind, Kind, f"row {self.name!r}: kind")
        _one_of(self.status, Status, f"row {self.name!r}: status")
        for field in ("value", "predicted", "stderr"):
            given = getattr(self, field)
            if given is None and field != "value":
                continue
            try:
                object.__setattr__(self, field, float(given))
            except (TypeError, ValueError, RuntimeError) as error:
                raise RecordError(f"row {self.name!r}: {field} must be one number, got {given!r}.") from error


@dataclass(frozen=True)
class Point:
    """A row as it stands in the record.

    Attributes:
        id: grows with every row written; hand the last one seen to `Record.since`.
        step: the training step.
        time: seconds since 1970.
        segment: which stretch of the run wrote it: 1, then one more for each resumption.
        row: the row.
    """

    id: int
    step: int
    time: float
    segment: int
    row: Row


@dataclass(frozen=True)
class Series:
    """One quantity over the run, arrays of one length in the order of the steps.

    Attributes:
        name: as in `Row`.
        where: as in `Row`.
        kind: as in `Row`.
        step: training steps (n,), int64.
        time: seconds since 1970 (n,).
        value: measured (n,).
        predicted: predicted (n,); NaN where nothing was.
        stderr: standard errors (n,); NaN where there is none.
        status: one for each point.
        note: one for each point.
    """

    name: str
    where: str
    kind: Kind
    step: np.ndarray
    time: np.ndarray
    value: np.ndarray
    predicted: np.ndarray
    stderr: np.ndarray
    status: tuple[str, ...]
    note: tuple[str, ...]


@dataclass(frozen=True)
class Alert:
    """Something the watcher wants a person to see.

    Attributes:
        step: the training step.
        time: seconds since 1970.
        severity: ``info``, ``warn`` or ``high``.
        where: module or parameter; "" for the run.
        message: what happened, with its number.
        remedy: the command or call that helps; "" where there is none.
        kind: the kind of row it came from, or a word of the watcher's ("nan", "sink").
    """

    step: int
    time: float
    severity: Severity
    where: str
    message: str
    remedy: str
    kind: str


@dataclass(frozen=True)
class Segment:
    """A stretch of the run between two starts.

    Attributes:
        id: 1, 2, ...
        started: seconds since 1970.
        ended: seconds since 1970; None while it runs, or when its process was killed.
        outcome: "finished", or what ended it; None while it has not.
        pid: the process that wrote it.
        host: the machine it ran on.
        first: its first step; None before anything is known.
        until: the step from which a later segment supersedes it; None while none does.
    """

    id: int
    started: float
    ended: float | None
    outcome: str | None
    pid: int
    host: str
    first: int | None
    until: int | None

    @property
    def killed(self) -> bool:
        """True when its process is known to have died without ending it; False also where that cannot be seen from here."""
        if self.ended is not None or self.host != platform.node() or os.name != "posix":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False


class Record:
    """The file a watched run is written to, and read from while it runs.

    Made by `create`, `resume` (one writer at a time) or `open` (any number of readers). Thread-safe; a forked child must not use it.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, segment: int | None) -> None:
        self.path = path
        self._connection = connection
        self._segment = segment
        self._series: dict[tuple[str, str, str], int] = {}
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._first_known = False
        self._wrote = False

    # -- opening -------------------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike[str], meta: Mapping[str, Any]) -> Self:
        """Start the record of a new run.

        Args:
            path: a file that does not exist yet, or a folder, in which ``watch.sqlite`` is made; missing folders are made.
            meta: facts about the run (model, optimiser, settings); JSON-ready or such that `plain` makes it so.

        Raises:
            RecordError: something is there already, or the file cannot be written.
        """
        path = record_file(path)
        if path.exists():
            raise RecordError(f"{path} exists already: resume it (Record.resume), or give another path.")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))  # of two runs that start at once one fails
        except OSError as error:
            raise RecordError(f"{path} cannot be made: {error.strerror}. Give a path in a folder that can be written.") from error
        try:
            with _explained(path, "made"):
                connection = _connect(path)
                _write_ahead(connection)
                connection.execute("BEGIN IMMEDIATE")
                for statement in _TABLES.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
                _put_meta(connection, meta)
                segment = _new_segment(connection, first=None)
                connection.execute("COMMIT")
        except BaseException:
            for leftover in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
                leftover.unlink(missing_ok=True)
            raise
        return cls(connection, path, segment)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], step: int | None = None) -> Self:
        """Continue the record of a run.

        What it holds of steps after ``step`` was lost with the old process's weights and is superseded. Without a step, whatever
        lies at or after the first step written next is. A writer still alive is taken over from: its next write fails and says so.

        Args:
            path: the record, or the folder it is in.
            step: the last step that the checkpoint has seen, 0 for none.

        Raises:
            RecordError: no record is there, it is damaged, foreign or of a newer version, or it cannot be written.
        """
        path = _existing(path)
        with _explained(path, "resumed"):
            connection = _connect(path)
            _verify(connection, path)
            _write_ahead(connection)
            connection.execute("BEGIN IMMEDIATE")
            segment = _new_segment(connection, None if step is None else step + 1)
            connection.execute("COMMIT")
        record = cls(connection, path, segment)
        record._first_known = step is not None
        return record

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a record for reading, also while it is being written.

        Args:
            path: the record, or the folder it is in.

        Raises:
            RecordError: no record is there, or it is damaged, foreign or of a newer version.
        """
        path = _existing(path)
        with _explained(path, "opened"):
            connection = _connect(path, read_only=True)
            _verify(connection, path)
        return cls(connection, path, None)

    def close(self, outcome: str | None = None) -> None:
        """Close the file; a writer states how the run ended. Closing twice does nothing.

        A finished record is folded into its one file (no ``-wal`` beside it), unless somebody is reading it.

        Args:
            outcome: "finished", or one word for what ended the run; None leaves the segment open, as a killed run would.
        """
        with self._lock:
            connection, self._connection = self._connection, None  # type: ignore[assignment]
            if connection is None or os.getpid() != self._pid:
                return
            if self._segment is not None:
                with contextlib.suppress(sqlite3.Error):  # a full disk must not keep a run from ending
                    if outcome is not None:
                        connection.execute(
                            "UPDATE segments SET ended = ?, outcome = ? WHERE id = ?", (clock.time(), outcome, self._segment)
                        )
                    connection.execute("PRAGMA busy_timeout = 0")
                    connection.execute("PRAGMA journal_mode = DELETE")
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close("finished" if kind is None else kind.__name__)

    # -- writing -------------------------------------------------------------------------------------------------------------------

    def write(self, step: int, rows: Sequence[Row], time: float | None = None) -> None:
        """Write rows in one transaction: all of them are kept, or none.

        Args:
            step: the training step they belong to, >= 0.
            rows: what was seen.
            time: seconds since 1970; now if None.

        Raises:
            RecordError: the disk is full, another process holds the file or has taken the run over, or the record is closed or
                read-only. What was written before is untouched, and the next write is tried anew.
        """
        if not rows:
            return
        moment = clock.time() if time is None else time
        fresh: dict[tuple[str, str, str], int] = {}
        with self._transaction(step) as connection:
            points = [
                (
                    self._segment, step, moment, self._series_id(connection, row, fresh),
                    _store(row.value), _store(row.predicted), _store(row.stderr), row.status, row.note,
                )
                for row in rows
            ]  # fmt: skip
            connection.executemany(
                "INSERT INTO points (segment, step, time, series, value, predicted, stderr, status, note) VALUES (?,?,?,?,?,?,?,?,?)",
                points,
            )
        self._series.update(fresh)  # only what was committed

    def alert(self, step: int, severity: Severity, where: str, message: str, remedy: str = "", kind: str = "") -> None:
        """Write an alert, in a transaction of its own; arguments as in `Alert`, errors as in `write`."""
        _one_of(severity, Severity, "alert severity")
        with self._transaction(step) as connection:
            connection.execute(
                "INSERT INTO alerts (segment, step, time, severity, place, kind, message, remedy) VALUES (?,?,?,?,?,?,?,?)",
                (self._segment, step, clock.time(), severity, where, kind, message, remedy),
            )

    def update_meta(self, meta: Mapping[str, Any]) -> None:
        """Add facts about the run, or replace those of the same name; errors as in `write`."""
        with self._transaction(None) as connection:
            _put_meta(connection, meta)

    def rewind(self, step: int) -> None:
        """Say that training goes on from the state after ``step``: what the record holds beyond it is superseded.

        For a checkpoint loaded while the record is open already; starts a new segment if this one holds rows. Errors as in `write`.
        """
        with self._transaction(None) as connection:
            assert self._segment is not None
            segment = self._segment
            if self._wrote:
                connection.execute("UPDATE segments SET ended = ?, outcome = 'rewound' WHERE id = ?", (clock.time(), segment))
                segment = _new_segment(connection, step + 1)
            else:
                _cover(connection, segment, step + 1)
        self._segment, self._first_known, self._wrote = segment, True, False

    @contextlib.contextmanager
    def _transaction(self, step: int | None) -> Iterator[sqlite3.Connection]:
        """One transaction of this writer; the first step seen bounds what older segments still say."""
        if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
            raise RecordError(f"step must be an integer >= 0, got {step!r}.")
        with self._lock, _explained(self.path, "written"):
            connection = self._usable()
            if self._segment is None:
                raise RecordError(f"{self.path} was opened for reading; Record.resume continues a run.")
            connection.execute("BEGIN IMMEDIATE")
            try:
                newest, pid, host = connection.execute("SELECT id, pid, host FROM segments ORDER BY id DESC LIMIT 1").fetchone()
                if newest != self._segment:
                    raise RecordError(f"{self.path} was taken over by process {pid} on {host}; this one no longer writes to it.")
                if step is not None and not self._first_known:
                    _cover(connection, self._segment, step)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite has already rolled back by itself when the disk is full
                    connection.execute("ROLLBACK")
                raise
            if step is not None:
                self._first_known = self._wrote = True

    def _series_id(self, connection: sqlite3.Connection, row: Row, fresh: dict[tuple[str, str, str], int]) -> int:
        key = (row.name, row.where, row.kind)
        known = self._series.get(key) or fresh.get(key)
        if known is None:
            connection.execute("INSERT OR IGNORE INTO series (name, place, kind) VALUES (?,?,?)", key)
            known = fresh[key] = connection.execute("SELECT id FROM series WHERE name = ? AND place = ? AND kind = ?", key).fetchone()[0]
        return known

    # -- reading -------------------------------------------------------------------------------------------------------------------

    @property
    def meta(self) -> dict[str, Any]:
        """The facts about the run."""
        try:
            return {key: json.loads(value) for key, value in self._read("SELECT key, value FROM meta ORDER BY key")}
        except (ValueError, TypeError) as error:
            raise RecordError(f"{self.path} cannot be read: its facts are damaged ({error}). Restore it from a copy.") from error

    @property
    def last_step(self) -> int | None:
        """The last step with a row that is not superseded; None before there is one."""
        row = self._read(f"SELECT MAX(step) FROM points JOIN segments ON segments.id = segment WHERE {_LIVE.format('points')}")
        return row[0][0]

    @property
    def last_id(self) -> int:
        """The id of the last row written; 0 before there is one."""
        return self._read("SELECT COALESCE(MAX(id), 0) FROM points")[0][0]

    def before_last(self, steps: int) -> int:
        """The id to hand to `since` for the rows of the last so many observed steps, and whatever comes after them."""
        first = "SELECT MIN(id) FROM points WHERE step IN (SELECT DISTINCT step FROM points ORDER BY step DESC LIMIT ?)"
        found = self._read(first, (steps,))[0][0]
        return self.last_id if found is None else found - 1

    @property
    def segments(self) -> list[Segment]:
        """The stretches of the run, oldest first: one, and one more for each resumption."""
        return [
            Segment(*row) for row in self._read("SELECT id, started, ended, outcome, pid, host, first, until FROM segments ORDER BY id")
        ]

    @property
    def superseded(self) -> int:
        """How many rows lie beyond the checkpoint that a later segment resumed from: kept, but left out of what is read."""
        return self._read(f"SELECT COUNT(*) FROM points JOIN segments ON segments.id = segment WHERE NOT {_LIVE.format('points')}")[0][0]

    def names(self) -> list[tuple[str, str, Kind]]:
        """Name, place and kind of every series that has a point not superseded, in the order they first appeared."""
        return [
            (name, place, kind)
            for name, place, kind in self._read(
                "SELECT name, place, kind FROM series WHERE EXISTS (SELECT 1 FROM points JOIN segments ON segments.id = segment "
                f"WHERE series = series.id AND {_LIVE.format('points')}) ORDER BY id"
            )
        ]

    def series(self, name: str, where: str = "", kind: str | None = None) -> Series:
        """One quantity over the run, without what is superseded.

        Args:
            name: as in `Row`.
            where: as in `Row`.
            kind: as in `Row`; needed only where two kinds share a name and a place.

        Raises:
            RecordError: there is no such series, or two kinds share its name.
        """
        found = [item for item in self.names() if item[:2] == (name, where) and kind in (None, item[2])]
        if len(found) != 1:
            near = sorted({item[0] for item in self.names() if item[1] == where})
            raise RecordError(
                f"{self.path} has {'several kinds of' if found else 'no'} series {name!r} at {where!r}"
                + (": say which kind." if found else f"; at that place it has: {', '.join(near) or 'nothing'}.")
            )
        condition = "series.name = ? AND series.place = ? AND series.kind = ?"
        return self._series_where(condition, found[0])[0]

    def all_series(self) -> list[Series]:
        """Every quantity over the run, in the order they first appeared, without what is superseded."""
        return self._series_where("1", ())

    def _series_where(self, condition: str, values: tuple[Any, ...]) -> list[Series]:
        rows = self._read(
            "SELECT series.id, series.name, place, kind, step, time, value, predicted, stderr, status, note "
            "FROM points JOIN series ON series.id = series JOIN segments ON segments.id = segment "
            f"WHERE {condition} AND {_LIVE.format('points')} ORDER BY series.id, step, points.id",
            values,
        )
        out = []
        for (_, name, place, kind), members in itertools.groupby(rows, key=lambda row: row[:4]):
            step, time, value, predicted, stderr, status, note = list(zip(*members, strict=True))[4:]
            steps, numbers = np.array(step, dtype=np.int64), (_array(time), _array(value), _array(predicted), _array(stderr))
            out.append(Series(name, place, kind, steps, *numbers, status, note))
        return out

    def table(self, kind: str | None = None, superseded: bool = False) -> dict[str, list[Any]]:
        """All rows as columns, in the order of the steps; ``pandas.DataFrame(record.table())`` is a frame.

        Args:
            kind: only rows of this kind.
            superseded: also what a later segment supersedes; the column "segment" tells them apart.
        """
        condition = ("1" if superseded else _LIVE.format("points")) + ("" if kind is None else " AND kind = ?")
        points = self._points(condition, () if kind is None else (kind,), order="step, points.id")
        columns: dict[str, list[Any]] = {
            key: [] for key in ("step", "time", "segment", "name", "where", "kind", "value", "predicted", "stderr", "status", "note")
        }
        for point in points:
            for key, column in columns.items():
                column.append(getattr(point if key in ("step", "time", "segment") else point.row, key))
        return columns

    def since(self, id: int = 0) -> Iterator[Point]:
        """Rows written after the one of that id, in the order they were written: what a follower has not seen yet."""
        yield from self._points("points.id > ?", (id,), order="points.id")

    def alerts(self, superseded: bool = False) -> list[Alert]:
        """The alerts in the order they were raised."""
        condition = "1" if superseded else _LIVE.format("alerts")
        return [
            Alert(*row)
            for row in self._read(
                "SELECT step, time, severity, place, message, remedy, kind FROM alerts JOIN segments ON segments.id = segment "
                f"WHERE {condition} ORDER BY alerts.id"
            )
        ]

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Self]:
        """Make everything read inside see one state of a record that is being written."""
        with self._lock, _explained(self.path, "read"):
            connection = self._usable()
            connection.execute("BEGIN")
            try:
                yield self
            finally:
                connection.execute("COMMIT")

    def _points(self, condition: str, values: tuple[Any, ...], order: str) -> Iterator[Point]:
        rows = self._read(
            "SELECT points.id, step, time, segment, name, place, kind, value, predicted, stderr, status, note "
            f"FROM points JOIN series ON series.id = series JOIN segments ON segments.id = segment WHERE {condition} ORDER BY {order}",
            values,
        )
        for number, step, time, segment, name, place, kind, value, predicted, stderr, status, note in rows:
            row = Row(name, place, kind, _load(value), _load(predicted), _load(stderr), status, note)  # type: ignore[arg-type]
            yield Point(number, step, time, segment, row)

    def _read(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with self._lock, _explained(self.path, "read"):
            return self._usable().execute(statement, values).fetchall()

    def _usable(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RecordError(f"{self.path} is closed.")
        if os.getpid() != self._pid:
            raise RecordError(f"{self.path} was opened by process {self._pid}: a forked process must open it anew.")
        return self._connection


def _one_of(value: str, choices: Any, what: str) -> None:
    if value not in get_args(choices):
        raise RecordError(f"{what} {value!r} is unknown: use one of {', '.join(get_args(choices))}.")


def _store(x: float | None) -> float | str | None:
    """SQLite turns a bound NaN into NULL; it is kept as a text."""
    return "nan" if x is not None and math.isnan(x) else x


def _load(x: float | str | None) -> float | None:
    return None if x is None else float(x)


def _array(column: Sequence[float | str | None]) -> np.ndarray:
    return np.array([math.nan if x is None else float(x) for x in column])


def record_file(path: str | os.PathLike[str]) -> Path:
    """The record's file: the path itself, or ``watch.sqlite`` in it where it is a folder."""
    path = Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _existing(path: str | os.PathLike[str]) -> Path:
    path = record_file(path)
    if not path.is_file():
        raise RecordError(f"There is no record at {path}. Give the file a watched run writes, or the folder that holds its {FILE_NAME}.")
    return path


def _connect(path: Path, read_only: bool = False) -> sqlite3.Connection:
    address = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rw'}"
    return sqlite3.connect(address, uri=True, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Write ahead; where the file system cannot (network shares), a rollback journal synchronised at every commit does as well."""
    mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
    connection.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")
    connection.execute("PRAGMA foreign_keys = ON")


def _verify(connection: sqlite3.Connection, path: Path) -> None:
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
        raise RecordError(f"{path} is not the record of a watched run. Give the file that parasym.watch writes.")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA:
        raise RecordError(f"{path} was written by a newer parasym (schema {version}, this one knows {SCHEMA}): upgrade parasym.")
    fault = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if fault != "ok":
        raise RecordError(f"{path} is damaged ({fault}): restore it from a copy; `sqlite3 FILE .recover` may save what is left.")


def _new_segment(connection: sqlite3.Connection, first: int | None) -> int:
    values = (clock.time(), os.getpid(), platform.node())
    number = connection.execute("INSERT INTO segments (started, pid, host) VALUES (?,?,?)", values).lastrowid
    assert number is not None
    if first is not None:
        _cover(connection, number, first)
    return number


def _cover(connection: sqlite3.Connection, segment: int, first: int) -> None:
    """Let a segment cover the steps from ``first`` on, and older ones only those before."""
    connection.execute("UPDATE segments SET first = ? WHERE id = ?", (first, segment))
    connection.execute("UPDATE segments SET until = MIN(COALESCE(until, ?1), ?1) WHERE id < ?2", (first, segment))


def _put_meta(connection: sqlite3.Connection, meta: Mapping[str, Any]) -> None:
    pairs = [(str(key), json.dumps(plain(value), allow_nan=False)) for key, value in meta.items()]
    connection.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?,?)", pairs)


_CAUSES = (
    ("full", "the disk is full: free space; what was committed is safe, and later writes are tried anew"),
    ("disk i/o error", "the file system refused (full disk, quota, size limit or a lost share): what was committed is safe"),
    ("locked", f"another process has held it for more than {_PATIENCE:g} s: stop that process or try again"),
    ("busy", f"another process has held it for more than {_PATIENCE:g} s: stop that process or try again"),
    ("not a database", "it is not an SQLite file, so no record of a watched run"),
    ("malformed", "it is damaged: restore it from a copy; `sqlite3 FILE .recover` may save what is left"),
    ("readonly", "it, or its folder, may not be written"),
    ("unable to open", "it, or its folder, may not be opened or written"),
    ("no such table", "it lacks tables that a record has: it is damaged or foreign"),
    ("no such column", "it lacks columns that a record has: it is damaged or foreign"),
)


@contextlib.contextmanager
def _explained(path: Path, verb: str) -> Iterator[None]:
    """Turn SQLite's errors into one that says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        cause = next((cause for sign, cause in _CAUSES if sign in text.lower()), "SQLite refused")
        raise RecordError(f"{path} cannot be {verb}: {cause} ({text}).") from error
