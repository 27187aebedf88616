"""The tangent picture of a model at one point: its Jacobian, its null space, and what each null direction does inside.

A direction of parameters that leaves every output unchanged moves the activations in between. Those movements are read off
exactly (forward-mode derivatives), edge by edge; :mod:`parasym.symmetry.families` then asks which of them are the same affine
map on every sample (a symmetry) and which cannot be seen by any reader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.graph import Graph
from parasym.core.guards import math_attention

Batch = Sequence[Tensor]
_GAP_FLOOR = 1e-11  # relative singular values above this are never null
_TANGENT_BYTES = 400_000_000
_MAX_ELEMENTS = 400
_STACKED_NUMBERS = 4_000_000  # input numbers, once for each output, of the batches that share a call
_MANY_OUTPUTS = 8  # more outputs than this for each parameter entry: forward mode


@dataclass
class Flat:
    """Parameters as one vector: names, shapes, offsets."""

    shapes: dict[str, torch.Size]

    @cached_property
    def slices(self) -> dict[str, slice]:
        out, at = {}, 0
        for name, shape in self.shapes.items():
            out[name] = slice(at, at + math.prod(shape))
            at += math.prod(shape)
        return out

    @property
    def size(self) -> int:
        return sum(math.prod(s) for s in self.shapes.values())

    def pack(self, params: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([params[n].reshape(-1) for n in self.shapes]) if self.shapes else torch.zeros(0)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """(..., P) -> {name: (..., *shape)}."""
        return {n: vector[..., s].reshape((*vector.shape[:-1], *self.shapes[n])) for n, s in self.slices.items()}

    def rows(self, names: Sequence[str]) -> Tensor:
        """Indices of the entries of some parameters."""
        return (
            torch.cat([torch.arange(self.slices[n].start, self.slices[n].stop) for n in names])
            if names
            else torch.zeros(0, dtype=torch.long)
        )


def flat_of(graph: Graph) -> Flat:
    return Flat({n: p.shape for n, p in graph.params.items()})


def jacobian_columns(
    graph: Graph, params: Mapping[str, Tensor], env: Mapping[str, object], wanted: Sequence[str], directions: Tensor, flat: Flat
) -> list[Tensor]:
    """Derivatives of some nodes along parameter directions, by forward mode.

    Args:
        directions: (k, P) tangents.

    Returns:
        for each wanted node a tensor (k, *node shape).
    """
    base = {n: params[n] for n in flat.shapes}

    def run(p: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(graph.replay({**params, **p}, env, wanted))

    def push(v: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(run, (base,), (flat.unpack(v),))[1]

    with math_attention():
        first = push(directions[0])
        per = sum(t.numel() for t in first) * 8 * 4 + 1
        chunk = max(1, min(len(directions), _TANGENT_BYTES // (per * 8)))
        try:
            parts = [torch.func.vmap(push)(c) for c in directions.split(chunk)]
        except RuntimeError:  # an operator without a batching rule: one direction at a time
            parts = [tuple(t[None] for t in push(v)) for v in directions]
    return [torch.cat([p[i] for p in parts]) for i in range(len(wanted))]


def jacobian(
    graph: Graph, params: Mapping[str, Tensor], env: Mapping[str, object], flat: Flat, names: Sequence[str] | None = None
) -> Tensor:
    """Jacobian (outputs, k) of all outputs with respect to the entries of some parameters, in the order given.

    Reverse mode, unless there are many more outputs than entries: forward mode dispatches far slower.

    Args:
        names: the parameters; None: all.
    """
    names = list(flat.shapes) if names is None else list(names)
    rows = flat.rows(names)
    with math_attention(), torch.inference_mode(False), torch.enable_grad():
        params, env = _recordable(params), _recordable(env)
        leaves = {n: params[n].detach().requires_grad_() for n in names}
        out = torch.cat([o.reshape(-1) for o in graph.replay({**params, **leaves}, env)])
        if not len(rows) or not len(out) or not out.requires_grad:
            return out.new_zeros(len(out), len(rows))
        if len(out) < _MANY_OUTPUTS * len(rows):
            try:
                return _pulled_back(out, list(leaves.values()))
            except RuntimeError:  # an operator without a batching rule for its derivative
                pass
    directions = torch.eye(flat.size, dtype=torch.float64)[rows]
    columns = jacobian_columns(graph, params, env, graph.outputs, directions, flat)
    return torch.cat([c.reshape(len(rows), -1) for c in columns], 1).T


def _recordable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of tensors made under inference mode, which no derivative can pass; the rest as it is."""
    return {n: v.clone() if isinstance(v, Tensor) and v.is_inference() else v for n, v in values.items()}


