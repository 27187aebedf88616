"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import importlib
import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from audit_contract import audit_of_gpt
from parasym.cli import app
from parasym.core.errors import TraceError

runner = CliRunner(env={"COLUMNS": "160"})
NET = "import torch\ndef build():\n    return torch.nn.Linear(2, 2), (torch.zeros(1, 2),)\ndef bare():\n    return torch.nn.Linear(2, 2)\n"


@dataclass
class FakeAudit:
    """What `parasym.audit.audit` returns, as far as the command line sees it."""

    found: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.found

    def to_html(self, path: Path) -> None:
        Path(path).write_text("<html>page</html>")


class Room:
    """Stands in for the module parasym.audit and remembers how it was called."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = audit_of_gpt()
        self.error: Exception | None = None
        self.called: dict[str, Any] = {}

    def audit(self, model: Any, **options: Any) -> FakeAudit:
        self.called = {"model": model, **options}
        options["progress"]("tracing", 0.5)
        if self.error:
            raise self.error
        return FakeAudit(self.found)


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    fake, module = Room(), types.ModuleType("parasym.audit")
    module.audit = fake.audit  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "parasym.audit", module)
    return fake


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return f"{tmp_path / 'net.py'}:build"


def test_audit_prints_what_a_person_needs(room: Room, net: str) -> None:
    result = runner.invoke(app, ["audit", net, "--seed", "7", "--completeness", "none"])
    assert result.exit_code == 0, result.output
    for part in (
        "GPT2LMHeadModel",
        "210,432 parameters",
        "QK GL(16) per head ×3",
        "transformer.h.{0-2}.attn",
        "100 %",
        "dead",
        "3 of 256",
        "$ parasym fix revive",
        "eps of the norms",
    ):
        assert part in result.stdout, part
    assert (room.called["seed"], room.called["completeness"]) == (7, "none")
    assert room.called["args"][0].shape == (1, 2)


def test_open_ends_exit_with_one(room: Room, net: str) -> None:
    room.found = audit_of_gpt(complete=False)
    result = runner.invoke(app, ["audit", net])
    assert result.exit_code == 1
    for part in ("Open:", "could not be decided", "sign flips of q", "the operator has no derivative"):
        assert part in result.stdout
    room.found = audit_of_gpt()
    room.found["symmetries"][0]["certified"] = False
    assert runner.invoke(app, ["audit", net]).exit_code == 1


def test_json_is_alone_on_stdout_and_strict(room: Room, net: str, tmp_path: Path) -> None:
    room.found["symmetries"][0]["residual"] = float("nan")
    room.found["completeness"]["gap"] = (float("inf"), 0.0)
    result = runner.invoke(app, ["audit", net, "--json", "--html", str(tmp_path / "out.html")])
    found = json.loads(result.stdout)
    assert found["symmetries"][0]["residual"] is None
    assert found["completeness"]["gap"] == [None, 0.0]
    assert "report:" in result.stderr
    assert (tmp_path / "out.html").exists()


def test_names_with_markup_are_printed_as_they_are(room: Room, net: str) -> None:
    room.found["symmetries"][0].update(name="[bold]x[/bold][0]", where="")
    assert "[bold]x[/bold][0]" in runner.invoke(app, ["audit", net]).stdout


def test_absent_completeness_and_empty_audit(room: Room, net: str) -> None:
    room.found.update(
        symmetries=[],
        collapse=[],
        advice=[],
        approximate=[],
        completeness={"nullity": None, "explained": None, "rank": None, "parameters": 4, "exact": False},
    )
    result = runner.invoke(app, ["audit", net, "--completeness", "none"])
    assert result.exit_code == 0
    assert "No symmetries were found" in result.stdout
    assert "not counted" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["audit"], 2, "Missing argument"),
        (["audit", "nowhere.py:f"], 2, "nowhere.py"),
        (["audit", "{net}", "--completeness", "perhaps"], 2, "perhaps"),
        (["audit", "{bare}"], 2, "missing a required argument"),
        (["audit", "{net}", "--weights", "absent.pt"], 3, "absent.pt"),
        (["audit", "w.safetensors"], 2, "--model"),
        (["audit", "{net}", "--html", "no/such/folder/x.html"], 2, "does not exist"),
    ],
)
def test_bad_input_is_one_paragraph(room: Room, net: str, arguments: list[str], code: int, says: str) -> None:
    result = runner.invoke(app, [part.format(net=net, bare=net.replace(":build", ":bare")) for part in arguments])
    assert result.exit_code == code, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_refused_weights(room: Room, net: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, tmp_path / "w.pt")
    result = runner.invoke(app, ["audit", net, "--weights", str(tmp_path / "w.pt")])
    assert result.exit_code == 3
    assert "weight: file (2, 3), model (2, 2)" in result.stderr
    assert not room.called


def test_errors_of_the_audit(room: Room, net: str) -> None:
    room.error = TraceError("forward branches on data at net.py:3. Use torch.where.")
    result = runner.invoke(app, ["audit", net])
    assert (result.exit_code, result.stderr) == (2, "error: forward branches on data at net.py:3. Use torch.where.\n")
    room.error = ZeroDivisionError("division by zero")
    result = runner.invoke(app, ["audit", net])
    assert result.exit_code == 4
    assert "ZeroDivisionError" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.output
    assert "Traceback" in runner.invoke(app, ["audit", net, "--debug"]).stderr
    room.error = KeyboardInterrupt()  # type: ignore[assignment]
    assert runner.invoke(app, ["audit", net]).exit_code == 130


def test_help_teaches() -> None:
    for arguments in (["--help"], ["audit", "--help"], ["gallery", "--help"]):
        result = runner.invoke(app, arguments, env={"COLUMNS": "140"})
        assert result.exit_code == 0
        assert "Exit codes" in result.stdout
    assert "hf:GPT2Config?n_layer=2" in runner.invoke(app, ["audit", "--help"], env={"COLUMNS": "140"}).stdout
    assert runner.invoke(app, ["--version"]).stdout.startswith("parasym 0.")


@dataclass
class FakeCheck:
    claim: str = "Q decays as exp(-2 eta gamma t)"
    predicted: tuple[float, ...] = (0.5,)
    measured: tuple[float, ...] = (0.5001,)
    error: float = 1e-4
    tolerance: float = 1e-3
    passed: bool = True
    kind: str = "match"
    relation: str = "="


@dataclass
class FakeResult:
    slug: str
    preset: str
    checks: tuple[FakeCheck, ...]
    seconds: float = 0.1

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"slug": self.slug, "passed": self.passed, "checks": [vars(check) for check in self.checks]}


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("parasym.gallery")
    entry = types.SimpleNamespace(slug="spred", title="spred", paper="Ziyin 2023", claims=("redundant parameters are L1",))
    fakes: dict[str, Any] = {
        "entries": lambda: {"spred": entry},
        "run": lambda slug, preset, store=None, jobs=1: FakeResult(
            slug, preset, (FakeCheck(), FakeCheck(claim="fails at full", passed=preset != "full"))
        ),
        "report": lambda outdir, results: Path(outdir) / "index.html",
    }
    vars(module).update(fakes)
    monkeypatch.setitem(sys.modules, "parasym.gallery", module)
    return module


def test_gallery(papers: types.ModuleType, tmp_path: Path) -> None:
    assert "redundant parameters are L1" in runner.invoke(app, ["gallery", "list"]).stdout
    assert json.loads(runner.invoke(app, ["gallery", "list", "--json"]).stdout)[0]["slug"] == "spred"
    result = runner.invoke(app, ["gallery", "run", "spred"])
    assert result.exit_code == 0, result.output
    assert "2 of 2 checks passed" in result.stdout
    result = runner.invoke(app, ["gallery", "run", "spred", "--preset", "full", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
    result = runner.invoke(app, ["gallery", "run", "spread"])
    assert (result.exit_code, result.stderr) == (2, "error: The gallery has no paper 'spread'. It has: spred.\n")
    assert "pass  spred  2/2" in runner.invoke(app, ["gallery", "report", str(tmp_path)]).stdout
    assert runner.invoke(app, ["gallery", "report", str(tmp_path), "spred", "--preset", "full"]).exit_code == 1


GPT = "hf:GPT2Config?n_layer=1&n_embd=8&n_head=2&vocab_size=11&n_positions=6"


def test_an_architecture_too_large_for_memory_is_audited_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("parasym.core.load._memory", lambda: 1000.0)
    result = runner.invoke(app, ["audit", GPT, "--json"])
    assert result.exit_code == 0, result.stderr
    assert "architecture without weights" in result.stderr
    found = json.loads(result.stdout)
    assert found["completeness"]["explained"] == 1.0 and found["collapse"] == []
    assert "the architecture alone" in found["model"]["inputs"]
    weights = tmp_path / "w.safetensors"
    for command in (["audit", GPT, "--weights", str(weights)], ["fix", GPT, "--method", "balance", "--out", str(weights)]):
        refused = runner.invoke(app, command)
        assert refused.exit_code not in (0, 1) and "too large to be held here" in refused.stderr


def test_an_architecture_that_fits_has_its_weights() -> None:
    pytest.importorskip("transformers")
    loaded = importlib.import_module("parasym.core.load").load_target(GPT)
    assert not loaded.hollow
