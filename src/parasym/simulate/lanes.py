"""What the compiled lanes are made of: generator, normals and elementary functions without a branch, so that they vectorise.

Needs numba (extra ``[simulate]``); imported only when the engine "lanes" is used. The generator and the order of the draws are
those of `parasym.simulate.rng`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

# contract allows fused multiply-add; nothing here may assume that numbers are finite, since divergence is an outcome
FAST: dict[str, Any] = {"fastmath": {"contract", "nsz"}, "error_model": "numpy"}
OPTIONS: dict[str, Any] = {**FAST, "forceinline": True}  # a function the compiler leaves alone would keep its loop from vectorising
_U = np.uint32
_7, _9, _11, _21, _25 = (_U(k) for k in (7, 9, 11, 21, 25))


def _conversion(source: Any, target: Any, emit: Callable[[Any, Any], Any]) -> Any:
    @intrinsic
    def convert(typing_context: Any, x: Any) -> Any:
        return target(source), lambda context, builder, signature, args: emit(builder, args[0])

    return convert


_LLVM = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.uint32: ir.IntType(32),
    types.uint64: ir.IntType(64),
    types.int32: ir.IntType(32),
    types.int64: ir.IntType(64),
}


def _cast(how: str, source: Any, target: Any) -> Any:
    return _conversion(source, target, lambda builder, x: getattr(builder, how)(x, _LLVM[target]))


def _select(typing_context: Any, condition: Any, a: Any, b: Any) -> Any:
    """``a if condition else b`` without a branch."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(args[0], args[1], args[2])

    return a(types.boolean, a, a), emit


select: Any = intrinsic(_select)


@njit(**OPTIONS)
def advance(a: Any, b: Any, c: Any, d: Any) -> Any:
    """One step of xoshiro128++: the word and the next state."""
    total = _U(a + d)
    word = _U(_U(_U(total << _7) | _U(total >> _25)) + a)
    shifted = _U(b << _9)
    c = _U(c ^ a)
    d = _U(d ^ b)
    b = _U(b ^ c)
    a = _U(a ^ d)
    c = _U(c ^ shifted)
    d = _U(_U(d << _11) | _U(d >> _21))
    return word, a, b, c, d


to_wide = _cast("zext", types.uint32, types.uint64)
to_narrow = _cast("trunc", types.uint64, types.uint32)


def _horner(coefficients: Sequence[Any]) -> Any:
    """A compiled polynomial, lowest power first."""
    names = {f"c{k}": value for k, value in enumerate(coefficients)}
    body = f"c{len(coefficients) - 1}"
    for k in range(len(coefficients) - 2, -1, -1):
        body = f"({body}*x+c{k})"
    space: dict[str, Any] = dict(names)
    exec(f"def polynomial(x):\n    return {body}\n", space)
    return njit(**OPTIONS)(space["polynomial"])


