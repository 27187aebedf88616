"""Fewer units with the moments of many: lossy compression of a layer that keeps how it learns.

A layer f = sum_i v_i psi(x; theta_i) sees its units only through symmetric statistics. A few of them, each standing for c_j of the
others, have the same low moments; with frozen multiplicities c_j, and gradients of each unit divided by its own, they follow the
training of the whole layer. Folding c_j into the out-weights is right for inference and wrong for training: their rates would differ.

Source: universal-compression R5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from parasym.core.errors import InputError
from parasym.core.functional import functional
from parasym.core.guards import rng_state
from parasym.core.samples import draw
from parasym.laws.compression import monomial_count, order_for_size
from parasym.methods.compress import Subject, certificate_of
from parasym.methods.edit import Edit
from parasym.methods.masks import bare, holders
from parasym.methods.moments import compress_objects
from parasym.methods.state import Moved, sliced_transport
from parasym.methods.units import Units, as_arguments, attributes, buffer_names, cut_axes, kept_axes, parent_attributes


class _Scaled(torch.autograd.Function):
    """x times one factor forward, its gradient times another backward."""

    @staticmethod
    def forward(x: Tensor, forward: Tensor, backward: Tensor) -> Tensor:
        return x * forward.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0].to(grad.dtype), None, None


class Multiplicity(nn.Module):
    """A weight some of whose slices stand for several: times ``value`` in the forward, its gradient times ``rate``."""

    value: Tensor
    rate: Tensor

    def __init__(self, value: Tensor, rate: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)
        self.register_buffer("rate", rate)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as the network uses it."""
        return _Scaled.apply(weight, self.value, self.rate)  # type: ignore[no-any-return, no-untyped-call]


@dataclass(eq=False)
class Thinning(Edit):
    """A layer with fewer units. `apply` keeps multiplicities apart from the weights so that training goes on as in the whole layer
    (the parameters keep their identity, their names become ``weight`` -> ``parametrizations.weight.original``); `bake` folds them in.

    Attributes:
        multiplicity: (s,) how many units each kept one stands for; ``kept``: (s,) which ones.
        frozen: parameter -> (value, rate), factors that broadcast against it.
    """

    multiplicity: Tensor = field(default_factory=lambda: torch.ones(0))
    kept: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    frozen: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _worn: list[tuple[nn.Module, str, list[str]]] = field(init=False, default_factory=list, repr=False)
    _start: dict[str, tuple[nn.Parameter, Tensor]] = field(init=False, default_factory=dict, repr=False)

    def apply(self, optimizer: Optimizer | None = None, *, unknown: str = "error") -> Moved:
        """Put the smaller layer in; see `Edit.apply`. Plain SGD then follows the whole layer; Adam cancels the factor by itself."""
        moved = super().apply(optimizer, unknown=unknown)
        model = functional(self.model).model
        held = {n: (p, list(holders(model, p))) for n, p in model.named_parameters() if n in self.frozen}
        for n, (value, rate) in self.frozen.items():
            p, places = held[n]
            with torch.no_grad():
                self._start[n] = (p, p.detach().clone())
                p.div_(value.to(p))
            for module, attr in places:
                self._worn.append((module, attr, list(module._parameters)))
                parametrize.register_parametrization(module, attr, Multiplicity(value.to(p), rate.to(p)), unsafe=True)
        return moved

    def undo(self) -> None:
        """Put the whole layer back; see `Edit.undo`. A refusal leaves the multiplicities on."""
        if self.applied:
            view = functional(self.model)
            plain = {n: view.params.get(n, view.buffers.get(n)) for n in self.after if n not in self._start}
            trained = [n for n, v in plain.items() if v is not None and not torch.equal(v, self.after[n].to(v.dtype))]
            self._refuse_trained(trained + [n for n in self._start if not self._untouched(n)])
            self._bare()
        super().undo()

    def bake(self) -> nn.Module:
        """Fold the multiplicities into the weights for good: a plain, smaller network."""
        if not self.applied:
            super().apply()
        self._bare()
        return super().bake()

    def _untouched(self, name: str) -> bool:
        p, start = self._start[name]
        return torch.equal(p, start / self.frozen[name][0].to(start))

    def _bare(self) -> None:
        for module, attr, order in reversed(self._worn):
            bare(module, attr, order)
        with torch.no_grad():
            for name, (p, start) in self._start.items():
                p.copy_(start if self._untouched(name) else p * self.frozen[name][0].to(p))
        self._worn, self._start = [], {}


