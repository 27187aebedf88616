"""Finite groups that permute or negate slices of parameters, written on the atoms of :mod:`parasym.symmetry.spaces`.

An element is a generator's index (a scalar) or a table with one row for each index of the parents and one column for each
unit: a permutation of the units, or a bit that says whether the unit is negated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from parasym.symmetry.axes import Monomial
from parasym.symmetry.spaces import Atom, Place, Spaces
from parasym.symmetry.symmetry import FixedSet, Params

_PAIRS = 2016  # all pairs of 64 units; beyond, each unit with its nearest


class Discrete(Protocol):
    """A finite group acting on parameters (and on running statistics that go with them)."""

    dim: int

    @property
    def order(self) -> int: ...

    @property
    def tensors(self) -> tuple[str, ...]: ...

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]: ...

    def generators(self, params: Params) -> dict[str, Tensor]: ...

    def tests(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Elements a certificate must try: generators spread over the group, and random elements."""
        ...

    def key(self) -> tuple[Any, ...]:
        """What it moves, without sizes: the same for one architecture at any width."""
        ...


def grid(block: Monomial) -> Tensor:
    """Indices along the axis of every element of a block, one dimension for each atom."""
    out = torch.full(block.sizes, block.offset, dtype=torch.long)
    for k, (stride, size) in enumerate(zip(block.strides, block.sizes, strict=True)):
        out = out + (stride * torch.arange(size)).reshape([-1 if i == k else 1 for i in range(len(block.sizes))])
    return out


@dataclass(frozen=True)
class Units:
    """The units of an atom, one set for each index of its parents, and where their slices lie.

    Attributes:
        atom: the atom.
        parents: atoms whose indices tell separate sets of units apart.
        places: where the units sit.
        around: for each place and parent outside its block, where that parent sits in the same tensor.
    """

    atom: Atom
    parents: tuple[Atom, ...]
    places: tuple[Place, ...]
    around: Mapping[tuple[str, int], tuple[Place, ...]] = field(default_factory=dict)

    @property
    def sets(self) -> int:
        return math.prod(p.size for p in self.parents)

    @property
    def size(self) -> int:
        return self.atom.size

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.tensor for p in self.places))

    def key(self) -> tuple[Any, ...]:
        return tuple((p.tensor, p.axis, p.slot) for p in self.places)

    def indices(self, which: int) -> dict[int, int]:
        """Index of each parent for one set of units."""
        out = {}
        for p in reversed(self.parents):
            which, out[p.number] = divmod(which, p.size)
        return out

    def within(self, place: Place, at: Mapping[int, int]) -> tuple[Tensor, list[int]]:
        """Indices along the axis of one set of units, and which dimensions of them count units."""
        g = grid(place.block)
        keep = []
        for k, a in reversed(list(enumerate(place.block.atoms))):
            if a in at:
                g = g.select(k, at[a])
            else:
                keep.append(a)
        return g, [k for k, a in enumerate(reversed(keep)) if a == self.atom.number]

    def outside(self, t: Tensor, place: Place, at: Mapping[int, int]) -> Tensor | None:
        """Mask, broadcastable to the tensor, of what belongs to one set through its other axes; None for everything."""
        mask: Tensor | None = None
        for p in self.parents:
            if p.number in place.block.atoms:
                continue
            other = self._companion(place, p)
            if other is None:
                continue
            row = torch.zeros(t.shape[other.axis], dtype=torch.bool)
            row[other.positions(p.number)[at[p.number]]] = True
            row = row.reshape([-1 if i == other.axis else 1 for i in range(t.dim())])
            mask = row if mask is None else mask & row
        return mask

    def _companion(self, place: Place, parent: Atom) -> Place | None:
        """The occurrence of a parent that goes with one occurrence of the atom: as many of both go in order, else the nearest."""
        others = [q for q in self.around.get((place.tensor, parent.number), ()) if q.axis != place.axis]
        mine = [p for p in self.atom.places if p.tensor == place.tensor]
        if len(others) == len(mine):
            return others[mine.index(place)]
        return min(others, key=lambda q: abs(q.axis - place.axis), default=None)


