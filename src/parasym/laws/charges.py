"""Noether charges: quadratic and linear functions of the parameters that a symmetry conserves under gradient flow.

A symmetry theta -> exp(lam A) theta of every per-sample loss makes the gradient orthogonal to its orbit, <A theta, g> = 0 (I1).
The symmetric part of A then gives the charge Q = theta.A theta, a translation a gives q = a.theta. A `Charge` is such a family
of numbers, one for each unit, head or entry, or one symmetric matrix for each copy of a GL(n): U^T U - W W^T. It is kept as a
short list of blocks (an index space on one axis of one parameter, with a weight), so its forms cost one pass over the
parameters whatever their number (neural-mechanics R1-R3, noise-equilibrium R1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from parasym.core.errors import InputError
from parasym.core.functional import functional
from parasym.core.graph import batch_statistics, trace
from parasym.core.guards import rng_state
from parasym.core.samples import flatten
from parasym.symmetry.dictionary import DictionaryAction, Place, Term, by_unit, put, units
from parasym.symmetry.full import architecture, audit_full_size
from parasym.symmetry.search import search
from parasym.symmetry.symmetry import Level, Params, Symmetry

ChargeKind = Literal["quadratic", "matrix", "linear"]
_SMALL = 1500  # parameters up to which the whole Jacobian is taken; larger models go through a twin


@dataclass(frozen=True)
class Block:
    """One parameter's part in a charge.

    Attributes:
        place: which positions of which axis: units x (rest, n, m), rest the other axes flattened.
        copy: (rest or 1, m) which number (or matrix) each column counts into.
        weight: the eigenvalue of A on these entries, or the coefficient of a linear charge.
    """

    place: Place
    copy: Tensor
    weight: float = 1.0

    @cached_property
    def one_each(self) -> bool:
        """Whether the columns are copies 0, 1, 2, ... in order."""
        return self.copy.shape[0] == 1 and torch.equal(self.copy[0], torch.arange(self.copy.shape[1], device=self.copy.device))


@dataclass(frozen=True)
class Charge:
    """A family of conserved numbers of one symmetry.

    Attributes:
        name: what is conserved and where.
        kind: "quadratic" (Q = theta.A theta, A diagonal), "matrix" (an n x n symmetric matrix for each copy), "linear" (a.theta).
        blocks: the parameters' parts.
        count: number of copies.
        size: n of a matrix charge, else 1.
        level: what its symmetry leaves unchanged: "function", "train", "loss".
        approximate: the symmetry holds up to the eps of a norm only.
    """

    name: str
    kind: ChargeKind
    blocks: tuple[Block, ...] = field(repr=False)
    count: int
    size: int = 1
    level: Level = "function"
    approximate: bool = False

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters it is made of."""
        return tuple(dict.fromkeys(b.place.parameter for b in self.blocks))

    @property
    def shape(self) -> tuple[int, ...]:
        """(count,), or (count, n, n) for a matrix charge."""
        return (self.count, self.size, self.size) if self.kind == "matrix" else (self.count,)

    @property
    def numbers(self) -> int:
        """How many independent numbers are conserved."""
        return self.count * self.size * (self.size + 1) // 2 if self.kind == "matrix" else self.count

    def __call__(self, params: Params, scale: Mapping[str, float] | None = None) -> Tensor:
        """Value of the charge in float64, of `shape`."""
        return self.form(params, params, scale)

    def form(self, x: Params, y: Params, scale: Mapping[str, float] | None = None, power: int = 1) -> Tensor:
        """The symmetric bilinear form q(x, y) = x.A^power y; for a linear charge a.x, whatever ``y``.

        Args:
            x, y: name -> tensor of the parameter's shape; names that are missing count as zero.
            scale: parameter -> factor on its block (a metric that is constant on each block).
            power: of A: 2 gives the squared speed along the orbit.

        Returns:
            Tensor of `shape`, float64. Differentiable, and may be vmapped over.
        """
        return self.forms((x, y), ((0, 1),), scale, power)[0]

    def forms(
        self,
        vectors: Sequence[Params],
        pairs: Sequence[tuple[int, int]],
        scale: Mapping[str, float] | None = None,
        power: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Several forms q(vectors[i], vectors[j]) in one pass over the vectors; the other arguments as in `form`.

        Args:
            dtype: of the products within a block; what they add up to is float64 always.

        Returns:
            Tensor (pairs, *shape), float64.
        """
        totals: list[Tensor | None] = [None] * len(pairs)
        for block in self.blocks:
            name = block.place.parameter
            factor = block.weight**power * (scale.get(name, 1.0) if scale is not None else 1.0)
            seen: dict[int, Tensor] = {}
            for k, (i, j) in enumerate(pairs):
                if name not in vectors[i] or (name not in vectors[j] and self.kind != "linear"):
                    continue
                for v in (i,) if self.kind == "linear" else (i, j):
                    key = id(vectors[v][name])
                    if key not in seen:
                        seen[key] = units(vectors[v][name], block.place).to(dtype)
                other = None if self.kind == "linear" else seen[id(vectors[j][name])]
                totals[k] = self._added(totals[k], block, seen[id(vectors[i][name])], other, factor)
        if any(t is None for t in totals):
            first = vectors[pairs[0][0]]
            device = next((first[n].device for n in self.parameters if n in first), torch.device("cpu"))
            totals = [torch.zeros(self.shape, dtype=torch.float64, device=device) if t is None else t for t in totals]
        return totals[0][None] if len(totals) == 1 else torch.stack(totals)  # type: ignore[index, arg-type]

    def _added(self, total: Tensor | None, block: Block, u: Tensor, v: Tensor | None, factor: float) -> Tensor:
        """A total with one block's part of q(u, v) added; u and v: (rest, n, m)."""
        at = block.copy if block.copy.device == u.device else block.copy.to(u.device)
        axes = (0, 1) if at.shape[0] == 1 else (1,)  # the rest axes belong to one copy, so they are summed at once
        if self.kind == "linear":
            each = u.sum(axes)
        else:
            assert v is not None
            if self.kind == "quadratic":
                each = (u * v).sum(axes)
            else:
                each = torch.einsum("rim,rjm->mij" if at.shape[0] == 1 else "rim,rjm->rmij", u, v)
        each = each.reshape(-1, self.size, self.size) if self.kind == "matrix" else each.reshape(-1)
        if self.kind == "matrix":
            each = 0.5 * (each + each.transpose(-1, -2))
        each = each if each.dtype == torch.float64 else each.to(torch.float64)
        if block.one_each and len(each) == self.count:
            return torch.add(total, each, alpha=factor) if total is not None else each * factor if factor != 1 else each
        total = torch.zeros(self.shape, dtype=torch.float64, device=each.device) if total is None else total
        return total.index_add(0, at.reshape(-1), each, alpha=factor)

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        """The group element exp(sum lam A) on the parameters of the charge; nothing is changed in place.

        Args:
            params: name -> tensor.
            element: lam, of `shape`: one number for each copy, or one symmetric matrix; for a linear charge the amount added
                along a (times the block's weight).
        """
        lam = element.to(torch.float64)
        if self.kind != "linear":
            return self.multiply(params, lambda w: torch.linalg.matrix_exp(w * lam) if self.kind == "matrix" else (w * lam).exp())
        moved: dict[str, Tensor] = {}
        for block in self.blocks:
            p = moved.get(block.place.parameter, params[block.place.parameter])
            step = (block.weight * lam)[block.copy].to(p.dtype)
            moved[block.place.parameter] = put(p, block.place, units(p, block.place) + step[:, None, :], False)
        return moved

    def multiply(self, params: Params, factor: Callable[[float], Tensor]) -> dict[str, Tensor]:
        """Multiply each block by ``factor(weight)``, of `shape`, on the axis of its units; the other parameters are left out."""
        moved: dict[str, Tensor] = {}
        for block in self.blocks:
            p = moved.get(block.place.parameter, params[block.place.parameter])
            u, E = units(p, block.place), factor(block.weight)[block.copy].to(p.dtype)
            if self.kind != "matrix":
                new = u * E[:, None, :]
            else:
                new = torch.einsum("mij,rjm->rim", E[0], u) if E.shape[0] == 1 else torch.einsum("rmij,rjm->rim", E, u)
            moved[block.place.parameter] = put(p, block.place, new, False)
        return moved

    def split(self, x: Params, y: Params) -> tuple[Tensor, Tensor]:
        """(plus, minus): the parts of q(x, y) with positive and with negative weight, both counted positive."""
        plus = replace(self, blocks=tuple(b for b in self.blocks if b.weight > 0))
        minus = replace(self, blocks=tuple(replace(b, weight=-b.weight) for b in self.blocks if b.weight < 0))
        return plus.form(x, y), minus.form(x, y)

    def flat(self, value: Tensor) -> Tensor:
        """The independent numbers of a value of `shape`, as (numbers,)."""
        if self.kind != "matrix":
            return value.reshape(-1)
        i, j = torch.triu_indices(self.size, self.size, device=value.device)
        return value[..., i, j].reshape(-1)

    def labels(self) -> tuple[str, ...]:
        """A name for each of the independent numbers."""
        if self.kind != "matrix":
            return tuple(f"{self.name}[{i}]" for i in range(self.count))
        i, j = torch.triu_indices(self.size, self.size)
        return tuple(f"{self.name}[{c},{a},{b}]" for c in range(self.count) for a, b in zip(i.tolist(), j.tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the index tensors."""
        return {
            "name": self.name, "kind": self.kind, "parameters": list(self.parameters), "copies": self.count, "size": self.size,
            "numbers": self.numbers, "level": self.level, "approximate": self.approximate,
        }  # fmt: skip


@dataclass(frozen=True)
class ChargeSet(Sequence[Charge]):
    """Charges of a model, and the symmetries that give none with the reason."""

    charges: tuple[Charge, ...]
    without: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.charges)

    def __getitem__(self, index: Any) -> Any:
        return self.charges[index]

    def __iter__(self) -> Iterator[Charge]:
        return iter(self.charges)

    @property
    def numbers(self) -> int:
        """How many numbers are conserved in all."""
        return sum(c.numbers for c in self.charges)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"charges": [c.to_dict() for c in self.charges], "without": [list(w) for w in self.without]}


# ------------------------------------------------------------------------------------------------------------ charges by hand


def rescale(
    params: Params, inward: Sequence[str | tuple[str, int]], outward: Sequence[str | tuple[str, int]], name: str = "rescale"
) -> Charge:
    """Charge of each unit whose inward parts may be multiplied by c and outward parts by 1 / c: sum_in x^2 - sum_out x^2.

    Args:
        params: name -> tensor, for the shapes.
        inward, outward: parameters, each with the axis that runs over the units (0 for inward, 1 for outward if not given).

    Raises:
        InputError: an unknown parameter, or axes of different lengths.
    """
    parts = [(*_axis(p, 0), 1.0) for p in inward] + [(*_axis(p, 1), -1.0) for p in outward]
    return _diagonal(params, parts, name, "quadratic")


def scale(params: Params, group: Sequence[str | tuple[str, int]], name: str = "scale") -> Charge:
    """|w|^2 of each unit of a scale-invariant group (weights before a batch norm): one number for each position of the axis."""
    return _diagonal(params, [(*_axis(p, 0), 1.0) for p in group], name, "quadratic")


def translation(params: Params, group: Sequence[str | tuple[str, int]], name: str = "translation") -> Charge:
    """Sums of parameters over one axis (0 if not given): conserved where a constant may be added along it (logits under softmax)."""
    blocks: list[Block] = []
    at = 0
    for item in group:
        p, axis = _axis(item, 0)
        n = _shape(params, p)[axis]
        rest = params[p].numel() // n
        blocks.append(Block(Place(p, axis, (), torch.arange(n)[:, None], {}, n), at + torch.arange(rest)[:, None]))
        at += rest
    return Charge(name, "linear", tuple(blocks), at)


def matrix(params: Params, inward: Sequence[str | tuple[str, int]], outward: Sequence[str | tuple[str, int]], name: str = "gl") -> Charge:
    """U^T U - W W^T of a GL(n) between maps: ``inward`` parameters carry B on their axis, ``outward`` ones B^-T. Axes as `rescale`."""
    parts = [(*_axis(p, 0), 1.0) for p in inward] + [(*_axis(p, 1), -1.0) for p in outward]
    sizes = {_shape(params, p)[a] for p, a, _ in parts}
    if len(sizes) != 1:
        raise InputError(f"The axes of {name} have different lengths {sorted(sizes)}.")
    n = sizes.pop()
    blocks = tuple(Block(Place(p, a, (), torch.arange(n)[:, None], {}, n), torch.zeros(1, 1, dtype=torch.long), w) for p, a, w in parts)
    return Charge(name, "matrix", blocks, 1, n)


def _axis(item: str | tuple[str, int], default: int) -> tuple[str, int]:
    return (item, default) if isinstance(item, str) else item


def _shape(params: Params, name: str) -> torch.Size:
    if name not in params:
        raise InputError(f"There is no parameter {name!r}; there are {', '.join(list(params)[:8])}.")
    return params[name].shape


def _diagonal(params: Params, parts: Sequence[tuple[str, int, float]], name: str, kind: ChargeKind) -> Charge:
    fixed = [(p, min(a, len(_shape(params, p)) - 1), w) for p, a, w in parts]
    sizes = {params[p].shape[a] for p, a, _ in fixed}
    if len(sizes) != 1:
        raise InputError(f"The axes of {name} have different lengths {sorted(sizes)}: each must run over the units.")
    n = sizes.pop()
    place = {(p, a): Place(p, a, (), torch.arange(n)[None, :], {}, n) for p, a, _ in fixed}
    return Charge(name, kind, tuple(Block(place[p, a], torch.arange(n)[None, :], w) for p, a, w in fixed), n)


# ------------------------------------------------------------------------------------------------- charges of found symmetries


def charge_of(symmetry: Symmetry) -> Charge | str:
    """The charge of a symmetry, or the reason why there is none.

    Rotations have none (their generator is antisymmetric), nor do translations that move with the weights (absorbed into a bias) and
    maps with a norm's gain folded in, beyond their diagonal part: <A theta, d theta> is then no total derivative.
    """
    action = symmetry.action
    if symmetry.kind == "discrete":
        return "discrete: no generator"
    if symmetry.kind == "point":
        return "only at these weights: training ends it"
    if not isinstance(action, DictionaryAction):
        return "found numerically: no closed form to take a charge from"
    entry = action.entry
    if entry.algebra in ("so", "so1"):
        return "rotation: theta.A theta = 0 for an antisymmetric A"
    terms = [(w, *_at_units(action, t)) for w, t in entry.terms]
    moving = sorted({t.op for _, t, _ in terms if t.op in ("absorb", "normal", "fold", "recentre") and not _constant(t)})
    if moving:
        return f"its direction depends on other weights ({', '.join(moving)}): no total derivative"
    made: Charge
    if entry.algebra in ("row", "free", "shift"):
        if any(t.gain is not None or t.factor is not None for _, t, _ in terms):
            return "its direction depends on a norm's gain or statistics: no total derivative"
        made = _linear(symmetry.name, action, terms)
    elif entry.algebra == "gl" and not any(t.gain is not None for _, t, _ in terms):
        blocks = tuple(Block(t.place, _one_copy(at, t), w if t.op == "mode" else -w) for w, t, at in terms)
        made = Charge(symmetry.name, "matrix", blocks, entry.copies.count, entry.size)
    else:  # a scale; or of gl with folded gains the diagonal, which commutes with them
        blocks, count = _units(action, terms)
        made = Charge(symmetry.name, "quadratic", blocks, count)
    return replace(made, level=symmetry.level)


def _constant(t: Term) -> bool:
    return t.op == "normal" and t.gain is None and t.offset is None


def _at_units(action: DictionaryAction, term: Term) -> tuple[Term, Tensor | None]:
    return action._at(term)


def _one_copy(copy: Tensor | None, t: Term) -> Tensor:
    return torch.zeros(1, t.place.index.shape[1], dtype=torch.long) if copy is None else copy


def _units(action: DictionaryAction, terms: Sequence[tuple[float, Term, Tensor | None]]) -> tuple[tuple[Block, ...], int]:
    entry, blocks = action.entry, []
    if entry.algebra == "scale":
        for w, t, at in terms:
            blocks.append(Block(t.place, _one_copy(at, t), w if t.op == "mode" else -w))
        return tuple(blocks), entry.copies.count
    for w, t, at in terms:
        place = by_unit(t.place, entry.space)
        n, m = t.place.index.shape
        base = _one_copy(at, t)
        unit = torch.arange(n).repeat_interleave(m)
        blocks.append(Block(place, base.repeat(1, n) * n + unit, w if t.op == "mode" else -w))
    return tuple(blocks), entry.copies.count * entry.size


def _linear(name: str, action: DictionaryAction, terms: Sequence[tuple[float, Term, Tensor | None]]) -> Charge:
    entry = action.entry
    blocks, at = [], 0
    for w, t, columns in terms:
        n, m = t.place.index.shape
        if entry.algebra == "shift":
            base = _one_copy(columns, t)
            place, slot = by_unit(t.place, entry.space), base.repeat(1, n) * n + torch.arange(n).repeat_interleave(m)
            if t.rows is not None:
                slot = slot.repeat(t.rows.numel(), 1)
                place = replace(place, cross={**place.cross, "rows": t.rows})
            blocks.append(Block(place, slot, w))
            continue
        rows = action.rows // m if t.op == "ones" else action.rows if t.op == "normal" else action.rows // (n * m)
        if t.op == "free":
            blocks.append(Block(by_unit(t.place, entry.space), at + torch.arange(rows * n * m).reshape(rows, n * m), w))
        elif t.op == "ones":
            blocks.append(Block(t.place, at + torch.arange(rows * m).reshape(rows, m), w))
        else:
            blocks.append(Block(t.place, at + torch.arange(rows)[:, None].expand(rows, m).contiguous(), w))
    count = entry.copies.count * entry.size if entry.algebra == "shift" else action.rows
    return Charge(name, "linear", tuple(blocks), count)


def charges_of(symmetries: Sequence[Symmetry]) -> ChargeSet:
    """The charges of a set of symmetries (`parasym.symmetries`, ``audit(...).symmetries``)."""
    found, without = [], []
    for s in symmetries:
        made = charge_of(s)
        if isinstance(made, str):
            without.append((s.name, made))
        else:
            found.append(made)
    return ChargeSet(tuple(found), tuple(without))


class _Head(nn.Module):
    """A model followed by the shift-free part of its loss, under the model's own parameter names."""

    def __init__(self, model: nn.Module, head: Any) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.head(self.model(*args, **kwargs))


def charges(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    head: Any = None,
    approximate: bool = True,
    seed: int = 0,
) -> ChargeSet:
    """Find a model's symmetries and return their charges.

    Args:
        model: any module, in the mode it is trained in (a batch norm has its scale symmetry in train mode only); never changed.
        args, kwargs: example arguments, the batch first.
        head: function of the output that stands for the loss, to add the charges that only the loss has: for cross-entropy
            ``lambda y: y.log_softmax(-1)`` (the logits may be shifted).
        approximate: treat the eps of every norm as zero; the charges that need it are marked ``approximate``.
        seed: of the random draws of the search.

    Raises:
        InputError, TraceError: what, where, and what to do.
    """
    return discover(model, args, kwargs, head=head, approximate=approximate, seed=seed)[0]


def discover(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    head: Any = None,
    approximate: bool = True,
    seed: int = 0,
) -> tuple[ChargeSet, list[Symmetry]]:
    """As `charges`, and the symmetries they were taken from. The model may be on the meta device: no weights are read then."""
    with rng_state():
        trained = functional(model, values=False).model
        model = _still(trained)
        symmetries = _symmetries(model, args, kwargs, seed, head)
        exact = charges_of(symmetries)
        if not (approximate and any(isinstance(getattr(m, "eps", None), float) for m in model.modules())):
            return _under_dropout(exact, trained, model, args, kwargs, seed), symmetries
        twin = copy.deepcopy(model)
        for m in twin.modules():
            if isinstance(getattr(m, "eps", None), float):
                m.eps = 1e-30  # type: ignore[assignment]
        ideal = charges_of(_symmetries(twin, args, kwargs, seed, None))  # the head sees no eps
    known = {(c.name, c.parameters) for c in exact}
    more = tuple(replace(c, approximate=True) for c in ideal if (c.name, c.parameters) not in known)
    found = ChargeSet((*exact.charges, *more), exact.without)
    return _under_dropout(found, trained, model, args, kwargs, seed), symmetries


def _still(model: nn.Module) -> nn.Module:
    """The model without its dropout: a mask is part of the sample, and what acts on each unit by itself does not see it."""
    if not any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in model.modules()):
        return model
    model = copy.deepcopy(model)
    for m in model.modules():
        if isinstance(m, _DropoutNd):
            m.p = 0.0
    return model


def _under_dropout(
    found: ChargeSet, trained: nn.Module, still: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, seed: int
) -> ChargeSet:
    """The charges that are left where dropout masks the sample: a direction that mixes units (the mean of a stream, which a norm removes
    from whole streams and not from masked ones) is none of the function that is trained.

    Each is judged by its group element on one mask, with the same weights without a mask beside it: what moves both is not dropout's.
    """
    if trained is still or any(p.is_meta for p in trained.parameters()):
        return found
    masked, plain = copy.deepcopy(trained).double(), copy.deepcopy(still).double()
    given, named = pytree.tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, (tuple(args), dict(kwargs or {}))
    )
    params = {n: p.detach() for n, p in masked.named_parameters()}
    generator = torch.Generator().manual_seed(seed)

    def output(model: nn.Module, moved: Params) -> Tensor:
        with rng_state(), torch.no_grad():
            torch.manual_seed(seed)
            out = torch.func.functional_call(model, dict(moved), given, named)
        return torch.cat([t.flatten() for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()])

    def moves(model: nn.Module, moved: Params, base: Tensor) -> float:
        return float((output(model, moved) - base).norm() / base.norm().clamp_min(1e-300))

    bases = output(masked, {}), output(plain, {})
    kept, lost = [], []
    for charge in found.charges:
        element = 0.1 * torch.randn(charge.shape, generator=generator, dtype=torch.float64)
        moved = charge.act(params, element + element.mT if charge.kind == "matrix" else element)
        off = moves(masked, moved, bases[0])
        if off > 1e-8 and off > 100 * moves(plain, moved, bases[1]):
            lost.append((charge.name, "dropout masks what it acts on: a symmetry of the evaluated network, not of the trained one"))
        else:
            kept.append(charge)
    return ChargeSet(tuple(kept), (*found.without, *lost))


def _symmetries(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, seed: int, head: Any) -> list[Symmetry]:
    generator = torch.Generator().manual_seed(seed)
    if any(p.is_meta for p in model.parameters()):
        return list(architecture(model, args, kwargs, generator, lambda stage, fraction: None))
    graph = trace(model, args, kwargs)
    batch = [flatten(graph, args, kwargs)]
    size = sum(p.numel() for p in graph.params.values())
    found: list[Symmetry] = []
    if size > _SMALL:
        found += audit_full_size(model, args, kwargs, graph, batch, generator, lambda stage, fraction: None).symmetries
    else:
        level: Level = "train" if model.training and batch_statistics(graph) else "function"
        found += search(graph, batch, generator, blind=False, level=level).symmetries
    if head is not None:
        known = {(s.name, s.parameters, s.dim) for s in found}
        strip = [replace(s, level="loss") for s in _headed(model, args, kwargs, seed, head)]
        found += [s for s in strip if (s.name, s.parameters, s.dim) not in known]
    return found


def _headed(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, seed: int, head: Any) -> list[Symmetry]:
    generator = torch.Generator().manual_seed(seed)
    whole = _Head(model, head).train(model.training)
    graph = trace(whole, args, kwargs)
    size = sum(p.numel() for p in graph.params.values())
    if size > _SMALL:
        batch = [flatten(graph, args, kwargs)]
        found = audit_full_size(whole, args, kwargs, graph, batch, generator, lambda stage, fraction: None)
        return [_renamed(s) for s in found.symmetries]
    strip = {n: n.removeprefix("model.") for n in graph.params}
    graph.params = {strip[n]: p for n, p in graph.params.items()}
    graph.holders = {h: strip[n] for h, n in graph.holders.items()}
    graph.aliases = {a.removeprefix("model."): strip[n] for a, n in graph.aliases.items()}
    return list(search(graph, [flatten(graph, args, kwargs)], generator, blind=False, level="loss").symmetries)


def _renamed(s: Symmetry) -> Symmetry:
    """The same symmetry under the model's own parameter names."""
    action = s.action
    if isinstance(action, DictionaryAction):
        e = action.entry
        terms = tuple((w, _stripped(t)) for w, t in e.terms)
        action = DictionaryAction(replace(e, terms=terms), action.rows)
    names = tuple(p.removeprefix("model.") for p in s.parameters)
    return replace(s, name=s.name.replace("model.", ""), parameters=names, action=action, where=s.where.removeprefix("model."))


def _stripped(t: Term) -> Term:
    def place(p: Place | None) -> Any:
        return None if p is None else replace(p, parameter=p.parameter.removeprefix("model."))

    return replace(t, place=place(t.place), gain=place(t.gain), target=place(t.target), offset=place(t.offset))
