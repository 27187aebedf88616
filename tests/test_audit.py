"""The public front door: what an audit returns, that it changes nothing, and that large models are certified at full size."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parasym
from judge import in_float64, outputs
from known_answers import CASES, ConvBN, fresh, generic_
from test_known_answers_oracle import trainable

KEYS = {
    "schema", "parasym", "model", "symmetries", "refuted", "undecided", "approximate", "completeness", "classified", "collapse",
    "advice", "graph", "reasons",
}  # fmt: skip
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


def mlp() -> nn.Sequential:
    with fresh(0, torch.float32):
        return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def data(samples: int = 64, seed: int = 1) -> Tensor:
    return 2 * torch.randn(samples, 3, generator=torch.Generator().manual_seed(seed))


@functools.cache
def audited() -> parasym.Audit:
    return parasym.audit(mlp().eval(), (data(),))


def continuous(symmetries: Any) -> dict[str, int]:
    """Group -> dimension of the continuous families."""
    return {s.group: s.dim for s in symmetries if s.kind != "discrete"}


# --- what comes back ----------------------------------------------------------------------------------------------------


def test_to_dict_is_json() -> None:
    found = audited().to_dict()
    assert set(found) == KEYS
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["schema"] == 1
    assert again["parasym"] == parasym.__version__
    assert again["model"]["name"] == "Sequential"
    assert again["model"]["parameters"] == 3 * 6 + 6 + 6 * 4 + 4 + 4 * 3 + 3
    assert again["completeness"]["nullity"] == 6
    assert again["completeness"]["explained"] == 1.0
    assert again["completeness"]["exact"] is True
    keys = {"name", "group", "dim", "order", "kind", "parameters", "level", "residual", "certified", "where", "note", "fixed_set", "radius"}
    for s in again["symmetries"]:
        assert set(s) == keys
        assert s["certified"]
        assert s["residual"] <= 1e-10
        assert s["level"] == "function"


def test_what_is_found() -> None:
    found = audited()
    assert continuous(found.symmetries) == {"R+^6": 6}
    assert {s.group for s in found.symmetries if s.kind == "discrete"} >= {"S_6", "S_4", "Z2^4"}
    assert found.refuted == []
    assert found.undecided == []


def test_printed() -> None:
    text = str(audited())
    assert text.splitlines()[0].startswith("Sequential: 67 parameters")
    assert "nullity 6 (rank 61), explained 100.0%" in text
    assert "R+^6" in text
    assert len(text) < 4000


def test_a_page_is_written(tmp_path: Path) -> None:
    path = audited().to_html(tmp_path / "audit.html")
    page = path.read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "R+^6" in page or "R<sub>+</sub>" in page or "rescaling" in page


def test_every_parameter_is_classified_once() -> None:
    for found in (audited(), parasym.audit(nn.Linear(3, 2), (data(),))):
        counts = found.classified
        assert set(counts) == {"symmetric", "rigid", "undecided"}
        assert sum(counts.values()) == found.completeness.parameters
        assert all(n >= 0 for n in counts.values())


def test_progress_is_told() -> None:
    heard: list[tuple[str, float]] = []
    parasym.audit(nn.Linear(3, 2), (data(),), progress=lambda stage, share: heard.append((stage, share)))
    assert heard[0] == ("trace", 0.0)
    assert len({stage for stage, _ in heard}) >= 4
    assert all(0 <= share <= 1 for _, share in heard)


# --- reproducible, and nothing changes ------------------------------------------------------------------------------------


def test_the_seed_fixes_everything() -> None:
    first, again = (parasym.audit(mlp(), (data(),), seed=3).to_dict() for _ in range(2))
    assert json.dumps(first) == json.dumps(again)
    torch.manual_seed(77)
    assert json.dumps(parasym.audit(mlp(), (data(),), seed=3).to_dict()) == json.dumps(first)
    assert continuous(parasym.audit(mlp(), (data(),), seed=4).symmetries) == {"R+^6": 6}


@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_untouched(train: bool) -> None:
    with fresh(0, torch.float32):
        model = generic_(ConvBN())
    model.train(train)
    model.c2.eval()  # a mode of its own
    x = torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    model(x).sum().backward()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    objects = {n: id(p) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    kept, dtype = x.clone(), torch.get_default_dtype()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    streams = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    parasym.audit(model, (x,), loss_fn=lambda y: y.log_softmax(-1))
    parasym.symmetries(model, (x,))
    assert torch.equal(streams[0], torch.get_rng_state())
    assert streams[1] == np.random.get_state()[1].tolist()
    assert streams[2] == random.getstate()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is not None and torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())
    assert objects == {n: id(p) for n, p in model.named_parameters()}
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(x, kept)
    assert torch.get_default_dtype() == dtype


def test_an_action_leaves_the_model_alone() -> None:
    model = mlp()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    params = {n: p.detach() for n, p in model.named_parameters()}
    for s in parasym.audit(model, (data(),)).symmetries:
        s.act(params, s.random_element(torch.Generator().manual_seed(0)))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


# --- options ------------------------------------------------------------------------------------------------------------


def test_given_inputs_are_used_exactly() -> None:
    """On one half-line of inputs more is symmetric than on all: two given batches see that, and nothing is drawn beside them."""
    with fresh(0, torch.float32):
        model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
        nn.init.uniform_(model[0].weight, 0.5, 1.5)
    x = torch.linspace(0.1, 2, 30)[:, None]
    positive = parasym.audit(model, (x,), inputs=[(x,), (2 * x,)])
    assert positive.completeness.nullity == 9 - 2  # y = (V w) x: two numbers
    assert positive.model["inputs"] == "2 batches, as given"
    both = parasym.audit(model, (x,), inputs=[(x,), (-x,)])
    assert both.completeness.nullity == 9 - 2
    drawn = parasym.audit(model, (x,))
    assert drawn.model["inputs"].endswith("batches")
    assert drawn.completeness.exact


def test_inputs_decide_what_is_read() -> None:
    """A row of a table that no given token reads is free; drawn tokens read every row."""
    with fresh(0, torch.float32):
        model = nn.Sequential(nn.Embedding(6, 2), nn.Tanh(), nn.Linear(2, 3))
    tokens = torch.arange(40).reshape(10, 4).remainder(5)
    given = parasym.audit(model, (tokens,), inputs=[(tokens,)])
    drawn = parasym.audit(model, (tokens,))
    assert given.completeness.nullity - drawn.completeness.nullity == 2
    assert any(s.dim == 2 and s.parameters == ("0.weight",) for s in given.symmetries)


def test_a_loss_adds_its_own_symmetries() -> None:
    plain, loss = (parasym.audit(mlp().eval(), (data(),), loss_fn=f) for f in (None, lambda y: y.log_softmax(-1)))
    assert all(s.level == "function" for s in plain.symmetries)
    extra = [s for s in loss.symmetries if s.level == "loss"]
    assert sum(s.dim for s in extra) == 4 + 1  # one direction for each column of the readout, one for its bias
    assert all(s.certified and s.residual <= 1e-10 and s.note is not None for s in extra)
    assert {p for s in extra for p in s.parameters} == {"4.weight", "4.bias"}
    function = [s.to_dict() for s in loss.symmetries if s.level == "function"]
    assert function == [s.to_dict() for s in plain.symmetries]
    # the claim, on the module itself
    model = in_float64(mlp())
    params = trainable(model)
    before = outputs(model, params, (data(),)).reshape(-1, 3)
    for s in extra:
        after = outputs(model, s.act(params, s.random_element(torch.Generator().manual_seed(1))), (data(),)).reshape(-1, 3)
        assert float((after - before).abs().max()) > 1e-3
        assert torch.allclose(after.log_softmax(-1), before.log_softmax(-1), atol=1e-10)


def test_train_mode_batch_norm_gives_the_train_level() -> None:
    model, inputs = CASES["conv-bn-relu-train"].build()
    assert model.training
    found = parasym.audit(model, inputs[0], inputs=inputs)
    assert found.model["mode"] == "train"
    assert found.completeness.nullity == CASES["conv-bn-relu-train"].nullity
    assert {s.level for s in found.symmetries} == {"train"}
    model, inputs = CASES["conv-bn-relu-eval"].build()
    found = parasym.audit(model, inputs[0], inputs=inputs)
    assert found.model["mode"] == "eval"
    assert {s.level for s in found.symmetries} == {"function"}


def test_train_mode_without_batch_statistics_is_the_function() -> None:
    """A model as its constructor leaves it: dropout-free, norm-free, in train mode."""
    found = parasym.audit(mlp().train(), (data(),))
    assert found.model["mode"] == "train"
    assert {s.level for s in found.symmetries} == {"function"}


def test_discovery_alone_reads_no_weights() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    found = parasym.symmetries(model, (data(),))
    assert continuous(found) == {"R+^6": 6}
    assert {s.group for s in found if s.kind == "discrete"} >= {"S_6", "S_4", "Z2^4"}
    assert len(found) == len(list(found)) == len(found[:])
    assert all(p.device.type == "meta" for p in model.parameters())
    real = parasym.symmetries(mlp(), (data(),))
    assert continuous(real) == continuous(found)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_discovery_with_running_statistics(device: str) -> None:
    with fresh(0, torch.float32):
        model = ConvBN().eval()
    found = parasym.symmetries(model.to(device), (torch.randn(12, 2, 6, 6, generator=torch.Generator().manual_seed(0)),))
    assert sum(s.dim for s in found) == CASES["conv-bn-relu-eval"].nullity


def test_discovery_does_not_depend_on_the_weights() -> None:
    """A dead unit is a fact of a checkpoint, not of the architecture."""
    model = mlp()
    with torch.no_grad():
        model[0].bias[0] = -100
    assert continuous(parasym.symmetries(model, (data(),))) == {"R+^6": 6}
    found = parasym.audit(model, (data(),))
    assert found.completeness.nullity == 5 + 4 + 4  # what enters the unit, and what leaves it
    assert any(s.kind == "point" for s in found.symmetries)


# --- large models ---------------------------------------------------------------------------------------------------------


@functools.cache
def gpt() -> tuple[nn.Module, Tensor, parasym.Audit]:
    """A GPT-2 of three layers with norms and biases in general position, and its audit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=41, n_positions=12, n_embd=24, n_layer=3, n_head=3, n_inner=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    with fresh(0, torch.float32):
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() == 1:
                    p.normal_(1.0 if name.split(".")[-2].startswith("ln") and name.endswith("weight") else 0.0, 0.2)
                else:
                    p.normal_(0, 0.3)
        tokens = torch.randint(41, (4, 8))
    return model, tokens, parasym.audit(model, (tokens,))


