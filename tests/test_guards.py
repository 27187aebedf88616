"""Measuring never changes a model or a random stream; a model as a pure function; refusals that say what, where and what to do."""

import copy
import json
import logging
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from parasym.core import guards
from parasym.core.errors import InputError, NonDeterministicError
from parasym.core.functional import float_outputs, functional
from parasym.core.guards import blas_threads, check_deterministic, float64_casts, math_attention, preserve, rng_state
from parasym.core.results import Estimate, plain


def streams() -> tuple:
    """The state of every global generator, as comparable data."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()


def fingerprint(model: nn.Module) -> dict:
    """Everything a measurement must leave alone."""
    return {
        "values": {n: (id(t), t.detach().clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        "grads": {n: (id(p.grad), None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "keys": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


def same(a: dict, b: dict) -> bool:
    def equal(x: object, y: object) -> bool:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return torch.equal(x, y)
        if isinstance(x, tuple) and isinstance(y, tuple):
            return all(equal(i, j) for i, j in zip(x, y, strict=True))
        return x == y

    return all(a[k].keys() == b[k].keys() and all(equal(a[k][n], b[k][n]) for n in a[k]) for k in a)


def mixed_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.1)))
    model[3].eval()
    model[0].bias.requires_grad_(False)
    model(torch.randn(5, 4)).sum().backward()
    return model


# ------------------------------------------------------------------------------------------------------------------- preserve


@pytest.mark.parametrize("fails", [False, True])
def test_preserve_restores_everything(fails: bool) -> None:
    model = mixed_model()
    before, rng = fingerprint(model), streams()

    def disturb() -> None:
        with preserve(model):
            assert all(p.grad is None for p in model.parameters())
            model.train()
            model[0].bias.requires_grad_(True)
            model(torch.randn(5, 4)).sum().backward()
            model[1].running_mean = torch.zeros(6)
            model[1].running_var.mul_(2)
            np.random.rand(3), random.random()
            if fails:
                raise KeyError("stop")

    if fails:
        with pytest.raises(KeyError):
            disturb()
    else:
        disturb()
    assert same(before, fingerprint(model))
    assert rng == streams()


def test_preserve_keeps_a_graph_recorded_before() -> None:
    model = nn.BatchNorm1d(3).eval()
    x = torch.randn(5, 3)
    loss = (model(x) * model.running_var).sum()  # saves running_var for the backward pass
    with preserve(model):
        model.train()(x)
    loss.backward()
    assert model.weight.grad is not None


def test_without_preserve_the_same_block_does_change_the_model() -> None:
    model = mixed_model()
    before, rng = fingerprint(model), streams()
    model.train()(torch.randn(5, 4)).sum().backward()
    assert not same(before, fingerprint(model))
    assert rng != streams()


# ----------------------------------------------------------------------------------------------------------- kernels and casts


def test_math_attention_gives_forward_and_second_derivatives() -> None:
    q = torch.randn(1, 2, 5, 4)

    def tangent() -> torch.Tensor:
        return torch.func.jvp(lambda x: F.scaled_dot_product_attention(x, x, x), (q,), (torch.ones_like(q),))[1]

    def second() -> torch.Tensor:
        leaf = q.clone().requires_grad_()
        (g,) = torch.autograd.grad(F.scaled_dot_product_attention(leaf, leaf, leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(g.sum(), leaf)[0]

    with math_attention():
        assert torch.isfinite(tangent()).all()
        assert torch.isfinite(second()).all()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises((RuntimeError, NotImplementedError)):  # control
        tangent()


def test_math_attention_restores_the_fused_path() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    with math_attention():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


CASTS = {
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "to": lambda x: x.to(torch.float32),
    "to keyword": lambda x: x.to(dtype=torch.bfloat16),
    "to device dtype": lambda x: x.to("cpu", torch.float16),
    "to other": lambda x: x.to(torch.zeros(1, dtype=torch.float64).new_empty(1)),
    "type": lambda x: x.type(torch.float32),
    "type name": lambda x: x.type("torch.FloatTensor"),
    "softmax": lambda x: F.softmax(x, -1, dtype=torch.float32),
    "tensor softmax": lambda x: x.softmax(-1, dtype=torch.float32),
    "sum": lambda x: x.sum(dtype=torch.float32),
    "zeros": lambda x: torch.zeros(3, dtype=torch.float16),
    "default": lambda x: torch.zeros(3),
    "integers": lambda x: torch.arange(3).float(),
    "aten cast": lambda x: torch.ops.aten._to_copy.default(x, dtype=torch.float32),
    "aten to": lambda x: torch.ops.aten.to.dtype(x, torch.bfloat16),
}


@pytest.mark.parametrize("name", CASTS)
def test_float64_casts(name: str) -> None:
    x = torch.randn(4, dtype=torch.float64)
    with float64_casts():
        assert CASTS[name](x).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_float64_casts_keeps_digits_where_the_plain_forward_loses_them() -> None:
    x = torch.randn(50, dtype=torch.float64)

    def forward() -> torch.Tensor:
        return F.softmax(x, -1, dtype=torch.float32).type_as(x)

    with float64_casts():
        exact = forward()
    assert torch.equal(exact, F.softmax(x, -1))
    assert (forward() - exact).abs().max() > 1e-10  # control: outside the block the cast bites


def test_float64_casts_leaves_narrow_examples_bits_and_integers_alone() -> None:
    narrow, x = torch.zeros(1), torch.randn(2, dtype=torch.float64)
    with float64_casts():
        assert x.type_as(narrow).dtype == torch.float64
        assert x.to(narrow).dtype == torch.float64
        assert x.to(tensor=narrow).dtype == torch.float64
        assert x.to(torch.int64).dtype == torch.int64
        assert x.view(torch.float32).shape == (4,)
        assert x.to(torch.complex64).dtype == torch.complex128


def test_blas_threads_limits_and_releases() -> None:
    from threadpoolctl import threadpool_info, threadpool_limits

    def pools() -> list[int]:
        return [p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"]

    with threadpool_limits(2, user_api="blas"):
        before = pools()
        assert 2 in before
        with blas_threads(1):
            assert set(pools()) == {1}
        assert pools() == before


def test_blas_threads_without_the_package(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "threadpoolctl", None)
    monkeypatch.setattr(guards, "_warned", False)
    with caplog.at_level(logging.WARNING, "parasym"):
        for _ in range(2):
            with blas_threads(1):
                pass
    assert [r.message for r in caplog.records if "threadpoolctl" in r.message].__len__() == 1


# ---------------------------------------------------------------------------------------------------------------- determinism


def test_deterministic_returns_the_first_result_and_leaves_the_streams() -> None:
    rng = streams()
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(check_deterministic(lambda: model(x)), model(x))
    torch.manual_seed(1)
    rng = streams()
    check_deterministic(lambda: torch.tensor(float("nan")))  # NaN twice is the same answer
    assert rng == streams()


def test_dropout_is_named_with_its_size() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.Tanh(), nn.Dropout(0.5)), nn.Linear(8, 2))
    x = torch.randn(4, 3)
    before, rng = fingerprint(model), streams()
    with pytest.raises(NonDeterministicError, match=r"differ by \d.*outputs: 1\.1 \(Dropout\).*1\.1 \(Dropout, p=0\.5\).*eval\(\)"):
        check_deterministic(lambda: model(x))
    assert same(before, fingerprint(model))
    assert rng == streams()
    check_deterministic(lambda: model.eval()(x))  # control


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) + 0.1 * torch.randn_like(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[0] += 1
        return x * self.calls[0]


@pytest.mark.parametrize("part", [Noisy, Counting])
def test_noise_and_state_no_list_knows_are_located(part: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), part(), nn.Linear(3, 1)).eval()
    x = torch.randn(4, 3)
    with pytest.raises(NonDeterministicError, match=rf"outputs: 1 \({part.__name__}\)"):
        check_deterministic(lambda: model(x))


def test_rates_kept_as_numbers_are_named() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
    with pytest.raises(NonDeterministicError, match=r"self_attn \(MultiheadAttention, dropout=0\.2\)"):
        check_deterministic(lambda: model(torch.ones(2, 3, 8)))


def test_batch_norm_statistics_do_not_count_as_noise_nor_leak() -> None:
    model = nn.BatchNorm1d(3)
    before = fingerprint(model)
    check_deterministic(lambda: model(torch.arange(12.0).reshape(4, 3)))
    assert same(before, fingerprint(model))


@pytest.mark.parametrize(
    ("results", "match"),
    [
        ([torch.zeros(2), torch.zeros(3)], "in structure or shape"),
        ([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}], "in structure or shape"),
        ([torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])], "differ by"),
        ([torch.tensor([1, 2]), torch.tensor([1, 3])], "differ by"),
    ],
)
def test_other_disagreements(results: list, match: str) -> None:
    values = iter(results)
    with pytest.raises(NonDeterministicError, match=match):
        check_deterministic(lambda: next(values))


def test_rounding_is_admitted() -> None:
    values = iter([torch.ones(3), torch.ones(3) + 1e-6])
    check_deterministic(lambda: next(values))


def test_rng_state_alone() -> None:
    before = streams()
    with rng_state():
        torch.rand(3), np.random.rand(2), random.random()
    assert before == streams()


# ----------------------------------------------------------------------------------------------------------------- functional


def test_functional_agrees_with_the_model_and_is_pure() -> None:
    model = mixed_model().eval()
    x = torch.randn(5, 4)
    f = functional(model)
    before = fingerprint(model)
    (y,) = f(f.params, (x,))
    assert torch.equal(y, model(x))
    moved = {n: p + 0.1 for n, p in f.params.items()}
    assert not torch.equal(f(moved, x)[0], y)
    assert torch.equal(f({"0.bias": moved["0.bias"]}, x)[0], f({**f.params, "0.bias": moved["0.bias"]}, x)[0])
    assert same(before, fingerprint(model))
    assert f.frozen == {"0.bias"}


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)]
)
def test_train_mode_statistics_do_not_leak_even_under_vmap(norm: nn.Module) -> None:
    norm.train()
    x = torch.randn(3, 4, 5)
    f = functional(norm)
    before = fingerprint(norm)
    (y,) = f(f.params, x)
    assert same(before, fingerprint(norm))
    ys = torch.func.vmap(lambda p: f(p, x)[0])({n: torch.stack([p, 2 * p]) for n, p in f.params.items()})
    assert torch.allclose(ys[1], 2 * y, atol=1e-6)
    assert same(before, fingerprint(norm))
    assert torch.allclose(copy.deepcopy(norm)(x), y)


def test_train_mode_statistics_of_batched_activations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    x = torch.randn(6, 3)
    f = functional(model)
    ws = torch.stack([model[0].weight.detach(), torch.randn(4, 3)])
    ys = torch.func.vmap(lambda w: f({"0.weight": w}, x)[0])(ws)
    assert torch.allclose(ys[1], f({"0.weight": ws[1]}, x)[0], atol=1e-6)
    with pytest.raises(RuntimeError):  # control: the plain functional call writes its statistics
        torch.func.vmap(lambda w: torch.func.functional_call(model, {"0.weight": w}, (x,)))(ws)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return x * self.w * self.calls


def test_buffers_written_in_place_do_not_leak() -> None:
    model = InPlace()
    f = functional(model)
    first, second = (f(None, torch.ones(2))[0] for _ in range(2))
    assert torch.equal(first, second)
    assert model.calls.item() == 0


class Rebinding(nn.Module):
    """Keeps an activation, replaces a buffer, adds an attribute, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))
        self.last = None

    def forward(self, x: torch.Tensor, fail: bool = False) -> torch.Tensor:
        self.seen = self.seen + 1
        self.seen += 1
        self.last, self.extra = x, 1
        self.train()
        if fail:
            raise ValueError("on demand")
        return x * self.w


