"""Agreement with another checkpoint (re-basin): the point of one network's orbit that lies closest to another network.

Units are matched by linear assignment, one index space at a time until nothing changes, as in git-re-basin's weight matching (Ainsworth,
Hayase, Srinivasa 2023); where the group is larger, so is the search: heads are compared up to the rotation inside them, signs are chosen,
rotations come by Procrustes, rescalings by Newton, and a descent over all group coordinates ends it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from parasym.core.errors import InputError
from parasym.core.functional import cast, functional
from parasym.laws.charges import Charge, charge_of
from parasym.measure import gradients
from parasym.methods.balancing import Pairs, balancing, element, imbalance, two_sided
from parasym.methods.objectives import Objective, Problem, Solution
from parasym.methods.orbit import Move, Orbit, Point, apply, descend, least_squares
from parasym.symmetry.dictionary import DictionaryAction, Term, embed_gain, put, units
from parasym.symmetry.discrete_actions import Joint, Permutations, Signs, unit_vectors
from parasym.symmetry.symmetry import Params, Symmetry

_ROUNDS = 100  # of coordinate descent over index spaces
_SIZES = (0.03, 0.1)  # of the steps of what is matched to, in its own norm


@dataclass
class Agreement(Objective):
    """Distance to a reference network, relative to its norm.

    Attributes:
        reference: a model of the same architecture, or its state dict.
        restarts: random orders in which index spaces are matched, for each kind of matching (plain weight matching three times as
            often); the closest result is kept. Where scales do not count (before a norm) the closest need not have the lowest
            barrier: give data where there is some.
        continuous: use rotations, rescalings and shifts too; False leaves permutations and signs.
        iterations: of the last descent.
        loss_fn, data: where given, candidates (each restart, before and after the continuous moves) are judged by the loss midway between
            the two networks instead of their distance, and the matching learns from its gradient (git-re-basin, section 3.3: what is
            matched to is moved down the gradient of the loss midway, and matched to again).
        lessons: of such steps, for each of two sizes.
    """

    reference: nn.Module | Mapping[str, Tensor]
    restarts: int = 6
    continuous: bool = True
    iterations: int = 100
    loss_fn: gradients.LossFn | None = None
    data: Any = None
    lessons: int = 15
    name = "agreement"

    def value(self, problem: Problem, params: Params) -> float:
        target = self.target(problem)
        gap = sum(float((params[n] - t).square().sum()) for n, t in target.items() if n in problem.params)
        return math.sqrt(gap / max(sum(float(t.square().sum()) for n, t in target.items() if n in problem.params), 1e-300))

    def target(self, problem: Problem) -> Point:
        """The reference's parameters and buffers, float64, by the names of the problem.

        Raises:
            InputError: it lacks a parameter, has one of another shape, or is not finite.
        """
        if isinstance(self.reference, nn.Module):
            view = functional(self.reference)
            held: Mapping[str, Tensor] = {**view.buffers, **view.params}
        elif isinstance(self.reference, Mapping):
            held = self.reference
        else:
            raise InputError(f"The reference must be a model or a state dict, got {type(self.reference).__name__}.")
        out: Point = {}
        for ours, name in problem.names.items():
            found, own = held.get(name), problem.params.get(ours, problem.buffers.get(ours))
            if found is None or own is None:
                if ours in problem.params:
                    raise InputError(f"The reference has no parameter {name!r}: it must be a checkpoint of the same architecture.")
                continue
            if found.shape != own.shape:
                raise InputError(f"{name!r} has shape {tuple(found.shape)} in the reference and {tuple(own.shape)} in the model.")
            if not bool(torch.isfinite(found).all()) and ours in problem.params:
                raise InputError(f"{name!r} is not finite in the reference.")
            out[ours] = found.detach().double()
        return out

    def solve(self, problem: Problem) -> Solution:
        target = self.target(problem)
        problem.orbit = problem.orbit.only(lambda s: not _statistics(s))
        start = {**problem.buffers, **problem.params}
        best: tuple[float, list[Move]] = (self._judge(problem, start, target), [])
        for moves, closer in self._matched(problem, start, target):
            candidates = [moves]
            if closer:
                candidates.append([*moves, *self._closer(problem, apply(moves, start), target)])
            for tried in candidates:
                value = self._judge(problem, apply(tried, start), target)
                if value < best[0]:
                    best = value, tried
        return Solution(best[1], "ok", "", {"restarts": self.restarts})

    def _matched(self, problem: Problem, start: Point, target: Point) -> Iterator[tuple[list[Move], bool]]:
        """Moves that match units, and whether the continuous ones may follow."""
        pairs = two_sided(problem.orbit.families) if self.continuous else []
        ours, theirs = balanced(pairs, start), balanced(pairs, target)
        weights = {n: target[n] for n in problem.params}  # running statistics go along, and say nothing about who is who
        gauged = apply(theirs, target)
        aims: list[tuple[list[Move], Matcher]] = [
            (ours, Matcher(problem.orbit, {n: gauged[n] for n in weights}, self.continuous)),
            ([], Matcher(problem.orbit, weights, False)),
        ]
        plain = replace(problem.orbit, discrete=tuple(_unsigned(problem.orbit)))
        weight_matching = Matcher(plain, weights, False)
        aims.append(([], weight_matching))
        for attempt in range(max(1, self.restarts)):
            problem.tell(attempt / self.restarts)
            for first, aim in aims:
                yield [*first, *aim.match(apply(first, start), problem.generator)], bool(first)
        for _ in range(2 * self.restarts):  # cheap, and its optima are many
            yield weight_matching.match(start, problem.generator), False
        if self.data is not None:
            for size in _SIZES:
                yield self._learned(problem, plain, start, weights, size), bool(pairs)

    def _learned(self, problem: Problem, orbit: Orbit, start: Point, target: Point, size: float) -> list[Move]:
        """The best of the permutations met while what is matched to goes down the gradient of the loss midway.

        Each step moves every tensor by ``size`` of its norm.
        """
        aim, best = dict(target), (math.inf, list[Move]())
        for _ in range(self.lessons):
            moves = Matcher(orbit, aim, False).match(start, problem.generator)
            point = apply(moves, start)
            objective, found = middle(problem, point, target, self.loss_fn, self.data)
            leaves = {n: p.detach().requires_grad_() for n, p in objective.params.items() if n in aim}
            value = torch.stack([share * objective({**objective.params, **leaves}, b) for b, share in found]).sum()
            if float(value.detach()) < best[0]:
                best = float(value.detach()), moves
            slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
            for n, g in zip(leaves, slopes, strict=True):
                aim[n] = aim[n] - size * target[n].norm() / g.norm().clamp_min(1e-300) * g
        return best[1]

    def _judge(self, problem: Problem, point: Params, target: Params) -> float:
        if self.data is None:
            return self.value(problem, point)
        return midway(problem, point, target, self.loss_fn, self.data)

    def _closer(self, problem: Problem, point: Point, target: Point) -> list[Move]:
        """Rescalings, shifts and a descent over all coordinates, towards the reference."""
        moves, now = list[Move](), point
        for s in problem.orbit.families:
            c = charge_of(s)
            step = None
            if isinstance(c, Charge) and c.kind == "quadratic":
                step = element(s, c, closest_scale(c, now, target))
            elif not _linear(s):
                step = least_squares(s, now, target)
            if step is not None and bool((step != 0).any()):
                moves.append(Move(s.name, s.action, step))
                now = moves[-1].act(now)
        orbit = problem.orbit.only(lambda s: _linear(s))

        def loss(p: Point) -> Tensor:
            return torch.stack([(p[n] - target[n]).square().sum() for n in problem.params]).sum()

        if orbit.dim:
            moves += descend(orbit, now, loss, iterations=self.iterations, limit=3.0).moves
        return moves


def midway(problem: Problem, point: Params, target: Params, loss_fn: gradients.LossFn | None, data: Any) -> float:
    """The loss of the mean of two networks, on all batches."""
    objective, found = middle(problem, point, target, loss_fn, data)
    with torch.no_grad():
        return sum(share * float(objective(objective.params, b)) for b, share in found)


def middle(
    problem: Problem, point: Params, target: Params, loss_fn: gradients.LossFn | None, data: Any
) -> tuple[gradients.Objective, list[tuple[Any, float]]]:
    """The mean of two networks with a loss, and the batches with their shares of all samples."""
    twin, found = problem.at({n: (point[n] + target[n]) / 2 for n in problem.params}), list(gradients.batches(data))
    _fresh_statistics(twin, [b[0] if loss_fn is not None else b for b in found])
    sizes = [gradients.batch_size(b) for b in found]
    return gradients.Objective(twin, loss_fn, dtype=torch.float64), [(b, n / sum(sizes)) for b, n in zip(found, sizes, strict=True)]


def _fresh_statistics(model: nn.Module, inputs: Sequence[Any]) -> None:
    """Running statistics of batch norms taken anew: those of either end say nothing about the mean of two networks."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats and not m.training]
    if not norms:
        return
    for m in norms:
        m.reset_running_stats()
        m.momentum = None
        m.train()
    view = functional(model)
    with torch.no_grad():
        for x in inputs:
            args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else (tuple(x) if isinstance(x, tuple | list) else (x,), {})
            view.model(*cast(args, torch.float64), **cast(kwargs, torch.float64))
    for m in norms:
        m.eval()


