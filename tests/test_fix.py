"""`parasym fix` and the audit's advice: remedies from the command line, certified and written whole or not at all."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import parasym
import parasym.methods
from parasym.cli import app
from parasym.core.load import load_target
from parasym.methods.fix import METHODS, WITH_LOSS, Wish, check, fix, write

runner = CliRunner(env={"COLUMNS": "160"})
NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)).to(torch.float64)
    with torch.no_grad():
        m[0].weight[5] *= 30
    return m, (torch.randn(16, 5, dtype=torch.float64),)

def sick():
    m, args = build()
    with torch.no_grad():
        m[0].weight[2], m[0].bias[2] = 0, 0
        m[0].weight[7], m[0].bias[7] = m[0].weight[4], m[0].bias[4]
    return m, args

def small():
    m, args = build()
    return nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 9), nn.ReLU(), nn.Linear(9, 3)).to(torch.float64), args

def tied():
    m = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.Linear(6, 2))
    m[2].weight = m[0].weight
    return m, (torch.randn(8, 6),)

def broken():
    m, args = build()
    with torch.no_grad():
        m[0].weight[0, 0] = float("nan")
    return m, args

def loss_and_data():
    m, (x,) = build()
    return nn.functional.mse_loss, (x, m(x).detach() + torch.randn(16, 3, dtype=torch.float64))

def half():
    return nn.functional.mse_loss

def bare():
    return nn.Linear(2, 2)

def parametrized():
    m, args = build()
    nn.utils.parametrizations.weight_norm(m[0])
    return m, args
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return str(tmp_path / "net.py")


def run(*words: str) -> tuple[int, str, str]:
    done = runner.invoke(app, ["fix", *words])
    return done.exit_code, done.stdout, done.stderr


def outputs(target: str, weights: Path | None = None) -> Tensor:
    loaded = load_target(target, weights)
    with torch.no_grad():
        return loaded.model(*loaded.args)


@pytest.mark.parametrize("words", [["balance"], ["teleport", "--to", "minimum-norm"], ["teleport", "--to", "int8"]])
def test_a_move_is_written_and_changes_nothing_but_the_weights(net: str, tmp_path: Path, words: list[str]) -> None:
    out = tmp_path / "new.safetensors"
    code, shown, _ = run(f"{net}:build", "--method", *words, "--out", str(out))
    assert code == 0 and "certificate" in shown and "holds" in shown and str(out) in shown.replace("\n", "")
    before, after = outputs(f"{net}:build"), outputs(f"{net}:build", out)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-12
    old = load_target(f"{net}:build").model.state_dict()
    assert any(not torch.equal(v, old[n]) for n, v in load_file(out).items())
    with safe_open(out, "pt") as f:
        assert json.loads(f.metadata()["parasym"])["certificate"]["status"] == "ok"


@pytest.mark.parametrize("to", ["sharpness", "noise-equilibrium"])
def test_aims_that_need_a_loss_take_it_from_a_function(net: str, tmp_path: Path, to: str) -> None:
    out = tmp_path / "new.safetensors"
    words = ["--method", "teleport", "--to", to, "--data", f"{net}:loss_and_data", "--out", str(out), "--json"]
    code, shown, _ = run(f"{net}:build", *words, *(["--batch-size", "4"] if to == "noise-equilibrium" else []))
    found = json.loads(shown)["summary"]
    assert code == 0 and found["after"] < 0.99 * found["before"]
    before, after = outputs(f"{net}:build"), outputs(f"{net}:build", out)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-12


def test_agreement_with_another_checkpoint(net: str, tmp_path: Path) -> None:
    a, b, out = (tmp_path / f"{n}.safetensors" for n in "abc")
    state = load_target(f"{net}:build").model.state_dict()
    save_file(state, a)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    moved = {"0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order], "2.weight": state["2.weight"][:, order]}
    save_file({**state, **{n: v.contiguous() for n, v in moved.items()}}, b)
    code, shown, _ = run(
        f"{net}:build", "--weights", str(b), "--method", "teleport", "--to", "agreement", "--reference", str(a), "--out", str(out), "--json"
    )
    assert code == 0 and json.loads(shown)["summary"]["after"] < 1e-6
    assert all(torch.allclose(v, state[n]) for n, v in load_file(out).items())


def test_compress_writes_the_smaller_network_and_says_its_sizes(net: str, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    code, shown, said = run(f"{net}:sick", "--method", "compress", "--out", str(out))
    assert code == 0 and "removed" in shown and "0.out_features = 10" in said.replace("\n", " ")
    before, after = outputs(f"{net}:sick"), outputs(f"{net}:small", out)
    assert float((before - after).abs().max() / before.abs().max()) < 1e-12


def test_prune_and_revive(net: str, tmp_path: Path) -> None:
    out = tmp_path / "sparse.safetensors"
    assert run(f"{net}:build", "--method", "prune", "--keep", "0.25", "--out", str(out))[0] == 0
    weights = [v for v in load_file(out).values() if v.dim() > 1]
    assert sum(int((w != 0).sum()) for w in weights) == pytest.approx(0.25 * sum(w.numel() for w in weights), abs=1)
    out = tmp_path / "alive.safetensors"
    code, shown, _ = run(f"{net}:sick", "--method", "revive", "--out", str(out))
    assert code == 0 and "revived" in shown and bool(load_file(out)["0.weight"][2].any())
    assert torch.allclose(outputs(f"{net}:sick"), outputs(f"{net}:sick", out), rtol=1e-12, atol=1e-14)


def test_tied_weights_are_written_once_and_load(net: str, tmp_path: Path) -> None:
    out = tmp_path / "tied.safetensors"
    assert run(f"{net}:tied", "--method", "teleport", "--to", "minimum-norm", "--out", str(out))[0] == 0
    assert load_target(f"{net}:tied", out).model[0].weight is not None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "teleport"], "--to"),
        (["--method", "teleport", "--to", "flatness"], "Aims"),
        (["--method", "teleport", "--to", "sharpness"], "--data FILE.py:FUNCTION"),
        (["--method", "sharpness"], "--method teleport --to sharpness --data"),
        (["--method", "noise-equilibrium"], "--batch-size N"),
        (["--method", "teleport", "--to", "noise-equilibrium", "--data", "x.py:f"], "--batch-size N"),
        (["--method", "teleport", "--to", "balance", "--data", "x.py:f"], "nothing else here reads a loss"),
        (["--method", "teleport", "--to", "sharpness", "--data", "x.py:f"], "No file at x.py"),
        (["--method", "teleport", "--to", "sharpness", "--data", "NET:half"], "returned (function)"),
        (["--method", "teleport", "--to", "agreement"], "--reference"),
        (["--method", "balance", "--to", "int8"], "belongs to"),
        (["--method", "balance", "--keep", "0.1"], "belongs to"),
        (["--method", "prune"], "--keep"),
        (["--method", "prune", "--keep", "7.5"], "keep"),
        (["--method", "prune", "--keep", "0.5", "--score", "snip"], "needs a loss"),
        (["--method", "balance", "--trust-inputs"], "belongs to"),
        (["--method", "polish"], "polish"),
        (["--method", "syre"], "attach(optimizer)"),
        (["--method", "spred"], "training script"),
        (["--method", "teleport", "--to", "noise-equilibrium"], "loss_fn(outputs, targets)"),
        (["--method", "prune", "--keep", "0.5", "--score", "grasp"], "loss=lambda out"),
        (["--method", "balance", "--score", "entropy"], "Scores"),
    ],
)
def test_bad_commands_exit_with_2_and_teach(net: str, tmp_path: Path, words: list[str], says: str) -> None:
    out = tmp_path / "x.safetensors"
    code, _, said = run(f"{net}:build", *(w.replace("NET", net) for w in words), "--out", str(out))
    assert code == 2 and says in said.replace("\n", " ") and not out.exists()


@pytest.mark.parametrize(
    ("name", "says"), [("broken", "not finite"), ("bare", "inputs"), ("nothing", "nothing"), ("parametrized", "parametriz")]
)
def test_bad_models_exit_with_2_and_write_nothing(net: str, tmp_path: Path, name: str, says: str) -> None:
    out = tmp_path / "x.safetensors"
    code, _, said = run(f"{net}:{name}", "--method", "balance", "--out", str(out))
    assert code == 2 and says in said.replace("\n", " ") and not out.exists() and not list(tmp_path.glob("*.part"))


def test_files_are_not_lost(net: str, tmp_path: Path) -> None:
    out = tmp_path / "mine.safetensors"
    out.write_bytes(b"precious")
    code, _, said = run(f"{net}:build", "--method", "balance", "--out", str(out))
    assert code == 2 and "--force" in said and out.read_bytes() == b"precious"
    assert run(f"{net}:build", "--method", "balance", "--out", str(tmp_path / "mine.bin"))[0] == 2
    assert run(f"{net}:build", "--method", "balance", "--out", str(tmp_path / "no" / "x.safetensors"))[0] == 2
    assert run(f"{net}:build", "--method", "balance", "--out", str(out), "--force")[0] == 0


def test_weights_that_do_not_fit_exit_with_3(net: str, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"0.weight": torch.zeros(2, 2)}, other)
    code, _, _ = run(f"{net}:build", "--weights", str(other), "--method", "balance", "--out", str(tmp_path / "x.safetensors"))
    assert code == 3


def test_a_certificate_that_does_not_hold_writes_nothing(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import parasym.methods.fix as room
    from parasym.core.results import Estimate
    from parasym.methods.edit import Edit

    def wrong(model: nn.Module, *args: object, **options: object) -> Edit:
        return Edit(
            "teleport", model, {"0.weight": model.get_parameter("0.weight") * 2}, Estimate(0.5, status="violated", note="they differ")
        )

    monkeypatch.setattr(room, "teleport", wrong)
    out = tmp_path / "x.safetensors"
    code, shown, _ = run(f"{net}:build", "--method", "balance", "--out", str(out))
    assert code == 1 and "DOES NOT HOLD" in shown and not out.exists()


@pytest.mark.parametrize("words", [["balance"], ["compress"], ["revive"]])
def test_a_program_gives_weights_for_the_network_it_was_made_from(net: str, tmp_path: Path, words: list[str]) -> None:
    loaded, program, out = load_target(f"{net}:sick"), tmp_path / "net.pt2", tmp_path / "x.safetensors"
    torch.export.save(torch.export.export(loaded.model, loaded.args), program)
    code, _, _ = run(str(program), "--method", *words, "--out", str(out))
    new = load_file(out)
    assert code == 0 and new["0.weight"].shape == ((10, 5) if words == ["compress"] else (12, 5))
    if words == ["compress"]:
        loaded.model[0], loaded.model[2] = nn.Linear(5, 10).double(), nn.Linear(10, 9).double()
    loaded.model.load_state_dict(new)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(*loaded.args), outputs(f"{net}:sick"), atol=1e-12, rtol=0)
    assert not torch.equal(new["2.weight"], load_target(f"{net}:sick").model[2].weight)


def test_help_teaches_every_method_and_says_what_needs_data() -> None:
    shown = " ".join(runner.invoke(app, ["fix", "--help"]).output.split())
    assert all(name in shown for name in METHODS) and "--to" in shown and "Exit codes" in shown
    assert all(
        name in shown
        for name in (
            "sharpness",
            "noise-equilibrium",
            "syre",
            "dcs",
            "spred",
            ".pt2",
            "a loss and its data",
            "inputs like those in training",
        )
    )


def test_what_needs_a_loss_works_as_it_is_printed(net: str, tmp_path: Path) -> None:
    """The Python lines of the error messages, run: each gives a certified edit."""
    loaded = load_target(f"{net}:build")
    target = loaded.model(*loaded.args).detach() + 0.1 * torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    known = {"parasym": parasym, "model": loaded.model, "args": loaded.args, "y": target, "loss_fn": nn.functional.mse_loss}
    for name, line in WITH_LOSS.items():
        assert eval(line.split(" in Python")[0], known).certificate.ok, name
    assert set(WITH_LOSS) == {"snip", "grasp"}


def test_revive_trusts_the_examples_only_when_told(net: str, tmp_path: Path) -> None:
    """A unit that only the examples leave off is no business of a command whose examples may be anything."""
    folder = Path(net).parent
    (folder / "shy.py").write_text(
        NET + "\ndef shy():\n    m, args = build()\n    with torch.no_grad():\n        m[0].bias[3] = -12\n    return m, args\n"
    )
    old = load_target(f"{folder / 'shy.py'}:shy").model
    for words, reset in (([], False), (["--trust-inputs"], True)):
        out = tmp_path / f"{len(words)}.safetensors"
        code, shown, said = run(f"{folder / 'shy.py'}:shy", "--method", "revive", *words, "--out", str(out))
        assert code == 0, said
        assert torch.equal(load_file(out)["0.bias"][3], old[0].bias[3]) != reset, shown


@pytest.mark.slow
def test_the_commands_of_an_audit_work_as_they_are_printed(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(runner.invoke(app, ["audit", f"{net}:sick", "--json"]).stdout)
    advised = {row["method"]: row["command"] for row in found["advice"] if row["method"]}
    assert {"compress", "balance"} <= set(advised)
    for method, command in advised.items():
        words = shlex.split(command)
        assert words[:2] == ["parasym", "fix"]
        assert runner.invoke(app, [*words[1:], "--force"]).exit_code == 0
        if method == "balance":
            again = json.loads(runner.invoke(app, ["audit", f"{net}:sick", "--weights", "fixed.safetensors", "--json"]).stdout)
            assert not [row for row in again["collapse"] if row["kind"] == "imbalance"]
        else:
            assert load_file("fixed.safetensors")["0.weight"].shape[0] < 12 or method == "revive"


def test_in_python(net: str, tmp_path: Path) -> None:
    loaded = load_target(f"{net}:build")
    check(Wish("balance"))
    fixed = fix(loaded, Wish("balance"))
    assert fixed.ok and fixed.changed and write(fixed, tmp_path / "a.safetensors").exists()