@pytest.mark.parametrize("fail", [False, True])
def test_attributes_buffers_and_mode_are_put_back(fail: bool) -> None:
    model = Rebinding().eval()
    f = functional(model)
    before = fingerprint(model)
    if fail:
        with pytest.raises(InputError, match="on demand"):
            f(f.params, torch.ones(3), {"fail": True})
    else:
        f(f.params, torch.ones(3))
    assert same(before, fingerprint(model))
    assert model.last is None


def test_lstm_weights_take_part_and_its_flat_list_is_put_back() -> None:
    model = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    f = functional(model)
    y = model(x)[0]
    assert not torch.equal(f({n: 2 * p for n, p in f.params.items()}, x)[0], y)
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
    assert torch.equal(model(x)[0], y)


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.back = nn.Linear(5, 3, bias=False)
        if how == "object":
            self.head.weight = self.emb.weight
        elif how == "memory":
            self.head.weight = nn.Parameter(self.emb.weight.data)
        elif how == "transpose":
            self.back.weight = nn.Parameter(self.emb.weight.data.t())
        elif how == "overlap":
            self.back.weight = nn.Parameter(self.emb.weight.data.reshape(-1)[:15].view(3, 5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.back(self.head(self.emb(ids))))


@pytest.mark.parametrize(("how", "alias"), [("object", "head.weight"), ("memory", "head.weight"), ("transpose", "back.weight")])
def test_ties_are_one_parameter(how: str, alias: str) -> None:
    model = Tied(how)
    ids = torch.tensor([0, 3])
    f = functional(model)
    assert f.aliases == {alias: "emb.weight"}
    assert set(f.params) == {"emb.weight", "head.weight", "back.weight"} - {alias}
    assert torch.equal(f(f.params, ids)[0], model(ids))
    new = {"emb.weight": f.params["emb.weight"] + 0.1}
    expect = f(new, ids)[0]
    with torch.no_grad():
        model.emb.weight.add_(0.1)
    assert torch.equal(model(ids), expect)
    value = model.emb.weight.detach().t() if how == "transpose" else model.emb.weight.detach()
    assert torch.equal(f({alias: value}, ids)[0], expect)
    with pytest.raises(InputError, match="given twice"):
        f({alias: value.clone(), "emb.weight": value.clone().t() if how == "transpose" else value.clone()}, ids)


def test_overlapping_memory_is_refused_and_neighbours_are_not() -> None:
    with pytest.raises(InputError, match="overlap in memory"):
        functional(Tied("overlap"))
    flat = torch.randn(12)
    model = nn.ParameterDict({"a": nn.Parameter(flat[:6].view(2, 3)), "b": nn.Parameter(flat[6:].view(2, 3))})
    assert set(functional(model).params) == {"a", "b"}


def test_a_shared_module_is_one_parameter_with_two_names() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    f = functional(model)
    assert set(f.params) == {"0.weight", "0.bias"}
    assert f.aliases == {"2.weight": "0.weight", "2.bias": "0.bias"}
    x = torch.randn(2, 3)
    new = {"2.weight": layer.weight.detach() + 1}
    assert torch.equal(f(new, x)[0], f({"0.weight": new["2.weight"]}, x)[0])
    assert torch.equal(f(f.params, x)[0], model(x))


def test_wrappers_parametrisations_complex_empty_and_double() -> None:
    model = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    assert set(functional(torch.compile(model)).params) == {"weight", "bias"}
    assert set(functional(nn.DataParallel(model)).params) == {"weight", "bias"}
    f = functional(model).to(torch.float64)
    (y,) = f(f.params, x)
    assert y.dtype == torch.float64
    assert model.weight.dtype == torch.float32
    nn.utils.parametrizations.weight_norm(model)
    f = functional(model)
    assert "parametrizations.weight.original0" in f.params
    assert torch.allclose(f(f.params, x)[0], model(x))
    odd = nn.ParameterDict({"none": nn.Parameter(torch.zeros(0, 3)), "c": nn.Parameter(torch.zeros(2, dtype=torch.complex64))})
    assert functional(odd).empty == ("none",)


def test_outputs_of_hugging_face_models_without_their_cache() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=11, bos_token_id=0, eos_token_id=0)
    f = functional(transformers.GPT2LMHeadModel(config).eval())
    ids = torch.randint(0, 11, (2, 5))
    assert f.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert [tuple(y.shape) for y in f(f.params, {"input_ids": ids})] == [(2, 5, 11)]
    assert [tuple(y.shape) for y in f(f.params, kwargs={"input_ids": ids, "labels": ids})] == [(), (2, 5, 11)]


