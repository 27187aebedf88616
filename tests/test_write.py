"""Families of a twin written on models whose layers come in stages of different widths, certified on their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from parasym.core.graph import trace
from parasym.core.samples import flatten
from parasym.symmetry.full import audit_full_size
from parasym.symmetry.write import Writer

transformers = pytest.importorskip("transformers")


def staged(kind: str, **config: Any) -> nn.Module:
    """A network of four stages, weights and running statistics in general position."""
    torch.manual_seed(0)
    settings = {"hidden_sizes": [16, 24, 32, 48], "depths": [2, 3, 2, 2], "embedding_size": 8, **config}
    made = getattr(transformers, f"{kind}Config")(**settings)
    model: nn.Module = getattr(transformers, f"{kind}ForImageClassification")(made).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if "running" in name:
                b.add_(0.2 * torch.rand_like(b))
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "config"), [("ResNet", {}), ("RegNet", {"groups_width": 8})])
def test_each_stage_has_its_own_stream(kind: str, config: dict[str, Any]) -> None:
    model = staged(kind, **config)
    kwargs = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))}
    graph = trace(model, (), kwargs)
    batch = flatten(graph, (), kwargs)
    found = audit_full_size(model, (), kwargs, graph, [batch], torch.Generator().manual_seed(0), lambda stage, fraction: None)
    assert found.explained == 1.0
    assert not found.search.refuted
    assert not found.search.undecided
    assert max(s.residual for s in found.symmetries) <= 1e-10
    ends = [f"stages.{stage}.layers.0.shortcut.normalization.weight" for stage in range(4)]
    streams = [s for s in found.symmetries if s.kind == "diagonal" and s.name == "norm gain against its readers"]
    for end, width in zip(ends, (16, 24, 32, 48), strict=True):
        own = [s for s in streams if any(p.endswith(end) for p in s.parameters)]
        assert [s.dim for s in own] == [width], end
    moved = {p for s in found.symmetries for p in s.parameters}
    assert set(graph.params) - moved == {"classifier.1.bias"}


class Layers(nn.Module):
    """Two layers on one stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_a_product_of_index_spaces_has_a_counterpart_only_where_all_its_factors_have() -> None:
    from parasym.symmetry.spaces import find_spaces

    spaces = find_spaces(trace(Layers(5), (torch.randn(3, 5),)))
    writer = Writer(spaces, spaces, {n: n for n in spaces.graph.params}, lambda name: (), {})
    sizes = [a.size for a in spaces.atoms]
    assert writer._counterpart("3x4", {"a3": 0, "a4": 1}) == ("0x1", sizes[0] * sizes[1])
    assert writer._counterpart("a3", {"a3": 1}) == ("a1", sizes[1])
    assert writer._counterpart("3x4", {"a3": 0}) is None
    assert writer._counterpart("", {"a3": 0}) is None
