"""The search on architectures known in full: every null direction named, certified, and confirmed by the module itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controls import CONTROLS
from judge import change, elsewhere, in_float64, is_structural, outputs
from known_answers import CASES, Case, fresh, generic_
from parasym.core.graph import trace
from parasym.core.samples import draw, flatten
from parasym.symmetry.dictionary import DictionaryAction
from parasym.symmetry.search import Search, search
from parasym.symmetry.symmetry import Symmetry
from parasym.symmetry.tangent import Together, flat_of, jacobian, triangular
from test_known_answers_oracle import trainable
from zoo import ZOO

SLOW = {"vit_cls_only_eps1e-5", "vit_cls_only_eps1e-12"}  # many fibres
LAWS = (
    "mlp-relu-bias", "mlp-mixed", "conv-bn-relu-eval", "conv-gn-relu", "swiglu-bias", "einsum-mlp", "batch-ensemble",
    "linear-ae-tied-bias", "mlp-mixer", "rnn-relu", "gpt-design", "gpt2_tied", "llama_untied", "bert_eps1e-5", "vit_eps1e-5",
)  # fmt: skip


class Then(nn.Module):
    """A function of a model's output, under the model's own parameter names one level down."""

    def __init__(self, model: nn.Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.after = model, after

    def forward(self, *args: Any) -> Tensor:
        return self.after(self.model(*args))


def marked(names: Any, slow: bool = True) -> list[Any]:
    """Cases as test parameters, marked by what they need."""
    out = []
    for name in names:
        case = CASES[name]
        marks = [pytest.mark.skipif(not case.available, reason=f"needs {', '.join(case.requires)}")]
        if slow and (case.slow or name in SLOW):
            marks.append(pytest.mark.slow)
        out.append(pytest.param(case, id=name, marks=marks))
    return out


def find(model: nn.Module, inputs: list[tuple[Any, ...]]) -> Search:
    """Search on exactly these inputs."""
    graph = trace(model, inputs[0])
    return search(graph, [flatten(graph, args) for args in inputs], torch.Generator().manual_seed(0), grow=False)


@functools.cache
def found(name: str) -> Search:
    """The search of a known answer, once."""
    return find(*CASES[name].build())


@functools.cache
def zoo_search(name: str) -> Search:
    """The search of a zoo network, once; inputs are drawn until the rank is stable."""
    model, args, kwargs = ZOO[name].build()
    graph = trace(model, args, kwargs)
    return search(graph, [flatten(graph, args, kwargs)], torch.Generator().manual_seed(0))


def check_complete(result: Search, nullity: int) -> None:
    assert result.null.nullity == nullity
    assert result.explained == nullity, result.undecided
    assert result.undecided == []
    assert sum(s.dim for s in result.symmetries) == nullity
    assert len(result.entries) == len(result.symmetries)
    for s in result.symmetries:
        assert s.certified, s
        assert s.residual <= 1e-10, s
        assert s.dim > 0, s
        assert s.parameters, s
        assert set(s.parameters) <= set(result.graph.params), s


# --- completeness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", marked(CASES))
def test_every_null_direction_is_explained(case: Case) -> None:
    result = find(*case.build()) if case.slow else found(case.name)
    assert sum(p.numel() for p in result.graph.params.values()) == case.params
    check_complete(result, case.nullity)


@pytest.mark.parametrize("case", marked(["gpt-design", "gpt2_tied", "mlp-relu-bias"]))
def test_every_null_direction_modulo_softmax_is_explained(case: Case) -> None:
    model, inputs = case.build()
    result = find(Then(model, lambda y: y.log_softmax(-1)), inputs)
    assert case.nullity_mod_softmax is not None
    check_complete(result, case.nullity_mod_softmax)


@pytest.mark.parametrize("case", marked(n for n, c in CASES.items() if c.beyond_structure and not c.slow))
def test_what_depends_on_the_weights_says_so(case: Case) -> None:
    """Dead units, always-on units, over-complete maps: never a claim about the architecture."""
    result = found(case.name)
    special = sum(s.dim for s in result.symmetries if not is_structural(s))
    assert special >= case.beyond_structure - (result.generic.nullity - (case.nullity - case.beyond_structure))
    assert sum(s.dim for s in result.symmetries if s.kind == "point") == case.nullity - result.generic.nullity


def test_the_same_seed_gives_the_same_search() -> None:
    first, again = (find(*CASES["mlp-mixed"].build()) for _ in range(2))
    assert [s.to_dict() for s in first.symmetries] == [s.to_dict() for s in again.symmetries]


def test_more_inputs_are_drawn_until_the_rank_is_stable() -> None:
    model, inputs = CASES["mlp-relu-bias"].build()
    graph = trace(model, (inputs[0][0][:8],))
    result = search(graph, [flatten(graph, (inputs[0][0][:8],))], torch.Generator().manual_seed(0))
    assert len(result.batches) > 3
    assert result.null.nullity == 10


def one_output() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(53)  # every unit changes side on at least a sixth of the samples
    return nn.Sequential(nn.Linear(6, 12), nn.LeakyReLU(), nn.Linear(12, 12), nn.LeakyReLU(), nn.Linear(12, 1)), torch.randn(1, 6)


def test_one_sample_with_one_output_is_drawn_as_often_as_it_takes() -> None:
    model, x = one_output()
    graph = trace(model, (x,))
    result = search(graph, [flatten(graph, (x,))], torch.Generator().manual_seed(0))
    assert result.null.nullity == result.explained == 24  # a scale for each hidden unit
    assert not result.undecided


def test_a_rank_that_still_grows_is_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = one_output()
    graph = trace(model, (x,))
    monkeypatch.setattr("parasym.symmetry.search._MAX_BATCHES", 64)
    monkeypatch.setattr("parasym.symmetry.search._ROWS", 0)
    result = search(graph, [flatten(graph, (x,))], torch.Generator().manual_seed(0), blind=False)
    assert result.null.nullity > 24
    assert "the rank did not settle" in [u["name"] for u in result.undecided]


@pytest.mark.parametrize("name", ["conv-bn-relu-eval", "gpt-design", "rnn-relu"])
def test_many_small_batches_at_once_are_the_batches_one_by_one(name: str) -> None:
    model, inputs = CASES[name].build()
    small = tuple(a[:2] for a in inputs[0])
    graph = trace(model, small)
    generator = torch.Generator().manual_seed(0)
    batches = [draw(graph, flatten(graph, small), generator) for _ in range(5)]
    flat = flat_of(graph)
    each = torch.cat([jacobian(graph, graph.params, graph.prepare(b), flat) for b in batches])
    stack = Together(graph, [graph.prepare(b) for b in batches])
    assert stack._stack[2][0].shape[0] == len(batches)
    assert torch.allclose(stack.jacobian(graph.params, flat), each, rtol=1e-12, atol=1e-13 * float(each.abs().max()))
    one_by_one = torch.cat([graph(graph.params, b) for b in batches])
    assert torch.allclose(stack.outputs(graph.params), one_by_one, rtol=1e-12, atol=1e-13 * float(one_by_one.abs().max()))
    R = triangular(graph, graph.params, batches, flat)
    assert torch.allclose(R.T @ R, each.T @ each, rtol=1e-10, atol=1e-12 * float((each.T @ each).abs().max()))


# --- the module itself judges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", marked(n for n, c in CASES.items() if not c.slow))
def test_the_module_agrees(case: Case) -> None:
    """At fresh parameters and elements where the claim is about the architecture, without the traced graph."""
    model, inputs = case.build()
    generator = torch.Generator().manual_seed(11)
    tolerance = 1e-8 if "eps1e-12" in case.name else 1e-10  # there the eps of a norm is part of the answer
    for s in found(case.name).symmetries:
        residual, moved = change(model, s, inputs[:2], generator)
        assert residual <= tolerance, s
        assert moved >= (1e-3 if is_structural(s) else 1e-5), s


# --- laws of an action ------------------------------------------------------------------------------------------------


def actions(name: str) -> list[tuple[Symmetry, DictionaryAction]]:
    return [(s, s.action) for s in found(name).symmetries if isinstance(s.action, DictionaryAction)]


@pytest.mark.parametrize("case", marked(LAWS))
def test_identity_and_inverse(case: Case) -> None:
    generator = torch.Generator().manual_seed(5)
    params = elsewhere(found(case.name).graph.params, generator)
    pairs = actions(case.name)
    assert pairs
    for s, action in pairs:
        still = action.act(params, torch.zeros(action.dim, dtype=torch.float64))
        for n, p in still.items():
            assert torch.allclose(p, params[n], rtol=1e-12, atol=1e-13), (s, n)
        element = s.random_element(generator)
        away = s.act(params, element)
        assert any(not torch.equal(away[n], params[n]) for n in params), s
        back = s.act(away, -element)
        for n, p in params.items():
            assert torch.allclose(back[n], p, rtol=1e-9, atol=1e-10), (s, n)


@pytest.mark.parametrize("case", marked(LAWS))
def test_one_parameter_subgroups(case: Case) -> None:
    """act(a) twice is act(2 a)."""
    generator = torch.Generator().manual_seed(6)
    params = elsewhere(found(case.name).graph.params, generator)
    for s, _ in actions(case.name):
        element = s.random_element(generator, scale=0.3)
        twice, double = s.act(s.act(params, element), element), s.act(params, 2 * element)
        for n in params:
            assert torch.allclose(twice[n], double[n], rtol=1e-9, atol=1e-10), (s, n)


@pytest.mark.parametrize("case", marked(LAWS))
def test_generators_are_the_derivative_at_the_identity(case: Case) -> None:
    generator = torch.Generator().manual_seed(7)
    params = elsewhere(found(case.name).graph.params, generator)
    h = 1e-5
    for s, action in actions(case.name):
        tangents = action.generators(params)
        direction = torch.randn(action.dim, generator=generator, dtype=torch.float64)
        plus, minus = action.act(params, h * direction), action.act(params, -h * direction)
        assert set(plus) == set(tangents), s
        assert set(plus) <= set(s.parameters), s
        for n, t in tangents.items():
            assert t.shape == (action.dim, *params[n].shape), (s, n)
            measured = (plus[n] - minus[n]) / (2 * h)
            predicted = torch.tensordot(direction, t, 1)
            size = float(predicted.abs().max()) + float(params[n].abs().max())
            assert float((measured - predicted).abs().max()) <= 1e-8 * size, (s, n)


@pytest.mark.parametrize("case", marked(LAWS))
def test_an_action_keeps_dtypes_and_its_arguments(case: Case) -> None:
    generator = torch.Generator().manual_seed(8)
    params = {n: p.float() for n, p in found(case.name).graph.params.items()}
    kept = {n: p.clone() for n, p in params.items()}
    for s, action in actions(case.name):
        moved = action.act(params, s.random_element(generator))
        assert all(p.dtype == torch.float32 and p.shape == params[n].shape for n, p in moved.items()), s
        assert all(t.dtype == torch.float64 for t in action.generators(params).values()), s
        assert all(torch.equal(params[n], kept[n]) for n in params), s


# --- what a symmetry forces on gradients ------------------------------------------------------------------------------


def loss_of(case: Case) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """A random quadratic loss of the outputs of the module itself, and its parameters."""
    model, inputs = case.build()
    model = in_float64(model)
    params = trainable(model)
    with torch.no_grad():
        first = outputs(model, params, inputs[0])
    target = torch.randn(first.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return lambda p: (outputs(model, p, inputs[0]) - target).square().mean(), params


def gradient(loss: Callable[[dict[str, Tensor]], Tensor], params: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("case", marked(LAWS))
def test_the_gradient_is_orthogonal_to_every_generator(case: Case) -> None:
    loss, params = loss_of(case)
    grad = gradient(loss, params)
    size = sum(float(g.square().sum()) for g in grad.values()) ** 0.5
    assert size > 1e-3
    for s in found(case.name).symmetries:
        tangents = s.generators(params)
        dots = sum((t.flatten(1) @ grad[n].reshape(-1) for n, t in tangents.items()), torch.zeros(s.action.dim).double())
        norms = sum((t.flatten(1).square().sum(1) for n, t in tangents.items()), torch.zeros(s.action.dim).double()).sqrt()
        assert bool((dots.abs() <= 1e-10 * size * norms.clamp(min=1e-6)).all()), s


@pytest.mark.parametrize("case", marked(LAWS))
def test_charges_are_conserved_to_first_order(case: Case) -> None:
    """Charges are at most quadratic, so their central difference along the gradient is exact."""
    loss, params = loss_of(case)
    grad = gradient(loss, params)
    size = sum(float(g.square().sum()) for g in grad.values()) ** 0.5
    for s in found(case.name).symmetries:
        up, down = (s.charge({n: p + h * grad[n] for n, p in params.items()}) for h in (0.5, -0.5))
        if up is None or down is None:
            continue
        generator = torch.Generator().manual_seed(1)
        other = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in grad.items()}
        ahead, behind = (s.charge({n: p + h * other[n] for n, p in params.items()}) for h in (0.5, -0.5))
        assert ahead is not None
        assert behind is not None
        assert bool((ahead - behind).abs().max() > 1e-3), s  # a charge that never changes says nothing
        scale = max(float(p.abs().max()) for p in params.values()) * size
        assert bool(((up - down).abs() <= 1e-9 * (scale + 1)).all()), s


@pytest.mark.parametrize("name", ["mlp-mixed", "gpt-design"])
def test_charges_are_conserved_along_gradient_flow(name: str) -> None:
    """Ten steps of RK4; the same flow with an uneven learning rate breaks the charges."""
    loss, start = loss_of(CASES[name])
    charged = [s for s in found(name).symmetries if s.charge(start) is not None]
    assert charged

    def flow(params: dict[str, Tensor], step: float, rates: dict[str, float]) -> dict[str, Tensor]:
        def slope(at: dict[str, Tensor]) -> dict[str, Tensor]:
            return {n: -rates[n] * g for n, g in gradient(loss, at).items()}

        def ahead(k: dict[str, Tensor], h: float) -> dict[str, Tensor]:
            return {n: p + h * k[n] for n, p in params.items()}

        k1 = slope(params)
        k2 = slope(ahead(k1, step / 2))
        k3 = slope(ahead(k2, step / 2))
        k4 = slope(ahead(k3, step))
        return {n: p + step / 6 * (k1[n] + 2 * k2[n] + 2 * k3[n] + k4[n]) for n, p in params.items()}

    def drift(rates: dict[str, float]) -> float:
        params = start
        for _ in range(10):
            params = flow(params, 5e-3, rates)
        ends = [(s.charge(params), s.charge(start)) for s in charged]
        return max(float((a - b).abs().max()) for a, b in ends if a is not None and b is not None)

    even = drift(dict.fromkeys(start, 1.0))
    uneven = drift({n: 1.0 + 0.5 * (k % 2) for k, n in enumerate(start)})
    assert uneven > 1e-4
    assert even < 1e-3 * uneven


# --- what must not be reported ----------------------------------------------------------------------------------------


def moves_alone(result: Search, tangent: dict[str, Tensor]) -> float:
    """Part of a tangent (relative) that the reported symmetries together span: 1 means it was reported."""
    params = result.graph.params
    names = list(params)
    spans = [torch.zeros(0, sum(p.numel() for p in params.values()), dtype=torch.float64)]
    for s in result.symmetries:
        tangents = s.generators(params)
        spans.append(
            torch.cat([tangents[n].flatten(1) if n in tangents else torch.zeros(s.action.dim, params[n].numel()) for n in names], 1)
        )
    v = torch.cat([tangent.get(n, torch.zeros_like(params[n])).reshape(-1) for n in names])
    V = torch.cat(spans)
    if not len(V):
        return 0.0
    U, values, _ = torch.linalg.svd(V.T, full_matrices=False)
    U = U[:, values > 1e-9 * values[0]]
    return float((U.T @ v).norm() / v.norm())


@pytest.mark.parametrize("name", ["mlp-gelu-bias", "mlp-gelu-nobias", "mlp-tanh-bias", "mlp-tanh-nobias", "vae-fixed-noise-samples"])
def test_smooth_units_have_no_continuous_symmetry(name: str) -> None:
    assert found(name).symmetries == []


def test_a_rescaling_of_one_side_is_not_reported() -> None:
    result = found("mlp-relu-bias")
    weight = result.graph.params["0.weight"]
    assert moves_alone(result, {"0.weight": weight}) < 0.95
    rows = {n: result.graph.params[n] * (1.0 if n == "0.bias" else torch.eye(6)[0].double()[:, None]) for n in ("0.weight",)}
    assert moves_alone(result, rows) < 0.95


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied"])
def test_rotary_queries_and_keys_have_no_general_linear_group(name: str) -> None:
    result = found(name)
    touching = [s for s in result.symmetries if any("q_proj" in p for p in s.parameters) and any("k_proj" in p for p in s.parameters)]
    pure = [s for s in touching if all("q_proj" in p or "k_proj" in p for p in s.parameters)]
    assert sum(s.dim for s in pure) == 8  # a scale and a rotation for each plane of each key head
    assert not any(s.group.startswith("GL") for s in pure)


def test_the_gain_of_a_post_norm_is_not_free() -> None:
    result = found("bert_eps1e-5")
    for name, gain in result.graph.params.items():
        if "LayerNorm.weight" in name:
            for unit in range(len(gain)):
                e = torch.zeros_like(gain)
                e[unit] = 1
                assert moves_alone(result, {name: e}) < 0.95, name
    assert not any(s.kind == "diagonal" and any("LayerNorm.weight" in p for p in s.parameters) for s in result.symmetries)


def test_a_channel_is_not_scaled_through_a_group_norm() -> None:
    for name in ("conv-gn-relu", "conv-gn-relu-eps0"):
        result = found(name)
        weight, bias = result.graph.params["c1.weight"], result.graph.params["c1.bias"]
        for channel in range(4):
            one = torch.zeros(4, dtype=torch.float64)
            one[channel] = 1
            tangent = {"c1.weight": one[:, None, None, None] * weight, "c1.bias": one * bias}
            assert moves_alone(result, tangent) < 0.95
            assert moves_alone(result, {"c1.bias": one}) < 0.95
    whole = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)  # and the measure sees what is reported
    assert moves_alone(result, {"c1.bias": whole}) > 1 - 1e-9
    assert moves_alone(result, {"c1.weight": whole[:, None, None, None] * weight, "c1.bias": whole * bias}) > 1 - 1e-9


def test_the_eps_of_a_norm_is_not_overlooked() -> None:
    exact, approximate = found("conv-gn-relu-eps0"), found("conv-gn-relu")
    assert exact.null.nullity - approximate.null.nullity == 2


def test_a_zeroed_gradient_is_not_a_symmetry() -> None:
    """``padding_idx`` stops a gradient; the row is still read."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.table(tokens).sum(1).tanh())

    with fresh(0):
        model = Sum()
        nn.init.normal_(model.table.weight)
    result = find(model, [(torch.cartesian_prod(torch.arange(6), torch.arange(6)),)])
    assert result.null.nullity == 0
    assert result.symmetries == []


