"""Large models: families of a small twin written down at full size, certified on the full weights, counted against the exact nullity."""

from __future__ import annotations

import copy
import itertools
import json
import sys
import weakref
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import parasym
from parasym.audit import Audit, audit_checkpoint
from parasym.core.checkpoint import TensorFile
from parasym.core.errors import CheckpointError, InputError
from parasym.core.graph import trace
from parasym.core.load import load_on_meta
from parasym.core.samples import flatten
from parasym.measure.collapse import weight_collapse
from parasym.symmetry import full
from parasym.symmetry.discrete import Candidate
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


def test_shards_are_streamed_as_one_checkpoint(tmp_path: Path) -> None:
    model, _ = gpt2(2)
    model.save_pretrained(tmp_path / "shards", max_shard_size="1KB")
    model.save_pretrained(tmp_path / "whole")
    index = next((tmp_path / "shards").glob("*.index.json"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) >= 2
    (alone,) = (tmp_path / "whole").glob("*.safetensors")
    sharded, whole = TensorFile(index), TensorFile(alone)
    assert sharded.header.keys() == whole.header.keys() == TensorFile(tmp_path / "shards").header.keys()
    for name in whole.header:
        assert torch.equal(sharded.rows(name)[:], whole.rows(name)[:]), name

    loaded = load_on_meta(str(tmp_path / "shards"), None)
    assert all(p.is_meta for p in loaded.model.parameters())
    found = audit_checkpoint(loaded.model, loaded.args, loaded.kwargs, tmp_path / "shards").to_dict()
    assert found["symmetries"] and found["completeness"]["explained"] == 1.0

    table = json.loads(index.read_text())
    for weight_map, said in (
        ({**table["weight_map"], "ghost": next(iter(table["weight_map"].values()))}, r"says that 'ghost' is in"),
        ({**table["weight_map"], "x": "missing.safetensors"}, r"names the shard missing.safetensors"),
        ({"x": "../outside.safetensors"}, r"not an index of safetensors shards"),
        (["x"], r"not an index of safetensors shards"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=said):
            TensorFile(tmp_path / "shards")
    index.unlink()
    with pytest.raises(CheckpointError, match=r"one .safetensors file or one index"):
        TensorFile(tmp_path / "shards")
    with pytest.raises(InputError, match=r"Streaming reads"):
        load_on_meta(str(tmp_path), None)
    with pytest.raises(CheckpointError, match=r"No such file"):
        load_on_meta(str(tmp_path / "none.safetensors"), "hf:GPT2Config")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model, kwargs = gpt2(2)
    path = tmp_path / "model.safetensors"
    save_file({n: p.detach().contiguous() for n, p in model.named_parameters()}, str(path))
    with torch.device("meta"):
        other = transformers.GPT2LMHeadModel(gpt2(3)[0].config).eval()
    with pytest.raises(CheckpointError, match=r"h\.2"):
        audit_checkpoint(other, (), kwargs, path)


# -- memory --------------------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A layer whose in-weights are a product of two factors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, width // 4, 2 * width, width)
        self.first, self.second, self.last = (nn.Linear(i, o, bias=False) for i, o in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(torch.tanh(self.second(self.first(nn.functional.rms_norm(x, x.shape[-1:], eps=1e-30)))))


class Stack(nn.Module):
    """A stream that rotates, read and written by many layers."""

    def __init__(self, layers: int, width: int = 256) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(2 * width, width, bias=False), nn.Linear(width, 3, bias=False)
        self.layers = nn.Sequential(*(Bottleneck(width) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.enter(x))
        return self.leave(nn.functional.rms_norm(x, x.shape[-1:], eps=1e-30))


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors alive, those that operators only read included."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves((args, kwargs, out)):
            if isinstance(t, Tensor):
                self._see(t.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.held.pop(key)


def streamed_peak(layers: int, folder: Path, monkeypatch: pytest.MonkeyPatch, eager: bool = False) -> tuple[int, int, Audit]:
    """Most bytes alive while the weights of a stack are measured, and the bytes of its checkpoint."""
    alive = Alive()

    def measured(entries: Any, read: Any, spaces: Any) -> Any:
        with alive:
            held = {n: read(n)[:].clone() for n in spaces.graph.params} if eager else {}
            return weight_collapse(entries, held.__getitem__ if eager else read, spaces)

    monkeypatch.setattr(sys.modules["parasym.audit"], "weight_collapse", measured)
    for module in ("slices", "copies", "heads"):
        monkeypatch.setattr(f"parasym.measure.{module}.CHUNK", 1 << 16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Stack(layers)
    path = folder / f"{layers}.safetensors"
    save_file({n: p.detach() for n, p in model.named_parameters()}, str(path))
    found = audit_checkpoint(model.to("meta").eval(), (torch.randn(2, 512),), None, path)
    return alive.peak, path.stat().st_size, found


def test_memory_of_a_streamed_audit_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shallow, small, _ = streamed_peak(3, tmp_path, monkeypatch)
    deep, large, found = streamed_peak(24, tmp_path, monkeypatch)
    groups = {s.group for s in found.symmetries}
    assert {"O(256)", "GL(64)", "S_512"} <= groups, groups  # one family that ties all tensors, and one of each layer
    assert large > 6 * small > 0
    assert deep - shallow < 0.03 * (large - small)  # positions of units, no weights
    assert deep < large / 4
    eager, large, _ = streamed_peak(24, tmp_path, monkeypatch, eager=True)
    assert eager > large  # the meter sees a reader that holds all weights


def test_rows_of_a_stored_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "a": torch.arange(24.0).reshape(4, 3, 2).bfloat16(),
        "b": torch.arange(5),
        "none": torch.zeros(0, 3),
        "one": torch.tensor(7.0),
    }
    save_file(tensors, str(path))
    file = TensorFile(path)
    for name, t in tensors.items():
        if t.dim():
            assert torch.equal(file.rows(name)[:], t) and file.rows(name)[:].dtype == t.dtype and file.rows(name).shape == t.shape
    for index in (slice(1, 3), slice(2, 9), slice(3, 1), slice(0, 4, 2), torch.tensor([2, 3, 0, 0]), torch.tensor([], dtype=torch.long)):
        assert torch.equal(file.rows("a")[index], tensors["a"][index])
    rows = file.rows("a")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="ends inside"):
        rows[:]


# -- certificates that can fail -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Still:
    """An action that leaves everything where it is, under the name of another."""

    of: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def act(self, params: Any, element: Tensor) -> dict[str, Tensor]:
        return {n: params[n].clone() for n in self.of.act(params, element)}


def plain() -> tuple[nn.Module, Tensor]:
    """More parameters than are counted exactly."""
    model = generic(nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)))
    return model, torch.randn(50, 20, generator=torch.Generator().manual_seed(0))


def full_size(model: nn.Module, x: Tensor, streamed: bool) -> FullSize:
    model = copy.deepcopy(model).to("meta") if streamed else model
    graph = trace(model, (x,), values=not streamed)
    batches = None if streamed else [flatten(graph, (x,), None)]
    return audit_full_size(model, (x,), None, graph, batches, torch.Generator().manual_seed(0), lambda stage, fraction: None)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_action_that_does_nothing_is_not_certified(streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"R+^40": "linear", "S_40": "discrete", "S_30": "discrete", "Z2^30": "discrete"}
    before = full_size(*plain(), streamed)
    assert groups.keys() <= {s.group for s in before.symmetries} and not before.search.undecided
    written, candidates, search, discrete = full.action_of, full.discrete_candidates, full.search, full.discrete_symmetries

    def still(c: Candidate) -> Candidate:
        return replace(c, action=Still(c.action), fallback=still(c.fallback) if c.fallback else None)  # type: ignore[arg-type]

    def searched(*args: Any, **kwargs: Any) -> Any:
        found = search(*args, **kwargs)
        found.symmetries = [replace(s, action=Still(s.action)) for s in found.symmetries]
        return found

    def listed(*args: Any) -> Any:
        found, *rest = discrete(*args)
        return [replace(s, action=Still(s.action)) for s in found], *rest

    if streamed:  # the twin's certificates stand for the model's
        monkeypatch.setattr(full, "search", searched)
        monkeypatch.setattr(full, "discrete_symmetries", listed)
    else:
        monkeypatch.setattr(full, "action_of", lambda entry, params: Still(written(entry, params)))
        monkeypatch.setattr(full, "discrete_candidates", lambda graph: [still(c) for c in candidates(graph)])
    after = full_size(*plain(), streamed)
    assert not after.symmetries and not after.search.refuted
    assert len(after.search.undecided) == len(before.symmetries)
    assert all("less than 1e-4" in r["why"] for r in after.search.undecided)


def test_an_exchange_of_units_that_are_all_equal_shows_nothing() -> None:
    model, x = plain()
    with torch.no_grad():
        model[0].weight[:], model[0].bias[:], model[2].weight[:] = model[0].weight[0], model[0].bias[0], model[2].weight[:, :1]
    found = full_size(model, x, False)
    assert "S_40" not in {s.group for s in found.symmetries} and "S_30" in {s.group for s in found.symmetries}
    assert [r["name"].partition(":")[0] for r in found.search.undecided] == ["exchange of 40 units"]


def test_running_statistics_go_with_their_channels() -> None:
    model = generic(nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 14, 3), nn.Flatten(), nn.Linear(56, 5)))
    with torch.no_grad():
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b.copy_(0.5 + torch.rand(b.shape, generator=torch.Generator().manual_seed(len(name))))
    found = full_size(model, torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0)), False)
    assert not found.search.refuted
    s = next(s for s in found.symmetries if s.group == "S_12")
    assert s.residual <= 1e-10 and "running statistics move with it" in s.note


