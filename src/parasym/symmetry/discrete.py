"""Discrete symmetries of a traced graph: permutations, signs and exchanges, each certified by its finite action.

Index spaces (:mod:`parasym.symmetry.spaces`) propose which units may be exchanged, a linear system over F2
(:mod:`parasym.symmetry.signs`) which slices may be negated together, colour refinement
(:mod:`parasym.symmetry.exchange`) which tensors may be swapped. The judge is always the function: every candidate acts on
generic parameters and on the given ones, and outputs must agree to 1e-10.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parasym.core.graph import Graph, standardise
from parasym.core.guards import math_attention
from parasym.symmetry.discrete_actions import (
    Discrete,
    Exchange,
    Joint,
    Pairs,
    Permutations,
    Signs,
    Units,
    equal_units,
    fixed_by,
    units_of,
    zero_units,
)
from parasym.symmetry.exchange import exchanges
from parasym.symmetry.inversions import inversions
from parasym.symmetry.signs import SignPass, sign_pass, sign_solutions
from parasym.symmetry.spaces import Atom, Spaces, find_spaces
from parasym.symmetry.symmetry import FixedSet, Params, Symmetry

TOLERANCE = 1e-10
_MOVED = 1e-6
_BATCHES, _MORE, _NUMBERS = 2, 12, 32


@dataclass(frozen=True)
class Candidate:
    """A discrete symmetry that has been proposed, not certified.

    Attributes:
        name: what it does and where.
        group: "S_6", "Z2^4", "S_2 wr S_2".
        action: how its elements move parameters.
        fixed_set: its collapsed states.
        note: what else moves with it.
        fallback: a coarser proposal, for when this one is refuted.
    """

    name: str
    group: str
    action: Discrete
    fixed_set: FixedSet | None = field(default=None, repr=False)
    note: str = ""
    fallback: Candidate | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """What it moves, without sizes: candidates of a twin and of the full model correspond by it."""
        return self.action.key()

    def parameters(self, graph: Graph) -> tuple[str, ...]:
        return tuple(n for n in self.action.tensors if n in graph.params)


def discrete_symmetries(
    graph: Graph, batches: Sequence[Sequence[Tensor]], generator: torch.Generator | None = None
) -> tuple[list[Symmetry], list[dict[str, Any]], list[dict[str, Any]]]:
    """Find and certify the discrete symmetries of a traced model.

    Args:
        graph: a traced model, with parameter values.
        batches: data to certify on; the first two are used, more where a batch gives only a number or two.
        generator: random state of the certificates.

    Returns:
        certified symmetries; candidates that the function refuted, each with its error; what could not be decided.
    """
    judge = Judge(graph, batches, generator)
    found: list[Symmetry] = []
    refuted: list[dict[str, Any]] = []
    undecided: list[dict[str, Any]] = []
    spaces = find_spaces(graph)
    for c in _candidates(graph, spaces):
        verdict = judge.verdict(c)
        while verdict.status != "certified" and c.fallback is not None:
            c = c.fallback
            verdict = judge.verdict(c)
        if verdict.status == "certified":
            found.append(as_symmetry(graph, c, verdict.error))
            found += _partial(graph, spaces, c, judge)
        else:
            entry = _entry(c.name, c.group, c.parameters(graph), verdict.error, verdict.reason)
            (refuted if verdict.status == "refuted" else undecided).append(entry)
    undecided += [_entry(f"axes of {node}", "", (), None, f"no index rule for operator {op}") for node, op in spaces.unknown.items()]
    return found, refuted, undecided


def _entry(name: str, group: str, parameters: Sequence[str], error: float | None, reason: str) -> dict[str, Any]:
    return {"name": name, "group": group, "parameters": list(parameters), "error": error, "reason": reason}


def discrete_candidates(graph: Graph) -> list[Candidate]:
    """The candidates of :func:`discrete_symmetries`, uncertified; the graph may live on the meta device."""
    return _candidates(graph, find_spaces(graph))


# -- certificates --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """status: certified | refuted | undecided; error: largest relative change of an output."""

    status: str
    error: float
    reason: str = ""


class Judge:
    """Compares outputs before and after a finite action, in float64, at generic and at given parameters."""

    def __init__(self, graph: Graph, batches: Sequence[Sequence[Tensor]], generator: torch.Generator | None) -> None:
        self.graph, self.generator = graph, generator
        self.batches = [tuple(b) for b in batches[:_BATCHES]]
        self.envs = [graph.prepare(b) for b in self.batches]
        while len(self.batches) < min(len(batches), _MORE) and self._numbers() < _NUMBERS:  # a loss: one number a batch
            self.batches.append(tuple(batches[len(self.batches)]))
            self.envs.append(graph.prepare(self.batches[-1]))
        draws: list[Params] = [perturbed(graph.params, generator, scale) for scale in (0.5, 0.1)]
        self.points = [p for p in (graph.params, *draws) if self._finite(p)][:2] or [graph.params]
        self.before = [self._outputs(p, self.envs) for p in self.points]

    def verdict(self, candidate: Candidate) -> Verdict:
        return self.verdict_of(candidate.action)

    def verdict_of(self, action: Discrete) -> Verdict:
        worst, moved = 0.0, 0.0
        for element in action.tests(self.generator):
            for point, before in zip(self.points, self.before, strict=True):
                error, step = self._error(action, element, point, before)
                worst, moved = max(worst, error), max(moved, step)
                if not error <= TOLERANCE:
                    return Verdict("refuted", error, "outputs change")
        if moved < _MOVED:
            return Verdict("undecided", worst, "it does not move the parameters")
        return Verdict("certified", worst)

    def _error(self, action: Discrete, element: Tensor, point: Params, before: list[list[Tensor]]) -> tuple[float, float]:
        state = {**self.graph.buffers, **point}
        after_state = action.act(state, element)
        moved = max((_change(state[n], v) for n, v in after_state.items() if n in point), default=0.0)
        envs = self.envs
        if any(n in self.graph.buffers for n in after_state):
            shifted = dataclasses.replace(self.graph, buffers={k: after_state.get(k, v) for k, v in self.graph.buffers.items()})
            envs = [shifted.prepare(b) for b in self.batches]
        after = self._outputs({**point, **{n: v for n, v in after_state.items() if n in point}}, envs)
        errors = [_change(x, y) for xs, ys in zip(before, after, strict=True) for x, y in zip(xs, ys, strict=True)]
        return max(errors, default=0.0), moved

    def _outputs(self, params: Params, envs: Sequence[Any]) -> list[list[Tensor]]:
        with torch.no_grad(), math_attention():
            return [self.graph.replay(params, env) for env in envs]

    def _numbers(self) -> int:
        return sum(o.numel() for out in self._outputs(self.graph.params, self.envs) for o in out)

    def _finite(self, params: Params) -> bool:
        return all(bool(torch.isfinite(o).all()) for out in self._outputs(params, self.envs) for o in out)


def _change(a: Tensor, b: Tensor) -> float:
    size = float(torch.linalg.vector_norm(a))
    gap = float(torch.linalg.vector_norm(a - b))
    return gap / size if size > 0 else gap


def perturbed(params: Params, generator: torch.Generator | None, scale: float) -> dict[str, Tensor]:
    """Generic parameters near the given ones: Gaussian steps of a fraction of each tensor's own spread."""
    out = {}
    for name, p in params.items():
        spread = float(p.square().mean().sqrt()) if p.numel() else 0.0
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype if p.is_floating_point() else torch.float64)
        out[name] = p + scale * (spread if spread > 0 else 0.1) * noise
    return out


