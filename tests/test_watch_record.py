"""The record of a watched run: nothing committed is ever lost, it is readable while it is written, and bad files are refused."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import parasym.watch.record as room
from parasym.core.errors import RecordError
from parasym.watch.record import Record, Row

SRC = str(Path(room.__file__).parents[2])


def loss(value: float) -> Row:
    return Row("loss", "", "loss", value)


def charge(value: float, predicted: float | None = None, where: str = "h.0.attn") -> Row:
    return Row("QK", where, "charge", value, predicted, 0.01)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.sqlite"


# -- what is written is what is read ---------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were_written(path: Path) -> None:
    rows = [loss(2.5), charge(1.0, 1.1), Row("top eigenvalue", "", "sharpness", 9.0, None, None, "not_converged", "residual 0.2")]
    with Record.create(path, {"model": "gpt", "lr": 0.1, "shape": (2, 3), "top": float("inf")}) as record:
        record.write(0, rows, time=100.0)
        record.write(10, [loss(2.0), charge(0.9, 1.0)], time=101.5)
        record.alert(10, "high", "h.0.mlp", "41 % of units are dead", "parasym.methods.revive", "collapse")
    with Record.open(path) as record:
        assert record.meta == {"model": "gpt", "lr": 0.1, "shape": [2, 3], "top": "inf"}
        assert record.last_step == 10
        assert [point.row for point in record.since(0)][:3] == rows
        assert [(p.step, p.time) for p in record.since(3)] == [(10, 101.5)] * 2
        assert list(record.since(record.last_id)) == []
        series = record.series("QK", "h.0.attn")
        np.testing.assert_array_equal(series.step, [0, 10])
        np.testing.assert_array_equal(series.value, [1.0, 0.9])
        np.testing.assert_array_equal(series.predicted, [1.1, 1.0])
        assert np.isnan(record.series("loss").predicted).all()
        assert record.names() == [("loss", "", "loss"), ("QK", "h.0.attn", "charge"), ("top eigenvalue", "", "sharpness")]
        table = record.table(kind="sharpness")
        assert table["status"] == ["not_converged"] and table["note"] == ["residual 0.2"] and table["predicted"] == [None]
        (alert,) = record.alerts()
        assert (alert.step, alert.severity, alert.remedy) == (10, "high", "parasym.methods.revive")
        assert record.segments[0].outcome == "finished"


def test_numbers_without_a_value_survive(path: Path) -> None:
    values = [math.nan, math.inf, -math.inf, 5e-324, -0.0, 1.7976931348623157e308]
    with Record.create(path, {}) as record:
        for step, value in enumerate(values):
            record.write(step, [Row("x", "", "norm", value, value, abs(value))])
        series = record.series("x")
        for stored in (series.value, series.predicted):
            np.testing.assert_array_equal(stored, values)
            np.testing.assert_array_equal(np.signbit(stored[1:]), np.signbit(values[1:]))
        points = list(record.since(0))
        assert math.isnan(points[0].row.predicted or 0.0) and points[1].row.stderr == math.inf


def test_a_row_is_checked_when_it_is_made() -> None:
    assert Row("x", "", "norm", torch.tensor(2.0)).value == 2.0  # type: ignore[arg-type]
    for wrong in (lambda: Row("x", "", "speed", 1.0), lambda: Row("x", "", "norm", 1.0, status="bad"), lambda: Row("x", "", "norm", None)):  # type: ignore[arg-type]
        with pytest.raises(RecordError, match="'x'"):
            wrong()
    with pytest.raises(RecordError, match="one number"):
        Row("x", "", "norm", torch.ones(2))  # type: ignore[arg-type]


def test_a_folder_stands_for_the_record_in_it(tmp_path: Path) -> None:
    Record.create(tmp_path, {"a": 1}).close("finished")
    assert (tmp_path / room.FILE_NAME).is_file()
    assert Record.open(tmp_path).meta == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(("-shm", "-wal"))) == [room.FILE_NAME]


def test_a_finished_record_is_one_file_that_can_be_read_where_nothing_can_be_written(tmp_path: Path) -> None:
    with Record.create(tmp_path / "a" / "run.sqlite", {}) as record:
        record.write(1, [loss(1.0)])
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["run.sqlite"]
    (tmp_path / "a" / "run.sqlite").chmod(0o444)
    (tmp_path / "a").chmod(0o555)
    try:
        assert Record.open(tmp_path / "a" / "run.sqlite").last_step == 1
    finally:
        (tmp_path / "a").chmod(0o755)


def test_bad_calls_are_refused_and_write_nothing(path: Path) -> None:
    record = Record.create(path, {})
    for step in (-1, 1.5, True):
        with pytest.raises(RecordError, match="step must be"):
            record.write(step, [loss(1.0)])  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="severity"):
        record.alert(1, "fatal", "", "x")  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="no series 'loss'"):
        record.series("loss")
    record.write(0, [])
    assert record.last_step is None and record.last_id == 0
    with pytest.raises(RecordError, match="opened for reading"):
        Record.open(path).write(1, [loss(1.0)])
    record.close()
    record.close()
    with pytest.raises(RecordError, match="closed"):
        record.write(1, [loss(1.0)])
    with pytest.raises(RecordError, match="exists already"):
        Record.create(path, {})


def test_threads_may_share_a_writer(path: Path) -> None:
    with Record.create(path, {}) as record:

        def work(number: int) -> None:
            for step in range(25):
                record.write(step, [Row(f"x{step % 5}", str(number), "norm", float(step))])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(list(record.since(0))) == 100 and len(record.names()) == 20


def test_a_forked_child_must_not_use_it(path: Path) -> None:
    record = Record.create(path, {})
    child = os.fork()
    if child == 0:
        try:
            record.write(1, [loss(1.0)])
        except RecordError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    record.write(1, [loss(1.0)])
    assert record.last_step == 1


# -- live, resumed, taken over -----------------------------------------------------------------------------------------------------------


def test_readers_follow_a_live_run(path: Path) -> None:
    writer, seen = Record.create(path, {}), []
    reader, last = Record.open(path), 0
    for step in range(5):
        writer.write(step, [loss(float(step))])
        for point in reader.since(last):
            seen.append(point.step)
            last = point.id
    assert seen == list(range(5))
    with reader.snapshot():
        before = reader.last_step
        writer.write(9, [loss(0.0)])
        assert reader.last_step == before == 4
    assert reader.last_step == 9
    assert reader.segments[0].ended is None and not reader.segments[0].killed
    writer.close("finished")
    assert reader.segments[0].outcome == "finished"


def test_a_resumed_run_supersedes_what_lies_beyond_the_checkpoint(path: Path) -> None:
    with Record.create(path, {}) as record:
        for step in range(0, 50, 10):
            record.write(step, [loss(float(step))])
        record.alert(20, "warn", "", "kept")
        record.alert(40, "warn", "", "lost")
    with Record.resume(path, step=20) as record:
        assert record.last_step == 20  # before anything new is written
        record.write(30, [loss(-30.0)])
        series = record.series("loss")
        np.testing.assert_array_equal(series.step, [0, 10, 20, 30])
        np.testing.assert_array_equal(series.value, [0, 10, 20, -30])
        assert [alert.message for alert in record.alerts()] == ["kept"]
        assert len(record.alerts(superseded=True)) == 2
        assert record.table(superseded=True)["segment"] == [1, 1, 1, 1, 2, 1]  # nothing is deleted
    with Record.resume(path, step=10) as record:
        record.write(20, [loss(7.0)])
        np.testing.assert_array_equal(record.series("loss").value, [0, 10, 7])
        assert [(s.first, s.until) for s in record.segments] == [(0, 11), (21, 11), (11, None)]


def test_without_a_step_the_first_row_written_decides(path: Path) -> None:
    with Record.create(path, {}) as record:
        for step in range(5):
            record.write(step, [loss(float(step))])
    with Record.resume(path) as record:
        assert record.last_step == 4
        record.write(3, [loss(-3.0)])
        np.testing.assert_array_equal(record.series("loss").value, [0, 1, 2, -3])


def test_a_checkpoint_loaded_while_it_is_open(path: Path) -> None:
    with Record.create(path, {}) as record:
        for step in range(5):
            record.write(step, [loss(float(step))])
        record.rewind(1)
        record.write(2, [loss(-2.0)])
        np.testing.assert_array_equal(record.series("loss").value, [0, 1, -2])
        assert [segment.outcome for segment in record.segments] == ["rewound", None]


def test_one_writer_at_a_time(path: Path) -> None:
    first = Record.create(path, {})
    first.write(1, [loss(1.0)])
    second = Record.resume(path, step=1)
    with pytest.raises(RecordError, match=f"taken over by process {os.getpid()}"):
        first.write(2, [loss(2.0)])
    second.write(2, [loss(3.0)])
    first.close()
    np.testing.assert_array_equal(second.series("loss").value, [1, 3])


WRITER = """
import sys
from parasym.watch.record import Record, Row
record = Record.resume(sys.argv[1])
step = 1 + (-1 if record.last_step is None else record.last_step)
for step in range(step, 10**9):
    record.write(step, [Row(f"x{i}", "m" * i, "norm", float(step)) for i in range(7)])
    sys.stdout.write(f"{step}\\n")
    sys.stdout.flush()
