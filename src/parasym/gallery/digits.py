"""The shared runner of the label-noise papers: handwritten digits, and a stack of small networks trained side by side.

A stack holds s independent networks; every operation on it is entry by entry in s, so each network sees only its own seed, whatever
its neighbours do. Methods that are compared start from the same weights and see the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from parasym.core.errors import MissingExtraError
from parasym.gallery.ensemble import Ensemble

Weights = list[Tensor]


@dataclass(frozen=True)
class Split:
    """Images x (n, 64) in [0, 1], float32, and labels y (n,), for training and testing."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits(train: float = 0.6, seed: int = 0) -> Split:
    """scikit-learn's 1797 digits, 8 x 8, pixels over 16; a stratified split.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found, import-untyped, unused-ignore]
        from sklearn.model_selection import train_test_split  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise MissingExtraError("the digits come with scikit-learn: pip install 'parasym[data]'") from error
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 16, y, train_size=train, stratify=y, random_state=seed)
    images, labels = ([torch.tensor(part) for part in parts] for parts in ((x, x_test), (y, y_test)))
    return Split(images[0].float(), labels[0].long(), images[1].float(), labels[1].long())


def networks(draws: Ensemble, sizes: Sequence[int], methods: int = 1) -> Weights:
    """``methods`` copies of one network for each seed, (methods * seeds, inputs + 1, outputs); torch's own start, bias in the last row."""
    weights = [(2 * draws.uniform(a + 1, b, dtype=torch.float32) - 1) / a**0.5 for a, b in pairwise(sizes)]
    return [w.repeat(methods, 1, 1).requires_grad_() for w in weights]


def outputs(weights: Weights, x: Tensor, activation: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """(s, n, outputs) of images (n, inputs), or (s, n, inputs) if each network has its own."""
    value = x.expand(len(weights[0]), -1, -1)
    for index, weight in enumerate(weights):
        value = torch.baddbmm(weight[:, -1:], value, weight[:, :-1])
        if index < len(weights) - 1:
            value = activation(value)
    return value


def train(
    forward: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor, int], Tensor],
    *,
    epochs: int,
    batch: int,
    draws: Ensemble,
    watch: Callable[[int], None] = lambda epoch: None,
) -> Tensor:
    """Train on shuffled batches, the last one short; the mean training loss of each epoch, (epochs, s).

    Args:
        forward: (s, b, inputs) -> (s, b, outputs).
        x: (n, inputs); y: (s, n) labels, s a multiple of the seeds of ``draws``.
        loss: (logits (s, b, outputs), labels (s, b), epoch) -> (s,) mean losses.
        watch: called after each epoch.
    """
    history = []
    for epoch in range(epochs):
        order = draws.permutation(y.shape[1]).repeat(y.shape[0] // len(draws.seeds), 1)
        images, labels = x[order], y.gather(1, order)
        total = torch.zeros(y.shape[0])
        for start in range(0, y.shape[1], batch):
            piece = slice(start, start + batch)
            optimizer.zero_grad()
            losses = loss(forward(images[:, piece]), labels[:, piece], epoch)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += losses.detach() * labels[:, piece].shape[1]
        history.append(total / y.shape[1])
        with torch.no_grad():
            watch(epoch)
    return torch.stack(history)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each network, (s,), from (s, b, classes) and (s, b)."""
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.reshape(labels.shape).mean(1)


def accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right guesses among the ten classes of each network, (s,), from (s, n, 10 or more) and (n,) or (s, n)."""
    return (logits[..., :10].argmax(-1) == labels).double().mean(-1)
