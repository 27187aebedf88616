"""Scalar expressions: a step is written once in Python, recorded as a small graph, and run by either engine.

A `Tape` records the arithmetic of a step on symbols. The graph can be interpreted on arrays of replicas (`evaluate`, numpy or
torch), differentiated (`push_forward`), or written out as source for the compiled lanes (`parasym.simulate.kernel`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from parasym.core.errors import InputError

Number = float | int
_COMPARE = ("lt", "le")
_LOGIC = ("and", "or", "not")


@dataclass
class Tape:
    """The nodes of a graph, each recorded once: (operation, arguments), where an argument is a node number or a constant's value."""

    nodes: list[tuple[Any, ...]] = field(default_factory=list)
    _known: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def add(self, *node: Any) -> Expr:
        """The expression of a node, new or already known."""
        index = self._known.get(node)
        if index is None:
            index = len(self.nodes)
            self.nodes.append(node)
            self._known[node] = index
        return Expr(self, index)

    def symbol(self, kind: str, key: Any) -> Expr:
        """An input, for example ("state", 0)."""
        return self.add("input", kind, key)

    def constant(self, value: Number) -> Expr:
        """A constant; it must be finite."""
        if not math.isfinite(value):
            raise InputError(f"the step holds the constant {value}: constants must be finite")
        return self.add("const", float(value))


@dataclass(frozen=True, eq=False)
class Expr:
    """One node of a tape; arithmetic on it records more nodes. Comparisons give booleans for `where`."""

    tape: Tape
    index: int

    def _lift(self, other: Any) -> Expr:
        if isinstance(other, Expr):
            if other.tape is not self.tape:
                raise InputError("an expression of another trace was used: a step may only use the symbols it was given")
            return other
        return self.tape.constant(other)

    def __add__(self, other: Any) -> Expr:
        return _binary("add", self, self._lift(other))

    def __sub__(self, other: Any) -> Expr:
        return _binary("sub", self, self._lift(other))

    def __rsub__(self, other: Any) -> Expr:
        return _binary("sub", self._lift(other), self)

    def __mul__(self, other: Any) -> Expr:
        return _binary("mul", self, self._lift(other))

    def __truediv__(self, other: Any) -> Expr:
        return _binary("div", self, self._lift(other))

    def __rtruediv__(self, other: Any) -> Expr:
        return _binary("div", self._lift(other), self)

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Expr:
        return _unary("neg", self)

    def __abs__(self) -> Expr:
        return _unary("abs", self)

    def __pow__(self, power: int) -> Expr:
        if not isinstance(power, int) or power < 0:
            raise InputError(f"powers in a step are non-negative integers, not {power!r}; use exp and log for others")
        if power == 0:
            return self.tape.constant(1.0)
        half = self ** (power // 2)
        return half * half * (self if power % 2 else 1.0)

    def __lt__(self, other: Any) -> Expr:
        return self.tape.add("lt", self.index, self._lift(other).index)

    def __le__(self, other: Any) -> Expr:
        return self.tape.add("le", self.index, self._lift(other).index)

    def __gt__(self, other: Any) -> Expr:
        return self._lift(other) < self

    def __ge__(self, other: Any) -> Expr:
        return self._lift(other) <= self

    def __and__(self, other: Expr) -> Expr:
        return self.tape.add("and", self.index, other.index)

    def __or__(self, other: Expr) -> Expr:
        return self.tape.add("or", self.index, other.index)

    def __invert__(self) -> Expr:
        return self.tape.add("not", self.index)

    def __bool__(self) -> bool:
        raise InputError("a step may not branch on a symbol: use where(condition, a, b)")

    @property
    def value(self) -> float | None:
        """The number, when this is a constant."""
        node = self.tape.nodes[self.index]
        return float(node[1]) if node[0] == "const" else None


_FOLD: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
    "sqrt": math.sqrt,
    "exp": math.exp,
    "log": math.log,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
}


def _binary(op: str, a: Expr, b: Expr) -> Expr:
    left, right = a.value, b.value
    if left is not None and right is not None:
        if op == "div" and right == 0:
            raise InputError("the step divides by the constant zero")
        return a.tape.constant(_folded(op, left, right))
    if op in ("add", "mul") and left is not None:
        a, b, left, right = b, a, right, left
    if (op in ("add", "sub") and right == 0) or (op in ("mul", "div") and right == 1):
        return a
    if op == "mul" and right == 0:
        return b
    if op == "sub" and left == 0:
        return _unary("neg", b)
    if op == "div" and right is not None:
        return _binary("mul", a, a.tape.constant(1.0 / right))
    first, second = (b.index, a.index) if op in ("add", "mul") and b.index < a.index and right is None else (a.index, b.index)
    return a.tape.add(op, first, second)


def _unary(op: str, a: Expr) -> Expr:
    if a.value is not None:
        return a.tape.constant(_folded(op, a.value))
    return a.tape.add(op, a.index)


def _folded(op: str, *values: float) -> float:
    """What an operation makes of constants."""
    try:
        return _FOLD[op](*values)
    except (ValueError, OverflowError) as error:
        raise InputError(f"the step takes {op} of the constant {', '.join(map(str, values))}: {error}") from error