"""


def python(code: str, *arguments: str, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": SRC, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, text=True, stdout=subprocess.PIPE, **options)  # type: ignore[call-overload,no-any-return]


def test_kill_9_loses_nothing_committed(path: Path) -> None:
    """Five kills at random moments: every step acknowledged is there whole, no step is there in part, and the run goes on."""
    Record.create(path, {}).close()
    chance, acknowledged = random.Random(0), -1
    for _ in range(5):
        process = python(WRITER, str(path))
        assert process.stdout is not None
        lines = [process.stdout.readline()]  # it is past its imports
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().split("\n")
        process.wait()
        acknowledged = max(int(line) for line in lines if line.strip())
        with Record.open(path) as record:
            last = record.last_step
            assert last is not None and last - acknowledged in (0, 1)  # one more may be committed and not yet acknowledged
            table = record.table(superseded=True)
            assert table["step"] == [step for step in range(last + 1) for _ in range(7)]
            assert all(step == value for step, value in zip(table["step"], table["value"], strict=True))
            assert record.segments[-1].killed
    assert acknowledged > 100
    assert [segment.until for segment in Record.open(path).segments][-1] is None


# -- full disks --------------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_only_what_did_not_fit(path: Path) -> None:
    record = Record.create(path, {})
    record._connection.execute("PRAGMA max_page_count = 30")
    step = 0

    def write_until_full() -> None:
        nonlocal step
        for step in range(10_000):
            record.write(step, [Row(f"series {i} of step {step}", "", "norm", float(step)) for i in range(20)])

    with pytest.raises(RecordError, match=r"disk is full: free space.*is safe"):
        write_until_full()
    assert step > 3
    assert record.table()["step"] == [s for s in range(step) for _ in range(20)]  # the failed step left nothing
    record._connection.execute("PRAGMA max_page_count = 1000000")
    record.write(step, [Row(f"series {i} of step {step}", "", "norm", float(step)) for i in range(20)])  # names of the failed write too
    assert record.table()["step"] == [s for s in range(step + 1) for _ in range(20)]
    record.close("finished")
    assert Record.open(path).last_step == step


LIMITED = """
import resource, sys
from parasym.core.errors import RecordError
from parasym.watch.record import Record, Row
record = Record.create(sys.argv[1], {})
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
write = lambda step: record.write(step, [Row(f"x{i}", "", "norm", float(step)) for i in range(50)])
try:
    for step in range(10**6):
        write(step)
