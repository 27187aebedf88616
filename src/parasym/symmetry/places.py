"""Index spaces as the dictionary needs them: every atom, product and rotary pair, and where each sits on the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from parasym.symmetry.axes import Monomial
from parasym.symmetry.dictionary import Place
from parasym.symmetry.spaces import Spaces

_MAX_COLUMNS = 1 << 22


def atom_name(number: int) -> str:
    return f"a{number}"


def places_of(spaces: Spaces) -> dict[str, list[Place]]:
    """Index space -> its places, smallest structures first.

    Besides the atoms: products of atoms that form whole axes (``heads x width`` as one space), and pairs of blocks that run
    over the same atom (the two halves of a rotary embedding), as a space of size two for each index of the atom.
    """
    graph = spaces.graph
    out: dict[str, list[Place]] = {}
    products: dict[tuple[tuple[int, ...], ...], list[Place]] = {}
    for name, p in graph.params.items():
        for axis in range(p.dim() if p.numel() else 0):
            blocks = spaces.blocks(name, axis)
            for slot, block in enumerate(blocks):
                for atom in dict.fromkeys(block.atoms):
                    if p.shape[axis] <= _MAX_COLUMNS:
                        out.setdefault(atom_name(atom), []).append(place_at(spaces, name, axis, slot, atom))
            if len(blocks) == 1 and len(blocks[0].atoms) > 1:
                products.setdefault((blocks[0].atoms,), []).append(
                    Place(name, axis, (-1,), torch.arange(p.shape[axis])[:, None], {}, p.shape[axis])
                )
            for first, second in _pairs(blocks):
                key = f"pair:{blocks[first].atoms[-1]}"
                out.setdefault(key, []).append(_pair(name, axis, p.shape[axis], first, blocks[first], blocks[second]))
    for atoms, found in products.items():
        out["x".join(map(str, atoms[0]))] = found
    return {k: v for k, v in out.items() if v[0].index.shape[0] > 0}


def place_at(spaces: Spaces, name: str, axis: int, slot: int, atom: int) -> Place:
    """One atom in one block of an axis."""
    block = spaces.blocks(name, axis)[slot]
    index, outer = _columns(block, atom)
    cross = {k: v for k, v in _cross(spaces, name, axis).items() if k != atom_name(atom) and k not in outer}
    return Place(name, axis, (slot,), index, outer, spaces.graph.params[name].shape[axis], cross)


def pair_place(spaces: Spaces, name: str, axis: int, slot: int) -> Place:
    """A rotary pair: two neighbouring blocks over the same atoms."""
    blocks = spaces.blocks(name, axis)
    return _pair(name, axis, spaces.graph.params[name].shape[axis], slot, blocks[slot], blocks[slot + 1])


def _cross(spaces: Spaces, name: str, axis: int) -> dict[str, Tensor]:
    """Index spaces on the other axes of a parameter: name -> index of each entry of those axes, flattened."""
    p = spaces.graph.params[name]
    others = [a for a in range(p.dim()) if a != axis]
    if p.numel() // max(1, p.shape[axis]) > _MAX_COLUMNS:
        return {}
    out: dict[str, Tensor] = {}
    for i, a in enumerate(others):
        blocks = spaces.blocks(name, a)
        if len(blocks) != 1:
            continue
        before = torch.Size([p.shape[b] for b in others[:i]]).numel()
        after = torch.Size([p.shape[b] for b in others[i + 1 :]]).numel()
        for atom, stride, size in zip(blocks[0].atoms, blocks[0].strides, blocks[0].sizes, strict=True):
            index = (torch.arange(p.shape[a]) // stride) % size
            out.setdefault(atom_name(atom), index.repeat_interleave(after).repeat(before))
    return out


def _columns(block: Monomial, atom: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Positions (n, m) of an atom's units, and what the m columns run over."""
    n = block.sizes[block.atoms.index(atom)]
    index = torch.full((n, 1), block.offset)
    outer: dict[str, Tensor] = {}
    for a, stride, size in zip(block.atoms, block.strides, block.sizes, strict=True):
        if a == atom:
            index = index + stride * torch.arange(n)[:, None]
            continue
        m = index.shape[1]
        index = (index[:, :, None] + stride * torch.arange(size)).reshape(n, m * size)
        outer = {k: v.repeat_interleave(size) for k, v in outer.items()}
        outer[atom_name(a)] = torch.arange(size).repeat(m)
    return index, outer


def _pairs(blocks: tuple[Monomial, ...]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for i, b in enumerate(blocks[:-1]):
        c = blocks[i + 1]
        if b.atoms and b.atoms == c.atoms and b.strides == c.strides and not any(i in p for p in out):
            out.append((i, i + 1))
    return out


def _pair(name: str, axis: int, size: int, slot: int, first: Monomial, second: Monomial) -> Place:
    at = torch.zeros(1, dtype=torch.long)
    outer: dict[str, Tensor] = {}
    for a, stride, s in zip(first.atoms, first.strides, first.sizes, strict=True):
        m = len(at)
        at = (at[:, None] + stride * torch.arange(s)).reshape(-1)
        outer = {k: v.repeat_interleave(s) for k, v in outer.items()}
        outer[atom_name(a)] = torch.arange(s).repeat(m)
    return Place(name, axis, (slot,), torch.stack([first.offset + at, second.offset + at]), outer, size)