def balanced(pairs: Pairs, params: Params, sweeps: int = 10) -> list[Move]:
    """Moves to equal norms on both sides of every pair: a gauge in which two networks can be compared."""
    moves, now = list[Move](), dict(params)
    for _ in range(sweeps if pairs else 0):
        if imbalance(pairs, now) <= 1e-9:
            break
        step = balancing(pairs, now)
        moves, now = [*moves, *step], apply(step, now)
    return moves


def _unsigned(orbit: Orbit) -> list[Symmetry]:
    return [s for s in orbit.discrete if not isinstance(s.action, Signs)]


def _linear(s: Symmetry) -> bool:
    return isinstance(s.action, DictionaryAction) and s.action.entry.algebra in ("scale", "gl", "so", "so1")


def _statistics(s: Symmetry) -> bool:
    """Whether an action holds running statistics of the units in their present order, which a permutation would leave behind."""
    return isinstance(s.action, DictionaryAction) and any(t.factor is not None or t.op == "recentre" for _, t in s.action.entry.terms)


def closest_scale(c: Charge, params: Params, target: Params, steps: int = 30) -> Tensor:
    """lam of each unit for which exp(lam A) params is closest to the target: Newton's method, guarded; weights +1 and -1."""
    if any(abs(b.weight) != 1 for b in c.blocks):
        return torch.zeros(c.count, dtype=torch.float64)
    (sp, sm), (xp, xm) = c.split(params, params), c.split(target, params)
    lam = torch.zeros(c.count, dtype=torch.float64)

    def f(a: Tensor) -> Tensor:
        return sp * (2 * a).exp() - 2 * xp * a.exp() + sm * (-2 * a).exp() - 2 * xm * (-a).exp()

    for _ in range(steps):
        g = 2 * sp * (2 * lam).exp() - 2 * xp * lam.exp() - 2 * sm * (-2 * lam).exp() + 2 * xm * (-lam).exp()
        h = 4 * sp * (2 * lam).exp() - 2 * xp * lam.exp() + 4 * sm * (-2 * lam).exp() - 2 * xm * (-lam).exp()
        step = torch.where(h > 1e-300, -g / h.clamp_min(1e-300), -g.sign() * 0.1).clamp(-0.5, 0.5)
        for _ in range(5):
            step = torch.where(f(lam + step) <= f(lam), step, step / 2)
        lam = torch.where(f(lam + step) <= f(lam), lam + step, lam)
    return lam.clamp(-3, 3)