def test_float_outputs_opens_nests() -> None:
    nest = {"a": (torch.ones(2), None, 3), "b": [torch.arange(2), torch.zeros(1, dtype=torch.complex64)]}
    assert [tuple(y.shape) for y in float_outputs(nest)] == [(2,), (1, 2)]


class ArgMax(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).argmax(-1)


def broken(name: str, value: float, index: int = 0) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[name].view(-1)[index : index + 2] = value
    return model


def integer() -> nn.Module:
    return nn.ParameterDict({"q": nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)})


def sparse() -> nn.Module:
    return nn.ParameterDict({"s": nn.Parameter(torch.eye(3).to_sparse())})


def eight_bit() -> nn.Module:
    return nn.ParameterDict({"w": nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False)})


def packed() -> nn.Module:
    model = nn.Linear(3, 2)
    model.qweight = torch.zeros(2, dtype=torch.int32)
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: {"w": torch.ones(2)}, "got dict.*state dict"),
        (lambda: nn.Linear, "class.*make an instance"),
        (lambda: "gpt2", "got str"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), "TorchScript"),
        (lambda: broken("0.weight", float("nan")), r"0\.weight \(2 NaN of 12 entries\)"),
        (lambda: broken("0.bias", float("inf")), r"0\.bias \(2 Inf of 4 entries\)"),
        (lambda: broken("1.running_mean", float("nan")), r"buffer 1\.running_mean \(2 NaN of 4"),
        (integer, "integer type only.*q.*int8"),
        (sparse, "layout torch.sparse_coo.*to_dense"),
        (eight_bit, "quantised or packed.*float8"),
        (packed, "packed, quantised weights"),
        (lambda: nn.LazyLinear(3), "not initialised"),
        (lambda: nn.Linear(3, 2, device="meta"), "meta device.*load the weights"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Lazy modules")
def test_unusable_models_are_refused(make: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        functional(make())


def test_meta_and_masks_are_accepted_where_values_do_not_matter() -> None:
    assert functional(nn.Linear(3, 2, device="meta"), values=False).params["weight"].shape == (2, 3)
    model = nn.Linear(3, 2)
    model.register_buffer("mask", torch.full((2, 2), float("-inf")))
    functional(model)


@pytest.mark.parametrize(
    ("args", "kwargs", "match"),
    [
        ((), {}, "no arguments.*TypeError.*keyword arguments go in kwargs"),
        (torch.ones(2, 7), {}, r"float32\[2, 7\]\) in 1 \(Linear\).*Check the shapes"),
        (torch.ones(2, 3, dtype=torch.float64), {}, "weights' dtype"),
        (torch.ones(2, 3), {"mask": None}, "TypeError"),
    ],
)
def test_arguments_that_do_not_fit(args: object, kwargs: dict, match: str) -> None:
    f = functional(nn.Sequential(nn.Identity(), nn.Linear(3, 2)))
    with pytest.raises(InputError, match=match) as e:
        f(f.params, args, kwargs)
    assert e.value.__cause__ is not None


@pytest.mark.parametrize(
    ("params", "match"),
    [
        ({"wieght": torch.ones(2, 3)}, "no parameter 'wieght'; did you mean 'weight'"),
        ({"weight": torch.ones(3, 2)}, r"has shape \(2, 3\), got \(3, 2\)"),
        ({"weight": torch.ones(2, 3, dtype=torch.int64)}, "give a floating tensor"),
        ({"weight": 1.0}, "must be a tensor"),
        ([1], "must be a mapping"),
    ],
)
def test_parameters_that_do_not_fit(params: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        functional(nn.Linear(3, 2))(params, torch.ones(1, 3))


def test_no_floating_output() -> None:
    with pytest.raises(InputError, match=r"no floating-point tensor.*Tensor torch\.int64.*argmax"):
        functional(ArgMax(3, 2))(None, torch.ones(1, 3))


def test_token_ids_out_of_range() -> None:
    with pytest.raises(InputError, match="vocabulary size"):
        functional(nn.Embedding(3, 2))(None, torch.tensor([5]))


def test_errors_under_a_transform_are_not_rewritten() -> None:
    f = functional(nn.Linear(3, 2))
    with pytest.raises(RuntimeError, match=r"\[4, 7\]"):
        torch.func.vmap(lambda p: f(p, torch.ones(2, 7))[0])({"weight": torch.ones(4, 2, 3)})


def test_ten_thousand_parameters_are_listed_quickly() -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(10_000)])
    assert len(functional(model).params) == 10_000


# -------------------------------------------------------------------------------------------------------------------- results


def test_estimate_to_dict_is_json() -> None:
    e = Estimate(
        torch.tensor([1.0, 2.0]), stderr=0.1, assumptions=["full batch"], refs=("spred",), details={"hvps": 3, "worst": float("inf")}
    )
    d = json.loads(json.dumps(e.to_dict(), allow_nan=False))
    assert d["value"] == [1.0, 2.0]
    assert d["assumptions"] == ["full batch"]
    assert d["details"] == {"hvps": 3, "worst": "inf"}
    assert plain({1: (np.float32(2), np.arange(2), 1j)}) == {"1": [2.0, [0, 1], [0.0, 1.0]]}


def test_estimate_never_looks_better_than_it_is() -> None:
    bad = Estimate(3.0, residual=0.2, status="not_converged", note="stopped after 10 steps")
    assert "NOT_CONVERGED" in repr(bad)
    assert not bad.ok
    with pytest.raises(InputError, match="stopped after 10 steps"):
        float(bad)
    assert float(Estimate(2)) == 2.0
    assert float(Estimate(0.1)) == 0.1  # not rounded to single precision
    with pytest.raises(InputError, match="holds 2 numbers"):
        float(Estimate(torch.ones(2)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Estimate(float("nan")), "not finite"),
        (lambda: Estimate(1.0, residual=float("inf")), "residual is not finite"),
        (lambda: Estimate(None), "without a value"),
        (lambda: Estimate(1.0, status="not_applicable"), "must have no value"),
        (lambda: Estimate(1.0, status="fine"), "unknown"),
        (lambda: Estimate(1.0, stderr=-1.0), "negative"),
        (lambda: Estimate(1.0, refs="spred"), "tuple of strings"),
    ],
)
def test_estimates_that_contradict_themselves(make: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        make()
