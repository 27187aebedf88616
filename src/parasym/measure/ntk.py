"""The neural tangent kernel at a point: K = J J^T over the outputs of some samples, its spectrum, and how far it moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import jacrev, vmap

from parasym.core.errors import InputError
from parasym.core.functional import functional
from parasym.core.guards import math_attention, no_checkpointing, preserve, rng_state
from parasym.core.results import Estimate, plain
from parasym.measure.gradients import batch_size, refuse_coupled_model

_LIMIT = 20_000  # rows of the kernel


@dataclass(frozen=True, eq=False)
class Kernel:
    """The tangent kernel of n samples.

    Attributes:
        matrix: (n c, n c) for all outputs, sample-major, or (n, n) when the outputs are averaged; float64.
        outputs: (n, c) at the point, float64. averaged: over the outputs.
        parts: parameter -> trace of its share.
    """

    matrix: Tensor
    outputs: Tensor
    averaged: bool
    parts: Mapping[str, float]

    def eigenvalues(self) -> Tensor:
        """Descending; negative round-off cut at zero."""
        return torch.linalg.eigvalsh(self.matrix).flip(0).clamp_min(0)

    def effective_rank(self) -> float:
        """(tr K)^2 / tr K^2."""
        return float(self.matrix.trace().square() / self.matrix.square().sum())

    def alignment(self, targets: Tensor) -> Estimate:
        """Centred cosine between K and the Gram matrix of the targets (n, c) or labels (n,): 1 when the kernel is that of the task."""
        if targets.ndim == 1:
            targets = nn.functional.one_hot(targets, int(targets.max()) + 1)
        n = targets.shape[0]
        K = self.matrix if self.averaged else self.matrix.reshape(n, -1, n, self.matrix.shape[0] // n).diagonal(dim1=1, dim2=3).mean(-1)
        if K.shape[0] != n:
            raise InputError(f"The kernel has {K.shape[0]} samples, the targets {n}.")
        Y = targets.double()
        H = torch.eye(n, dtype=torch.float64) - 1 / n
        A, B = H @ K @ H, H @ Y @ Y.T @ H
        size = float(A.norm() * B.norm())
        return (
            Estimate(float((A * B).sum()) / size)
            if size > 0
            else Estimate(None, status="not_applicable", note="a constant kernel or target")
        )

    def distance(self, other: Kernel) -> float:
        """1 - <K, K'> / |K| |K'|: 0 for a kernel that did not turn (lazy training)."""
        if self.matrix.shape != other.matrix.shape:
            raise InputError(f"Kernels of shapes {tuple(self.matrix.shape)} and {tuple(other.matrix.shape)} cannot be compared.")
        return 1 - float((self.matrix * other.matrix).sum() / (self.matrix.norm() * other.matrix.norm()))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the matrix."""
        return plain(  # type: ignore[no-any-return]
            {"samples": len(self.outputs), "averaged": self.averaged, "eigenvalues": self.eigenvalues()[:20],
             "effective_rank": self.effective_rank(), "parts": self.parts}
        )  # fmt: skip


def kernel(model: nn.Module, inputs: Any, *, averaged: bool = False, parameters: Sequence[str] | None = None, chunk: int = 16) -> Kernel:
    """The tangent kernel of a model on a batch of inputs.

    Args:
        model: any module whose first floating output has the samples first; in the mode it is in, never changed.
        inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        averaged: sum over outputs of J_c J_c^T / c instead of the whole kernel.
        parameters: names to differentiate; all trainable ones if not given.
        chunk: samples whose Jacobians are computed together.

    Memory: the Jacobian, samples x outputs x parameters numbers.

    Raises:
        InputError: batch norm in train mode, unknown names, or a kernel of more than 20,000 rows.
    """
    refuse_coupled_model(model)
    f = functional(model)
    names = list(parameters) if parameters is not None else [n for n in f.params if n not in f.frozen]
    unknown = [n for n in names if n not in f.params]
    if unknown or not names:
        raise InputError(f"There is no trainable parameter {unknown[0]!r}." if unknown else "Every parameter is frozen.")
    point = {n: f.params[n].detach() for n in names}
    args = inputs if isinstance(inputs, tuple | dict) else (inputs,)
    n = batch_size(args)
    leaves, spec = pytree.tree_flatten(args)
    axes = [0 if isinstance(t, Tensor) and t.ndim else None for t in leaves]

    def one(p: Mapping[str, Tensor], *parts: Any) -> tuple[Tensor, Tensor]:
        single = pytree.tree_unflatten([t if a is None else t[None] for t, a in zip(parts, axes, strict=True)], spec)
        out = f(p, *(((), single) if isinstance(single, dict) else (single, {})))[0].reshape(-1)
        return out, out

    rows: dict[str, list[Tensor]] = {k: [] for k in names}
    outputs: list[Tensor] = []
    with torch.enable_grad(), rng_state(), math_attention(), no_checkpointing(), preserve(f.model):
        jacobian = vmap(jacrev(one, has_aux=True), in_dims=(None, *axes), randomness="different")
        for start in range(0, n, chunk):
            part = [t if a is None else t[start : start + chunk] for t, a in zip(leaves, axes, strict=True)]
            J, out = jacobian(point, *part)
            if out.shape[1] * n > _LIMIT and not averaged:
                raise InputError(f"{n} samples with {out.shape[1]} outputs make a kernel of {n * out.shape[1]} rows: use averaged=True.")
            outputs.append(out.detach().double())
            for k in names:
                rows[k].append(J[k].detach().double().flatten(2))
    total = torch.zeros((n, n) if averaged else (n * outputs[0].shape[1],) * 2, dtype=torch.float64)
    shares: dict[str, float] = {}
    for k in names:
        J = torch.cat(rows.pop(k))
        K = torch.einsum("acp,bcp->ab", J, J) / J.shape[1] if averaged else (lambda M: M @ M.T)(J.reshape(-1, J.shape[-1]))
        shares[k] = float(K.trace())
        total += K.cpu()
    return Kernel(total, torch.cat(outputs), averaged, shares)