@needs_transformers
def test_a_large_model_is_certified_layer_by_layer() -> None:
    model, _, found = gpt()
    assert (
        found.completeness.parameters
        == sum(p.numel() for p in model.parameters())
        > importlib.import_module("parasym.audit").EXACT_PARAMETERS
    )
    assert found.completeness.exact is False
    assert found.completeness.explained == 1.0
    assert found.model["twin"]
    assert all(s.certified and s.residual <= 1e-10 for s in found.symmetries)
    assert sum(found.classified.values()) == found.completeness.parameters
    names = dict(model.named_parameters())
    for layer in range(3):
        inside = f"transformer.h.{layer}."
        here = [s for s in found.symmetries if s.parameters and all(inside in p for p in s.parameters)]
        groups = [s.group for s in here]
        assert groups.count("GL(8)^3") == 2, groups  # queries against keys, values against the output
        assert sum(s.group == "R+^24" for s in here) == 2, groups  # both gains
        assert any(s.group == "S_40" for s in here), groups
        assert any(s.group == "S_3" for s in here), groups
    assert {p for s in found.symmetries for p in s.parameters} <= set(names)


@needs_transformers
def test_the_full_model_agrees() -> None:
    """A fresh element of every continuous family, on the transformers module itself."""
    model, tokens, found = gpt()
    wide = in_float64(model)
    params = trainable(wide)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        before = outputs(wide, params, (tokens,))
        for s in found.symmetries:
            if s.kind == "discrete":
                continue
            after = outputs(wide, s.act(params, s.random_element(generator, scale=0.1)), (tokens,))
            assert float((after - before).abs().max() / before.abs().max()) <= 1e-9, s


