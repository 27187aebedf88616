"""Where trained weights sit relative to the collapsed states: units that are dead, zero, copies or affine, heads and factors that
lost rank, channels whose gain vanished, rows and parameters that nothing reads, factors out of balance.

Units are found from the graph: maximal sets of non-linear elementwise operators between contractions, whatever the activation.
What a finding is worth is measured, not argued: the units are removed in a copy of the parameters (out-weights zeroed, constants
folded into the next bias, copies merged) and the outputs compared in float64, on the given data and on fresh data of the same kind.

Sources: stochastic-collapse R7 (zero and duplicate neurons), dcs-mirror-symmetry R4 (which state each symmetry collapses to),
_symmetry-catalog section 0 (charges of GL and rescaling), law-of-balance (balance of factors).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from parasym.core.graph import Graph
from parasym.core.guards import rng_state
from parasym.core.samples import Batch, draw
from parasym.measure.activity import observe, observe_fresh
from parasym.measure.advice import advice
from parasym.measure.copies import nearest, raw_blocks, rescaled, scale_blocks, weight_rows
from parasym.measure.coverage import unmeasured_rows
from parasym.measure.findings import Row, Thresholds, common, public
from parasym.measure.heads import LINEAR, factors, fits, linear_rows
from parasym.measure.imbalance import scale_rows
from parasym.measure.judge import Judge, Runner
from parasym.measure.layers import layer_rows
from parasym.measure.neurons import independent_units, r7_rows
from parasym.measure.norms import norm_rows
from parasym.measure.slices import Read
from parasym.measure.tables import dead_parameter_rows, table_rows
from parasym.measure.units import find_layers
from parasym.symmetry.dictionary import Entry
from parasym.symmetry.spaces import Spaces, find_spaces
from parasym.symmetry.symmetry import Params

__all__ = ["Row", "Thresholds", "advice", "collapse", "find_layers", "independent_units", "nearest", "weight_collapse"]


def collapse(
    graph: Graph,
    params: Params,
    batches: Sequence[Batch],
    spaces: Spaces,
    entries: Sequence[Entry],
    *,
    thresholds: Thresholds | None = None,
    seed: int = 0,
    checks: int = 2,
    r7: tuple[float, float] | None = None,
) -> list[Row]:
    """Measure every collapsed state of a model on given data.

    Args:
        graph, params: a traced graph and its parameters in float64; neither is changed.
        batches: data, each a list of tensors in the order of the graph's inputs.
        spaces: index spaces of the graph (found anew if they belong to another one).
        entries: certified dictionary families of this model; may be empty, then linear factors are read off the index spaces.
        thresholds: what counts as collapsed.
        seed: of the fresh inputs.
        checks: how many of the batches, and how many fresh ones, each removal is measured on.
        r7: (zero_tol, dup_tol) adds rows with the number of independent neurons of stochastic-collapse R7.

    Returns:
        Rows of the audit's "collapse" table, with more keys: ``parameters`` (names the finding is about), ``axis`` (of the first of them
        along which unit j is entry j, or None) and, for dead units, ``margin`` (shift of the pre-activation, in its own standard
        deviations, that makes the unit vary again; None: none found).
        ``distance`` lists one figure for each listed unit; where more than 64 units are meant, five quantiles (``quantiles`` True).
        Rows of the kind "not measured" name weights that were passed over, and say why.
    """
    t = thresholds or Thresholds()
    if spaces.graph is not graph:
        spaces = find_spaces(graph)
    params = {k: v.to(torch.float64) for k, v in params.items()}
    entries = [e for e in entries if fits(e, {k: tuple(p.shape) for k, p in params.items()})]
    with torch.no_grad(), rng_state():
        layers = find_layers(graph, spaces)
        runner = Runner(graph)
        generator = torch.Generator().manual_seed(seed)
        fresh = [draw(graph, batches[i % len(batches)], generator) for i in range(checks)]
        observe(runner, params, batches, layers)
        judge = Judge(runner, params, batches[:checks], fresh)
        observe_fresh(judge, layers)
        read = params.__getitem__
        rows = norm_rows(graph, params, spaces, judge, t)
        gone = {(r["_node"], u) for r in rows for u in r["_all"]}
        for layer in layers:
            rows += layer_rows(layer, params, judge, t, gone)
        pairs = factors(spaces, layers, entries)
        rows += linear_rows(entries, pairs, read, judge, t)
        rows += scale_rows(entries, read, t)
        rows += table_rows(graph, read, judge, batches, t)
        rows += dead_parameter_rows(graph, judge)
        rows += unmeasured_rows(graph, spaces, layers, [*pairs, *(e for e in entries if e.algebra in LINEAR)])
        if r7 is not None:
            rows += r7_rows(independent_units(graph, spaces, read, *r7), r7)
    return [public(r) for r in rows]


def weight_collapse(
    entries: Sequence[Entry], read: Read, spaces: Spaces | None = None, *, thresholds: Thresholds | None = None
) -> list[Row]:
    """What weights alone say: duplicates, zero units, rank deficits, dead heads, imbalance. No forward pass.

    Args:
        entries: certified dictionary families.
        read: name -> tensor in any dtype, or a stand-in that reads rows of it from a file (``TensorFile.rows``): a checkpoint is
            then streamed, a bounded number of rows at a time.
        spaces: index spaces of the architecture (also traced on the meta device); adds the units that no continuous family
            reaches, such as those of a GELU layer, and rows of tables.
        thresholds: what counts as collapsed.

    Returns:
        Rows as those of :func:`collapse`; nothing was run, so ``digits`` is None and ``removable`` False.
    """
    t = thresholds or Thresholds()
    rows: list[Row] = []
    with torch.no_grad():
        covered: set[str] = set()
        layers = find_layers(spaces.graph, spaces) if spaces is not None else []
        scales = [e for e in entries if e.algebra == "scale" and e.copies.local == ((e.space, e.size),) and e.size > 1 and _is_layer(e)]
        for layer in layers:
            blocks = raw_blocks(layer, read)
            if blocks is not None:
                covered |= set(layer.parameters)
                blocks = rescaled(
                    layer, blocks, next((e for e in scales if e.size == layer.size and set(e.parameters) <= set(layer.parameters)), None)
                )
                rows += weight_rows(layer.where, blocks, layer.parameters, t)
        for e in scales:
            if not covered.intersection(e.parameters):
                found = scale_blocks(e, read)
                if found is not None:
                    rows += weight_rows(common(e.parameters), found, e.parameters, t)
        pairs = factors(spaces, layers, entries) if spaces is not None else []
        rows += linear_rows(entries, pairs, read, None, t)
        rows += scale_rows(entries, read, t)
        if spaces is not None:
            rows += table_rows(spaces.graph, read, None, (), t)
            rows += unmeasured_rows(spaces.graph, spaces, layers, [*pairs, *(e for e in entries if e.algebra in LINEAR)])
    return [public(r) for r in rows]


def _is_layer(entry: Entry) -> bool:
    """Matrices both write to and read from the space: its units are neurons, not the channels of a norm's gain."""
    matrices = [w > 0 for w, t in entry.terms if t.op == "mode" and t.place.cross]
    return any(matrices) and not all(matrices)
