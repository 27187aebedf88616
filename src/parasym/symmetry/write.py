"""Families of a small twin, written down on the full model: the same terms on the full model's index spaces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from parasym.core.errors import ParasymError
from parasym.symmetry.dictionary import Copies, DictionaryAction, Entry, Place, Term, row_shape
from parasym.symmetry.discover import rows_of
from parasym.symmetry.places import atom_name, pair_place, place_at
from parasym.symmetry.readers import frozen_norms, readers
from parasym.symmetry.spaces import Spaces

Layer = tuple[int, ...]


class WritingError(ParasymError):
    """An entry of the twin has no counterpart on the full model; says which tensor differs."""


class Writer:
    """Writes entries of a twin on the full model.

    Args:
        full, twin: index spaces of the two graphs.
        names: full parameter -> twin parameter.
        layer_of: full parameter -> indices of the repeated layers it lies in.
        constants: constants of the full graph (statistics of frozen norms), where their values are at hand.
    """

    def __init__(
        self, full: Spaces, twin: Spaces, names: Mapping[str, str], layer_of: Callable[[str], Layer], constants: Mapping[str, object]
    ) -> None:
        self.full, self.twin, self.layer_of, self.constants = full, twin, layer_of, constants
        self.preimages: dict[str, list[str]] = {}
        for f, t in names.items():
            if f in full.graph.params:
                self.preimages.setdefault(t, []).append(f)
        self.by_base = {(base_of(f, layer_of(f)), layer_of(f)): f for f in full.graph.params}
        self.readers = {(r.weight, r.in_axis): r for r in readers(full.graph, stacked=True)}
        self.frozen = {f.offset: f for f in frozen_norms(full.graph)}

    def ways(self, entry: Entry) -> Iterator[list[Entry]]:
        """What `write` says; after it, where a twin of one layer leaves it open, the same through all layers at once."""
        yield self.write(entry)
        layers = {self._twin_layer(p) for p in _involved(entry)}
        inner = sorted(layer for layer in layers if layer)
        if len(inner) == 1 and () in layers and not self._many(inner[0]):
            with suppress(WritingError):
                yield self._by_space(entry, _involved(entry))

    def write(self, entry: Entry) -> list[Entry]:
        """All counterparts of an entry.

        One for each layer where it lives in one layer; one for each pair of neighbours where it joins different parts of two;
        a single one where it joins a layer with what stands before or after them all; else one for each index space that occurs
        at the same places as the twin's (a stream through all layers is one space, one through the layers of a stage is many).
        """
        involved = _involved(entry)
        missing = [p for p in involved if p not in self.preimages]
        if missing:
            raise WritingError(f"{missing[0]} of the twin has no counterpart in the full model")
        by_layer: dict[Layer, set[str]] = {}
        for p in involved:
            by_layer.setdefault(self._twin_layer(p), set()).add(base_of(p, self._twin_layer(p)))
        inner = sorted(layer for layer in by_layer if layer)
        if all(len(self.preimages[p]) == 1 for p in involved):
            return [self._entry(entry, {p: self.preimages[p] for p in involved})]
        if len(inner) == 1 and () in by_layer and self._many(inner[0]):
            return [self._entry(entry, {p: self._at(p, self._end(inner[0], p)) for p in involved})]
        if len(inner) == 1:
            layers = dict.fromkeys(self.layer_of(f) for p in involved for f in self.preimages[p])
            return [self._entry(entry, {p: self._at(p, layer) for p in involved}) for layer in layers if layer]
        if () not in by_layer and len(inner) == 2 and by_layer[inner[0]] != by_layer[inner[1]]:
            every = sorted({self.layer_of(f) for p in involved for f in self.preimages[p]})
            pairs = itertools.pairwise(every)
            return [
                self._entry(entry, {p: self._at(p, lower if self._twin_layer(p) == inner[0] else upper) for p in involved})
                for lower, upper in pairs
            ]
        return self._by_space(entry, involved)

    def _by_space(self, entry: Entry, involved: Sequence[str]) -> list[Entry]:
        """One entry for each index space of the full model that occurs at the same kinds of places as the twin's."""
        whole = {p: self.preimages[p] for p in involved}
        number = int(entry.space[1:]) if entry.space[1:].isdigit() else -1
        met = {self._atoms({p: [f]}).get(entry.space) for p in involved for f in whole[p]}
        if number < 0 or len(met) == 1:
            return [self._entry(entry, whole)]
        terms: dict[tuple[str, int, tuple[int, ...], str], tuple[float, Term]] = {}
        for weight, term in entry.terms:
            key = (self._twin_base(term.place.parameter), term.place.axis, term.place.branch, term.op)
            if terms.setdefault(key, (weight, term))[0] != weight:
                raise WritingError(f"{term.place.parameter} takes part in another way than in other layers")
        alike = replace(entry, terms=tuple(terms.values()))
        wanted = self._occurrences(self.twin, number, self._twin_base)
        out = []
        for atom in self.full.atoms:
            if self._occurrences(self.full, atom.number, self._full_base) == wanted:
                places = [(self._full_base(f), f) for f in atom.parameters if f in self.full.graph.params]
                chosen = {p: [f for b, f in places if b == self._twin_base(p)] for p in _involved(alike)}
                out.append(self._entry(alike, chosen, atom.number))
        if not out:
            raise WritingError("no index space of the full model occurs at the same places")
        return out

    def _occurrences(self, spaces: Spaces, atom: int, base: Callable[[str], str]) -> frozenset[tuple[str, int, int]]:
        """Where an index space occurs, up to the numbers of layers."""
        return frozenset((base(p.tensor), p.axis, p.slot) for p in spaces.atoms[atom].places if p.tensor in spaces.graph.params)

    def _full_base(self, name: str) -> str:
        return base_of(name, self.layer_of(name))

    def _twin_base(self, name: str) -> str:
        return self._full_base(self.preimages[name][0]) if name in self.preimages else name

    def _many(self, layer: Layer) -> bool:
        """Whether the twin has other layers beside this one."""
        return len({self._twin_layer(p) for p in self.preimages} - {()}) > 1

    def _end(self, layer: Layer, p: str) -> Layer:
        """The first layer stands for itself, a later one for the last."""
        found = sorted(self.layer_of(f) for q in self.preimages for f in self.preimages[q] if self._twin_layer(q) == layer)
        return found[-1]

    def _at(self, p: str, layer: Layer) -> list[str]:
        """The counterpart of a twin parameter in one layer of the full model (itself, where it lies in none)."""
        if self._twin_layer(p) == ():
            return self.preimages[p]
        found = self.by_base.get((base_of(self.preimages[p][0], self.layer_of(self.preimages[p][0])), layer))
        if found is None:
            raise WritingError(f"{p} of the twin has no counterpart in layer {layer}")
        return [found]

    def _twin_layer(self, name: str) -> Layer:
        """The layer of a twin parameter: that of the first full parameter it stands for."""
        return min((self.layer_of(f) for f in self.preimages[name]), default=())

    def _entry(self, entry: Entry, chosen: Mapping[str, Sequence[str]], on: int | None = None) -> Entry:
        """The entry at the chosen parameters; with ``on``, only where that index space lies on the term's axis."""
        atoms = self._atoms(chosen) | ({} if on is None else {entry.space: on})
        terms = []
        for weight, term in entry.terms:
            for f in chosen[term.place.parameter]:
                if on is None or any(on in b.atoms for b in self.full.blocks(f, term.place.axis)):
                    terms.append((weight, self._term(term, f, entry.space, atoms, chosen)))
        local = []
        for name, _ in entry.copies.local:
            found = self._counterpart(name, atoms)
            if found is None:
                raise WritingError(f"index space {name} of the twin has no counterpart")
            local.append(found)
        space, size = self._space(entry, atoms, terms)
        return Entry(entry.algebra, space, size, Copies(tuple(local)), tuple(terms))

    def _atoms(self, chosen: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """Twin index space -> atom of the full model, by position in the axes of the parameters involved."""
        out: dict[str, int] = {}
        for t, fulls in chosen.items():
            for f in fulls:
                for axis in range(self.twin.graph.params[t].dim()):
                    small, large = self.twin.blocks(t, axis), self.full.blocks(f, axis)
                    if [len(b.atoms) for b in small] != [len(b.atoms) for b in large]:
                        continue
                    for a, b in zip(small, large, strict=True):
                        for x, y in zip(a.atoms, b.atoms, strict=True):
                            out.setdefault(atom_name(x), y)
        return out

    def _counterpart(self, space: str, atoms: Mapping[str, int]) -> tuple[str, int] | None:
        """Name and size of an index space of the full model: of an atom, or of a product of atoms ("3x5")."""
        if space in atoms:
            return atom_name(atoms[space]), self.full.atoms[atoms[space]].size
        numbers = [atoms.get(atom_name(int(part))) for part in space.split("x") if part.isdigit()]
        known = [n for n in numbers if n is not None]
        if "x" not in space or len(known) < len(space.split("x")):
            return None
        return "x".join(map(str, known)), math.prod(self.full.atoms[n].size for n in known)

    def _space(self, entry: Entry, atoms: Mapping[str, int], terms: Sequence[tuple[float, Term]]) -> tuple[str, int]:
        found = self._counterpart(entry.space, atoms)
        if found is not None:
            return found
        if entry.space.startswith("pair:"):
            number = atoms.get(atom_name(int(entry.space[5:])))
            return f"pair:{number}", 2
        return entry.space, terms[0][1].place.index.shape[0]

    def _place(self, place: Place, f: str, space: str) -> Place:
        params = self.full.graph.params
        if place.axis >= params[f].dim():
            raise WritingError(f"{f} has another number of axes than its twin")
        if place.branch == ():
            n = params[f].shape[place.axis]
            index = torch.arange(n)
            return Place(
                f,
                place.axis,
                (),
                index[None, :] if (place.index.shape[0] == 1 and place.index.shape[1] > 1) or space == "" else index[:, None],
                {},
                n,
            )
        if place.branch == (-1,):
            n = params[f].shape[place.axis]
            return Place(f, place.axis, (-1,), torch.arange(n)[:, None], {}, n)
        small, large = self.twin.blocks(place.parameter, place.axis), self.full.blocks(f, place.axis)
        if len(small) != len(large):
            raise WritingError(f"axis {place.axis} of {f} is made of {len(large)} parts, its twin's of {len(small)}")
        slot = place.branch[0]
        if space.startswith("pair:"):
            return pair_place(self.full, f, place.axis, slot)
        position = small[slot].atoms.index(int(space[1:]))
        if len(small[slot].atoms) != len(large[slot].atoms):
            raise WritingError(f"part {slot} of axis {place.axis} of {f} is another product than its twin's")
        return place_at(self.full, f, place.axis, slot, large[slot].atoms[position])

    def _beside(self, place: Place, f: str, chosen: Mapping[str, Sequence[str]], space: str, known: str | None) -> Place:
        """The counterpart of a gain, offset or bias in the same layer as the weight it belongs to."""
        if known is not None:
            return self._place(place, known, space if place.branch else "whole")
        options = chosen.get(place.parameter, self.preimages.get(place.parameter, []))
        layer = self.layer_of(f)
        best = [o for o in options if self.layer_of(o) == layer] or [o for o in options if self.layer_of(o) == ()] or list(options)
        if not best:
            raise WritingError(f"{place.parameter} of the twin has no counterpart")
        return self._place(place, best[0], space if place.branch else "whole")

    def _term(self, term: Term, f: str, space: str, atoms: Mapping[str, int], chosen: Mapping[str, Sequence[str]]) -> Term:
        place = self._place(term.place, f, space)
        r = self.readers.get((f, place.axis)) if term.op in ("normal", "fold", "absorb", "mode", "dual") else None
        gain = self._beside(term.gain, f, chosen, space, r.gain if r else None) if term.gain else None
        offset = self._beside(term.offset, f, chosen, space, r.offset if r else None) if term.offset else None
        target = self._beside(term.target, f, chosen, space, r.bias if r else None) if term.target else None
        rows = None
        if term.rows_at is not None:
            other, slot = term.rows_at
            blocks = self.full.blocks(f, other)
            rows = rows_of(self.full.graph.params[f].shape, place.axis, place_at(self.full, f, other, slot, blocks[slot].atoms[0]))
        factor = self._factor(f, term.op) if term.factor is not None else None
        return replace(term, place=place, gain=gain, offset=offset, target=target, rows=rows, factor=factor)

    def _factor(self, f: str, op: str) -> Tensor | None:
        norm = self.frozen.get(f)
        mean, scale = (self.constants.get(norm.mean), self.constants.get(norm.scale)) if norm else (None, None)
        if not isinstance(mean, Tensor) or not isinstance(scale, Tensor):
            return torch.ones(self.full.graph.params[f].shape, dtype=torch.float64)
        return (scale * mean if op == "recentre" else scale).reshape(-1)


def _involved(entry: Entry) -> list[str]:
    names: dict[str, None] = {}
    for _, t in entry.terms:
        names[t.place.parameter] = None  # gains, offsets and biases beside a weight are found beside its counterpart
    return list(names)


def base_of(name: str, layer: Layer) -> str:
    """A name with its layer numbers left open."""
    left = list(layer)
    parts = []
    for part in name.split("."):
        if left and part.isdigit() and int(part) == left[0]:
            left.pop(0)
            part = "*"
        parts.append(part)
    return ".".join(parts)


def action_of(entry: Entry, params: Mapping[str, Tensor]) -> DictionaryAction:
    """The action of a written entry."""
    rows = row_shape(entry.terms[0][1], params) if entry.algebra in ("row", "free") else 0
    return DictionaryAction(entry, rows)
