"""Curvature of the loss: extreme eigenpairs with a residual each, trace, spectral density, sharpness and the edge of stability.

Everything is built on products of `parasym.core.operators.HessianOperator` (or any `LinearOperator`), which names the way it
differentiates. Lanczos runs in torch, with full reorthogonalisation done twice, and stops by residual: a pair that has not reached
its tolerance is marked, and never looks like one that has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.operators import HessianOperator, LinearOperator
from parasym.core.results import Estimate, Status, plain
from parasym.measure.gradients import LossFn, Objective, batch_size, batches

Which = Literal["LM", "LA", "SA"]


def hessian(model: nn.Module, loss_fn: LossFn | None, loader: Any, *, dtype: torch.dtype | None = None) -> LinearOperator:
    """Hessian of the mean loss over one batch or over a loader, with respect to the trainable parameters.

    Args:
        model, loss_fn: see `parasym.measure.gradients.Objective`; in the mode the model is in.
        loader: one batch keeps its graph (a product costs about 2 gradients); several are visited at every product (3 gradients each).
        dtype: cast to, float64 for certificates.

    Raises:
        InputError, NonDeterministicError: see `HessianOperator`; active dropout makes two gradients differ.
    """
    objective = Objective(model, loss_fn, dtype=dtype)
    found = list(batches(loader))
    if len(found) == 1:
        return HessianOperator(objective, objective.params, found[0])
    return LoaderHessian(objective, found)


class LoaderHessian(LinearOperator):
    """Mean of the Hessians of several batches, weighted by their sizes; keeps no graph between products."""

    def __init__(self, objective: Objective, found: Sequence[Any]) -> None:
        sizes = [batch_size(b) for b in found]
        self._objective, self._found, self._weights = objective, found, [s / sum(sizes) for s in sizes]
        first = HessianOperator(objective, objective.params, found[0])
        super().__init__(first.shape, first._problem)
        self.backend, self.residual = first.backend, first.residual
        self.tried += first.tried

    @property
    def T(self) -> LinearOperator:
        """The Hessian is symmetric."""
        return self

    def _matmat(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for batch, weight in zip(self._found, self._weights, strict=True):
            op = HessianOperator(self._objective, self._objective.params, batch, backend=self.backend, check=False)  # type: ignore[arg-type]
            total += weight * (op @ x)
            self.counts.update(op.counts)
        return total

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matmat(y)


# --------------------------------------------------------------------------------------------------------------- eigenpairs


@dataclass(frozen=True, eq=False)
class Eigenpairs:
    """Eigenpairs of a symmetric operator, in the order asked for.

    Attributes:
        values: (k,) float64. vectors: (n, k), orthonormal columns, in the operator's dtype.
        residuals: (k,) |H v - lambda v|, absolute; an eigenvalue of H lies within this distance of each value, and for a value at a
            distance gap from the rest of the spectrum the error is below residual^2 / gap.
        converged: (k,) whether residual <= tol |lambda|, or is down at round-off.
        tol: the tolerance asked for. products: Hessian-vector products used. backend: how they were computed.
        status: ok when all converged, else not_converged.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    tol: float
    products: int
    backend: str
    status: Status
    note: str = ""
    assumptions: tuple[str, ...] = ("no eigenvalue more often repeated than the block is wide",)

    def estimate(self, index: int = 0) -> Estimate:
        """One eigenvalue as an `Estimate`."""
        fine = bool(self.converged[index])
        note = "" if fine else f"residual {float(self.residuals[index]):.1e} after {self.products} products"
        return Estimate(
            float(self.values[index]),
            residual=float(self.residuals[index]),
            status="ok" if fine else "not_converged",
            assumptions=self.assumptions,
            note=note,
            details={"products": self.products, "backend": self.backend},
        )

    def __repr__(self) -> str:
        flag = "" if self.status == "ok" else f", {int((~self.converged).sum())} of {len(self.values)} NOT CONVERGED"
        return f"Eigenpairs(top {float(self.values[0]):.6g}, k={len(self.values)}, {self.products} products{flag})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the vectors."""
        keys = ("values", "residuals", "converged", "tol", "products", "backend", "status", "note", "assumptions")
        return plain({k: getattr(self, k) for k in keys})  # type: ignore[no-any-return]


