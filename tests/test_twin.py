"""Twins: the same operators at small widths, made from a configuration or by rewriting the operator graph."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parasym.core.graph import trace
from parasym.core.samples import draw
from parasym.symmetry.spaces import find_spaces
from parasym.symmetry.twin import Twin, TwinError, atom_map, difference, find_twin, make_twin, spelled_out

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


def check(twin: Twin, budget: int = 1500) -> None:
    """What holds for every twin."""
    assert sum(p.numel() for p in twin.graph.params.values()) <= budget
    assert all(p.dtype == torch.float64 and p.device.type == "cpu" for p in twin.graph.params.values())
    out = twin.graph(twin.graph.params, twin.data)
    assert out.dtype == torch.float64 and bool(torch.isfinite(out).all())
    assert set(twin.names.values()) == set(twin.graph.params)


# --- from a configuration ----------------------------------------------------------------------------------------------------


def hf(name: str, head: str, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{name}{head}")(getattr(transformers, f"{name}Config")(**config)).eval()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False  # type: ignore[union-attr]
    return model


def tokens(vocab: int = 1000, batch: int = 2, length: int = 16) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(0))}


LLAMA = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, str, dict[str, Any], tuple[str, int, int]]] = {
    # class, head, configuration; a container of layers with how many the model and the twin have
    "gpt2": ("GPT2", "LMHeadModel", {}, ("transformer.h", 12, 2)),
    "bert": ("Bert", "Model", {}, ("encoder.layer", 12, 2)),
    "llama-1b": ("Llama", "ForCausalLM", LLAMA, ("model.layers", 16, 2)),
    "t5-encoder": ("T5", "EncoderModel", {}, ("encoder.block", 6, 2)),
    "falcon-7b": ("Falcon", "ForCausalLM", {"num_hidden_layers": 4}, ("transformer.h", 4, 2)),
    "bloom": ("Bloom", "ForCausalLM", {"hidden_size": 1024, "n_layer": 6, "n_head": 16}, ("transformer.h", 6, 2)),
    "gpt-neox": ("GPTNeoX", "ForCausalLM", {"num_hidden_layers": 4}, ("gpt_neox.layers", 4, 1)),
    "roberta": ("Roberta", "Model", {"num_hidden_layers": 3}, ("encoder.layer", 3, 2)),
    "gemma3": ("Gemma3TextModel", "", {}, ("layers", 26, 2)),
    "mixtral": ("Mixtral", "ForCausalLM", {"num_hidden_layers": 4}, ("model.layers", 4, 2)),
}


def config_case(name: str) -> tuple[nn.Module, dict[str, Tensor], tuple[str, int, int]]:
    cls, head, config, repeat = CONFIGS[name]
    if cls.startswith("Gemma3"):
        transformers = pytest.importorskip("transformers")
        with torch.device("meta"):
            model: nn.Module = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**config)).eval()
        model.config.use_cache = False  # type: ignore[union-attr]
        return model, tokens(), repeat
    return hf(cls, head, **config), tokens(), repeat


@needs_transformers
@pytest.mark.parametrize("name", CONFIGS)
def test_a_configured_language_model_on_the_meta_device(name: str) -> None:
    model, kwargs, (container, before, after) = config_case(name)
    twin = make_twin(model, (), kwargs)
    check(twin)
    assert twin.repeats[container] == (before, after)
    assert set(twin.names) == {n for n, _ in model.named_parameters()}
    last = next(n for n in twin.names if n.startswith(f"{container}.{before - 1}."))
    assert twin.layer_of(last) == (before - 1,)
    assert twin.names[last].startswith(f"{container}.")


@needs_transformers
@pytest.mark.parametrize("name", ["gpt2", "llama-1b", "bert"])
def test_every_axis_has_the_structure_of_its_counterpart(name: str) -> None:
    model, kwargs, _ = config_case(name)
    twin = make_twin(model, (), kwargs)
    full = find_spaces(trace(model, (), {k: v.to("meta") for k, v in kwargs.items()}, values=False))
    small = find_spaces(twin.graph)
    good, bad = atom_map(full, small, twin)
    assert bad == {}
    assert set(good) == set(full.graph.params)
    for parameter, axes in good.items():
        blocks = [small.blocks(twin.names[parameter], i) for i in range(len(axes))]
        assert [[len(b) for b in axis] for axis in axes] == [[len(b.atoms) for b in axis] for axis in blocks]


@needs_transformers
def test_grouped_queries_and_rotary_planes_survive() -> None:
    model, kwargs, _ = config_case("llama-1b")
    config = make_twin(model, (), kwargs).model.config  # type: ignore[union-attr]
    assert config.num_attention_heads // config.num_key_value_heads >= 2
    assert config.num_key_value_heads >= 2
    assert config.head_dim >= 4
    assert config.vocab_size > config.hidden_size
    assert config.tie_word_embeddings


@needs_transformers
@pytest.mark.parametrize("name", ["ViT", "ConvNext", "ResNet", "RegNet", "Segformer", "Swin"])
def test_a_configured_image_model_on_the_meta_device(name: str) -> None:
    model = hf(name, "ForImageClassification")
    twin = make_twin(model, (), {"pixel_values": torch.randn(2, 3, 224, 224)})
    check(twin)
    assert twin.data[0].shape[-1] <= 33
    assert set(twin.names) == {n for n, _ in model.named_parameters()}


@needs_transformers
def test_every_stage_counts_its_layers() -> None:
    model = hf("ResNet", "ForImageClassification", depths=[2, 3, 2, 2])
    twin = make_twin(model, (), {"pixel_values": torch.randn(2, 3, 224, 224)})
    for stage, depth in enumerate([2, 3, 2, 2]):
        for layer in range(depth):
            assert twin.layer_of(f"resnet.encoder.stages.{stage}.layers.{layer}.layer.0.convolution.weight") == (stage, layer)


@needs_transformers
def test_every_unit_of_a_kinked_activation_is_seen_on_both_sides() -> None:
    model = hf("ResNet", "ForImageClassification")
    twin = make_twin(model, (), {"pixel_values": torch.randn(2, 3, 224, 224)})
    graph, generator = twin.graph, torch.Generator().manual_seed(0)
    relus = [n.all_input_nodes[0].name for n in graph.nodes if "relu" in str(n.target)]
    batches = [draw(graph, twin.data, generator, wide=True) for _ in range(4)]
    seen = zip(*(graph.replay(graph.params, graph.prepare(b), relus) for b in batches), strict=True)
    shares = [(torch.cat(x) > 0).to(torch.float64).mean((0, 2, 3)) for x in seen]
    assert len(shares) > 10
    assert min(float(torch.minimum(s, 1 - s).min()) for s in shares) > 0.02


@needs_transformers
def test_a_configured_speech_model_on_the_meta_device() -> None:
    model = hf("Whisper", "ForConditionalGeneration")
    kwargs = {"input_features": torch.randn(2, 80, 3000), "decoder_input_ids": tokens()["input_ids"]}
    twin = make_twin(model, (), kwargs)
    check(twin)
    assert set(twin.names) == {n for n, p in model.named_parameters() if p.requires_grad}


@needs_transformers
def test_fused_experts_are_spelled_out_and_put_back() -> None:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = hf("Mixtral", "ForCausalLM", vocab_size=50, **small)
    before = model.config._experts_implementation  # type: ignore[union-attr]
    kwargs = {k: v % 50 for k, v in tokens().items()}
    graph = trace(model, (), kwargs, values=False)
    assert find_spaces(graph).unknown  # the control: what stands in the way
    spelled = spelled_out(model, (), kwargs, graph)
    assert not find_spaces(spelled).unknown
    assert spelled.params.keys() == graph.params.keys()
    assert model.config._experts_implementation == before  # type: ignore[union-attr]
    dense = hf("GPT2", "LMHeadModel", n_layer=1)
    plain = trace(dense, (), tokens(), values=False)
    assert spelled_out(dense, (), tokens(), plain) is plain


class Logits(nn.Module):
    """A configured model inside a module of the user's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return out