# -------------------------------------------------------------------------------------------------------------------- matching


@dataclass(frozen=True)
class Matrices:
    """A family of linear maps by the group's own matrices (count, n, n), so that reflections are reached too."""

    action: DictionaryAction

    @staticmethod
    def inverse(element: Tensor) -> Tensor:
        """The element of the way back."""
        return torch.linalg.inv(element)

    def act(self, params: Params, element: Tensor) -> Point:
        moved: Point = {}
        entry = self.action.entry
        for weight, term in entry.terms:
            p, copy = moved.get(term.place.parameter, params[term.place.parameter].double()), entry.copies.columns(term.place)
            copy = torch.zeros(1, term.place.index.shape[1], dtype=torch.long) if copy is None else copy
            forward = (weight > 0) == (term.op == "mode")
            E = (element if forward and term.op == "mode" else torch.linalg.inv(element) if term.op == "mode" else
                 element.mT if forward else torch.linalg.inv(element).mT)[copy]  # fmt: skip
            g = gain_of(params, term)
            if g is not None:
                E = embed_gain(E, g, term.gain_power if term.op == "mode" else -term.gain_power)
            u = units(p, term.place)
            new = torch.einsum("mij,rjm->rim", E[0], u) if E.shape[0] == 1 else torch.einsum("rmij,rjm->rim", E, u)
            moved[term.place.parameter] = put(p, term.place, new, False)
        return {n: v.to(params[n].dtype) for n, v in moved.items()}


