"""Label noise made on purpose, and how much of it a net has memorised.

Source: gamblers-noisy-labels R5 and its software section. ``rate`` is the fraction of labels that come out wrong.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

NoiseKind = Literal["symmetric", "pair"]


def noise_matrix(rate: float, classes: int, kind: NoiseKind = "symmetric") -> Tensor:
    """T (M, M) float64, T_ij the chance that label i is given as j: symmetric over the others, or pair flip to i + 1 mod M.

    Raises:
        ValueError: rate outside [0, 1], fewer than two classes, or an unknown kind.
    """
    if not 0 <= rate <= 1 or classes < 2:
        raise ValueError(f"need a rate in [0, 1] and at least two classes, got {rate} and {classes}")
    eye = torch.eye(classes, dtype=torch.float64)
    if kind == "symmetric":
        return (1 - rate) * eye + rate / (classes - 1) * (1 - eye)
    if kind == "pair":
        return (1 - rate) * eye + rate * eye.roll(1, 1)
    raise ValueError(f"kind must be 'symmetric', 'pair' or a matrix, got {kind!r}")


def flip_labels(
    y: Tensor, rate: float, classes: int, kind: NoiseKind | Tensor = "symmetric", *, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noisy labels and the mask of those that are now wrong; each label is flipped independently.

    Args:
        y: (n,) labels; rate: fraction wrong; classes: M.
        kind: "symmetric" (uniform over the M - 1 others), "pair" (to the next class), or a matrix T (M, M) with rows that sum to 1,
            for which ``rate`` is not used.
        generator: source of randomness.

    Returns:
        y_noisy (n,) and wrong (n,) bool.
    """
    matrix = kind.double() if isinstance(kind, Tensor) else noise_matrix(rate, classes, kind)
    if matrix.shape != (classes, classes) or bool((matrix < 0).any()) or not torch.allclose(matrix.sum(1), torch.ones_like(matrix[0])):
        raise ValueError(f"the noise matrix must be ({classes}, {classes}), non-negative, with rows that sum to 1")
    if y.numel() and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}")
    noisy = torch.multinomial(matrix[y.cpu()], 1, replacement=True, generator=generator)[:, 0].to(y.device)
    return noisy, noisy != y


@dataclass(frozen=True)
class Memorisation:
    """What a net does with wrong training labels.

    Attributes:
        on_wrong: share of the wrongly labelled points on which it predicts the given, wrong label.
        recovered: share of them on which it predicts the true one.
        on_clean: accuracy on the rightly labelled points.
        reserve_clean, reserve_wrong: mean reserve on either kind (NaN without a reserve output).
        separation: chance that the reserve (or 1 - p of the given label) of a wrong point exceeds that of a clean one.
    """

    on_wrong: float
    recovered: float
    on_clean: float
    reserve_clean: float
    reserve_wrong: float
    separation: float

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)


@torch.no_grad()
def memorisation(logits: Tensor, true: Tensor, given: Tensor, *, has_reserve: bool = False) -> Memorisation:
    """Judge logits (n, M) or, with the reserve last, (n, M + 1) on the training set by its true and its given labels.

    Raises:
        ValueError: no label is wrong, or none is right.

    Source: gamblers-noisy-labels, acceptance A1-A3.
    """
    wrong = true != given
    if not bool(wrong.any()) or bool(wrong.all()):
        raise ValueError(f"{int(wrong.sum())} of {len(wrong)} labels are wrong: nothing to compare")
    f = torch.softmax(logits.double(), -1)
    p = f[:, :-1] if has_reserve else f
    guess = p.argmax(-1)
    score = f[:, -1] if has_reserve else 1 - p.gather(1, given[:, None])[:, 0]
    reserve = [float(score[mask].mean()) if has_reserve else float("nan") for mask in (~wrong, wrong)]
    ranks = score.argsort().argsort().double() + 1
    count = wrong.double().sum()
    separation = (ranks[wrong].sum() - count * (count + 1) / 2) / (count * (len(wrong) - count))
    return Memorisation(
        on_wrong=float((guess == given)[wrong].double().mean()),
        recovered=float((guess == true)[wrong].double().mean()),
        on_clean=float((guess == true)[~wrong].double().mean()),
        reserve_clean=reserve[0],
        reserve_wrong=reserve[1],
        separation=float(separation),
    )