def test_the_name_is_callable_however_it_was_imported() -> None:
    import parasym
    import parasym.audit as module

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert callable(parasym.audit)
    assert module(model, (x,)).completeness.nullity == parasym.audit(model, (x,)).completeness.nullity


def typed() -> nn.Module:
    """A BERT of one layer, whose second token type is read only where it is asked for."""
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9, max_position_embeddings=5,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0, pad_token_id=None, layer_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    return generic(transformers.BertModel(config, add_pooling_layer=False))


def test_a_row_that_no_input_reads_is_written_at_full_size() -> None:
    model, tokens = typed(), torch.randint(0, 11, (7, 5), generator=torch.Generator().manual_seed(0))
    found, nullity = at_full_size(model, {"input_ids": tokens})
    (row,) = [s for s in found.symmetries if s.parameters == ("embeddings.token_type_embeddings.weight",) and s.group == "R^12"]
    assert row.residual == 0.0
    assert found.search.undecided == []
    assert sum(s.dim for s in found.symmetries) == nullity
    mixed = (torch.arange(35).reshape(7, 5) % 2 == 0).long()  # and where the full model's inputs read it, it is not free
    found, _ = at_full_size(model, {"input_ids": tokens, "token_type_ids": mixed})
    assert not any(s.parameters == row.parameters and s.group == "R^12" for s in found.symmetries)


