"""What to do about collapsed states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parasym.measure.findings import Row

_SYRE = "from parasym.methods import syre; hook = syre(model).attach(optimizer)"
_SPRED = "from parasym.methods import spred; handle = spred(model, 1e-4, group='out').apply(optimizer)"


@dataclass(frozen=True)
class _Remedy:
    severity: str
    what: str
    why: str
    command: str = ""
    method: str = ""
    training: str = ""


def advice(rows: Sequence[Row]) -> list[dict[str, str]]:
    """What to do about what was found, worst first.

    Commands are one-liners for a Python session in which ``model`` is the audited model and ``args``, ``kwargs`` its arguments, or empty
    where no command does it. ``method`` names the method of `parasym.methods` that acts on the finding (`parasym fix --method` does the
    same from the command line), and is empty where none does. ``training`` is a line for the training script, where the remedy acts
    through training and needs its data: ``model``, ``args``, ``kwargs`` as above and the ``optimizer``.

    Args:
        rows: from :func:`collapse` or :func:`weight_collapse`.
    """
    out = []
    for r in rows:
        remedy = _remedy(r)
        if remedy is not None:
            command = remedy.command or _python(remedy.method)
            row = {"severity": remedy.severity, "where": r["where"], "what": remedy.what, "why": remedy.why}
            out.append({**row, "command": command, "method": remedy.method, "training": remedy.training})
    order = {"high": 0, "medium": 1, "low": 2, "info": 3}
    return sorted(out, key=lambda a: order[a["severity"]])


def _remedy(r: Row) -> _Remedy | None:
    share = r["count"] / max(1, r["of"])
    kind, note = r["kind"], r["note"]
    if kind == "dead" and "no output depends" in note:
        return _Remedy(
            "low",
            f"{r['parameters_lost']:,} parameters are never used",
            "No output depends on them: they cost memory and optimiser state, and weight decay still moves them. Freeze or delete them.",
            _freeze(r),
        )
    if kind == "dead" and note.startswith("rows"):
        return _Remedy(
            "info",
            f"{r['count']} rows of the table vanish",
            "A padding row is meant to; any other was lost to weight decay, which shrinks rows that no token picks.",
        )
    if kind == "dead":
        gradient = "A constant output passes no gradient to the in-weights: only weight decay moves them, and the unit stays dead."
        zero = note.startswith("zero units")
        why = (
            "Weights in and out vanish together: the gradients vanish with them, and weight decay and gradient noise keep the unit there."
            if zero
            else gradient
        )
        do = (
            " Delete it: the outputs do not change. Compress deletes what inputs of any size leave dead; with trust_inputs=True "
            "(--trust-inputs), also what no input like yours wakes."
            if r["removable"]
            else " Removing it changes outputs on other data; measure on more of yours before you do."
        )
        return _Remedy(
            "high" if share > 0.2 else "medium" if share > 0.02 else "low",
            f"{r['count']} of {r['of']} units {_are(r)} dead",
            why
            + do
            + " To use it again, draw its in-weights anew (revive)."
            + (" Syre keeps units alive from then on." if r["removable"] else " Spred lets training decide which units go."),
            method="compress" if r["removable"] else "revive",
            training=_SYRE if r["removable"] else _SPRED,
        )
    if kind == "duplicate" and r.get("parameters_lost", 0):
        equal = note.startswith("in- and out-weights equal")
        exact = equal and max((d for d in r["distance"] or [] if d is not None), default=0.0) <= 1e-9
        why = (
            "Equal units get equal gradients, so SGD, momentum and Adam never part them; weight decay pulls near copies together."
            if equal
            else "They compute one feature several times; gradients can still part them."
        )
        return _Remedy(
            "medium" if equal else "low",
            f"{r['count']} of {r['of']} units {'repeats another' if r['count'] == 1 else 'repeat others'}",
            why
            + " Merge them (compress adds their out-weights), or draw one of each pair anew (revive)."
            + (" Syre parts equal units in training." if exact else " DCS makes near copies equal in training."),
            method="compress" if r["removable"] else "revive" if equal else "",
            training=_SYRE if exact else _merge(r),
        )
    if kind in ("always-on", "linearised"):
        return _Remedy(
            "medium" if share > 0.5 else "info",
            f"{r['count']} of {r['of']} units {_are(r)} linear on this data",
            "On this data the activation bends nothing there; a layer of such units adds no depth.",
        )
    if kind == "rank":
        why = "Weight decay on two factors acts as a nuclear norm on their product; a direction it has pruned has no gradient."
        return _Remedy(
            "medium" if share > 0.25 else "low",
            f"{r['count']} of {r['of']} directions {_are(r)} empty",
            why + " Use a smaller inner width, or less decay on these factors; syre with a random metric keeps them at full rank.",
            training=_SYRE.replace("syre(model)", "syre(model, metric='random')"),
        )
    if kind == "head":
        return _Remedy(
            "medium",
            f"{r['count']} of {r['of']} heads {'vanishes or repeats another' if r['count'] == 1 else 'vanish or repeat others'}",
            "A head whose product vanishes adds nothing of its own; equal heads get equal gradients. Prune them, or decay attention less; "
            "syre parts them.",
            training=_SYRE,
        )
    if kind == "norm-dead":
        return _Remedy(
            "medium" if share > 0.1 else "low",
            f"{r['count']} of {r['of']} channels {'has' if r['count'] == 1 else 'have'} lost the gain",
            "The channel carries its shift only; weight decay on gains drives this. Exclude gains and biases from weight decay.",
            _decay(),
        )
    if kind == "imbalance":
        why = "Factors of different size see different effective learning rates, and gradient flow conserves the difference. "
        why += "Weight decay shrinks it; rescaling to equal norms removes it at once and leaves the function as it is."
        return _Remedy(
            "low" if share < 0.5 else "medium", f"{r['count']} of {r['of']} factor pairs {_are(r)} out of balance", why, method="balance"
        )
    return None


def _are(r: Row) -> str:
    return "is" if r["count"] == 1 else "are"


def _freeze(r: Row) -> str:
    return f"[model.get_parameter(n).requires_grad_(False) for n in {r['parameters']!r}]"


def _decay() -> str:
    wide, narrow = (f"[p for p in model.parameters() if p.dim() {test} 2]" for test in (">=", "<"))
    return f"groups = [{{'params': {wide}}}, {{'params': {narrow}, 'weight_decay': 0.0}}]"


def _merge(r: Row) -> str:
    """The line that makes near copies equal through training, with the symmetry that exchanges them."""
    if not r.get("groups") or not r["parameters"]:
        return ""
    return (
        "import parasym; from parasym.methods import dcs; from parasym.symmetry.mirror import Mirror; "
        "swap = next(s for s in parasym.symmetries(model, args, kwargs) "
        f"if 'exchange' in s.name and {r['parameters'][0]!r} in s.parameters); "
        f"mirror = Mirror.merged(swap, dict(model.named_parameters()), {r['groups'][0]!r}); "
        "handle = dcs(model, mirror, 1e-3, inputs=[(args, kwargs)]).apply(optimizer)"
    )


def _python(method: str) -> str:
    """The one-liner that runs a method on the audited model and keeps the result."""
    if not method:
        return ""
    call = "teleport(model, args, kwargs, to='balance')" if method == "balance" else f"{method}(model, args, kwargs)"
    return f"from parasym.methods import {call.partition('(')[0]}; model = {call}.bake()"


def on_the_command_line(row: dict[str, str], target: str) -> None:
    """Put the shell command of a row of advice in the place of its one-liner; ``target`` is TARGET with the options it was given."""
    if row.get("method"):
        row["command"] = f"parasym fix {target} --method {row['method']} --out fixed.safetensors"