def as_symmetry(graph: Graph, c: Candidate, residual: float) -> Symmetry:
    names = c.parameters(graph)
    batchwise = any(n.target is standardise for n in graph.nodes)  # true of the function of a whole batch
    return Symmetry(
        name=c.name, group=c.group, dim=0, kind="discrete", parameters=names,
        level="train" if batchwise else "function", residual=residual, certified=True,
        action=c.action, where=common_path(names), order=c.action.order, fixed_set=c.fixed_set, note=c.note,
    )  # fmt: skip


def common_path(names: Sequence[str]) -> str:
    """The module path that parameters share."""
    paths = [n.split(".")[:-1] for n in names]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    return ".".join(shared)


# -- candidates ----------------------------------------------------------------------------------------------------------------


def _candidates(graph: Graph, spaces: Spaces) -> list[Candidate]:
    system = sign_pass(graph, spaces)
    return [
        *_permutations(graph, spaces), *_signs(graph, spaces, system), *_inversions(graph, spaces, system), *_exchanges(graph, spaces),
    ]  # fmt: skip


def _live(graph: Graph, names: Iterable[str]) -> bool:
    return any(n in graph.params and n not in graph.dead for n in names)


def _note(graph: Graph, names: Sequence[str]) -> str:
    moved = [n for n in names if n not in graph.params]
    return f"running statistics move with it: {', '.join(moved)}" if moved else ""


