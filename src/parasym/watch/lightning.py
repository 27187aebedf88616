"""Watch a Lightning run: a callback that starts, feeds, saves and ends the watch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from parasym.core.errors import InputError, MissingExtraError
from parasym.watch.fronts import start, trained_module
from parasym.watch.observer import Watch
from parasym.watch.record import FILE_NAME, record_file

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise MissingExtraError("parasym.watch.lightning needs lightning: pip install 'parasym[lightning]'") from error


class WatchCallback(Callback):
    """Watch ``Trainer.fit``.

    The loss is read from the trainer, the state is kept in the trainer's checkpoints, and a run resumed from one goes on with its record.

    Args:
        path: the record; if None, ``watch.sqlite`` in the logger's folder, or else in ``default_root_dir``.
        module: name of the sub-module whose call is the network's; if None, the LightningModule if it defines ``forward``, or else
            its one child with parameters.
        optimizer: which of the trainer's optimisers.
        **options: as for `parasym.watch`: ``loss_fn``, ``batch``, ``every``, ``budget``, ``sinks``, ...

    Example:
        >>> trainer = lightning.Trainer(callbacks=[WatchCallback(budget=0.05)])   # doctest: +SKIP
    """

    def __init__(self, path: str | Path | None = None, *, module: str | None = None, optimizer: int = 0, **options: Any) -> None:
        self.path, self.module, self.optimizer, self.options = path, module, optimizer, options
        self.watch: Watch | None = None
        self._state: dict[str, Any] | None = None
        self._loss: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start, now that the optimisers are there and a checkpoint has been read."""
        if not 0 <= self.optimizer < len(trainer.optimizers):
            raise InputError(f"The trainer has {len(trainer.optimizers)} optimisers; WatchCallback was asked for number {self.optimizer}.")
        kept = dict(self._state or {})
        beside = Path(trainer.log_dir or trainer.default_root_dir) / FILE_NAME
        self.path = record_file(self.path or kept.get("path") or beside)
        options = {**self.options, "meta": {"trainer": "lightning.Trainer", **self.options.get("meta", {})}}
        model = self._module_of(pl_module)
        self.watch = start(model, trainer.optimizers[self.optimizer], self.path, kept.get("watch"), options)

    def _module_of(self, pl_module: nn.Module) -> nn.Module:
        if self.module is None:
            return trained_module(pl_module)
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError as error:
            known = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(f"The LightningModule has no sub-module {self.module!r}; it has: {known}.") from error

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Add up the losses of the micro-batches, which the trainer has divided by their number."""
        loss = loss.detach()
        self._loss = loss if self._loss is None or not pl_module.automatic_optimization else self._loss + loss

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Hand the loss over."""
        if self.watch is not None and self._loss is not None:
            self.watch.log(loss=self._loss)
        self._loss = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the record."""
        self._close("finished")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the record with what ended the run."""
        self._close(type(exception).__name__)

    def _close(self, outcome: str) -> None:
        if self.watch is not None:
            self._state = self.state_dict()
            self.watch.close(outcome)
            self.watch = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(self._state or {}) if self.watch is None else {"path": str(self.path), "watch": self.watch.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what a checkpoint kept; the watch starts from it when training does."""
        self._state = dict(state_dict)