except RecordError as error:
    assert "is safe" in str(error), error
    try:
        write(step)
        sys.exit("a second write went through")
    except RecordError:
        pass
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    write(step)
    assert step > 10
    print(step)
    if sys.argv[2] == "close":
        record.close("finished")
    else:
        import os
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_file_system_that_refuses_to_grow(path: Path, end: str) -> None:
    process = python(LIMITED, str(path), end, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (0 if end == "close" else -9), err
    with Record.open(path) as record:
        assert record.table()["step"] == [step for step in range(int(out) + 1) for _ in range(50)]


def test_a_record_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecordError, match="cannot be made"):
        Record.create(tmp_path / "file" / "run.sqlite", {})
    code = (
        "import resource, sys; from parasym.watch.record import Record; from parasym.core.errors import RecordError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: Record.create(sys.argv[1], {})\n"
        "except RecordError as error: print(error)\n"
    )
    process = python(code, str(tmp_path / "run.sqlite"))
    assert "cannot be made: the file system refused" in process.communicate(timeout=60)[0]
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# -- other people's files ------------------------------------------------------------------------------------------------------------------


def test_a_locked_record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_PATIENCE", 0.05)
    record = Record.create(path, {})
    record.write(1, [loss(1.0)])
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RecordError, match="another process has held it"):
        record.write(2, [loss(2.0)])
    assert record.last_step == 1
    other.execute("ROLLBACK")
    record.write(2, [loss(2.0)])
    assert record.last_step == 2


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE meta (key, value)")


def _newer(path: Path) -> None:
    Record.create(path, {}).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {room.SCHEMA + 1}")


def _truncated(path: Path) -> None:
    with Record.create(path, {}) as record:
        for step in range(200):
            record.write(step, [Row(f"name {step}", "", "norm", 1.0)])
    os.truncate(path, path.stat().st_size // 2)


def _scrambled(path: Path) -> None:
    _truncated(path)
    path.unlink()
    _truncated(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(random.Random(0).randbytes(size - 4096))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b""), "not the record"),
        (lambda path: path.write_text("loss\n" * 2000), "not an SQLite file"),
        (_foreign, "not the record"),
        (_newer, "newer parasym"),
        (_truncated, "damaged"),
        (_scrambled, "damaged"),
        (lambda path: None, "no record at"),
        (lambda path: path.mkdir(), "no record at"),
    ],
    ids=["empty", "text", "foreign", "newer", "truncated", "scrambled", "missing", "folder"],
)
def test_bad_files_are_refused_and_left_alone(path: Path, make: Callable[[Path], None], says: str) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for how in (Record.open, Record.resume):
        with pytest.raises(RecordError, match=says):
            how(path)
    assert (path.read_bytes() if path.is_file() else None) == before
    if before is not None:
        with pytest.raises(RecordError, match="exists already"):
            Record.create(path, {})


def test_a_copy_taken_while_it_runs_is_a_record(path: Path, tmp_path: Path) -> None:
    """The file and its write-ahead log, copied together between two writes."""
    record = Record.create(path, {})
    for step in range(20):
        record.write(step, [loss(float(step))])
    (tmp_path / "copy").mkdir()
    for file in tmp_path.glob("run.sqlite*"):
        shutil.copy(file, tmp_path / "copy")
    assert Record.open(tmp_path / "copy" / "run.sqlite").last_step == 19


def test_a_commit_does_not_wait_for_the_disk(path: Path) -> None:
    """Written ahead and not synchronised at each commit: safe from kill -9 (tested above), and no fsync in a training step."""
    connection = Record.create(path, {})._connection
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 1
