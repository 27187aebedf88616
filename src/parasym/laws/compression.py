"""How far a symmetric function of many objects can be compressed, and what that does to scaling laws.

Source: universal-compression R0, R3, R4, R6.
"""

from __future__ import annotations

import math

from parasym.core.errors import InputError
from parasym.core.results import Estimate

_REFS = ("universal-compression",)


def monomial_count(m: int, order: int) -> int:
    """N_k = C(m + k, k): moments of order at most k in m coordinates, constant included."""
    return math.comb(m + order, order)


def order_for_size(m: int, budget: int) -> int:
    """The largest order k whose C(m + k, k) objects fit into a budget.

    Raises:
        InputError: m or the budget is below 1.
    """
    if m < 1 or budget < 1:
        raise InputError(f"need at least one coordinate and one object, got m={m}, budget={budget}.")
    k = 0
    while monomial_count(m, k + 1) <= budget:
        k += 1
    return k


def compression_bound(derivative: float, radius: float, order: int, total: float = 1.0) -> Estimate:
    """Bound on |sum w phi - sum w' phi| over cells of a radius whose moments agree up to an order: 2 W D r^(k+1) / (k+1)!.

    Args:
        derivative: supremum D of the norm of the (k+1)-th derivative of phi on the cells.
        radius: of the cells, in the units of the objects.
        total: W, sum of the weights.

    Source: universal-compression R3.
    """
    value = 2 * total * derivative * radius ** (order + 1) / math.factorial(order + 1)
    return Estimate(value, refs=_REFS, assumptions=("phi is k+1 times differentiable", "moments match up to order k"))


def cell_exponent(m: int, order: int) -> float:
    """Error ~ cells^-(k+1)/m. Source: universal-compression R3."""
    return (order + 1) / m


def fixed_share_exponent(m: int, order: int) -> float:
    """Error of a mean ~ d^-((k+1)/m + 1/2) when a fixed share of the d objects is kept. Source: universal-compression R6."""
    return (order + 1) / m + 0.5


def best_order(m: int, size: int, rho: float) -> float:
    """k_opt of Theorem 5: log k_opt = (1/m) log(m! d' rho) - 1, for size d' and radius of convergence rho."""
    return math.exp(math.log(math.factorial(m) * size * rho) / m - 1)


def compressed_power_law(loss: float, size: float, alpha: float, sigma: float) -> float:
    """L = (d0 / d)^alpha seen in d' = d^sigma: the loss at d' = ``size``, alpha / sigma in the exponent, with ``loss`` at d' = 1."""
    return loss * size ** (-alpha / sigma)


def stretched_exponential_law(size: float, m: int, alpha: float, scale: float = 1.0) -> float:
    """exp(-alpha (d' / scale)^(1/m)): what a power law in d becomes at d' = scale (log d)^m. Source: universal-compression R4."""
    return math.exp(-alpha * (size / scale) ** (1 / m))
