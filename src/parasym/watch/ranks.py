"""What the ranks of a sharded run do at the same moment, so that none is left waiting for another.

Shards are gathered in *sections*, which every rank enters at the same step. Before each gather, and at the end, the ranks exchange a few
numbers: whether all are well, and where in the section each of them is. A rank that fails says so in the exchange the others come to next,
whichever it is, and they fail there, too; ranks that are about to gather different tensors all fail before they do. So a section ends on
all ranks alike, with its work done or with an error, and no rank waits in a gather that another one will not join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from parasym.core.errors import ParasymError
from parasym.watch.finding import is_sharded

_END, _VOTE = 0, -1  # places in a section beside the number of the gather


class OtherRankError(ParasymError):
    """Another rank failed, or is elsewhere in its work."""


class Ranks:
    """Gathers of one run.

    Args:
        sharded: whether there is anything to gather; without it nothing is exchanged.
        device: where the numbers are exchanged.
    """

    def __init__(self, sharded: bool, device: torch.device) -> None:
        self.sharded, self.device = sharded, device
        self._inside = self._left = False  # a section is open; the others were told of a failure, or told of one
        self._gathers = 0

    @contextmanager
    def section(self) -> Iterator[None]:
        """Around work in which shards are gathered; to be entered by all ranks at the same step, and not within another one.

        Raises:
            OtherRankError: the work failed on another rank.
        """
        if not self.sharded:
            yield
            return
        self._inside, self._left, self._gathers = True, False, 0
        try:
            yield
            self._exchange(_END)
        except BaseException:
            if not self._left:
                self._left = True
                self._meet(1, _END, 0)
            raise
        finally:
            self._inside = False

    def everywhere(self, good: bool) -> bool:
        """Whether something holds on all ranks."""
        return good if not self.sharded else self._exchange(_VOTE, int(not good)) == 0

    def whole(self, t: Tensor) -> Tensor:
        """A tensor, gathered where it is sharded.

        Raises:
            OtherRankError: another rank will not gather it.
        """
        return self.gather([t])[0]

    def gather(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Several tensors after one exchange; the other arguments as in `whole`."""
        shards = [t for t in tensors if is_sharded(t)]
        if not shards or not self.sharded:
            return [_full(t) if is_sharded(t) else t for t in tensors]
        if not self._inside:
            raise OtherRankError("shards are gathered in a section alone: a rank that fails outside of it could not tell the others")
        for size in {(t.numel(), t.dtype, t.device) for t in shards}:  # memory that is not there is to be missed before the others gather
            torch.empty(2 * size[0], dtype=size[1], device=size[2])
        self._gathers += 1
        self._exchange(self._gathers, sum(t.numel() for t in shards))
        return [_full(t) if is_sharded(t) else t for t in tensors]

    def _exchange(self, at: int, value: int = 0) -> int:
        """Tell the others where this rank is; returns the largest value (of a gather they must be the same)."""
        if self._left:
            raise OtherRankError("another rank failed")  # told before, by an error that was caught
        failed, high, low, most, least = self._meet(0, at, value)
        if failed or high != -low or (at > 0 and most != -least):
            self._left = True
            raise OtherRankError("another rank failed" if failed else "the ranks are not at the same place of their work")
        return most

    def _meet(self, failed: int, at: int, value: int) -> list[int]:
        numbers = torch.tensor([failed, at, -at, value, -value], dtype=torch.int64, device=self.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers.tolist()


def _full(t: Tensor) -> Tensor:
    full: Callable[[], Tensor] = t.full_tensor  # type: ignore[attr-defined]
    return full()
