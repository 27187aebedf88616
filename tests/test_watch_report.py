"""The page of a run, its summary, and the terminal: what they say, that the page is safe and works, and that following a run ends."""

from __future__ import annotations

import html
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.offline import get_plotlyjs
from typer.testing import CliRunner

import parasym.watch.page as page_room
from parasym.cli import app
from parasym.watch.page import render_run, write_run
from parasym.watch.record import Record, Row
from parasym.watch.summary import duration, share, summary
from parasym.watch.tail import Step, columns, follow
from test_report import HOSTILE, browse, findings, without_plotly

META = {"model": "GPT2LMHeadModel", "parameters": 28544, "optimizer": "SGD", "groups": [{"lr": 0.3}], "budget": 0.05, "ranks": 1}
PLACES = tuple(f"transformer.h.{layer}.{part}" for layer in range(4) for part in ("attn", "mlp"))


def rows_at(step: int, drift: float = 0.0) -> list[Row]:
    """A healthy run; ``drift`` moves the charges of layer 2 away from their predictions."""
    out = [Row("loss", "", "loss", 4.0 * 0.99**step), Row("learning rate", "group 0", "rate", 0.3)]
    for number, where in enumerate(PLACES):
        predicted = (1 + number) * 0.995**step
        value = predicted + 1e-4 * math.sin(step) + (drift * step if ".2." in where else 0.0)
        out.append(Row("QK" if "attn" in where else "rescaling of each unit", where, "charge", value, predicted, 1e-4))
        out.append(Row("weight norm", where, "norm", 1.0 + number + 0.01 * step))
        if "mlp" in where:
            out.append(Row("dead", where, "collapse", min(0.41, step / 250) if ".3." in where else 0.0, note="on data"))
    noise = math.nan if step % 20 == 0 else 100.0 + step
    out.append(Row("gradient noise scale", "", "noise", noise, None, 9.0, "not_converged" if math.isnan(noise) else "ok"))
    out.append(Row("sharpness over the stability limit", "", "sharpness", 0.5))
    out.append(Row("weight norm", "", "norm", 12.0))
    out.append(Row("overhead", "", "cost", 0.03, note="budget 0.05"))
    return out


def a_run(path: Path, steps: Sequence[int] = tuple(range(0, 101, 10)), drift: float = 0.0, alert: bool = True) -> Path:
    with Record.create(path, META) as record:
        for step in steps:
            record.write(step, rows_at(step, drift), time=1.7e9 + step)
        if alert:
            text = "layer 3: 41 % of units entered a collapsed set at step 90"
            record.alert(90, "high", "transformer.h.3.mlp", text, "parasym.methods.syre", "collapse")
    return path


