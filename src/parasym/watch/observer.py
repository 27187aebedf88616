"""Watch a training run and never change it.

The watcher hangs on the optimiser's step hooks, which fire under ``torch.compile``, gradient accumulation, loss scaling and every
trainer; it needs no module hook but one call's arguments. It reads weights and gradients, writes none, and whatever it raises ends in one
warning and not in the training loop.
"""

from __future__ import annotations

import logging
import math
import pickle
import time as clock
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn

from parasym.core.errors import InputError, RecordError
from parasym.core.functional import functional
from parasym.core.guards import rng_state
from parasym.laws.charges import Charge
from parasym.measure.gradients import LossFn
from parasym.watch.books import Books, rate_of
from parasym.watch.budget import NEVER, Budget, Meter
from parasym.watch.finding import Found, few, find, is_sharded
from parasym.watch.noise import MicroNoise, PairNoise
from parasym.watch.noise import restore as restore_pairs
from parasym.watch.probe import COLLAPSED, collapse_rows, collapse_summary, remedy_of, sample_rows, sharpness_rows
from parasym.watch.ranks import OtherRankError, Ranks
from parasym.watch.record import Alert, Record, Row
from parasym.watch.sinks import Sink, Sinks, ready

log = logging.getLogger("parasym")

MEASURES = ("core", "drift", "noise", "samples", "collapse", "sharpness")
"""core: charges, norms, rates, loss; drift: how fast the charges change, for their predictions; noise: gradients of successive steps and
of micro-batches; samples: gradients of single samples."""

_SHARES = {"core": 0.2, "drift": 0.5, "noise": 0.05, "samples": 0.05, "collapse": 0.1, "sharpness": 0.1}
_PRIORS = {"core": 0.0, "drift": 0.3, "noise": 0.2, "samples": 5.0, "collapse": 10.0, "sharpness": 60.0}  # in steps, until one was timed
_REPLAN = 8  # steps between two looks at the plan
_FAR = 200  # ranks meet at least so often, to plan anew
_HARMLESS = ("closing", "a sink", "reading the first batch")  # what may fail without ending the watch
_CAPTURED = 32  # samples kept of the first batch
_DATA_COLLAPSE = 3_000_000  # parameters up to which collapse is measured on data