def _permutations(graph: Graph, spaces: Spaces) -> list[Candidate]:
    free = [a for a in spaces.atoms if a.frozen is None and a.size > 1 and _live(graph, a.parameters)]
    children: dict[int, list[Atom]] = {}
    for a in free:
        for p in a.parents:
            children.setdefault(p, []).append(a)
    out: list[Candidate] = []
    done: set[frozenset[int]] = set()
    for a in free:
        mutual = [spaces.atoms[p] for p in a.parents if a.number in spaces.atoms[p].parents and spaces.atoms[p].frozen is None]
        if mutual and _side_by_side(a, *mutual):
            key = frozenset({a.number, *(b.number for b in mutual)})
            if key not in done:
                done.add(key)
                out.append(_pairs(graph, tuple(sorted((a, *mutual), key=lambda x: x.number))))
            continue
        inside = [c for c in children.get(a.number, []) if c.number not in a.parents]
        if not _covered(a, inside):
            out.append(_permutation(graph, spaces, a))
    return out


def _side_by_side(*atoms: Atom) -> bool:
    """Whether atoms occur equally often in the same tensors."""
    return len({tuple(sorted(p.tensor for p in a.places)) for a in atoms}) == 1


def _covered(a: Atom, children: Sequence[Atom]) -> bool:
    """Whether the group of the only atom inside this one includes this one's exchanges (a wreath product is reported)."""
    return len(children) == 1 and set(a.parameters) <= set(children[0].parameters)


def _permutation(graph: Graph, spaces: Spaces, a: Atom) -> Candidate:
    plain = [p for p in a.parents if a.number not in spaces.atoms[p].parents]
    action = Permutations(units_of(spaces, a, parents=plain))
    above = action.units.parents
    name = f"exchange of {a.size} units: {summary(a.parameters)}"
    note = _note(graph, action.tensors)
    if not above:
        return Candidate(name, f"S_{a.size}", action, equal_units(action), note)
    sets = action.units.sets
    name = f"exchange of {a.size} units in each of {sets} sets: {summary(a.parameters)}"
    movable = [p for p in above if p.frozen is None and p.places and not p.parents]
    if len(movable) != len(above):  # sets that cannot be exchanged, or whose exchange is itself listed as a wreath product
        return Candidate(name, f"S_{a.size}^{sets}", action, equal_units(action), note)
    outer = tuple(Permutations(units_of(spaces, p)) for p in movable)
    top = outer[0].units.size if len(outer) == 1 else None
    group = f"S_{a.size} wr " + (f"S_{top}" if top else "(" + " x ".join(f"S_{o.units.size}" for o in outer) + ")")
    joint = Joint((action, *outer))
    return Candidate(name + ", and of the sets", group, joint, equal_units(action), _note(graph, joint.tensors))


def _pairs(graph: Graph, atoms: tuple[Atom, ...]) -> Candidate:
    action = Pairs(atoms)
    name = f"exchange of {action.size} units indexed by {' x '.join(str(a.size) for a in atoms)}: {summary(action.tensors)}"
    fixed = fixed_by(action, "two units are equal") if action.size <= 64 else None
    return Candidate(name, f"S_{action.size}", action, fixed, _note(graph, action.tensors))


def summary(names: Sequence[str], most: int = 4) -> str:
    """Parameter names for a title: the first few, and how many more."""
    head = ", ".join(names[:most])
    return head + (f" and {len(names) - most} more" if len(names) > most else "")


