"""Label smoothing against label noise: the loss in both conventions, and the amount that is best.

Source: label-smoothing R0-R6. Convention "p" ("offdiag"): 1 - p on the given label, p / (M - 1) on each other. Convention "eps"
("uniform", torch's): (1 - eps) onehot + eps / M. p = eps (M - 1) / M.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

Convention = Literal["offdiag", "uniform"]


def convert_smoothing(amount: float, classes: int, to: Convention) -> float:
    """The same smoothing in the other convention: ``to="uniform"`` turns p into eps, ``to="offdiag"`` eps into p."""
    return amount * classes / (classes - 1) if to == "uniform" else amount * (classes - 1) / classes


class SmoothCE(nn.Module):
    """Cross-entropy with smoothed labels, in the convention of the noise: 1 - p on the label, p / (M - 1) on each other.

    Args:
        p: amount.
        convention: "offdiag" for p, "uniform" for torch's eps.
        reduction, weight, ignore_index: as in `torch.nn.CrossEntropyLoss`, which does the work.

    Shape:
        logits (B, M, ...) and labels (B, ...) or probabilities (B, M, ...).

    Raises:
        ValueError: p above (M - 1) / M, where the given label becomes the least likely one.

    Source: label-smoothing, setup and R5.
    """

    def __init__(
        self,
        p: float,
        *,
        convention: Convention = "offdiag",
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"the smoothing must be in [0, 1], got {p}")
        if convention not in ("offdiag", "uniform"):
            raise ValueError(f"convention must be 'offdiag' or 'uniform', got {convention!r}")
        self.p, self.convention, self.reduction, self.ignore_index = p, convention, reduction, ignore_index
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        classes = logits.shape[1 if logits.dim() > 1 else 0]
        eps = self.p if self.convention == "uniform" else convert_smoothing(self.p, classes, "uniform")
        if eps > 1:
            raise ValueError(f"p = {self.p} is above (M - 1) / M for M = {classes} classes: the given label would be the least likely")
        weight: Tensor | None = self.weight  # type: ignore[assignment]
        return nn.functional.cross_entropy(
            logits, target, weight=weight, ignore_index=self.ignore_index, reduction=self.reduction, label_smoothing=eps
        )

    def extra_repr(self) -> str:
        """Amount and convention."""
        return f"p={self.p}, convention={self.convention!r}"


def forward_corrected_loss(logits: Tensor, target: Tensor, noise: float) -> Tensor:
    """NLL of softmax(z) T, T the symmetric channel of that noise: the net stays clean, its prediction is made noisy.

    Args:
        logits: (B, M); target: (B,) noisy labels; noise: fraction wrong, below (M - 1) / M.

    Source: label-smoothing R0 (``fsmoothing``), R3.
    """
    classes = logits.shape[-1]
    _check(noise, classes)
    p = torch.softmax(logits, -1).gather(-1, target[:, None])
    return -(noise / (classes - 1) + (1 - noise - noise / (classes - 1)) * p).log().mean()


def logit_gap(p: float, classes: int) -> float:
    """Gap between the label's logit and each other at the optimum of a smoothed fit, log((1 - p)(M - 1) / p). Source: R5."""
    _check(p, classes)
    return math.log((1 - p) * (classes - 1) / p) if p > 0 else math.inf


def compose_symmetric_noise(r: float, p: float, classes: int) -> float:
    """Smoothing (or noise) p after noise r is the symmetric channel r + p - r p M / (M - 1). Source: label-smoothing R3."""
    return r + p - r * p * classes / (classes - 1)


def inverse_symmetric_noise(r: float, classes: int) -> float:
    """The (negative) smoothing that undoes noise r, -r / (1 - r M / (M - 1)): backward correction. Source: label-smoothing R3."""
    _check(r, classes)
    return -r / (1 - r * classes / (classes - 1))