def _log_remainder(degree: int) -> list[float]:
    """Coefficients of (log(1+m) - m + m^2/2) / m^3 on [sqrt(1/2) - 1, sqrt(2) - 1], by Chebyshev interpolation."""

    def remainder(m: Any) -> Any:
        near = sum((-1) ** k * m**k / (k + 3) for k in range(24))  # where the difference would cancel
        far = np.abs(m) > 0.1
        safe = np.where(far, m, 1.0)
        return np.where(far, (np.log1p(safe) - safe + safe * safe / 2) / safe**3, near)

    domain = [math.sqrt(0.5) - 1, math.sqrt(2.0) - 1]
    fit = np.polynomial.Chebyshev.interpolate(remainder, degree, domain=domain)
    return [float(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef]


def _library(double: bool) -> SimpleNamespace:
    """Elementary functions of one precision; the relative error is a few units in the last place."""
    F: Any = np.float64 if double else np.float32
    real, word, whole = (types.float64, types.uint64, types.int64) if double else (types.float32, types.uint32, types.int32)
    W: Any = np.uint64 if double else np.uint32
    mantissa, bias = (52, 1023) if double else (23, 127)
    bits, unbits = _cast("bitcast", real, word), _cast("bitcast", word, real)
    from_word, from_whole = _cast("uitofp", word, real), _cast("sitofp", whole, real)
    exponent = _conversion(word, whole, lambda builder, x: builder.ashr(x, ir.Constant(x.type, mantissa)))
    raised = _conversion(word, word, lambda builder, x: builder.shl(x, ir.Constant(x.type, mantissa)))
    halved = _conversion(word, word, lambda builder, x: builder.ashr(x, ir.Constant(x.type, 1)))
    zero, half, one, two = F(0), F(0.5), F(1), F(2)
    root = W(np.array(math.sqrt(0.5), F).view(W))
    low_bits = W((1 << mantissa) - 1)
    tiny, lift, lifted = F(np.finfo(F).tiny), F(2.0 ** (mantissa + 1)), F(mantissa + 1)
    infinity, nan = F(np.inf), F(np.nan)
    ln2_high = F(np.float32(0.693145751953125))  # few bits, so that a multiple of it is exact
    ln2_low = F(Fraction("0.693147180559945309417232121458176568") - Fraction(0.693145751953125))
    log_series = _horner([F(2.0 / (2 * k + 1)) for k in range(1, 11 if double else 5)])

    @njit(**OPTIONS)
    def log_normal(x: Any) -> Any:
        b = W(bits(x) - root)
        e = from_whole(exponent(b))
        m = unbits(W(W(b & low_bits) + root)) - one
        s = m / (m + two)
        z = s * s
        return e * ln2_high + (e * ln2_low + (s * two + s * z * log_series(z)))

    @njit(**OPTIONS)
    def log(x: Any) -> Any:
        small = x < tiny
        y = log_normal(select(small, x * lift, x)) - select(small, lifted * (ln2_high + ln2_low), zero)
        y = select(x == infinity, infinity, y)
        return select(x > zero, y, select(x == zero, -infinity, nan))

    per_ln2, magic = F(1 / math.log(2.0)), F(1.5 * 2.0**mantissa)
    exp_series = _horner([F(1 / math.factorial(k)) for k in range(2, 14 if double else 9)])
    top, bottom = F(2.0 + (bias + 1) * math.log(2.0)), F(-(bias + mantissa + 3) * math.log(2.0))
    offset = W(bias)

    @njit(**OPTIONS)
    def parts(x: Any) -> Any:
        # x = k ln 2 + r: exp(r) - 1 and the words of k
        shifted = x * per_ln2 + magic
        k = shifted - magic
        r = (x - k * ln2_high) - k * ln2_low
        return r + r * r * exp_series(r), W(bits(shifted) - bits(magic))

    @njit(**OPTIONS)
    def power(k: Any) -> Any:
        return unbits(raised(W(k + offset)))

    @njit(**OPTIONS)
    def exp(x: Any) -> Any:
        y = select(x > top, top, select(x < bottom, bottom, x))
        q, k = parts(y)
        first = halved(k)
        return (one + q) * power(first) * power(W(k - first))

    flat = F(40.0 if double else 20.0)

    @njit(**OPTIONS)
    def tanh(x: Any) -> Any:
        a = abs(x) * two
        q, k = parts(select(a > flat, flat, a))
        scale = power(k)
        u = q * scale + (scale - one)
        t = u / (u + two)
        return select(x < zero, -t, t)

    sine = _horner([F((-1) ** k / math.factorial(2 * k + 1)) for k in range(9 if double else 5)])
    cosine = _horner([F((-1) ** k / math.factorial(2 * k)) for k in range(10 if double else 6)])
    quarter = math.pi / 2
    kept = 33 if double else 11
    first_part = math.ldexp(math.floor(math.ldexp(quarter, kept - 1)), 1 - kept)
    second_part = float(np.float32(quarter - first_part)) if double else math.ldexp(math.floor(math.ldexp(quarter - first_part, 22)), -22)
    p1, p2, p3 = F(first_part), F(second_part), F((quarter - first_part) - second_part + (6.123233995736766e-17 if double else 0.0))
    per_quarter, w1, w2, w3 = F(2 / math.pi), W(1), W(2), W(3)

    @njit(**OPTIONS)
    def turned(x: Any, by: Any) -> Any:
        shifted = x * per_quarter + magic
        k = shifted - magic
        r = ((x - k * p1) - k * p2) - k * p3
        turns = W(W(bits(shifted) - bits(magic)) + by) & w3
        z = r * r
        y = select(W(turns & w1) == w1, cosine(z), r * sine(z))
        return select(W(turns & w2) == w2, -y, y)

    w0 = W(0)

    @njit(**OPTIONS)
    def sin(x: Any) -> Any:
        return turned(x, w0)

    @njit(**OPTIONS)
    def cos(x: Any) -> Any:
        return turned(x, w1)

    # Normals: half the first quadrant on either side of its middle, so that sine and cosine come from one short pair of series.
    eighth = math.pi / 4
    fold = 1 / math.sqrt(2.0)
    odd, even = (8, 9) if double else (5, 5)
    arc_sine = _horner([F((-1) ** k * fold * eighth ** (2 * k + 1) / math.factorial(2 * k + 1)) for k in range(odd)])
    arc_cosine = _horner([F((-1) ** k * fold * eighth ** (2 * k) / math.factorial(2 * k)) for k in range(even)])
    arc_step = F(2.0**-28)
    narrow_real = _cast("uitofp", types.uint32, real)
    full = F(64 if double else 32)
    u1, u2, u3 = _U(1), _U(2), _U(3)
    least = one if double else half
    wide32 = np.uint64(32)

    @njit(**OPTIONS)
    def pair(radius: Any, angle: Any) -> Any:
        """Two normals from a radius word (64 bits in double) and an angle word."""
        x = from_word(radius)
        x = select(x < least, least, x)
        b = W(bits(x) - root)
        e = from_whole(exponent(b)) - full
        m = unbits(W(W(b & low_bits) + root)) - one
        minus_two_log = log_tail(e, m)
        r = math.sqrt(select(minus_two_log < zero, zero, minus_two_log))
        y = narrow_real(_U(angle >> u3)) * arc_step - one
        z = y * y
        s, c = y * arc_sine(z), arc_cosine(z)
        p, q = r * (c - s), r * (c + s)
        return select(_U(angle & u1) == u1, -p, p), select(_U(angle & u2) == u2, -q, q)

    minus_two_ln2_high, minus_two_ln2_low = F(-2) * ln2_high, F(-2) * ln2_low
    if double:

        @njit(**OPTIONS)
        def log_tail(e: Any, m: Any) -> Any:
            s = m / (m + two)
            z = s * s
            return e * minus_two_ln2_high + (e * minus_two_ln2_low - two * (s * two + s * z * log_series(z)))

    else:
        # a series in m instead of m / (m + 2): no division in the hottest loop
        tail = _horner([F(c) for c in _log_remainder(8)])

        @njit(**OPTIONS)
        def log_tail(e: Any, m: Any) -> Any:
            z = m * m
            r = (m - half * z) + m * z * tail(m)
            return e * minus_two_ln2_high + (e * minus_two_ln2_low - two * r)

    uniform_step, uniform_half = (F(2.0**-52), F(2.0**-53)) if double else (F(2.0**-23), F(2.0**-24))
    uniform_shift = W(12 if double else 9)

    @njit(**OPTIONS)
    def uniform(bits_: Any) -> Any:
        return from_word(W(bits_ >> uniform_shift)) * uniform_step + uniform_half

    if double:

        @njit(**OPTIONS)
        def widen(high: Any, low: Any) -> Any:
            return np.uint64(np.uint64(to_wide(high) << wide32) | to_wide(low))

    else:
        widen = None
    return SimpleNamespace(log=log, exp=exp, tanh=tanh, sin=sin, cos=cos, pair=pair, uniform=uniform, widen=widen)


SINGLE = _library(False)
DOUBLE = _library(True)