@pytest.mark.parametrize("widths", [(64, 64, 64, 64, 10), (40, 40, 40, 40, 40, 40)], ids=["a head of its own", "all alike"])
def test_equal_layers_have_each_family_once_and_every_exchange(widths: tuple[int, ...]) -> None:
    """Neighbours of equal width: no family is written twice, and the units between two layers that the twin merges are exchanged too."""
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b), nn.ReLU()]
    model = generic(nn.Sequential(*parts[:-1]))
    graph = trace(model, (torch.randn(8, widths[0]),))
    batches = [flatten(graph, (torch.randn(8, widths[0]),))]
    found = audit_full_size(
        model, (torch.randn(8, widths[0]),), None, graph, batches, torch.Generator().manual_seed(0), lambda stage, share: None
    )
    hidden = [(f"{2 * k}.weight", f"{2 * k}.bias", f"{2 * k + 2}.weight") for k in range(len(widths) - 2)]
    assert sorted(s.parameters for s in found.symmetries if s.dim) == sorted(hidden)
    assert sorted(s.parameters for s in found.symmetries if s.kind == "discrete") == sorted(hidden)
    assert sum(s.dim for s in found.symmetries) == sum(widths[1:-1])


def test_a_batch_of_one_image_is_explained_like_a_batch_of_many() -> None:
    """One sample with few outputs gives few equations; the twin draws as many as its rank takes."""
    model = generic(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
        )
    ).eval()  # fmt: skip
    one, many = (parasym.audit(model, args=(torch.randn(n, 3, 8, 8),)) for n in (1, 16))
    assert one.completeness.explained == many.completeness.explained == 1.0
    assert one.completeness.nullity == many.completeness.nullity == 3 * (16 + 24)  # conv weight, conv bias and ReLU, each against the norm
    assert one.undecided == []


@pytest.mark.parametrize("asked", [{}, {"use_cache": True}])
def test_a_transformers_model_is_traced_without_its_cache(asked: dict[str, bool]) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    assert model.config.use_cache
    graph = trace(model, (), {"input_ids": torch.randint(13, (2, 5)), **asked})
    assert len(graph.outputs) == 1  # the logits alone
    assert model.config.use_cache
    assert model(torch.randint(13, (2, 5))).past_key_values is not None


@pytest.mark.slow
def test_experts_behind_their_default_kernel_are_explained_in_closed_form() -> None:
    """Directions of two layers with four experts of 24 units, width 16: heads, units, gains, router and the turned stream."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    audit = parasym.audit(transformers.MixtralForCausalLM(config).eval(), kwargs={"input_ids": torch.randint(50, (2, 8))})
    layer = 2 * 4**2 + 4 + 4 + 4 * 24 + 16 + 16 + 16  # values, rotary turns and scales, units, two gains, router
    assert audit.completeness.nullity == 2 * layer + 16 + 16 * 15 // 2
    assert audit.completeness.explained == 1.0 and not audit.undecided and not audit.refuted
    assert sum(s.group == "S_24 wr S_4" for s in audit.symmetries) == 2
    assert sum(s.group == "S_4" and "experts" in "".join(s.parameters) for s in audit.symmetries) == 2


def test_what_the_full_model_refutes_is_not_counted_as_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 9))
    judged: list[float] = []

    def one_fails(*_: object) -> float:
        judged.append(1.0 if not judged else 1e-16)
        return judged[-1]

    monkeypatch.setattr("parasym.symmetry.full._joint_residual", one_fails)
    audit = parasym.audit(model, args=(torch.randn(8, 20),))
    assert len(judged) == 2 and len(audit.refuted) == 1
    assert audit.completeness.explained is not None and 0.3 < audit.completeness.explained < 0.7
