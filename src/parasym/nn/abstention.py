"""Selective prediction: scores to reject by, and risk against coverage.

Source: deep-gamblers R5, R6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def reserve(logits: Tensor) -> Tensor:
    """k, the softmax of the last of (B, m + 1) logits. (B,); reject high values, as of every score here."""
    return torch.softmax(logits, -1)[..., -1]


def softmax_response(logits: Tensor) -> Tensor:
    """1 - max p over (B, m) class logits; for a gambler's net drop the reserve column first."""
    return 1 - torch.softmax(logits, -1).amax(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of (B, m) class logits, nats."""
    return torch.special.entr(torch.softmax(logits, -1)).sum(-1)


def margin(logits: Tensor) -> Tensor:
    """1 - (largest - second largest probability) of (B, m) class logits."""
    top = torch.softmax(logits, -1).topk(2, -1).values
    return 1 - (top[..., 0] - top[..., 1])


@torch.no_grad()
def dropout_variance(model: nn.Module, x: Tensor, passes: int = 20, seed: int = 0) -> Tensor:
    """Variance over ``passes`` of the probability of the mean prediction, with dropout active and everything else in its mode; (B,).

    Modes and random generators are left as they were; the masks come from ``seed``.

    Raises:
        ValueError: the model has no dropout layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.dropout._DropoutNd)]
    if not layers:
        raise ValueError("the model has no dropout layer: every pass would give the same answer")
    modes = [layer.training for layer in layers]
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            for layer in layers:
                layer.train()
            p = torch.stack([torch.softmax(model(x), -1) for _ in range(passes)])
        finally:
            for layer, mode in zip(layers, modes, strict=True):
                layer.train(mode)
    chosen = p.mean(0).argmax(-1)
    return p.gather(-1, chosen.expand(passes, -1)[..., None])[..., 0].var(0)


def risk_coverage(score: Tensor, correct: Tensor, coverages: Sequence[float]) -> dict[float, float]:
    """Error rate on the accepted share, for each coverage c: the round(c n) samples of lowest score, ties in their given order.

    Args:
        score: (n,), high means reject.
        correct: (n,) bool.
        coverages: in (0, 1].

    Raises:
        ValueError: shapes differ, nothing to rank, a score that is NaN, or a coverage that accepts nobody.

    Source: deep-gamblers R5.
    """
    risk = _risks(score, correct)
    counts = [round(c * len(risk)) for c in coverages]
    for c, count in zip(coverages, counts, strict=True):
        if not 1 <= count <= len(risk):
            raise ValueError(f"coverage {c} accepts {count} of {len(risk)} samples; the risk is undefined")
    return {float(c): float(risk[count - 1]) for c, count in zip(coverages, counts, strict=True)}


def aurc(score: Tensor, correct: Tensor) -> float:
    """Area under the risk-coverage curve: the mean risk over coverages 1/n..1. Source: deep-gamblers R5."""
    return float(_risks(score, correct).mean())


def e_aurc(score: Tensor, correct: Tensor) -> float:
    """`aurc` less that of the ideal ordering, which rejects all mistakes first. Source: deep-gamblers R5."""
    return aurc(score, correct) - aurc((~correct.bool()).double(), correct)


def _risks(score: Tensor, correct: Tensor) -> Tensor:
    if score.dim() != 1 or score.shape != correct.shape or len(score) == 0:
        raise ValueError(f"score {tuple(score.shape)} and correct {tuple(correct.shape)} must be the same non-empty vector of samples")
    if bool(score.isnan().any()):
        raise ValueError(f"{int(score.isnan().sum())} scores are NaN")
    wrong = (~correct.bool()).double()[score.sort(stable=True).indices]
    return wrong.cumsum(0) / torch.arange(1, len(wrong) + 1, device=wrong.device)


def selective_loss(logits: Tensor, selection: Tensor, target: Tensor, coverage: float, *, weight: float = 32.0) -> Tensor:
    """SelectiveNet's r(f | g) + weight max(0, coverage - mean g)^2: the baseline with a selection head.

    Mix it half and half with the cross-entropy of an auxiliary head, as its authors do.

    Args:
        logits: (B, m); selection: g in (0, 1), (B,); target: (B,) labels; coverage: in (0, 1].

    Source: deep-gamblers R6 (recalled there).
    """
    if selection.shape != target.shape or not 0 < coverage <= 1:
        raise ValueError(f"selection {tuple(selection.shape)} must fit target {tuple(target.shape)}, and coverage {coverage} be in (0, 1]")
    loss = nn.functional.cross_entropy(logits, target, reduction="none")
    covered = selection.mean()
    return (loss * selection).mean() / covered + weight * (coverage - covered).clamp_min(0).square()
