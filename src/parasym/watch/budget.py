"""When to measure what, so that watching stays within a share of the run's own time.

Every measurement has a share of the budget. Its allowance grows with each step by that share of the step's time (a median, so that
evaluations and checkpoints between steps do not count), and each measurement spends what it was seen to cost. It is due again
when the allowance covers the next one. A measurement that was never made is expected to cost a stated number of steps, so that a
dear one does not fall on a short run unpaid; for the first quarter of its wait it lends its share to the others, because the run may end
before.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

NEVER = 2**62


@dataclass
class Meter:
    """What is known of one measurement's cost.

    Attributes:
        share: of the budget, before it is divided among those that are active.
        every: smallest number of steps between two.
        prior: what the first one is expected to cost, in steps.
        next: the step it is due at. last: the step it was last made at. seen: the step its allowance was last raised at.
        active: whether it can be made at all; ``why`` says why not.
    """

    share: float
    every: int = 1
    prior: float = 0.0
    next: int = 1
    last: int = 0
    seen: int = 0
    allowance: float = 0.0
    spent: float = 0.0
    current: float = 0.0
    times: int = 0
    active: bool = True
    why: str = ""
    costs: deque[float] = field(default_factory=lambda: deque(maxlen=5))

    def after(self, step: int) -> int:
        """The first step from this one on that ``every`` allows."""
        return self.every * math.ceil(step / self.every) if self.times else step

    def cost(self, step_time: float) -> float:
        """Seconds the next one is expected to take."""
        return statistics.median_low(self.costs) if self.costs else self.prior * step_time


class Budget:
    """Times steps and measurements, and says which step each measurement is due at.

    Args:
        share: of the run's time that watching may take; None: no limit, everything at its ``every``.
        meters: name -> `Meter`.

    Attributes:
        hooks: seconds spent in hooks, measurements included, one-off work (`once`) not. steps: seconds of the run without them.
        once: name -> seconds of one-off work, which is reported and not charged to the budget.
    """

    def __init__(self, share: float | None, meters: Mapping[str, Meter]) -> None:
        self.share, self.meters = share, dict(meters)
        self.hooks, self.steps, self.light, self.start = 0.0, 0.0, 0.0, 0
        self.once: dict[str, float] = {}
        self._durations: deque[float] = deque(maxlen=65)
        self._left: float | None = None  # when the last hook was left
        self._inside = 0.0  # spent in hooks since the last step ended
        self._once_inside = 0.0

    # -- clocks ------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def hook(self, ends_step: bool = False) -> Iterator[None]:
        """Around a hook; ``ends_step``: the one that closes a step."""
        start = perf_counter()
        held = self._once_inside
        measured = sum(m.spent for m in self.meters.values())
        try:
            yield
        finally:
            now = perf_counter()
            own = now - start
            charged = own - (self._once_inside - held)
            self.hooks += charged
            self.light += max(0.0, charged - (sum(m.spent for m in self.meters.values()) - measured))
            self._inside += own
            if ends_step:
                if self._left is not None:
                    duration = max(now - self._left - self._inside, 0.0)
                    self._durations.append(duration)
                    self.steps += duration
                self._left, self._inside, self._once_inside = now, 0.0, 0.0

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Around (a part of) one measurement."""
        start, held = perf_counter(), self._once_inside
        try:
            yield
        finally:
            took = perf_counter() - start - (self._once_inside - held)
            self.meters[name].spent += took
            self.meters[name].current += took

    @contextmanager
    def setting_up(self, name: str) -> Iterator[None]:
        """Around work that is done once."""
        start = perf_counter()
        try:
            yield
        finally:
            took = perf_counter() - start
            self.once[name] = self.once.get(name, 0.0) + took
            self._once_inside += took

    @property
    def step_time(self) -> float:
        """Seconds of one step of the run by itself; 0 before the second step."""
        return statistics.median(self._durations) if self._durations else 0.0

    @property
    def overhead(self) -> float:
        """Share of the run's own time spent in hooks so far, one-off work left out."""
        return self.hooks / self.steps if self.steps else 0.0

    # -- planning ----------------------------------------------------------------------------------------------------------------

    def finished(self, name: str, step: int) -> None:
        """A measurement was made in full at this step."""
        m = self.meters[name]
        if not m.times and not m.prior:  # the first of them fills caches and opens the books: set-up, not what one costs
            self.once[f"first {name}"] = m.current
            self.hooks -= m.current
        else:
            m.costs.append(m.current)
            m.allowance -= m.current
        m.current = 0.0
        m.last, m.times = step, m.times + 1

    def covered(self, name: str, step: int) -> None:
        """A measurement was made at this step as part of another one."""
        self.meters[name].last, self.meters[name].times = step, self.meters[name].times + 1

    def plan(self, step: int, names: Sequence[str] | None = None) -> None:
        """Say for each measurement (or for ``names``) when it is due next, from what is known at this step."""
        time = self.step_time
        rates = self._rates(step, time) if self.share is not None and time > 0 else {}
        for name, m in self.meters.items():
            if names is not None and name not in names:
                continue
            if not m.active:
                m.next = NEVER
            elif self.share is None:
                m.next = m.next if m.next > step else m.after(step + 1)
            elif time == 0:  # one step more, and its time is known
                m.next = step + (2 if m.prior else 1)
            else:
                cost, rate = m.cost(time), rates[name]
                m.allowance = min(m.allowance + (step - m.seen) * rate, 2 * cost)
                m.seen = step
                m.next = m.after(step + max(1, math.ceil((cost - m.allowance) / rate)))

    def _rates(self, step: int, time: float) -> dict[str, float]:
        """Seconds each measurement is allowed per step: its share of the budget, and of what others cannot use at their ``every``."""
        assert self.share is not None
        left = max(self.share * time - self.light / max(step - self.start, 1), 0.05 * self.share * time)
        active = {n: m for n, m in self.meters.items() if m.active}
        part = left / max(sum(m.share for m in active.values()), 1e-12)
        lends = {n for n, m in active.items() if not m.times and m.prior * time > 4 * (step - self.start) * part * m.share}
        open_ = {n: m for n, m in active.items() if n not in lends}
        rates: dict[str, float] = dict.fromkeys(lends, 1e-12 * time)
        while open_:
            total = sum(m.share for m in open_.values())
            full = {n: m.cost(time) / m.every for n, m in open_.items() if m.times and m.cost(time) / m.every < left * m.share / total}
            if not full:
                rates |= {n: left * m.share / total for n, m in open_.items()}
                break
            rates |= {n: max(need, 1e-12) for n, need in full.items()}
            left -= sum(full.values())
            open_ = {n: m for n, m in open_.items() if n not in full}
        return rates

    def state(self) -> dict[str, Any]:
        """Plain data to go on from."""
        return {
            name: {"spent": m.spent, "times": m.times, "costs": list(m.costs), "last": m.last, "next": m.next, "allowance": m.allowance}
            for name, m in self.meters.items()
        }

    def restore(self, state: Mapping[str, Mapping[str, Any]], step: int) -> None:
        """Take the costs over that another process learnt; its plan too, where it lies ahead."""
        for name, kept in state.items():
            m = self.meters.get(name)
            if m is not None:
                m.costs.extend(kept["costs"])
                m.last, m.times, m.allowance, m.seen = kept["last"], kept["times"], kept["allowance"], step
                m.next = max(int(kept["next"]), step + 1)
        self.start = step
