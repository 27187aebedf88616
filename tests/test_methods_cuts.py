"""Pruning: scores, the flow they are made of, masks through real training, and everything that must be refused."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from known_answers import fresh
from parasym.core.errors import InputError
from parasym.core.graph import trace
from parasym.measure.saliency import Flow, contractions, cuts_alone, parameter_cuts, saliency_conservation, synaptic_saliency
from parasym.methods import critical_compression, max_compression, prune, rewound
from zoo import ZOO

WIDTHS = (64, 128, 128, 128, 128, 10)


def chain(
    widths: tuple[int, ...] = WIDTHS, seed: int = 0, bias: bool = False, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    with fresh(seed):
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b, bias=bias), activation()]
            nn.init.kaiming_normal_(layers[-2].weight)
        return nn.Sequential(*layers[:-1])


def small(seed: int = 0) -> tuple[nn.Sequential, Tensor, Tensor]:
    with fresh(seed):
        model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).double()
        return model, torch.randn(32, 6), torch.randint(3, (32,))


# ------------------------------------------------------------------------------------------------ saliency and cuts


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_saliency_is_conserved_at_every_unit_and_cut(scale: float) -> None:
    model = chain((64, 100, 50, 30, 10), bias=True).double()
    with fresh(1):
        x, y = torch.rand(64, 64), torch.randint(10, (64,))
        for p in model.parameters():
            p.data.mul_(scale).add_(0.1 * torch.randn_like(p))
    for readout in (lambda o: nn.functional.cross_entropy(o, y), lambda o: o.sum(), lambda o: o.square().mean()):
        law = saliency_conservation(model, synaptic_saliency(model, readout, (x,)), (x,))
        assert len(law.units) == 3 and len(law.cuts) == 4
        assert float(law.unit_residual) <= 1e-12 and float(law.cut_residual) <= 1e-12


def test_tanh_breaks_the_law_and_so_do_other_scores() -> None:
    model = chain((64, 100, 50, 30, 10), bias=True, activation=nn.Tanh).double()
    x, y = torch.rand(64, 64), torch.randint(10, (64,))
    law = saliency_conservation(model, synaptic_saliency(model, lambda o: nn.functional.cross_entropy(o, y), (x,)), (x,))
    assert float(law.unit_residual) > 0.1
    relu = chain((64, 100, 50, 30, 10), bias=True).double()
    signed = synaptic_saliency(relu, lambda o: nn.functional.cross_entropy(o, y), (x,))
    absolute = {n: s.abs() for n, s in signed.items()}
    assert float(saliency_conservation(relu, absolute, (x,)).unit_residual) > 0.1


def test_conservation_through_convolution_norm_and_pool() -> None:
    with fresh(0):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4),
        )  # fmt: skip
        for p in model.parameters():
            p.data.add_(0.2 * torch.randn_like(p))
        x = torch.randn(5, 3, 8, 8)
    law = saliency_conservation(model.eval(), synaptic_saliency(model, lambda o: o.square().sum(), (x,)), (x,))
    assert set(law.units) == {"0", "4"} and float(law.unit_residual) < 1e-12


@pytest.mark.parametrize(
    "name", ["mlp-prelu", "conv-depthwise", "unet", "squeeze-excite", "multihead-attention", "swiglu", "lstm", "hf-llama", "hf-resnet"]
)
def test_every_cut_of_a_real_graph_carries_the_whole_flow(name: str) -> None:
    if not ZOO[name].available:
        pytest.skip("needs " + ", ".join(ZOO[name].requires))
    model, args, kwargs = ZOO[name].build()
    graph = trace(model, args, kwargs)
    nodes = contractions(graph)
    scores, total = Flow(graph).scores({n: graph.params[n] for n in nodes})
    alone = [n for n in nodes if cuts_alone(graph, nodes[n])]
    assert alone and all(float(s.min()) >= 0 for s in scores.values())
    for n in alone:
        assert float(scores[n].sum()) == pytest.approx(total, rel=1e-12)
    for cut in parameter_cuts(graph, nodes):
        assert cuts_alone(graph, [at for n in cut for at in nodes[n]])


def test_the_flow_of_a_chain_is_the_closed_form() -> None:
    model = chain((5, 7, 6, 3))
    graph = trace(model, (torch.rand(1, 5),))
    W = [p.detach().double().abs() for p in model.parameters()]
    scores, total = Flow(graph).scores({n: graph.params[n] for n in contractions(graph)})
    one = torch.ones
    assert total == pytest.approx(float((W[2] @ W[1] @ W[0]).sum()), rel=1e-12)
    middle = (W[2].T @ one(3, dtype=torch.float64))[:, None] * W[1] * (W[0] @ one(5, dtype=torch.float64))
    torch.testing.assert_close(scores["2.weight"], middle)


def test_a_path_through_a_shortcut_is_a_path() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.branch, self.skip, self.head = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            return self.head(torch.relu(self.branch(h)) + self.skip(h))

    graph = trace(Residual(), (torch.rand(2, 4),))
    assert parameter_cuts(graph) == [("stem.weight",), ("branch.weight", "skip.weight"), ("head.weight",)]


# ------------------------------------------------------------------------------------------------ pruning


def test_synflow_reaches_the_maximum_and_one_shot_does_not() -> None:
    model, x = chain(), torch.rand(1, 64)
    assert max_compression(model, (x,)) == 58624 / 5
    grid = [5, 8, 30, 300, 3200]
    assert critical_compression(model, (x,), kept=grid).is_maximal
    assert math.log10(critical_compression(model, (x,), kept=[*grid, 50, 100, 1000], steps=1).compression) < 2.5
    assert not critical_compression(model, (x,), kept=grid, score="magnitude").is_maximal


def test_the_certificate_says_what_happened() -> None:
    model, x = chain(), torch.rand(1, 64)
    good = prune(model, (x,), keep=1e-3)
    assert good.certificate.ok and good.certificate.details["guaranteed"] and max(good.certificate.details["ratios"]) < 0.3
    assert min(good.kept.values()) == good.certificate.value > 0 and sum(good.kept.values()) == 59
    bad = prune(model, (x,), keep=1e-3, steps=1)
    assert bad.certificate.status == "violated" and not bad.certificate.details["connected"]
    assert max(bad.certificate.details["ratios"]) == pytest.approx(4.86, abs=0.05)
    linear = prune(model, (x,), keep=1e-3, schedule="linear")
    assert 3.8 < max(linear.certificate.details["ratios"]) < 4.2 and not linear.certificate.details["guaranteed"]


def test_scores_are_what_they_say() -> None:
    model, x, y = small()

    def loss(out: Tensor) -> Tensor:
        return nn.functional.cross_entropy(out, y)

    weights = [model[0].weight, model[2].weight, model[4].weight]
    grads = torch.autograd.grad(loss(model(x)), weights)
    snip = prune(model, (x,), keep=40, score="snip", loss=loss)
    ours = torch.cat([m.reshape(-1) for m in snip.masks.values()])
    flat = torch.cat([(g * w).abs().reshape(-1) for g, w in zip(grads, weights, strict=True)]).detach()
    assert set(ours.nonzero().flatten().tolist()) == set(flat.topk(40).indices.tolist())
    first = torch.autograd.grad(loss(model(x) / 200), weights, create_graph=True)
    still = [g.detach() for g in first]
    hg = torch.autograd.grad(sum((a * b).sum() for a, b in zip(still, first, strict=True)), weights)
    flat = torch.cat([(h * w).reshape(-1) for h, w in zip(hg, weights, strict=True)]).detach()
    ours = torch.cat([m.reshape(-1) for m in prune(model, (x,), keep=40, score="grasp", loss=loss).masks.values()])
    assert set(ours.nonzero().flatten().tolist()) == set(flat.topk(40).indices.tolist())
    magnitude = prune(model, (x,), keep=0.25, score="magnitude", scope="local")
    for n, mask in magnitude.masks.items():
        w = model.get_parameter(n).detach().abs()
        assert int(mask.sum()) == round(0.25 * mask.numel()) and float(w[mask].min()) >= float(w[~mask].max())
    assert prune(model, (x,), keep=40, score="random", seed=1).kept != prune(model, (x,), keep=40, score="random", seed=2).kept
    own = prune(model, (x,), keep=0.5, score=lambda masks: {n: torch.ones(m.shape) for n, m in masks.items()})
    assert sum(own.kept.values()) == round(0.5 * 324)  # ties are broken, never over-pruned


def test_shuffling_keeps_the_counts() -> None:
    model, x, _ = small()
    plain, mixed = prune(model, (x,), keep=0.3), prune(model, (x,), keep=0.3, shuffle=True, seed=3)
    assert plain.kept == mixed.kept
    assert any(not torch.equal(plain.masks[n], mixed.masks[n]) for n in plain.masks)


def test_tied_weights_are_scored_once_with_all_paths() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mid, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(torch.relu(self.mid(self.table(i))))

    model, i = Tied(), torch.randint(11, (2, 3))
    edit = prune(model, (i,), keep=0.3)
    assert set(edit.masks) == {"table.weight", "mid.weight"}
    edit.apply()
    assert torch.equal(model.head.weight, model.table.weight) and int((model.head.weight != 0).sum()) == edit.kept["table.weight"]
    edit.bake()
    assert model.head.weight is model.table.weight and int((model.table.weight != 0).sum()) == edit.kept["table.weight"]


def test_frozen_weights_are_left_alone() -> None:
    model, x, _ = small()
    model[2].weight.requires_grad_(False)
    assert set(prune(model, (x,), keep=0.3).masks) == {"0.weight", "4.weight"}


def test_planning_touches_nothing_and_undo_is_bitwise() -> None:
    model, x, _ = small()
    before = copy.deepcopy(model.state_dict())
    ids = {n: id(p) for n, p in model.named_parameters()}
    edit = prune(model, (x,), keep=0.2)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    twin = edit.edited()
    edit.apply()
    torch.testing.assert_close(model(x), twin(x), rtol=0, atol=0)
    assert edit.applied and "0.parametrizations.weight.0.mask" in model.state_dict()
    edit.undo()
    assert list(model.state_dict()) == list(before) and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert {n: id(p) for n, p in model.named_parameters()} == ids
    edit.apply()
    edit.bake()
    assert list(model.state_dict()) == list(before) and {n: id(p) for n, p in model.named_parameters()} == ids
    assert sum(int((model.get_parameter(n) != 0).sum()) for n in edit.masks) == sum(edit.kept.values())
    with pytest.raises(InputError, match="not applied"):
        edit.undo()


def test_iterative_pruning_rewinds_the_weights() -> None:
    model, x, y = small()
    before = copy.deepcopy(model.state_dict())
    seen: list[float] = []

    def train(net: nn.Module) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        seen.append(float((net[0].weight != 0).double().mean()))
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()

    edit = rewound(model, train, (x,), keep=0.2, levels=3)
    assert len(seen) == 3 and seen[0] == 1.0 > seen[1] > seen[2]
    assert sum(edit.kept.values()) == round(0.2 * 324)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_input_is_refused_with_what_to_do() -> None:
    model, x, _ = small()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"keep": 2}, "less than one each"),
        ({"keep": 1e-3}, "less than one each"),
        ({"keep": 0.0}, "fraction"),
        ({"keep": 1.5}, "fraction"),
        ({"keep": True}, "fraction"),
        ({"keep": 0.012, "scope": "local"}, "less than one weight"),
        ({"keep": 0.5, "score": "best"}, "synflow, snip"),
        ({"keep": 0.5, "score": "snip"}, "loss="),
        ({"keep": 0.5, "schedule": "cosine"}, "exponential"),
        ({"keep": 0.5, "steps": 0}, "steps"),
        ({"keep": 0.5, "score": lambda masks: {n: torch.full(m.shape, math.nan) for n, m in masks.items()}}, "NaN"),
        ({"keep": 0.5, "score": lambda masks: {}}, "nothing of shape"),
        ({"keep": 0.5, "score": "snip", "loss": lambda out: out}, "one number"),
        ({"keep": 0.5, "include": lambda name, p: False}, "nothing to prune"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            prune(model, (x,), **options)
    broken = copy.deepcopy(model)
    broken[0].weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="NaN"):
        prune(broken, (x,), keep=0.5)
    with pytest.raises(InputError, match="parametrized already"):
        prune(nn.Sequential(weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)), (torch.rand(1, 3),), keep=0.5)
    integer = nn.Linear(3, 2)
    integer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    del integer.bias
    integer.bias = None
    with pytest.raises(InputError, match="integer"):
        prune(integer, (torch.rand(1, 3),), keep=0.5)
    huge = chain((4, 4, 4)).double()
    for p in huge.parameters():
        p.data.fill_(1e200)
    with pytest.raises(InputError, match="overflow"):
        prune(huge, (torch.rand(1, 4),), keep=0.5)
    edit = prune(model, (x,), keep=0.5)
    edit.apply()
    with pytest.raises(InputError, match="parametrized already"):
        prune(model, (x,), keep=0.3)
    with pytest.raises(InputError, match="applied already"):
        edit.apply()


class Strange(torch.optim.Optimizer):
    """An optimiser of a class of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["memory"] = torch.ones_like(p)