def gain_of(params: Params, term: Term) -> Tensor | None:
    """(m, n) the gain folded into a term, one row for each column of its place; None where there is none."""
    if term.gain is None:
        return None
    g = units(params[term.gain.parameter].double(), term.gain)[0]
    n, m = term.place.index.shape
    return (g if g.shape[1] == m else g[:, :1].expand(n, m)).T


class Matcher:
    """Coordinate descent towards a target: index spaces by assignment, signs, and orthogonal maps by Procrustes."""

    def __init__(self, orbit: Orbit, target: Params, continuous: bool) -> None:
        self.target = target
        self.permutations = [(s.name, a) for s in orbit.discrete for a in _parts(s.action) if isinstance(a, Permutations)]
        self.permutations = list({(a.units.atom.number, a.units.key()): (n, a) for n, a in self.permutations}.values())
        self.signs = [(s.name, s.action) for s in orbit.discrete if isinstance(s.action, Signs)]
        self.rotations = [s for s in orbit.families if _rotation(s)] if continuous else []

    def match(self, params: Point, generator: torch.Generator) -> list[Move]:
        """Moves of one descent, in a random order of the index spaces."""
        moves, now = list[Move](), dict(params)
        steps: list[Callable[[Point], Move | None]] = []
        for name, a in self.permutations:
            inner = [s for s in self.rotations if _inside(s, a)]
            steps.append(lambda p, name=name, a=a, inner=inner: self._assign(p, name, a, inner))  # type: ignore[misc]
        steps += [lambda p, s=s: self._rotate(p, s) for s in self.rotations]  # type: ignore[misc]
        steps += [lambda p, name=name, a=a: self._flip(p, name, a) for name, a in self.signs]  # type: ignore[misc]
        for _ in range(_ROUNDS):
            changed = False
            for i in torch.randperm(len(steps), generator=generator).tolist():
                move = steps[i](now)
                if move is not None:
                    after = move.act(now)
                    if self.distance(after) < self.distance(now) * (1 - 1e-9):
                        moves, now, changed = [*moves, move], after, True
            if not changed:
                break
        return moves

    def distance(self, params: Params) -> float:
        return sum(float((params[n] - t).square().sum()) for n, t in self.target.items() if n in params)

    def _assign(self, params: Point, name: str, a: Permutations, inner: Sequence[Symmetry]) -> Move | None:
        held = {n: t for n, t in self.target.items() if n in params}
        if inner and a.units.sets == 1:
            score = sum((self._up_to_rotation(params, s, a) for s in inner), torch.zeros(()))[None]
            covered = {n for s in inner for n in s.parameters}
            rest = {n: t for n, t in held.items() if n not in covered and n in a.tensors}
            if rest:
                score = score + unit_vectors(a.units, rest) @ unit_vectors(a.units, {n: params[n] for n in rest}).mT
        else:
            score = unit_vectors(a.units, held) @ unit_vectors(a.units, {n: params[n] for n in held}).mT
        table = torch.stack([torch.tensor(linear_sum_assignment(m.numpy(), maximize=True)[1]) for m in score])
        still = torch.arange(a.units.size).expand_as(table)
        if torch.equal(table, still):
            return None
        return Move(name, a, table)

    def _up_to_rotation(self, params: Point, s: Symmetry, a: Permutations) -> Tensor:
        """(units, units): how well each unit of the target is met by each of ours, the best rotation inside taken out."""
        C = _cross(s, self.target, params, every=True)  # (theirs, ours, n, n)
        return torch.linalg.svdvals(C).sum(-1)

    def _rotate(self, params: Point, s: Symmetry) -> Move | None:
        C = _cross(s, self.target, params)
        U, _, Vh = torch.linalg.svd(C)
        R = U @ Vh
        if s.action.entry.algebra == "so1":  # type: ignore[attr-defined]
            return None  # left to the descent
        if s.action.entry.algebra == "so":  # type: ignore[attr-defined]
            U = U.clone()
            U[..., -1] *= torch.linalg.det(R)[..., None].sign()
            R = U @ Vh
        if float((R - torch.eye(R.shape[-1], dtype=R.dtype)).abs().max()) < 1e-9:
            return None
        return Move(s.name, Matrices(s.action), R)  # type: ignore[arg-type]

    def _flip(self, params: Point, name: str, a: Signs) -> Move | None:
        held = {n: t for n, t in self.target.items() if n in params}
        dot = (unit_vectors(a.units, held) * unit_vectors(a.units, {n: params[n] for n in held})).sum(2)
        return Move(name, a, (dot < 0).reshape(-1)) if bool((dot < 0).any()) else None


