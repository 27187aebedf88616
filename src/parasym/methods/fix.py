"""A remedy applied to a loaded model and written to a file: what `parasym fix` does.

Most methods need example inputs only; what needs a loss and its data gets them from a function of the user's (--data). Every result
carries its certificate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_model

from parasym.core.checkpoint import load_weights
from parasym.core.errors import CheckpointError, InputError
from parasym.core.load import Loaded, load_object
from parasym.core.results import plain
from parasym.methods.compress import compress
from parasym.methods.edit import Edit
from parasym.methods.objectives import NoiseEquilibrium, Sharpness
from parasym.methods.prune import prune
from parasym.methods.rebasin import Agreement
from parasym.methods.revive import revive
from parasym.methods.teleport import NAMED, teleport

Tell = Callable[[str, float], None]
METHODS = {
    "balance": "rescale so that what every unit receives and sends out has one norm (all charges zero)",
    "teleport": "move along the symmetries to --to minimum-norm, int8, balance, agreement (with --reference), or, with --data, "
    "sharpness or noise-equilibrium",
    "compress": "cut dead, duplicate and dependent units; the outputs stay",
    "prune": "set the least important weights to zero, --keep of them stay; no layer collapses",
    "revive": "draw units anew that are dead on any data, or repeat others; the outputs stay (--trust-inputs: dead on the example inputs)",
}
"""What needs no training: example inputs, to trace the network and to certify on, are enough but where --data is named."""
TRAINED = {
    "syre": "parasym.methods.syre(model).attach(optimizer) in the training script.",
    "dcs": "parasym.methods.dcs(model, mirror, decay, inputs=[(args, kwargs)]).apply(optimizer) in the training script.",
    "spred": "parasym.methods.spred(model, l1).apply(optimizer) in the training script.",
}
"""What acts while a network trains."""
WITH_LOSS = {
    "snip": "parasym.methods.prune(model, args, keep=0.1, score='snip', loss=lambda out: loss_fn(out, y)) in Python.",
    "grasp": "parasym.methods.prune(model, args, keep=0.1, score='grasp', loss=lambda out: loss_fn(out, y)) in Python.",
}
"""Scores that need the loss of the outputs."""
WITH_DATA = ("sharpness", "noise-equilibrium")
"""Aims that need a loss and its data."""
AIMS = (*NAMED, "agreement", *WITH_DATA)
LOSS = (
    "it must be a function without arguments that returns (loss_fn, data): loss_fn(outputs, targets), a mean over samples, or None "
    "where the model returns its loss; data = (inputs, targets), one batch or a list of batches"
)
SCORES = ("synflow", "magnitude", "random")


@dataclass(frozen=True)
class Wish:
    """What is asked for; see `METHODS`.

    Attributes:
        to: of teleport. reference: checkpoint for agreement. keep, score: of prune. trust_inputs: of compress and
            revive: what is redundant on the example inputs counts, not only what is on any data.
        data: file.py:function that returns the loss and its data (`LOSS`). batch_size: of the SGD whose noise equilibrium is meant.
    """

    method: str
    to: str | None = None
    reference: Path | None = None
    keep: float | None = None
    score: str = "synflow"
    trust_inputs: bool = False
    seed: int = 0
    data: str | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Fixed:
    """A planned remedy: the edit, whether there was anything to do, and what the user should know."""

    edit: Edit
    changed: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """The certificate holds."""
        return self.edit.certificate.ok

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.edit.to_dict(), "changed": self.changed, "notes": list(self.notes), "attributes": plain(dict(self.edit.attributes))}


def check(wish: Wish) -> None:
    """Refuse wishes that fit no method, before anything is loaded.

    Raises:
        InputError: an unknown method or aim, or an option that is missing or belongs to another method.
    """
    m = wish.method
    if wish.score in WITH_LOSS:
        raise InputError(f"{wish.score} needs a loss and its data: {WITH_LOSS[wish.score]}")
    if m in TRAINED:
        raise InputError(f"{m} acts while a network trains, which needs its data: {TRAINED[m]}")
    if m in WITH_DATA:
        extra = " --batch-size N" if m == "noise-equilibrium" else ""
        raise InputError(f"{m} is where teleport goes: --method teleport --to {m} --data FILE.py:FUNCTION{extra}; {LOSS}.")
    if m not in METHODS:
        raise InputError(f"There is no method {m!r}. Methods: {', '.join(METHODS)}.")
    if m == "teleport" and wish.to is None:
        raise InputError(f"teleport needs to know where to: --to {', '.join(AIMS)}.")
    if wish.to is not None and m != "teleport":
        raise InputError(f"--to belongs to --method teleport, not to {m}.")
    if wish.to is not None and wish.to not in AIMS:
        raise InputError(f"There is no aim {wish.to!r}. Aims: {', '.join(AIMS)}.")
    if wish.to in WITH_DATA and wish.data is None:
        raise InputError(f"--to {wish.to} needs a loss and its data: --data FILE.py:FUNCTION; {LOSS}.")
    if wish.data is not None and wish.to not in (*WITH_DATA, "agreement"):
        raise InputError(f"--data belongs to --to {', '.join((*WITH_DATA, 'agreement'))}: nothing else here reads a loss.")
    if (wish.batch_size is not None) != (wish.to == "noise-equilibrium"):
        raise InputError("--to noise-equilibrium and --batch-size N (of the SGD whose equilibrium is meant) go together.")
    if (wish.reference is not None) != (wish.to == "agreement"):
        raise InputError("--to agreement and --reference FILE (the checkpoint to agree with) go together.")
    if m == "prune" and wish.keep is None:
        raise InputError("prune needs --keep, the fraction of the weights to keep, such as --keep 0.1.")
    if wish.keep is not None and m != "prune":
        raise InputError(f"--keep belongs to --method prune, not to {m}.")
    if wish.score not in SCORES:
        raise InputError(f"There is no score {wish.score!r}. Scores that need no loss: {', '.join(SCORES)}.")
    if wish.trust_inputs and m not in ("compress", "revive"):
        raise InputError(f"--trust-inputs belongs to --method compress or revive, not to {m}.")


def fix(loaded: Loaded, wish: Wish, progress: Tell | None = None) -> Fixed:
    """Plan the remedy on a loaded model; nothing is touched.

    Raises:
        InputError, TraceError, NotASymmetryError: what, where, and what to do.
        CheckpointError: the reference cannot be read or does not fit.
    """
    check(wish)
    model, args, kwargs, seed = loaded.model, loaded.args, loaded.kwargs, wish.seed
    edit: Edit
    if wish.method == "balance":
        edit = teleport(model, args, kwargs, to="balance", seed=seed, progress=progress)
    elif wish.method == "teleport":
        edit = teleport(model, args, kwargs, to=_aim(wish), seed=seed, progress=progress)
    elif wish.method == "compress":
        edit = compress(model, args, kwargs, trust_inputs=wish.trust_inputs, seed=seed, progress=progress)
    elif wish.method == "prune":
        assert wish.keep is not None
        edit = prune(model, args, kwargs, keep=wish.keep, score=wish.score, seed=seed)  # type: ignore[arg-type]
    else:
        edit = revive(model, args, kwargs, trust_inputs=wish.trust_inputs, seed=seed)
    notes = [str(edit.summary["note"])] if edit.summary.get("note") else []
    if edit.attributes:
        sizes = ", ".join(f"{k} = {v}" for k, v in edit.attributes.items())
        notes.append(f"the file fits a network with {sizes}: build it so before you load the file")
    return Fixed(edit, bool(edit.after), tuple(notes))


def _aim(wish: Wish) -> Any:
    """The objective of a teleport, with its loss and data where it has some."""
    loss_fn, data = loss_and_data(wish.data) if wish.data is not None else (None, None)
    if wish.to == "sharpness":
        return Sharpness(loss_fn, data)
    if wish.to == "noise-equilibrium":
        return NoiseEquilibrium(loss_fn, data, batch_size=wish.batch_size or 1)
    if wish.reference is not None:
        return Agreement(load_weights(wish.reference), loss_fn=loss_fn, data=data)
    return wish.to


def loss_and_data(target: str) -> tuple[Any, Any]:
    """What the user's function returns: (loss_fn or None, data).

    Raises:
        InputError: it is missing, fails, or returns something else.
    """
    found = load_object(target, LOSS)
    if not isinstance(found, tuple) or len(found) != 2 or not (found[0] is None or callable(found[0])):
        kinds = ", ".join(type(part).__name__ for part in found) if isinstance(found, tuple) else type(found).__name__
        raise InputError(f"{target}() returned ({kinds}); {LOSS}.")
    return found


def write(fixed: Fixed, out: Path) -> Path:
    """Write the fixed weights as safetensors, whole or not at all; what was done goes into the file's metadata.

    Raises:
        CheckpointError: the file cannot be written.
    """
    model = fixed.edit.edited()
    part = out.with_name(out.name + ".part")
    try:
        save_model(model, str(part), metadata={"format": "pt", "parasym": json.dumps(fixed.to_dict(), allow_nan=False)})
        os.replace(part, out)  # noqa: PTH105
    except OSError as error:
        raise CheckpointError(f"{out} could not be written: {error}.") from error
    finally:
        part.unlink(missing_ok=True)
    return out


def lines(fixed: Fixed) -> list[tuple[str, str]]:
    """(what, value) pairs for people: the objective or the cut, and the certificate."""
    s, c = fixed.edit.summary, fixed.edit.certificate
    out = []
    if "before" in s and "after" in s:
        out.append((str(s["to"]), f"{s['before']:.4g} → {s['after']:.4g}"))
    if "kept" in s and "weights" in s:
        out.append(("weights kept", f"{s['kept']:,} of {s['weights']:,}"))
    if "parameters_before" in s:
        out.append(("parameters", f"{s['parameters_before']:,} → {s['parameters_after']:,}"))
    for key in ("removed", "revived"):
        out += [(key, f"{r['count']} of {r['of']} units of {r['where'] or 'the model'} ({r['kind']})") for r in s.get(key, ())]
    what = "fewest weights left in a layer" if fixed.edit.method == "prune" else "change of the outputs"
    value = "none" if c.value is None else f"{c.value:.3g}"
    out.append(("certificate", f"{'holds' if c.ok else 'DOES NOT HOLD'}: {what} {value}" + (f" ({c.note})" if c.note else "")))
    if "exact" in s:
        out.append(("before rounding", f"change of the outputs {s['exact']:.1e} in float64"))
    return out
