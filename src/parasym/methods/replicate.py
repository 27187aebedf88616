"""Copies of hidden units, and the variance dropout leaves in a prediction (stochastic-networks-deterministic).

Copying every unit k times and dividing its outgoing weights by k leaves the mean function alone and, with dropout drawn for each copy
on its own before a linear read-out, divides the predictive variance by k exactly. Without noise it widens a network for nothing.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.core.guards import preserve, rng_state

_ROWS = 4096  # inputs of one pass of a sampled variance


def replicate(model: nn.Sequential, layer: int, copies: int) -> nn.Sequential:
    """A wider network with the same mean function: every unit that ``model[layer]`` makes is copied ``copies`` times (R1).

    Args:
        model: a chain of Linear or convolution layers and element-wise modules (activations, dropout); other weights between the layer
            and the next reader are not copied over and are refused.
        layer: position of the Linear or convolution whose outputs are copied.
        copies: k >= 1.

    Returns:
        A new network; ``model`` is left as it is.

    Raises:
        InputError: no such layer, no reader after it, a module with weights between the two, or fewer than one copy.
    """
    if copies < 1:
        raise InputError(f"copies must be at least 1, got {copies}")
    if not 0 <= layer < len(model) or not isinstance(model[layer], nn.Linear | nn.modules.conv._ConvNd):
        raise InputError(f"module {layer} is no Linear or convolution whose units could be copied")
    after = next((i for i in range(layer + 1, len(model)) if isinstance(model[i], nn.Linear | nn.modules.conv._ConvNd)), None)
    if after is None:
        raise InputError(f"nothing reads module {layer}: the outputs of a network cannot be copied")
    for i in range(layer + 1, after):
        if any(True for _ in model[i].parameters()):
            raise InputError(f"module {i} ({type(model[i]).__name__}) has weights between the units and their reader: not supported")
    made, read = model[layer], model[after]
    if getattr(made, "groups", 1) != 1 or getattr(read, "groups", 1) != 1:
        raise InputError("grouped convolutions tie their units: not supported")
    wide = copy.deepcopy(model)
    wide[layer], wide[after] = _outputs(made, copies), _inputs(read, made, copies)
    return wide


def _outputs(module: nn.Module, copies: int) -> nn.Module:
    out = copy.deepcopy(module)
    out.weight = nn.Parameter(module.weight.detach().repeat_interleave(copies, 0))  # type: ignore[arg-type, operator, union-attr]
    if module.bias is not None:
        out.bias = nn.Parameter(module.bias.detach().repeat_interleave(copies, 0))  # type: ignore[arg-type, operator, union-attr]
    setattr(out, "out_features" if isinstance(module, nn.Linear) else "out_channels", len(out.weight))
    return out


def _inputs(module: nn.Module, made: nn.Module, copies: int) -> nn.Module:
    out = copy.deepcopy(module)
    weight: Tensor = module.weight.detach()  # type: ignore[assignment, operator]
    units = len(made.weight)  # type: ignore[arg-type]
    span = weight.shape[1] // units  # a Linear behind a Flatten reads several numbers of each unit
    if span * units != weight.shape[1]:
        raise InputError(f"the reader has {weight.shape[1]} inputs, which are not a whole number for each of {units} units")
    blocks = weight.reshape(len(weight), units, span, *weight.shape[2:]).repeat_interleave(copies, 1) / copies
    out.weight = nn.Parameter(blocks.reshape(len(weight), units * span * copies, *weight.shape[2:]))
    setattr(out, "in_features" if isinstance(module, nn.Linear) else "in_channels", out.weight.shape[1])
    return out


def predictive_variance(model: nn.Module, x: Tensor, samples: int = 200, *, exact: bool = False, seed: int = 0) -> Tensor:
    """Variance of the outputs over dropout, (n, outputs).

    Args:
        model: with dropout modules; for ``exact`` a Sequential that ends in [..., Dropout, Linear] with that one dropout only:
            Var = s^2 sum_i u_i^2 h_i^2, s^2 = p / (1 - p) (R4), no sampling.
        samples: draws, for the unbiased sample variance.
        seed: of the draws; the global generator is put back.

    Raises:
        InputError: fewer than two samples, or a network whose variance is not known exactly.
    """
    if exact:
        with torch.no_grad():
            noise, hidden, read = _last_hidden(model, x)
            return noise * hidden.square() @ read.weight.square().T
    if samples < 2:
        raise InputError(f"a variance needs at least two samples, got {samples}")
    with preserve(model), rng_state(), torch.no_grad():
        torch.manual_seed(seed)
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.train()
        mean = squares = torch.zeros((), dtype=torch.float64)
        done, most = 0, max(1, _ROWS // max(1, len(x)))
        while done < samples:
            count = min(most, samples - done)
            drawn = model(x.repeat(count, *(1,) * (x.ndim - 1))).double()  # every row has its own noise
            drawn = drawn.reshape(count, len(x), *drawn.shape[1:])
            gap = drawn.mean(0) - mean
            squares = squares + drawn.var(0, correction=0) * count + gap.square() * done * count / (done + count)
            mean, done = mean + gap * count / (done + count), done + count
    return squares / (samples - 1)


def marginal_dropout_loss(model: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """E over dropout of the mean over samples of |f - y|^2, exactly, for a Sequential that ends in [..., Dropout, Linear] (R7):
    |mean - y|^2 + s^2 sum_i |u_i|^2 h_i^2. Differentiable.

    Raises:
        InputError: another ending, or another dropout before it.
    """
    noise, hidden, read = _last_hidden(model, x)
    bias = (read(hidden) - y.reshape(len(x), -1)).square().sum(-1)
    return (bias + noise * (hidden.square() * read.weight.square().sum(0)).sum(-1)).mean()


def variance_bound(variance: float, width: int, wider: int) -> float:
    """Upper bound of the mean predictive variance at the global minimum of width ``wider``, from a network of width ``width`` whose mean
    function is the best there is: v d / D, rounded to whole copies (R2)."""
    if wider < width:
        raise InputError(f"the bound is for a wider network: got {wider} < {width}")
    return variance / (wider // width)


def _last_hidden(model: nn.Module, x: Tensor) -> tuple[float, Tensor, nn.Linear]:
    """s^2, the units before the dropout with dropout switched off, and the read-out."""
    form = ""
    if not isinstance(model, nn.Sequential) or len(model) < 2:
        form = "the network must be a Sequential"
    elif not isinstance(model[-1], nn.Linear) or not isinstance(model[-2], nn.Dropout):
        form = "the network must end in Dropout, Linear"
    elif sum(isinstance(m, nn.modules.dropout._DropoutNd) for m in model.modules()) != 1:
        form = "only the last hidden layer may have dropout"
    if form:
        raise InputError(f"the variance is known exactly only for one dropout before a linear read-out: {form}; sample instead")
    assert isinstance(model, nn.Sequential)
    p, hidden = float(model[-2].p), x  # type: ignore[arg-type]
    for module in list(model)[:-2]:
        hidden = module(hidden)
    if p >= 1:
        raise InputError("a dropout rate of 1 leaves nothing")
    read = model[-1]
    assert isinstance(read, nn.Linear)
    return p / (1 - p), hidden, read
