"""Names and groups of dictionary entries, in the field's words."""

from __future__ import annotations

from collections.abc import Sequence

from parasym.symmetry.dictionary import Entry, Term
from parasym.symmetry.readers import Reader


def where_of(parameters: Sequence[str]) -> str:
    """The module path that some parameters share."""
    parts = [p.split(".")[:-1] or [""] for p in parameters]
    if not parts:
        return ""
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def power(base: str, count: int) -> str:
    return base if count == 1 else f"{base}^{count}"


def group_of(entry: Entry, dim: int) -> str:
    """The group of an entry: GL(4)^2, R+^6, O(3), R^5."""
    c, n = entry.copies.count, entry.size
    if entry.algebra == "scale":
        return power("R+", c)
    if entry.algebra == "gl":
        return power(f"GL({n})", c)
    if entry.algebra == "so":
        return power(f"SO({n})" if n == 2 else f"O({n})", c)
    if entry.algebra == "so1":
        return f"O({n - 1})"
    return power("R", dim)


def name_of(entry: Entry, readers: Sequence[Reader], frozen: bool = False) -> str:
    """What a family is, from the roles its terms play."""
    ops = {t.op for _, t in entry.terms}
    if not entry.terms or "free" in ops:
        return "unread parameters (free)"
    if ops == {"ones"}:
        return "mean direction that no reader sees"
    if ops == {"normal"}:
        return "normal of a norm's output in its reader"
    if ops & {"absorb", "fold", "shift"}:
        return _shift_name(entry, ops)
    written = {(r.weight, r.out_axis) for r in readers}
    read = {(r.weight, r.in_axis) for r in readers}
    if entry.algebra in ("so", "so1"):
        if entry.space.startswith("pair:") or (entry.size == 2 and entry.copies.count > 1):
            return "rotation of each rotary plane (queries against keys)"
        fixed = " that fixes the mean" if entry.algebra == "so1" else ""
        return "rotation of the stream" + fixed if any(t.gain is not None for _, t in entry.terms) else "rotation of the space" + fixed
    if entry.algebra == "gl":
        duals = [t for _, t in entry.terms if t.op == "dual"]
        if duals and all((t.place.parameter, t.place.axis) in written and (t.place.parameter, t.place.axis) not in read for t in duals):
            return f"GL({entry.size}) between two products (query against key)" + _per(entry)
        return f"GL({entry.size}) between writer and reader" + _per(entry)
    return _scale_name(entry, written)


def _per(entry: Entry) -> str:
    return ", one for each head" if entry.copies.count > 1 else ""


def _shift_name(entry: Entry, ops: set[str]) -> str:
    if ops == {"shift"}:
        signs = {w > 0 for w, _ in entry.terms}
        return "constant that two tables or biases share" if len(signs) == 2 else "shift that no reader sees"
    return "shift absorbed by the next bias" if "absorb" in ops else "shift absorbed through the normal of the norm"


def _scale_name(entry: Entry, written: set[tuple[str, int]]) -> str:
    up = [t for w, t in entry.terms if w > 0]
    down = [t for w, t in entry.terms if w < 0]
    if not entry.copies.local:
        return "one common scale"
    if any(t.op == "recentre" for _, t in entry.terms):
        return "scale of each filter against the gain of its frozen norm"
    if (up and not down) or (down and not up):
        return "scale that the norm removes"
    first = [t for t in (*up, *down) if _is_gain(t)]
    if first and any(not _is_gain(t) for t in (*up, *down)):
        return (
            "norm gain against its readers"
            if all((t.place.parameter, t.place.axis) not in written for t in (*up, *down))
            else "rescaling of each channel"
        )
    return "rescaling of each unit"


def _is_gain(t: Term) -> bool:
    return t.place.size == t.place.index.numel() and len(t.place.cross) == 0 and t.place.axis == 0