def hostile_run(path: Path) -> Path:
    """Every text a user can choose tries to become markup."""
    with Record.create(path, {"model": HOSTILE, "optimizer": HOSTILE, HOSTILE: HOSTILE}) as record:
        for step in range(12):
            record.write(
                step, [replace(row, name=f"{row.name}{HOSTILE}", where=f"{row.where}{HOSTILE}", note=HOSTILE) for row in rows_at(step)]
            )
        record.alert(3, "warn", HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.sqlite"


def read(path: Path) -> dict[str, Any]:
    with Record.open(path) as record:
        return summary(record)


# -- what a run comes to -----------------------------------------------------------------------------------------------------------------


def test_a_healthy_run(path: Path) -> None:
    found = read(a_run(path, alert=False, steps=range(0, 41, 10)))
    assert found["state"] == "finished" and found["last_step"] == 40 and found["observations"] == 5
    assert len(found["charges"]) == 8 and all(item["follows"] for item in found["charges"])
    assert found["cost"] == {**found["cost"], "overhead": 0.03, "budget": 0.05}
    assert found["verdict"]["good"]
    assert found["verdict"]["sentence"].startswith("8 of 8 charges follow their predictions (median error ")
    assert "most collapsed: transformer.h.3.mlp, 16 % dead" in found["verdict"]["sentence"]


def test_a_charge_that_leaves_its_prediction_is_found(path: Path) -> None:
    found = read(a_run(path, drift=0.01, alert=False))
    off = [item["where"] for item in found["charges"] if item["follows"] is False]
    assert sorted(off) == ["transformer.h.2.attn", "transformer.h.2.mlp"]
    assert found["charges"][0]["where"] in off  # the largest errors first
    worst = found["charges"][0]
    value, predicted = 5 * 0.995**100 + 1e-4 * math.sin(100) + 1.0, 5 * 0.995**100
    assert worst["last"] == pytest.approx(value) and worst["predicted"] == pytest.approx(predicted)
    assert worst["moved"] == pytest.approx(max(abs(5 * 0.995**s + 0.01 * s + 1e-4 * math.sin(s) - 5) for s in range(0, 101, 10)))
    assert worst["error"] == pytest.approx((value - predicted) / worst["moved"])
    assert not found["verdict"]["good"]
    assert found["verdict"]["sentence"] == "2 of 8 charges left their prediction."


def charge(path: Path, rows: Sequence[Sequence[Row]]) -> dict[str, Any]:
    with Record.create(path, {}) as record:
        for step, members in enumerate(rows):
            record.write(step, members)
    (found,) = read(path)["charges"]
    return found


def test_verdicts_on_a_charge(tmp_path: Path) -> None:
    def one(value: float, predicted: float | None, stderr: float | None = None) -> list[Row]:
        return [Row("Q", "m", "charge", value, predicted, stderr)]

    assert charge(tmp_path / "a", [one(1, 1), one(2, 1.95)])["follows"] is True  # 5 % of its change
    assert charge(tmp_path / "b", [one(1, 1), one(2, 1.8)])["follows"] is False  # 20 %
    assert charge(tmp_path / "c", [one(1, 1), one(2, 1.8, 0.1)])["follows"] is True  # two standard errors
    assert charge(tmp_path / "d", [one(1, 1), one(2, 1.8, 0.05)])["follows"] is False  # four
    assert charge(tmp_path / "e", [one(1, None), one(2, None)])["follows"] is None
    still = charge(tmp_path / "f", [one(1, 1), one(1 + 1e-9, 1)])
    assert still["still"] and still["follows"] is True
    # details at the same place: the error of all its numbers counts, and a step that breaks the law is told
    off = Row("Q: prediction error", "m", "charge", 0.5)
    found = charge(tmp_path / "g", [one(1, 1), [*one(2, 2), off]])
    assert found["error"] == 0.5 and found["follows"] is False
    step = Row("Q: residual of the step", "m", "charge", 1e-9, 0.0)
    assert charge(tmp_path / "h", [[*one(1, 1), step], [*one(2, 2), off, step]])["follows"] is True  # round-off, step by step
    found = charge(tmp_path / "i", [[*one(1, 1), step], [*one(2, 2), replace(step, status="violated")]])
    assert found["violated"]
    assert read(tmp_path / "i")["verdict"]["sentence"] == "1 of 1 charges broke their law."


def test_what_worries(tmp_path: Path) -> None:
    found = read(a_run(tmp_path / "a"))
    assert found["verdict"]["sentence"] == "Layer 3: 41 % of units entered a collapsed set at step 90."
    with Record.create(tmp_path / "b", {"budget": 0.05}) as record:
        record.write(1, [Row("loss", "", "loss", math.nan), Row("overhead", "", "cost", 0.08)])
    sentence = read(tmp_path / "b")["verdict"]["sentence"]
    assert "loss was not finite at 1 observed step" in sentence and "8 %, more than its budget of 5 %" in sentence
    record = Record.create(tmp_path / "c", {})
    assert read(tmp_path / "c")["verdict"] == {"good": False, "sentence": "Nothing was recorded yet."}
    record.write(5, [Row("loss", "", "loss", 1.0)])
    assert read(tmp_path / "c")["state"] == "running" and read(tmp_path / "c")["verdict"]["good"]
    record.close("KeyboardInterrupt")
    assert "run ended with KeyboardInterrupt" in read(tmp_path / "c")["verdict"]["sentence"]


def test_a_resumed_run_says_so(path: Path) -> None:
    a_run(path, alert=False)
    with Record.resume(path, step=60) as record:
        for step in range(70, 91, 10):
            record.write(step, rows_at(step))
    found = read(path)
    assert (found["last_step"], found["superseded"]) == (90, 4 * len(rows_at(0)))
    text = render_run(Record.open(path))
    assert "The run was resumed 1 time" in text
    assert f"{4 * len(rows_at(0))} rows lie beyond the checkpoints" in text
    assert "resumed" in re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0 %"), (0.41, "41 %"), (0.0312, "3.1 %"), (7.06, "706 %"), (3e-7, "3e-05 %"), (math.nan, "–"), (32.0, "3,200 %")],
)
def test_shares(value: float | None, text: str) -> None:
    assert share(value) == text


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.4, 61, 3600, 3725, 90000, 86400)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "1 h",
        "1 h 2 min",
        "1 d 1 h",
        "1 d",
    ]


