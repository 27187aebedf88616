"""Mirrors: reflections R = 1 - 2 O O^T of the parameters, with O kept as the few entries it has.

O^T O = 1; c = O^T theta are the normal coordinates, c = 0 is the mirror surface. Every sign, exchange or transposition of a network is
one; a continuous family has the collapsed set of each of its idempotent elements (a unit for a rescaling, a direction for GL).

Source: dcs-mirror-symmetry R1, R4.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import torch
from torch import Tensor

from parasym.core.errors import InputError, NotASymmetryError
from parasym.symmetry.discrete_actions import Pairs, Permutations
from parasym.symmetry.symmetry import Params, Symmetry

_PROBED = 4096  # numbers a continuous action is probed on, one by one


@dataclass(frozen=True)
class Block:
    """The entries of O in one parameter: ``value[k]`` at flat position ``index[k]``, column ``column[k]``."""

    index: Tensor
    column: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class Mirror:
    """Normal directions O of one or several mirrors.

    Attributes:
        shapes: name -> shape of each parameter that O touches.
        blocks: name -> its entries.
        rank: number of columns r.
        groups: (r,) which mirror each column belongs to.
        labels: a name for each mirror.
        offset: (r,) values of c on the surface; zero for a mirror through the origin.
        parts: where the columns were made from several reflections (units merged as a set): those reflections.
    """

    shapes: Mapping[str, tuple[int, ...]]
    blocks: Mapping[str, Block]
    rank: int
    groups: Tensor
    labels: tuple[str, ...]
    offset: Tensor
    parts: tuple[Mirror, ...] = field(default=(), repr=False)

    def coordinates(self, params: Params) -> Tensor:
        """c = O^T theta, (r,); differentiable."""
        some = params[next(iter(self.blocks))]
        total = torch.zeros(self.rank, dtype=some.dtype, device=some.device)
        for name, b in self.blocks.items():
            flat = params[name].reshape(-1)
            total = total.index_add(0, b.column, b.value.to(flat) * flat[b.index])
        return total

    def lift(self, c: Tensor) -> dict[str, Tensor]:
        """O c as tensors of the parameters' shapes."""
        out = {}
        for name, b in self.blocks.items():
            flat = torch.zeros(torch.Size(self.shapes[name]).numel(), dtype=c.dtype, device=c.device)
            out[name] = flat.index_add(0, b.index, b.value.to(c) * c[b.column]).reshape(self.shapes[name])
        return out

    def reflect(self, params: Params, group: int | None = None) -> dict[str, Tensor]:
        """R theta of the parameters it touches, for one mirror or for all of them."""
        return self._moved(params, 2.0, group)

    def project(self, params: Params, group: int | None = None) -> dict[str, Tensor]:
        """The nearest point of the mirror surface."""
        return self._moved(params, 1.0, group)

    def distances(self, params: Params) -> Tensor:
        """|c| of each mirror, (mirrors,), in units of the weights."""
        c = self.coordinates(params) - self.offset.to(next(iter(params.values())))
        return torch.zeros(len(self.labels), dtype=c.dtype, device=c.device).index_add(0, self.groups, c.square()).sqrt()

    def _moved(self, params: Params, times: float, group: int | None) -> dict[str, Tensor]:
        c = self.coordinates(params) - self.offset.to(params[next(iter(self.blocks))])
        if group is not None:
            c = torch.where(self.groups == group, c, 0.0)
        return {n: params[n] - times * step for n, step in self.lift(c).items()}

    # ------------------------------------------------------------------------------------------------ where mirrors come from

    @classmethod
    def linear(cls, maps: Mapping[str, Tensor], values: Tensor | None = None) -> Mirror:
        """The mirror whose surface is C theta = b, for any linear map; each row is a mirror of its own only if rows are orthogonal.

        Args:
            maps: name -> (k, *shape of the parameter), k rows of C over all the parameters; dependent rows are an error.
            values: (k,) b; zero by default.

        Raises:
            InputError: rows that are dependent, of different number, or not finite.
        """
        rows = {n: m.detach().double().flatten(1) for n, m in maps.items()}
        counts = {m.shape[0] for m in rows.values()}
        if len(counts) != 1 or not rows or 0 in counts:
            raise InputError(f"A linear map needs the same number of rows k >= 1 for every parameter, got {sorted(counts)}.")
        joined = torch.cat(list(rows.values()), 1)
        if not bool(torch.isfinite(joined).all()):
            raise InputError("The linear map is not finite.")
        q, r = torch.linalg.qr(joined.T)
        small = r.diagonal().abs() <= 1e-10 * r.diagonal().abs().max()
        if joined.shape[0] > joined.shape[1] or bool(small.any()):
            raise InputError(f"The {joined.shape[0]} rows of the linear map depend on each other: drop those that others imply.")
        b = torch.zeros(joined.shape[0], dtype=torch.float64) if values is None else values.detach().double().reshape(-1)
        if b.shape != (joined.shape[0],):
            raise InputError(f"The linear map has {joined.shape[0]} rows but {b.numel()} values.")
        offset = torch.linalg.solve_triangular(r.T, b[:, None], upper=False)[:, 0]
        shapes = {n: tuple(m.shape[1:]) for n, m in maps.items()}
        return cls._dense(shapes, q, torch.zeros(q.shape[1], dtype=torch.long), ("linear map",), offset)

    @classmethod
    def zeros(cls, masks: Mapping[str, Tensor]) -> Mirror:
        """The surface where the marked weights vanish; every weight is a mirror of its own. ``masks``: name -> bool of its shape."""
        blocks, at = {}, 0
        for name, mask in masks.items():
            index = mask.reshape(-1).nonzero()[:, 0]
            blocks[name] = Block(index, torch.arange(at, at + len(index)), torch.ones(len(index), dtype=torch.float64))
            at += len(index)
        if at == 0:
            raise InputError("The masks mark no weight.")
        labels = tuple(f"{n}[{int(i)}]" for n, b in blocks.items() for i in b.index)
        shapes = {n: tuple(m.shape) for n, m in masks.items()}
        return cls(shapes, blocks, at, torch.arange(at), labels, torch.zeros(at, dtype=torch.float64))

    @classmethod
    def equal(cls, params: Params, one: str, other: str) -> Mirror:
        """The surface where two parameters of one shape are equal (tied)."""
        lost = [n for n in (one, other) if n not in params]
        if lost:
            raise InputError(f"There is no parameter {lost[0]!r} to make equal (a parametrised one has no plain value to tie).")
        if params[one].shape != params[other].shape or one == other:
            raise InputError(f"{one!r} {tuple(params[one].shape)} and {other!r} {tuple(params[other].shape)} cannot be made equal.")
        n = params[one].numel()
        every, half = torch.arange(n), torch.full((n,), 0.5**0.5, dtype=torch.float64)
        shapes = {k: tuple(params[k].shape) for k in (one, other)}
        blocks = {one: Block(every, every, half), other: Block(every, every, -half)}
        return cls(shapes, blocks, n, torch.zeros(n, dtype=torch.long), (f"{one} = {other}",), torch.zeros(n, dtype=torch.float64))

    @classmethod
    def of(cls, symmetry: Symmetry, params: Params, elements: Sequence[Any] | None = None) -> Mirror:
        """The mirrors of a symmetry.

        Args:
            symmetry: discrete (signs, exchanges, transpositions of units): each element is one mirror, and must be an involution;
                a rescaling: each element is a unit, whose in- and out-weights vanish on the surface; GL or another linear family:
                each element is a matrix (n, n) that is a projector, or a direction (n,), of the first copy.
            params: values give shapes only.
            elements: for a discrete symmetry, indices of generators or tables of its action, or pairs (i, j) of units; None: all
                generators (signs), or all units (rescalings).

        Raises:
            NotASymmetryError: an element that is no reflection.
            InputError: mirrors that share entries (merge the units as one set: `merged`), or a family with no such elements.
        """
        if symmetry.kind != "discrete":
            return _continuous(symmetry, params, elements)
        action: Any = symmetry.action
        if elements is None:
            if isinstance(action, (Permutations, Pairs)):
                raise InputError(f"{symmetry.name}: say which units are to be exchanged, elements=[(i, j), ...], or merge a set of them.")
            elements = list(range(symmetry.order))
        found = [_reflection(symmetry, params, e) for e in elements]
        return _side_by_side(params, found, [f"{symmetry.name}, {e}" for e in elements])

    @classmethod
    def merged(cls, symmetry: Symmetry, params: Params, units: Sequence[int], which: int = 0) -> Mirror:
        """The surface where all the given units of a permutation symmetry are equal: one mirror for each two, taken together.

        Args:
            which: the set of units, where a symmetry has several (one for each head, group, ...).
        """
        action = symmetry.action
        if not isinstance(action, Permutations):
            raise InputError(f"{symmetry.name} does not exchange units: only a permutation symmetry merges them.")
        chosen = list(dict.fromkeys(int(u) for u in units))
        if len(chosen) < 2 or not all(0 <= u < action.units.size for u in chosen):
            raise InputError(f"{symmetry.name}: merge at least two different units of 0..{action.units.size - 1}, got {list(units)}.")
        pairs = [(chosen[0], j, which) for j in chosen[1:]]
        if len(pairs) == 1:
            return cls.of(symmetry, params, pairs)
        parts = [_reflection(symmetry, params, p) for p in pairs]
        label = f"{symmetry.name}, units {', '.join(map(str, chosen))}"
        alone = tuple(_side_by_side(params, [p], [f"units {i} and {j}"]) for p, (i, j, _) in zip(parts, pairs, strict=True))
        return _spanned(params, alone, label)

    @classmethod
    def _dense(
        cls, shapes: Mapping[str, tuple[int, ...]], basis: Tensor, groups: Tensor, labels: tuple[str, ...], offset: Tensor
    ) -> Mirror:
        blocks, start = {}, 0
        for name, shape in shapes.items():
            part = basis[start : start + torch.Size(shape).numel()]
            start += part.shape[0]
            i, j = part.nonzero(as_tuple=True)
            if len(i):
                blocks[name] = Block(i, j, part[i, j])
        return cls({n: shapes[n] for n in blocks}, blocks, basis.shape[1], groups, labels, offset)