@needs_transformers
def test_a_large_model_on_the_meta_device() -> None:
    from transformers import GPT2LMHeadModel

    model, tokens, found = gpt()
    with torch.device("meta"):
        hollow = GPT2LMHeadModel(model.config).eval()
    there = parasym.symmetries(hollow, (tokens,))
    assert sorted((s.group, s.parameters) for s in there if s.kind != "discrete") == sorted(
        (s.group, s.parameters) for s in found.symmetries if s.kind != "discrete"
    )


@pytest.mark.slow
def test_the_count_of_a_large_model_can_be_forced() -> None:
    with fresh(0, torch.float32):
        model = nn.Sequential(nn.Linear(20, 50, bias=False), nn.ReLU(), nn.Linear(50, 12, bias=False))
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    twin, exact = (parasym.audit(model, (x,), completeness=c) for c in ("auto", "exact"))
    assert (twin.completeness.exact, exact.completeness.exact) == (False, True)
    assert exact.completeness.nullity == 50
    assert continuous(twin.symmetries) == continuous(exact.symmetries) == {"R+^50": 50}


def test_a_repeated_audit_of_a_changed_model_sees_the_change() -> None:
    model = mlp()
    parasym.audit(model, (data(),))
    with torch.no_grad():
        model[0].bias[0] = -100
    assert parasym.audit(model, (data(),)).completeness.nullity == 13
