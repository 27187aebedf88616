"""Watch a run of Hugging Face's Trainer: a callback that starts, feeds, saves and ends the watch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parasym.core.errors import MissingExtraError
from parasym.watch.fronts import start
from parasym.watch.observer import Watch
from parasym.watch.record import FILE_NAME, record_file

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise MissingExtraError("parasym.watch.huggingface needs transformers: pip install 'parasym[transformers]'") from error

log = logging.getLogger("parasym")

STATE_NAME = "watch.pt"
"""The watch's own state in a checkpoint folder."""


class WatchCallback(TrainerCallback):
    """Watch ``Trainer.train``.

    The loss is read from the model's outputs, the state is kept in the checkpoint folders, and a run resumed from one in its output
    folder goes on with its record.

    Args:
        path: the record; if None, ``watch.sqlite`` in ``output_dir``.
        **options: as for `parasym.watch`: ``batch``, ``every``, ``budget``, ``sinks``, ...

    Example:
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[WatchCallback(budget=0.05)])   # doctest: +SKIP
    """

    def __init__(self, path: str | Path | None = None, **options: Any) -> None:
        self.path, self.options = path, options
        self.watch: Watch | None = None
        self._hook: Any = None
        self._losses = _Losses()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start, now that the optimiser is there and a checkpoint has been read."""
        model, folder = kwargs["model"], Path(args.output_dir)
        path = folder / FILE_NAME if self.path is None else record_file(self.path)
        kept = self._kept(folder / f"checkpoint-{state.global_step}" / STATE_NAME) if state.global_step else None
        options = {
            **self.options,
            "meta": {"trainer": "transformers.Trainer", "output folder": str(folder), **self.options.get("meta", {})},
        }
        if kept is None and state.global_step:  # resumed, but nobody kept the watch's state: its predictions start anew
            options = {**options, "step": state.global_step, "resume": path.exists()}
        self.watch = start(model, kwargs["optimizer"], path, kept, options)
        self._hook = model.register_forward_hook(self._losses, with_kwargs=True)

    def _kept(self, file: Path) -> Mapping[str, Any] | None:
        if not file.is_file():
            log.warning("watch: %s is not there: the run goes on, its predictions start anew", file)
            return None
        kept: Mapping[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return kept

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand the loss over: of all micro-batches of the step."""
        loss = self._losses.take()
        if self.watch is not None and loss is not None:
            self.watch.log(loss=loss)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the watch's state beside the trainer's."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.watch is not None and state.is_world_process_zero and folder.is_dir():
            try:
                torch.save(self.watch.state_dict(), folder / STATE_NAME)
            except OSError as error:
                log.warning("watch: %s could not be written: %s", folder / STATE_NAME, error)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the record."""
        if self._hook is not None:
            self._hook.remove()
        if self.watch is not None:
            self.watch.close("finished")
            self.watch = None


class _Losses:
    """A hook on a model's calls that keeps the losses it returns in training; a copy of the model keeps none."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._shares = False

    def __call__(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if module.training and isinstance(loss, torch.Tensor):
            self._kept.append(loss.detach().reshape(()))
            self._shares = kwargs.get("num_items_in_batch") is not None  # each is then its share of the whole batch's mean

    def take(self) -> torch.Tensor | None:
        """The loss since the last call; None where there was none."""
        kept, self._kept = self._kept, []
        if not kept:
            return None
        total = torch.stack(kept).sum()
        return total if self._shares else total / len(kept)

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing


def _nothing(*_: Any) -> None:
    pass