def units_of(spaces: Spaces, atom: Atom, places: Sequence[Place] | None = None, parents: Sequence[int] | None = None) -> Units:
    """The units of an atom with every parent it has (or those given)."""
    above = tuple(spaces.atoms[p] for p in (atom.parents if parents is None else parents))
    around: dict[tuple[str, int], tuple[Place, ...]] = {}
    for p in above:
        for q in p.places:
            around[q.tensor, p.number] = (*around.get((q.tensor, p.number), ()), q)
    return Units(atom, above, tuple(atom.places if places is None else places), around)


# -- permutations --------------------------------------------------------------------------------------------------------------


@dataclass
class Permutations:
    """Exchanges of the units of an atom, separately for each index of its parents.

    The generators are the adjacent transpositions of every set.
    """

    units: Units
    dim: int = 0

    @property
    def order(self) -> int:
        return self.units.sets * (self.units.size - 1)

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.units.tensors

    def table(self, element: Tensor) -> Tensor:
        """(sets, size) permutations: new unit j is old unit table[s, j]."""
        if element.dim() == 2:
            return element
        out = torch.arange(self.units.size).repeat(self.units.sets, 1)
        s, j = divmod(int(element), self.units.size - 1)
        out[s, j], out[s, j + 1] = j + 1, j
        return out

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        table = self.table(element)
        still = torch.arange(self.units.size)
        rows = [s for s in range(self.units.sets) if not torch.equal(table[s], still)]
        out = {n: params[n] for n in self.tensors if n in params}
        for place in self.units.places:
            if place.tensor in out:
                out[place.tensor] = self._move(out[place.tensor], place, {s: table[s] for s in rows})
        return out

    def _move(self, t: Tensor, place: Place, orders: Mapping[int, Tensor]) -> Tensor:
        """Reorder one axis; sets told apart on that axis go together, others are picked out by masks on other axes."""
        together = torch.arange(t.shape[place.axis])
        for s, order in orders.items():
            at = self.units.indices(s)
            mask = self.units.outside(t, place, at)
            index = together if mask is None else torch.arange(t.shape[place.axis])
            old, dims = self.units.within(place, at)
            new = old
            for d in dims:
                new = new.index_select(d, order)
            index[old.reshape(-1)] = new.reshape(-1)
            if mask is not None:
                t = torch.where(mask.to(t.device), t.index_select(place.axis, index.to(t.device)), t)
        return t.index_select(place.axis, together.to(t.device))

    def key(self) -> tuple[Any, ...]:
        return ("exchange", *self.units.key())

    def generators(self, params: Params) -> dict[str, Tensor]:
        return {}

    def tests(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield from (torch.tensor(i) for i in spread(self.order, 8))
        yield torch.stack([torch.randperm(self.units.size, generator=generator) for _ in range(self.units.sets)])

    def pair(self, i: int, j: int, which: int = 0) -> Tensor:
        """The element that exchanges two units."""
        out = torch.arange(self.units.size).repeat(self.units.sets, 1)
        out[which, i], out[which, j] = j, i
        return out


def spread(n: int, most: int) -> list[int]:
    """At most ``most`` indices below n, ends included."""
    return list(range(n)) if n <= most else sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


@dataclass
class Pairs:
    """Exchanges of units that are indexed by several atoms at once, across all of them (an index space of a product)."""

    atoms: tuple[Atom, ...]
    dim: int = 0

    @property
    def size(self) -> int:
        return math.prod(a.size for a in self.atoms)

    @property
    def order(self) -> int:
        return self.size - 1

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.atoms[0].parameters

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        order = element
        if element.dim() == 0:
            order = torch.arange(self.size)
            order[element], order[element + 1] = element + 1, element.clone()
        return {n: self._move(params[n], n, order.reshape(-1)) for n in self.tensors if n in params}

    def _move(self, t: Tensor, name: str, order: Tensor) -> Tensor:
        for places in zip(*([p for p in a.places if p.tensor == name] for a in self.atoms), strict=True):
            t = self._once(t, places, order)
        return t

    def _once(self, t: Tensor, places: Sequence[Place], order: Tensor) -> Tensor:
        """Exchange the units at one occurrence of the atoms."""
        axes = [p.axis for p in places]
        alone = [p.block.sizes == (t.shape[p.axis],) for p in places]
        if all(alone) and len(set(axes)) == len(axes):
            front = t.movedim(axes, list(range(len(axes))))
            moved = front.reshape(self.size, -1).index_select(0, order.to(t.device))
            return moved.reshape(front.shape).movedim(list(range(len(axes))), axes)
        flat = torch.arange(t.numel()).reshape(t.shape)
        offsets = torch.zeros([1] * len(places), dtype=torch.long)
        for k, (p, a) in enumerate(zip(places, self.atoms, strict=True)):
            steps = p.positions(a.number)[:, 0] * math.prod(t.shape[p.axis + 1 :])
            offsets = offsets + steps.reshape([-1 if i == k else 1 for i in range(len(places))])
        offsets = offsets.reshape(-1)
        shift = torch.zeros(t.numel(), dtype=torch.long)
        for unit in range(self.size):
            mask = torch.ones(t.shape, dtype=torch.bool)
            for a, p, index in zip(self.atoms, places, self._split(unit), strict=True):
                row = torch.zeros(t.shape[p.axis], dtype=torch.bool)
                row[p.positions(a.number)[index]] = True
                mask &= row.reshape([-1 if i == p.axis else 1 for i in range(t.dim())])
            shift[flat[mask]] = offsets[order[unit]] - offsets[unit]
        return t.reshape(-1)[(flat.reshape(-1) + shift).to(t.device)].reshape(t.shape)

    def _split(self, unit: int) -> list[int]:
        out: list[int] = []
        for a in reversed(self.atoms):
            unit, i = divmod(unit, a.size)
            out.insert(0, i)
        return out

    def key(self) -> tuple[Any, ...]:
        return ("exchange", *((p.tensor, p.axis, p.slot) for a in self.atoms for p in a.places))

    def generators(self, params: Params) -> dict[str, Tensor]:
        return {}

    def tests(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield from (torch.tensor(i) for i in spread(self.order, 8))
        yield torch.randperm(self.size, generator=generator)[None]


@dataclass
class Joint:
    """A group generated by several: their generators one after the other."""

    parts: tuple[Permutations | Pairs | Signs | Exchange | Joint, ...]
    dim: int = 0

    @property
    def order(self) -> int:
        return sum(p.order for p in self.parts)

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(t for p in self.parts for t in p.tensors))

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        index = int(element)
        for p in self.parts:
            if index < p.order:
                return p.act(params, torch.tensor(index))
            index -= p.order
        raise IndexError(f"the group has {self.order} generators, asked for {int(element)}")

    def key(self) -> tuple[Any, ...]:
        return ("joint", *(p.key() for p in self.parts))

    def generators(self, params: Params) -> dict[str, Tensor]:
        return {}

    def tests(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield from (torch.tensor(i) for i in spread(self.order, 8))


# -- signs ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Signs:
    """Negation of some slices of each unit of an atom; every unit of every set is a generator."""

    units: Units
    dim: int = 0

    @property
    def order(self) -> int:
        return self.units.sets * self.units.size

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.units.tensors

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        bits = element
        if element.dim() == 0:
            bits = torch.zeros(self.order, dtype=torch.bool)
            bits[element] = True
        bits = bits.reshape(self.units.sets, self.units.size).bool()
        out = {n: params[n] for n in self.tensors if n in params}
        rows = bits.any(1).nonzero()[:, 0].tolist()
        for place in self.units.places:
            if place.tensor in out:
                out[place.tensor] = self._flip(out[place.tensor], place, {s: bits[s] for s in rows})
        return out

    def _flip(self, t: Tensor, place: Place, rows: Mapping[int, Tensor]) -> Tensor:
        shape = [-1 if i == place.axis else 1 for i in range(t.dim())]
        together = torch.ones(t.shape[place.axis], dtype=t.dtype)
        for s, bits in rows.items():
            at = self.units.indices(s)
            mask = self.units.outside(t, place, at)
            sign = together if mask is None else torch.ones_like(together)
            g, dims = self.units.within(place, at)
            for d in dims:
                sign[g.index_select(d, bits.nonzero()[:, 0]).reshape(-1)] *= -1
            if mask is not None:
                t = torch.where(mask.to(t.device), t * sign.reshape(shape).to(t.device), t)
        return t * together.reshape(shape).to(t.device)

    def key(self) -> tuple[Any, ...]:
        return ("sign", *self.units.key())

    def generators(self, params: Params) -> dict[str, Tensor]:
        return {}

    def tests(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield from (torch.tensor(i) for i in spread(self.order, 6))
        yield torch.randint(2, (self.order,), generator=generator)


@dataclass
class GlobalSign:
    """Negation of whole parameters, or of whole blocks of an axis of theirs; one generator.

    Attributes:
        slices: (parameter, axis, slot of a block), with None for all of the parameter.
        blocks: the blocks, one for each slice.
    """

    slices: tuple[tuple[str, int | None, int | None], ...]
    blocks: tuple[Monomial | None, ...]
    dim: int = 0
    order: int = 1

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s[0] for s in self.slices))

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        out = {n: params[n] for n in self.tensors if n in params}
        for (name, axis, _), block in zip(self.slices, self.blocks, strict=True):
            if name not in out:
                continue
            t = out[name]
            if axis is None or block is None:
                out[name] = -t
                continue
            sign = torch.ones(t.shape[axis], dtype=t.dtype, device=t.device)
            sign[grid(block).reshape(-1)] = -1
            out[name] = t * sign.reshape([-1 if i == axis else 1 for i in range(t.dim())])
        return out

    def key(self) -> tuple[Any, ...]:
        return ("sign of all", *self.slices)

    def generators(self, params: Params) -> dict[str, Tensor]:
        return {}

    def tests(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield torch.tensor(0)


# -- exchanges of whole tensors ------------------------------------------------------------------------------------------------


@dataclass
class Exchange:
    """Exchange of equal-shaped sets of parameters, possibly inside one index of some atoms only.

    Attributes:
        swaps: (one, other) parameter names.
        inside: atoms that every one of these parameters carries; the exchange acts at one joint index of them.
        reorder: parameter -> (axis, index order) for tensors that keep their place but list the exchanged parts.
    """

    swaps: tuple[tuple[str, str], ...]
    inside: tuple[Units, ...] = ()
    reorder: Mapping[str, tuple[tuple[int, Tensor], ...]] = field(default_factory=dict)
    dim: int = 0

    @property
    def order(self) -> int:
        return math.prod(u.size for u in self.inside)

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([n for pair in self.swaps for n in pair] + list(self.reorder)))

    def act(self, params: Params, element: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for a, b in self.swaps:
            x, y = params[a], params[b]
            mask = self._mask(x, a, element)
            out[a] = y.clone() if mask is None else torch.where(mask, y, x)
            out[b] = x.clone() if mask is None else torch.where(mask, x, y)
        for name, orders in self.reorder.items():
            t = params[name]
            for axis, order in orders:
                t = t.index_select(axis, order)
            out[name] = t
        return out

    def _mask(self, t: Tensor, name: str, element: Tensor) -> Tensor | None:
        if not self.inside:
            return None
        bits = element
        if element.dim() == 0:
            bits = torch.zeros(self.order, dtype=torch.bool)
            bits[element] = True
        bits = bits.bool().reshape([u.size for u in self.inside])
        for k, u in enumerate(self.inside):
            place = next(p for p in u.places if p.tensor == name)
            owner = torch.zeros(t.shape[place.axis], dtype=torch.long)
            positions = place.positions(u.atom.number)
            owner[positions.reshape(-1)] = torch.arange(u.size).repeat_interleave(positions.shape[1])
            bits = bits.index_select(k, owner)
        axes = [next(p.axis for p in u.places if p.tensor == name) for u in self.inside]
        order = sorted(range(len(axes)), key=axes.__getitem__)
        bits = bits.permute(order)
        return bits.reshape([t.shape[i] if i in axes else 1 for i in range(t.dim())])

    def key(self) -> tuple[Any, ...]:
        return ("swap", *self.swaps, *(u.key() for u in self.inside))

    def generators(self, params: Params) -> dict[str, Tensor]:
        return {}

    def tests(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        yield from (torch.tensor(i) for i in spread(self.order, 6))
        if self.inside:
            yield torch.randint(2, (self.order,), generator=generator)


# -- collapsed states ----------------------------------------------------------------------------------------------------------


def unit_vectors(units: Units, params: Params) -> Tensor:
    """(sets, size, features): everything that belongs to each unit."""
    rows: list[list[Tensor]] = [[] for _ in range(units.sets)]
    for place in units.places:
        if place.tensor not in params:
            continue
        t = params[place.tensor]
        for s in range(units.sets):
            at = units.indices(s)
            g, dims = units.within(place, at)
            if not dims:
                continue
            g = g.movedim(dims[0], 0).reshape(units.size, -1)
            mask = units.outside(t, place, at)
            part = t if mask is None else t * mask.to(t.dtype)
            rows[s].append(part.movedim(place.axis, 0)[g.to(t.device)].reshape(units.size, -1))
    return torch.stack([torch.cat(r, 1) for r in rows])


def _relative(vectors: Tensor) -> Tensor:
    """(sets, size, size) of 2 |w_i - w_j|^2 / (|w_i|^2 + |w_j|^2)."""
    gram = vectors @ vectors.mT
    norms = gram.diagonal(dim1=1, dim2=2)
    total = norms[:, :, None] + norms[:, None, :]
    return (2 * (total - 2 * gram)).clamp(min=0) / total.clamp(min=1e-300)


def equal_units(action: Permutations) -> FixedSet:
    """Collapsed states of an exchange: two units with equal slices."""
    u = action.units
    if u.sets * u.size * (u.size - 1) // 2 <= _PAIRS:
        pairs = [(s, i, j) for s in range(u.sets) for i, j in itertools.combinations(range(u.size), 2)]
        index = torch.tensor(pairs).T

        def distance(params: Params) -> Tensor:
            s, i, j = index
            return _relative(unit_vectors(u, params))[s, i, j]

        def project(params: Params, k: int) -> dict[str, Tensor]:
            s, i, j = pairs[k]
            return _average(action, params, action.pair(i, j, s))

        labels = tuple(f"units {i} and {j}" + (f" of set {s}" if u.sets > 1 else "") for s, i, j in pairs)
        return FixedSet("two units are equal", distance, project, labels)

    def nearest(params: Params) -> tuple[Tensor, Tensor]:
        d = _relative(unit_vectors(u, params))
        d.diagonal(dim1=1, dim2=2).fill_(math.inf)
        value, other = d.min(2)
        return value.reshape(-1), other.reshape(-1)

    def merge(params: Params, k: int) -> dict[str, Tensor]:
        s, i = divmod(k, u.size)
        return _average(action, params, action.pair(i, int(nearest(params)[1][k]), s))

    return FixedSet(
        "a unit equals its nearest one", lambda params: nearest(params)[0], merge,
        tuple(f"unit {i}" + (f" of set {s}" if u.sets > 1 else "") for s in range(u.sets) for i in range(u.size)),
    )  # fmt: skip


def zero_units(action: Signs) -> FixedSet:
    """Collapsed states of signs: a unit whose negated slices vanish; distances are relative to the root mean square unit."""
    u = action.units

    def distance(params: Params) -> Tensor:
        norms = unit_vectors(u, params).norm(dim=2)
        return (norms / norms.square().mean().sqrt().clamp(min=1e-300)).reshape(-1)

    labels = tuple(f"unit {i}" + (f" of set {s}" if u.sets > 1 else "") for s in range(u.sets) for i in range(u.size))
    return FixedSet("a unit is zero", distance, lambda params, k: _average(action, params, torch.tensor(k)), labels)


def fixed_by(action: Discrete, description: str) -> FixedSet:
    """Collapsed states of an orthogonal group generator by generator: what it leaves in place."""

    def distance(params: Params) -> Tensor:
        out = []
        for k in range(action.order):
            moved = action.act(params, torch.tensor(k))
            gap = sum(float((v - params[n]).square().sum()) for n, v in moved.items())
            size = sum(float(params[n].square().sum()) for n in moved)
            out.append(math.sqrt(gap / max(size, 1e-300)) / 2)
        return torch.tensor(out, dtype=torch.float64)

    labels = tuple(f"generator {k}" for k in range(action.order))
    return FixedSet(description, distance, lambda params, k: _average(action, params, torch.tensor(k)), labels)


def _average(action: Discrete, params: Params, element: Tensor) -> dict[str, Tensor]:
    """The nearest point that an involution leaves in place: half of the state and its image."""
    return {n: (params[n] + v) / 2 for n, v in action.act(params, element).items()}
