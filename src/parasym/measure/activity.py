"""What units do on data: range, moments and affine fits of their outputs; what their activation commutes with."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from parasym.core.graph import Graph
from parasym.core.samples import Batch
from parasym.measure.judge import Judge, Runner, Watch
from parasym.measure.moments import Moments
from parasym.measure.units import Layer, Region, Source
from parasym.symmetry.readers import Reader
from parasym.symmetry.symmetry import Params

_CHUNK = 1 << 22  # numbers handled at a time


def unit_samples(x: Tensor, axis: int) -> Tensor:
    """(n, samples) view or copy of an activation."""
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _values(region: Region, live: Mapping[str, Any]) -> Iterable[Tensor]:
    """(n, k+1, chunk) values of inputs and output, a bounded number of samples at a time."""
    shape = live[region.output.name].shape
    rows = [unit_samples(live[x.name].expand(shape), region.axis) for x in (*region.inputs, region.output)]
    n, samples = rows[0].shape
    step = max(1, _CHUNK // max(1, n * len(rows)))
    for at in range(0, samples, step):
        yield torch.stack([r[:, at : at + step] for r in rows], 1)


def observe(runner: Runner, params: Params, batches: Sequence[Batch], layers: Sequence[Layer]) -> None:
    """Pass all data once and collect what the units do; probe their activations and in-weights on the first batch."""
    for i, batch in enumerate(batches):
        watch: list[Watch] = []
        for layer in layers:
            for j, region in enumerate(layer.regions):
                names = tuple(x.name for x in (*region.inputs, region.output))
                watch.append((names, partial(_collect, layer, region)))
                if i == 0 and j == 0:
                    made = {r.node for s in region.sources for r in s.writers}
                    names += tuple(_operand(runner.graph, n) for n in runner.order if n.name in made)
                    watch.append((names, partial(_probe, runner.graph, params, layer, region)))
        if watch:
            runner.run(params, runner.graph.prepare(batch), watch)


def _collect(layer: Layer, region: Region, live: Mapping[str, Any]) -> None:
    for values in _values(region, live):
        if layer.moments is None:
            layer.moments = Moments.start(values)
        into = layer.moments if layer.wider is None else layer.wider
        if values.shape[1] == into.first.shape[1]:
            into.add(values)


def observe_fresh(judge: Judge, layers: Sequence[Layer]) -> None:
    """Go on with fresh data, beside the figures of the given data."""
    for layer in layers:
        layer.wider = copy.deepcopy(layer.moments)
    names = [(layer, region, tuple(x.name for x in (*region.inputs, region.output))) for layer in layers for region in layer.regions]
    for i, case in enumerate(judge.cases):
        if not case[0]:
            judge.look([(n, partial(_collect, layer, region)) for layer, region, n in names], i)


def replay(graph: Graph, nodes: Iterable[Node], live: Mapping[str, Any], at: Mapping[str, Tensor], wanted: str) -> Tensor:
    """A few nodes evaluated again, with some values replaced."""
    here = {**live, **at}
    for n in nodes:
        if n.name not in at:
            here[n.name] = graph._evaluate(n, here)
    return here[wanted]  # type: ignore[no-any-return]


def _probe(graph: Graph, params: Params, layer: Layer, region: Region, live: Mapping[str, Any]) -> None:
    """Homogeneity and parity of the activation, and the affine map that leads to each of its inputs."""
    noise = torch.Generator().manual_seed(0)
    z = {i.name: 2 * torch.randn(live[i.name].shape, generator=noise, dtype=torch.float64) for i in region.inputs}
    out = region.output.name
    h = replay(graph, region.nodes, live, z, out)
    size = float(h.abs().max()) + 1e-300
    powers = []
    for name in z:
        twice = replay(graph, region.nodes, live, {**z, name: 2 * z[name]}, out)
        power = math.log2((float(twice.abs().sum()) + 1e-300) / (float(h.abs().sum()) + 1e-300))
        good = abs(power) > 1e-3 and float((twice - 2**power * h).abs().max()) <= 1e-9 * size
        powers.append(round(power, 6) if good else None)
    layer.powers = tuple(powers)
    turned = [replay(graph, region.nodes, live, {**z, name: -z[name]}, out) for name in z]
    layer.signs = tuple(next((s for s in (1, -1) if float((back - s * h).abs().max()) <= 1e-12 * size), 0) for back in turned)
    if len(layer.regions) == 1:
        maps = [_effective(graph, params, region, i, s, live) for i, s in zip(region.inputs, region.sources, strict=True)]
        layer.effective = [m for m in maps if m is not None] if all(m is not None for m in maps) else None


def _effective(graph: Graph, params: Params, region: Region, z: Node, source: Source, live: Mapping[str, Any]) -> Tensor | None:
    """(n, d) rows [alpha_j w_j r, beta_j] with z_j = alpha_j w_j . x + beta_j and r the root mean square of x, so that all entries
    have the units of z; biases, gains and frozen statistics are included.

    The way from the one contraction to z is run on constants; None where it is not one affine map for each unit.
    """
    if source.foreign or len(source.writers) != 1:
        return None
    writer = source.writers[0]
    c = next(n for n in source.path if n.name == writer.node)
    like, rank = c.meta["val"], c.meta["val"].dim()
    at = out_axis(writer, graph, rank)
    shape = [like.shape[at] if i == at else 1 for i in range(rank)]
    index = torch.arange(like.shape[at], dtype=torch.float64).reshape(shape).expand(like.shape)
    nodes = [n for n in source.path if n.name != c.name]
    runs = []
    for x in (torch.zeros_like(index), torch.ones_like(index), index):
        y = unit_samples(replay(graph, nodes, live, {c.name: x}, z.name), region.axis)
        if float((y - y[:, :1]).abs().max()) > 1e-9 * (float(y.abs().max()) + 1e-300):
            return None  # padding, positions, batch statistics
        runs.append(y[:, 0])
    beta, alpha = runs[0], runs[1] - runs[0]
    on = alpha.abs() > 1e-12 * alpha.abs().max()
    if not bool(on.any()):
        return None  # a norm with the statistics of the batch forgets constants
    row = torch.where(on, (runs[2] - beta) / torch.where(on, alpha, 1.0), 0.0).round().long()
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    heard = unit_samples(replay(graph, nodes, live, {c.name: noise}, z.name), region.axis).std(1)
    sent = unit_samples(noise, at).std(1)
    if int(row.min()) < 0 or int(row.max()) >= len(sent):
        return None
    if bool(((heard - alpha.abs() * sent[row]).abs() > 1e-9 * heard.max()).any()):
        return None  # the way depends on what else is in the batch
    W = params[writer.weight].movedim(writer.out_axis, 0).flatten(1)
    if len(W) != len(sent) or float((alpha * row + beta - runs[2]).abs().max()) > 1e-6 * float(runs[2].abs().max() + 1):
        return None
    size = live[_operand(graph, c)].square().mean().sqrt()
    return torch.cat([alpha[:, None] * W[row] * size, beta[:, None]], 1)


def _operand(graph: Graph, contraction: Node) -> str:
    """What a contraction reads, beside its weight."""
    return next(a.name for a in contraction.all_input_nodes if graph.kind.get(a.name) != "param")


def out_axis(r: Reader, graph: Graph, rank: int) -> int:
    """Axis of a contraction's result (or operand) that carries the features."""
    spatial = graph.params[r.weight].dim() - 2
    return rank - 1 if spatial == 0 else rank - spatial - 1
