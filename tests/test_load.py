"""Targets and weights files: what loads, what is refused, and that nothing hostile runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from parasym.core.checkpoint import load_exported, load_weights
from parasym.core.errors import CheckpointError, InputError, MissingExtraError
from parasym.core.load import check_safetensors_header, load_target, require_inputs

NET = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))

def with_args():
    return build(), (torch.zeros(5, 3),)

def with_kwargs():
    return build(), (), {"input": torch.zeros(5, 3)}

def broken():
    raise RuntimeError("no such data")

number = 7
wrong = lambda: 3
ready = build()
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NET)
    return str(tmp_path / "net.py")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


class Bomb:
    """A pickle that creates a file when it is executed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


# -- Python targets ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "args", "kwargs"), [("build", 0, 0), ("with_args", 1, 0), ("with_kwargs", 0, 1), ("ready", 0, 0)])
def test_python_file(net: str, name: str, args: int, kwargs: int) -> None:
    loaded = load_target(f"{net}:{name}")
    assert isinstance(loaded.model, nn.Sequential)
    assert (len(loaded.args), len(loaded.kwargs), loaded.name) == (args, kwargs, "Sequential")


def test_dotted_module() -> None:
    assert isinstance(load_target("torch.nn:Identity").model, nn.Identity)


@pytest.mark.parametrize(
    ("suffix", "says"),
    [
        (":bild", "Did you mean build"),
        (":broken", "no such data"),
        (":number", "must be a callable"),
        (":wrong", "must return a model"),
        ("", "Write .*net.py:callable"),
    ],
)
def test_python_errors(net: str, suffix: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load_target(net + suffix)


@pytest.mark.parametrize("target", ["nowhere.py:f", "no.such.module:f", "nothing"])
def test_missing_targets(target: str) -> None:
    with pytest.raises(InputError, match=target.split(":")[0]):
        load_target(target)


# -- weights ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights_are_copied_in(net: str, tmp_path: Path, suffix: str) -> None:
    state = {name: torch.full_like(value, 2.0) for name, value in mlp().state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    loaded = load_target(f"{net}:build", weights=path)
    assert all((value == 2.0).all() for value in loaded.model.state_dict().values())
    assert all((value == 2.0).all() for value in load_target(str(path), model=f"{net}:build").model.state_dict().values())


def test_weights_target_needs_model(net: str, tmp_path: Path) -> None:
    save_file(mlp().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="--model"):
        load_target(str(tmp_path / "w.safetensors"))
    with pytest.raises(InputError, match="--model"):
        load_target(f"{net}:build", model=f"{net}:build")


def test_misfits_are_listed_and_change_nothing(tmp_path: Path, net: str) -> None:
    state = mlp().state_dict()
    state["extra"] = torch.zeros(1)
    del state["0.bias"]
    state["2.weight"] = torch.zeros(2, 9)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_target(f"{net}:ready", weights=tmp_path / "w.safetensors")
    for part in ("1 missing: 0.bias", "1 unexpected: extra", "2.weight: file (2, 9), model (2, 4)"):
        assert part in str(caught.value)


def test_tied_weights_may_be_stored_once(tmp_path: Path) -> None:
    (tmp_path / "tied.py").write_text(
        "from torch import nn\ndef f():\n m = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))\n m[1].weight = m[0].weight\n return m\n"
    )
    state = {"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3), "1.bias": torch.ones(3)}
    save_file(state, tmp_path / "w.safetensors")
    model = load_target(f"{tmp_path / 'tied.py'}:f", weights=tmp_path / "w.safetensors").model
    assert (model[1].weight == 1).all()


def test_nan_weights_pass(net: str, tmp_path: Path) -> None:
    save_file({name: torch.full_like(value, torch.nan) for name, value in mlp().state_dict().items()}, tmp_path / "w.safetensors")
    assert load_target(f"{net}:build", weights=tmp_path / "w.safetensors").model[0].weight.isnan().all()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("wrapped", [False, True])
def test_hostile_pickle_never_runs(tmp_path: Path, net: str, protocol: int, wrapped: bool) -> None:
    marker, path = tmp_path / "executed", tmp_path / "w.pt"
    payload = {"0.weight": torch.zeros(4, 3), "x": Bomb(marker)}
    if wrapped:
        torch.save(payload, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(payload, protocol))
    with pytest.raises(CheckpointError, match=r"w\.pt.*safetensors"):
        load_target(f"{net}:build", weights=path)
    assert not marker.exists()
    with path.open("rb") as file:  # the payload is live: the free unpickler runs it
        torch.load(file, weights_only=False) if wrapped else pickle.load(file)
    assert marker.exists()


def test_torch_files_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"garbage")
    (tmp_path / "d.pt").write_bytes(b"")
    for name, says in (("a", "no tensors"), ("b", "list"), ("c", "c.pt"), ("d", "damaged"), ("e", "No weights file")):
        with pytest.raises(CheckpointError, match=says):
            load_weights(tmp_path / f"{name}.pt")


# -- safetensors headers ------------------------------------------------------------------------------------------------------------


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS = {
    "empty": (b"", "0 bytes"),
    "short": (b"\x00\x01", "2 bytes"),
    "absurd": (raw({}, length=2**62), "its header has"),
    "longer-than-file": (raw({}, length=500), "its header has 500"),
    "not-json": (raw(b"{nope"), "not JSON"),
    "not-utf8": (raw(b"\xff\xfe{}"), "not JSON"),
    "nested": (raw(b"[" * 50_000), "not JSON"),
    "list": (raw([1]), "not a JSON object"),
    "twins": (raw(b'{"a": {}, "a": {}}'), "twice"),
    "no-shape": (raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}), "lacks"),
    "bad-dtype": (raw({"a": entry(0, 4, [1], "F99")}, b"0000"), "F99"),
    "negative": (raw({"a": entry(0, 4, [-1])}, b"0000"), "-1"),
    "fraction": (raw({"a": entry(0, 4, [1.0])}, b"0000"), "1.0"),  # type: ignore[list-item]
    "size": (raw({"a": entry(0, 4, [2])}, b"0000"), "cannot lie"),
    "overflow": (raw({"a": entry(0, 4, [2**62, 4])}, b"0000"), "cannot lie"),
    "overlap": (raw({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"0" * 12), "overlap"),
    "gap": (raw({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"0" * 12), "gap"),
    "trailing": (raw({"a": entry(0, 4, [1])}, b"0" * 9), "left over"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(tmp_path: Path, case: str) -> None:
    data, says = BAD_HEADERS[case]
    (tmp_path / "w.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=says):
        check_safetensors_header(tmp_path / "w.safetensors")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file(mlp().state_dict(), tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    for cut in (1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1):
        (tmp_path / "w.safetensors").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            load_weights(tmp_path / "w.safetensors")


def test_every_changed_byte_of_a_header_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}, path)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for position in range(end):
        for byte in (0, ord("9"), ord('"'), ord("}"), 255):
            path.write_bytes(whole[:position] + bytes([byte]) + whole[position + 1 :])
            try:
                check_safetensors_header(path)
            except CheckpointError:
                refused += 1
            else:
                load_weights(path)
    assert refused > 2 * end


def test_good_header(tmp_path: Path) -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(0, 3, dtype=torch.bfloat16), "c": torch.zeros((), dtype=torch.int64)}
    save_file(state, tmp_path / "w.safetensors", metadata={"format": "pt"})
    header = check_safetensors_header(tmp_path / "w.safetensors")
    assert {name: info["shape"] for name, info in header.items()} == {"a": [2, 3], "b": [0, 3], "c": []}


# -- exported programs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def archive() -> bytes:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(mlp(), (torch.randn(5, 3),), dynamic_shapes=({0: batch},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def rewrite(archive: bytes, path: Path, change: Callable[[str, bytes], bytes | None], extra: dict[str, bytes] | None = None) -> Path:
    """Copy an archive with members changed, dropped (None) or added."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(path, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            data = change(name.partition("/")[2], old.read(name))
            if data is not None:
                new.writestr(name, data)
        for name, data in (extra or {}).items():
            new.writestr(f"{root}/{name}", data)
    return path


def test_exported_program(tmp_path: Path, archive: bytes) -> None:
    (tmp_path / "net.pt2").write_bytes(archive)
    loaded = load_target(str(tmp_path / "net.pt2"))
    assert loaded.name == "net"
    assert loaded.args[0].shape == (5, 3)
    assert loaded.model(*loaded.args).shape == (5, 2)
    require_inputs(loaded)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.ops.aten.relu.default", "torch.os.system"),
        ("torch.ops.aten.relu.default", "torch.ops.load_library"),
        ("torch.ops.aten.relu.default", "torch.ops.aten.__class__.__init__"),
        ("torch.ops.aten.relu.default", "torch.ops.aten.relu.__init__"),
        ("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default"),
        ("torch.ops.aten.relu.default", "_operator.attrgetter"),
        ('"name": "relu"', '"name": "relu; import os"'),
        ('"expr_str": "Symbol', '"expr_str": "exec(chr(49)) + Symbol'),
        ('"guards_code": []', '"guards_code": ["__import__(1)"]'),
    ],
)
def test_altered_programs_are_refused(tmp_path: Path, archive: bytes, old: str, new: str) -> None:
    def change(name: str, data: bytes) -> bytes:
        if not name.startswith("models/"):
            return data
        assert old.encode() in data
        return data.replace(old.encode(), new.encode())

    with pytest.raises(CheckpointError, match="altered"):
        load_exported(rewrite(archive, tmp_path / "net.pt2", change))


def test_programs_of_real_architectures_pass(tmp_path: Path) -> None:
    """The check on operators and expressions refuses nothing that torch.export writes for a language model of any batch size."""
    pytest.importorskip("transformers")
    model, kwargs = load_target(GPT).model, load_target(GPT).kwargs
    batch = {"input_ids": {0: torch.export.Dim("batch", min=2, max=64)}}
    torch.export.save(torch.export.export(model, (), kwargs, dynamic_shapes=batch, strict=False), tmp_path / "gpt.pt2")
    loaded = load_target(str(tmp_path / "gpt.pt2"))
    tokens = loaded.kwargs["input_ids"][:3]
    torch.testing.assert_close(loaded.model(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_exported_pickles_never_run(tmp_path: Path, archive: bytes) -> None:
    marker, buffer = tmp_path / "executed", io.BytesIO()
    torch.save((Bomb(marker),), buffer)
    for data in (buffer.getvalue(), pickle.dumps((Bomb(marker),), 0)):
        path = rewrite(archive, tmp_path / "net.pt2", lambda name, old, new=data: new if name.startswith("data/sample_inputs") else old)
        with pytest.raises(CheckpointError, match=r"net\.pt2"):
            load_exported(path)
        assert not marker.exists()
    for name in ("data/aotinductor/model/x.so", "data/constants/custom_obj_0", "data/constants/opaque_obj_0"):
        with pytest.raises(CheckpointError, match="compiled code or opaque"):
            load_exported(rewrite(archive, tmp_path / "net.pt2", lambda _, old: old, {name: b"x"}))


def test_damaged_archives(tmp_path: Path, archive: bytes) -> None:
    (tmp_path / "net.pt2").write_bytes(archive[: len(archive) // 2])
    with pytest.raises(CheckpointError, match="whole"):
        load_exported(tmp_path / "net.pt2")
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_exported(rewrite(archive, tmp_path / "net.pt2", lambda name, old: None if "weights_config" in name else old))
    with pytest.raises(CheckpointError, match="No exported program"):
        load_exported(tmp_path / "none.pt2")


# -- Transformers -------------------------------------------------------------------------------------------------------------------

GPT = "hf:GPT2Config?n_layer=1&n_embd=8&n_head=2&vocab_size=11&n_positions=6"


def test_config_target_builds_the_language_model_and_keeps_the_rng() -> None:
    pytest.importorskip("transformers")
    state = torch.get_rng_state()
    loaded = load_target(GPT)
    assert torch.equal(state, torch.get_rng_state())
    assert loaded.name == "GPT2LMHeadModel"
    assert loaded.kwargs["input_ids"].shape == (4, 6)
    assert loaded.model(**loaded.kwargs).logits.shape == (4, 6, 11)
    again = load_target(GPT).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("target", "key"),
    [
        ("hf:BertModel?num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=8&vocab_size=12", "input_ids"),
        (
            "hf:ViTConfig?num_hidden_layers=1&hidden_size=8&num_attention_heads=2&intermediate_size=8&image_size=8&patch_size=4",
            "pixel_values",
        ),
        ("hf:Wav2Vec2Config?num_hidden_layers=1&hidden_size=16&num_attention_heads=2&intermediate_size=8", "input_values"),
        (
            "hf:WhisperConfig?encoder_layers=1&decoder_layers=1&d_model=48&max_source_positions=20&vocab_size=12&pad_token_id=0",
            "input_features",
        ),
        ("hf:T5Config?num_layers=1&d_model=8&d_kv=4&d_ff=8&num_heads=2&vocab_size=12", "decoder_input_ids"),
    ],
)
def test_other_architectures_run_on_their_inputs(target: str, key: str) -> None:
    pytest.importorskip("transformers")
    loaded = load_target(target)
    assert key in loaded.kwargs
    loaded.model(**loaded.kwargs)


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("hf:GPT2Confg", "Did you mean GPT2Config"),
        ("hf:GPT2Config?n_layers=2", "Did you mean n_layer"),
        ("hf:GPT2Config?n_embd=7&n_head=2", "failed"),
        ("hf:AutoTokenizer", "neither"),
    ],
)
def test_config_errors(target: str, says: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=says):
        load_target(target)


def test_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = load_target(GPT).model
    source.save_pretrained(tmp_path)
    loaded = load_target(str(tmp_path))
    assert loaded.name == "GPT2LMHeadModel"
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.model.state_dict().items())

    state = {name: value.clone() for name, value in source.state_dict().items() if name != "lm_head.weight"}
    del state["transformer.ln_f.bias"]
    state["transformer.wpe.weight"] = torch.zeros(5, 8)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: transformer\.ln_f\.bias.*wpe.weight: file \(5, 8\), model \(6, 8\)"):
        load_target(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match="header"):
        load_target(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="does not unpickle"):
        load_target(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        load_target(str(tmp_path))


def test_absent_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"parasym\[transformers\]"):
        load_target("hf:GPT2Config")
