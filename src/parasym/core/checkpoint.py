"""Weights files: vetted before they are read, compared with the model before they are copied in.

Nothing here executes what a file carries. Safetensors are plain bytes behind a JSON header, which is checked against the file's
size; pickles go through torch's restricted unpickler; an exported program is a zip whose pickles, operators and expressions are
checked first, because ``torch.export.load`` itself trusts them.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import CheckpointError

MAX_HEADER = 100_000_000
"""Largest safetensors header in bytes that is read; the format's own limit."""

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
_SAFE_ADVICE = "Save the weights again with safetensors (safetensors.torch.save_file(model.state_dict(), ...))."


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a weights file into a flat state dict on the CPU, without executing anything it carries.

    A training checkpoint that nests the weights under ``state_dict``, ``model``, ``model_state_dict`` or ``module`` is unwrapped.

    Args:
        path: a ``.safetensors`` file, or a torch file (``.pt``, ``.pth``, ``.bin``, ``.ckpt``).

    Returns:
        Tensor by name, in the file's dtypes.

    Raises:
        CheckpointError: the file is missing, damaged, carries more than tensors, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No weights file at {path}. Check the path.")
    if path.suffix == ".safetensors":
        check_safetensors_header(path)
        from safetensors.torch import load_file

        return dict(load_file(path))
    state = _restricted_load(path.read_bytes(), str(path))
    for key in ("state_dict", "model_state_dict", "model", "module"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dict of tensors. {_SAFE_ADVICE}")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors (its keys: {_some(list(map(str, state)))}). {_SAFE_ADVICE}")
    return tensors


