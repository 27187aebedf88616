"""The charges of a run, measured at some of its steps beside what their laws predict for every step.

At an observed step the law (of `parasym.laws.ledger`: exact for SGD, measured with a cross term for any other rule) is applied to the
state just before it, so what it says of that step can be held against what the step does. Between observed steps the parts of
the law are carried on: each part divided by its own power of the learning rate varies slowly, and the learning rates of the steps that
nobody looked at are known. The running prediction is the sum from the start; its standard error comes from how much the parts differed
from one observed step to the next. Observed at every step, it is the exact ledger.

Looking at a step has two halves. The *parts* of the law (a glance) cost one or two forms; the charge itself, its error and its residual (a
look) cost several. Parts differ from step to step by the noise of a batch, and what a step shows stands for few steps beside it
(1 / (1 - beta) under momentum beta), so glances are many and looks are few.

For SGD the sum is a prediction: its parts come from weights, gradients and momentum before a step, never from what a step did to the
charge. For any other rule the parts are read off the steps that were looked at: a reconstruction from a sample of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parasym.laws.charges import Charge
from parasym.laws.ledger import decoupled, size_of
from parasym.measure.findings import common
from parasym.watch.finding import is_sharded
from parasym.watch.record import Row

Params = Mapping[str, Tensor]
_PARTS = ("decay", "source", "cross")


@dataclass
class Book:
    """One charge along the run.

    Attributes:
        metric: parameter -> factor where groups have different rates; fixed at the start.
        law: whether the step has an exact law; ``note`` says why not.
        predicted: the running prediction, of the charge's shape; None before the first observation.
        variance: of the mean of its numbers.
        rates: part -> its value at the last observed step over the power of the learning rate it goes with.
        violations: observed steps whose change was not what the law says.
    """

    charge: Charge
    label: str
    where: str
    metric: dict[str, float]
    law: bool
    note: str = ""
    predicted: Tensor | None = None
    start: Tensor | None = None
    variance: float = 0.0
    rates: dict[str, Tensor] = field(default_factory=dict)
    size: float = 0.0
    seen: int = 0
    violations: int = 0
    # of the steps since it was last observed: how many, and the powers of the rate they add up to
    skipped: int = 0
    gap: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    off: float = 0.0  # mean square error of its numbers that the parts' spread lets expect
    need: float = math.inf  # that over the mean square of their change
    # of the step that is being observed
    value: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)  # those that are missing are zero
    exact: bool = False
    why: str = ""
    along: float | None = None
    waits: bool = False  # for a step at which its metric can be told
    slack: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters of the charge."""
        return self.charge.parameters

    def mean(self, value: Tensor) -> float:
        """The mean of a charge's numbers; of a matrix charge, of its diagonal."""
        if self.charge.kind == "matrix":
            value = value.diagonal(dim1=-2, dim2=-1)
        return float(value.mean()) if value.numel() else 0.0


