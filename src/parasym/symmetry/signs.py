"""Which slices of parameters may be negated together: a linear system over the field of two elements.

Every slice of every parameter (one unit of an atom in one block of one axis, or a whole block, or all of it) gets one unknown
bit. A forward pass gives each activation the sum of bits under which it changes sign. Contractions cancel or pass bits by
their labels; any other operator is asked itself: it is run on Gaussian inputs with slices negated, and tells which negations
it passes on, forgets or cannot bear. No operator is known to be odd or even beforehand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.core.guards import math_attention
from parasym.symmetry.axes import Axis, Monomial, find, monomials
from parasym.symmetry.discrete_actions import GlobalSign, Signs, grid, units_of
from parasym.symmetry.index_rules import Contraction, operator_name
from parasym.symmetry.spaces import Spaces, live_nodes

WHOLE = -1  # key of negations of whole blocks or tensors
_SLOT = tuple[int, int, int]  # axis, block, key; (-1, -1, WHOLE) is all of a tensor
_LABEL = dict[_SLOT, int]
_VARIABLE = tuple[str, int, int, int]
_GROUP = list[tuple[int, _SLOT]]  # slots of the arguments that can only be negated together
_RELATION = list[tuple[int, list[int]]]  # (set of groups, set of slots of each result)
_GROUPS, _BLOCKS, _ELEMENTS, _GLANCE = 5, 16, 4_000_000, 64
_CARRY = {
    "transpose", "t", "numpy_T", "mT", "permute", "unsqueeze", "squeeze", "expand", "contiguous", "clone", "to", "alias",
    "detach", "dropout",
}  # fmt: skip


@dataclass(frozen=True)
class SignSolution:
    """Slices that may be negated together, unit by unit or as a whole."""

    action: Signs | GlobalSign


def sign_pass(graph: Graph, spaces: Spaces, odd: Mapping[str, Node] | None = None) -> SignPass:
    """The linear system of all negations; ``odd`` names operators to be taken for odd, with their argument."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), math_attention():
        return SignPass(graph, spaces, odd).run()


def sign_solutions(spaces: Spaces, system: SignPass) -> list[SignSolution]:
    """A basis of all sign symmetries of a graph, uncertified; whole-block ones only where units do not explain them."""
    return list(_solutions(spaces, system))


# -- linear algebra over F2: vectors are Python integers -----------------------------------------------------------------------


