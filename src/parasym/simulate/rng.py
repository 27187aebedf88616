"""Random streams of the lanes: every replica has its own, fixed by the seed and its number alone.

The generator is xoshiro128++ (Blackman & Vigna 2021) seeded by splitmix64 (Steele et al. 2014); normals come in pairs by
Box & Muller (1958). This file is the readable numpy form; `parasym.simulate.kernel` compiles the same arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from parasym.core.errors import InputError

Words = NDArray[np.uint32]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser of x + golden ratio, elementwise."""
    with np.errstate(over="ignore"):
        z = x + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def streams(seed: int, numbers: NDArray[np.int64]) -> Words:
    """Generator states (4, n) of the replicas ``numbers`` under ``seed``.

    Raises:
        InputError: the seed is not an integer in [0, 2^63).
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise InputError(f"seed must be an integer in [0, 2^63), got {seed!r}")
    with np.errstate(over="ignore"):
        base = splitmix64(np.full(1, seed, np.uint64))
        first = splitmix64(base ^ splitmix64(numbers.astype(np.uint64)))
        second = splitmix64(first + _GOLDEN)
    low = np.uint64(0xFFFFFFFF)
    words = np.stack([first & low, first >> np.uint64(32), second & low, second >> np.uint64(32)]).astype(np.uint32)
    words[0] |= np.where((words == 0).all(0), np.uint32(1), np.uint32(0))  # the all-zero state is the generator's only fixed point
    return words


def next_words(state: Words) -> Words:
    """The next 32-bit word of each stream (n,); the states (4, n) advance in place."""
    a, b, c, d = state
    total = a + d
    word = ((total << np.uint32(7)) | (total >> np.uint32(25))) + a
    shifted = b << np.uint32(9)
    c ^= a
    d ^= b
    b ^= c
    a ^= d
    c ^= shifted
    d[:] = (d << np.uint32(11)) | (d >> np.uint32(21))
    return word


def normal_pair(radius: NDArray[np.float64], angle: Words) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two independent normals from a uniform in (0, 1] and a word.

    Two bits of the word are signs, the other 29 an angle within the first quadrant, so the angle is uniform on the circle.
    """
    r = np.sqrt(-2.0 * np.log(radius))
    quarter = np.pi / 2 * (angle >> np.uint32(3)).astype(np.float64) / 2.0**29
    first = np.where(angle & np.uint32(1), -1.0, 1.0)
    second = np.where(angle & np.uint32(2), -1.0, 1.0)
    return r * np.cos(quarter) * first, r * np.sin(quarter) * second


class LaneDraws:
    """The draws of a step in numpy, word for word those of the compiled lanes (up to the rounding of log, sin and cos)."""

    def __init__(self, state: Words, double: bool, orders: NDArray[np.int32] | None = None) -> None:
        self.state, self.double, self.orders, self.clock = state, double, orders, 0

    def normals(self, count: int) -> list[NDArray[np.float64]]:
        """``count`` arrays of normals; an odd count leaves the partner of the last unused."""
        out: list[NDArray[np.float64]] = []
        for _ in range((count + 1) // 2):
            out.extend(normal_pair(self._radius(), next_words(self.state)))
        return out[:count]

    def uniform(self) -> NDArray[np.float64]:
        """Uniform on (0, 1): 24 bits in single, 53 in double precision."""
        if self.double:
            high, low = next_words(self.state).astype(np.uint64), next_words(self.state).astype(np.uint64)
            return (((high << np.uint64(32)) | low) >> np.uint64(12)).astype(np.float64) / 2.0**52 + 2.0**-53
        return (next_words(self.state) >> np.uint32(9)).astype(np.float64) / 2.0**23 + 2.0**-24

    def _radius(self) -> NDArray[np.float64]:
        if self.double:
            high, low = next_words(self.state).astype(np.uint64), next_words(self.state).astype(np.uint64)
            wide = (high << np.uint64(32)) | low
            return np.maximum(wide.astype(np.float64), 1.0) / 2.0**64
        return np.maximum(next_words(self.state).astype(np.float32), np.float32(0.5)).astype(np.float64) / 2.0**32

    def indices(self, size: int, count: int, replacement: bool) -> list[NDArray[np.int64]]:
        """``count`` row numbers below ``size``: independent, or a fresh subset (Floyd's algorithm)."""
        if replacement:
            return self._below([size] * count)
        chosen: list[NDArray[np.int64]] = []
        for last, draw in zip(range(size - count, size), self._below(list(range(size - count + 1, size + 1))), strict=True):
            taken = np.zeros(draw.shape, bool)
            for other in chosen:
                taken |= draw == other
            chosen.append(np.where(taken, last, draw))
        return chosen

    def epoch(self, size: int, count: int) -> list[NDArray[np.int64]]:
        """The next ``count`` rows of a random order of all ``size`` rows, a new order for every epoch (Fisher & Yates)."""
        assert self.orders is not None
        start = (self.clock % (size // count)) * count
        lanes = np.arange(self.orders.shape[1])
        out = []
        for position in range(start, start + count):
            at = position + self._below([size - position])[0]
            picked = self.orders[at, lanes]
            self.orders[at, lanes] = self.orders[position]
            self.orders[position] = picked
            out.append(picked.astype(np.int64))
        return out

    def _below(self, sizes: list[int]) -> list[NDArray[np.int64]]:
        out: list[NDArray[np.int64]] = []
        for group in packed(sizes):
            rest = next_words(self.state).astype(np.uint64)
            for size in group:
                wide = rest * np.uint64(size)
                out.append((wide >> np.uint64(32)).astype(np.int64))
                rest = wide & np.uint64(0xFFFFFFFF)
        return out


def packed(sizes: list[int]) -> list[list[int]]:
    """Group draws that share one 32-bit word, by multiplication.

    Powers of two use the bits up and stay exact; otherwise no outcome is off by more than 2^-16 of its probability.
    """
    groups: list[list[int]] = []
    full = 1 << (32 if all(size & (size - 1) == 0 for size in sizes) else 16)
    room = 0
    for size in sizes:
        if room < size:
            groups.append([])
            room = full
        groups[-1].append(size)
        room //= size
    return groups
