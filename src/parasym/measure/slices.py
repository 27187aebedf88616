"""Weights read a part at a time, so that a checkpoint never has to lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from parasym.symmetry.dictionary import Copies, Place

CHUNK = 1 << 21
"""Numbers handled at a time."""


class Rows(Protocol):
    """A tensor, or one that stays in its file until rows of it are asked for (:class:`parasym.core.checkpoint.Stored`)."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, index: slice | Tensor, /) -> Tensor: ...


Read = Callable[[str], Rows]
"""Name -> tensor, in any dtype."""


def parts(p: Rows, axis: int, index: Tensor, group: int = 1) -> Iterator[tuple[Tensor, slice, slice]]:
    """The entries of a tensor at some positions of an axis, a bounded number at a time.

    Args:
        p: the tensor.
        axis: which axis.
        index: (n, m) positions along it; the n of one column come together.
        group: columns come together in groups of so many.

    Yields:
        (r, n, c) entries in the dtype of ``p``, with r of the other axes flattened and c of the columns; which of them.
    """
    n, m = index.shape
    row = p.shape[1:].numel()
    if axis == 0:
        step = group * max(1, CHUNK // max(1, n * row * group))
        for at in range(0, m, step):
            held = p[_run(index[:, at : at + step])].reshape(n, -1, row)
            wide = max(1, CHUNK // max(1, n * held.shape[1]))
            for r in range(0, row, wide):
                yield held[:, :, r : r + wide].permute(2, 0, 1), slice(r, min(r + wide, row)), slice(at, at + held.shape[1])
        return
    inner, step, wanted = row // p.shape[axis], max(1, CHUNK // max(1, row)), _run(index)
    for at in range(0, p.shape[0], step):
        held = p[at : at + step].movedim(axis, -1)
        yield held[..., wanted].reshape(-1, n, m), slice(at * inner, (at + held.shape[0]) * inner), slice(0, m)


def owners(copies: Copies, place: Place) -> tuple[Tensor, Tensor] | None:
    """Which copy of an algebra each entry belongs to: entry (r, n, c) of :func:`parts` to copy down[r] + across[c].

    Returns:
        across (m,) and down (r,), or None where the place does not tell the copies apart (:meth:`Copies.columns`, without its matrix).
    """
    across, down, stride = torch.zeros(place.index.shape[1], dtype=torch.long), torch.zeros(1, dtype=torch.long), 1
    for name, size in reversed(copies.local):
        if name in place.outer:
            across = across + stride * place.outer[name]
        elif name in place.cross:
            down = down + stride * place.cross[name]
        else:
            return None
        stride *= size
    return across, down


def _run(index: Tensor) -> slice | Tensor:
    """Positions one after the other, as a slice where they follow each other: that copies nothing."""
    flat = index.reshape(-1)
    first = int(flat[0]) if len(flat) else 0
    return slice(first, first + len(flat)) if bool((flat == torch.arange(first, first + len(flat))).all()) else flat