class Books:
    """All charges of a run.

    Args:
        charges: which.
        optimizer: whose steps.
        params: canonical name -> live parameter.
        whole: parameter-like tensor -> the whole of it (gathers what is sharded).
    """

    def __init__(
        self, charges: Sequence[Charge], optimizer: torch.optim.Optimizer, params: Params, whole: Callable[[Tensor], Tensor]
    ) -> None:
        self.optimizer, self.params, self.whole = optimizer, params, whole
        self.sgd = type(optimizer) is torch.optim.SGD
        self._group = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        self._groups, self._glances = len(optimizer.param_groups), 0
        self._squares: dict[tuple[str, str], float] = {}
        self._old: dict[str, Tensor] = {}  # weights before the step, of charges without a law
        self._moves: dict[str, tuple[Tensor, Tensor]] = {}
        self._steps: dict[str, tuple[Tensor | None, Tensor]] = {}
        self._taken: list[Book] = []  # what is observed at this step
        self.coarse = torch.finfo(torch.float32).eps  # precision that gradients are computed in
        names: dict[tuple[str, str], int] = {}
        self.books = []
        for c in charges:
            where = c.parameters[0] if len(c.parameters) == 1 else common(c.parameters)
            count = names[c.name, where] = names.get((c.name, where), 0) + 1
            self.books.append(self._open(c, c.name if count == 1 else f"{c.name} ({count})", where))
        self._held = [params[n] for n in dict.fromkeys(n for b in self.books for n in b.names)]

    def _open(self, charge: Charge, label: str, where: str) -> Book:
        names, note = charge.parameters, ""
        metric = dict.fromkeys(names, 1.0)
        outside = [n for n in names if id(self.params[n]) not in self._group or not self.params[n].requires_grad]
        if outside:
            note = f"{outside[0]} is frozen or not in the optimiser: the orbit leaves the trained parameters"
        elif not self.sgd:
            note = f"{type(self.optimizer).__name__} has no exact law: the cross term is measured"
        else:
            found = self._metric(names)
            return Book(charge, label, where, found or metric, True, waits=found is None)
        return Book(charge, label, where, metric, not note, note)

    def _metric(self, names: Sequence[str]) -> dict[str, float] | None:
        """Inverse ratios of the groups' rates; in a warm-up from zero those of the rates it warms up to; None while they are not known."""
        groups = [self._of(n) for n in names]
        if all(g is groups[0] for g in groups):
            return dict.fromkeys(names, 1.0)
        for key in ("lr", "initial_lr"):
            rates = [float(g.get(key) or 0.0) for g in groups]
            if min(rates) > 0:
                return {n: rates[0] / r for n, r in zip(names, rates, strict=True)}
        return None

    def _regroup(self) -> None:
        """Take in groups that joined the optimiser during the run."""
        groups = self.optimizer.param_groups
        if len(groups) == self._groups:
            return
        self._groups = len(groups)
        before, self._group = self._group, {id(p): i for i, g in enumerate(groups) for p in g["params"]}
        for book in self.books:
            new = [n for n in book.names if id(self.params[n]) in self._group and id(self.params[n]) not in before]
            if new:
                book.law, book.note = False, f"{new[0]} joined the optimiser during the run: the cross term is measured"

    def _of(self, name: str) -> dict[str, Any]:
        return self.optimizer.param_groups[self._group[id(self.params[name])]]

    # -- the steps nobody looks at -----------------------------------------------------------------------------------------------

    def skip(self) -> None:
        """A step that is not observed: keep what the prediction needs of it."""
        self._regroup()
        self._pass(self.books)

    def _pass(self, books: Sequence[Book]) -> None:
        powers = [_powers(g) for g in self.optimizer.param_groups]
        for book in books:
            book.skipped += 1
            book.gap = [a + b for a, b in zip(book.gap, powers[self._at_group(book)], strict=True)]

    def _at_group(self, book: Book) -> int:
        return self._group.get(id(self.params[book.names[0]]), 0)

    def _glanced(self) -> list[Book]:
        """What to take at a glance: the half of the charges with the largest error to be expected, every other time all."""
        known = [b for b in self.books if b.predicted is not None and not b.waits]
        self._glances += 1
        if self._glances % 2:
            return known
        return sorted(known, key=lambda b: -b.need)[: (len(known) + 1) // 2]

    # -- an observed step --------------------------------------------------------------------------------------------------------

    def before(self, late_gradient: bool, glance: bool = False) -> None:
        """Read the state before the step.

        Args:
            late_gradient: the gradient exists only inside the step (a closure): keep the weights for after it.
            glance: only the parts of the law are asked for, not the charge and its checks.
        """
        self._regroup()
        self._squares, self._moves, self._steps = {}, {}, {}
        kept: dict[str, None] = {}
        self._taken = self._glanced() if glance else self.books
        if glance:
            taken = {id(b) for b in self._taken}
            self._pass([b for b in self.books if id(b) not in taken])
        for book in self._taken:
            if book.waits and (metric := self._metric(book.names)) is not None:
                book.metric, book.waits = metric, False
            book.exact, book.parts, book.along = False, {}, None
            book.why = book.note or ("the gradient is computed inside the step" if late_gradient else self._obstacle(book))
            if not book.why:
                self._law(book, self._at(book), glance)
                continue
            kept.update(dict.fromkeys(book.names))
            if not (glance or late_gradient) and (gradients := self._gradients(book)):
                self._state(book, self._at(book), gradients)
        self._old = {n: self.params[n].detach().clone() for n in kept}

    def orbits(self) -> None:
        """Hold the gradient that is there now against the orbits, at the weights that are there now."""
        self._squares = {}
        for book in self.books:
            if not (book.waits or book.exact) and (gradients := self._gradients(book)):
                self._state(book, self._at(book), gradients)

    def _at(self, book: Book) -> dict[str, Tensor]:
        """The present weights of a charge."""
        return {n: self.whole(self.params[n].detach()) for n in book.names}

    def _gradients(self, book: Book) -> dict[str, Tensor]:
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused optimiser unscales by itself
        out = {}
        for n in book.names:
            g = self.params[n].grad
            if g is not None:
                g = self.whole((g.to_dense() if g.is_sparse else g).detach())
                out[n] = g if scale is None else g / scale.to(g.device, g.dtype)
        return out

    def _fast(self, book: Book) -> torch.dtype:
        """What a glance multiplies in: the parameters' own precision, at least single."""
        return torch.float64 if any(self.params[n].dtype == torch.float64 for n in book.names) else torch.float32

    def _state(
        self,
        book: Book,
        at: Params,
        gradients: Params,
        pairs: Sequence[tuple[Params, Params]] = (),
        dtype: torch.dtype = torch.float64,
    ) -> list[Tensor]:
        """Forms in one pass, and what precision explains of a residual; without a law also the gradient's part along the orbit."""
        charge = book.charge
        asked = [*pairs, *([(gradients, at)] if gradients and not book.exact else [])]
        vectors: list[Params] = []
        for pair in asked:
            vectors += [v for v in dict(zip(map(id, pair), pair, strict=True)).values() if not any(v is w for w in vectors)]
        at_ = [tuple(_index(vectors, v) for v in pair) for pair in asked]
        found = list(charge.forms(vectors, at_, dtype=dtype)) if asked else []  # type: ignore[arg-type]
        if gradients:
            push = math.sqrt(sum(self._square(n, g) for n, g in gradients.items()))
            norm = push * (1.0 if charge.kind == "linear" else math.sqrt(sum(self._square(n, at[n], "weight") for n in gradients)))
            lr = max((rate_of(self._of(n)) or 0.0 for n in book.names if id(self.params[n]) in self._group), default=0.0)
            book.slack = 2 * lr * norm * 32 * self.coarse
            if not book.exact:
                along = found.pop()
                book.along = float(along.square().mean().sqrt()) / norm if norm > 0 and along.numel() else 0.0
        return found

    def _square(self, name: str, value: Tensor, side: str = "gradient") -> float:
        """|value|^2; several charges ask for the same."""
        if (name, side) not in self._squares:
            self._squares[name, side] = float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2
        return self._squares[name, side]

    def _obstacle(self, book: Book) -> str:
        """Why the law cannot be used at this step; empty where it can."""
        groups = [self._of(n) for n in book.names]
        first = groups[0]
        if any(g[k] != first[k] for g in groups for k in ("momentum", "dampening", "nesterov", "maximize")):
            return "its parameters have different momentum settings"
        rates = [float(g["lr"]) * book.metric[n] for g, n in zip(groups, book.names, strict=True)]
        if min(rates) <= 0 < max(rates):  # where all are, the step does nothing, as its law says
            return "a learning rate is zero"
        if max(rates) - min(rates) > 1e-12 * abs(max(rates)):
            return "the ratio of the learning rates of its parameters changed"
        decays = [float(g["lr"]) * float(g["weight_decay"]) for g in groups]
        if max(decays) - min(decays) > 1e-12 * max(decays):
            return "its parameters decay at different rates"
        if len({self.params[n].grad is None for n in book.names}) > 1:
            return "some of its parameters have no gradient"
        if len({self._buffer(n) is None for n in book.names}) > 1:
            return "some of its parameters have no momentum yet"
        return ""

    def _buffer(self, name: str) -> Tensor | None:
        buffer = self.optimizer.state.get(self.params[name], {}).get("momentum_buffer")
        return None if buffer is None else buffer.detach()

    def _law(self, book: Book, at: Params, glance: bool = False) -> None:
        """What SGD's next step will do to the charge: decay, its own size, inertia (`Ledger`), from the measured state; at a glance
        with the predicted value in the decay."""
        charge, group = book.charge, self._of(book.names[0])
        book.exact = True
        g = self._gradients(book)
        plain = all(m == 1 for m in book.metric.values())
        value = book.predicted if glance else None if plain else charge(at, book.metric)
        if not g:
            book.value = charge(at, book.metric) if value is None else value
            book.slack = 0.0
            return
        eta, mu = float(group["lr"]) * book.metric[book.names[0]], float(group["momentum"])
        gamma = float(group["weight_decay"]) / book.metric[book.names[0]]
        steps = {n: self._step(n, g[n], at[n]) for n in book.names}
        step = {n: s for n, (_, s) in steps.items()}
        held = {n: h for n, (h, _) in steps.items() if h is not None}
        keep = 1 - float(group["dampening"]) if held else 1.0
        linear = charge.kind == "linear"
        pairs = [(at, at)] if value is None else []
        pairs += [(held, held) if linear else (at, held)] if held else []
        pairs += [] if linear or not plain else [(step, step)]
        forms = self._state(book, at, {} if glance else g, pairs, self._fast(book) if glance else torch.float64)
        book.value = forms.pop(0) if value is None else value
        half = 1.0 if linear else 2.0
        if gamma:
            book.parts["decay"] = -half * eta * gamma * (1 + mu * keep if group["nesterov"] else keep) * book.value
        if held:
            book.parts["cross"] = -half * eta * mu * (mu if group["nesterov"] else 1.0) * forms.pop(0)
        if not linear:
            q = forms.pop(0) if plain else charge.form(step, step, {n: 1 / m for n, m in book.metric.items()})
            book.parts["source"] = eta**2 * q

    def _step(self, name: str, g: Tensor, at: Tensor) -> tuple[Tensor | None, Tensor]:
        """SGD's momentum of a parameter (None where there is none yet), and the step it will take over the rate; charges share it."""
        if name in self._steps:
            return self._steps[name]
        group, held = self._of(name), None
        d = -g if group["maximize"] else g
        d = torch.add(d, at, alpha=float(group["weight_decay"])) if group["weight_decay"] else d
        step, mu = d, float(group["momentum"])
        if mu:
            if (buffer := self._buffer(name)) is not None:
                held = self.whole(buffer)
                step = torch.add(held * mu, d, alpha=1 - float(group["dampening"]))
            if group["nesterov"]:
                step = torch.add(d, step, alpha=mu)
        if not is_sharded(self.params[name]):  # of a sharded one the whole is let go
            self._steps[name] = held, step
        return held, step

    def after(self, step: int) -> tuple[list[Row], list[Book]]:
        """Read the state after the step; returns the rows, and the charges whose law did not hold."""
        rows: list[Row] = []
        broken = []
        for book in self.books:
            charge = book.charge
            if book.waits:
                note = "a learning rate is zero: the ratio that weights its parameters is not known yet"
                rows.append(Row(book.label, book.where, "charge", math.nan, status="not_applicable", note=note))
                continue
            now = charge(self._at(book), book.metric) if book.exact else self._identity(book)
            if not self._finite(book, now):
                rows.append(Row(book.label, book.where, "charge", math.nan, status="not_converged", note="a weight is not finite"))
                continue
            if book.seen % 20 == 0:
                book.size = size_of(charge, self._at(book), book.metric)
            book.seen += 1
            self._advance(book)
            rows += self._rows(book, now)
            if book.violations == 3:
                broken.append(book)
        self._close_step()
        return rows, broken

    def glance(self) -> None:
        """Take in what the step did to the parts, without measuring the charges: after ``before(glance=True)``."""
        for book in self._taken:
            if not book.exact:
                self._identity(book, glance=True)
            self._advance(book)
        self._close_step()

    def stamps(self) -> list[tuple[int, int]]:
        """What changes when a weight of a charge is written."""
        return [(p._version, p.data_ptr()) for p in self._held]

    def close(self) -> list[Row]:
        """The charges at the end, beside what the last parts that were seen make of the steps since."""
        rows: list[Row] = []
        for book in self.books:
            if book.waits or book.predicted is None:
                continue
            now = book.charge(self._at(book), book.metric)
            for k, total in zip(_PARTS, book.gap, strict=True):
                if k in book.rates:
                    book.predicted = book.predicted + total * book.rates[k]
            book.skipped, book.gap = 0, [0.0, 0.0, 0.0]
            if self._finite(book, now) and now.numel():
                rows += self._told(book, now)
        self._close_step()
        return rows

    def _close_step(self) -> None:
        self._old, self._moves, self._steps = {}, {}, {}

    def _finite(self, book: Book, now: Tensor) -> bool:
        """Whether all numbers are. A charge of which some are not, or were not at a glance, is predicted anew."""
        good = bool(torch.stack([now.sum(), *(p.sum() for p in book.parts.values())]).isfinite().all())
        if not good or (book.predicted is not None and not math.isfinite(float(book.predicted.sum()))):
            book.predicted, book.rates, book.variance = None, {}, 0.0
        return good

    def _identity(self, book: Book, glance: bool = False) -> Tensor:
        """What a step without a law did: theta' = dec theta - w, with the decoupled decay dec known, changes Q by (dec^2 - 1) Q and by
        q(w, w) - 2 dec q(theta, w) = -q(w, dec theta + theta'), counted as the cross term. Returns the charge after it (at a glance
        what is predicted of it before)."""
        charge, metric = book.charge, book.metric
        moves = {n: self._move(n) for n in book.names}
        w, both = ({n: m[k] for n, m in moves.items()} for k in (0, 1))
        power = 1 if charge.kind == "linear" else 2
        kept = {n: self._kept(n) ** power for n in book.names}
        if glance:
            assert book.predicted is not None
            now = book.predicted
            (cross,) = -charge.forms([w, both], [(0, 1)], metric, dtype=self._fast(book))
        else:
            now, cross = charge.forms([self._at(book), w, both], [(0, 0), (1, 2)], metric)
            cross = -cross
        book.parts, share = {"cross": cross}, kept[book.names[0]]
        if len(set(kept.values())) > 1 or share <= 0:
            old = {n: self.whole(self._old[n]) for n in book.names}
            book.parts["decay"] = charge(old, {n: metric[n] * (kept[n] - 1) for n in book.names})
        elif share != 1:
            book.parts["decay"] = (share - 1) * (now if glance else (now - cross) / share)
        book.value = now if glance else now - sum(book.parts.values())
        return now

    def _kept(self, name: str) -> float:
        """What a decoupled decay leaves of a parameter."""
        group = self._of(name) if id(self.params[name]) in self._group else {}
        lr = rate_of(group)
        return 1 - lr * float(group["weight_decay"]) if lr is not None and decoupled(self.optimizer, group) else 1.0

    def _move(self, name: str) -> tuple[Tensor, Tensor]:
        """(w, dec theta + theta') of a parameter; several charges share it."""
        if name in self._moves:
            return self._moves[name]
        old, now, dec = self.whole(self._old[name]), self.whole(self.params[name].detach()), self._kept(name)
        kept = old if dec == 1 else dec * old
        pair = kept - now, kept + now
        if not is_sharded(self.params[name]):
            self._moves[name] = pair  # of a sharded one the whole is let go
        return pair

    def _advance(self, book: Book) -> None:
        """Carry the prediction over the steps since the last observation, and over this one."""
        power = _powers(self.optimizer.param_groups[self._at_group(book)])
        rates = {k: book.parts[k] / w for k, w in zip(_PARTS, power, strict=True) if w > 0 and k in book.parts}
        if book.predicted is None:
            assert book.value is not None
            book.predicted, book.start = book.value.clone(), book.value.clone()
        elif book.skipped:
            spread = 0.0
            for k, total in zip(_PARTS, book.gap, strict=True):
                sides = [side[k] for side in (book.rates, rates) if k in side]
                if sides:
                    book.predicted = book.predicted + total * (sides[0] + sides[-1]) / 2
                    apart = sides[-1] - sides[0]
                    spread += total * book.mean(apart)
                    book.off += 0.5 * total**2 * float(apart.square().mean())
            # an observed rate of spread s stands for its neighbourhood: variance s^2, and E (difference)^2 = 2 s^2; with momentum this
            # is more than the truth, because what inertia adds at one step it takes back at the next
            book.variance += 0.5 * spread**2
        for part in book.parts.values():
            book.predicted = book.predicted + part
        book.rates = {**book.rates, **rates}  # a step of rate zero shows none
        if book.skipped and book.start is not None:
            book.need = book.off / max(float((book.predicted - book.start).square().mean()), 1e-300)
        book.skipped, book.gap = 0, [0.0, 0.0, 0.0]

    def _told(self, book: Book, now: Tensor) -> list[Row]:
        """The charge and its prediction."""
        assert book.predicted is not None and book.start is not None
        name, where = book.label, book.where
        notes = [book.why] if book.why else []
        if any(id(self.params[n]) in self._group and rate_of(self._of(n)) is None for n in book.names):
            notes.append("its optimiser states no learning rate: every step counts alike")
        if book.charge.approximate:
            notes.append("its symmetry holds up to the eps of a norm")
        if any(m != 1 for m in book.metric.values()):
            notes.append("weighted by the inverse learning rates of its parameters")
        if book.variance:
            notes.append("the standard error is that of the prediction")
        moved, error = now - book.start, now - book.predicted
        size, off = torch.stack([moved.square().mean().sqrt(), error.square().mean().sqrt()]).tolist()
        return [
            Row(
                name, where, "charge", book.mean(now), book.mean(book.predicted), math.sqrt(book.variance) if book.variance else None,
                "ok" if book.exact else "not_applicable", "; ".join(notes),
            ),
            Row(
                f"{name}: prediction error", where, "charge", off / max(size, self._round_off(book), 1e-300), status="ok",
                note=f"root mean square over {book.charge.numbers} numbers, relative to the change since the start",
            ),
        ]  # fmt: skip

    def _round_off(self, book: Book) -> float:
        """What the weights' own precision may do to the charge in a step."""
        return max(torch.finfo(self.params[n].dtype).eps for n in book.names) * 32 * book.size

    def _rows(self, book: Book, now: Tensor) -> list[Row]:
        assert book.value is not None
        if not now.numel():
            return []
        name, where, rows = book.label, book.where, self._told(book, now)
        if book.exact:
            worst, limit = float((now - book.value - sum(book.parts.values())).abs().max()), self._round_off(book) + book.slack
            bad = worst > limit and not book.charge.approximate
            book.violations = book.violations + 1 if bad else 0
            rows.append(
                Row(
                    f"{name}: residual of the step", where, "charge", worst, 0.0, status="violated" if bad else "ok",
                    note=f"largest over its numbers; round-off explains {limit:.1e}",
                )
            )  # fmt: skip
        if book.along is not None:
            bound = 32 * self.coarse
            free = book.charge.approximate or "frozen" in book.note
            status = "violated" if book.along > bound and not free else "ok"
            rows.append(
                Row(
                    f"{name}: gradient along the orbit", where, "charge", book.along, 0.0, status=status,  # type: ignore[arg-type]
                    note=f"relative to |theta| |g|; precision explains {bound:.1e}",
                )
            )  # fmt: skip
        rows += self._effective(book, now)
        return rows

    def _effective(self, book: Book, now: Tensor) -> list[Row]:
        """eta / |w|^2 of a scale-invariant group: the rate at which its direction turns."""
        if book.charge.kind != "quadratic" or any(b.weight <= 0 for b in book.charge.blocks):
            return []
        if any(id(self.params[n]) not in self._group for n in book.names):
            return []
        lr = rate_of(self._of(book.names[0]))
        if lr is None:
            return []
        each = lr / now.clamp_min(1e-300)
        note = f"eta / |w|^2, median of {each.numel()}; from {float(each.min()):.2e} to {float(each.max()):.2e}"
        return [Row("effective learning rate", book.where, "rate", float(each.median()), note=note)]

    # -- going on in another process ---------------------------------------------------------------------------------------------

    def state(self) -> list[dict[str, Any]]:
        """Plain tensors and numbers."""
        return [
            {
                "label": b.label, "where": b.where, "predicted": b.predicted, "start": b.start, "variance": b.variance,
                "rates": dict(b.rates), "metric": dict(b.metric), "seen": b.seen, "violations": b.violations, "size": b.size,
                "skipped": b.skipped, "gap": list(b.gap), "off": b.off,
            }
            for b in self.books
        ]  # fmt: skip

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go on with the predictions of charges of the same name and place; the others start anew."""
        known = {(s["label"], s["where"]): s for s in state}
        for b in self.books:
            s = known.get((b.label, b.where))
            if s is None or s["predicted"] is None or tuple(s["predicted"].shape) != b.charge.shape:
                continue
            b.predicted, b.start, b.variance, b.rates = s["predicted"], s["start"], s["variance"], dict(s["rates"])
            b.metric, b.seen, b.violations, b.size = dict(s["metric"]), s["seen"], s["violations"], s["size"]
            b.skipped, b.gap, b.off = int(s.get("skipped", 0)), [float(v) for v in s.get("gap", b.gap)], float(s.get("off", 0.0))


def rate_of(group: Mapping[str, Any]) -> float | None:
    """A group's learning rate; None where its optimiser states none."""
    lr = group.get("lr")
    return None if lr is None else float(lr)


def _pace(group: Mapping[str, Any]) -> float:
    """What a step counts for in the prediction: its rate, or 1 where none is stated."""
    lr = rate_of(group)
    return 1.0 if lr is None else lr


def _powers(group: Mapping[str, Any]) -> tuple[float, float, float]:
    """Of a step's rate: what decay, source and cross term go with."""
    lr = _pace(group)
    return lr * float(group.get("weight_decay") or 0.0), lr * lr, lr


def _index(vectors: Sequence[Params], vector: Params) -> int:
    return next(i for i, v in enumerate(vectors) if v is vector)