def _reflection(symmetry: Symmetry, params: Params, element: Any) -> tuple[list[str], Tensor, Tensor]:
    """A discrete element as a signed permutation of all its numbers: names, source of each position, sign."""
    action: Any = symmetry.action
    if isinstance(element, (tuple, list)):
        if not isinstance(action, Permutations):
            raise InputError(f"{symmetry.name}: pairs of units are for permutations; give the index of a generator.")
        element = action.pair(*element)
    element = torch.as_tensor(element)
    names = [n for n in action.tensors if n in params]
    sizes = [params[n].numel() for n in names]
    total = sum(sizes)

    def act(flat: Tensor) -> Tensor:
        given = {n: v.reshape(params[n].shape) for n, v in zip(names, flat.split(sizes), strict=True)}
        moved = {**given, **{n: v for n, v in action.act(given, element).items() if n in given}}
        return torch.cat([moved[n].reshape(-1) for n in names])

    image = act(torch.arange(1, total + 1, dtype=torch.float64))
    source, sign = image.abs().round().long() - 1, image.sign()
    probe = torch.randn(total, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    valid = bool((source >= 0).all() and (source < total).all()) and torch.equal(act(probe), sign * probe[source])
    if not valid or not torch.equal(source[source], torch.arange(total)) or not bool((sign * sign[source] == 1).all()):
        raise NotASymmetryError(
            f"{symmetry.name}: the element {element.tolist()} is no reflection of the weights (twice it is not the identity, or it is not "
            "orthogonal): choose an exchange of two units or a sign."
        )
    return names, source, sign


def _side_by_side(params: Params, found: Sequence[tuple[list[str], Tensor, Tensor]], labels: Sequence[str]) -> Mirror:
    """One mirror for each reflection; their entries must not overlap."""
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    groups, rank = [], 0
    for g, (names, source, sign) in enumerate(found):
        position = torch.arange(len(source))
        single = ((source == position) & (sign < 0)).nonzero()[:, 0]
        first = (source > position).nonzero()[:, 0]
        columns = len(single) + len(first)
        if columns == 0:
            raise NotASymmetryError(f"{labels[g]}: this element moves nothing, so it is no mirror.")
        numbers = torch.arange(rank, rank + columns)
        half = 0.5**0.5
        index = torch.cat([single, first, source[first]])
        column = torch.cat([numbers[: len(single)], numbers[len(single) :], numbers[len(single) :]])
        ones = torch.ones(len(first), dtype=torch.float64)
        value = torch.cat([torch.ones(len(single), dtype=torch.float64), half * ones, -half * sign[first]])
        rank += columns
        groups += [g] * columns
        start = 0
        for n in names:
            mine = (index >= start) & (index < start + params[n].numel())
            if bool(mine.any()):
                parts.setdefault(n, []).append((index[mine] - start, column[mine], value[mine]))
            start += params[n].numel()
    blocks = {}
    for n, pieces in parts.items():
        index, column, value = (torch.cat(x) for x in zip(*pieces, strict=True))
        if len(index.unique()) != len(index):
            raise InputError(f"Some of these mirrors share entries of {n!r}: take disjoint pairs, or merge the units as one set.")
        blocks[n] = Block(index, column, value)
    shapes = {n: tuple(params[n].shape) for n in blocks}
    return Mirror(shapes, blocks, rank, torch.tensor(groups), tuple(labels), torch.zeros(rank, dtype=torch.float64))


def _spanned(params: Params, parts: tuple[Mirror, ...], label: str) -> Mirror:
    """The common surface of mirrors that share entries: their columns made orthonormal, in each set of entries that hang together."""
    names = list(dict.fromkeys(n for p in parts for n in p.shapes))
    sizes = [params[n].numel() for n in names]
    starts = dict(zip(names, [0, *itertools.accumulate(sizes)], strict=False))
    pieces, at = [], 0
    for p in parts:
        pieces += [(starts[n] + b.index, at + b.column, b.value) for n, b in p.blocks.items()]
        at += p.rank
    entry, column, value = (torch.cat(x) for x in zip(*pieces, strict=True))
    matrix = scipy.sparse.coo_matrix((value.numpy(), (entry.numpy(), column.numpy())), (sum(sizes), at)).tocsr()
    touched = np.unique(entry.numpy())
    compact = matrix[touched]
    _, member = scipy.sparse.csgraph.connected_components(compact @ compact.T, directed=False)
    order = np.argsort(member, kind="stable")
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for rows in np.split(order, np.flatnonzero(np.diff(member[order])) + 1):
        some = compact[rows]
        dense = some[:, np.unique(some.indices)].toarray()
        left, s, _ = np.linalg.svd(dense, full_matrices=False)
        found.append((touched[rows], left[:, s > 1e-10 * s[0]]))
    rank = sum(basis.shape[1] for _, basis in found)
    index = np.concatenate([np.repeat(rows, basis.shape[1]) for rows, basis in found])
    numbers = np.split(np.arange(rank), np.cumsum([basis.shape[1] for _, basis in found])[:-1])
    columns = np.concatenate([np.tile(c, len(rows)) for c, (rows, _) in zip(numbers, found, strict=True)])
    values = np.concatenate([basis.reshape(-1) for _, basis in found])
    blocks = {}
    for n in names:
        mine = (index >= starts[n]) & (index < starts[n] + params[n].numel()) & (values != 0)
        blocks[n] = Block(*(torch.from_numpy(x) for x in (index[mine] - starts[n], columns[mine], values[mine])))
    shapes = {n: tuple(params[n].shape) for n in names}
    zero = torch.zeros(rank, dtype=torch.float64)
    return Mirror(shapes, blocks, rank, zero.long(), (label,), zero, parts)


def _continuous(symmetry: Symmetry, params: Params, elements: Sequence[Any] | None) -> Mirror:
    """The collapsed set of idempotent elements X of a linear family: the range of the projector L_X^2, L_X its tangent map."""
    action: Any = symmetry.action
    entry = getattr(action, "entry", None)
    if entry is None or entry.algebra not in ("scale", "gl", "so") or not hasattr(action, "tangents"):
        raise InputError(f"{symmetry.name} ({symmetry.group}) is neither a rescaling nor linear: give the mirror as a linear map.")
    names = [n for n in symmetry.parameters if n in params]
    shapes = {n: tuple(params[n].shape) for n in names}
    if entry.algebra == "scale":
        chosen = list(range(action.dim)) if elements is None else [int(e) for e in elements]
        found = []
        for j in chosen:
            ones = {n: torch.ones(shapes[n], dtype=torch.float64) for n in names}
            step = action.tangents(ones, torch.eye(action.dim, dtype=torch.float64)[j])
            flat = torch.cat([step.get(n, torch.zeros(shapes[n])).reshape(-1).double() for n in names])
            position = torch.arange(len(flat))
            found.append((names, position, torch.where(flat != 0, -1.0, 1.0).double()))
        return _side_by_side(params, found, [f"{symmetry.name}, unit {j}" for j in chosen])
    if elements is None or entry.algebra == "so":
        raise InputError(f"{symmetry.name}: give the directions of a GL that are to vanish, elements=[n, ...], n of {entry.size} numbers.")
    total = sum(torch.Size(s).numel() for s in shapes.values())
    if total > _PROBED:
        raise InputError(f"{symmetry.name} moves {total} numbers, more than {_PROBED}: give the directions to Mirror.linear instead.")
    bases, groups = [], []
    for g, direction in enumerate(elements):
        n = torch.as_tensor(direction, dtype=torch.float64)
        x = torch.outer(n, n) / n.square().sum() if n.dim() == 1 else n
        coordinates = torch.zeros(action.dim, dtype=torch.float64)
        coordinates[: x.numel()] = x.reshape(-1)
        sizes = [torch.Size(s).numel() for s in shapes.values()]

        def tangent(flat: Tensor, at: Tensor = coordinates, sizes: list[int] = sizes) -> Tensor:
            given = {k: v.reshape(shapes[k]) for k, v in zip(names, flat.split(sizes), strict=True)}
            step = action.tangents(given, at)
            return torch.cat([step[k].reshape(-1).double() if k in step else torch.zeros_like(given[k]).reshape(-1) for k in names])

        linear = torch.stack([tangent(e) for e in torch.eye(total, dtype=torch.float64)], 1)
        values, vectors = torch.linalg.eigh((linear @ linear + (linear @ linear).T) / 2)
        basis = vectors[:, values > 0.5]
        if float((linear @ linear - basis @ basis.T).abs().max()) > 1e-8:
            raise NotASymmetryError(f"{symmetry.name}: element {g} is no orthogonal projector, so it has no mirror.")
        bases.append(basis)
        groups += [g] * basis.shape[1]
    whole = torch.cat(bases, 1)
    if float((whole.T @ whole - torch.eye(whole.shape[1], dtype=torch.float64)).abs().max()) > 1e-8:
        raise InputError(f"{symmetry.name}: the directions are not orthogonal.")
    whole = torch.where(whole.abs() > 1e-13, whole, 0.0)
    labels = tuple(f"{symmetry.name}, direction {g}" for g in range(len(elements)))
    return Mirror._dense(shapes, whole, torch.tensor(groups), labels, torch.zeros(whole.shape[1], dtype=torch.float64))
