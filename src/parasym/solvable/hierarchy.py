"""Two-layer linear networks from a small start: one mode after the other, each a symmetry broken.

f = B A x with whitened inputs and target modes s_1 > s_2 > ..., loss |B A - T|_F^2 / 2, gradient flow of time t = eta * step. Near zero
the network is symmetric under O(k) of its hidden units; a mode that has grown takes a direction away, and O(k - r) is left.

Source: parameter-symmetry-unifies R1, R2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parasym.core.errors import InputError


def overlaps(inner: Tensor, outer: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Start a_i of each mode: |h_i less its part in span(h_1..h_{i-1})|^2, h_i = (B0^T u_i + A0 v_i) / 2.

    The faster modes have taken their hidden directions by the time mode i grows: without that projection the half times are off by up
    to 13 % (R1).

    Args:
        inner: A0 (k, inputs); outer: B0 (outputs, k).
        left: u_i as columns (outputs, modes), in the order of decreasing s; right: v_i as columns (inputs, modes).

    Returns:
        (modes,).
    """
    h = 0.5 * (outer.T @ left + inner @ right)
    if h.shape[1] > h.shape[0]:
        raise InputError(f"{h.shape[1]} modes need as many hidden units, there are {h.shape[0]}.")
    r = torch.linalg.qr(h).R
    return r.diagonal().square()


def mode(time: Tensor, s: Tensor, start: Tensor) -> Tensor:
    """a(t) = s e^{2 s t} / (e^{2 s t} - 1 + s / a0) for each mode, broadcast."""
    grown = torch.expm1(2 * s * time)
    return s * (grown + 1) / (grown + s / start)


def half_times(s: Tensor, start: Tensor) -> Tensor:
    """ln(s / a0 - 1) / (2 s): when each mode has reached s / 2."""
    return torch.log(s / start - 1) / (2 * s)


def plateau_losses(s: Tensor) -> Tensor:
    """Loss of the plateaus with r = 0, 1, ... modes learned: sum_{j > r} s_j^2 / 2, (modes + 1,)."""
    tail = torch.cat([s.square().flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=s.dtype)])
    return 0.5 * tail


def modes_under_decay(s: Tensor, decay: float) -> Tensor:
    """Singular values that decay (decay / 2)(|A|^2 + |B|^2) leaves: (s - decay)_+; the rank is how many are positive (R2)."""
    return (s - decay).clamp_min(0)
