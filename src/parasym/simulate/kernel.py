"""From a traced program to a compiled kernel: 64 replicas side by side, all steps inside, state and scratch in the first cache.

A block of `LANES` replicas holds one row of scratch for every number of the program. One step is a few loops over the lanes:
words become normals, uniforms and row numbers, table rows are fetched, and the graph is evaluated. The loops have a fixed
length and one base address, so the compiler turns each into vector instructions. What a lane computes depends neither on its
neighbours nor on the thread.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from parasym.core.errors import InputError, MissingExtraError
from parasym.simulate.expr import arguments, needed
from parasym.simulate.rng import packed
from parasym.simulate.system import Program, RowDraw

LANES = 64
CHUNK = 64  # steps whose sums are kept in the working precision before they are added to the float64 totals
LARGEST = 6000  # nodes; a longer program takes minutes to compile and spills every register
_FUSED = 2  # pairs of normals drawn inside the loop of the step

_FORMS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "abs({0})",
    "sqrt": "math.sqrt({0})",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "not": "not {0}",
    "where": "select({0}, {1}, {2})",
}


def require_numba() -> None:
    """Check that the compiled engine can run.

    Raises:
        MissingExtraError: numba is not installed.
    """
    if not available():
        raise MissingExtraError("the engine 'lanes' needs numba: pip install parasym[simulate], or use engine='torch'")


def available() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def fits(program: Program) -> bool:
    """Whether the program is short enough to unroll."""
    return len(needed(program.tape, [*program.outputs, *program.sums])) <= LARGEST


class _Writer:
    """Source text with indentation, and the numbering of scratch rows and constants."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0
        self.constants: dict[float, str] = {}

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def loop(self, head: str) -> _Writer:
        self.line(head)
        return self

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1

    def constant(self, value: float) -> str:
        return self.constants.setdefault(value, f"C{len(self.constants)}")


class Layout:
    """Which scratch row holds what."""

    def __init__(self, program: Program) -> None:
        draws = program.draws
        self.rows = len(program.outputs)
        self.param = {name: self.rows + k for k, name in enumerate(program.params)}
        at = self.rows + len(program.params)
        self.pairs = (draws.normal_count + 1) // 2
        self.normal = at
        at += 2 * self.pairs
        self.uniform = at
        at += draws.uniform_count
        self.table: dict[tuple[int, int, int], int] = {}
        for number, draw in enumerate(draws.row_draws):
            for k in range(draw.count):
                for c in range(draw.table.rows.shape[1]):
                    self.table[number, k, c] = at
                    at += 1
        self.sums = at
        self.total = at + len(program.sums)
        self.orders: dict[int, int] = {}
        self.order_rows = 0
        for number, draw in enumerate(draws.row_draws):
            if draw.sampling == "epoch":
                self.orders[number] = self.order_rows
                self.order_rows += draw.table.size
        self.indices = sum(draw.count for draw in draws.row_draws)


def source(program: Program, double: bool) -> str:
    """Source of the module whose ``advance`` runs the program.

    Raises:
        InputError: the program is too long to unroll.
    """
    outputs = [*program.outputs, *program.sums]
    order = needed(program.tape, outputs)
    if len(order) > LARGEST:
        raise InputError(f"the step has {len(order)} operations, more than the {LARGEST} a kernel may have: use engine='torch'")
    layout, out = Layout(program), _Writer()
    out.depth = 2
    _draw(program, layout, out, double)
    _step(program, layout, out, order, double)
    real = "np.float64" if double else "np.float32"
    constants = "\n".join(f"{name} = F({value!r})" for value, name in out.constants.items())
    return _MODULE.format(
        real=real,
        library="DOUBLE" if double else "SINGLE",
        constants=constants,
        lanes=LANES,
        chunk=CHUNK,
        rows=layout.rows,
        params=len(layout.param),
        scratch=max(layout.total, 1),
        integers=max(4 + layout.indices, 4),
        sums=len(program.sums),
        sum_at=layout.sums,
        orders=layout.order_rows,
        body="\n".join(out.lines),
    )