class Watch:
    """A watched run; made by `watch`. Use as a context, or call `close` at the end.

    Attributes:
        step: optimiser steps seen (skipped ones of a loss scaler are not), counted from where the run was resumed.
        record: the record being written; None on other ranks than the first, and after it failed.
        found: what was found on the model; None before the first step, and where nothing could be found.
        budget: what watching costs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn | None,
        *,
        every: int | Mapping[str, int],
        budget: float | None,
        path: str | Path | Record | None,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        batch: Any,
        charges: Sequence[Charge] | None,
        head: Any,
        measure: Sequence[str],
        sinks: Sequence[Sink | str],
        resume: bool,
        step: int,
        meta: Mapping[str, Any] | None,
        seed: int,
        tol: float,
    ) -> None:
        self.model, self.optimizer, self.loss_fn, self.head = model, optimizer, loss_fn, head
        self.step, self.seed, self.tol = step, seed, tol
        self.found: Found | None = None
        self.closed = False
        self.started = step
        self._given = (tuple(args or ()), dict(kwargs or {})) if args is not None or kwargs is not None else _call_of(batch, loss_fn)
        self._batch, self._charges = batch, charges
        self._captured: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._capture: Any = None
        self._coarse: float | None = None
        self._warned: set[str] = set()
        self._silent = self._told = False  # watching failed here; on some rank, and all know
        self._line_search = isinstance(optimizer, torch.optim.LBFGS)
        self._inner = functional(model, values=False).model
        self._params = _live(self._inner)
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._sharded = any(is_sharded(p) for p in self._params.values())
        self._ranks = Ranks(several and self._sharded, next((p.device for p in self._params.values()), torch.device("cpu")))
        self._distributed = several and (self._sharded or type(model).__name__ == "DistributedDataParallel")  # ranks step together
        self._rank = dist.get_rank() if several else 0
        self._meets = self._distributed  # ranks agree on the plan; no longer once they step apart (``join``)
        self._idle = self._rank > 0 and not self._sharded  # replicas: the first rank sees all there is
        self._mine: float | None = None
        self._agreed: float | None = None
        self._books: Books | None = None
        self._pairs, self._micro = PairNoise(self._sum), MicroNoise(self._listening)
        self._seen_collapse: set[tuple[str, str]] = set()
        self._alerted: dict[tuple[str, str], float] = {}
        self._loss: dict[str, Any] = {}
        self._due: tuple[str, ...] = ()
        self._stamps: list[tuple[int, int]] | None = None  # of the weights after the last step, where it was not looked at
        self._paired = False  # the noise was due at the last step: this one is the second of the pair
        self._rows: list[Row] = []
        self._alerts: list[tuple[Any, ...]] = []
        self._stored: Mapping[str, Any] | None = None
        steps = {m: every if isinstance(every, int) else int(every.get(m, 1)) for m in MEASURES}
        meters = {m: Meter(_SHARES[m], steps[m], _PRIORS[m]) for m in MEASURES}
        for name, m in meters.items():
            m.active = name in measure
            m.next = step + 1 if not m.prior or budget is None else step + 3
        if self._sharded or self._idle or not meters["core"].active:  # shards would be gathered for it, which costs what a look costs
            meters["drift"].active = False
        for m in meters.values():
            m.next = m.next if m.active else NEVER
        self.budget = Budget(budget, meters)
        self.budget.start = step
        made = ready(sinks) if self._rank == 0 else []  # before there is a record: a name that is wrong leaves none behind
        self.record = self._open_record(path, resume, step, meta) if self._rank == 0 else None
        folder = self.record.path.parent if self.record is not None else Path()
        self.sinks = Sinks(made, {**self._facts(), **dict(meta or {})}, folder, step)
        self._capture_next()
        pre, post = torch.compiler.disable(self._pre), torch.compiler.disable(self._post)
        self._hooks = [optimizer.register_step_pre_hook(pre), optimizer.register_step_post_hook(post)]

    # -- opening and closing -----------------------------------------------------------------------------------------------------

    def _open_record(self, path: Any, resume: bool, step: int, meta: Mapping[str, Any] | None) -> Record | None:
        if path is None or isinstance(path, Record):
            return path
        if resume:
            return Record.resume(path, step or None)  # without a step, what is loaded or written next says where it goes on
        return Record.create(path, {**self._facts(), **dict(meta or {})})

    def _facts(self) -> dict[str, Any]:
        groups = [{k: v for k, v in g.items() if isinstance(v, int | float | bool | str | tuple)} for g in self.optimizer.param_groups]
        return {
            "model": type(self._inner).__name__,
            "parameters": sum(p.numel() for p in self._params.values()),
            "optimizer": type(self.optimizer).__name__,
            "groups": groups,
            "budget": self.budget.share,
            "every": {n: m.every for n, m in self.budget.meters.items() if m.active},
            "ranks": dist.get_world_size() if self._distributed else 1,
            "sharded": self._sharded,
            "torch": torch.__version__,
        }

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close("finished" if kind is None else kind.__name__)

    def close(self, outcome: str | None = "finished") -> None:
        """Take the hooks off and close the record. Closing twice does nothing.

        Args:
            outcome: how the run ended, as in `Record.close`.
        """
        if self.closed:
            return
        self.closed = True
        for hook in (*self._hooks, self._capture):
            if hook is not None:
                hook.remove()
        self._micro.disarm()
        with self._safely("closing"):
            self._last_look()
            self._missed()
            self._flush()
        with self._safely("a sink"):
            self.sinks.close()
        if self.record is not None:
            self.record.close(outcome)

    def _last_look(self) -> None:
        """Look at the charges once more, so that every step of the run is in what they are held against. Not where that takes all ranks,
        and not where something else than the optimiser wrote the weights since (the best ones of the run were loaded)."""
        if self._silent or self._books is None or self._stamps is None or self._stamps != self._books.stamps():
            return
        with torch.no_grad(), rng_state():
            self._rows += self._books.close()

    def _missed(self) -> None:
        """Say which measurements the budget never allowed."""
        if self._silent or self.budget.share is None:
            return
        for name, m in self.budget.meters.items():
            if m.active and not m.times and self.step > self.started:
                cost = m.cost(self.budget.step_time)
                text = f"{name} was not measured: about {cost:.2g} s for one, more than {self.budget.share} of this run allowed for it"
                self._alerts.append((self.step, "info", "", text, "raise budget=, or leave it out of measure=", "cost"))

    # -- what trainers tell ------------------------------------------------------------------------------------------------------

    def log(self, **values: Any) -> None:
        """Hand over numbers of the present step, ``log(loss=loss)``; kept until the next observation, and read only then.

        Args:
            values: name -> number or tensor of one number; averaged over ranks.
        """
        for k, v in values.items():
            self._loss[k] = v.detach() if isinstance(v, Tensor) else v

    # -- hooks -------------------------------------------------------------------------------------------------------------------

    def _capture_next(self) -> None:
        if getattr(self._inner, "_compiled_call_impl", None) is not None and self.model is self._inner:
            return  # compiled in place: a hook would become part of the compiled program
        self._capture = self.model.register_forward_pre_hook(_FirstCall(self), with_kwargs=True)

    def _on_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle, self._capture = self._capture, None
        if handle is not None:
            handle.remove()
        with self._safely("reading the first batch"), torch.inference_mode(False), torch.no_grad():
            kinds = {p.device.type for p in self._params.values()}
            self._coarse = max([_eps(torch.get_autocast_dtype(k)) for k in kinds if torch.is_autocast_enabled(k)], default=0.0)
            self._captured = few(args, kwargs, _CAPTURED)
            if self._books is not None:  # opened before the first call, by a rule that makes it inside its step
                self._books.coarse = self._precision()

    def _precision(self) -> float:
        """The precision gradients are computed in."""
        return max([self._coarse or 0.0, *(_eps(p.dtype) for p in self._params.values())])

    def _pre(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.closed or self._gone:
            return None
        if self._meets and getattr(getattr(self.model, "_join_config", None), "enable", False):
            self._meets = False  # ranks may run out of data: an exchange of ours would meet a shadowed one, also afterwards
        self._due = ()
        closure = next((a for a in (*args, *kwargs.values()) if callable(a) and not isinstance(a, torch.optim.Optimizer)), None)
        if closure is None or self._line_search:
            self._enter(closure is not None)
        if closure is None or (self._line_search and not {"core", "drift"} & set(self._due)):
            return None
        called = self._counting(closure)
        return tuple(called if a is closure else a for a in args), {k: called if v is closure else v for k, v in kwargs.items()}

    def _enter(self, late: bool = False) -> None:
        """Count the step and read the state before it; ``late``: its gradients come from calls of a closure inside the step."""
        with self.budget.hook(), self._safely("before the step"), torch.no_grad():
            if self._is_skipped():
                return
            self.step += 1
            self._due, paired = self._now_due(), self._paired
            self._paired = "noise" in self._due
            if self._idle or (self._silent and not self._sharded):
                return
            if self._due or paired or (self._stored is not None and self._books is None):
                with self._together(), rng_state():
                    self._observe(late)
            elif self._books is not None:
                self._books.skip()

    def _observe(self, late: bool) -> None:
        """What is to be done before a step at which something is due."""
        if self._pairs.waiting:
            with self.budget.measuring("noise"):
                self._rows += self._pairs.compare(self._trained, self._unit())
                self._micro_rows()
            self.budget.finished("noise", self.step)
        if self._books is None and self._stored is not None:
            self._prepare()  # of a resumed run: its predictions go on from its first step
        if self._due:
            self._before(late)
        elif self._books is not None:
            self._books.skip()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around work that ranks of a sharded run do together; if it fails on one, watching ends on all, and all know."""
        try:
            with self._ranks.section():
                if self._silent:
                    raise OtherRankError("watching had failed before")  # and nothing was exchanged since
                yield
        except Exception:
            self._told = self._told or self._sharded
            raise

    def _now_due(self) -> tuple[str, ...]:
        """What is to be measured at this step; looking at the charges takes in their drift."""
        due = [n for n, m in self.budget.meters.items() if (m.active or self._sharded) and m.next <= self.step]
        if "drift" in due and ("core" in due or self._books is None):
            due.remove("drift")
        return tuple(due)

    def _before(self, late: bool) -> None:
        """The first half of what is due, before the step; ``late``: its gradient comes from a closure inside the step."""
        if self._books is None:
            self._prepare()
        assert self._books is not None
        if "core" in self._due:
            with self.budget.measuring("core"):
                self._books.before(late)
                self._norms()
        elif "drift" in self._due:
            with self.budget.measuring("drift"):
                self._books.before(late, glance=True)
        else:
            self._books.skip()
        if "noise" in self._due:
            with self.budget.measuring("noise"):
                if late:
                    self._give_up("noise", "the optimiser calls a closure: its gradients are not those of one batch at one point")
                else:
                    self._pairs.keep(self._trained, self._unit())

    def _counting(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, its first loss kept. An optimiser that calls it once does so before it moves a weight: after that first call
        weights and gradients are those of the step. One that calls it again is known as such from then on."""
        calls = 0

        def called() -> Any:
            nonlocal calls
            loss = closure()
            calls += 1
            if calls == 1 and "loss" not in self._loss and isinstance(loss, Tensor | float):
                self.log(loss=loss)
            if self.closed or self._gone:
                return loss
            if self._line_search:
                if calls == 1:
                    self._orbits()
            elif calls == 1:
                self._enter()
            else:
                self._line_search = True
                with self._safely("a second call of the closure"):
                    if {"core", "drift"} & set(self._due) and self._books is not None:
                        self._books.skip()
                    self._due = ()
                    self._pairs.drop()
            return loss

        return called

    def _orbits(self) -> None:
        """Hold the charges against the gradient of a closure's first call: the law that is left to a rule that calls it again."""
        if "core" not in self._due or self._books is None:
            return
        with self.budget.hook(), self._safely("in the closure"), torch.no_grad(), self.budget.measuring("core"), self._together():
            self._books.orbits()

    def _is_skipped(self) -> bool:
        """A fused optimiser under a loss scaler is called for steps it will not take."""
        found = getattr(self.optimizer, "found_inf", None)
        return isinstance(found, Tensor) and bool(found.item())

    def _post(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.closed or self._gone:
            return
        with self.budget.hook(ends_step=True), torch.no_grad():
            if self._due and not self._idle and (self._sharded or not self._silent):
                with self._safely("after the step"), rng_state():
                    with self._together():
                        self._after()
                    self._probe()
        with self._safely("after the step"):
            looked = self._sharded or "core" in self._due or self._books is None
            self._stamps = None if looked or self._books is None else self._books.stamps()
        if not (self._due or self._rows or self._alerts):
            if self.step % _REPLAN == 0 and not self._meets:  # first guesses of costs and times do not stand for long
                with self._safely("planning"):
                    self.budget.plan(self.step)
            return
        with self.budget.hook(), torch.no_grad():
            due, self._due = self._due, ()
            if due == ("drift",) and not (self._rows or self._alerts):  # the first rank's own affair, and nothing to write
                with self._safely("planning"):
                    self.budget.plan(self.step, ("drift",) if self._meets else None)
                return
            if self._meets and set(due) - {"drift"}:  # a glance is the first rank's own affair
                self._agree()  # also when this rank failed: the others wait for it
            if not self._silent:
                with self._safely("planning"):
                    self._plan(due)
                    self._flush()

    @property
    def _gone(self) -> bool:
        """Whether watching has failed, and every rank knows it."""
        return self._silent and (self._told or not self._meets)

    @property
    def _trained(self) -> list[Tensor]:
        return [p for g in self.optimizer.param_groups for p in g["params"]]

    # -- what is measured --------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Find what there is to watch, once."""
        call = self._shared(self._given or self._captured)
        charges: Sequence[Charge] = self._charges or ()
        wanted = self._charges is None and self.budget.meters["core"].active
        with self.budget.setting_up("finding symmetries"):
            if call is None and self._charges is None:
                self._tell(
                    "info", "", "no batch was seen before the first step, so there is nothing to find symmetries with: the model is "
                    "compiled, or called under another name", "give args= (an example batch), or watch the module that is called", "charge",
                )  # fmt: skip
            elif call is not None and (wanted or self.budget.meters["collapse"].active):
                self.found = self._search(call)
                if self.found is not None and self._charges is None:
                    charges = self.found.charges
            unknown = [n for c in charges for n in c.parameters if n not in self._params]
            if unknown:
                text = "a charge names a parameter the model does not have"
                self._tell("warn", unknown[0], text, "find the charges on this model", "charge")
                charges = [c for c in charges if all(n in self._params for n in c.parameters)]
            self._books = Books(charges, self.optimizer, self._params, self._ranks.whole)
        if self._coarse is None:
            self._coarse = _eps(torch.bfloat16)  # not known: gradients may come from autocast
        self._books.coarse = self._precision()
        self.budget.meters["drift"].active &= bool(self._books.books)
        self._activate()
        if self._stored is not None:
            self._restore_books()
        facts = {
            "charges": [c.to_dict() for c in charges],
            "without charge": sorted({f"{n}: {w}" for n, w in self.found.without}) if self.found else [],
            "set-up seconds": dict(self.budget.once),
            "notes": self.found.notes if self.found else [],
        }
        self._recorded(lambda record: record.update_meta(facts))

    def _search(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Found | None:
        """Search; where the model is sharded on every rank alike, on the first rank's batch: they must agree on what to gather."""
        found = self._search_here(call)
        return found if self._ranks.everywhere(found is not None) else None

    def _shared(self, call: Any) -> Any:
        """The first rank's batch, where the model is sharded."""
        if not self._ranks.sharded:
            return call
        cpu = pytree.tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, call)
        held = [pickle.dumps(cpu) if self._rank == 0 else None]  # before the others wait for it: it may fail
        self._ranks.everywhere(True)
        dist.broadcast_object_list(held, src=0)
        assert held[0] is not None
        return pickle.loads(held[0])

    def _search_here(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Found | None:
        try:
            return find(self._inner, call[0], call[1], head=self.head, seed=self.seed)
        except Exception as error:
            self._tell(
                "warn", "", f"no symmetry could be searched for: {type(error).__name__}: {str(error)[:300]}",
                "norms, rates and noise are watched; give charges= made by hand (parasym.laws.charges.rescale, scale, matrix)", "charge",
            )  # fmt: skip
            return None

    def _activate(self) -> None:
        """Which measurements can be made on this run."""
        if self.found is None:
            self._give_up("collapse", "no graph of the model was found")
        if (
            self._batch is None
            and self.loss_fn is None
            and self._captured is not None
            and any(k in self._captured[1] for k in ("labels", "label", "label_ids"))
        ):
            drop = {k: v for k, v in self._captured[1].items() if k != "num_items_in_batch"}
            self._batch = drop if not self._captured[0] else None
        for name in ("samples", "sharpness"):
            if self._sharded:
                self._give_up(name, "the model is sharded over ranks")
            elif self._batch is None:
                why = "no batch with its loss is known: give loss_fn and batch=(input, target), or a model that returns its loss"
                self._give_up(name, why)

    def _norms(self) -> None:
        """Norms of weights and gradients by module, and the rates of the groups."""
        place = {id(p): n.rpartition(".")[0] or n for n, p in self._params.items()}
        by: dict[str, list[list[Tensor]]] = {}
        for p in self._trained:
            at = by.setdefault(place.get(id(p), ""), [[], []])
            at[0].append(p.detach())
            if p.grad is not None and not p.grad.is_sparse:
                at[1].append(p.grad.detach())
        flat = [t for pair in by.values() for side in pair for t in side]
        if not flat:
            return
        squares = iter(self._squares(flat))
        unit = self._unit() ** 2
        total = [0.0, 0.0]
        for where, pair in by.items():
            for k, (side, name) in enumerate(zip(pair, ("weight norm", "gradient norm"), strict=True)):
                if side:
                    s = sum(next(squares) for _ in side) * (unit if k else 1.0)
                    total[k] += s
                    self._rows.append(Row(name, where, "norm", math.sqrt(s) if s >= 0 else s))
        for k, name in enumerate(("weight norm", "gradient norm")):
            value = math.sqrt(total[k]) if total[k] >= 0 else total[k]
            self._rows.append(Row(name, "", "norm", value, status="ok" if math.isfinite(value) else "not_converged"))
            if not math.isfinite(value):
                self._not_finite(f"the {name}")
        for i, g in enumerate(self.optimizer.param_groups):
            if (lr := rate_of(g)) is not None:
                self._rows.append(Row("learning rate", f"group {i}", "rate", lr))

    def _micro_rows(self) -> None:
        if self._micro.armed:
            grads = [p.grad.detach() for p in self._trained if p.grad is not None and not p.grad.is_sparse]
            self._rows += self._micro.read(self._unit() ** 2 * sum(self._squares(grads)) if grads else math.nan)

    def _unit(self) -> float:
        """What gradients are still to be multiplied by: a fused optimiser undoes the loss scale itself."""
        scale = getattr(self.optimizer, "grad_scale", None)
        return 1.0 if scale is None else 1.0 / float(scale)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Around what the hooks on gradients do."""
        with self.budget.hook(), self.budget.measuring("noise"):
            yield

    def _after(self) -> None:
        """The second half of what is due, after the step."""
        if "core" in self._due and self._books is not None:
            with self.budget.measuring("core"):
                rows, broken = self._books.after(self.step)
                self._rows += rows
                self._rows += self._loss_rows()
                for book in broken:
                    self._tell(
                        "info", book.where, f"{book.label}: three observed steps in a row changed the charge by more than its law and "
                        "round-off allow", "does the loss have this symmetry (no penalty on weights, the same mode)?", "charge",
                    )  # fmt: skip
            self.budget.finished("core", self.step)
            self.budget.covered("drift", self.step)
        elif "drift" in self._due and self._books is not None:
            with self.budget.measuring("drift"):
                self._books.glance()
            self.budget.finished("drift", self.step)
        if "noise" in self._due and self._pairs.waiting and not (self._distributed or self._sharded):
            self._micro.arm(self._trained)

    def _probe(self) -> None:
        """What is measured at the new weights."""
        for name, run in (("collapse", self._collapse), ("samples", self._samples), ("sharpness", self._sharpness)):
            if name in self._due and self.budget.meters[name].active:
                with self.budget.measuring(name):
                    run()
                self.budget.finished(name, self.step)

    def _loss_rows(self) -> list[Row]:
        values, self._loss = self._loss, {}
        rows = []
        for name in sorted(values):
            value = self._number(name, values[name])
            if value is None:
                continue
            if name == "loss" and self._meets:
                self._mine = value  # averaged over ranks when they meet
                continue
            rows.append(Row(name, "", "loss", value, status="ok" if math.isfinite(value) else "not_converged"))
            if not math.isfinite(value):
                self._not_finite(name)
        return rows

    def _number(self, name: str, given: Any) -> float | None:
        """A logged value as a number; one that is none is left out, with one alert."""
        try:
            return float(given)
        except (TypeError, ValueError, RuntimeError):
            if f"log {name}" not in self._warned:
                self._warned.add(f"log {name}")
                what = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{given!r}"[:80]
                self._tell("warn", "", f"log({name}=...) got {what}, which is no number: it is left out", "hand over one number", "log")
            return None

    def _collapse(self) -> None:
        assert self.found is not None
        try:
            with self._ranks.section():
                data = sum(p.numel() for p in self._params.values()) <= _DATA_COLLAPSE and not self._sharded
                held = {n: p.detach() for n, p in self._params.items()}
                read = _Whole(held, self._ranks.whole) if self._sharded else held
                rows = collapse_rows(self.found, read, data)
        except (InputError, OtherRankError, RuntimeError, ValueError) as error:
            self._give_up("collapse", f"{type(error).__name__}: {str(error)[:200]}")
            return
        summary = collapse_summary(rows, self._seen_collapse)
        worst = max((r.value for r in summary if r.name in COLLAPSED), default=0.0)
        note = "on data" if data else "from weights alone"
        self._rows += [*summary, Row("largest share of collapsed units", "", "collapse", worst, note=note)]
        for row in summary:
            if row.name in COLLAPSED:
                self._collapse_alert(row, rows)

    def _collapse_alert(self, row: Row, rows: Sequence[Mapping[str, Any]]) -> None:
        """A share of a layer's units that grew by 5 points or more since it was last told."""
        key = (row.name, row.where)
        told = self._alerted.get(key, 0.0)
        if row.value < 0.05 or row.value < told + 0.05:
            self._alerted[key] = min(told, row.value) if row.value < told else told
            return
        self._alerted[key] = row.value
        text = f"{row.where}: {row.value:.0%} of units entered a collapsed set ({row.name}) at step {self.step:,}"
        self._tell("high" if row.value >= 0.25 else "warn", row.where, text, remedy_of(row, rows), "collapse")

    def _samples(self) -> None:
        try:
            self._rows += sample_rows(self.model, self.loss_fn, self._batch)
        except InputError as error:
            self._rows.append(Row("gradient noise scale (samples)", "", "noise", math.nan, status="not_applicable", note=str(error)[:300]))
            self._give_up("samples", str(error)[:300])

    def _sharpness(self) -> None:
        try:
            rows = sharpness_rows(self.model, self.loss_fn, self._batch, self.optimizer, self.tol)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:300]
            self._rows.append(Row("sharpness", "", "sharpness", math.nan, status="not_applicable", note=why))
            self._give_up("sharpness", why)
            return
        self._rows += rows
        for row in rows:
            if row.name.endswith("limit") and row.status == "ok" and row.value > 1.05:
                self._alert_once("info", "", f"sharpness is {row.value:.2f} of the stability limit at step {self.step}", "", "sharpness")

    # -- planning and writing ----------------------------------------------------------------------------------------------------

    def _agree(self) -> None:
        """One exchange between the ranks for each observed step: the loss, the first rank's plan, and whether all are well."""
        meters = self.budget.meters
        numbers = [1.0, *[0.0] * (2 + len(meters))]  # of a rank that failed: the others wait for it all the same
        if not self._silent:
            with self._safely("planning"):
                numbers = self._message()
        device = next(iter(self._params.values())).device
        sent = torch.tensor(numbers, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        dist.all_reduce(sent)
        failed, losses, total, *plan = sent.tolist()
        self._silent = self._told = self._silent or failed > 0
        self._agreed = total / losses if losses else None
        for m, wait in zip(meters.values(), plan, strict=True):
            m.next = self.step + int(wait) if wait > 0 else NEVER

    def _message(self) -> list[float]:
        """What this rank says: 0 (all is well), whether it has a loss, the loss, and of the first rank the steps to each measurement."""
        given = self._loss.pop("loss", None) if self._idle else self._mine
        loss = None if given is None else self._number("loss", given)
        mine = [0.0, 0.0 if loss is None else 1.0, loss or 0.0]
        meters = self.budget.meters
        if self._rank:
            return [*mine, *[0.0] * len(meters)]
        self.budget.plan(self.step)
        ahead = {n: float(m.next - self.step) if m.active else -1.0 for n, m in meters.items()}
        if meters["core"].active:
            ahead["core"] = min(ahead["core"], float(_FAR))
        return [*mine, *ahead.values()]

    def _plan(self, due: Sequence[str]) -> None:
        """Say when to look again, and what it costs."""
        if not self._meets:
            self.budget.plan(self.step)
        meters = self.budget.meters
        if self._agreed is not None:
            self._rows.append(Row("loss", "", "loss", self._agreed, note=f"mean over {dist.get_world_size()} ranks"))
            self._agreed = self._mine = None
        for n in (*due, *(("drift",) if "core" in due else ())):
            m = meters[n]
            if m.active and m.times and (n != "drift" or m.costs):
                note = f"next at step {m.next}; {m.times} so far"
                self._rows.append(
                    Row(f"seconds of {n}", "", "cost", m.costs[-1] if m.costs else self.budget.once.get(f"first {n}", 0.0), note=note)
                )
        note = f"hooks over the run's own time, budget {self.budget.share}; set-up of {sum(self.budget.once.values()):.2f} s not counted"
        self._rows.append(Row("overhead", "", "cost", self.budget.overhead, note=note))
        if "core" in due:
            self._rows.append(Row("steps between observations", "", "cost", float(meters["core"].next - self.step)))

    def _flush(self) -> None:
        """Write what was gathered, in one transaction; a record that fails is told once and then left."""
        rows, self._rows = self._rows, []
        alerts, self._alerts = self._alerts, []
        if self._rank:
            return
        self._recorded(lambda record: record.write(self.step, rows))
        for a in alerts:
            self._recorded(lambda record, a=a: record.alert(*a))  # type: ignore[misc]
        self.sinks.write(self.step, rows)
        for step, severity, where, message, remedy, kind in alerts:
            self.sinks.alert(Alert(step, clock.time(), severity, where, message, remedy, kind))

    def _recorded(self, write: Callable[[Record], None]) -> None:
        """Write; where the record fails (a full disk), say so once and leave it."""
        if self.record is None:
            return
        try:
            write(self.record)
        except RecordError as error:
            record, self.record = self.record, None
            self._warn("record", f"the record is no longer written: {error}")
            record.close(None)

    # -- small things ------------------------------------------------------------------------------------------------------------

    def _tell(self, severity: str, where: str, message: str, remedy: str, kind: str) -> None:
        self._alerts.append((self.step, severity, where, message, remedy, kind))
        log.log(logging.INFO if severity == "info" else logging.WARNING, "watch: %s%s", message, f" ({remedy})" if remedy else "")

    def _alert_once(self, severity: str, where: str, message: str, remedy: str, kind: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._tell(severity, where, message, remedy, kind)

    def _not_finite(self, what: str) -> None:
        self._alert_once("high", "", f"{what} is not finite at step {self.step}", "lower the learning rate, or clip gradients", "nan")

    def _give_up(self, name: str, why: str) -> None:
        m = self.budget.meters[name]
        if m.active:
            m.active, m.why = False, why
            self._tell("info", "", f"{name} is not measured: {why}", "", {"samples": "noise"}.get(name, name))

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            try:
                warnings.warn(f"parasym.watch: {message}", RuntimeWarning, stacklevel=2)
            except RuntimeWarning:  # warnings are errors here, and no error of ours may reach the training loop
                log.warning("watch: %s", message)

    @contextmanager
    def _safely(self, what: str) -> Iterator[None]:
        """Whatever goes wrong in watching ends the watching, with one warning, and not the training; `_HARMLESS` ends only itself."""
        try:
            yield
        except Exception as error:
            ends = what not in _HARMLESS
            text = f"failed {what}{', and stops watching; training goes on' if ends else ''}: {type(error).__name__}: {error}"
            self._alerts.append((self.step, "warn", "", f"parasym.watch {text}"[:500], "", "failed" if ends else "watch"))
            self._warn("failed" if ends else what, text)
            log.debug("watch failed", exc_info=True)
            if ends:
                self._silent, self._rows = True, []
                self._micro.disarm()
                self._pairs.drop()
                self._flush_failure()

    def _flush_failure(self) -> None:
        """Write why watching ended at once: nothing is written after it, and the process may be killed."""
        try:
            self._flush()
        except Exception:  # what failed may be the writing itself
            log.debug("the failure was not written", exc_info=True)

    def _squares(self, tensors: Sequence[Tensor]) -> list[float]:
        """Squared norms, in one transfer."""
        norms: list[Tensor] = list(tensors)
        for low in (True, False):
            at = [i for i, t in enumerate(tensors) if (t.dtype in (torch.float16, torch.bfloat16)) is low]
            held = [tensors[i] for i in at]
            if held:
                for i, n in zip(at, torch._foreach_norm(held, dtype=torch.float32) if low else torch._foreach_norm(held), strict=True):
                    norms[i] = n
        return [float(n) ** 2 for n in self._numbers(norms)]

    def _sum(self, parts: Sequence[Tensor]) -> float:
        return float(sum(self._numbers(parts)))

    def _numbers(self, scalars: Sequence[Tensor]) -> list[float]:
        """One transfer for many one-number tensors; those of shards are reduced."""
        if not scalars:
            return []
        plain = self._ranks.gather(scalars)
        if len({t.device for t in plain}) > 1:
            return [float(t) for t in plain]
        return torch.stack(plain).tolist()  # type: ignore[no-any-return]

    # -- going on in another process ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on with its predictions, averages and costs; plain tensors, numbers and strings."""
        books = self._books
        return {
            "step": self.step,
            "books": books.state() if books is not None else [],
            "pairs": self._pairs.state(),
            "micro": self._micro.state(),
            "collapse": [list(k) for k in sorted(self._seen_collapse)],
            "alerted": [[*k, v] for k, v in sorted(self._alerted.items())],
            "budget": self.budget.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`; to be called before the first step, beside the optimiser's, and on every rank: ranks observe the
        same steps.

        Raises:
            InputError: it is not the state of a watch.
        """
        missing = {"step", "books", "pairs", "budget"} - set(state)
        if missing:
            raise InputError(f"This is not the state of a watch: it has no {', '.join(sorted(missing))}.")
        self.step = self.started = int(state["step"])
        self._stored = state
        restore_pairs(self._pairs.pairs, state["pairs"])
        restore_pairs(self._micro.pairs, state.get("micro", ()))
        self._seen_collapse = {(str(a), str(b)) for a, b in state.get("collapse", ())}
        self._alerted = {(str(a), str(b)): float(v) for a, b, v in state.get("alerted", ())}
        self.budget.restore(state["budget"], self.step)
        if self._books is not None:
            self._restore_books()
        self._recorded(lambda record: record.rewind(self.step))

    def _restore_books(self) -> None:
        assert self._books is not None and self._stored is not None
        self._books.restore(self._stored["books"])
        self._stored = None


class _FirstCall:
    """The hook that waits for the model's first call; in a copy of the model (an average, a saved module) it does nothing."""

    def __init__(self, watcher: Watch | None = None) -> None:
        self._watcher = None if watcher is None else weakref.ref(watcher)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or self._watcher is None:
            return
        if (watcher := self._watcher()) is not None:
            watcher._on_call(args, kwargs)

    def __deepcopy__(self, memo: Any) -> _FirstCall:
        return _FirstCall()

    def __reduce__(self) -> tuple[Any, ...]:
        return _FirstCall, ()


class _Whole(Mapping[str, Tensor]):
    """Sharded parameters, gathered when they are read."""

    def __init__(self, held: Mapping[str, Tensor], whole: Callable[[Tensor], Tensor]) -> None:
        self._held, self._whole = held, whole

    def __getitem__(self, name: str) -> Tensor:
        return self._whole(self._held[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _live(model: nn.Module) -> dict[str, Tensor]:
    """Canonical name -> the live parameter, each once."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    names = functional(model, values=False).params
    live = dict(model.named_parameters(remove_duplicate=False))
    for n in names:
        p = live[n]
        if id(p) not in seen and p.numel():
            seen.add(id(p))
            out[n] = p
    return out


def _call_of(batch: Any, loss_fn: LossFn | None) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The model's arguments in a batch (input, target), or in the arguments of a model that returns its loss."""
    if batch is None:
        return None
    inputs = batch[0] if loss_fn is not None else batch
    if isinstance(inputs, Mapping):
        return few((), dict(inputs), _CAPTURED)
    return few(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,), {}, _CAPTURED)
