"""Index spaces: the algebra of axes, and what is read off graphs."""

import time

import pytest
import torch
from torch import Tensor, nn

from known_answers import CASES
from parasym.core.graph import trace
from parasym.symmetry.axes import Axis, concatenation, cut, find, freeze, monomials, product, segments, unify
from parasym.symmetry.spaces import Atom, Spaces, constant_axes, find_spaces


def read(model: nn.Module, *args: Tensor) -> Spaces:
    return find_spaces(trace(model, args))


def known(name: str) -> Spaces:
    model, inputs = CASES[name].build()
    return read(model, *inputs[0])


def free(spaces: Spaces) -> list[Atom]:
    return [a for a in spaces.atoms if a.frozen is None and a.size > 1 and a.places]


def places(a: Atom) -> set[tuple[str, int]]:
    return {(p.tensor, p.axis) for p in a.places}


# --- the algebra of axes ---------------------------------------------------------------------------------------------


def test_a_fused_axis_is_refined_to_a_concatenation_of_products() -> None:
    fused = Axis(24)
    q, rest = cut(fused, 8)
    k, v = cut(rest, 8)
    heads = Axis(2)
    for part, width in ((q, Axis(4)), (k, Axis(4)), (v, Axis(4))):
        unify(part, product([heads, width]))
    assert repr(fused) == "((2*4)+(2*4)+(2*4))"
    assert len({id(find(p.parts[0])) for p in segments(fused)}) == 1


def test_a_product_meets_a_concatenation_by_distributing_its_leading_factor() -> None:
    by_reshape, by_split = Axis(24), Axis(24)
    unify(by_reshape, product([Axis(3), Axis(8)]))
    cut(cut(by_split, 16)[0], 8)
    unify(by_reshape, by_split)
    assert repr(by_split) == "(8+8+8)"
    assert len({id(find(s)) for s in segments(by_split)}) == 1  # one space read three times


def test_an_inner_factor_can_be_cut() -> None:
    group = Axis(5)
    axis = product([Axis(2), group, Axis(4)])
    queries, rest = cut(group, 3)
    cut(rest, 1)
    blocks = monomials(axis)
    assert [b.offset for b in blocks] == [0, 12, 16]
    assert blocks[0].sizes == (2, 3, 4) and blocks[0].strides == (20, 4, 1)
    assert queries.size == 3


def test_factors_that_divide_each_other_get_a_common_refinement_others_freeze() -> None:
    a, b = product([Axis(2), Axis(6)]), product([Axis(4), Axis(3)])
    unify(a, b)
    assert repr(a) == repr(b) == "(2*2*3)"
    c, d = product([Axis(2), Axis(3)]), product([Axis(3), Axis(2)])
    unify(c, d)
    assert find(c).frozen is not None and find(c) is find(d)


def test_freezing_reaches_every_part_and_whatever_is_unified_later() -> None:
    inner, outer = Axis(3), Axis(2)
    freeze(product([outer, inner]), "because")
    assert inner.frozen == outer.frozen == "because"
    late = Axis(3)
    unify(late, inner)
    assert find(late).frozen == "because"


def test_long_concatenations_do_not_recurse() -> None:
    axis = Axis(3000)
    for i in range(1, 1500):
        cut(axis, i)
    assert len(segments(axis)) == 1500
    assert len(segments(concatenation([axis, Axis(2)]))) == 1501