_MODULE = '''"""Written by parasym.simulate.kernel: one step of a program on {lanes} lanes."""
import math
import numpy as np
from numba import njit
from parasym.simulate.lanes import FAST, OPTIONS, {library} as M, advance as word, select, to_narrow, to_wide
F = {real}
U = np.uint32
I = np.int64
Q = np.uint64
Q32 = Q(32)
log, exp, tanh, sin, cos, pair, uniform, widen = M.log, M.exp, M.tanh, M.sin, M.cos, M.pair, M.uniform, M.widen
ZERO = F(0)
{constants}
@njit(**OPTIONS)
def block(b, q, orders, tables, steps, clock):
    for t in range(clock, clock + steps):
        at = 0
{body}
@njit(nogil=True, cache=True, **FAST)
def advance(rows, generators, params, totals, orders, tables, first, last, steps, clock):
    b = np.zeros({scratch} * {lanes}, F)
    q = np.zeros({integers} * {lanes}, np.uint32)
    for n in range(first, last):
        for k in range({rows} * {lanes}):
            b[k] = rows[n, k]
        for k in range({params} * {lanes}):
            b[{rows} * {lanes} + k] = params[n, k]
        for k in range(4 * {lanes}):
            q[k] = generators[n, k]
        done = 0
        while done < steps:
            now = min({chunk}, steps - done)
            for k in range({sums} * {lanes}):
                b[{sum_at} * {lanes} + k] = ZERO
            block(b, q, orders[n], tables, now, clock + done)
            for k in range({sums} * {lanes}):
                totals[n, k] += b[{sum_at} * {lanes} + k]
            done += now
        for k in range({rows} * {lanes}):
            rows[n, k] = b[k]
        for k in range(4 * {lanes}):
            generators[n, k] = q[k]
'''


def _read(out: _Writer) -> None:
    out.line(f"a0 = q[l]; a1 = q[{LANES} + l]; a2 = q[{2 * LANES} + l]; a3 = q[{3 * LANES} + l]")


def _write(out: _Writer) -> None:
    out.line(f"q[l] = a0; q[{LANES} + l] = a1; q[{2 * LANES} + l] = a2; q[{3 * LANES} + l] = a3")


def _pair(out: _Writer, double: bool) -> None:
    out.line("r, a0, a1, a2, a3 = word(a0, a1, a2, a3)")
    if double:
        out.line("s, a0, a1, a2, a3 = word(a0, a1, a2, a3)")
        out.line("r = widen(r, s)")
    out.line("v, a0, a1, a2, a3 = word(a0, a1, a2, a3)")


def _draw(program: Program, layout: Layout, out: _Writer, double: bool) -> None:
    """Fill the scratch rows of normals, uniforms and table rows, in this order."""
    if layout.pairs > _FUSED:
        with out.loop(f"for k in range({layout.pairs}):"):
            out.line(f"at = ({layout.normal} + 2 * k) * {LANES}")
            with out.loop(f"for l in range({LANES}):"):
                _read(out)
                _pair(out, double)
                out.line("x, y = pair(r, v)")
                out.line(f"b[at + l] = x; b[at + {LANES} + l] = y")
                _write(out)
    elif layout.pairs:
        with out.loop(f"for l in range({LANES}):"):
            _read(out)
            for k in range(layout.pairs):
                _pair(out, double)
                out.line("x, y = pair(r, v)")
                at = (layout.normal + 2 * k) * LANES
                out.line(f"b[{at} + l] = x; b[{at + LANES} + l] = y")
            _write(out)
    if program.draws.uniform_count:
        with out.loop(f"for l in range({LANES}):"):
            _read(out)
            for k in range(program.draws.uniform_count):
                out.line("r, a0, a1, a2, a3 = word(a0, a1, a2, a3)")
                if double:
                    out.line("s, a0, a1, a2, a3 = word(a0, a1, a2, a3)")
                    out.line("r = widen(r, s)")
                out.line(f"b[{(layout.uniform + k) * LANES} + l] = uniform(r)")
            _write(out)
    index, start = 4, 0
    for number, draw in enumerate(program.draws.row_draws):
        if draw.sampling == "epoch":
            _epoch(number, draw, index, layout, out)
        else:
            _indices(draw, index, out)
        _fetch(number, draw, index, start, layout, out)
        index += draw.count
        start += draw.table.rows.size


def _indices(draw: RowDraw, index: int, out: _Writer) -> None:
    """Row numbers of independent draws or of a fresh subset (Floyd), into integer rows ``index``.."""
    size, count = draw.table.size, draw.count
    sizes = [size] * count if draw.sampling == "replacement" else list(range(size - count + 1, size + 1))
    with out.loop(f"for l in range({LANES}):"):
        _read(out)
        k = 0
        for group in packed(sizes):
            out.line("v, a0, a1, a2, a3 = word(a0, a1, a2, a3)")
            for bound in group:
                if bound & (bound - 1) == 0:
                    width = int(math.log2(bound))
                    out.line(f"i{k} = U(v >> U({32 - width}))" if width else f"i{k} = U(0)")
                    out.line(f"v = U(v << U({width}))")
                else:
                    out.line(f"p = Q(to_wide(v) * Q({bound}))")
                    out.line(f"i{k} = to_narrow(Q(p >> Q32)); v = to_narrow(p)")
                k += 1
        if draw.sampling == "subset":
            for k in range(1, count):
                taken = " | ".join(f"(i{k} == i{j})" for j in range(k))
                out.line(f"i{k} = select({taken}, U({size - count + k}), i{k})")
        for k in range(count):
            out.line(f"q[{(index + k) * LANES} + l] = i{k}")
        _write(out)


