"""The known answers against an oracle that knows nothing of the library.

The Jacobian comes from forward-mode differentiation in float64, with float32 casts inside a forward lifted to float64 and the
math attention kernel; the nullity is read off its singular values at 1e-12 of the largest, which must fall in a gap. Where an
operator has no forward-mode rule (fused recurrent kernels, weight norm) rows come from reverse mode.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from known_answers import CASES, Args, Case, fresh

CUT = 1e-12
NARROW = (torch.float32, torch.float16, torch.bfloat16)


class LiftCasts(TorchFunctionMode):
    """Turn every cast to a narrow float inside a forward into a cast to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if kwargs.get("dtype") in NARROW:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in NARROW else a for a in args)
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a Jacobian, relative to the largest, and what they say."""

    values: Tensor
    params: int

    @property
    def rank(self) -> int:
        return int((self.values > CUT).sum())

    @property
    def nullity(self) -> int:
        return self.params - self.rank

    @property
    def kept(self) -> float:
        return float(self.values[self.rank - 1])

    @property
    def cut(self) -> float:
        return float(self.values[self.rank]) if self.rank < len(self.values) else 0.0


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Distinct trainable parameters; tied ones appear once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def without_running_statistics(model: nn.Module) -> nn.Module:
    """A copy that computes the same train-mode function and updates no buffer."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


def _forward_rows(model: nn.Module, params: Mapping[str, Tensor], args: Args, read: Callable[[Tensor], Tensor]) -> Tensor:
    """Jacobian (outputs, params) by one jvp for each parameter, vectorised."""
    sizes = [p.numel() for p in params.values()]

    def column(direction: Tensor) -> Tensor:
        pieces = direction.split(sizes)
        tangents = {name: t.view_as(p) for (name, p), t in zip(params.items(), pieces, strict=True)}
        return jvp(lambda q: read(functional_call(model, q, args)), (dict(params),), (tangents,))[1]

    return vmap(column, chunk_size=64)(torch.eye(sum(sizes), dtype=torch.float64)).T


def _reverse_rows(model: nn.Module, params: Mapping[str, Tensor], args: Args, read: Callable[[Tensor], Tensor]) -> Tensor:
    """Jacobian (outputs, params) by one backward pass for each output."""
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    out = read(functional_call(model, leaves, args))
    rows = []
    for value in out:
        grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def jacobian(model: nn.Module, inputs: Sequence[Args], reverse: bool = False) -> Tensor:
    """Outputs over all inputs against all distinct trainable parameters, in float64."""
    model = without_running_statistics(model)
    params = trainable(model)

    def read(out: Tensor) -> Tensor:
        return out.to(torch.float64).reshape(-1)

    fused = any(isinstance(m, nn.RNNBase) for m in model.modules()) or any("parametrizations" in name for name in params)
    rows = _reverse_rows if fused or reverse else _forward_rows
    with sdpa_kernel(SDPBackend.MATH), LiftCasts():
        return torch.cat([rows(model, params, args, read) for args in inputs]).detach()


def mod_softmax(jac: Tensor, classes: int) -> Tensor:
    """The Jacobian of logits up to a common shift of their last axis."""
    logits = jac.view(-1, classes, jac.shape[1])
    return (logits - logits.mean(1, keepdim=True)).reshape(jac.shape)


def spectrum(jac: Tensor) -> Spectrum:
    """Singular values of a Jacobian of at least as many rows as columns, never of its Gram matrix."""
    rows, columns = jac.shape
    assert rows >= columns, f"{rows} outputs cannot show a nullity for {columns} parameters"
    values = torch.linalg.svdvals(torch.linalg.qr(jac, mode="r")[1])
    return Spectrum(values / values[0], columns)


def cases(slow: bool) -> list[Any]:
    return [
        pytest.param(c, id=name, marks=pytest.mark.skipif(not c.available, reason=f"needs {', '.join(c.requires)}"))
        for name, c in CASES.items()
        if c.slow == slow
    ]


def check(case: Case) -> None:
    model, inputs = case.build()
    jac = jacobian(model, inputs)
    found = spectrum(jac)
    assert found.params == case.params
    assert found.nullity == case.nullity
    assert found.cut < 0.1 * found.kept
    if case.gap is not None:
        assert found.kept == pytest.approx(case.gap[0], rel=0.06), "another draw than the published one"
    if case.nullity_mod_softmax is not None:
        classes = model(*inputs[0]).shape[-1]
        assert spectrum(mod_softmax(jac, classes)).nullity == case.nullity_mod_softmax


@pytest.mark.parametrize("case", cases(slow=False))
def test_nullity(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(slow=True))
def test_nullity_slow(case: Case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases(slow=False) if c.values[0].other_seeds])
def test_nullity_at_other_seeds(case: Case) -> None:
    for seed, nullity in case.other_seeds.items():
        model, inputs = case.build(seed)
        assert spectrum(jacobian(model, inputs)).nullity == nullity


@pytest.mark.parametrize("case", list(CASES.values()), ids=list(CASES))
def test_families_add_up(case: Case) -> None:
    if case.cumulative:
        assert len(case.cumulative) == len(case.families)
        assert case.cumulative[-1] == case.nullity
        steps = [b - a for a, b in zip((0, *case.cumulative), case.cumulative, strict=False)]
        assert all(0 <= step <= dim for step, dim in zip(steps, case.families.values(), strict=True))
    if case.extra_mod_softmax:
        assert case.nullity_mod_softmax == case.nullity + sum(case.extra_mod_softmax.values())


def test_building_leaves_no_trace() -> None:
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    first, inputs = CASES["mlp-relu-bias"].build()
    again, same = CASES["mlp-relu-bias"].build()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == dtype
    assert torch.equal(inputs[0][0], same[0][0])
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(ZeroDivisionError), fresh(0):
        raise ZeroDivisionError
    assert torch.get_default_dtype() == dtype
