"""Gradient noise of a run from the gradients it computes anyway: of two successive steps, and of the micro-batches of one step.

Two gradients a, b of independent batches at (nearly) the same weights have E|a - b|^2 / 2 = tr Sigma_B and E<a, b> = |grad L|^2, where
Sigma_B is the covariance of a batch's gradient. With k micro-batches in a step, the first one and the whole give the same two numbers
without a second step. Single pairs are noisy, so sums over observations are kept; their spread gives the standard error.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from parasym.watch.record import Row

_KEPT = 64  # pairs averaged over


class PairNoise:
    """Noise between the gradients of two successive steps.

    The change of the true gradient in one step counts as noise too; it is second order in the learning rate. Where gradients are
    clipped, the noise is that of the clipped ones.

    Args:
        total: list of per-parameter sums -> one number (adds up over shards).
    """

    def __init__(self, total: Callable[[Sequence[Tensor]], float]) -> None:
        self._total = total
        self._first: dict[int, Tensor] = {}
        self.pairs: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def keep(self, params: Sequence[Tensor], unit: float = 1.0) -> None:
        """Copy the gradients of the first step of a pair, times ``unit``."""
        self._first = {i: p.grad.detach() * unit for i, p in enumerate(params) if p.grad is not None and not p.grad.is_sparse}

    @property
    def waiting(self) -> bool:
        """Whether the second step of a pair is due."""
        return bool(self._first)

    def drop(self) -> None:
        """Forget the first gradient."""
        self._first = {}

    def compare(self, params: Sequence[Tensor], unit: float = 1.0) -> list[Row]:
        """Take the second step's gradients, times ``unit``; returns the averages so far."""
        both = [(g, p.grad.detach()) for i, p in enumerate(params) if (g := self._first.get(i)) is not None and p.grad is not None]
        self._first = {}
        if not both:
            return []
        with torch.no_grad():
            gap = self._total([(a - b * unit).double().square().sum() for a, b in both])
            dot = unit * self._total([(a * b).double().sum() for a, b in both])
        if not (math.isfinite(gap) and math.isfinite(dot)):
            return []
        self.pairs.append((gap / 2, dot))
        return rows(self.pairs, "batches", "pairs of successive steps")

    def state(self) -> list[tuple[float, float]]:
        """The pairs averaged over."""
        return list(self.pairs)


class MicroNoise:
    """Noise between the micro-batches of one accumulated step, from hooks on the gradients' accumulation while they are armed.

    Needs backward passes that accumulate into ``.grad`` at full size: a plain loop, with or without loss scaling; not sharded gradients.

    Args:
        timed: a context around what the hooks do.
    """

    def __init__(self, timed: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._timed = timed
        self._handles: list[Any] = []
        self._first: dict[int, Tensor] = {}
        self._last: dict[int, Tensor] = {}
        self._count: dict[int, int] = {}
        self._version: dict[int, int] = {}  # of the gradient: accumulating adds one to it
        self.pairs: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def arm(self, params: Sequence[Tensor]) -> None:
        """Listen to the next step's backward passes."""
        self.disarm()
        self._first, self._last, self._count, self._version = {}, {}, {}, {}
        for i, p in enumerate(params):
            if p.requires_grad and p.is_leaf:
                self._handles.append(p.register_post_accumulate_grad_hook(self._listener(i)))

    def _listener(self, i: int) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def listen(p: Tensor) -> None:
            if p.grad is None or p.grad.is_sparse:
                return
            try:
                with self._timed():
                    square = p.grad.double().square().sum()
                    version = p.grad._version
            except Exception:  # no error of ours may end a backward pass; the counts no longer agree, so nothing is reported
                self._count[i] = -1
                return
            count = self._count.get(i, 0)
            if count > 0 and version != self._version[i] + 1:
                count = 0  # the gradient was reset or replaced since: what came before belongs to no step of this optimiser
            if count == 0:
                self._first[i] = square
            self._last[i], self._version[i], self._count[i] = square, version, count + 1

        return listen

    @property
    def armed(self) -> bool:
        """Whether it listens."""
        return bool(self._handles)

    def disarm(self) -> None:
        """Stop listening."""
        for h in self._handles:
            h.remove()
        self._handles = []

    def read(self, square: float) -> list[Row]:
        """What the armed step showed; nothing where it had one backward pass only.

        Args:
            square: |g|^2 of the gradient the optimiser is about to use: it fixes the scale (loss scaling, clipping).
        """
        self.disarm()
        counts = set(self._count.values())
        if len(counts) != 1 or (k := counts.pop()) < 2:
            self._first, self._last = {}, {}
            return []
        one, whole = (float(torch.stack([t.cpu() for t in d.values()]).sum()) for d in (self._first, self._last))
        self._first, self._last = {}, {}
        if not (math.isfinite(one) and math.isfinite(whole) and math.isfinite(square) and whole > 0):
            return []
        # |first|^2 = c^2 (G + s) and |sum of k|^2 = c^2 (k^2 G + k s) on average; the step uses the mean, of square G + s / k
        unit = k * k * square / whole
        self.pairs.append((unit * (k * k * one - whole) / (k * k - k), unit * (whole - k * one) / (k * k - k)))
        return rows(self.pairs, "micro-batches", f"the {k} micro-batches of a step, their gradients averaged")

    def state(self) -> list[tuple[float, float]]:
        """The pairs averaged over."""
        return list(self.pairs)


def rows(pairs: Sequence[tuple[float, float]], unit: str, source: str) -> list[Row]:
    """tr Sigma and the noise scale tr Sigma / |grad L|^2, in units of the batches they were measured on."""
    sample = torch.tensor(list(pairs), dtype=torch.float64)
    n = len(sample)
    trace, mean = sample.mean(0).tolist()
    spread = (sample.std(0) / math.sqrt(n)).tolist() if n > 1 else [math.nan, math.nan]
    note = f"from {source}, {n} of them"
    out = [
        Row(f"trace of the gradient covariance ({unit})", "", "noise", trace, stderr=spread[0] if n > 1 else None, note=note),
    ]
    if n > 1 and mean > 2 * spread[1]:
        scale = trace / mean
        error = scale * math.hypot(spread[0] / max(trace, 1e-300), spread[1] / mean)
        out.append(Row(f"gradient noise scale ({unit})", "", "noise", scale, stderr=error, note=note))
    else:
        why = "one pair has no spread" if n < 2 else "the mean gradient is smaller than the error of its estimate"
        out.append(Row(f"gradient noise scale ({unit})", "", "noise", math.nan, status="not_converged", note=f"{note}; {why}"))
    return out


def restore(into: deque[tuple[float, float]], pairs: Sequence[Sequence[float]]) -> None:
    """Go on with the pairs of another process."""
    into.extend((float(a), float(b)) for a, b in pairs)


__all__ = ["MicroNoise", "PairNoise", "restore", "rows"]