class Echelon:
    """Vectors over F2 in echelon form by highest bit."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.pivots = 0

    def reduce(self, v: int) -> int:
        while hit := v & self.pivots:
            v ^= self.rows[hit.bit_length() - 1]
        return v

    def add(self, v: int) -> bool:
        """Insert a vector; False when it was already spanned."""
        v = self.reduce(v)
        if not v:
            return False
        self.rows[v.bit_length() - 1] = v
        self.pivots |= 1 << (v.bit_length() - 1)
        return True

    def kernel(self, n: int) -> list[int]:
        """Basis of the vectors of length n orthogonal to every row."""
        order = sorted(self.rows)
        out = []
        for f in range(n):
            if self.pivots >> f & 1:
                continue
            v = 1 << f
            for p in order:
                if p > f and (self.rows[p] & v).bit_count() & 1:
                    v |= 1 << p
            out.append(v)
        return out


def _sparse(basis: list[int], modulo: Sequence[int] = ()) -> list[int]:
    """Shorten the vectors of a basis by adding others, and freely those of ``modulo``."""
    if len(basis) + len(modulo) > 400:
        return basis
    changed = True
    while changed:
        changed = False
        for i, v in enumerate(basis):
            for w in itertools.chain(basis[:i], basis[i + 1 :], modulo):
                if (v ^ w).bit_count() < v.bit_count():
                    v, changed = v ^ w, True
            basis[i] = v
    return basis


# -- the forward pass ----------------------------------------------------------------------------------------------------------


class SignPass:
    """Labels of all nodes, and the constraints they must satisfy."""

    def __init__(self, graph: Graph, spaces: Spaces, odd: Mapping[str, Node] | None = None) -> None:
        self.graph, self.spaces = graph, spaces
        self.odd = dict(odd or {})  # node -> its argument: operators taken to be odd (compensated elsewhere)
        self.variables: dict[int, list[_VARIABLE]] = {}
        self.index: dict[_VARIABLE, int] = {}
        self.constraints: dict[int, Echelon] = {}
        self.labels: dict[str, Any] = {}
        self.zero: set[str] = set()
        self.random = torch.Generator().manual_seed(20240229)
        self._blocks: dict[int, tuple[Monomial, ...]] = {}
        self._answers: dict[Any, Any] = {}

    def run(self) -> SignPass:
        live, moving = live_nodes(self.graph), set[str]()
        for n in self.graph.nodes:
            kind = self.graph.kind.get(n.name)
            if n.name not in self.spaces.axes or n.name not in live:
                continue
            if n.name in self.graph.holders:
                self.labels[n.name] = self._parameter(self.graph.holders[n.name], self.spaces.axes[n.name])
            elif n.name in self.spaces.carriers:
                self.labels[n.name] = self._parameter(n.name, self.spaces.axes[n.name])
                moving.add(n.name)
            elif (kind in ("const", "data") or n.op == "placeholder") and not any(a.name in moving for a in n.all_input_nodes):
                self.labels[n.name] = {}
                value = self.spaces.constants.get(n.name)
                if isinstance(value, Tensor) and value.numel() and not bool(value.any()):
                    self.zero.add(n.name)
            else:
                if kind == "const":
                    moving.add(n.name)
                self.labels[n.name] = self._operator(n)
        for name in self.graph.outputs:
            for (_, _, key), mask in self.labels.get(name, {}).items():
                self._forbid(key, mask)
        return self

    def blocks(self, a: Axis) -> tuple[Monomial, ...]:
        root = find(a)
        if id(root) not in self._blocks:
            self._blocks[id(root)] = monomials(root)
        return self._blocks[id(root)]

    def _bit(self, variable: _VARIABLE) -> int:
        if variable not in self.index:
            known = self.variables.setdefault(variable[3], [])
            self.index[variable] = len(known)
            known.append(variable)
        return 1 << self.index[variable]

    def _forbid(self, key: int, mask: int) -> None:
        if mask:
            self.constraints.setdefault(key, Echelon()).add(mask)

    def _reduced(self, label: Mapping[_SLOT, int]) -> _LABEL:
        out = {}
        for slot, mask in label.items():
            e = self.constraints.get(slot[2])
            mask = e.reduce(mask) if e is not None else mask
            if mask:
                out[slot] = mask
        return out

    def slots(self, axes: Sequence[Axis]) -> dict[int, list[_SLOT]]:
        """Every slot of a tensor, by key."""
        out: dict[int, list[_SLOT]] = {}
        whole: list[_SLOT] = []
        for i, a in enumerate(axes):
            if a.size == 1:
                continue
            blocks = self.blocks(a)
            if 1 < len(blocks) <= _BLOCKS:
                whole += [(i, b, WHOLE) for b in range(len(blocks))]
            for b, m in enumerate(blocks):
                for atom, size in zip(m.atoms, m.sizes, strict=True):
                    if size > 1 and m.atoms.count(atom) == 1:
                        out.setdefault(atom, []).append((i, b, atom))
        out[WHOLE] = whole or [(-1, -1, WHOLE)]
        return out

    def _parameter(self, name: str, axes: Sequence[Axis]) -> _LABEL:
        return {s: self._bit((name, *s)) for slots in self.slots(axes).values() for s in slots}

    # -- operators --

    def _operator(self, n: Node) -> Any:
        name = operator_name(n)
        if name == "getitem":
            args: Any = n.args
            source = self.labels.get(args[0].name)
            return source[args[1]] if isinstance(source, list) else {}
        inputs = [a for a in n.all_input_nodes if a.name in self.spaces.axes]
        for a in inputs:
            if isinstance(self.labels.get(a.name), dict):
                self.labels[a.name] = self._reduced(self.labels[a.name])
        if n.name in self.spaces.contractions:
            return self._contract(n, self.spaces.contractions[n.name])
        if n.name in self.odd:
            for a in inputs:
                for slot, mask in self.labels[a.name].items() if a is not self.odd[n.name] else ():
                    self._forbid(slot[2], mask)
            return self._carry(n, self.odd[n.name])
        if name in _CARRY and len(inputs) == 1:
            return self._carry(n, inputs[0])
        return self._ask(n, inputs)

    def _carry(self, n: Node, source: Node) -> _LABEL:
        """Operators that only rename axes."""
        label, before, after = self.labels[source.name], self.spaces.axes[source.name], self.spaces.axes[n.name]
        if source.name in self.zero:
            self.zero.add(n.name)
        to = {i: [j for j, b in enumerate(after) if b is a] for i, a in enumerate(before)}
        out: _LABEL = {}
        for (axis, block, key), mask in label.items():
            if axis == -1:
                out[axis, block, key] = mask
            elif len(to[axis]) == 1:
                out[to[axis][0], block, key] = mask
            elif before[axis].size != 1:
                self._forbid(key, mask)
        return out

    def _contract(self, n: Node, c: Contraction) -> _LABEL:
        if any(name in self.zero for name, _ in c.operands):
            self.zero.add(n.name)
            return {}
        at = {label: i for i, label in enumerate(c.out) if label is not None}
        sums: dict[tuple[Any, int, int], int] = {}
        out: _LABEL = {}
        sizes: dict[Any, int] = {}
        for name, labels in c.operands:
            for i, label in enumerate(labels):
                if label is not None:
                    sizes[label] = len(self.blocks(self.spaces.axes[name][i]))
            for (axis, block, key), mask in self.labels[name].items():
                if axis == -1:
                    _xor(out, (-1, -1, WHOLE), mask)
                elif labels[axis] is not None:
                    sums[labels[axis], block, key] = sums.get((labels[axis], block, key), 0) ^ mask
        for (label, block, key), mask in sums.items():
            if label in at:
                _xor(out, (at[label], block, key), mask)
            elif key != WHOLE:
                self._forbid(key, mask)
        for label in {s[0] for s in sums if s[2] == WHOLE and s[0] not in at}:
            first = sums.get((label, 0, WHOLE), 0)
            for block in range(1, sizes[label]):
                self._forbid(WHOLE, sums.get((label, block, WHOLE), 0) ^ first)
            _xor(out, (-1, -1, WHOLE), first)
        return {s: m for s, m in out.items() if m}

    def _ask(self, n: Node, inputs: list[Node]) -> Any:
        found = self.spaces.axes[n.name]
        several = bool(found) and (isinstance(found[0], list) or found[0] is None)
        results = [r or [] for r in found] if several else [found]
        out: list[_LABEL] = [{} for _ in results]
        if any(a.name in self.zero for a in inputs) and self._vanishes(n, inputs):
            self.zero.add(n.name)
            return out if several else out[0]
        groups: dict[int, dict[int, list[tuple[int, _SLOT]]]] = {}
        for i, a in enumerate(inputs):
            label = self.labels.get(a.name)
            for slot, mask in (label if isinstance(label, dict) else {}).items():
                groups.setdefault(slot[2], {}).setdefault(mask, []).append((i, slot))
        free = [self.slots(r) for r in results]
        for key, by_mask in groups.items():
            targets = [f.get(key, []) for f in free]
            relation = self._relation(n, inputs, key, list(by_mask.values()), results, targets)
            self._apply(key, list(by_mask), relation, targets, out)
        return out if several else out[0]

    def _apply(self, key: int, masks: list[int], relation: _RELATION, targets: list[list[_SLOT]], out: list[_LABEL]) -> None:
        """Turn the negations an operator bears, (set of groups, negated slots of each result), into labels and constraints."""
        allowed = Echelon()
        image: dict[int, list[int]] = {}
        for groups, slots in relation:  # reduce to echelon form, carrying the images along
            slots = list(slots)
            for p in sorted(allowed.rows, reverse=True):
                if groups >> p & 1:
                    groups ^= allowed.rows[p]
                    slots = [s ^ t for s, t in zip(slots, image[p], strict=True)]
            if groups:
                p = groups.bit_length() - 1
                for q in allowed.rows:
                    if allowed.rows[q] >> p & 1:
                        allowed.rows[q] ^= groups
                        image[q] = [s ^ t for s, t in zip(image[q], slots, strict=True)]
                allowed.rows[p], image[p] = groups, slots
                allowed.pivots |= 1 << p
        for rule in allowed.kernel(len(masks)):
            total = 0
            for i, m in enumerate(masks):
                total ^= m if rule >> i & 1 else 0
            self._forbid(key, total)
        for p, slots in image.items():
            for result, (bits, names) in enumerate(zip(slots, targets, strict=True)):
                for j, slot in enumerate(names):
                    if bits >> j & 1:
                        _xor(out[result], slot, masks[p])

    # -- asking an operator --

    def _relation(
        self, n: Node, inputs: list[Node], key: int, groups: list[_GROUP], results: list[list[Axis]], targets: list[list[_SLOT]]
    ) -> _RELATION:
        signature = self._signature(n, inputs, key, groups, results, targets)
        if signature not in self._answers:
            self._answers[signature] = self._probe(n, inputs, key, groups, results, targets)
        return self._answers[signature]

    def _probe(
        self, n: Node, inputs: list[Node], key: int, groups: list[_GROUP], results: list[list[Axis]], targets: list[list[_SLOT]]
    ) -> _RELATION:
        if sum(_elements(self.spaces.axes[a.name]) for a in inputs) > _ELEMENTS:
            return []
        env = self._draw(inputs)
        base = self._run(n, env)
        if base is None:
            return []
        k = len(groups)
        trials = [t for t in _subsets(k, _GROUPS) if t]
        out = []
        for trial in trials:
            moved = dict(env)
            for g in range(k):
                for i, slot in groups[g] if trial >> g & 1 else ():
                    moved[inputs[i].name] = moved[inputs[i].name] * self._sign(slot, self.spaces.axes[inputs[i].name])
            after = self._run(n, moved)
            answer = None if after is None else [self._match(x, y, r, t) for x, y, r, t in zip(base, after, results, targets, strict=True)]
            if answer is not None and all(a is not None for a in answer):
                out.append((trial, [a for a in answer if a is not None]))
        return out

    def _sign(self, slot: _SLOT, axes: Sequence[Axis]) -> Tensor:
        """+-1 tensor, broadcastable to the slice's tensor, negative on one unit (or on the whole block)."""
        axis, block, key = slot
        if axis == -1:
            return torch.tensor(-1.0, dtype=torch.float64)
        m = self.blocks(axes[axis])[block]
        where = grid(m)
        if key != WHOLE:
            where = where.select(m.atoms.index(key), 1)
        sign = torch.ones(axes[axis].size, dtype=torch.float64)
        sign[where.reshape(-1)] = -1
        return sign.reshape([-1 if i == axis else 1 for i in range(len(axes))])

    def _match(self, before: Tensor, after: Tensor, axes: Sequence[Axis], slots: Sequence[_SLOT]) -> int | None:
        """The set of slots whose negation turns one result into the other, or None."""
        if before.shape != after.shape:
            return None
        if before.dtype == torch.bool or not before.is_floating_point():
            return 0 if torch.equal(before, after) else None
        if not _close(before.abs(), after.abs()):
            return None
        signs = [self._sign(s, axes).expand(before.shape) for s in slots]
        glance = (
            torch.unravel_index(torch.linspace(0, before.numel() - 1, _GLANCE).long(), before.shape)
            if before.dim() and before.numel()
            else ()
        )
        for bits in _subsets(len(slots), 8):
            chosen = [s for j, s in enumerate(signs) if bits >> j & 1]
            few = math.prod((s[glance] for s in chosen), start=before[glance])
            if _close(few, after[glance]) and _close(math.prod(chosen, start=before), after):  # most subsets fall at a glance
                return bits
        return None

    def _vanishes(self, n: Node, inputs: list[Node]) -> bool:
        out = self._run(n, self._draw(inputs))
        return out is not None and all(not bool(o.any()) for o in out)

    def _run(self, n: Node, env: Mapping[str, Any]) -> list[Tensor] | None:
        try:
            value = self.graph._evaluate(n, env)
        except Exception:  # an operator that does not take Gaussian inputs bears no negation
            return None
        return [value] if isinstance(value, Tensor) else [v for v in value if isinstance(v, Tensor)]

    def _draw(self, inputs: Sequence[Node]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for a in inputs:
            shape = [x.size for x in self.spaces.axes[a.name]]
            value, known = a.meta.get("val"), self.spaces.constants.get(a.name)
            dtype = value.dtype if isinstance(value, Tensor) else torch.float64
            if known is not None:
                out[a.name] = known
            elif a.name in self.zero:
                out[a.name] = torch.zeros(shape, dtype=torch.float64)
            elif dtype == torch.bool:
                out[a.name] = torch.rand(shape, generator=self.random) > 0.5
            elif not dtype.is_floating_point:
                out[a.name] = torch.randint(0, 2, shape, generator=self.random)
            else:
                out[a.name] = torch.randn(shape, generator=self.random, dtype=torch.float64)
        return out

    def _signature(self, n: Node, inputs: list[Node], key: int, groups: Any, results: Any, targets: Any) -> Any:
        position = {a.name: i for i, a in enumerate(inputs)}
        args = torch.fx.node.map_arg((n.args, n.kwargs), lambda a: f"<{position.get(a.name, a.name)}>")
        known = [a.name if a.name in self.spaces.constants else "" for a in inputs]
        shapes = [tuple(x.size for x in self.spaces.axes[a.name]) for a in inputs]
        tensors = tuple((shape, a.name in self.zero, k) for shape, a, k in zip(shapes, inputs, known, strict=True))

        def layout(slot: _SLOT, axes: Sequence[Axis]) -> Any:
            if slot[0] == -1:
                return -1
            m = self.blocks(axes[slot[0]])[slot[1]]
            return slot[0], m.offset, m.strides, m.sizes, m.atoms.index(key) if key != WHOLE else -1

        asked = tuple(tuple((i, layout(s, self.spaces.axes[inputs[i].name])) for i, s in g) for g in groups)
        told = tuple(tuple(layout(s, r) for s in t) for r, t in zip(results, targets, strict=True))
        return str(n.target), str(args), tensors, asked, told


def _xor(label: _LABEL, slot: _SLOT, mask: int) -> None:
    label[slot] = label.get(slot, 0) ^ mask


def _elements(axes: Any) -> int:
    total = 1
    for a in axes:
        total *= a.size if isinstance(a, Axis) else 1
    return total


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def _subsets(n: int, most: int) -> Iterator[int]:
    """Sets to try: every one of up to ``most`` members, else none, all, single ones and pairs."""
    if n <= most:
        yield from range(1 << n)
        return
    yield from (0, (1 << n) - 1)
    yield from (1 << i for i in range(n))
    yield from ((1 << i) | (1 << j) for i, j in itertools.combinations(range(min(n, 24)), 2))


# -- solutions -----------------------------------------------------------------------------------------------------------------


def _solutions(spaces: Spaces, system: SignPass) -> Iterator[SignSolution]:
    bases = {key: _sparse(system.constraints.get(key, Echelon()).kernel(len(v))) for key, v in system.variables.items()}
    atoms = sorted((k for k in bases if k != WHOLE), key=lambda k: -len(spaces.atoms[k].parents))
    images: dict[int, list[int]] = {}
    for key in atoms:
        basis = independent(bases[key], images.get(key, []))
        for v in bases[key]:
            for target in [*spaces.atoms[key].parents, WHOLE]:
                found = image(spaces, system, v, key, target)
                if found:
                    images.setdefault(target, []).append(found)
        for v in basis:
            yield SignSolution(unit_signs(spaces, system, v, key))
    for v in independent(bases.get(WHOLE, []), images.get(WHOLE, [])):
        yield SignSolution(global_sign(spaces, system, v))


def global_sign(spaces: Spaces, system: SignPass, v: int) -> GlobalSign:
    """The action of a solution for whole tensors and blocks."""
    chosen = [x for i, x in enumerate(system.variables[WHOLE]) if v >> i & 1]
    slices = tuple((t, None, None) if i == -1 else (t, i, b) for t, i, b, _ in chosen)
    return GlobalSign(slices, tuple(None if i is None or b is None else spaces.blocks(t, i)[b] for t, i, b in slices))


def independent(basis: Sequence[int], known: Sequence[int]) -> list[int]:
    """Vectors of a basis that are independent of known ones, as short as those allow."""
    span = Echelon()
    used = [v for v in known if span.add(v)]
    out = [v for v in sorted(basis, key=int.bit_count) if span.add(v)]
    return _sparse(out, used)


def unit_signs(spaces: Spaces, system: SignPass, v: int, key: int) -> Signs:
    """The action of a solution for the units of an atom."""
    wanted = {x[:3] for i, x in enumerate(system.variables[key]) if v >> i & 1}
    return Signs(units_of(spaces, spaces.atoms[key], [p for p in spaces.atoms[key].places if (p.tensor, p.axis, p.slot) in wanted]))


def image(spaces: Spaces, system: SignPass, v: int, key: int, target: int) -> int:
    """What negating every unit of an atom does, in the unknowns of an enclosing atom or of whole tensors."""
    out = 0
    for i, (tensor, axis, block, _) in enumerate(system.variables[key]):
        if not v >> i & 1:
            continue
        for variable in _enclosing(spaces, system, (tensor, axis, block, key), target):
            if variable in system.index:
                out ^= 1 << system.index[variable]
    return out


def _enclosing(spaces: Spaces, system: SignPass, variable: _VARIABLE, target: int) -> list[_VARIABLE]:
    """Unknowns of an enclosing atom (or of the tensor) that one block of an atom's units adds up to."""
    tensor, axis, block, key = variable
    if (tensor, axis, block, target) in system.index:
        return [(tensor, axis, block, target)]
    if target == WHOLE:
        wholes = [x for x in system.variables.get(WHOLE, []) if x[0] == tensor]
        first = wholes[0][1] if wholes else -1
        return [x for x in wholes if x[1] == first]
    mine = [p for p in spaces.atoms[key].places if p.tensor == tensor]
    others = [p for p in spaces.atoms[target].places if p.tensor == tensor and p.axis != axis]
    if len(mine) == len(others):  # as many of both: they go in order
        others = [q for p, q in zip(mine, others, strict=True) if (p.axis, p.slot) == (axis, block)]
    return [(tensor, p.axis, p.slot, target) for p in others if p.axis == others[0].axis]
