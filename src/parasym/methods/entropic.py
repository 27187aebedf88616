"""The entropic term of the learning rate as a regulariser: add it to train as if the rate were larger, subtract it to cancel it.

A step of size eta descends L + (eta/4) E|g_B|^2 (neural-thermodynamics R1). Adding (coef/4)|g_B|^2 to every batch's loss makes the run
behave, to leading order, like one of rate eta + coef; coef = -eta takes the entropic force out, an ablation.
"""

from __future__ import annotations

import math as mathematics
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.guards import math_attention


class EntropicRegularizer:
    """Adds (coef / 4)|grad loss|^2 to a batch's loss; one more backward pass, through the first.

    Args:
        coef: in units of the learning rate: the rate that is added (negative: taken off).
        parameters: those the gradient is taken for; the trainable ones are used.

    Raises:
        InputError: a coefficient that is not finite, or no trainable parameter.

    Example:
        >>> regularized = EntropicRegularizer(0.1, model.parameters())      # doctest: +SKIP
        >>> with regularized.math():                                        # doctest: +SKIP
        ...     loss = regularized(loss_fn(model(x), y))
        ...     loss.backward()
    """

    def __init__(self, coef: float, parameters: Iterable[Tensor]) -> None:
        if not mathematics.isfinite(coef):
            raise InputError(f"coef must be a finite number, got {coef}.")
        self.coef, self.parameters = float(coef), [p for p in parameters if p.requires_grad]
        if not self.parameters:
            raise InputError("There is no trainable parameter to take the gradient for.")
        self.value = 0.0

    @staticmethod
    def math() -> AbstractContextManager[None]:
        """A context for the forward and backward pass of models with fused attention, which has no second derivative."""
        return math_attention()

    def __call__(self, loss: Tensor) -> Tensor:
        """The loss with its entropic term; ``value`` keeps the last term.

        Raises:
            InputError: the loss is not one number, or depends on none of the parameters.
        """
        if loss.numel() != 1:
            raise InputError(f"The loss must be one number, got shape {tuple(loss.shape)}.")
        found = torch.autograd.grad(loss.reshape(()), self.parameters, create_graph=True, allow_unused=True)
        seen = [g for g in found if g is not None]
        if not seen:
            raise InputError("The loss does not depend on any of the parameters.")
        square = torch.stack([g.square().sum() for g in seen]).sum()
        self.value = self.coef / 4 * float(square.detach())
        return loss + self.coef / 4 * square


def cancel_entropy(lr: float, parameters: Iterable[Tensor]) -> EntropicRegularizer:
    """The regulariser that takes the entropic force of a learning rate ``lr`` out of SGD, to leading order.

    Raises:
        InputError: lr not positive.
    """
    if not lr > 0:
        raise InputError(f"lr must be positive, got {lr}.")
    return EntropicRegularizer(-lr, parameters)
