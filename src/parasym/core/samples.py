"""More inputs of the same kind: floats of the given mean and spread, tokens of the embedding's range, masks as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import Node

from parasym.core.errors import InputError
from parasym.core.graph import Graph

Batch = list[Tensor]


def flatten(graph: Graph, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Batch:
    """The tensors of a call, in the order of the graph's inputs; floating-point ones in float64.

    Raises:
        InputError: their number or shapes differ from the traced example, or a value is not finite.
    """
    leaves = [a for a in pytree.tree_leaves((tuple(args), dict(kwargs or {}))) if isinstance(a, Tensor)]
    if len(leaves) != len(graph.inputs):
        raise InputError(
            f"the traced model takes {len(graph.inputs)} tensors, got {len(leaves)}. Every entry of inputs must have the structure of args."
        )
    nodes = {n.name: n for n in graph.nodes}
    out = []
    for name, leaf in zip(graph.inputs, leaves, strict=True):
        expected = nodes[name].meta.get("val")
        if isinstance(expected, Tensor) and tuple(expected.shape) != tuple(leaf.shape):
            raise InputError(
                f"input {name} has shape {tuple(leaf.shape)}, the traced example had {tuple(expected.shape)}. "
                f"Batches must all have the shape of the example."
            )
        if leaf.is_floating_point():
            leaf = leaf.detach().to("cpu", torch.float64)
            if not bool(torch.isfinite(leaf).all()):
                raise InputError(f"input {name} holds NaN or infinite values.")
        out.append(leaf.detach().cpu())
    return out


def draw(graph: Graph, like: Batch, generator: torch.Generator, wide: bool = False) -> Batch:
    """A fresh batch of the same kind as ``like``.

    Args:
        wide: give every sample an amplitude and an offset of its own, so that no unit stays on one side of its threshold.
    """
    ranges = token_ranges(graph)
    out = []
    for name, t in zip(graph.inputs, like, strict=True):
        if t.is_floating_point():
            spread, centre = float(t.std()) if t.numel() > 1 else 1.0, float(t.mean())
            spread = spread if spread > 0 else 0.0
            x = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            if wide and t.dim() > 1:
                one = (t.shape[0],) + (1,) * (t.dim() - 1)
                amplitude = torch.randn(one, generator=generator, dtype=torch.float64).exp()
                x = amplitude * (x + 1.5 * torch.randn(one, generator=generator, dtype=torch.float64))
            out.append(centre + spread * x)
        elif t.dtype == torch.bool or name not in ranges:
            constant = t.numel() == 0 or bool((t == t.reshape(-1)[0]).all())
            out.append(
                t.clone()
                if constant or t.dtype == torch.bool
                else torch.randint(int(t.min()), int(t.max()) + 1, t.shape, generator=generator, dtype=t.dtype)
            )
        else:
            out.append(torch.randint(0, ranges[name], t.shape, generator=generator, dtype=t.dtype))
    return out


def token_ranges(graph: Graph) -> dict[str, int]:
    """Integer inputs that index a table -> number of its rows (the smallest, where there are several)."""
    out: dict[str, int] = {}
    for n in graph.nodes:
        if n.target is not torch.ops.aten.embedding.default or not isinstance(n.args[1], Node):
            continue
        table, index = n.args[0], n.args[1]
        rows = int(table.meta["val"].shape[0]) if isinstance(table, Node) and isinstance(table.meta.get("val"), Tensor) else 0
        while index.op == "call_function" and index.all_input_nodes:
            index = index.all_input_nodes[0]
        if index.name in graph.inputs and rows:
            out[index.name] = min(rows, out.get(index.name, rows))
    return out


def generic_parameters(graph: Graph, generator: torch.Generator, own_scale: bool = True) -> dict[str, Tensor]:
    """Parameters in general position: every tensor redrawn, so that no unit is dead or special by accident.

    Args:
        own_scale: keep the scale of each tensor; else matrices are drawn at the scale of a fresh layer, vectors at 0.3.
    """
    out = {}
    for name, p in graph.params.items():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.numel() == 0 or p.device.type == "meta":
            out[name] = 0.5 * noise
            continue
        rms = min(float(p.square().mean().sqrt()), 3 * float(p.abs().median()) + 1e-12) or float(
            p.square().mean().sqrt()
        )  # outliers do not set the scale
        spread = float(p.std()) if p.numel() > 1 else 0.0
        if rms > 0 and spread < 0.5 * rms:  # gains around one, slopes, tables of constants: keep the mean, vary around it
            out[name] = p.mean() + 0.3 * rms * noise
        else:
            fresh = 1.3 / (p.numel() / p.shape[0]) ** 0.5 if p.dim() > 1 else 0.3
            out[name] = (max(rms, 0.3) if own_scale else fresh) * noise
    return out