def _function(op: str) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        return _unary(op, x) if isinstance(x, Expr) else _folded(op, x)

    apply.__name__, apply.__doc__ = op, f"{op}(x) of a symbol or a number."
    return apply


sqrt, exp, log, sin, cos, tanh = (_function(op) for op in ("sqrt", "exp", "log", "sin", "cos", "tanh"))


def where(condition: Expr, a: Any, b: Any) -> Expr:
    """``a`` where the condition holds, else ``b``; both are evaluated."""
    tape = condition.tape
    return tape.add("where", condition.index, condition._lift(a).index, condition._lift(b).index)


def maximum(a: Any, b: Any) -> Expr:
    """The larger of two numbers, at least one of them a symbol."""
    first = a if isinstance(a, Expr) else b._lift(a)
    return where(first < b, b, first)


def dot(a: Sequence[Any], b: Sequence[Any]) -> Any:
    """Sum of products of two equally long sequences."""
    total: Any = 0.0
    for x, y in zip(a, b, strict=True):
        total = x * y + total
    return total


# ------------------------------------------------------------------------------------------------ what is done with a graph


def needed(tape: Tape, outputs: Sequence[Expr]) -> list[int]:
    """The nodes that ``outputs`` depend on, in the order they were recorded."""
    seen: set[int] = set()
    stack = [out.index for out in outputs]
    while stack:
        index = stack.pop()
        if index not in seen:
            seen.add(index)
            stack.extend(arguments(tape.nodes[index]))
    return sorted(seen)


def arguments(node: tuple[Any, ...]) -> tuple[int, ...]:
    """Node numbers a node reads."""
    return () if node[0] in ("const", "input") else node[1:]


def evaluate(outputs: Sequence[Expr], inputs: Callable[[str, Any], Any]) -> list[Any]:
    """Interpret a graph: ``inputs(kind, key)`` gives numpy arrays, or torch tensors, or numbers. Constants stay numbers."""
    if not outputs:
        return []
    tape = outputs[0].tape
    values: dict[int, Any] = {}
    for index in needed(tape, outputs):
        node = tape.nodes[index]
        op = node[0]
        if op == "const":
            values[index] = node[1]
        elif op == "input":
            values[index] = inputs(node[1], node[2])
        else:
            values[index] = _apply(op, [values[i] for i in node[1:]])
    return [values[out.index] for out in outputs]


def _apply(op: str, a: list[Any]) -> Any:
    if op == "where":
        return torch.where(*a) if isinstance(a[0], torch.Tensor) else np.where(*a)
    if op in _COMPARE:
        return a[0] < a[1] if op == "lt" else a[0] <= a[1]
    if op in _LOGIC:
        return a[0] & a[1] if op == "and" else a[0] | a[1] if op == "or" else ~a[0]
    if len(a) == 2:
        return _FOLD[op](*a)
    if op == "neg":
        return -a[0]
    library = torch if isinstance(a[0], torch.Tensor) else np
    return getattr(library, op)(a[0])


def push_forward(outputs: Sequence[Expr], tangents: Mapping[int, Expr]) -> list[Expr]:
    """Directional derivatives of ``outputs`` along ``tangents`` (input node number -> tangent); other inputs are held fixed.

    A condition has no derivative: `where` takes the derivative of the branch it takes, and `abs` its sign.
    """
    tape = outputs[0].tape
    zero = tape.constant(0.0)
    moved: dict[int, Expr] = dict(tangents)
    for index in needed(tape, outputs):
        node = tape.nodes[index]
        if index in moved or node[0] in ("const", "input", *_COMPARE, *_LOGIC):
            continue
        if all(moved.get(i, zero).value == 0 for i in node[1:]):
            continue
        moved[index] = _derivative(tape, index, node, moved, zero)
    return [moved.get(out.index, zero) for out in outputs]


def _derivative(tape: Tape, index: int, node: tuple[Any, ...], moved: Mapping[int, Expr], zero: Expr) -> Expr:
    op, args = node[0], [Expr(tape, i) for i in node[1:]]
    d = [moved.get(i, zero) for i in node[1:]]
    here = Expr(tape, index)
    if op == "add":
        return d[0] + d[1]
    if op == "sub":
        return d[0] - d[1]
    if op == "mul":
        return d[0] * args[1] + args[0] * d[1]
    if op == "div":
        return (d[0] - here * d[1]) / args[1]
    if op == "neg":
        return -d[0]
    if op == "where":
        return where(args[0], d[1], d[2])
    rules: dict[str, Callable[[], Expr]] = {
        "abs": lambda: where(args[0] < 0, -d[0], d[0]),
        "sqrt": lambda: d[0] / (2 * here),
        "exp": lambda: here * d[0],
        "log": lambda: d[0] / args[0],
        "sin": lambda: cos(args[0]) * d[0],
        "cos": lambda: -sin(args[0]) * d[0],
        "tanh": lambda: (1 - here * here) * d[0],
    }
    return rules[op]()


def gradient(value: Expr, variables: Sequence[Expr]) -> list[Expr]:
    """Partial derivatives of one expression in each of the input ``variables``."""
    one = value.tape.constant(1.0)
    return [push_forward([value], {variable.index: one})[0] for variable in variables]