def test_an_unknown_optimiser_is_refused_unless_told() -> None:
    model, x, _ = small()
    optimizer = Strange(model.parameters())
    optimizer.step()
    edit = prune(model, (x,), keep=0.5)
    with pytest.raises(InputError, match="Strange"):
        edit.apply(optimizer)
    assert not edit.applied and "0.weight" in dict(model.named_parameters())
    edit.apply(optimizer, unknown="reset")
    assert edit.applied and model[0].parametrizations.weight.original not in optimizer.state


# ------------------------------------------------------------------------------------------------ masks through training


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW"])
def test_masked_weights_stay_zero_through_training_and_resume_bitwise(kind: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model, x, _ = small()
        edit = prune(model, (x,), keep=0.3)
        options = {"momentum": 0.9} if kind == "SGD" else {}
        groups = [
            {"params": [model[0].weight, model[0].bias], "weight_decay": 0.1},
            {"params": [*model[2].parameters(), *model[4].parameters()]},
        ]
        optimizer = getattr(torch.optim, kind)(groups, lr=0.05, **options)
        return model, optimizer, edit

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        _, x, y = small()
        for _ in range(count):
            optimizer.zero_grad()
            for part in (slice(0, 16), slice(16, 32)):  # accumulated
                (nn.functional.cross_entropy(model(x[part]), y[part]) / 2).backward()
            optimizer.step()

    model, optimizer, edit = build()
    steps(model, optimizer, 2)  # dense
    edit = prune(model, (small()[1],), keep=0.3)
    edit.apply(optimizer)
    for n, mask in edit.masks.items():
        p = model.get_parameter(n.replace(".weight", ".parametrizations.weight.original"))
        for key, buffer in optimizer.state[p].items():
            assert key == "step" or not bool(buffer[~mask].any())
    steps(model, optimizer, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "masks": dict(edit.masks)}, tmp_path / "run.pt")
    steps(model, optimizer, 3)
    other, again, plan = build()
    plan.masks = torch.load(tmp_path / "run.pt", weights_only=True)["masks"]
    plan.apply()
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    steps(other, again, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    edit.bake()
    assert sum(int((model.get_parameter(n) != 0).sum()) for n in edit.masks) == sum(edit.kept.values())


def test_masks_under_autocast_and_compile() -> None:
    model, x, y = small()
    model, x = model.float(), x.float()
    edit = prune(model, (x,), keep=0.3)
    edit.apply()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    for n, mask in edit.masks.items():
        grad = model.get_parameter(n.replace(".weight", ".parametrizations.weight.original")).grad
        assert not bool(grad[~mask].any()) and bool(grad[mask].any())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