def _parts(action: Any) -> Iterator[Any]:
    if isinstance(action, Joint):
        for p in action.parts:
            yield from _parts(p)
    else:
        yield action


def _rotation(s: Symmetry) -> bool:
    return isinstance(s.action, DictionaryAction) and s.action.entry.algebra in ("gl", "so", "so1") and s.action.entry.size > 1 and all(
        abs(w) == 1 and t.op in ("mode", "dual") for w, t in s.action.entry.terms
    )  # fmt: skip


def _inside(s: Symmetry, a: Permutations) -> bool:
    """Whether a family has one copy for each unit of a permutation (rotations inside heads)."""
    local = s.action.entry.copies.local  # type: ignore[attr-defined]
    return len(local) == 1 and local[0][1] == a.units.size and local[0][0] == f"a{a.units.atom.number}"


def _cross(s: Symmetry, target: Params, params: Params, every: bool = False) -> Tensor:
    """(copies, n, n) sum over places of target times ours, gains multiplied in; with ``every``, (copies, copies, n, n) for all pairs."""
    entry = s.action.entry  # type: ignore[attr-defined]
    count = entry.copies.count
    total = torch.zeros((count, count, entry.size, entry.size) if every else (count, entry.size, entry.size), dtype=torch.float64)
    for weight, term in entry.terms:
        copy = entry.copies.columns(term.place)
        if weight < 0 or (every and (copy is None or copy.shape[0] > 1)):
            continue
        copy = torch.zeros(1, term.place.index.shape[1], dtype=torch.long) if copy is None else copy
        u, v = (units(p[term.place.parameter].double(), term.place) for p in (target, params))
        gu, gv = gain_of(target, term), gain_of(params, term)
        if gu is not None and gv is not None:  # what the reader sees of a unit without gain
            power = term.gain_power if term.op == "mode" else -term.gain_power
            u, v = (u / gu.T, v / gv.T) if power > 0 else (u * gu.T, v * gv.T)
        if every:
            per = [[u[:, :, copy[0] == i], v[:, :, copy[0] == i]] for i in range(count)]
            for i in range(count):
                for j in range(count):
                    if per[i][0].shape == per[j][1].shape:
                        total[i, j] += torch.einsum("rim,rjm->ij", per[i][0], per[j][1])
            continue
        each = torch.einsum("rim,rjm->rmij", u, v)
        at = copy.expand(each.shape[:2])
        total.index_add_(0, at.reshape(-1), each.reshape(-1, entry.size, entry.size))
    return total