def _pulled_back(out: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """(outputs, entries) by reverse mode, a bounded number of rows at a time."""
    width = sum(leaf.numel() for leaf in leaves)
    chunk = max(1, min(len(out), _TANGENT_BYTES // (64 * width + 8 * 40 * len(out))))
    parts = []
    for rows in torch.eye(len(out), dtype=out.dtype).split(chunk):
        grads = torch.autograd.grad(out, leaves, rows, retain_graph=True, is_grads_batched=True, allow_unused=True)
        zeros = [leaf.new_zeros(len(rows), leaf.numel()) for leaf in leaves]
        parts.append(torch.cat([z if g is None else g.reshape(len(rows), -1) for g, z in zip(grads, zeros, strict=True)], 1))
    return torch.cat(parts)


@dataclass
class NullSpace:
    """Null space of the Jacobian of all outputs with respect to all parameters.

    Attributes:
        basis: (P, n) orthonormal.
        values: all singular values, largest first, relative to the largest.
        scale: largest singular value.
        samples: number of batches used.
        factor: (r, P) triangular factor of the Jacobian: the judge of a direction, sharper than its distance to the basis,
            which small genuine singular values blur.
        growing: the last samples still raised the rank, so the nullity is an upper bound.
    """

    basis: Tensor
    values: Tensor
    scale: float
    samples: int
    factor: Tensor = field(default_factory=lambda: torch.zeros(0, 0), repr=False)
    growing: bool = False

    @property
    def nullity(self) -> int:
        return self.basis.shape[1]

    @property
    def gap(self) -> tuple[float, float]:
        """(smallest kept, largest null) relative singular value."""
        rank = len(self.values) - self.nullity
        return float(self.values[rank - 1]) if rank else 1.0, float(self.values[rank]) if self.nullity else 0.0


def cut(values: Tensor) -> int:
    """Rank from relative singular values (descending): the widest gap below the floor, else all of them."""
    n = len(values)
    below = int((values > _GAP_FLOOR).sum())
    if below == n:
        return n
    # genuine values go down to 4e-10 and null ones sit near 1e-15: look for the widest ratio in between
    window = values.clamp(min=1e-17)
    rank, best = below, 0.0
    for r in range(max(1, int((values > 1e-8).sum())), n):
        ratio = float(window[r - 1] / window[r])
        if values[r] < 1e-12 and ratio > best:
            rank, best = r, ratio
    return rank


def triangular(graph: Graph, params: Mapping[str, Tensor], batches: Sequence[Batch], flat: Flat) -> Tensor:
    """R factor (<= P, P) of the Jacobian stacked over the batches; about P rows, or those of one batch, are in memory."""
    R, held = torch.zeros(0, flat.size, dtype=torch.float64), []
    for J in _jacobians(graph, params, batches, flat):
        if not torch.isfinite(J).all():
            raise InputError(
                "the Jacobian of the model is not finite at these weights and inputs: look for NaN or infinite weights, "
                "overflow, or a square root or logarithm at zero."
            )
        held.append(J)
        if sum(map(len, held)) > flat.size:
            R, held = torch.linalg.qr(torch.cat([R, *held]), mode="r").R, []
    R = torch.cat([R, *held])
    return torch.linalg.qr(R, mode="r").R if len(R) > flat.size else R


def _jacobians(graph: Graph, params: Mapping[str, Tensor], batches: Sequence[Batch], flat: Flat) -> Iterator[Tensor]:
    """Jacobians whose rows together are those of all batches."""
    for part in together(graph, [graph.prepare(b) for b in batches], flat.size):
        yield part.jacobian(params, flat)


@dataclass
class Together:
    """Prepared batches that go through the graph by themselves, in one call for all where the operators allow it."""

    graph: Graph
    envs: list[dict[str, Any]]

    def values(self, params: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """Values of nodes that have a batch axis, all batches along it."""
        if len(self.envs) > 1:
            try:
                return [v.flatten(0, 1) for v in self._stacked(lambda env: self.graph.replay(params, env, wanted))]
            except RuntimeError:  # an operator without a batching rule
                pass
        return [torch.cat(each) for each in zip(*(self.graph.replay(params, env, wanted) for env in self.envs), strict=True)]

    def outputs(self, params: Mapping[str, Tensor]) -> Tensor:
        """All outputs of all batches, in order."""
        if len(self.envs) > 1:
            try:
                return self._stacked(lambda env: self._output(params, env)).reshape(-1)  # type: ignore[no-any-return]
            except RuntimeError:
                pass
        return torch.cat([self._output(params, env) for env in self.envs])

    def jacobian(self, params: Mapping[str, Tensor], flat: Flat, names: Sequence[str] | None = None) -> Tensor:
        """(outputs of all batches, k): see :func:`jacobian`."""
        if len(self.envs) > 1:
            names = list(flat.shapes) if names is None else list(names)
            with math_attention(), torch.inference_mode(False), torch.enable_grad():
                fixed = _recordable(params)
                leaves = {n: fixed[n].detach() for n in names}
                try:
                    found = self._stacked(lambda env: torch.func.jacrev(lambda q: self._output({**fixed, **q}, env))(leaves))
                    return torch.cat([found[n].detach().flatten(0, 1).flatten(1) for n in names], 1)
                except RuntimeError:
                    pass
        return torch.cat([jacobian(self.graph, params, env, flat, names) for env in self.envs])

    def _output(self, params: Mapping[str, Tensor], env: Mapping[str, Any]) -> Tensor:
        return torch.cat([o.reshape(-1) for o in self.graph.replay(params, env)])

    def _stacked(self, of: Callable[[dict[str, Any]], Any]) -> Any:
        first, moving, stacks = self._stack
        return torch.func.vmap(lambda data: of({**first, **dict(zip(moving, data, strict=True))}))(stacks)

    @cached_property
    def _stack(self) -> tuple[dict[str, Any], list[str], tuple[Tensor, ...]]:
        """The first batch, what differs in the others, and that stacked."""
        first, *others = map(_recordable, self.envs)
        data = [n for n in first if self.graph.kind.get(n) == "data"]
        moving = [n for n in data if isinstance(first[n], Tensor)]
        if any(first[n] != env[n] for env in others for n in data if n not in moving):
            raise RuntimeError("a number that is no tensor depends on the data")
        return first, moving, tuple(torch.stack([first[n], *(env[n] for env in others)]) for n in moving)


def together(graph: Graph, envs: Sequence[dict[str, Any]], rows: int) -> list[Together]:
    """Batches grouped for one call each: no more outputs than ``rows`` and a bounded size of the data; large ones stay alone."""
    envs, groups = list(envs), []
    size = 1
    if len(envs) > 1:
        outputs = sum(o.numel() for o in graph.replay(graph.params, envs[0]))
        numbers = sum(v.numel() for n, v in envs[0].items() if isinstance(v, Tensor) and graph.kind.get(n) == "data")
        size = max(1, min(rows // max(1, outputs), _STACKED_NUMBERS // max(1, numbers * outputs)))
    while envs:
        groups.append(Together(graph, envs[:size]))
        envs = envs[size:]
    return groups


def null_space(R: Tensor, samples: int) -> NullSpace:
    P = R.shape[1]
    if P == 0:
        return NullSpace(torch.zeros(0, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), 0.0, samples)
    if len(R) < P:
        R = torch.cat([R, torch.zeros(P - len(R), P, dtype=R.dtype)])
    _, s, Vh = svd(R)
    top = float(s[0]) or 1.0
    values = s / top
    rank = cut(values) if float(s[0]) > 0 else 0
    return NullSpace(Vh[rank:].T.contiguous(), values, top, samples, R)


def svd(A: Tensor, full: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """SVD; the slower driver when the fast one does not converge."""
    try:
        return torch.linalg.svd(A, full_matrices=full)
    except RuntimeError:
        import scipy.linalg

        u, s, vh = scipy.linalg.svd(A.numpy(), full_matrices=full, lapack_driver="gesvd")
        return torch.from_numpy(u), torch.from_numpy(s), torch.from_numpy(vh)


def kernel(A: Tensor, tol: float) -> Tensor:
    """Orthonormal basis (k, m) of {c : |A c| <= tol |c|}, for A of shape (rows, k)."""
    k = A.shape[1]
    if A.shape[0] == 0 or k == 0:
        return torch.eye(k, dtype=torch.float64)
    if A.shape[0] > k:
        A = torch.linalg.qr(A, mode="r").R
    _, s, Vh = svd(A)
    rank = int((s > tol).sum())
    return Vh[rank:].T.contiguous()


def span(A: Tensor, tol: float = 1e-9) -> Tensor:
    """Orthonormal basis of the columns of A; columns below ``tol`` relative are dropped."""
    if A.shape[1] == 0:
        return A
    u, s, _ = svd(A, full=False)
    return u[:, s > tol * max(float(s[0]), 1e-300)] if float(s[0]) > 0 else A[:, :0]


# -- edges ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Edge:
    """An activation between parameter operators, sample by sample.

    Attributes:
        name: node of the graph.
        shape: shape of one sample (without the batch).
        x: (N, *shape) values.
        dx: (n, N, E) movement along each null direction, E = prod(shape).
        hidden: (E, h) orthonormal basis of the directions no reader sees.
    """

    name: str
    shape: tuple[int, ...]
    x: Tensor
    dx: Tensor
    hidden: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


def batch_layout(graph: Graph, params: Mapping[str, Tensor], data: Batch, names: Sequence[str]) -> dict[str, tuple[int, int, bool] | None]:
    """Where the batch sits in each node: (axis, batch size, outermost in that axis?) by moving one sample, or None (no batch)."""
    sizes = {t.shape[0] for t in data if t.dim()}
    if len(sizes) != 1 or (B := sizes.pop()) < 2:
        return dict.fromkeys(names)
    moved = []
    for t in data:
        t = t.clone()
        t[0] = t[1] if not torch.equal(t[0], t[1]) else (t[0] + 1 if t.is_floating_point() else t[0].roll(1, 0) if t[0].dim() else t[0])
        moved.append(t)
    before = graph.replay(params, graph.prepare(data), names)
    after = graph.replay(params, graph.prepare(moved), names)
    out: dict[str, tuple[int, int, bool] | None] = {}
    for name, a, b in zip(names, before, after, strict=True):
        out[name] = _layout(a != b, B)
    return out


def _layout(changed: Tensor, B: int) -> tuple[int, int, bool] | None:
    for axis, size in enumerate(changed.shape):
        if size % B:
            continue
        rest = [i for i in range(changed.dim()) if i != axis]
        hit = changed.any(rest) if len(rest) > 0 else changed
        if isinstance(hit, Tensor) and hit.dim() > 1:
            hit = hit.flatten(1).any(1)
        inner = size // B
        if not bool(hit.reshape(B, inner)[1:].any()) and bool(hit.any()):
            return axis, B, True
        if not bool(hit.reshape(inner, B)[:, 1:].any()) and bool(hit.any()):
            return axis, B, False
    for axis, size in enumerate(changed.shape):  # samples are coupled: take the first axis of the batch's size
        if size == B:
            return axis, B, True
    return None


def by_sample(t: Tensor, layout: tuple[int, int, bool] | None, lead: int = 0) -> Tensor:
    """Bring the batch to the front: (*lead, B, *shape of a sample)."""
    if layout is None:
        return t.unsqueeze(lead)
    axis, B, outer = layout
    axis += lead
    inner = t.shape[axis] // B
    t = t.reshape(*t.shape[:axis], *((B, inner) if outer else (inner, B)), *t.shape[axis + 1 :])
    t = t.movedim(axis if outer else axis + 1, lead)
    if inner == 1:
        t = t.squeeze(axis + 1)
    return t


def hidden_directions(
    graph: Graph,
    params: Mapping[str, Tensor],
    batches: Sequence[Batch],
    names: Sequence[str],
    layouts: Mapping[str, tuple[int, int, bool] | None],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Directions of each edge that no output depends on, to first order: the null space of all gradients arriving there."""
    rows: dict[str, list[Tensor]] = {n: [] for n in names}
    for data in batches:
        env = graph.prepare(data)
        live = dict(env)
        for holder, canonical in graph.holders.items():
            live[holder] = params[canonical]
        leaves: dict[str, Tensor] = {}
        for node in graph.nodes:
            if node.name in live:
                continue
            value = graph._evaluate(node, live)
            if node.name in rows and isinstance(value, Tensor) and value.is_floating_point():
                value = value.requires_grad_() if value.is_leaf else value
                leaves[node.name] = value
            live[node.name] = value
        outs = [live[o] for o in graph.outputs]
        size = {n: v.numel() for n, v in leaves.items()}
        per_sample = {n: s // max(1, (layouts[n] or (0, 1, True))[1]) for n, s in size.items()}
        need = (
            max([math.ceil(1.5 * p / max(1, (layouts[n] or (0, 1, True))[1]) / len(batches)) for n, p in per_sample.items()], default=0) + 4
        )
        for _ in range(min(need, 400)):
            weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outs]
            total = sum((w * o).sum() for w, o in zip(weights, outs, strict=True))
            grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
            for (n, leaf), g in zip(leaves.items(), grads, strict=True):
                g = torch.zeros_like(leaf) if g is None else g
                g = by_sample(g, layouts[n])
                rows[n].append(g.reshape(g.shape[0], -1).detach())
    out = {}
    for n, parts in rows.items():
        if not parts:
            continue
        G = torch.cat(parts)
        G = G / (G.norm(dim=1, keepdim=True).clamp(min=1e-300))
        out[n] = kernel(G, 1e-9 * max(1.0, float(torch.linalg.matrix_norm(G, 2)))) if G.shape[1] else G.T
    return out


def edge_motion(
    graph: Graph, params: Mapping[str, Tensor], null: Tensor, batches: Sequence[Batch], flat: Flat, generator: torch.Generator
) -> list[Edge]:
    """What each null direction does on every edge.

    Args:
        null: (P, n) basis of the null space.
    """
    real = {n.name for n in graph.nodes if not isinstance(n.meta.get("val"), Tensor) or n.meta["val"].is_floating_point()}
    names = [n for n in graph.edges() if n in real]
    if not names or null.shape[1] == 0:
        return []
    layouts = batch_layout(graph, params, batches[0], names)
    xs: dict[str, list[Tensor]] = {n: [] for n in names}
    dxs: dict[str, list[Tensor]] = {n: [] for n in names}
    for data in batches:
        env = graph.prepare(data)
        values = graph.replay(params, env, names)
        moves = jacobian_columns(graph, params, env, names, null.T.contiguous(), flat)
        for n, v, d in zip(names, values, moves, strict=True):
            xs[n].append(by_sample(v, layouts[n]))
            d = by_sample(d, layouts[n], lead=1)
            dxs[n].append(d.reshape(d.shape[0], d.shape[1], -1))
    sizes = {n: xs[n][0][0].numel() for n in names}
    names = [n for n in names if sizes[n] <= _MAX_ELEMENTS]  # a large image says nothing its channels do not
    hidden = hidden_directions(graph, params, batches, names, layouts, generator)
    out = []
    for n in names:
        x = torch.cat(xs[n])
        out.append(Edge(n, tuple(x.shape[1:]), x, torch.cat(dxs[n], 1), hidden[n]))
    return out