def test_a_detached_factor_is_judged_by_the_function() -> None:
    """A stopped gradient hides a scale from the Jacobian, and shows directions that are none: no claim may be false."""

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return self.down(F.relu(y) * y.detach().square().mean(-1, keepdim=True))

    with fresh(0):
        model, x = generic_(Detached()), 2 * torch.randn(80, 3)
    result = find(model, [(x,)])
    generator = torch.Generator().manual_seed(2)
    for s in result.symmetries:
        assert change(model, s, [(x,)], generator)[0] <= 1e-10, s


def _built_once() -> list[Any]:
    """One control for each network of the catalogue."""
    seen: dict[Any, str] = {}
    for name, control in CONTROLS.items():
        seen.setdefault(control.build, name)
    return [pytest.param(name, id=name, marks=pytest.mark.slow) for name in seen.values()]


@pytest.mark.parametrize("name", _built_once())
def test_catalogue_networks(name: str) -> None:
    """Whatever is reported on a network that has a near miss leaves the module's own outputs alone."""
    model, args = CONTROLS[name].build()
    graph = trace(model, args)
    result = search(graph, [flatten(graph, args)], torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(4)
    for s in result.symmetries:
        assert s.residual <= 1e-10, s
        assert change(model, s, [args], generator)[0] <= 1e-9, s
    undecided = sum(int(u.get("dim", 0)) for u in result.undecided)
    assert result.explained + undecided == result.null.nullity


# --- single numbers, and what holds at special weights --------------------------------------------------------------------


class Gated(nn.Module):
    """A residual branch behind one number (ReZero)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.alpha = nn.Linear(3, 5), nn.Linear(5, 3), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.down(torch.tanh(self.up(x)))


def test_a_single_number_takes_part_in_a_scale() -> None:
    with fresh(0):
        model, x = Gated(), torch.randn(40, 3)
    result = find(model, [(x,)])
    check_complete(result, 1)
    (s,) = result.symmetries
    assert s.parameters == ("alpha", "down.weight", "down.bias")
    assert s.kind == "diagonal"
    assert change(model, s, [(x,)], torch.Generator().manual_seed(1))[0] <= 1e-10
    params = dict(result.graph.params)
    assert s.generators(params)["alpha"].shape == (1,)
    assert s.act(params, torch.tensor([0.3]))["alpha"].shape == ()


@pytest.mark.skipif(not ZOO["hf-gpt2"].available, reason="needs transformers")
def test_unit_gains_let_a_tied_stream_rotate() -> None:
    """A tied head forbids rotations of the stream at general gains; the gains of a fresh GPT-2 allow them."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=1, n_embd=6, n_head=2, n_inner=5, vocab_size=9, n_positions=5, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    with fresh(0):
        model = transformers.GPT2LMHeadModel(config).eval().double()
        x = {"input_ids": torch.randint(0, 9, (3, 5))}
    graph = trace(model, (), x)
    result = search(graph, [flatten(graph, (), x)], torch.Generator().manual_seed(0))
    assert result.explained == result.null.nullity > result.generic.nullity
    (turn,) = [s for s in result.symmetries if s.group == "O(5)"]
    assert (turn.kind, turn.dim, turn.radius) == ("point", 10, math.inf)
    params = dict(result.graph.params)
    element = turn.random_element(torch.Generator().manual_seed(1), scale=1.0)
    at = graph_outputs(result)
    assert float((at(turn.act(params, element)) - at(params)).abs().max()) < 1e-12
    gain = "transformer.ln_f.weight"  # at other gains the same element changes the function
    uneven = params | {gain: params[gain] * torch.linspace(0.5, 2, 6, dtype=torch.float64)}
    assert float((at(turn.act(uneven, element)) - at(uneven)).abs().max()) > 1e-4


def test_a_dead_unit_is_free_within_its_radius() -> None:
    with fresh(0):
        model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        x = torch.rand(60, 2)
        with torch.no_grad():
            model[0].bias[1] = -4.0
            model[0].weight[1] = 0.3
    result = find(model, [(x,)])
    (free,) = [s for s in result.symmetries if s.kind == "point" and s.parameters == ("0.weight",)]
    assert 0 < free.radius < 1
    params = dict(result.graph.params)
    generator = torch.Generator().manual_seed(3)
    assert all(float(free.random_element(generator, scale=9.0).norm()) <= free.radius * (1 + 1e-12) for _ in range(5))
    for _ in range(100):
        assert change(model, free, [(x,)], generator)[0] == 0.0
    far = 100 * torch.ones(free.action.dim, dtype=torch.float64)  # a move that wakes the unit
    at = graph_outputs(result)
    assert float((at(free.act(params, far)) - at(params)).abs().max()) > 1e-3


def graph_outputs(result: Search) -> Callable[[Any], Tensor]:
    env = result.graph.prepare(result.batches[0])
    return lambda p: torch.cat([o.reshape(-1) for o in result.graph.replay(p, env)])


def test_the_eps_of_a_norm_leaves_an_approximate_scale() -> None:
    """What the eps takes away is reported with its singular-value ratio, and the ratio follows the eps."""
    assert found("conv-gn-relu-eps0").approximate == []
    (lost,) = found("conv-gn-relu").approximate
    assert lost["dim"] == found("conv-gn-relu-eps0").null.nullity - found("conv-gn-relu").null.nullity
    assert set(lost["parameters"]) == {"c1.weight", "c1.bias"}
    ratios = []
    for eps in (1e-8, 1e-6):
        with fresh(0):
            model = generic_(nn.Sequential(nn.Linear(3, 8), nn.GroupNorm(2, 8, eps=eps), nn.Tanh(), nn.Linear(8, 2)).double())
            x = torch.randn(40, 3)
        result = find(model, [(x,)])
        (lost,) = result.approximate
        assert result.explained == result.null.nullity  # and it is no symmetry
        assert lost["dim"] == 2
        ratios.append(lost["ratio"])
    assert ratios[1] / ratios[0] == pytest.approx(100, rel=0.02)
