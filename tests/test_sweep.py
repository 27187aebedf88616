"""Sweeps: the same bytes whoever computes them, nothing finished is lost, and a diagram that can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from parasym.cli import app
from parasym.core.errors import InputError
from parasym.gallery import entries
from parasym.gallery import runner as runner_module
from parasym.gallery import sweep as sweep_module
from parasym.gallery.contract import Part, match
from parasym.gallery.store import Cells
from parasym.gallery.sweep import Diagram, Quantity, Sweep, cell_seed, offered, page, parse_axis, parse_setting, sweep, sweep_of

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1] / "src"), "OMP_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Square:
    x: float = 1.0
    n: int = 1
    name: str = "a"
    seed: int = 0
    kill: str = ""


def square(config: Square) -> dict[str, dict[str, float]]:
    """Deterministic noise about x^2; kills its worker once if told to, leaving a mark."""
    if config.kill and config.x == 2.0 and not Path(config.kill).exists():
        Path(config.kill).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    noise = np.random.default_rng(cell_seed(config)).normal()
    return {"q": {"measured": config.x**2 + 1e-3 * noise, "predicted": config.x**2, "stderr": 1e-3}, "r": {"measured": float(config.n)}}


SQUARE = Sweep("square", Square(), square, (Quantity("q", "x squared", 4.0, 0.1), Quantity("r", "n")), {"x": (0.0, 1.0, 2.0, 3.0)})


def text(diagram: Diagram) -> str:
    return json.dumps(diagram.to_dict(), sort_keys=True, allow_nan=False)


def test_one_worker_two_workers_and_the_store_give_the_same_bytes(tmp_path: Path) -> None:
    axes = {"x": tuple(np.linspace(0, 4, 7)), "n": (1, 2, 3)}
    plain = sweep("s", SQUARE, axes)
    assert plain.values("q").shape == (7, 3) and plain.values("r")[0].tolist() == [1.0, 2.0, 3.0]
    assert len({c["q"]["measured"] - c["q"]["predicted"] for c in plain.cells}) == 21  # each cell has noise of its own
    store = str(tmp_path / "cells.sqlite")
    assert text(sweep("s", SQUARE, axes, store=store, workers=2)) == text(plain)
    told: list[tuple[int, int]] = []
    assert text(sweep("s", SQUARE, axes, store=store, progress=lambda done, of: told.append((done, of)))) == text(plain)
    assert told == [(21, 21)]  # nothing was computed again
    other = sweep("s", SQUARE, axes, {"seed": 1}, store=store)
    assert text(other) != text(plain) and other.config["seed"] == 1


def test_agreement_is_a_share_that_a_wrong_theory_lowers() -> None:
    x = tuple(np.linspace(0, 4, 41))
    side = sweep("s", SQUARE, {"x": x}).agreement(SQUARE.quantities[0])
    assert side is not None and side["share"] == 1.0 and side["cells"] == 41 - 1 and 0.5 <= side["chance"] < 0.6

    def wrong(config: Square) -> dict[str, dict[str, float]]:
        found = square(config)
        return {**found, "q": {**found["q"], "predicted": 8 - config.x**2}}

    upset = sweep("s", dataclasses.replace(SQUARE, cell=wrong), {"x": x}).agreement(SQUARE.quantities[0])
    assert upset is not None and upset["share"] == 0.0
    assert sweep("s", SQUARE).agreement(SQUARE.quantities[1]) is None


def test_a_worker_that_is_killed_costs_a_round_and_no_cell(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    found = sweep("s", SQUARE, {"x": tuple(range(8))}, {"kill": mark}, workers=2, store=str(tmp_path / "c.sqlite"))
    assert Path(mark).exists() and found.values("q", "predicted").tolist() == [float(k * k) for k in range(8)]


def test_an_error_of_the_cell_is_the_cells_and_what_was_done_is_kept(tmp_path: Path) -> None:
    store = Cells(tmp_path / "c.sqlite")
    origin = entries()["probabilistic-stability"].sweeps["origin"]
    with pytest.raises(InputError, match=r"at least one sample"):
        sweep("p", origin, {"S": (1, 0)}, {"replicas": 8, "steps": 10}, store=store)
    store.close()


def picky(config: Square) -> dict[str, dict[str, float]]:
    """Fails at x = 3, in its own words or in those of Python."""
    if config.x == 3.0:
        raise InputError("x is 3") if config.n == 1 else ZeroDivisionError("by x - 3")
    return square(config)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_arrived_before_an_error_is_kept_and_the_error_names_its_cell(tmp_path: Path, workers: int) -> None:
    store, axes = tmp_path / "c.sqlite", {"x": (0.0, 1.0, 2.0, 3.0)}
    with pytest.raises(InputError, match=r"the cell x 3.0, n 1, .*: x is 3"):
        sweep("s", dataclasses.replace(SQUARE, cell=picky), axes, store=str(store), workers=workers)
    if workers == 1:  # with two, the error may come first
        assert count(store) == 3
        with pytest.raises(RuntimeError, match=r"the cell x 3.0, n 2, .*ZeroDivisionError: by x - 3"):
            sweep("s", dataclasses.replace(SQUARE, cell=picky), axes, {"n": 2})


def test_two_that_fill_one_store_at_once_give_the_same_bytes(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    axes, store = {"x": tuple(np.linspace(0, 4, 200))}, str(tmp_path / "c.sqlite")
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: text(sweep("s", SQUARE, axes, store=store)), range(2)))
    assert found[0] == found[1] == text(sweep("s", SQUARE, axes)) and count(Path(store)) == 200


def test_a_full_disk_says_so_and_loses_nothing_that_was_kept(tmp_path: Path) -> None:
    store = Cells(tmp_path / "c.sqlite")
    store.put({"a": 1})
    store.connection.execute("PRAGMA max_page_count=4")
    with pytest.raises(InputError, match=r"c.sqlite cannot hold finished cells: database or disk is full"):
        store.put({"b": "x" * 100_000})
    assert store.get(["a", "b"]) == {"a": 1}
    store.close()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot hold finished cells"):
        Cells(tmp_path / "file" / "c.sqlite")


def test_other_versions_are_other_cells_and_a_worker_that_has_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here = runner_module.provenance()
    monkeypatch.setattr(runner_module, "_version", lambda name: "0.0" if name == "numba" else "1.0")
    without = runner_module.provenance.__wrapped__()
    monkeypatch.setattr(runner_module, "_version", lambda name: "absent" if name == "numba" else "1.0")
    assert len({here, without, runner_module.provenance.__wrapped__()}) == 3
    run = sweep_module._run
    monkeypatch.setattr(sweep_module, "_run", lambda cell, chunk: (run(cell, chunk)[0], without))
    with pytest.raises(InputError, match=r"a worker runs another"):
        sweep("s", SQUARE)


def test_cells_without_a_measurement_are_counted_against_the_theory() -> None:
    def lossy(config: Square) -> dict[str, dict[str, float]]:
        found = square(config)
        return {**found, "q": {**found["q"], "diverged": 7, **({"measured": float("nan")} if config.x == 1.0 else {})}}

    swept = sweep("s", dataclasses.replace(SQUARE, cell=lossy), {"x": (0.0, 1.0, 3.0, 4.0)})
    side = swept.agreement(SQUARE.quantities[0])
    assert side is not None and side["share"] == 0.75 and side["void"] == 1 and side["cells"] == 4
    assert swept.diverged == 28 and json.loads(text(swept))["diverged"] == 28


def test_axes_and_settings_are_read_or_refused() -> None:
    assert parse_axis("eta=0.1,0.2") == ("eta", (0.1, 0.2))
    assert parse_axis("eta=0:1:3") == ("eta", (0.0, 0.5, 1.0))
    assert parse_axis("eta=0.01:1:3:log")[1] == pytest.approx((0.01, 0.1, 1.0))
    assert parse_setting("n=3") == ("n", 3) and parse_setting("name=b") == ("name", "b")
    for bad in ("eta", "eta=", "=1", "eta=a", "eta=0:1:0", "eta=0:1:3:lin", "eta=1,nan"):
        with pytest.raises(InputError, match=r"cannot read"):
            parse_axis(bad)
    with pytest.raises(InputError, match=r"no field 'y'.*x \(now 1.0\)"):
        sweep("s", SQUARE, {"y": (1.0,)})
    with pytest.raises(InputError, match=r"n takes whole numbers, not 1.5"):
        sweep("s", SQUARE, {"n": (1.5,)})
    for never in ("NaN", "Infinity"):
        with pytest.raises(InputError, match=r"(x|n) takes finite numbers, not"):
            sweep("s", SQUARE, {"seed": (0, 1)}, dict([parse_setting(f"x={never}")]))
    with pytest.raises(InputError, match=r"name takes str"):
        sweep("s", SQUARE, {"n": (1,)}, {"name": 3})
    with pytest.raises(InputError, match=r"x is swept and set"):
        sweep("s", SQUARE, {"x": (1.0,)}, {"x": 1.0})
    with pytest.raises(InputError, match=r"say what to sweep.*x, n, seed"):
        sweep("s", dataclasses.replace(SQUARE, axes={}))
    with pytest.raises(InputError, match=r"backend 'slurm' is unknown"):
        sweep("s", SQUARE, backend="slurm")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"workers must be a positive"):
        sweep("s", SQUARE, workers=0)


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("these are notes, not cells\n" * 50)
    with pytest.raises(InputError, match=r"not a store of cells"):
        Cells(file)
    assert file.read_text().startswith("these are notes")


def test_what_a_paper_offers() -> None:
    origin = entries()["probabilistic-stability"]
    assert offered(origin) is origin.sweeps["origin"]
    with pytest.raises(InputError, match=r"its sweeps are origin"):
        offered(origin, "other")
    with pytest.raises(InputError, match=r"no sweep of its own.*--experiment: "):
        offered(entries()["three-mechanisms"])
    with pytest.raises(InputError, match=r"no experiment 'x'"):
        sweep_of(origin, "x")


def test_any_experiment_can_be_swept() -> None:
    swept = sweep_of(entries()["law-of-balance"], "law")
    found = sweep("law-of-balance", swept, {"eta": (0.02, 0.03)}, {"seeds": [0, 1, 2]})
    assert found.values("passed").tolist() == [1.0, 1.0] and (found.values("margin") < 1).all()
    with pytest.raises(InputError, match=r"seeds takes whole numbers, not 0.5"):
        sweep("law-of-balance", swept, {"eta": (0.02,)}, {"seeds": [0.5]})


def test_an_error_that_is_no_number_is_not_hidden_behind_one_that_is() -> None:
    checks = (match("fine", 1.0, 1.0, 0.1, source="s"), match("lost", 1.0, float("nan"), 0.1, source="s"))
    found = sweep_module._experiment_cell(lambda config: Part(checks), None)
    assert found["passed"]["measured"] == 0.5 and np.isnan(found["margin"]["measured"])


@pytest.mark.parametrize(("slug", "settings"), [("probabilistic-stability", {}), ("sgd-local-maxima", {})])
def test_the_measured_boundary_is_the_predicted_one(slug: str, settings: dict[str, Any]) -> None:
    swept = entries()[slug].sweeps[next(iter(entries()[slug].sweeps))]
    axes = {name: values[::4] for name, values in swept.axes.items()}
    found = sweep(slug, swept, axes, settings)
    for quantity in found.quantities:
        side = found.agreement(quantity)
        assert side is None or (side["share"] >= 0.97 and side["chance"] < 0.97), (quantity.name, side)


def test_the_closed_form_is_within_the_errors_of_every_cell() -> None:
    found = sweep(
        "probabilistic-stability", entries()["probabilistic-stability"].sweeps["origin"], {"eta": (0.1, 0.5, 1.5), "S": (1, 3)}, {"a": -0.4}
    )
    for name in ("plus", "minus"):
        z = (found.values(name) - found.values(name, "predicted")) / found.values(name, "stderr")
        assert float(np.abs(z).max()) < 5


def test_the_page_holds_a_map_with_the_boundary(tmp_path: Path) -> None:
    found = sweep("s", SQUARE, {"x": (1.0, 2.0, 3.0), "n": (1, 2)})
    written = page(tmp_path / "p.html", found).read_text()
    assert "x squared" in written and "on the predicted side" in written and "Plotly.newPlot" in written
    assert [f.draw.__name__ for f in found.figures()] == ["phase_diagram"] * 2
    assert [f.draw.__name__ for f in sweep("s", SQUARE).figures()] == ["curves"] * 2
    assert "JSON output" in page(tmp_path / "q.html", sweep("s", SQUARE, {"x": (1.0,), "n": (1,), "seed": (0, 1)})).read_text()


def test_the_command_line(tmp_path: Path) -> None:
    runner = CliRunner()
    common = ["sweep", "probabilistic-stability", "--over", "eta=0.2,0.6", "--set", "replicas=8", "--set", "steps=50"]
    kept = ["--store", str(tmp_path / "c.sqlite")]
    done = runner.invoke(app, [*common, *kept, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["axes"] == {"eta": [0.2, 0.6]}
    shown = runner.invoke(app, [*common, *kept, "--html", str(tmp_path / "p.html")])
    assert shown.exit_code == 0 and "Lambda_+" in shown.stdout and (tmp_path / "p.html").exists()
    for wrong, said in (
        (["sweep", "nothing"], "no paper 'nothing'"),
        (["sweep", "probabilistic-stability", "--over", "eta"], "cannot read 'eta'"),
        (["sweep", "probabilistic-stability", "--over", "lr=1", *kept], "no field 'lr'"),
        (["sweep", "probabilistic-stability", "--html", str(tmp_path / "no" / "p.html")], "Cannot write"),
    ):
        refused = runner.invoke(app, wrong)
        assert refused.exit_code == 2 and said in " ".join(refused.stderr.split()), refused.stderr


def test_a_killed_sweep_takes_up_where_it_was_and_gives_the_bytes_of_an_unkilled_one(tmp_path: Path) -> None:
    over = ["--over", "eta=0.05:3:14", "--over", "a=-0.9:0.9:14", "--set", "steps=4000", "--set", "replicas=128", "--json"]
    command = [sys.executable, "-m", "parasym.cli", "sweep", "probabilistic-stability", *over]
    store = tmp_path / "killed.sqlite"
    running = subprocess.Popen([*command, "--store", str(store)], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and running.poll() is None and count(store) < 20:
        time.sleep(0.05)
    running.kill()
    running.wait()
    before = rows(store)
    assert 20 <= len(before) < 196, "the sweep was not killed on its way"
    resumed = subprocess.run([*command, "--store", str(store)], env=ENVIRONMENT, capture_output=True, check=True)
    whole = subprocess.run([*command, "--store", str(tmp_path / "whole.sqlite")], env=ENVIRONMENT, capture_output=True, check=True)
    assert resumed.stdout == whole.stdout
    after = rows(store)
    assert len(after) == 196 and all(after[key] == value for key, value in before.items())


def rows(store: Path) -> dict[str, str]:
    connection = sqlite3.connect(store)
    try:
        return dict(connection.execute("SELECT key, content FROM cells"))
    finally:
        connection.close()


def count(store: Path) -> int:
    try:
        return len(rows(store))
    except sqlite3.OperationalError:
        return 0


def test_dask_gives_the_same_bytes() -> None:
    pytest.importorskip("distributed")
    axes = {"x": tuple(np.linspace(0, 4, 6))}
    assert text(sweep("s", SQUARE, axes, workers=2, backend="dask")) == text(sweep("s", SQUARE, axes))


@pytest.mark.slow
def test_a_ray_cluster_of_two_nodes_with_a_worker_killed_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes with a processor each; one worker is killed by its own cell."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    here = str(Path(__file__).resolve().parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ENVIRONMENT["PYTHONPATH"], here]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        assert sum(node["Alive"] for node in ray.nodes()) == 2
        mark = str(tmp_path / "mark")
        axes = {"x": tuple(float(k) for k in range(12))}
        found = sweep("s", SQUARE, axes, {"kill": mark}, workers=2, backend="ray", store=str(tmp_path / "c.sqlite"))
        assert Path(mark).exists()
        assert text(found) == text(sweep("s", SQUARE, axes, {"kill": mark}))
    finally:
        ray.shutdown()
        cluster.shutdown()