def apply_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy ``state`` into ``model`` in place, or change nothing at all.

    The prefixes that wrappers add (``module.`` of DDP, ``_orig_mod.`` of compile) are dropped. A name missing from ``state`` is fine when
    its tensor is tied to one that is there. Values are converted to the model's dtype; NaN and infinity pass.

    Args:
        model: the module that receives the weights.
        state: tensor by name; shapes must equal the model's.
        source: what to call the weights in an error.

    Raises:
        CheckpointError: names are missing or left over, or a shape or kind of number differs; the message lists them.
    """
    own = model.state_dict(keep_vars=True)
    state = _without_wrapper_prefix(state, own)
    present = {own[name].untyped_storage().data_ptr() for name in state if name in own}
    missing = [name for name in own if name not in state and own[name].untyped_storage().data_ptr() not in present]
    unexpected = [name for name in state if name not in own]
    misfits = []
    for name in own.keys() & state.keys():
        ours, theirs = own[name], state[name]
        if ours.shape != theirs.shape:
            misfits.append(f"{name}: file {tuple(theirs.shape)}, model {tuple(ours.shape)}")
        elif (ours.is_complex(), ours.is_floating_point()) != (theirs.is_complex(), theirs.is_floating_point()):
            misfits.append(f"{name}: file {theirs.dtype}, model {ours.dtype}")
    problems = [
        f"{len(found)} {what}: {_some(sorted(found))}"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape or type", misfits))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Build the model with the configuration these weights were trained with, or rename the keys."
        )
    model.load_state_dict(dict(state), strict=False)


def check_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Validate a safetensors header against the file before anything is mapped.

    Checks: the header's length, its JSON, no name twice, known dtypes, sane shapes, and that the tensors' byte ranges fit their shapes and
    cover the data exactly, without a gap or an overlap.

    Args:
        path: the file.

    Returns:
        For each tensor its ``dtype`` (safetensors name), ``shape`` (list of int) and ``data_offsets`` ([begin, end) in bytes).

    Raises:
        CheckpointError: any check fails; the message says which and what was found.
    """
    path = Path(path)

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path} is not a valid safetensors file: {what}. It is damaged or was not written by safetensors; fetch or save it again."
        )

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            raise refuse(f"it has {size} bytes, and the header's length alone takes 8")
        if length > min(MAX_HEADER, size - 8):
            raise refuse(f"it says its header has {length:,} bytes, and the file has {size:,}")
        raw = file.read(length)

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise refuse("its header names a tensor twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_twins)
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise refuse("its header is not a JSON object")
    header.pop("__metadata__", None)

    spans = []
    for name, info in header.items():
        try:
            dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
            whole = all(type(number) is int and 0 <= number < 2**63 for number in [*shape, begin, end])
        except (TypeError, KeyError, ValueError):
            raise refuse(f"the entry of {name!r} lacks dtype, shape or data_offsets") from None
        if dtype not in _BITS or not whole:
            raise refuse(f"the entry of {name!r} has dtype {dtype!r}, shape {shape} and data_offsets {[begin, end]}")
        if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise refuse(f"{name!r} of shape {shape} and type {dtype} cannot lie in bytes {begin} to {end}")
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise refuse(
                f"{name!r} starts at byte {begin}, and the tensor before it ends at {position} ({'overlap' if begin < position else 'gap'})"
            )
        position = end
    rest = size - 8 - length
    if position != rest:
        what = "truncated" if position > rest else "left over"
        raise refuse(f"its tensors take {position:,} bytes, and {rest:,} follow the header ({what})")
    return header


class TensorFile:
    """Safetensors read tensor by tensor, without mapping: what is not asked for never enters memory.

    Args:
        path: a ``.safetensors`` file; a ``.safetensors.index.json`` with its shards beside it; or a folder that holds either.

    Attributes:
        header: tensor -> its entry, as :func:`check_safetensors_header`, over all shards.

    Raises:
        CheckpointError: a file is damaged or missing, a tensor is in two shards, or the index and the shards disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        files, listed = _shards(self.path)
        self.header: dict[str, dict[str, Any]] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{self.path} names the shard {file.name}, which is not beside it. Fetch it too.")
            header = check_safetensors_header(file)
            if twice := sorted(set(header) & set(self.header)):
                raise CheckpointError(f"{twice[0]!r} is in {self._places[twice[0]][0].name} and in {file.name}: a tensor has one shard.")
            with file.open("rb") as opened:
                start = 8 + int.from_bytes(opened.read(8), "little")
            self.header |= header
            self._places |= dict.fromkeys(header, (file, start))
        for name, file in listed.items():
            if name not in self._places or self._places[name][0] != file:
                raise CheckpointError(
                    f"{self.path} says that {name!r} is in {file.name}, and it is not. Fetch or save the checkpoint again."
                )

    def rows(self, name: str) -> Stored:
        """One tensor that stays in its file until rows of it are asked for.

        Raises:
            CheckpointError: the dtype is unknown to torch.
        """
        entry, (file, start) = self.header[name], self._places[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(f"{name} in {file} has dtype {entry['dtype']}, which torch cannot hold here.")
        return Stored(file, name, torch.Size(entry["shape"]), dtype, start + entry["data_offsets"][0])


def _shards(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files of a checkpoint, and where its index says each tensor is (empty without an index)."""
    if path.is_dir():
        indices = sorted(path.glob("*.safetensors.index.json"))
        files = sorted(path.glob("*.safetensors"))
        if len(indices) == 1:
            return _shards(indices[0])
        if len(indices) > 1 or len(files) != 1:
            found = ", ".join(p.name for p in [*indices, *files]) or "none"
            raise CheckpointError(f"{path} must hold one .safetensors file or one index of shards; it has {found}. Name the file.")
        return files, {}
    if path.name.endswith(".index.json"):
        try:
            table = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not all(
                isinstance(k, str) and isinstance(v, str) and Path(v).name == v and v.endswith(".safetensors") for k, v in table.items()
            ):
                raise ValueError("weight_map must map tensors to .safetensors files in the same folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not an index of safetensors shards: {type(error).__name__}: {error}") from None
        return [path.parent / name for name in dict.fromkeys(table.values())], {k: path.parent / v for k, v in table.items()}
    return [path], {}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. Indexed along its first axis, by a slice or by a tensor of indices, it reads those rows and no others.

    Attributes:
        path, name: of the file and of the tensor.
        shape, dtype: of the tensor.
        start: byte of the file where its numbers begin.
    """

    path: Path
    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The rows, in the file's dtype.

        Raises:
            CheckpointError: the file has become shorter since its header was checked.
        """
        if isinstance(index, slice):
            wanted = range(*index.indices(self.shape[0]))
            runs = [(wanted.start, wanted.stop)] if wanted.step == 1 else [(i, i + 1) for i in wanted]
        else:
            found = index.tolist()
            breaks = [k for k in range(1, len(found)) if found[k] != found[k - 1] + 1]
            runs = [(found[a], found[b - 1] + 1) for a, b in itertools.pairwise([0, *breaks, len(found)]) if a < b]
        runs = [(a, b) for a, b in runs if a < b]
        row, count = self.shape[1:].numel() * self.dtype.itemsize, sum(b - a for a, b in runs)
        data = bytearray(count * row)
        if not data:
            return torch.empty(count, *self.shape[1:], dtype=self.dtype)
        left = memoryview(data)
        with self.path.open("rb") as file:
            for a, b in runs:
                file.seek(self.start + a * row)
                if file.readinto(left[: (b - a) * row]) != (b - a) * row:
                    raise CheckpointError(f"{self.path} ends inside {self.name}. Fetch or save it again.")
                left = left[(b - a) * row :]
        return torch.frombuffer(data, dtype=self.dtype).reshape(count, *self.shape[1:])


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_exported(path: Path) -> torch.export.ExportedProgram:
    """Load a ``.pt2`` program after refusing archives that could run code of their own.

    ``torch.export.load`` unpickles freely, resolves operator names by attribute and evaluates expressions as Python. Here pickles pass the
    restricted unpickler, operators must be torch's own, expressions must be arithmetic, and compiled or opaque objects are refused.

    Args:
        path: the archive.

    Returns:
        The exported program.

    Raises:
        CheckpointError: the archive is missing, damaged, or carries something that could execute.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No exported program at {path}. Check the path.")
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                _vet_member(path, name, archive.read(name))
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is not a whole .pt2 archive ({error}). Export it again with torch.export.save.") from None
    try:
        with _only_weights():
            return torch.export.load(io.BytesIO(data))
    except Exception as error:
        raise CheckpointError(
            f"{path} could not be loaded as an exported program: {_first_line(error)}. "
            f"Export it again with torch.export.save under torch {torch.__version__}."
        ) from error


_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|prim|higher_order)\.((?!__|from_file)\w+|__i?(and|or|xor|lshift|rshift)__)(\.(?!__)\w+)?"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|pos|pow|and_|or_|not_|eq|ne|lt|le|gt|ge)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.sym_\w+|torch\._sym_\w+"
)
_NAME = re.compile(r"[\w.\-+:]*")
_ARITHMETIC = re.compile(r"[\w\s+\-*/%().,<>=!&|~\[\]']*")
_WORD = re.compile(
    r"[suz]\w*\d+|L|size|stride|storage_offset|and|or|not|True|False|oo|int_oo"
    r"|Symbol|Integer|Rational|Float|Add|Mul|Pow|Abs|Eq|Ne|Equality|Unequality|(Strict)?(Less|Greater)Than|And|Or|Not|Piecewise|ExprCondPair"
    r"|integer|positive|nonnegative|negative|nonzero|zero|real|precision|evaluate"
    r"|Mod|PythonMod|Max|Min|ModularIndexing|Where|FloorDiv|CleanDiv|CeilDiv|CeilToInt|FloorToInt|TruncToInt|ToFloat|FloatTrueDiv|IntTrueDiv"
    r"|PowByNatural|FloatPow|LShift|RShift|RoundToInt"
)
"""The words of shape expressions, as sympy's ``srepr`` and torch's guards write them."""
_FREE_TEXT = {"metadata", "in_spec", "out_spec", "as_string", "torch_version", "treespec_namedtuple_fields"}


def _vet_member(path: Path, name: str, data: bytes) -> None:
    """Refuse one member of a ``.pt2`` archive if loading it could execute something."""
    inner = name.partition("/")[2]
    if inner.startswith("data/aotinductor") or "custom_obj" in inner or "opaque_obj" in inner:
        raise CheckpointError(
            f"{path} carries compiled code or opaque objects ({inner}), which parasym does not load. "
            "Export the plain program with torch.export.save."
        )
    if inner.startswith("models/"):
        try:
            program = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} has a damaged program ({inner}: {error}). Export it again with torch.export.save.") from None
        for kind, text in _strings(program):
            if not _harmless(kind, text):
                raise CheckpointError(
                    f"{path} has a program with the {kind} {text[:120]!r}, which torch.export does not write. "
                    "It was altered or uses custom operators; load the Python model instead."
                )
    elif data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and inner.startswith(
        ("data/sample_inputs", "data/constants")
    ):
        _restricted_load(data, f"{path} ({inner})")


def _strings(value: Any, kind: str = "name") -> Iterator[tuple[str, str]]:
    """Yield (kind, text) for every string of a program that torch interprets; kind is the nearest key."""
    if isinstance(value, str):
        yield kind, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield "name", key
            if key not in _FREE_TEXT:
                yield from _strings(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, kind)


def _harmless(kind: str, text: str) -> bool:
    if kind == "target":
        return _OPERATOR.fullmatch(text) is not None
    if kind in ("expr_str", "guards_code"):
        words = re.findall(r"[A-Za-z_]\w*", re.sub(r"'[\w.]*'", "", text))
        return _ARITHMETIC.fullmatch(text) is not None and all(_WORD.fullmatch(word) for word in words)
    return _NAME.fullmatch(text) is not None


def _restricted_load(data: bytes, source: str) -> Any:
    """Unpickle tensors and plain containers, nothing else."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        text = str(error)
        blocked = re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class|operand|instruction)[^\n.]*", text)
        if "weights_only" in text.lower() or "unsupported" in text.lower():
            found = blocked.group(0) if blocked else _first_line(error)
            raise CheckpointError(
                f"{source} was refused: it asks to run more than loading tensors ({found}). Nothing was executed. {_SAFE_ADVICE}"
            ) from None
        raise CheckpointError(
            f"{source} could not be read: {_first_line(error)}. It is damaged, truncated or not a torch file. {_SAFE_ADVICE}"
        ) from None


@contextmanager
def _only_weights() -> Iterator[None]:
    """Make every ``torch.load`` inside use the restricted unpickler, whatever its caller asked for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _without_wrapper_prefix(state: Mapping[str, Tensor], own: Mapping[str, Any]) -> Mapping[str, Tensor]:
    for prefix in ("module.", "_orig_mod."):
        if state and all(name.startswith(prefix) for name in state) and not any(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