# -- the page --------------------------------------------------------------------------------------------------------------------------


def test_the_page_says_what_happened(path: Path, tmp_path: Path) -> None:
    out = write_run(Record.open(a_run(path)), tmp_path / "run.html")
    text = html.unescape(without_plotly(out.read_text(encoding="utf-8")))
    for part in (
        "GPT2LMHeadModel",
        "28,544 parameters",
        "SGD, learning rate 0.3",
        "steps 0 to 100, 11 of them observed",
        "41 % of units entered a collapsed set at step 90",
        "<code>parasym.methods.syre</code>",
        "of the run's time; budget 5 %",
        "rescaling of each unit",
        "transformer.h.2.attn",
        "11 (6 without a value)",
    ):
        assert part in text, part
    figures = re.findall(r'id="plot-(figure-\d+)"', text)
    assert len(figures) == len(set(figures)) and text.count("as a table") >= len(figures)
    for section in ("loss", "charge", "collapse", "noise", "sharpness", "norm", "rate", "cost"):
        assert f'<section id="{section}">' in text


def data_of(text: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    figures: list[dict[str, Any]] = json.loads(found.group(1))["figures"]
    return figures


def test_measured_and_predicted_are_drawn_as_recorded(path: Path) -> None:
    figures = data_of(render_run(Record.open(a_run(path, drift=0.01))))
    lines = [trace for figure in figures for trace in figure["traces"] if "predicted" in trace.get("hovertemplate", "")]
    assert len(lines) == 8
    figure = next(figure for figure in figures if any(trace in lines for trace in figure["traces"]))
    predicted = next(trace for trace in figure["traces"] if trace in lines)
    group = [trace for trace in figure["traces"] if trace["legendgroup"] == predicted["legendgroup"]]
    (measured,) = [trace for trace in group if "fill" not in trace and trace not in lines]
    (band,) = [trace for trace in group if "fill" in trace]
    record = Record.open(path)
    names = {item.where.removeprefix("transformer."): item for item in record.all_series() if item.kind == "charge"}
    item = names[predicted["legendgroup"]]
    np.testing.assert_allclose(predicted["y"], item.predicted, rtol=1e-5)
    np.testing.assert_allclose(measured["y"], item.value, rtol=1e-5)
    assert measured["x"] == item.step.tolist()
    assert max(y for y in band["y"] if y is not None) == pytest.approx((item.predicted + 2 * item.stderr).max(), rel=1e-5)


def test_long_runs_are_thinned_without_losing_a_spike(path: Path) -> None:
    with Record.create(path, {}) as record:
        values = np.ones(5000)
        values[1234], values[4321], values[2000] = 9.0, -9.0, np.nan
        for step, value in enumerate(values):
            record.write(step, [Row("loss", "", "loss", float(value))])
    (figure,) = [f for f in data_of(render_run(Record.open(path))) if f["traces"]]
    (trace,) = figure["traces"]
    assert len(trace["x"]) <= 2 * page_room.POINTS
    assert dict(zip(trace["x"], trace["y"], strict=True))[1234] == 9.0
    assert dict(zip(trace["x"], trace["y"], strict=True))[4321] == -9.0
    assert None in trace["y"] and trace["x"][0] == 0 and trace["x"][-1] == 4999


def test_one_file_without_network(path: Path) -> None:
    text = render_run(Record.open(a_run(path)))
    assert text.count(get_plotlyjs().replace("\r\n", "\n")) == 1
    rest = without_plotly(text)
    assert set(re.findall(r"https?://[^\"' )]+", rest)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"(src|href)=[\"'](?!#|data:)|@import|url\((?!#)", rest)
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', rest).group(1))  # type: ignore[union-attr]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]


def test_user_text_never_becomes_markup(path: Path) -> None:
    text = without_plotly(render_run(Record.open(hostile_run(path))))
    assert "<img" not in text
    assert text.count("<script") == text.count("</script>") == 3
    for figure in data_of(text):  # plotly reads markup in its texts
        assert "<img" not in json.dumps(figure)
        assert "<script" not in json.dumps(figure)


def test_a_record_with_nothing_in_it_and_numbers_json_cannot_hold(tmp_path: Path) -> None:
    Record.create(tmp_path / "a", {"x": math.nan}).close()
    text = render_run(Record.open(tmp_path / "a"))
    assert "Nothing was recorded" in text and "No charge was watched" in text
    with Record.create(tmp_path / "b", {}) as record:
        for step, value in enumerate((math.nan, math.inf, -math.inf)):
            record.write(
                step, [Row(kind, "m", kind, value, value, value) for kind in ("loss", "charge", "collapse", "noise", "norm", "cost")]
            )
    for figure in data_of(render_run(Record.open(tmp_path / "b"))):
        assert all(y is None for trace in figure["traces"] for y in trace["y"])


def test_rendering_twice_gives_the_same_page(path: Path) -> None:
    a_run(path)
    assert render_run(Record.open(path)) == render_run(Record.open(path))


@pytest.mark.browser
@pytest.mark.parametrize("flags", [(), ("--blink-settings=preferredColorScheme=0", "--window-size=400,800")], ids=["light", "dark-narrow"])
def test_the_page_works(path: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    out = write_run(Record.open(a_run(path)), tmp_path / "run.html")
    dom, console = browse(out, tmp_path / "profile", *flags)
    assert console == []
    result = findings(dom)
    assert result["errors"] == []
    assert result["figures"] == result["figuresExpected"] >= 9
    assert result["sorted"] and result["ariaSort"] == "descending" and result["filtered"]
    # the menu of the figure with more lines than are drawn at first: weight norms of eight places and the whole model
    assert (result["linesAtFirst"], result["linesOfOne"], result["linesOfAll"], result["linesAgain"]) == (6, 1, 9, 6)


@pytest.mark.browser
def test_hostile_names_stay_text_in_the_browser(path: Path, tmp_path: Path) -> None:
    dom, console = browse(write_run(Record.open(hostile_run(path)), tmp_path / "run.html"), tmp_path / "profile")
    assert console == []
    assert findings(dom)["errors"] == []
    assert "<title>owned" not in dom
    assert "<img" not in dom.replace(get_plotlyjs(), "")


# -- the terminal ------------------------------------------------------------------------------------------------------------------------


def test_report_on_the_command_line(path: Path, tmp_path: Path) -> None:
    a_run(path, steps=range(0, 41, 10), alert=False)
    done = CliRunner().invoke(app, ["watch", "report", str(path), "--html", str(tmp_path / "out.html")])
    assert done.exit_code == 0, done.output
    for part in ("8 of 8 charges follow", "steps 0 to 40, 5 observed", "as predicted", "rescaling of each unit", "3 % of the run's time"):
        assert part in done.output, part
    assert "report:" in done.stderr
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == render_run(Record.open(path))
    done = CliRunner().invoke(app, ["watch", "report", str(path), "--json"])
    assert json.loads(done.stdout)["verdict"]["good"] is True


def test_report_exits_with_1_when_the_run_needs_a_person(path: Path) -> None:
    done = CliRunner().invoke(app, ["watch", "report", str(a_run(path))])
    assert done.exit_code == 1
    assert "high" in done.output and "parasym.methods.syre" in done.output


@pytest.mark.parametrize("command", ["report", "tail"])
def test_bad_input_on_the_command_line(tmp_path: Path, command: str) -> None:
    (tmp_path / "text").write_text("loss " * 1000)
    for run, says in (
        (tmp_path / "missing", "There is no record at"),
        (tmp_path, "watch.sqlite"),
        (tmp_path / "text", "not an SQLite file"),
    ):
        done = CliRunner().invoke(app, ["watch", command, str(run)])
        assert done.exit_code == 2 and says in done.stderr.replace("\n", " "), done.output
    if command == "report":
        a_run(tmp_path / "run")
        done = CliRunner().invoke(app, ["watch", "report", str(tmp_path / "run"), "--html", str(tmp_path / "no" / "out.html")])
        assert done.exit_code == 2 and "Cannot write" in done.stderr
    assert "watch.sqlite" in CliRunner().invoke(app, ["watch", command, "--help"]).output


def test_following_gives_each_step_once_and_ends_with_the_run(path: Path) -> None:
    writer = Record.create(path, {})
    for step in range(5):
        writer.write(step, [Row("loss", "", "loss", float(step))])
    reader = Record.open(path)
    seen: list[Any] = []
    for number, item in enumerate(follow(reader, interval=0.01, backlog=2)):
        seen.append(item.step if isinstance(item, Step) else item)
        if number == 3:
            writer.write(5, [Row("loss", "", "loss", 5.0)])
            writer.write(5, [Row("norm", "", "norm", 5.0)])
            writer.write(6, [Row("loss", "", "loss", 6.0)])
            writer.alert(6, "warn", "", "look", "", "nan")
        if number == 8:
            writer.write(7, [Row("loss", "", "loss", 7.0)])
            writer.close("finished")
    assert [item for item in seen if item is not None] == [3, 4, 5, 6, 7, "finished"]
    assert seen.count(None) >= 2


def test_following_a_killed_run_ends(path: Path) -> None:
    code = f"import os; from parasym.watch.record import Record, Row; r = Record.create({str(path)!r}, {{}}); "
    code += "r.write(3, [Row('loss', '', 'loss', 1.0)]); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=False)
    assert [item.step if isinstance(item, Step) else item for item in follow(Record.open(path), interval=0.01)] == [3, "killed"]


def test_columns_of_a_step(path: Path) -> None:
    a_run(path)
    (step,) = [item for item in follow(Record.open(path), backlog=1) if isinstance(item, Step)]
    assert columns(step) == {
        "loss": "1.464",
        "collapsed": "40 %",
        "of the limit": "0.5",
        "weight norm": "12",
        "rate": "0.3",
        "overhead": "3 %",
    }
    points = [replace(step.points[0], row=Row("Q: prediction error", "m", "charge", value)) for value in (0.1, 0.3)]
    assert columns(Step(1, points))["charges"] == "2, error up to 30 %"
    broken = [replace(points[0], row=replace(points[0].row, status="violated"))]
    assert columns(Step(1, broken))["charges"] == "1 break their law"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(page_room.__file__).parents[2]), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def tail(path: Path, *options: str, **pipes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "parasym.cli", "watch", "tail", str(path), "--interval", "0.05", *options]
    return subprocess.Popen(command, env=environment(), text=True, **pipes)


def test_tail_in_a_pipe_follows_a_live_run_to_its_end(path: Path) -> None:
    writer = Record.create(path, META)
    writer.write(1, rows_at(1))
    process = tail(path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step        1  loss 3.96  collapsed 0.4 %  noise scale 101")
    writer.write(2, rows_at(2))
    assert process.stdout.readline().startswith("step        2  loss 3.92")
    writer.alert(2, "high", "h.3", "41 % of units are dead", "parasym.methods.syre", "collapse")
    writer.close("finished")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert out.splitlines() == ["  high  step 2: 41 % of units are dead", "        parasym.methods.syre", "the run is over: finished"]


def test_tail_as_json_and_stopped_by_ctrl_c(path: Path) -> None:
    writer = Record.create(path, META)
    writer.write(20, [*rows_at(20), Row("top", "", "sharpness", math.inf)])
    process = tail(path, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    step = json.loads(process.stdout.readline())
    assert step["step"] == 20 and {row["value"] for row in step["rows"]} >= {"nan", "inf", 0.5}
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "the run goes on" in err
    writer.close()


def test_tail_in_a_terminal_draws_a_table(path: Path) -> None:
    writer = Record.create(path, META)
    writer.write(1, rows_at(1))
    main, child = pty.openpty()
    process = tail(path, stdin=child, stdout=child, stderr=child)
    os.close(child)
    text = ""

    def until(part: str) -> None:
        nonlocal text
        deadline = time.monotonic() + 60
        while part not in text:
            assert time.monotonic() < deadline, text
            text += os.read(main, 65536).decode()

    until("3.96")
    until("Ctrl-C stops")
    assert "GPT2LMHeadModel" in text and "overhead" in text
    writer.write(2, rows_at(2))
    writer.alert(2, "warn", "", "something to see", "", "nan")
    until("something to see")
    until("3.92")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    os.close(main)
    writer.close()
