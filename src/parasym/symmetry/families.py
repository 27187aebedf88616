"""From null directions to families: which movements are affine maps of activations, on how few parameters they live.

Classes are linear conditions on a null direction, from the narrowest to the widest: no activation moves (pure), every
activation is translated, scaled unit by unit, mapped linearly, mapped affinely. Inside a class, families are the smallest
sets of parameters that carry new rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parasym.core.graph import Graph
from parasym.symmetry.symmetry import Kind
from parasym.symmetry.tangent import Edge, Flat, kernel, span, svd

CLASSES: tuple[Kind, ...] = ("pure", "translation", "diagonal", "linear", "affine")
_MAX_AXIS = 24
_TOL = 1e-7
_LEAK = 1e-11  # squared: support outside a parameter set


@dataclass
class Family:
    """Null directions of one class on one minimal set of parameters.

    Attributes:
        kind: the class.
        parameters: names.
        vectors: (P, k) an orthonormal basis of every direction of the class on these parameters.
        new: (P, dim) the part that no earlier family explains.
        fields: edge name -> (k, d, d) linear part on its feature axis, for edges where it moves (linear classes).
    """

    kind: Kind
    parameters: tuple[str, ...]
    vectors: Tensor
    new: Tensor
    moved: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        return self.new.shape[1]


def field_columns(e: Edge, kind: Kind, rows: Tensor | None = None) -> Tensor:
    """(m, N, E): what the fields of a class do to the samples of an edge."""
    x = e.x if rows is None else e.x[rows]
    N, shape = x.shape[0], e.shape
    E = x[0].numel()
    out: list[Tensor] = []
    flat = x.reshape(N, E)
    if kind in ("translation", "affine"):
        out.append(torch.eye(E, dtype=x.dtype)[:, None, :].expand(E, N, E))
    if kind == "diagonal" or (kind in ("linear", "affine") and len(shape) > 1):
        out.append(_diagonal(flat))
    if kind in ("linear", "affine"):
        for axis in _map_axes(shape, E):
            out.append(_general(x, axis).reshape(-1, N, E))
    return torch.cat(out) if out else torch.zeros(0, N, E, dtype=x.dtype)


def _field_count(e: Edge, kind: Kind) -> int:
    E, axes = e.x[0].numel(), _map_axes(e.shape, e.x[0].numel())
    general = sum(e.shape[a] ** 2 for a in axes) + E * (len(e.shape) > 1)
    return {"pure": 0, "translation": E, "diagonal": E, "linear": general, "affine": general + E}[kind]


def _diagonal(flat: Tensor) -> Tensor:
    """(E, N, E): element j scaled, the others still."""
    N, E = flat.shape
    out = torch.zeros(E, N, E, dtype=flat.dtype)
    index = torch.arange(E)
    out[index, :, index] = flat.T
    return out


def _map_axes(shape: tuple[int, ...], elements: int) -> list[int]:
    """Axes on which a general linear map is tried: all small ones; of a large image or sequence, the first and the last."""
    axes = [i for i, s in enumerate(shape) if 1 < s <= _MAX_AXIS]
    if len(shape) == 1:
        return [0]
    if elements > 256 and len(axes) > 2:
        axes = [axes[0]] if len(shape) == 3 else [axes[0], axes[-1]]
    return axes


def _general(x: Tensor, axis: int) -> Tensor:
    """(d, d, N, *shape): E_ij applied along one axis."""
    d = x.shape[axis + 1]
    moved = x.movedim(axis + 1, -1)
    out = torch.zeros(d, d, *moved.shape, dtype=x.dtype)
    for i in range(d):
        out[i, :, ..., i] = moved.movedim(-1, 0)
    return out.movedim(-1, axis + 3)


def class_residual(e: Edge, kind: Kind) -> Tensor:
    """(r, n) matrix whose kernel is the null directions that move this edge by a field of the class, modulo hidden directions.

    Scaled so that the largest movement of the edge has norm one.
    """
    n, N, E = e.dx.shape
    rows = torch.arange(min(N, 8 + (2 * n + 2 * _field_count(e, kind)) // E))  # more equations than unknowns
    dx = e.dx[:, rows] - (e.dx[:, rows] @ e.hidden) @ e.hidden.T
    top = float(e.dx[:, rows].norm(dim=(1, 2)).max())
    size = float(e.x[rows].norm()) + 1e-300
    if top <= 1e-9 * size:
        return torch.zeros(0, n, dtype=dx.dtype)
    F = field_columns(e, kind, rows)
    M = dx.reshape(n, -1).T
    if len(F):
        F = (F - (F @ e.hidden) @ e.hidden.T).reshape(len(F), -1).T
        F = F / F.norm(dim=0, keepdim=True).clamp(min=1e-300)
        B = span(F, 1e-10)
        M = M - B @ (B.T @ M)
        M = M - B @ (B.T @ M)
    return (torch.linalg.qr(M, mode="r").R if M.shape[0] > n else M) / top


def class_subspaces(edges: Sequence[Edge], n: int) -> dict[Kind, Tensor]:
    """For each class an orthonormal basis (n, m) of its null directions, in coordinates of the null space."""
    out: dict[Kind, Tensor] = {}
    for kind in CLASSES:
        parts = [class_residual(e, kind) for e in edges]
        A = torch.cat([p for p in parts if len(p)]) if any(len(p) for p in parts) else torch.zeros(0, n, dtype=torch.float64)
        out[kind] = kernel(A, _TOL)
    return out


# -- minimal parameter sets ----------------------------------------------------------------------------------------------------


def neighbourhoods(graph: Graph) -> Iterator[tuple[str, ...]]:
    """Sets of parameters that meet: around each parameter operator, ever wider, and at last all."""
    ops = graph.parameter_ops()
    owned = {n.name: graph.parameters_of(n) for n in ops}
    names = {n.name for n in ops}
    near: dict[str, set[str]] = {}
    reach: dict[str, frozenset[str]] = {}
    for node in graph.nodes:  # parameter operators seen upstream without crossing another one
        if graph.kind.get(node.name) != "active":
            continue
        up: set[str] = set()
        for a in node.all_input_nodes:
            up |= {a.name} if a.name in names else reach.get(a.name, frozenset())
        reach[node.name] = frozenset(up)
        if node.name in names:
            near.setdefault(node.name, set())
            for u in up:
                near[node.name].add(u)
                near.setdefault(u, set()).add(node.name)
    seen: set[frozenset[str]] = set()

    def emit(ops_in: set[str]) -> Iterator[tuple[str, ...]]:
        params = frozenset(p for o in ops_in for p in owned[o])
        if params and params not in seen:
            seen.add(params)
            yield tuple(sorted(params, key=list(graph.params).index))

    balls = {o: {o} for o in owned}
    for o in owned:
        yield from emit({o})
    for o in owned:
        for u in near.get(o, ()):
            yield from emit({o, u})
    for _ in range(4):
        for o in owned:  # writers and readers of one operator's output
            balls[o] = balls[o] | {v for u in balls[o] for v in near.get(u, ())}
        for o in sorted(owned, key=lambda o: len(balls[o])):
            yield from emit(balls[o])
    everything = frozenset(graph.params)
    if everything not in seen:
        yield tuple(graph.params)


class Cover:
    """Explains null directions family by family, smallest parameter sets first."""

    def __init__(self, graph: Graph, flat: Flat, null: Tensor) -> None:
        self.graph, self.flat, self.null = graph, flat, null
        self.explained = torch.zeros(null.shape[1], 0, dtype=torch.float64)  # in coordinates of the null space
        self.families: list[Family] = []
        self._seeds = list(neighbourhoods(graph))

    def add_class(self, kind: Kind, U: Tensor) -> None:
        """Cover the subspace U (n, m) of a class."""
        if self._fresh(U).shape[1] == 0:
            return
        V = self.null @ U
        gram = {p: V[s].T @ V[s] for p, s in self.flat.slices.items()}
        total = sum(gram.values(), torch.zeros(U.shape[1], U.shape[1], dtype=V.dtype))
        for seed in self._seeds:
            while self._cover_once(kind, U, gram, total, seed):
                pass
            if self._fresh(U).shape[1] == 0:
                break

    def _cover_once(self, kind: Kind, U: Tensor, gram: dict[str, Tensor], total: Tensor, seed: Sequence[str]) -> bool:
        inside = sum((gram[p] for p in seed), torch.zeros_like(total))
        K = _light(total - inside)
        if K.shape[1] == 0 or self._fresh(U @ K).shape[1] == 0:
            return False
        UK = U @ K
        small = {p: K.T @ gram[p] @ K for p in seed}
        keep = list(seed)
        order = sorted(seed, key=lambda p: (len(self.flat.shapes[p]), self.flat.slices[p].stop - self.flat.slices[p].start))
        dropped = torch.zeros(K.shape[1], K.shape[1], dtype=K.dtype)
        best = UK
        for p in order:
            trial = dropped + small[p]
            C = _light(trial)
            if C.shape[1] and self._fresh(UK @ C).shape[1]:
                dropped, best = trial, UK @ C
                keep.remove(p)
        fresh = self._fresh(best)
        rows = self.flat.rows(keep)
        vectors = torch.zeros(self.flat.size, best.shape[1], dtype=best.dtype)
        vectors[rows] = (self.null @ best)[rows]
        new = torch.zeros(self.flat.size, fresh.shape[1], dtype=best.dtype)
        # the new part must itself live on the set: take it as combinations of the family's own vectors
        coords = best.T @ fresh
        new[rows] = vectors[rows] @ torch.linalg.qr(coords).Q
        self.families.append(Family(kind, tuple(p for p in self.flat.shapes if p in keep), vectors, new))
        self.explained = torch.cat([self.explained, fresh], 1)  # exactly what the family counts
        return True

    def _fresh(self, B: Tensor) -> Tensor:
        """Orthonormal basis of the part of span(B) outside what is explained."""
        if B.shape[1] == 0:
            return B
        T = self.explained
        B = B - T @ (T.T @ B)
        B = B - T @ (T.T @ B)
        u, s, _ = svd(B, full=False)
        return u[:, s > 1e-5]


def _light(gram: Tensor) -> Tensor:
    """Orthonormal coordinates whose squared weight under a Gram matrix vanishes."""
    w, Q = torch.linalg.eigh(gram)
    return Q[:, w < _LEAK]


def find_families(graph: Graph, flat: Flat, null: Tensor, edges: Sequence[Edge]) -> tuple[list[Family], Tensor]:
    """Families that explain the null space (what no field on the edges explains comes last, as "blind"), and a basis (P, r) of the rest."""
    cover = Cover(graph, flat, null)
    n = null.shape[1]
    for kind, U in class_subspaces(edges, n).items():
        cover.add_class(kind, U)
    cover.add_class("blind", torch.eye(n, dtype=torch.float64))
    rest = cover._fresh(torch.eye(n, dtype=torch.float64))
    return cover.families, null @ rest