def _epoch(number: int, draw: RowDraw, index: int, layout: Layout, out: _Writer) -> None:
    """The next rows of every lane's own order of the table: one step of Fisher-Yates for each."""
    size, count, base = draw.table.size, draw.count, layout.orders[number]
    out.line(f"start = (t % {size // count}) * {count}")
    with out.loop(f"for k in range({count}):"):
        out.line(f"bound = Q({size} - start - k)")
        with out.loop(f"for l in range({LANES}):"):
            _read(out)
            out.line("v, a0, a1, a2, a3 = word(a0, a1, a2, a3)")
            out.line(f"q[({index} + k) * {LANES} + l] = to_narrow(Q(Q(to_wide(v) * bound) >> Q32))")
            _write(out)
        with out.loop(f"for l in range({LANES}):"):
            out.line(f"here = ({base} + start + k) * {LANES} + l")
            out.line(f"there = here + I(q[({index} + k) * {LANES} + l]) * {LANES}")
            out.line("picked = orders[there]; orders[there] = orders[here]; orders[here] = picked")
            out.line(f"q[({index} + k) * {LANES} + l] = U(picked)")


def _fetch(number: int, draw: RowDraw, index: int, start: int, layout: Layout, out: _Writer) -> None:
    for k in range(draw.count):
        with out.loop(f"for l in range({LANES}):"):
            out.line(f"i = I(q[{(index + k) * LANES} + l])")
            for c in range(draw.table.rows.shape[1]):
                out.line(f"b[{layout.table[number, k, c] * LANES} + l] = tables[{start + c * draw.table.size} + i]")


def _step(program: Program, layout: Layout, out: _Writer, order: list[int], double: bool) -> None:
    """Evaluate the graph on every lane."""
    names: dict[int, str] = {}
    with out.loop(f"for l in range({LANES}):"):
        for index in order:
            node = program.tape.nodes[index]
            if node[0] == "const":
                names[index] = out.constant(node[1])
                continue
            if node[0] == "input":
                text = f"b[{_row(node, layout) * LANES} + l]"
            elif node[0] in _FORMS:
                text = _FORMS[node[0]].format(*(names[i] for i in arguments(node)))
            else:
                text = f"{node[0]}({names[node[1]]})"
            names[index] = f"n{index}"
            out.line(f"n{index} = {text}")
        for k, value in enumerate(program.outputs):
            out.line(f"b[{k * LANES} + l] = {names[value.index]}")
        for k, value in enumerate(program.sums):
            at = (layout.sums + k) * LANES
            out.line(f"b[{at} + l] = b[{at} + l] + {names[value.index]}")


def _row(node: tuple[Any, ...], layout: Layout) -> int:
    _, kind, key = node
    if kind == "state":
        return int(key)
    if kind == "param":
        return layout.param[key]
    if kind == "normal":
        return layout.normal + int(key)
    if kind == "uniform":
        return layout.uniform + int(key)
    return layout.table[key]


# ------------------------------------------------------------------------------------------------ compiling


@functools.lru_cache(maxsize=256)
def compiled(text: str) -> Any:
    """The module of a source text; its machine code is kept on disk from one process to the next."""
    require_numba()
    library = Path(__file__).with_name("lanes.py").read_bytes()
    name = f"parasym_kernel_{hashlib.sha256(text.encode() + library).hexdigest()[:24]}"
    path = _home() / f"{name}.py"
    if not path.exists():
        handle, temporary = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    elif path.read_text(encoding="utf-8") != text:
        raise InputError(f"{path} is not the kernel it is named after: remove it")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def _home() -> Path:
    """Where kernels are kept: ``PARASYM_KERNELS``, else the user's cache, else a directory of this process."""
    wanted = os.environ.get("PARASYM_KERNELS") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parasym" / "kernels"
    try:
        home = Path(wanted)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=home):
            return home
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="parasym-kernels-"))
