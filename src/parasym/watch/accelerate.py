"""Watch a loop written with accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from parasym.core.errors import MissingExtraError
from parasym.watch.observer import Watch
from parasym.watch.record import FILE_NAME, record_file
from parasym.watch.run import watch as watch_loop

try:
    from accelerate import Accelerator
except ImportError as error:
    raise MissingExtraError("parasym.watch.accelerate needs accelerate: pip install 'parasym[accelerate]'") from error


def watch(accelerator: Accelerator, model: nn.Module, optimizer: Any, *, path: str | Path | None = None, **options: Any) -> Watch:
    """Watch what ``accelerator.prepare`` returned; its state is saved and loaded with the accelerator's.

    Where a record is at ``path`` the run is a resumed one: call ``accelerator.load_state`` next, which says from which step.

    Args:
        accelerator: the loop's.
        model: the prepared model.
        optimizer: the prepared optimiser.
        path: the record; if None, ``watch.sqlite`` in the accelerator's ``project_dir``, or else in the working folder.
        **options: as for `parasym.watch`.

    Raises:
        InputError: as for `parasym.watch`.
        RecordError: the record cannot be made or resumed.

    Example:
        >>> run = watch(accelerator, model, optimizer)   # doctest: +SKIP
        >>> for batch in loader:                         # doctest: +SKIP
        ...     with accelerator.accumulate(model):
        ...         loss = model(**batch).loss
        ...         accelerator.backward(loss); run.log(loss=loss)
        ...         optimizer.step(); optimizer.zero_grad()
        >>> run.close()                                  # doctest: +SKIP
    """
    file = Path(accelerator.project_dir or ".") / FILE_NAME if path is None else record_file(path)
    run = watch_loop(accelerator.unwrap_model(model), optimizer, path=file, resume=file.exists(), **options)
    accelerator.register_for_checkpointing(run)
    return run
