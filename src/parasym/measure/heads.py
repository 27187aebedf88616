"""Linear factors: heads and bottlenecks whose product lost rank, vanished or repeats another, streams with empty directions.

Factors are read in parts. Of each head a triangular factor and a random sketch are kept; heads whose products have nearly the
same sketch are then compared exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parasym.measure.findings import LISTED, Row, Thresholds, common, finding, judged
from parasym.measure.imbalance import charge_rows
from parasym.measure.judge import Judge
from parasym.measure.slices import CHUNK, Read, owners, parts
from parasym.measure.units import Layer
from parasym.symmetry.dictionary import Copies, Entry, Term, tangent
from parasym.symmetry.places import places_of
from parasym.symmetry.readers import readers
from parasym.symmetry.spaces import Spaces

LINEAR = ("gl", "so", "so1")
_SKETCH = 32  # a product of heads is sketched by a matrix of this size
_SMALL = 64  # width below which Gram matrices are as cheap as a sketch


def fits(e: Entry, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """The family was written for parameters of these shapes."""
    places = [p for _, t in e.terms for p in (t.place, t.gain, t.target, t.offset) if p is not None]
    return bool(places) and all(
        p.parameter in shapes and p.axis < len(shapes[p.parameter]) and shapes[p.parameter][p.axis] == p.size for p in places
    )


def factors(spaces: Spaces, layers: Sequence[Layer], entries: Sequence[Entry]) -> list[Entry]:
    """Pairs of factors read off the index spaces where no family says so: what one contraction writes and one other reads, or
    two contractions that meet in a product of activations (queries and keys)."""
    graph = spaces.graph
    found = readers(graph)
    written, read = {(r.weight, r.out_axis) for r in found}, {(r.weight, r.in_axis) for r in found}
    counted: dict[tuple[str, int], int] = {}
    for r in found:
        counted[r.weight, r.in_axis] = counted.get((r.weight, r.in_axis), 0) + 1
    known = {frozenset(p for p in e.parameters if graph.params[p].dim() > 1) for e in entries if e.algebra == "gl"}
    bent = {a for layer in layers for g in layer.regions for b in spaces.blocks(g.output.name, g.axis) for a in b.atoms}
    out = []
    for name, places in places_of(spaces).items():
        if not name.startswith("a") or int(name[1:]) in bent or spaces.atoms[int(name[1:])].frozen is not None:
            continue
        wide = [p for p in places if len(graph.params[p.parameter].shape) > 1]
        makers = [p for p in wide if (p.parameter, p.axis) in written]
        takers = [p for p in wide if (p.parameter, p.axis) in read]
        if (
            len(wide) != 2
            or (len(makers), len(takers)) not in ((1, 1), (2, 0))
            or any(counted.get((p.parameter, p.axis), 0) > 1 for p in takers)
        ):
            continue
        first, second = makers[0], (takers or makers[1:])[0]
        if frozenset((first.parameter, second.parameter)) in known or first.index.shape[0] < 2:
            continue
        local = [k for k in first.outer if k in second.outer]
        copies = Copies(tuple((k, int(first.outer[k].max()) + 1) for k in local))
        out.append(Entry("gl", name, first.index.shape[0], copies, ((1.0, Term("mode", first)), (1.0, Term("dual", second)))))
    return out


def _usable(e: Entry) -> bool:
    """All terms are matrices that the algebra multiplies once, the same number of columns for each copy."""
    for w, t in e.terms:
        if t.op not in ("mode", "dual") or abs(w) != 1 or w != e.terms[0][0]:
            return False
        at = owners(e.copies, t.place)
        if at is not None:
            (i, some), (j, times) = (x.unique(return_counts=True) for x in at)
            count = torch.zeros(e.copies.count, dtype=torch.long)
            count.index_add_(0, (i[:, None] + j).reshape(-1), (some[:, None] * times).reshape(-1))
            if bool((count != count[0]).any()):
                return False
    return True


def _vectors(e: Entry, t: Term, read: Read, only: Sequence[int] | None = None) -> Iterator[tuple[slice, Tensor]]:
    """What an element multiplies in one term, a part at a time: copies, and (c, k, n) vectors; those of a copy come in one order.

    Args:
        only: some of the copies; the slices then count these.
    """
    place, at = t.place, owners(e.copies, t.place)
    chosen = list(range(e.copies.count)) if only is None else list(only)
    index, n, factor = place.index, place.index.shape[0], torch.ones(place.index.shape[0], dtype=torch.float64)
    if t.gain is not None:
        g = read(t.gain.parameter)[:].to(torch.float64).movedim(t.gain.axis, -1).reshape(-1)[t.gain.index[:, 0]]
        factor = 1 / g if (t.gain_power > 0) == (t.op == "mode") else g
    if at is None:
        for part, _, _ in parts(read(place.parameter), place.axis, index, index.shape[1]):
            shared = part.permute(0, 2, 1).reshape(1, -1, n).to(torch.float64) * factor
            yield slice(0, len(chosen)), shared.expand(len(chosen), -1, n)
    elif len(at[1]) == 1:
        each = len(at[0]) // e.copies.count
        columns = at[0].argsort(stable=True).reshape(-1, each)[chosen].reshape(-1)
        for part, _, which in parts(read(place.parameter), place.axis, index[:, columns], each):
            v = part.unflatten(2, (-1, each)).permute(2, 0, 3, 1).to(torch.float64).flatten(1, 2) * factor
            yield slice(which.start // each, which.stop // each), v
    else:
        for part, rest, _ in parts(read(place.parameter), place.axis, index, index.shape[1]):
            owner, v = (at[1][rest, None] + at[0]).reshape(-1), part.permute(0, 2, 1).reshape(-1, n).to(torch.float64) * factor
            for c in owner.unique().tolist():
                if c in chosen:
                    yield slice(chosen.index(c), chosen.index(c) + 1), v[owner == c][None]


@dataclass
class _Side:
    """The factors A_c (n, width) on one side of each product.

    Attributes:
        terms: where they lie.
        R: (copies, n, n) with A_c A_c^T = R_c^T R_c.
        sketch: (copies, n, k) products of A_c with one random matrix.
        width: columns.
    """

    terms: list[Term]
    R: Tensor
    sketch: Tensor
    width: int

    @classmethod
    def of(cls, e: Entry, op: str, read: Read) -> _Side | None:
        """All terms of a family with the given op, in one pass; None where there are none."""
        terms = [t for _, t in e.terms if t.op == op]
        if not terms:
            return None
        n, count, width = e.size, e.copies.count, 0
        R, sketch = (torch.zeros(count, n, k, dtype=torch.float64) for k in (n, _SKETCH))
        generator = torch.Generator().manual_seed(0)
        for t in terms:
            each = read(t.place.parameter).shape.numel() // t.place.size * t.place.index.shape[1]
            each //= 1 if owners(e.copies, t.place) is None else count
            directions = torch.randn(each if count > 1 else 0, _SKETCH, generator=generator, dtype=torch.float64)
            seen = [0] * count
            for which, v in _vectors(e, t, read):
                R[which] = torch.linalg.qr(torch.cat([R[which], v], 1), mode="r").R
                if count > 1:
                    at = seen[which.start]
                    sketch[which] += v.transpose(1, 2) @ directions[at : at + v.shape[1]]
                    seen[which] = [at + v.shape[1]] * (which.stop - which.start)
            width += each
        return cls(terms, R, sketch, width)

    def matrices(self, e: Entry, read: Read, only: Sequence[int]) -> Tensor:
        """(c, width, n) factors of some copies."""
        found = []
        for t in self.terms:
            pieces: list[list[Tensor]] = [[] for _ in only]
            for which, v in _vectors(e, t, read, only):
                for c, x in zip(range(which.start, which.stop), v, strict=True):
                    pieces[c].append(x)
            found.append(torch.stack([torch.cat(p) for p in pieces]))
        return torch.cat(found, 1)


def linear_rows(families: Sequence[Entry], factors: Sequence[Entry], read: Read, judge: Judge | None, t: Thresholds) -> list[Row]:
    """Dead, duplicate, rank-deficient and unbalanced products of factors, and rank-deficient stacks of what rotates together.

    Args:
        families, factors: certified ones, and pairs read off the index spaces.
    """
    rows: list[Row] = []
    twins: dict[tuple[tuple[str, int], ...], list[_Heads]] = {}
    for k, e in enumerate([*families, *factors]):
        if e.algebra not in LINEAR or e.size < 2 or not _usable(e):
            continue
        if e.algebra != "gl":
            rows += _stack_rows(e, read, judge, t)
            continue
        first, second = (_Side.of(e, op, read) for op in ("mode", "dual"))
        if first is None or second is None:
            continue
        found, silent, size = _product_rows(e, first, second, judge, t)
        rows += found
        if e.copies.count > 1:
            leader, gap = _same_products(e, first, second, silent, size, read, t)
            twins.setdefault(e.copies.local, []).append(_Heads(e, leader, gap, e.size * (first.width + second.width)))
        if k < len(families) and all(x.gain is None for _, x in e.terms):
            grams = [s.R.transpose(1, 2) @ s.R for s in (first, second)]
            plus, minus = (g.diagonal(dim1=1, dim2=2).sum(1) for g in grams)
            spread = (grams[0] - grams[1]).norm() / (grams[0].norm() + grams[1].norm()).clamp(min=1e-300)
            rows += charge_rows(e, plus, minus, float(spread), t)
    for members in twins.values():
        rows += _twin_rows(members, judge)
    return rows


def _product_rows(e: Entry, first: _Side, second: _Side, judge: Judge | None, t: Thresholds) -> tuple[list[Row], list[int], Tensor]:
    """Singular values of A^T B for each copy (head): rows, copies that vanish, squared norms of all."""
    n, C = e.size, e.copies.count
    RA, RB, rank = first.R, second.R, min(n, first.width, second.width)
    S = torch.linalg.svdvals(RA @ RB.transpose(1, 2))[:, :rank]
    where, columns_of = common(e.parameters), first.width + second.width
    top = S[:, 0]
    size = top / top.median().clamp(min=1e-300) if C > 1 else torch.ones_like(top) * float(top[0] > 0)
    silent = (size <= t.head).nonzero().flatten().tolist() if bool((top > 0).any()) else list(range(C))
    rows = []
    what = f"product of {_pair(e)}, {f'{C} heads of width {n}' if C > 1 else f'inner width {n}'}"
    if silent:
        row = finding(
            "head",
            where,
            silent,
            C,
            size[silent].tolist(),
            len(silent) * n * columns_of,
            f"{what}: vanishes (below {t.head:g} of the median)",
            e.parameters,
        )
        X = torch.zeros(C, n, n, dtype=torch.float64)
        X[silent] = -torch.eye(n, dtype=torch.float64)
        rows.append(_moved(row, e, X, judge, "factor zeroed"))
    share = S / top[:, None].clamp(min=1e-300)
    low = share <= t.rank
    low[silent] = False
    short = low.any(1).nonzero().flatten().tolist()
    if short:
        p = share / share.sum(1, keepdim=True)
        effective = torch.special.entr(p).sum(1).exp()[short]
        note = f"{what}: {int(low.sum())} of {S.numel()} singular values below {t.rank:g} of the largest; effective rank "
        note += f"{float(effective.min()):.2f} to {float(effective.max()):.2f}"
        row = finding("rank", where, short, C, share[short].amin(1).tolist(), int(low.sum()) * columns_of, note, e.parameters)
        row |= {"count": int(low.sum()), "of": S.numel(), "effective_rank": effective.tolist()[:LISTED]}
        U, _, Vh = torch.linalg.svd(RA @ RB.transpose(1, 2))
        U, Vh = U[:, :, :rank], Vh[:, :rank]
        inverse = torch.where(low, 0.0, 1 / S.clamp(min=1e-300))
        X = RB.transpose(1, 2) @ Vh.transpose(1, 2) @ (inverse[:, :, None] * (U.transpose(1, 2) @ RA)) - torch.eye(n, dtype=torch.float64)
        X[[h for h in range(C) if h not in short]] = 0
        rows.append(_moved(row, e, X, judge, "projected on the rest"))
    return rows, silent, S.square().sum(1)


def _same_products(
    e: Entry, first: _Side, second: _Side, silent: Sequence[int], size: Tensor, read: Read, t: Thresholds
) -> tuple[list[int], list[float]]:
    """For each copy the earliest one with an equal product A^T B (itself if there is none), and the relative distance to it.

    The distance is that of :func:`parasym.measure.copies.nearest`, through inner products tr(A_i A_j^T B_j B_i^T).
    """
    C, tolerance = e.copies.count, max(t.duplicate, 1e-7)
    leader, gap = list(range(C)), [0.0] * C
    sketch = (first.sketch.transpose(1, 2) @ second.sketch).flatten(1) / _SKETCH
    apart = 2 * torch.cdist(sketch, sketch, compute_mode="donot_use_mm_for_euclid_dist").square()
    near = apart <= max(16 * tolerance**2, 1e-5) * (size[:, None] + size[None, :])
    near[silent], near[:, silent] = False, False
    batch = max(1, CHUNK // (e.size * (first.width + second.width)))
    for i in range(C):
        others = [j for j in range(i + 1, C) if leader[i] == i and leader[j] == j and near[i, j]]
        for at in range(0, len(others), batch):
            some = others[at : at + batch]
            A, B = (s.matrices(e, read, [i, *some]) for s in (first, second))
            inner = ((A[:1].transpose(1, 2) @ A) * (B[:1].transpose(1, 2) @ B)).sum((1, 2))[1:]
            total = size[i] + size[some]
            distance = (2 * (total - 2 * inner) / total.clamp(min=1e-300)).clamp(min=0).sqrt().tolist()
            for j, d in zip(some, distance, strict=True):
                if d <= tolerance:
                    leader[j], gap[j] = i, d
    return leader, gap


@dataclass(frozen=True)
class _Heads:
    """One product of each head: the earliest head where it is equal, the distance to that, parameters that one head owns."""

    entry: Entry
    leader: list[int]
    gap: list[float]
    lost: int


def _twin_rows(members: Sequence[_Heads], judge: Judge | None) -> list[Row]:
    """Heads equal in every product they have; merged by doubling one and dropping the other."""
    C = members[0].entry.copies.count
    alike: dict[tuple[int, ...], int] = {}
    first = [alike.setdefault(key, j) for j, key in enumerate(zip(*(m.leader for m in members), strict=True))]
    lead = {j: i for j, i in enumerate(first) if i != j and len(members) > 1}
    rows = []
    for m in members:
        others = [j for j in range(C) if m.leader[j] != j and j not in lead]
        if others:
            note = f"products of {_pair(m.entry)} equal those of an earlier head; their other products do not, or were not compared"
            gaps = [m.gap[j] for j in others]
            rows.append(finding("head", common(m.entry.parameters), others, C, gaps, 0, note, m.entry.parameters))
    if not lead:
        return rows
    others = sorted(lead)
    parameters = list(dict.fromkeys(p for m in members for p in m.entry.parameters))
    note = "heads equal in all their products; copies of " + ", ".join(f"head {h}" for h in sorted(set(lead.values())))
    gaps = [max(m.gap[j] for m in members) for j in others]
    row = finding("head", common(parameters), others, C, gaps, len(others) * sum(m.lost for m in members), note, parameters)
    trials = []
    for m in members:
        eye = torch.eye(m.entry.size, dtype=torch.float64)
        X = torch.zeros(C, m.entry.size, m.entry.size, dtype=torch.float64)
        for j in others:
            X[j] = -eye
            X[lead[j]] += eye
        trials.append(_moved(dict(row), m.entry, X, judge, "merged into one"))
    return [*rows, max(trials, key=lambda r: r["digits"] or -1.0)]


def _pair(e: Entry) -> str:
    """Short names of the modules that hold a pair of factors."""
    names = (p.rpartition(".")[0].rpartition(".")[2] or p for p in e.parameters if not p.endswith("bias"))
    return " and ".join(dict.fromkeys(names))


def _stack_rows(e: Entry, read: Read, judge: Judge | None, t: Thresholds) -> list[Row]:
    """Rank of everything that rotates together, stacked: directions that no writer fills and no reader sees."""
    n, terms = e.size, [x for _, x in e.terms]
    expected = n - 1 if e.algebra == "so1" else n  # the all-ones direction is no part of it
    bar = max(t.rank, 3e-8 * math.sqrt(n))
    if _full_rank(e, terms, read, expected, bar):
        return []
    gram, each = torch.zeros(e.copies.count, n, n, dtype=torch.float64), 0
    for x in terms:
        for which, v in _vectors(e, x, read):
            gram[which] += v.transpose(1, 2) @ v
            each += v.shape[1] if which.start == 0 else 0
    values, vectors = torch.linalg.eigh(_projected(gram, expected))
    share = (values.clamp(min=0) / values[:, -1:].clamp(min=1e-300)).sqrt()
    low = share <= bar
    low[:, : n - expected] = False
    short = low.any(1).nonzero().flatten().tolist()
    if not short:
        return []
    row = finding(
        "rank",
        common(e.parameters),
        short,
        e.copies.count,
        share[short][:, n - expected :].amin(1).tolist(),
        int(low.sum()) * each,
        f"stack of all that writes and reads a space of width {n}: {int(low.sum())} directions are empty",
        e.parameters,
    )
    row |= {"count": int(low.sum()), "of": expected * e.copies.count}
    X = -(vectors * low[:, None, :]) @ vectors.transpose(1, 2)
    return [_moved(row, replace(e, terms=tuple((1.0, replace(x, op="dual")) for _, x in e.terms)), X, judge, "projected on the rest")]


def _projected(gram: Tensor, expected: int) -> Tensor:
    """(c, n, n), without the all-ones direction where one direction fewer than n is expected."""
    n = gram.shape[1]
    P = torch.eye(n, dtype=torch.float64) - 1 / n
    return gram if expected == n else P @ gram @ P


def _full_rank(e: Entry, terms: Sequence[Term], read: Read, expected: int, bar: float) -> bool:
    """Whether a sketch already shows that the ``expected`` directions are all filled, which takes one pass and no products.

    The columns of a stack S are added up with random signs into more than n buckets, K = S Omega. Omega's columns are orthogonal and
    have at most ``load`` entries, so sigma_min(S) >= sigma_min(K) / sqrt(load); and sigma_max(S) is at most the Frobenius norm. That
    sigma_min(K) is large enough is what a Cholesky decomposition of the shifted K K^T finds out.
    """
    n, count = e.size, e.copies.count
    if n < _SMALL:
        return False
    buckets = n + n // 2
    K, frobenius, seen = torch.zeros(count, buckets, n, dtype=torch.float64), torch.zeros(count, dtype=torch.float64), [0] * count
    generator = torch.Generator().manual_seed(0)
    for x in terms:
        for which, v in _vectors(e, x, read):
            frobenius[which] += torch.linalg.vector_norm(v, dim=(1, 2)).square()
            sign = 2.0 * torch.randint(2, (v.shape[1], 1), generator=generator) - 1
            at, done = seen[which.start], 0
            while done < v.shape[1]:
                to = (at + done) % buckets
                take = min(buckets - to, v.shape[1] - done)
                K[which, to : to + take].addcmul_(v[:, done : done + take], sign[done : done + take])
                done += take
            seen[which] = [at + done] * (which.stop - which.start)
    gram = _projected(K.transpose(1, 2) @ K, expected)
    del K
    load = torch.tensor([-(-s // buckets) for s in seen], dtype=torch.float64)
    if expected < n:  # the direction left out passes
        gram += (frobenius * load / n)[:, None, None]
    gram.diagonal(dim1=1, dim2=2).sub_((load * bar**2 * frobenius)[:, None])
    return not bool(torch.linalg.cholesky_ex(gram).info.any())


def _moved(row: Row, e: Entry, X: Tensor, judge: Judge | None, what: str) -> Row:
    """Multiply the second factors by 1 + X and compare."""
    if judge is None:
        row["note"] += "; weights only, nothing was run"
        return row
    changed: dict[str, Tensor] = {}
    for _, t in e.terms:
        at = e.copies.columns(t.place)
        if t.op != "dual":
            continue
        if at is None and e.copies.count > 1:
            return row
        term = Term("mode", t.place, t.gain, -t.gain_power if t.gain is not None and row["kind"] != "rank" else t.gain_power)
        for name, step in tangent(term, judge.params, X, at).items():
            changed[name] = changed.get(name, judge.params[name]) + step
    return judged(row, judge.digits(changed), what)