def test_constants_freeze_only_what_they_tell_apart() -> None:
    same = constant_axes(torch.ones(3, 4), "varies")
    assert all(a.frozen is None for a in same)
    identity = constant_axes(torch.eye(4), "varies")
    assert identity[0] is identity[1] and identity[0].frozen is None
    slopes = constant_axes(torch.tensor([[1.0], [2.0]]).expand(2, 3), "varies")
    assert slopes[0].frozen == "varies" and slopes[1].frozen is None
    mask = constant_axes(torch.ones(4, 4).tril(), "varies")
    assert [a.frozen for a in mask] == ["varies", "varies"]


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_hidden_units_tie_rows_biases_slopes_and_columns() -> None:
    one, two = free(known("mlp-prelu-channel"))
    assert places(one) == {("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("2.weight", 1)} and one.size == 6
    assert places(two) == {("2.weight", 0), ("2.bias", 0), ("3.weight", 0), ("4.weight", 1)} and two.size == 4


def test_a_shared_slope_does_not_join_the_channels() -> None:
    assert all(p.tensor not in ("1.weight", "3.weight") for a in free(known("mlp-prelu-shared")) for p in a.places)


def test_a_flattened_channel_is_a_block_of_columns() -> None:
    spaces = known("conv-relu-pool-linear")
    channel = next(a for a in free(spaces) if ("c2.weight", 0) in places(a))
    ((axis, index),) = spaces.positions(channel, "fc.weight")
    assert axis == 1
    assert index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_a_fused_query_key_value_weight_is_three_blocks_of_heads() -> None:
    spaces = known("gpt-design")
    heads = next(a for a in free(spaces) if any(a.number in b.parents for b in free(spaces)))
    got = spaces.positions(heads, "qkv.weight")
    assert [axis for axis, _ in got] == [0, 0, 0]
    assert [index.tolist() for _, index in got] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert spaces.axis_of("qkv.weight", 0).kind == "sum" and spaces.axis_of("proj.weight", 1).kind == "prod"
    assert str(spaces.axis_of("proj.bias", 0)).endswith("[4]")


def test_the_widths_of_a_head_belong_to_the_head() -> None:
    spaces = known("gpt-design")
    inside = [a for a in free(spaces) if a.parents]
    assert len(inside) == 2 and len({a.parents for a in inside}) == 1  # query-key width and value width, both per head


def test_grouped_queries_belong_to_a_key_value_head() -> None:
    pytest.importorskip("transformers")
    spaces = known("llama_untied")
    attention = "model.model.layers.0.self_attn."
    groups = next(a for a in free(spaces) if (attention + "k_proj.weight", 0) in places(a))
    queries = next(a for a in free(spaces) if places(a) == {(attention + "q_proj.weight", 0), (attention + "o_proj.weight", 1)})
    assert queries.parents == (groups.number,) and queries.size == groups.size == 2
    rotary = [a for a in spaces.atoms if a.frozen and (attention + "k_proj.weight", 0) in places(a) and a.size > 1]
    assert rotary, "the planes of the rotary embedding are frozen by its frequencies"


def test_a_recurrent_loop_ties_rows_to_columns_and_gates_stay_apart() -> None:
    (state,) = free(known("lstm"))
    blocks = [(p.axis, p.slot) for p in state.places if p.tensor == "r.weight_hh_l0"]
    assert blocks == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]


def test_running_statistics_move_and_rotary_frequencies_do_not() -> None:
    spaces = known("conv-bn-relu-eval")
    assert {p.tensor for p in free(spaces)[0].places} >= {"b_b1_running_mean", "b_b1_running_var"}
    assert set(spaces.carriers) == {f"b_b{i}_running_{s}" for i in (1, 2) for s in ("mean", "var")}


def test_group_norm_and_grouped_convolution_factor_the_channels() -> None:
    spaces = known("conv-gn-relu")
    assert spaces.axis_of("c1.weight", 0).kind == "prod"
    model = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 9, 1, groups=3), nn.Flatten(), nn.Linear(9 * 4, 2))
    grouped = read(model, torch.randn(3, 2, 2, 2))
    assert str(grouped.axis_of("2.weight", 0)).count("*") == 1
    groups = [a for a in free(grouped) if not a.parents]
    assert [a.size for a in groups] == [3] and len([a for a in free(grouped) if a.parents]) == 2


