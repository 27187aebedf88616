"""Every architecture of the zoo builds, runs in float64, exports as it says, and has the nullity it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import parasym
from parasym.core.errors import TraceError
from strategies import LIMIT, Architecture, architectures, random_architecture
from test_known_answers_oracle import jacobian, spectrum
from zoo import ZOO, ZooCase

# no forward-mode rule, or a large graph: counted in the slow run
HEAVY = {"hf-bloom", "hf-convnext", "hf-resnet", "hf-vit-classifier", "weight-norm-tanh", "lstm", "lstm-bidirectional", "gru", "rnn",
         "hf-t5", "hf-qwen3", "hf-gemma", "hf-gpt-neox", "hf-mixtral", "hf-mixtral-batched"}  # fmt: skip


def available(names: Any) -> list[Any]:
    return [
        pytest.param(ZOO[n], id=n, marks=pytest.mark.skipif(not ZOO[n].available, reason=f"needs {', '.join(ZOO[n].requires)}"))
        for n in names
    ]


class Flat(nn.Module):
    """All outputs of a model as one tensor (samples, numbers)."""

    def __init__(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.kwargs = kwargs

    def forward(self, *args: Tensor) -> Tensor:
        out = self.model(*args, **self.kwargs)
        parts = [out] if isinstance(out, Tensor) else list(out.values()) if isinstance(out, dict) else list(out)
        return torch.cat([part.reshape(part.shape[0], -1) for part in parts], 1)


def count(case: ZooCase) -> int:
    """Nullity of a case at its seed and number of samples (batches, where samples mix)."""
    model, args, kwargs = case.build(samples=case.samples)
    inputs = [args]
    if case.mixes_samples:
        inputs = [case.build(seed=seed)[1] for seed in range(1, case.samples + 1)]
    return spectrum(jacobian(Flat(model, kwargs), inputs, reverse=case.name == "hf-bloom")).nullity


def test_the_zoo_is_large_enough() -> None:
    assert len(ZOO) >= 60


@pytest.mark.parametrize("case", available(ZOO))
def test_builds_and_runs_in_float64(case: ZooCase) -> None:
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    model, args, kwargs = case.build()
    again = case.build()[0]
    assert torch.equal(state, torch.get_rng_state())
    assert dtype == torch.get_default_dtype()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model.training == (case.mode == "train")
    assert sum(p.numel() for p in model.parameters()) <= 640
    out = Flat(model, kwargs)(*args)
    assert out.dtype == torch.float64
    assert out.isfinite().all()
    assert out.shape[0] == args[0].shape[0]


@pytest.mark.parametrize("case", available(n for n, c in ZOO.items() if c.exports))
def test_exports(case: ZooCase) -> None:
    model, args, kwargs = case.build()
    program = torch.export.export(model, args, kwargs, strict=False)
    assert any(node.op == "call_function" for node in program.graph.nodes)


@pytest.mark.parametrize("case", available(n for n, c in ZOO.items() if not c.exports))
def test_does_not_export(case: ZooCase) -> None:
    model, args, kwargs = case.build()
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(model, args, kwargs, strict=False)


@pytest.mark.parametrize("case", available(n for n, c in ZOO.items() if c.nullity is not None and n not in HEAVY))
def test_nullity(case: ZooCase) -> None:
    assert count(case) == case.nullity


@pytest.mark.slow
@pytest.mark.parametrize("case", available(n for n, c in ZOO.items() if c.nullity is not None and n in HEAVY))
def test_nullity_slow(case: ZooCase) -> None:
    assert count(case) == case.nullity


def test_random_architectures_are_reproducible() -> None:
    descriptions = set()
    for seed in range(100):
        first, again = random_architecture(seed), random_architecture(seed)
        assert first.description == again.description
        assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
        assert torch.equal(first.args[0], again.args[0])
        descriptions.add(first.description)
    assert len(descriptions) > 90


@settings(max_examples=50, deadline=None, database=None)
@given(architectures())
def test_random_architectures_run(architecture: Architecture) -> None:
    out = architecture.model(*architecture.args)
    assert architecture.params <= LIMIT
    assert out.isfinite().all(), architecture.description
    assert out.dtype == torch.float64
    assert out.shape[0] == architecture.args[0].shape[0]


# a large twin, or a retraction over many samples
LONG = {"hf-gpt-neox", "hf-mixtral-batched", "hf-convnext"}


def audited(case: ZooCase) -> None:
    model, args, kwargs = case.build()
    audit = parasym.audit(model, args, kwargs)
    left = [(u["name"], u["why"], u["parameters"]) for u in audit.undecided]
    assert audit.completeness.explained == 1.0, left
    assert audit.completeness.exact
    assert all(s.certified and s.residual <= 1e-10 for s in audit.symmetries)
    assert sum(s.dim for s in audit.symmetries) == audit.completeness.nullity


@pytest.mark.parametrize("case", available(n for n, c in ZOO.items() if c.exports and n not in LONG))
def test_every_direction_is_explained(case: ZooCase) -> None:
    audited(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", available(sorted(LONG)))
def test_every_direction_is_explained_slow(case: ZooCase) -> None:
    audited(case)


@pytest.mark.parametrize("case", available(n for n, c in ZOO.items() if not c.exports))
def test_what_does_not_export_is_a_clear_error(case: ZooCase) -> None:
    model, args, kwargs = case.build()
    with pytest.raises(TraceError, match="depend on the data"):
        parasym.audit(model, args, kwargs)