def eigenpairs(
    op: LinearOperator,
    k: int = 10,
    *,
    which: Which = "LM",
    tol: float = 1e-3,
    block: int = 1,
    basis: int | None = None,
    max_products: int | None = None,
    seed: int = 0,
    orthogonal_to: Tensor | None = None,
) -> Eigenpairs:
    """The k extreme eigenpairs of a symmetric operator, by (block) Lanczos with thick restarts.

    Args:
        op: symmetric, n x n.
        k: how many.
        which: "LM" largest magnitude, "LA" largest, "SA" smallest.
        tol: residual relative to |lambda| at which a pair counts as converged. The error of the value goes as its square.
        block: vectors pushed together; a repeated eigenvalue needs a block as wide as its multiplicity.
        basis: vectors kept before a restart (each of n numbers); default 4 k + 20.
        max_products: give up after this many; default 10 n, at most 20 (k + 10).
        seed: of the start.
        orthogonal_to: (n, r) orthonormal columns to stay away from (known null directions of a symmetry).

    Raises:
        InputError: k or the other numbers out of range.
    """
    n = op.shape[0]
    free = n - (0 if orthogonal_to is None else orthogonal_to.shape[1])
    if op.shape[0] != op.shape[1] or not 1 <= k <= free or block < 1 or not tol > 0 or which not in ("LM", "LA", "SA"):
        raise InputError(f"eigenpairs needs a square operator, 1 <= k <= {free}, block >= 1, tol > 0, which LM, LA, SA; got {k}, {which}.")
    block = min(block, free)
    room = min(free, max(basis or 4 * k + 20, k + 2 * block))
    allowed = max_products or min(10 * n, 20 * (k + 10) * block)
    lanczos = _Lanczos(op, room, block, seed, orthogonal_to)
    while True:
        lanczos.extend()
        values, S, residuals = lanczos.ritz()
        order = _order(values, which)[:k]
        limit = tol * values[order].abs()
        floor = 50 * torch.finfo(op.dtype).eps * float(values.abs().max())
        done = len(order) == k and bool((residuals[order] <= limit.clamp_min(floor)).all())
        if (done and lanczos.size >= min(free, k + block)) or lanczos.size >= free or lanczos.products >= allowed:
            break
        if lanczos.size + block > room:
            lanczos.restart(_order(values, which)[: min(room - block, k + max(block, (room - k) // 2))], values, S)
    order = _order(values, which)[:k]
    chosen, left = values[order], residuals[order] if lanczos.size < free else torch.full((len(order),), floor, dtype=torch.float64)
    vectors = lanczos.Q[: lanczos.size].T @ S[:, order].to(op.dtype)
    good = left <= (tol * chosen.abs()).clamp_min(floor)
    status: Status = "ok" if bool(good.all()) and len(order) == k else "not_converged"
    note = "" if status == "ok" else f"{int((~good).sum())} of {k} pairs did not reach a residual of {tol:g} |lambda|: allow more products"
    blocks = getattr(op, "backend_block", "")
    backend = op.backend + (f", blocks {blocks}" if blocks else "")
    return Eigenpairs(chosen, vectors, left.clamp_min(floor), good, tol, lanczos.products, backend, status, note)


def _order(values: Tensor, which: Which) -> Tensor:
    key = {"LM": -values.abs(), "LA": -values, "SA": values}[which]
    return torch.argsort(key, stable=True)


class _Lanczos:
    """A growing orthonormal basis (rows of Q) and the projection T = Q H Q^T, with what leaves the basis."""

    def __init__(self, op: LinearOperator, room: int, block: int, seed: int, away: Tensor | None) -> None:
        self.op, self.block, self.away = op, block, None if away is None else away.to(op.dtype).T
        self.generator = torch.Generator().manual_seed(seed)
        n = op.shape[0]
        self.Q = torch.empty(room + block, n, dtype=op.dtype, device=op.device)
        self.T = torch.zeros(room + block, room + block, dtype=torch.float64)
        self.R = torch.zeros(block, block, dtype=torch.float64)
        self.size, self.products = 0, 0
        self.width = block
        for i in range(block):
            self.Q[i] = self._fresh(i)

    def _fresh(self, filled: int) -> Tensor:
        """A random unit vector orthogonal to the first rows and to what is kept away."""
        while True:
            x = torch.randn(self.Q.shape[1], generator=self.generator, dtype=torch.float64).to(self.Q)
            x = x / x.norm()
            for _ in range(2):
                x = self._clean(x[None], filled)[0][0]
            if float(x.norm()) > 1e-3:
                return x / x.norm()

    def _clean(self, rows: Tensor, filled: int) -> tuple[Tensor, Tensor]:
        """Rows without their part in the basis, and that part (filled, b)."""
        if self.away is not None:
            rows = rows - (rows @ self.away.T) @ self.away
        basis = self.Q[:filled]
        part = basis @ rows.T
        return rows - part.T @ basis, part

    def extend(self) -> None:
        """One (block) product, orthogonalised twice."""
        j, b = self.size, self.width
        W = (self.op @ self.Q[j : j + b].T).T
        self.products += b
        W, first = self._clean(W, j + b)
        W, second = self._clean(W, j + b)
        part = (first.double() + second.double()).cpu()
        self.T[: j + b, j : j + b] = part
        self.T[j : j + b, : j + b] = part.T
        self.size = j + b
        room = self.Q.shape[1] - self.size - (0 if self.away is None else self.away.shape[0])
        self.width = min(b, max(room, 0), self.Q.shape[0] - self.size)
        scale = float(self.T[: self.size, : self.size].abs().max())
        self.R = torch.zeros(b, b, dtype=torch.float64)
        for i in range(b):  # Gram-Schmidt within the block, a dependent vector replaced by a fresh one
            w = W[i]
            for _ in range(2):
                for m in range(min(i, self.width)):
                    dot = float(self.Q[self.size + m] @ w)
                    self.R[m, i] += dot
                    w = w - dot * self.Q[self.size + m]
            size = float(w.norm())
            if i >= self.width:
                continue
            unit = w / size if size > 10 * torch.finfo(self.Q.dtype).eps * scale else torch.zeros_like(w)
            for _ in range(2 if size < 1e-2 * scale else 0):  # what much cancellation leaves is not orthogonal yet, or noise
                unit = self._clean(unit[None], self.size + i)[0][0]
            if float(unit.norm()) > 0.7:
                self.R[i, i] = size
                self.Q[self.size + i] = unit / unit.norm()
            else:
                self.Q[self.size + i] = self._fresh(self.size + i)
        self.T[self.size : self.size + b, self.size - b : self.size] = 0

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (m,), their coordinates (m, m), and residuals (m,)."""
        m = self.size
        T = self.T[:m, :m]
        values, S = torch.linalg.eigh(0.5 * (T + T.T))
        b = self.R.shape[1]
        return values, S, (self.R @ S[m - b : m]).norm(dim=0)

    def restart(self, keep: Tensor, values: Tensor, S: Tensor) -> None:
        """Keep these Ritz vectors and the block that comes next; T is diagonal on the former, and the next product fills the rest."""
        kept = S[:, keep].T.to(self.Q.dtype) @ self.Q[: self.size]
        coming = self.Q[self.size : self.size + self.width].clone()
        p = len(keep)
        self.Q[:p], self.Q[p : p + self.width] = kept, coming
        self.T.zero_()
        self.T[range(p), range(p)] = values[keep]
        self.size = p


# ---------------------------------------------------------------------------------------------------------- trace and density


def trace(
    op: LinearOperator, *, rtol: float = 0.05, probes: int = 256, block: int = 16, seed: int = 0, deflate: Eigenpairs | None = None
) -> Estimate:
    """Trace of a symmetric operator from random signs z: the mean of z.H z, until its standard error is below rtol |value|.

    Args:
        rtol: standard error to reach, relative. probes: at most so many products.
        block: probes pushed together.
        seed: of the probes.
        deflate: eigenpairs whose values are added exactly and whose directions are left out of the probes; lowers the variance.

    Returns:
        value with ``stderr``; exact when the operator has no more rows than probes; ``not_converged`` when rtol was not reached.
    """
    n = op.shape[0]
    if probes < 2 or not rtol > 0:
        raise InputError(f"trace needs at least 2 probes and rtol > 0, got {probes} and {rtol}.")
    if n <= probes:
        exact = float((op @ torch.eye(n, dtype=op.dtype, device=op.device)).diagonal().double().sum())
        return Estimate(exact, residual=0.0, details={"products": n, "backend": op.backend}, note="exact: all unit vectors")
    V = deflate.vectors if deflate is not None else None
    base = float(deflate.values.sum()) if deflate is not None else 0.0
    generator = torch.Generator().manual_seed(seed)
    seen: list[float] = []
    value, error = math.nan, math.inf
    while len(seen) < probes:
        width = min(block, probes - len(seen))
        Z = (torch.randint(2, (n, width), generator=generator) * 2 - 1).to(op.device, op.dtype)
        if V is not None:
            Z = Z - V @ (V.T @ Z)
        Y = op @ Z
        if V is not None:
            Y = Y - V @ (V.T @ Y)
        seen += (Z.double() * Y.double()).sum(0).tolist()
        sample = torch.tensor(seen, dtype=torch.float64)
        value, error = base + float(sample.mean()), float(sample.std() / len(seen) ** 0.5) if len(seen) > 1 else math.inf
        if len(seen) >= 4 and error <= rtol * abs(value):
            break
    status: Status = "ok" if error <= rtol * abs(value) else "not_converged"
    note = "" if status == "ok" else f"standard error {error / max(abs(value), 1e-300):.0%} of the value after {len(seen)} probes"
    return Estimate(value, stderr=error, status=status, note=note, details={"products": len(seen), "backend": op.backend})


@dataclass(frozen=True, eq=False)
class Density:
    """Spectral density of a symmetric operator by stochastic Lanczos quadrature.

    Attributes:
        nodes, weights: (probes, steps) Ritz values and their weights: (1/n) tr f(H) is the mean over probes of sum weights f(nodes).
        grid, density: the sum smoothed by Gaussians of width ``width``; integrates to 1.
        width: of the kernel. products: used.
    """

    nodes: Tensor
    weights: Tensor
    grid: Tensor
    density: Tensor
    width: float
    products: int

    def mean(self, f: Any) -> Estimate:
        """(1/n) tr f(H) with its standard error over probes."""
        each = (self.weights * f(self.nodes)).sum(1)
        stderr = float(each.std() / len(each) ** 0.5) if len(each) > 1 else None
        return Estimate(float(each.mean()), stderr=stderr, details={"products": self.products})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"grid": plain(self.grid), "density": plain(self.density), "width": self.width, "products": self.products}


def density(
    op: LinearOperator, *, steps: int = 40, probes: int = 8, points: int = 256, width: float | None = None, seed: int = 0
) -> Density:
    """Spectral density: ``probes`` Lanczos runs of ``steps`` products each.

    Args:
        points: of the grid. width: of the smoothing kernel, in units of the eigenvalues; default 1/50 of the range.
    """
    n = op.shape[0]
    steps = min(steps, n)
    if steps < 1 or probes < 1:
        raise InputError(f"density needs positive steps and probes, got {steps} and {probes}.")
    nodes, weights = [], []
    for i in range(probes):
        run = _Lanczos(op, steps, 1, seed + i, None)
        while run.size < steps:
            run.extend()
        values, S, _ = run.ritz()
        nodes.append(values)
        weights.append(S[0].square())
    N, W = torch.stack(nodes), torch.stack(weights)
    span = float(N.max() - N.min()) or 1.0
    sigma = width or span / 50
    grid = torch.linspace(float(N.min()) - 4 * sigma, float(N.max()) + 4 * sigma, points, dtype=torch.float64)
    kernel = torch.exp(-0.5 * ((grid[:, None] - N.reshape(-1)) / sigma).square()) / (sigma * math.sqrt(2 * math.pi))
    return Density(N, W, grid, kernel @ W.reshape(-1) / probes, sigma, probes * steps)


# ------------------------------------------------------------------------------------------------ sharpness, edge of stability


@dataclass(frozen=True)
class Stability:
    """Sharpness beside the largest that the optimiser's step tolerates on a quadratic.

    Attributes:
        sharpness: largest eigenvalue, of P^-1/2 H P^-1/2 for a diagonal preconditioner P, of H + decay for coupled decay.
        limit: 2 / eta for gradient descent, times (1 + mu) with heavy-ball momentum.
        ratio: sharpness / limit; the edge of stability is at 1.
        status: of the eigenvalue.
    """

    sharpness: Estimate
    limit: float
    ratio: float
    rule: str
    status: Status

    @property
    def stable(self) -> bool:
        """Whether a quadratic of this curvature would converge."""
        return self.ratio < 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "sharpness": self.sharpness.to_dict(),
            **plain({k: getattr(self, k) for k in ("limit", "ratio", "rule", "status", "stable")}),
        }


def sharpness(op: LinearOperator, *, tol: float = 1e-3, seed: int = 0) -> Estimate:
    """Largest eigenvalue, with its residual."""
    return eigenpairs(op, 1, which="LA", tol=tol, seed=seed).estimate()


def stability(op: LinearOperator, optimizer: torch.optim.Optimizer, model: nn.Module | None = None, *, tol: float = 1e-3) -> Stability:
    """Where a run stands relative to the edge of stability.

    Args:
        op: Hessian of the training loss, over the model's trainable parameters.
        optimizer: SGD (momentum, Nesterov, coupled decay), or Adam, AdamW, RMSprop with its present second moments.
        model: for the names of the parameters, needed by a preconditioned rule.

    Raises:
        InputError: several learning rates, an unknown rule, or second moments that do not exist yet.
    """
    groups = optimizer.param_groups
    if any(g["lr"] != groups[0]["lr"] for g in groups):
        raise InputError("The edge of stability needs one learning rate; the groups have several.")
    g, rule = groups[0], type(optimizer).__name__
    eta = float(g["lr"])
    if rule == "SGD":
        mu = float(g["momentum"])
        step = eta * (1 - float(g["dampening"])) if mu else eta
        limit = 2 * (1 + mu) / (step * (1 + 2 * mu if g["nesterov"] else 1))
        top, shift = sharpness(op, tol=tol), float(g["weight_decay"])
    elif rule in ("Adam", "AdamW", "RMSprop"):
        if model is None:
            raise InputError(f"Give the model: the preconditioner of {rule} is read by parameter name.")
        top, shift = sharpness(_Preconditioned(op, _root(optimizer, model, op)), tol=tol), 0.0
        beta = float(g["betas"][0]) if "betas" in g else 0.0
        limit = 2 * (1 + beta) / ((1 - beta) * eta)
    else:
        raise InputError(f"No stability limit is known for {rule}: SGD, Adam, AdamW and RMSprop have one.")
    value = top.value + shift if isinstance(top.value, float) else math.nan
    return Stability(top, limit, value / limit, rule, top.status)


def _root(optimizer: torch.optim.Optimizer, model: nn.Module, op: LinearOperator) -> Tensor:
    """(n,) 1 / sqrt of the diagonal preconditioner."""
    live, g = dict(model.named_parameters()), optimizer.param_groups[0]
    parts = {}
    for name in op.layout.names:
        state = optimizer.state.get(live[name], {})
        second = state.get("exp_avg_sq", state.get("square_avg"))
        if second is None:
            raise InputError(f"The optimiser has no second moment of {name} yet: take a step first.")
        if "betas" in g:
            second = second / (1 - float(g["betas"][1]) ** float(state["step"]))
        parts[name] = second.sqrt() + float(g["eps"])
    return op.layout.flatten(parts).rsqrt().to(op.dtype)


class _Preconditioned(LinearOperator):
    """D H D for a positive diagonal D."""

    def __init__(self, op: LinearOperator, d: Tensor) -> None:
        self._op, self._d = op, d[:, None]
        self.shape, self.layout, self.dtype, self.device = op.shape, op.layout, op.dtype, op.device
        self.backend, self.tried, self.counts, self.residual = op.backend, op.tried, op.counts, op.residual

    def _matmat(self, x: Tensor) -> Tensor:
        return self._d * (self._op @ (self._d * x))

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matmat(y)


def dense_eigenvalues(op: LinearOperator) -> np.ndarray:
    """All eigenvalues, ascending, from the dense matrix: for tests and tiny models."""
    M = op.dense().double()
    return torch.linalg.eigvalsh(0.5 * (M + M.T)).numpy()  # type: ignore[no-any-return]
