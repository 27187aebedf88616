"""The charges of a run, measured at some of its steps beside what their laws predict for every step.

At an observed step the law (of `parasym.laws.ledger`: exact for SGD, measured with a cross term for any other rule) is applied to the
state just before it, so what it says of that step can be held against what the step does. Between observed steps the parts of
the law are carried on: each part divided by its own power of the learning rate varies slowly, and the learning rates of the steps that
nobody looked at are known. The running prediction is the sum from the start; its standard error comes from how much the parts differed
from one observed step to the next. Observed at every step, it is the exact ledger.
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
    # of the step that is being observed
    value: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)
    exact: bool = False
    why: str = ""
    along: float | None = None
    waits: bool = False  # for a step at which its metric can be told
    slack: float = 0.0
    kept: dict[str, Tensor] = field(default_factory=dict)

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
        self._gap = [[0.0, 0.0, 0.0] for _ in optimizer.param_groups]
        self._skipped = 0
        self._squares: dict[tuple[str, str], float] = {}
        self.coarse = torch.finfo(torch.float32).eps  # precision that gradients are computed in
        names: dict[tuple[str, str], int] = {}
        self.books = []
        for c in charges:
            where = c.parameters[0] if len(c.parameters) == 1 else common(c.parameters)
            count = names[c.name, where] = names.get((c.name, where), 0) + 1
            self.books.append(self._open(c, c.name if count == 1 else f"{c.name} ({count})", where))

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
        if len(groups) == len(self._gap):
            return
        self._gap = [*self._gap, *[[0.0, 0.0, 0.0] for _ in groups[len(self._gap) :]]][: len(groups)]
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
        self._skipped += 1
        for at, g in zip(self._gap, self.optimizer.param_groups, strict=True):
            lr = _pace(g)
            at[0] += lr * float(g.get("weight_decay") or 0.0)
            at[1] += lr * lr
            at[2] += lr

    # -- an observed step --------------------------------------------------------------------------------------------------------

    def before(self, late_gradient: bool) -> None:
        """Read the state before the step.

        Args:
            late_gradient: the gradient exists only inside the step (a closure): keep the weights for after it.
        """
        self._regroup()
        self._squares = {}
        for book in self.books:
            if book.waits and (metric := self._metric(book.names)) is not None:
                book.metric, book.waits = metric, False
            book.exact, book.parts, book.kept, book.along = False, {}, {}, None
            book.why = book.note or ("the gradient is computed inside the step" if late_gradient else self._obstacle(book))
            theta = {n: self.params[n].detach() for n in book.names}
            if not book.why:
                self._law(book, {n: self.whole(p) for n, p in theta.items()})
                continue
            book.kept = {n: p.clone() for n, p in theta.items()}
            gradients = {} if late_gradient else self._gradients(book)
            at = {n: self.whole(p) for n, p in theta.items()}
            book.value = self._state(book, at, gradients)[0]

    def _gradients(self, book: Book) -> dict[str, Tensor]:
        scale = getattr(self.optimizer, "grad_scale", None)  # a fused optimiser unscales by itself
        out = {}
        for n in book.names:
            g = self.params[n].grad
            if g is not None:
                g = self.whole((g.to_dense() if g.is_sparse else g).detach())
                out[n] = g if scale is None else g / scale.to(g.device, g.dtype)
        return out

    def _state(self, book: Book, at: Params, gradients: Params, pairs: Sequence[tuple[Params, Params]] = ()) -> list[Tensor]:
        """The charge's value and further forms, in one pass; without a law also how far the gradient has a part along the orbit."""
        charge = book.charge
        plain = all(m == 1 for m in book.metric.values())
        asked = [(at, at)] if plain else []
        asked += pairs
        asked += [(gradients, at)] if gradients and not book.exact else []
        vectors: list[Params] = []
        for pair in asked:
            vectors += [v for v in dict(zip(map(id, pair), pair, strict=True)).values() if not any(v is w for w in vectors)]
        found = list(charge.forms(vectors, [tuple(_index(vectors, v) for v in pair) for pair in asked])) if asked else []  # type: ignore[misc]
        if gradients:
            push = math.sqrt(sum(self._square(n, g) for n, g in gradients.items()))
            norm = push * (1.0 if charge.kind == "linear" else math.sqrt(sum(self._square(n, at[n], "weight") for n in gradients)))
            lr = max((rate_of(self._of(n)) or 0.0 for n in book.names if id(self.params[n]) in self._group), default=0.0)
            book.slack = 2 * lr * norm * 32 * self.coarse
            if not book.exact:
                along = found.pop()
                book.along = float(along.square().mean().sqrt()) / norm if norm > 0 and along.numel() else 0.0
        return found if plain else [charge(at, book.metric), *found]

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
        if min(rates) <= 0:
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

    def _law(self, book: Book, at: Params) -> None:
        """What SGD's next step will do to the charge: decay, its own size, inertia (`Ledger`, from the measured state)."""
        charge, group = book.charge, self._of(book.names[0])
        book.exact = True
        g = self._gradients(book)
        if not g:
            (book.value,) = self._state(book, at, g)
            book.parts, book.slack = dict.fromkeys(_PARTS, torch.zeros_like(book.value)), 0.0
            return
        eta, mu = float(group["lr"]) * book.metric[book.names[0]], float(group["momentum"])
        gamma = float(group["weight_decay"]) / book.metric[book.names[0]]
        sign = -1 if group["maximize"] else 1
        step = {}
        for n in book.names:
            wd = float(self._of(n)["weight_decay"])
            step[n] = g[n] if sign > 0 and not wd else torch.add(sign * g[n] if sign < 0 else g[n], at[n], alpha=wd)
        held, keep = {}, 1.0
        if mu:
            d, buffers = step, {n: self._buffer(n) for n in book.names}
            held = {n: self.whole(b) for n, b in buffers.items() if b is not None}
            keep = 1 - float(group["dampening"]) if held else 1.0
            step = {n: torch.add(mu * held[n], d[n], alpha=keep) if n in held else d[n] for n in book.names}
            if group["nesterov"]:
                step = {n: torch.add(d[n], step[n], alpha=mu) for n in book.names}
        linear, plain = charge.kind == "linear", all(m == 1 for m in book.metric.values())
        pairs = [(held, held) if linear else (at, held)] if held else []
        pairs += [] if linear or not plain else [(step, step)]
        book.value, *forms = self._state(book, at, g, pairs)
        pull = keep * gamma * book.value
        inertia = mu * forms.pop(0) if held else torch.zeros_like(book.value)
        if mu and group["nesterov"]:
            pull, inertia = gamma * book.value + mu * pull, mu * inertia
        source = torch.zeros_like(book.value)
        if not linear:
            source = eta**2 * (forms.pop(0) if plain else charge.form(step, step, {n: 1 / m for n, m in book.metric.items()}))
        half = 1.0 if linear else 2.0
        book.parts = {"decay": -half * eta * pull, "source": source, "cross": -half * eta * inertia}

    def after(self, step: int) -> tuple[list[Row], list[Book]]:
        """Read the state after the step; returns the rows, and the charges whose law did not hold."""
        rows: list[Row] = []
        broken = []
        for book in self.books:
            assert book.value is not None
            charge = book.charge
            if book.waits:
                book.kept, note = {}, "a learning rate is zero: the ratio that weights its parameters is not known yet"
                rows.append(Row(book.label, book.where, "charge", math.nan, status="not_applicable", note=note))
                continue
            at = {n: self.whole(self.params[n].detach()) for n in book.names}
            now = charge(at, book.metric)
            if not book.exact:
                book.parts = self._identity(book, at)
            book.kept = {}
            if not math.isfinite(float(now.sum() + sum(p.sum() for p in book.parts.values()))):
                book.predicted, book.rates, book.variance = None, {}, 0.0
                rows.append(Row(book.label, book.where, "charge", math.nan, status="not_converged", note="a weight is not finite"))
                continue
            if book.seen % 20 == 0:
                book.size = size_of(charge, at, book.metric)
            book.seen += 1
            self._advance(book)
            rows += self._rows(book, now)
            if book.violations == 3:
                broken.append(book)
        self._gap = [[0.0, 0.0, 0.0] for _ in self.optimizer.param_groups]
        self._skipped = 0
        return rows, broken

    def _identity(self, book: Book, now: Params) -> dict[str, Tensor]:
        """theta' = dec theta - w with the decoupled decay known: (dec^2 - 1) Q, q(w, w) and the cross term -2 dec q(theta, w)."""
        dec, move, old = {}, {}, {n: self.whole(p) for n, p in book.kept.items()}
        for n in book.names:
            dec[n] = 1.0
            group = self._of(n) if id(self.params[n]) in self._group else {}
            if (lr := rate_of(group)) is not None and decoupled(self.optimizer, group):
                dec[n] = 1 - lr * float(group["weight_decay"])
            move[n] = dec[n] * old[n] - now[n] if dec[n] != 1 else old[n] - now[n]
        charge, metric = book.charge, book.metric
        if charge.kind == "linear":
            decay = charge(old, {n: metric[n] * (dec[n] - 1) for n in book.names})
            return {"decay": decay, "source": torch.zeros_like(decay), "cross": -charge.form(move, move, metric)}
        decay = charge(old, {n: metric[n] * (dec[n] ** 2 - 1) for n in book.names})
        cross = charge.form(old, move, {n: -2 * dec[n] * metric[n] for n in book.names})
        return {"decay": decay, "source": charge.form(move, move, metric), "cross": cross}

    def _advance(self, book: Book) -> None:
        """Carry the prediction over the steps since the last observation, and over this one."""
        at = self._group.get(id(self.params[book.names[0]]), 0)
        group = self.optimizer.param_groups[at]
        lr = _pace(group)
        power = (lr * float(group.get("weight_decay") or 0.0), lr * lr, lr)
        rates = {k: book.parts[k] / w for k, w in zip(_PARTS, power, strict=True) if w > 0}  # a step of rate zero shows none
        if book.predicted is None:
            assert book.value is not None
            book.predicted, book.start = book.value.clone(), book.value.clone()
        elif self._skipped:
            spread = 0.0
            for k, total in zip(_PARTS, self._gap[at], strict=True):
                sides = [side[k] for side in (book.rates, rates) if k in side]
                if sides:
                    book.predicted = book.predicted + total * (sides[0] + sides[-1]) / 2
                    spread += total * book.mean(sides[-1] - sides[0])
            # an observed rate of spread s stands for its neighbourhood: variance s^2, and E (difference)^2 = 2 s^2; with momentum this
            # is more than the truth, because what inertia adds at one step it takes back at the next
            book.variance += 0.5 * spread**2
        for k in _PARTS:
            book.predicted = book.predicted + book.parts[k]
        book.rates = {**book.rates, **rates}

    def _rows(self, book: Book, now: Tensor) -> list[Row]:
        assert book.predicted is not None and book.start is not None and book.value is not None
        name, where = book.label, book.where
        if not now.numel():
            return []
        eps = max(torch.finfo(self.params[n].dtype).eps for n in book.names)
        limit = eps * 32 * book.size + book.slack
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
        residual = now - book.value - book.parts["decay"] - book.parts["source"] - book.parts["cross"]
        size, off, worst = torch.stack([moved.square().mean().sqrt(), error.square().mean().sqrt(), residual.abs().max()]).tolist()
        rows = [
            Row(
                name, where, "charge", book.mean(now), book.mean(book.predicted), math.sqrt(book.variance) if book.variance else None,
                "ok" if book.exact else "not_applicable", "; ".join(notes),
            ),
            Row(
                f"{name}: prediction error", where, "charge", off / max(size, eps * 32 * book.size, 1e-300), status="ok",
                note=f"root mean square over {book.charge.numbers} numbers, relative to the change since the start",
            ),
        ]  # fmt: skip
        if book.exact:
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
            }
            for b in self.books
        ]  # fmt: skip

    def restore(self, state: Sequence[Mapping[str, Any]], gap: Sequence[Sequence[float]], skipped: int) -> None:
        """Go on with the predictions of charges of the same name and place; the others start anew."""
        known = {(s["label"], s["where"]): s for s in state}
        for b in self.books:
            s = known.get((b.label, b.where))
            if s is None or s["predicted"] is None or tuple(s["predicted"].shape) != b.charge.shape:
                continue
            b.predicted, b.start, b.variance, b.rates = s["predicted"], s["start"], s["variance"], dict(s["rates"])
            b.metric, b.seen, b.violations, b.size = dict(s["metric"]), s["seen"], s["violations"], s["size"]
        if len(gap) == len(self._gap):
            self._gap, self._skipped = [list(g) for g in gap], skipped


def rate_of(group: Mapping[str, Any]) -> float | None:
    """A group's learning rate; None where its optimiser states none."""
    lr = group.get("lr")
    return None if lr is None else float(lr)


def _pace(group: Mapping[str, Any]) -> float:
    """What a step counts for in the prediction: its rate, or 1 where none is stated."""
    lr = rate_of(group)
    return 1.0 if lr is None else lr


def _index(vectors: Sequence[Params], vector: Params) -> int:
    return next(i for i, v in enumerate(vectors) if v is vector)