def smoothing_test_loss(p: float, r: float, classes: int, k: int = 1, neighbour_acc: float = 1.0) -> float:
    """Clean test cross-entropy of a model that gives a test point the mean of the smoothed labels of its k nearest training points.

    Args:
        p: smoothing, in [0, (M - 1) / M]; r: symmetric label noise; classes: M.
        k: neighbours averaged over; 1 is a memoriser.
        neighbour_acc: a, the chance that a neighbour's clean label is right.

    Returns:
        Nats; infinite for p = 0 where a wrong answer is possible.

    Source: label-smoothing R1 (k = 1, a = 1), R2 (k = 1), R3.
    """
    _check(p, classes)
    right = neighbour_agreement(r, classes, neighbour_acc)
    total = 0.0
    for c in range(k + 1):
        chance = math.comb(k, c) * right**c * (1 - right) ** (k - c)
        given = (1 - p) * c / k + p / (classes - 1) * (1 - c / k)
        if chance > 0:
            total += chance * (-math.log(given) if given > 0 else math.inf)
    return total


def neighbour_agreement(r: float, classes: int, neighbour_acc: float = 1.0) -> float:
    """q = (1 - r) a + (1 - a) r / (M - 1): the chance that a neighbour's noisy label is the true label of the test point. R2."""
    _check(r, classes)
    return (1 - r) * neighbour_acc + (1 - neighbour_acc) * r / (classes - 1)


def noisy_agreement(r: float, classes: int) -> float:
    """s* = (1 - r)^2 + r^2 / (M - 1): the chance that two noisy labels of one point agree. Source: label-smoothing R0, R6."""
    _check(r, classes)
    return (1 - r) ** 2 + r * r / (classes - 1)


def optimal_smoothing(r: float, classes: int, k: int = 1, neighbour_acc: float = 1.0, target: Literal["clean", "noisy"] = "clean") -> float:
    """The p that minimises the test cross-entropy of `smoothing_test_loss`.

    k = 1 in closed form: 1 - q of `neighbour_agreement` on clean test labels (r itself for a perfect neighbour), 1 - s* of
    `noisy_agreement` on noisy ones (the authors' official value). It falls fast with k; a trained net behaves like 2 to 3
    neighbours, so draw the curve before trusting the rule (R4).

    Raises:
        ValueError: ``target="noisy"`` with k > 1 or an imperfect neighbour, for which there is no formula.

    Source: label-smoothing R0-R3, R6.
    """
    if target == "noisy":
        if k != 1 or neighbour_acc != 1.0:
            raise ValueError("the optimum on noisy test labels is known for k = 1 and a perfect neighbour only")
        return 1 - noisy_agreement(r, classes)
    if k == 1:
        return 1 - neighbour_agreement(r, classes, neighbour_acc)
    # the optimum can be far below 1e-6: search in the logarithm
    found = minimize_scalar(
        lambda u: smoothing_test_loss(math.exp(u), r, classes, k, neighbour_acc),
        bounds=(math.log(1e-12), math.log((classes - 1) / classes)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return math.exp(float(found.x))


def effective_neighbours(best: float, r: float, classes: int, neighbour_acc: float = 1.0, most: int = 10) -> float:
    """How many neighbours a net averages over, judged by its best p: log-linear interpolation between the optima of whole k.

    1 is a memoriser; ``most`` stands for that many or more. Source: label-smoothing R3, R4 (``k_eff``).
    """
    if best <= 0:
        return float(most)
    last = optimal_smoothing(r, classes, 1, neighbour_acc)
    if best >= last:
        return 1.0
    for k in range(2, most + 1):
        here = optimal_smoothing(r, classes, k, neighbour_acc)
        if best >= here:
            return k - 1 + (math.log(last) - math.log(best)) / (math.log(last) - math.log(here))
        last = here
    return float(most)


def _check(amount: float, classes: int) -> None:
    if classes < 2 or not 0 <= amount <= (classes - 1) / classes + 1e-12:
        raise ValueError(f"an amount of noise or smoothing lies in [0, (M - 1) / M] for M >= 2 classes, got {amount} for M = {classes}")