@needs_transformers
def test_a_configured_model_inside_another_module() -> None:
    model = Logits(hf("GPT2", "LMHeadModel", n_layer=3))
    twin = make_twin(model, (tokens()["input_ids"],))
    check(twin)
    assert twin.repeats == {"model.transformer.h": (3, 2)}
    assert twin.names["model.transformer.h.2.ln_1.weight"] == "model.transformer.h.1.ln_1.weight"


# --- from the operator graph -------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm attention block whose scale does not depend on its width."""

    def __init__(self, width: int, heads: int, each: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.each = heads, each
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * heads * each), nn.Linear(heads * each, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.view(b, t, self.heads, self.each).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(self.heads * self.each, 2))
        scores = (q @ k.transpose(-2, -1) / 4.0).masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A language model without a configuration; the head is tied."""

    def __init__(self, vocab: int, positions: int, width: int, heads: int, each: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(vocab, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, each, hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Basic(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, inside: int, hidden: int, outside: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inside, hidden, 3, stride, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.norm2 = nn.Conv2d(hidden, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nn.Module):
    """ResNet-18 as in torchvision."""

    def __init__(self, channels: int, widths: tuple[int, ...], labels: int, kernel: int = 7) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, widths[0], kernel, 2, kernel // 2, bias=False), nn.BatchNorm2d(widths[0])
        pairs = list(pairwise(widths))
        self.stages = nn.ModuleList(
            nn.Sequential(Basic(a, b, b, 1 if i == 0 else 2, i > 0), Basic(b, b, b, 1, False)) for i, (a, b) in enumerate(pairs)
        )
        self.head = nn.Linear(widths[-1], labels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 2, 1)
        for stage in self.stages:
            x = stage(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def vgg(channels: int, a: int, b: int, c: int, dense: int, labels: int, side: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(c * side * side, dense), nn.ReLU(),
        nn.Dropout(), nn.Linear(dense, labels),
    )  # fmt: skip


def double(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU())


class UNet(nn.Module):
    """Two levels, concatenated skips."""

    def __init__(self, channels: int, a: int, b: int, c: int, up1: int, d: int, up2: int, e: int) -> None:
        super().__init__()
        self.one, self.two, self.three = double(channels, a), double(a, b), double(b, c)
        self.up1, self.four = nn.ConvTranspose2d(c, up1, 2, 2), double(up1 + b, d)
        self.up2, self.five = nn.ConvTranspose2d(d, up2, 2, 2), double(up2 + a, e)
        self.head = nn.Conv2d(e, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        b = self.two(F.max_pool2d(a, 2))
        x = self.four(torch.cat([self.up1(self.three(F.max_pool2d(b, 2))), b], 1))
        return self.head(self.five(torch.cat([self.up2(x), a], 1)))


class Recurrent(nn.Module):
    """An LSTM read at its last step."""

    def __init__(self, vocab: int, width: int, hidden: int, labels: int) -> None:
        super().__init__()
        self.table, self.lstm, self.head = (
            nn.Embedding(vocab, width),
            nn.LSTM(width, hidden, 2, batch_first=True),
            nn.Linear(hidden, labels),
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids))[0][:, -1])


class Bare(nn.Module):
    """Parameters without modules."""

    def __init__(self, inside: int, hidden: int, labels: int) -> None:
        super().__init__()
        self.up, self.bias, self.down = (nn.Parameter(torch.randn(*s)) for s in ((inside, hidden), (hidden,), (hidden, labels)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up + self.bias) @ self.down


def mlp(*widths: int) -> nn.Module:
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


Shape = Callable[[str], torch.Size]


def small_resnet(s: Shape) -> nn.Module:
    first = s("conv.weight")
    widths = (first[0], *(s(f"stages.{i}.1.conv2.weight")[0] for i in range(4)))
    return ResNet18(first[1], widths, s("head.weight")[0], first[2])


PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[Shape], nn.Module]]] = {
    # the model; an input; the same class at the sizes of the twin
    "mlp": (
        lambda: mlp(784, 256, 128, 10), lambda: torch.randn(4, 784),
        lambda s: mlp(s("0.weight")[1], *(s(f"{i}.weight")[0] for i in (0, 2, 4))),
    ),
    "bare": (lambda: Bare(64, 100, 10), lambda: torch.randn(4, 64), lambda s: Bare(*s("up"), s("down")[1])),
    "gpt": (
        lambda: GPT(500, 32, 64, 4, 16, 256, 5), lambda: torch.randint(0, 500, (2, 16)),
        lambda s: GPT(
            s("table.weight")[0], s("places.weight")[0], s("table.weight")[1], 2, s("blocks.0.out.weight")[1] // 2,
            s("blocks.0.up.weight")[0], 2,
        ),
    ),
    "resnet18": (lambda: ResNet18(3, (64, 64, 128, 256, 512), 1000), lambda: torch.randn(2, 3, 64, 64), small_resnet),
    "vgg": (
        lambda: vgg(3, 64, 128, 256, 512, 100, 4), lambda: torch.randn(2, 3, 32, 32),
        lambda s: vgg(
            s("0.weight")[1], s("0.weight")[0], s("3.weight")[0], s("6.weight")[0], s("10.weight")[0], s("13.weight")[0],
            round((s("10.weight")[1] / s("6.weight")[0]) ** 0.5),
        ),
    ),
    "unet": (
        lambda: UNet(3, 32, 64, 128, 64, 64, 32, 32), lambda: torch.randn(2, 3, 32, 32),
        lambda s: UNet(
            s("one.0.weight")[1], s("one.0.weight")[0], s("two.0.weight")[0], s("three.0.weight")[0], s("up1.weight")[1],
            s("four.0.weight")[0], s("up2.weight")[1], s("five.0.weight")[0],
        ),
    ),
    "lstm": (
        lambda: Recurrent(1000, 64, 128, 5), lambda: torch.randint(0, 1000, (2, 6)),
        lambda s: Recurrent(*s("table.weight"), s("lstm.weight_hh_l0")[1], s("head.weight")[0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_a_rewritten_graph_is_the_model_built_at_those_sizes(name: str) -> None:
    torch.manual_seed(0)
    build, draw, rebuild = PLAIN[name]
    model, x = build().eval(), draw()
    twin = make_twin(model, (x,))
    check(twin)
    assert difference(twin.graph, twin.graph) is None
    small = rebuild(lambda n: twin.graph.params[twin.names[n]].shape).to(torch.float64).eval()
    state = {**twin.graph.params, **{n: twin.graph.params[twin.graph.aliases[n]] for n in twin.graph.aliases}}
    with torch.no_grad():
        for n, p in small.named_parameters():
            p.copy_(state[n])
        for n, b in small.named_buffers():
            if "running" in n:
                b.copy_(twin.graph.buffers["b_" + n.replace(".", "_")])
        expected = small(*twin.data)
    torch.testing.assert_close(twin.graph(twin.graph.params, twin.data), expected.reshape(-1), rtol=1e-12, atol=1e-12)


def test_layers_beyond_the_twin_share_its_last_one() -> None:
    twin = make_twin(GPT(500, 32, 64, 4, 16, 256, 5).eval(), (torch.randint(0, 500, (2, 16)),))
    assert twin.repeats == {"blocks": (5, 2)}
    for layer in range(5):
        name = f"blocks.{layer}.qkv.weight"
        assert twin.names[name] == f"blocks.{min(layer, 1)}.qkv.weight"
        assert twin.layer_of(name) == (layer,)
    assert twin.layer_of("norm.weight") == ()
    assert twin.graph.aliases["head.weight"] == "table.weight"


def test_alternating_layers_keep_one_of_each_kind() -> None:
    class Even(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + F.relu(super().forward(x))

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(super().forward(x))

    model = nn.Sequential(*(kind(32, 32) for _ in range(4) for kind in (Even, Odd)))
    twin = make_twin(model, (torch.randn(3, 32),))
    check(twin)
    assert [int(twin.names[f"{i}.weight"].split(".")[0]) for i in range(8)] == [0, 1, 2, 3, 2, 3, 2, 3]


def test_mtcnn_keeps_the_order_of_its_flattened_axes() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    try:
        import mtcnn
    finally:
        sys.path.pop(0)
    for target in (mtcnn.rnet, mtcnn.onet):
        model, args = target()
        twin = make_twin(model, args)
        check(twin)
        full, small = find_spaces(trace(model, args)), find_spaces(twin.graph)
        assert atom_map(full, small, twin)[1] == {}


def test_frozen_parameters_stay_frozen() -> None:
    model = mlp(64, 100, 80, 10)
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    twin = make_twin(model, (torch.randn(4, 64),))
    assert "0.weight" not in twin.graph.params
    assert "0.bias" in twin.graph.params


# --- when there is none ------------------------------------------------------------------------------------------------------


def test_no_twin_within_the_budget() -> None:
    model, x = mlp(64, 100, 80, 10), torch.randn(4, 64)
    assert find_twin(model, (x,), budget=10) is None
    with pytest.raises(TwinError, match="10 allowed"):
        make_twin(model, (x,), budget=10)


def test_constants_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = GPT(500, 32, 64, 4, 16, 256, 2)
    with pytest.raises(TwinError, match="no values on the meta device"):
        make_twin(model, (torch.randint(0, 500, (2, 16)),))


def test_another_activation_is_another_architecture() -> None:
    x = torch.randn(4, 6)
    relu, gelu = (trace(nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 2)), (x,)) for act in (nn.ReLU(), nn.GELU()))
    narrow = trace(nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 2)), (x,))
    assert difference(relu, relu) is None
    assert "another operator" in str(difference(relu, gelu))
    assert "became 1" in str(difference(relu, narrow))


def test_a_kernel_that_meets_only_padding_is_another_architecture() -> None:
    model = nn.Conv2d(2, 3, 5, padding=2)
    big, small = (trace(model, (torch.randn(4, 2, s, s),)) for s in (9, 2))
    assert "padding" in str(difference(big, small))


def test_the_model_and_the_random_state_are_left_alone() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4)).train()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    x, state = torch.randn(6, 16), torch.get_rng_state()
    first, second = make_twin(model, (x,)), make_twin(model, (x,))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(torch.equal(p, second.graph.params[n]) for n, p in first.graph.params.items())


def test_an_exported_program_serves_too() -> None:
    model, x = mlp(64, 100, 80, 10), torch.randn(4, 64)
    twin = make_twin(torch.export.export(model, (x,)), (x,))  # type: ignore[arg-type]
    check(twin)
    assert set(twin.names) == {n for n, _ in model.named_parameters()}


def test_the_weights_drawn_leave_no_unit_dead_or_always_on() -> None:
    twin = make_twin(mlp(784, 256, 128, 10), (torch.randn(4, 784),))
    x = torch.randn(300, twin.data[0].shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in (0, 2):
        x = x @ twin.graph.params[f"{layer}.weight"].T + twin.graph.params[f"{layer}.bias"]
        share = (x > 0).to(torch.float64).mean(0)
        assert float(share.min()) > 0.05
        assert float(share.max()) < 0.95
        x = x.relu()