def _signs(graph: Graph, spaces: Spaces, system: SignPass) -> list[Candidate]:
    out = []
    for s in sign_solutions(spaces, system):
        names = s.action.tensors
        if not _live(graph, names):
            continue
        if isinstance(s.action, Signs):
            u = s.action.units
            per = f"per unit ({u.size})" if u.sets == 1 else f"per unit ({u.size} in each of {u.sets} sets)"
            name, group = f"sign of {summary(_parts(spaces, u))}, {per}", _power("Z2", s.action.order)
            out.append(Candidate(name, group, s.action, zero_units(s.action), _note(graph, names)))
        else:
            out.append(Candidate(f"sign of {summary(names)}", "Z2", s.action, fixed_by(s.action, "everything negated is zero")))
    return out


def _parts(spaces: Spaces, u: Units) -> tuple[str, ...]:
    """The tensors of some places; of one that lists its units in several blocks, which blocks."""
    where: dict[str, dict[int, list[int]]] = {}
    for p in u.places:
        where.setdefault(p.tensor, {}).setdefault(p.axis, []).append(p.slot)
    out = []
    for tensor, axes in where.items():
        marks = []
        for axis, slots in axes.items():
            total = len(spaces.blocks(tensor, axis)) if tensor in spaces.graph.params else 1
            marks += [f"axis {axis}, block {', '.join(str(s) for s in slots)} of {total}"] if len(slots) < total else []
        out.append(tensor + (f" ({'; '.join(marks)})" if marks else ""))
    return tuple(out)


def _inversions(graph: Graph, spaces: Spaces, system: SignPass) -> list[Candidate]:
    out = []
    for action in inversions(graph, spaces, system):
        how = f"turning over the slope {action.slope}" if action.slope else "with a shift of the next bias"
        per = f", per unit ({action.order})" if isinstance(action.signs, Signs) else ""
        name = f"sign of {summary(action.signs.tensors)}, {how}{per}"
        out.append(Candidate(name, _power("Z2", action.order), action, None, "acts nonlinearly: no collapsed states"))
    return out


def _power(group: str, n: int) -> str:
    return group if n == 1 else f"{group}^{n}"


def _exchanges(graph: Graph, spaces: Spaces) -> list[Candidate]:
    out = []
    for alternatives in exchanges(graph, spaces):
        best: Candidate | None = None
        for action, group in reversed(alternatives):
            best = _exchange(action, group, best)
        if best is not None:
            out.append(best)
    return out


def _exchange(action: Exchange | Joint, group: str, fallback: Candidate | None) -> Candidate:
    parts = action.parts if isinstance(action, Joint) else (action,)
    swaps = [s for p in parts if isinstance(p, Exchange) for s in p.swaps]
    if isinstance(action, Joint):
        name = f"exchange of {len(parts) + 1} equal parts: {summary(tuple(dict.fromkeys(n for s in swaps for n in s)))}"
    else:
        pairs = ", ".join(f"{a} and {b}" for a, b in swaps[:3]) + (f" and {len(swaps) - 3} more" if len(swaps) > 3 else "")
        name = f"exchange of {pairs}" + (f", per index of {len(action.inside)} axes ({action.order})" if action.inside else "")
    fixed = fixed_by(action, "the exchanged parameters are equal") if action.order <= 256 else None
    return Candidate(name, group, action, fixed, "", fallback)


# -- part of a space -----------------------------------------------------------------------------------------------------------


def _partial(graph: Graph, spaces: Spaces, c: Candidate, judge: Judge) -> list[Symmetry]:
    """Exchanges that hold already when some modules of a space stay in place (only what the function confirms)."""
    action = c.action
    if not isinstance(action, Permutations) or action.units.parents:
        return []
    groups: dict[str, list[Any]] = {}
    for p in action.units.places:
        groups.setdefault(p.tensor.rpartition(".")[0] or p.tensor, []).append(p)
    if not 3 <= len(groups) <= 4:
        return []
    out: list[Symmetry] = []
    stays: list[str] = []
    for module in groups:
        if module in stays:
            continue
        rest = [p for m, ps in groups.items() if m != module and m not in stays for p in ps]
        part = Permutations(units_of(spaces, action.units.atom, rest))
        verdict = judge.verdict_of(part)
        if verdict.status == "certified" and len({p.tensor for p in rest}) > 1:
            stays.append(module)
            name = f"exchange of {action.units.size} units with {module} left in place: {summary(part.tensors)}"
            out.append(as_symmetry(graph, Candidate(name, c.group, part, equal_units(part), c.note), verdict.error))
    return out