def thin(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    where: str,
    order: int | None = None,
    width: int | None = None,
    components: int | None = None,
    cells: int = 1,
    seed: int = 0,
) -> Thinning:
    """Plan a smaller layer whose units have the moments of all of them; lossy, and nothing is touched until ``apply()``.

    Args:
        where: module path of what writes the layer, as the audit and `compress` give it; heads of attention count as units, too.
        order: of the moments that are kept. width: or the number of units to keep at most; the order is then the largest that fits.
        components: describe a unit by so many principal components of its weights. C(m + k, k) units are kept for m numbers a unit and
            order k, so wide layers need this (or order 1).
        cells: partition the units first (k-means), compress each cell.
        seed: of the partition and the data of the certificate.

    Returns:
        The edit. Its certificate is the relative change of the outputs on the given and on fresh data: small, not zero.

    Raises:
        InputError: no such layer, one that cannot be cut, or no order that fits.

    Source: universal-compression R5.
    """
    if (order is None) == (width is None):
        raise InputError("give either order= (of the moments) or width= (units to keep at most).")
    with rng_state(), torch.no_grad():
        subject = Subject.of(model, args, kwargs, None, seed, "thin")
        units = _find(subject, where)
        z = _rows(subject, units)
        if components is not None:
            z = _principal(z, components)
        if order is None:
            assert width is not None
            if width < 1 or width > units.size:
                raise InputError(f"width must be between 1 and {units.size}, got {width}.")
            order = order_for_size(z.shape[1], max(1, width // cells))
        if cells * monomial_count(z.shape[1], order) >= units.size:
            raise InputError(
                f"order {order} in {z.shape[1]} numbers a unit needs {cells * monomial_count(z.shape[1], order):,} units, {where!r} has "
                f"{units.size}: lower the order, or describe units by fewer components=."
            )
        found = compress_objects(z, order=order, cells=cells, seed=seed)
        edit = _thinning(model, subject, units, found.index, found.weights)
    edit.summary = {
        "where": where, "order": order, "units": [len(found.index), units.size], "numbers_a_unit": z.shape[1],
        "moment_error": found.moment_error.value, "largest_multiplicity": float(found.weights.max()),
    }  # fmt: skip
    return edit


def _find(subject: Subject, where: str) -> Units:
    found = [u for u in subject.units if u.where == where]
    if not found:
        raise InputError(f"no layer {where!r}; there are {', '.join(repr(u.where) for u in subject.units) or 'none'}.")
    free = [u for u in found if u.why is None]
    if not free:
        raise InputError(f"layer {where!r} cannot be cut: {found[0].why}.")
    return max(free, key=lambda u: u.size)


def _rows(subject: Subject, units: Units) -> Tensor:
    """(n, m) all that belongs to each unit, in- and out-weights, float64."""
    rows = []
    for t, axis, at in units.places:
        p = subject.tensors[t].double()
        rows.append(p.movedim(axis, 0)[at].reshape(units.size, -1))
    return torch.cat(rows, 1)


def _principal(z: Tensor, components: int) -> Tensor:
    centred = z - z.mean(0)
    _, _, V = torch.linalg.svd(centred, full_matrices=False)
    return centred @ V[:components].T


def _thinning(model: nn.Module, subject: Subject, units: Units, kept: Tensor, count: Tensor) -> Thinning:
    """The edit that keeps some units, each standing for ``count`` of them."""
    on = set(kept.tolist())
    gone = [j for j in range(units.size) if j not in on]
    tensors = subject.tensors
    keep = kept_axes(tensors, [(units.places, gone)])
    names = buffer_names(subject.view, subject.graph)
    small = cut_axes(tensors, keep)
    frozen: dict[str, tuple[Tensor, Tensor]] = {}
    shared = {t for t, _, _ in units.inside} & {t for t, _, _ in units.outside}
    if shared:
        raise InputError(f"{sorted(shared)[0]!r} both writes and reads these units (a recurrent layer): it cannot be thinned.")
    for t, axis, at in units.places:
        if t not in subject.view.params:
            continue
        factor = torch.ones(tensors[t].shape[axis], dtype=torch.float64)
        factor[at[kept].reshape(-1)] = count[:, None].expand(-1, at.shape[1]).reshape(-1)
        factor = factor[keep[t, axis]].reshape([-1 if i == axis else 1 for i in range(tensors[t].dim())])
        reads = any(t == o for o, _, _ in units.outside)
        if reads:
            small[t] = small[t] * factor
        frozen[t] = (factor, torch.ones_like(factor)) if reads else (torch.ones_like(factor), 1 / factor)
    after = {names.get(n, n): v for n, v in small.items()}
    shapes = {names.get(n, n): t.shape for n, t in tensors.items()}
    fields = attributes(subject.view, {(names.get(t, t), a): i for (t, a), i in keep.items()}, shapes)
    fresh = draw(subject.graph, subject.given[0], subject.generator)
    cases = [*subject.cases(True), as_arguments(fresh, subject.args, subject.kwargs)]
    certificate = certificate_of(subject.view, after, fields, cases, lossy=True)
    if certificate.value is None:
        fields |= parent_attributes(subject.view, units, len(kept))
        certificate = certificate_of(subject.view, after, fields, cases, lossy=True)
    if certificate.value is None:
        raise InputError(f"layer {units.where!r} cannot be cut: {certificate.note}.")
    slices = {n: [(axis, index) for (t, axis), index in keep.items() if t == n] for n in {t for t, _ in keep} if n in subject.view.params}

    def cut(n: str) -> Any:
        def of(value: Tensor) -> Tensor:
            for axis, index in slices[n]:
                value = value.index_select(axis, index.to(value.device))
            return value

        return of

    transport = sliced_transport({n: cut(n) for n in slices})
    return Thinning("thin", model, after, certificate, transport, fields, {}, multiplicity=count, kept=kept, frozen=frozen)
