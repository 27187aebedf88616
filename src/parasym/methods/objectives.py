"""What a teleport can be after: each objective has a value that is reported, and a way to lower it on an orbit.

Balance and minimum norm have closed forms family by family; the noise equilibrium is solved in `parasym.laws.equilibrium`; the rest
goes by L-BFGS over group coordinates.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.functional import Functional
from parasym.core.guards import float64_casts, math_attention, no_checkpointing, preserve, rng_state
from parasym.core.results import Status
from parasym.laws.charges import Charge, charge_of
from parasym.laws.equilibrium import noise_equilibrium
from parasym.measure import gradients
from parasym.measure.curvature import eigenpairs, hessian
from parasym.methods.balancing import balancing, element, imbalance, merged, two_sided
from parasym.methods.orbit import Descent, Move, Orbit, Point, apply, descend, least_squares
from parasym.symmetry.dictionary import DictionaryAction
from parasym.symmetry.symmetry import Params, Symmetry

Inputs = Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]]


@dataclass
class Problem:
    """A model to be moved.

    Attributes:
        model: never changed. f: the model in float64. params: its parameters, float64. buffers: by their names in the graph.
        orbit: where it may go. inputs: (args, kwargs) pairs. generator: of random starts. tell: progress, 0 to 1.
    """

    model: nn.Module
    f: Functional
    params: Point
    buffers: Point
    orbit: Orbit
    inputs: Inputs
    generator: torch.Generator
    tell: Callable[[float], None] = lambda fraction: None

    @property
    def names(self) -> dict[str, str]:
        """Parameter or buffer as the graph names it -> as the model does."""
        return {**{n: n for n in self.params}, **{"b_" + n.replace(".", "_"): n for n in self.f.buffers}}

    def at(self, params: Params) -> nn.Module:
        """A float64 copy of the model with other parameters."""
        twin = copy.deepcopy(self.f.model).double()
        live = dict(twin.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for n in self.params:
                live[n].copy_(params[n])
        return twin

    def outputs(self, params: Params, index: int | None = None) -> list[Tensor]:
        """Outputs on the inputs (or on one of them) in float64; differentiable."""
        found: list[Tensor] = []
        f = dataclasses.replace(self.f, buffers={**self.f.buffers, **{self.names[n]: params[n] for n in self.buffers if n in params}})
        with preserve(self.f.model), math_attention(), float64_casts():
            for args, kwargs in self.inputs if index is None else [self.inputs[index]]:
                with rng_state():
                    found += [o.double() for o in f({n: params[n] for n in self.params}, args, kwargs)]
        return found


@dataclass(frozen=True)
class Solution:
    """The moves that lower an objective, and how far that went."""

    moves: list[Move]
    status: Status = "ok"
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class Objective:
    """Base of the objectives: a name, a value to be lowered, and a solver."""

    name = "objective"

    def value(self, problem: Problem, params: Params) -> float:
        """What is reported before and after."""
        raise NotImplementedError

    def solve(self, problem: Problem) -> Solution:
        """Moves that lower the value."""
        raise NotImplementedError


def _solution(found: Descent, before: Sequence[Move] = (), note: str = "") -> Solution:
    said = "; ".join(filter(None, [note, found.note]))
    return Solution([*before, *found.moves], found.status, said, {"iterations": found.iterations})


@dataclass
class Function(Objective):
    """Any differentiable function of the dict of parameters (canonical name -> float64 tensor).

    Attributes:
        function: returns one number. iterations: of L-BFGS, at most.
    """

    function: Callable[[Point], Tensor]
    iterations: int = 60
    name = "function"

    def value(self, problem: Problem, params: Params) -> float:
        with torch.no_grad():
            return float(self._call(problem, dict(params)))

    def _call(self, problem: Problem, params: Point) -> Tensor:
        out = self.function({n: params[n] for n in problem.params})
        if not isinstance(out, Tensor) or out.numel() != 1:
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(f"The objective must return one number (a tensor of one entry) of the dict of parameters, got {shape}.")
        if not bool(torch.isfinite(out).all()):
            raise InputError("The objective is not finite at these parameters.")
        return out.reshape(()).double()

    def solve(self, problem: Problem) -> Solution:
        probe = {n: p.detach().requires_grad_() for n, p in problem.params.items()}
        value = self._call(problem, probe)
        if not value.requires_grad:
            raise InputError("The objective has no gradient in the parameters: write it with torch operations on the dict it is given.")
        found = torch.autograd.grad(value, list(probe.values()), allow_unused=True)
        read = {n for n, g in zip(probe, found, strict=True) if g is not None}
        orbit = problem.orbit.only(lambda s: not read.isdisjoint(s.parameters))

        def loss(point: Point) -> Tensor:
            out = self.function({n: point[n] for n in problem.params})
            return out.reshape(()).double()

        return _solution(descend(orbit, problem.params, loss, iterations=self.iterations, tell=problem.tell))


# --------------------------------------------------------------------------------------------------------- balance, least norm


@dataclass
class Balance(Objective):
    """Charges to zero: what a unit (head, gain) receives and what it sends out get equal norms, in closed form.

    The value is the sum of the charges' sizes over the sum of what they compare, 0 to 1.
    """

    sweeps: int = 50
    tol: float = 1e-13
    name = "balance"

    def value(self, problem: Problem, params: Params) -> float:
        return imbalance(two_sided(problem.orbit.families), params)

    def solve(self, problem: Problem) -> Solution:
        pairs = two_sided(problem.orbit.families)
        if not pairs:
            return Solution([], "not_applicable", "no symmetry here has a charge that can be brought to zero")
        now, moves = problem.params, list[Move]()
        values = [imbalance(pairs, now)]
        for sweep in range(self.sweeps):
            step = balancing(pairs, now)
            now, moves = apply(step, now), merged(moves, step)
            problem.tell((sweep + 1) / self.sweeps)
            values.append(imbalance(pairs, now))
            if values[-1] <= self.tol or (sweep >= 5 and values[-1] > 0.5 * values[-5]):
                break
        done = values[-1] <= 1e-6
        return Solution(moves, "ok" if done else "not_converged", "" if done else f"imbalance {values[-1]:.1e} after {sweep + 1} sweeps")


@dataclass
class MinimumNorm(Objective):
    """The point of the orbit closest to zero: balanced factors, translations by least squares; the value is the norm of all parameters.

    Scales that only ever shrink the norm (weights before a norm) have no minimum and are left alone.
    """

    sweeps: int = 10
    tol: float = 1e-6
    iterations: int = 40
    name = "minimum-norm"

    def value(self, problem: Problem, params: Params) -> float:
        return math.sqrt(sum(float(params[n].square().sum()) for n in problem.params))

    def solve(self, problem: Problem) -> Solution:
        pairs = two_sided(problem.orbit.families)
        closed = {id(s) for s, _ in pairs}
        shifts = [s for s in problem.orbit.families if id(s) not in closed and not _matrices(s)]
        now, moves = problem.params, list[Move]()
        last = self.value(problem, now)
        settled = False
        for sweep in range(self.sweeps):
            step = balancing(pairs, now)
            now = apply(step, now)
            for s in shifts:
                c = least_squares(s, now)
                if c is not None:
                    step.append(Move(s.name, s.action, c))
                    now = step[-1].act(now)
            moves = merged(moves, step)
            value = self.value(problem, now)
            problem.tell((sweep + 1) / self.sweeps)
            settled = last - value <= self.tol * last
            last = value
            if settled:
                break
        folded = problem.orbit.only(lambda s: _matrices(s) and _gains(s) and id(s) not in closed)
        if folded.dim:  # a rotation through gains changes the norm, in no closed form
            found = descend(
                folded,
                now,
                lambda p: sum((p[n].square().sum() for n in problem.params), torch.zeros(())).double(),
                iterations=self.iterations,
            )
            moves += found.moves
        return Solution(moves, "ok" if settled else "not_converged")


def _matrices(s: Symmetry) -> bool:
    return isinstance(s.action, DictionaryAction) and s.action.entry.algebra in ("scale", "gl", "so", "so1")


def _gains(s: Symmetry) -> bool:
    return isinstance(s.action, DictionaryAction) and any(t.gain is not None for _, t in s.action.entry.terms)


def one_sided(s: Symmetry) -> bool:
    """A scale that multiplies only, so that an objective may fall for ever along it."""
    a = s.action
    return (
        isinstance(a, DictionaryAction) and a.entry.algebra == "scale" and len({(w > 0) == (t.op == "mode") for w, t in a.entry.terms}) == 1
    )


# -------------------------------------------------------------------------------------------------------------------- int8


@dataclass
class Int8(Objective):
    """What rounding every weight matrix to int8, one scale for each tensor, does to the outputs.

    The value is measured: the relative change of the outputs (root mean square) when all matrices are rounded. What is minimised is its
    first-order prediction, sum over matrices of range^2 E|dL/dW|^2, with gradients carried along the orbit by the inverse transpose,
    so that no descent step runs the model. Rotations start from the identity and from random ones.

    Attributes:
        bits: of the integers. probes: random output directions whose gradients stand for all outputs.
        iterations: of L-BFGS in each of the two stages.
        starts: random starts beside the identity.
    """

    bits: int = 8
    probes: int = 2
    iterations: int = 60
    starts: int = 1
    name = "int8"

    def value(self, problem: Problem, params: Params) -> float:
        with torch.no_grad():
            before = problem.outputs(params)
            after = problem.outputs({**params, **{n: rounded(params[n], self.bits) for n in self._names(problem)}})
        change = sum(float((a - b).square().sum()) for a, b in zip(before, after, strict=True))
        return math.sqrt(change / max(sum(float(a.square().sum()) for a in before), 1e-300))

    def weight_error(self, problem: Problem, params: Params) -> dict[str, float]:
        """Relative rounding error of each matrix."""
        return {
            n: float((rounded(params[n], self.bits) - params[n]).norm() / params[n].norm().clamp_min(1e-300)) for n in self._names(problem)
        }

    @staticmethod
    def _names(problem: Problem) -> list[str]:
        return [n for n, p in problem.params.items() if p.dim() > 1]

    def solve(self, problem: Problem) -> Solution:
        orbit = problem.orbit.only(lambda s: _matrices(s) and not (s.action.dim == 1 and _all_matrices(s, problem)))  # type: ignore[attr-defined]
        if orbit.dim == 0:
            return Solution([], "not_applicable", "no scale, rotation or linear map of matrices to move along")
        moves = unit_gains(orbit, problem.params)
        at = apply(moves, problem.params)
        touched = {n for s in orbit.families for n in s.parameters}
        grads = self._gradients(problem, at, [n for n in self._names(problem) if n in touched])

        def loss(p: float) -> Callable[[Tensor], Tensor]:
            def f(c: Tensor) -> Tensor:
                point, along = orbit.act_both(at, grads, c)
                return torch.stack([_range(point[n], p).square() * sum(g[n].square().sum() for g in along) for n in along[0]]).sum().log()

            return f

        starts = [torch.zeros(orbit.dim, dtype=torch.float64)] + [random_rotations(orbit, problem.generator) for _ in range(self.starts)]
        tried = [descend(orbit, at, loss(8.0), coordinates=True, start=c, iterations=self.iterations, limit=3.0) for c in starts]
        problem.tell(0.5)
        best = min(tried, key=lambda d: d.value)
        at, grads = orbit.act_both(at, grads, best.coordinates)
        last = descend(orbit, at, loss(32.0), coordinates=True, iterations=self.iterations, limit=3.0)
        return Solution([*moves, *best.moves, *last.moves], "ok", "", {"iterations": best.iterations + last.iterations})

    def _gradients(self, problem: Problem, params: Point, names: Sequence[str]) -> list[Point]:
        out = [{n: torch.zeros_like(params[n]) for n in names} for _ in range(self.probes)]
        for index in range(len(problem.inputs)):
            leaves = {n: params[n].detach().requires_grad_() for n in names}
            with torch.enable_grad():
                found = problem.outputs({**params, **leaves}, index)
            for k in range(self.probes):
                signs = [torch.randint(2, o.shape, generator=problem.generator).to(o) * 2 - 1 for o in found]
                total = sum(((s * o).sum() for s, o in zip(signs, found, strict=True)), torch.zeros((), dtype=torch.float64))
                grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=k + 1 < self.probes, allow_unused=True)
                for n, g in zip(leaves, grads, strict=True):
                    out[k][n] += 0.0 if g is None else g
        return out


def rounded(w: Tensor, bits: int = 8) -> Tensor:
    """A tensor rounded to symmetric integers with one scale, and back."""
    top = 2 ** (bits - 1) - 1
    step = w.abs().max().clamp_min(1e-300) / top
    return (w / step).round().clamp(-top, top) * step


def _range(w: Tensor, p: float) -> Tensor:
    """The largest |w|, smoothly: a p-norm."""
    top = w.detach().abs().max().clamp_min(1e-300)
    return top * ((w / top).abs() ** p).sum() ** (1 / p)


def _all_matrices(s: Symmetry, problem: Problem) -> bool:
    return all(problem.params[n].dim() > 1 for n in s.parameters)


def random_rotations(orbit: Orbit, generator: torch.Generator) -> Tensor:
    """Coordinates of random rotations in the families that have some; zero elsewhere."""
    parts = []
    for s in orbit.families:
        e = s.action.entry  # type: ignore[attr-defined]
        draw = torch.randn(s.action.dim, generator=generator, dtype=torch.float64) * 2 / max(e.size, 1) ** 0.5
        if e.algebra == "gl":
            x = draw.reshape(-1, e.size, e.size)
            draw = ((x - x.mT) / 2**0.5).reshape(-1)
        parts.append(draw if e.algebra != "scale" else torch.zeros_like(draw))
    return torch.cat(parts)


def unit_gains(orbit: Orbit, params: Params) -> list[Move]:
    """Gains folded into their readers where a scale family allows it: their sizes become one, which no rounding touches."""
    now, moves = dict(params), list[Move]()
    for s in orbit.families:
        c = charge_of(s)
        if not isinstance(c, Charge) or c.kind != "quadratic":
            continue
        vectors = [b for b in c.blocks if now[b.place.parameter].dim() == 1]
        sides = {b.weight > 0 for b in vectors}
        if len(sides) != 1 or any((b.weight > 0) in sides for b in c.blocks if b not in vectors):
            continue
        one = vectors[0]  # the gain; a shift that goes with it follows
        size = Charge(c.name, "quadratic", (one,), c.count).form(now, now).abs()
        lam = torch.where(size > 0, -size.clamp_min(1e-300).log() / (2 * one.weight), torch.zeros_like(size))
        if bool((lam.abs() > 7).any()) or one.weight**2 != 1:
            continue
        move = Move(s.name, s.action, element(s, c, lam))
        moves.append(move)
        now = move.act(now)
    return moves


# ---------------------------------------------------------------------------------------------------------------- with data


@dataclass
class Sharpness(Objective):
    """The largest eigenvalue of the Hessian of a loss; its gradient along the orbit is that of v.H v at the top eigenvector v.

    Scales that only ever multiply are left out: along them the sharpness of a scale-invariant loss falls for ever.

    Attributes:
        loss_fn: loss_fn(output, target), a mean over samples; None where the model returns its loss.
        data: one batch or a list of batches; the first is used for the gradient.
        iterations: of L-BFGS. tol: relative, of the eigenvalue.
    """

    loss_fn: gradients.LossFn | None
    data: Any
    iterations: int = 15
    tol: float = 1e-3
    name = "sharpness"

    def value(self, problem: Problem, params: Params) -> float:
        return self._top(problem, params)[0]

    def _top(self, problem: Problem, params: Params) -> tuple[float, Tensor, Any]:
        twin = problem.at(params)
        op = hessian(twin, self.loss_fn, self.data, dtype=torch.float64)
        pair = eigenpairs(op, 1, which="LA", tol=self.tol)
        return float(pair.values[0]), pair.vectors[:, 0].double(), op.layout

    def solve(self, problem: Problem) -> Solution:
        orbit = problem.orbit.only(lambda s: _matrices(s) and not one_sided(s))
        objective = gradients.Objective(problem.model, self.loss_fn, dtype=torch.float64)
        found = list(gradients.batches(self.data))
        sizes = [gradients.batch_size(b) for b in found]

        def loss(point: Point) -> Tensor:
            _, v, layout = self._top(problem, {n: p.detach() for n, p in point.items()})
            along = layout.unflatten(v)
            names = list(layout.names)
            at = [point[n] if point[n].requires_grad else point[n].detach().requires_grad_() for n in names]
            total = torch.zeros((), dtype=torch.float64)
            for batch, n in zip(found, sizes, strict=True):
                with preserve(objective.model), rng_state(), math_attention(), no_checkpointing(), float64_casts():
                    value = objective(dict(zip(names, at, strict=True)), batch)
                    first = torch.autograd.grad(value, at, create_graph=True, allow_unused=True, materialize_grads=True)
                    slope = sum((g * along[k]).sum() for g, k in zip(first, names, strict=True))
                    second = torch.autograd.grad(slope, at, create_graph=True, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
                total = total + n / sum(sizes) * sum((h * along[k]).sum() for h, k in zip(second, names, strict=True))
            return total

        return _solution(descend(orbit, problem.params, loss, iterations=self.iterations, limit=3.0, tell=problem.tell))


@dataclass
class NoiseEquilibrium(Objective):
    """The point of the orbit where gradient noise no longer moves the charges (noise-equilibrium R3); the value is E|g_B|^2.

    Attributes:
        loss_fn, data: as `parasym.laws.equilibrium.noise_equilibrium`; batch_size of the SGD meant; lr and weight_decay go together.
        passes: over the data, at most. tol: relative imbalance to reach.
        floor: noise below this share of the largest counts as that much, where maps are turned (GL); few samples leave directions without
            noise, which would run away, and a map with a condition above floor^-1/2 shows in float32 outputs.
    """

    loss_fn: gradients.LossFn | None
    data: Any
    batch_size: int
    lr: float | None = None
    weight_decay: float = 0.0
    passes: int = 12
    tol: float = 1e-9
    floor: float = 1e-4
    name = "noise-equilibrium"

    def value(self, problem: Problem, params: Params) -> float:
        objective = gradients.Objective(problem.at(params), self.loss_fn, dtype=torch.float64)
        m = gradients.gradient_moments(objective, self.data, unit="batch" if objective.coupled else "sample")
        c = m.factor(self.batch_size, True)
        return m.mean_square + c * (float(m.norms.mean()) - m.mean_square)

    def solve(self, problem: Problem) -> Solution:
        pairs = two_sided(problem.orbit.families)
        if not pairs:
            return Solution([], "not_applicable", "no symmetry here has a noise equilibrium")
        scales, matrices = [p for p in pairs if p[1].kind == "quadratic"], [p for p in pairs if p[1].kind == "matrix"]
        ordered = [*matrices, *scales]  # the order in which one pass moves them
        twin, moves, start, residual = problem.at(problem.params), list[Move](), None, math.inf
        for done in range(self.passes):
            found = noise_equilibrium(
                twin, self.loss_fn, self.data, [c for _, c in ordered], batch_size=self.batch_size, lr=self.lr,
                weight_decay=self.weight_decay, passes=1, tol=self.tol, floor=self.floor,
            )  # fmt: skip
            start, residual = found.start if start is None else start, found.residual
            lams = [found.elements[f"{c.name}#{i}"] for i, (_, c) in enumerate(ordered)]
            step = [Move(s.name, s.action, element(s, c, lam)) for (s, c), lam in zip(ordered, lams, strict=True)]
            moves = [*moves, *(m for m in step if bool((m.element != 0).any()))]
            found.apply(twin)
            problem.tell((done + 1) / self.passes)
            if residual <= self.tol or not matrices:
                break
        status: Status = "ok" if residual <= self.tol else "not_converged"
        return Solution(
            moves,
            status,
            "" if status == "ok" else f"imbalance {residual:.1e} after {done + 1} passes",
            {"start": start, "imbalance": residual},
        )