def test_units_indexed_by_two_axes_are_parents_of_each_other() -> None:
    a, b = free(known("einsum-mlp"))
    assert a.parents == (b.number,) and b.parents == (a.number,)


def test_members_that_share_a_weight_share_the_units() -> None:
    units = [a for a in free(known("batch-ensemble")) if ("l1.W", 0) in places(a)]
    assert len(units) == 1 and units[0].parents == ()


def test_frozen_atoms_say_why() -> None:
    spaces = known("mlp-relu-bias")
    reasons = {a.frozen for a in spaces.atoms if a.places and a.frozen}
    assert reasons == {"model input", "model output"}
    with pytest.raises(KeyError, match="no tensor called"):
        spaces.axis_of("nowhere", 0)


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cumsum(self.a(x), 1) + torch.linalg.matrix_exp(self.a(x)[:4])[:1])


class Experts(nn.Module):
    """Each token is read by the two experts its router ranks highest; ``told``: which they are is an output too."""

    def __init__(self, told: bool = False) -> None:
        super().__init__()
        self.gate, self.norm = nn.Linear(5, 4, bias=False), nn.RMSNorm(5)
        self.up, self.down = nn.Parameter(torch.randn(4, 3, 5)), nn.Parameter(torch.randn(4, 5, 3))
        self.told = told

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        share, which = self.gate(h).softmax(-1).topk(2)
        picked = which.reshape(-1)
        inner = torch.bmm(self.up[picked], h.repeat_interleave(2, 0).unsqueeze(-1)).relu()
        out = (torch.bmm(self.down[picked], inner).squeeze(-1) * share.reshape(-1, 1)).reshape(len(x), 2, -1).sum(1)
        return out + which.sum(-1, keepdim=True) if self.told else out


def test_experts_picked_by_a_router_are_one_space_and_own_their_units() -> None:
    spaces = read(Experts(), torch.randn(6, 5))
    expert = next(a for a in free(spaces) if a.size == 4)
    assert places(expert) == {("gate.weight", 0), ("up", 0), ("down", 0)}
    unit = next(a for a in free(spaces) if places(a) == {("up", 1), ("down", 2)})
    assert unit.parents == (expert.number,)  # units of different experts may be exchanged differently


def test_experts_whose_numbers_are_read_stay_in_order() -> None:
    spaces = read(Experts(told=True), torch.randn(6, 5))
    assert all("gate.weight" not in a.parameters for a in free(spaces))
    unit = next(a for a in free(spaces) if places(a) == {("up", 1), ("down", 2)})
    assert unit.parents == ()


def test_unknown_operators_freeze_what_they_touch_and_are_named() -> None:
    spaces = read(_Odd(), torch.randn(5, 3))
    assert "linalg_matrix_exp" in "".join(spaces.unknown.values())
    assert free(spaces) == []


class _Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y[:, ::2] * y[:, 1::2])


def test_strided_slices_pair_units() -> None:
    spaces = read(_Strided(), torch.randn(5, 3))
    (pairs,) = free(spaces)
    ((_, index),) = spaces.positions(pairs, "a.weight")
    assert index.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_meta_graphs_read_the_same(device: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5), nn.GELU(), nn.Linear(5, 2)).to(device)
    graph = trace(model, (torch.empty(3, 2, 4, 4, device=device),), values=device != "meta")
    assert [a.size for a in free(find_spaces(graph))] == [4, 5]


def test_time_is_linear_in_the_layers() -> None:
    def seconds(layers: int) -> float:
        with torch.device("meta"):
            model = nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(512, 512), nn.GELU())])
        graph = trace(model, (torch.empty(2, 512, device="meta"),), values=False)
        start = time.perf_counter()
        spaces = find_spaces(graph)
        took = time.perf_counter() - start
        assert len(free(spaces)) == layers - 1
        return took

    small, large = min(seconds(20) for _ in range(3)), min(seconds(120) for _ in range(2))
    assert large < 18 * small + 0.05
