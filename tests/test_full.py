"""Large models: families of a small twin written down at full size, certified on the full weights, counted against the exact nullity."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from parasym.audit import audit_checkpoint
from parasym.core.errors import CheckpointError
from parasym.core.graph import trace
from parasym.core.samples import flatten
from parasym.symmetry.full import FullSize, audit_full_size
from parasym.symmetry.search import settle
from parasym.symmetry.tangent import flat_of

transformers = pytest.importorskip("transformers")


def generic(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights in general position, gains around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            gain = p.dim() == 1 and name.endswith("weight")
            p.copy_(1 + 0.3 * noise if gain else 0.5 * noise)
    return model.eval()


def gpt2(layers: int = 3) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=5, n_embd=6, n_layer=layers, n_head=2, n_inner=5, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    kwargs = {"input_ids": torch.randint(11, (7, 5), generator=torch.Generator().manual_seed(1)), "use_cache": False}
    return generic(transformers.GPT2LMHeadModel(config)), kwargs


def bert(layers: int = 3) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=6, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=5, max_position_embeddings=5,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0, pad_token_id=None, layer_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    kwargs = {"input_ids": torch.randint(11, (7, 5), generator=generator), "token_type_ids": torch.randint(2, (7, 5), generator=generator)}
    return generic(transformers.BertModel(config, add_pooling_layer=False)), kwargs


def at_full_size(model: nn.Module, kwargs: dict[str, Any]) -> tuple[FullSize, int]:
    """The twin's families on the model, and the model's own nullity."""
    generator = torch.Generator().manual_seed(0)
    graph = trace(model, (), kwargs)
    batch = flatten(graph, (), kwargs)
    found = audit_full_size(model, (), kwargs, graph, [batch], generator, lambda stage, fraction: None)
    null, _ = settle(graph, graph.params, [batch], flat_of(graph), generator, True)
    return found, null.nullity


@cache
def found_on(build: Any) -> tuple[nn.Module, dict[str, Any], FullSize, int]:
    model, kwargs = build()
    return model, kwargs, *at_full_size(model, kwargs)


@pytest.mark.parametrize("build", [gpt2, bert])
def test_dimensions_written_at_full_size_add_up_to_the_exact_nullity(build: Any) -> None:
    _, _, found, nullity = found_on(build)
    assert found.explained == 1.0
    assert not found.search.refuted
    assert sum(s.dim for s in found.symmetries) == nullity
    assert max(s.residual for s in found.symmetries) <= 1e-10
    for layer in range(3):
        assert any(f".{layer}." in p for s in found.symmetries for p in s.parameters)


def test_every_written_family_moves_the_original_model_nowhere() -> None:
    model, kwargs, found, _ = found_on(gpt2)
    generator = torch.Generator().manual_seed(5)
    model = copy.deepcopy(model).double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    before = model(**kwargs).logits
    for s in found.symmetries:
        if s.kind == "discrete":
            continue
        moved = s.act(params, s.random_element(generator, scale=0.3))
        assert max(float((moved[p] - params[p]).norm() / params[p].norm()) for p in s.parameters) > 1e-3
        after = torch.func.functional_call(model, moved, (), kwargs).logits
        assert float((after - before).abs().max() / before.abs().max()) < 1e-10, s.name


def test_a_checkpoint_is_streamed_with_the_same_families(tmp_path: Path) -> None:
    model, kwargs, found, _ = found_on(gpt2)
    path = tmp_path / "model.safetensors"
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, str(path))
    with torch.device("meta"):
        empty = transformers.GPT2LMHeadModel(model.config).eval()
    audit = audit_checkpoint(empty, (), kwargs, path)
    streamed = {(s.group, s.dim, s.parameters) for s in audit.symmetries if s.dim}
    assert streamed == {(s.group, s.dim, s.parameters) for s in found.symmetries if s.dim}
    assert "streamed" in audit.model["inputs"]
    assert all("twin" in s.note for s in audit.symmetries if s.dim)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model, kwargs = gpt2(2)
    path = tmp_path / "model.safetensors"
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, str(path))
    with torch.device("meta"):
        other = transformers.GPT2LMHeadModel(gpt2(3)[0].config).eval()
    with pytest.raises(CheckpointError, match=r"h\.2"):
        audit_checkpoint(other, (), kwargs, path)


def test_the_name_is_callable_however_it_was_imported() -> None:
    import parasym
    import parasym.audit as module

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert callable(parasym.audit)
    assert module(model, (x,)).completeness.nullity == parasym.audit(model, (x,)).completeness.nullity
