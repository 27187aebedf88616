"""A watched training run beside the unwatched one: what it costs, and how well the charges are predicted.

    OMP_NUM_THREADS=1 python bench/watch.py [trainer|adamw|cnn] [--steps N] [--rounds R]

``trainer``: a GPT built from a config, trained on the text of Python's own manual by the Hugging Face Trainer with SGD and momentum, the
default budget. ``adamw``: the same with the Trainer's default optimiser, which has no exact law. ``cnn``: a small CNN in a plain loop, also
with Cockpit where it is installed (directories of PEERS: ``pip install --no-deps --target DIR cockpit-for-pytorch backpack-for-pytorch``).

Unwatched and watched runs alternate in one process, in turns of changing order. Each round gives a ratio of the CPU seconds of the steps
after the first ten (the search for symmetries comes before them and is printed by itself) and one of the wall clock, which another load on
the machine can move; the median over the rounds is told with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import parasym
from parasym.watch.record import Record

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
WARM = 10


Seconds = tuple[float, float]
"""CPU and wall."""


def now() -> Seconds:
    """Both clocks."""
    return time.process_time(), time.perf_counter()


def alternate(rounds: int, run: Callable[[bool], Seconds]) -> tuple[str, float]:
    """Rounds of an unwatched and a watched run, in turns of changing order; the ratios in words, and the median unwatched CPU seconds."""
    plain, watched = [], []
    for r in range(rounds):
        for watch in (False, True) if r % 2 == 0 else (True, False):
            (watched if watch else plain).append(run(watch))
    words = []
    for k, clock in enumerate(("CPU", "wall")):
        ratios = [w[k] / p[k] for w, p in zip(watched, plain, strict=True)]
        words.append(f"{statistics.median(ratios):.3f} {clock} ({min(ratios):.3f} to {max(ratios):.3f})")
    return f"watched / unwatched, median of {rounds} rounds: {', '.join(words)}", statistics.median(p[0] for p in plain)


def text() -> torch.Tensor:
    """Characters of the Python manual's topics (about 700,000), as numbers."""
    from pydoc_data.topics import topics

    joined = "".join(topics.values())
    letters = {c: i for i, c in enumerate(sorted(set(joined)))}
    return torch.tensor([letters[c] for c in joined])


class Lines(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Windows of the text."""

    def __init__(self, ids: torch.Tensor, length: int) -> None:
        self.ids, self.length = ids, length

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = self.ids[i * self.length : (i + 1) * self.length]
        return {"input_ids": x, "labels": x}


def trainer(rule: str, steps: int, path: Path | None) -> tuple[Seconds, dict[str, Any]]:
    """Seconds of the steps after the warm-up, and what the watch says."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    ids = text()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=int(ids.max()) + 1, n_positions=64, n_embd=128, n_layer=4, n_head=4, activation_function="relu",
        bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM",
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    clock: dict[str, Any] = {}

    class Clock(TrainerCallback):
        watcher: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if path is not None:
                self.watcher = parasym.watch(kw["model"], kw["optimizer"], path=path)

        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            if state.global_step == WARM:
                clock["start"] = now()

        def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            clock["end"] = now()
            if self.watcher is not None:
                self.watcher.close()
                budget = self.watcher.budget
                clock["watch"] = {"overhead": budget.overhead, "once": dict(budget.once), "step": budget.step_time,
                                  "times": {n: (m.times, list(m.costs)) for n, m in budget.meters.items()}}  # fmt: skip

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True,
            logging_strategy="no", disable_tqdm=True, max_grad_norm=1.0, lr_scheduler_type="cosine", warmup_steps=20,
        )  # fmt: skip
        optimizers: Any = (None, None)
        if rule == "trainer":
            optimizers = (torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-4), None)
        run = Trainer(model, arguments, train_dataset=Lines(ids, 64), callbacks=[Clock()], optimizers=optimizers)
        run.train()
    return (clock["end"][0] - clock["start"][0], clock["end"][1] - clock["start"][1]), clock


def families(path: Path) -> None:
    """The charges of each kind: how far they moved, and how far the prediction is off."""
    with Record.open(path) as record:
        charges = [c for c in record.meta["charges"] if c["kind"] != "linear"]
        names = record.names()

        def kind(where: str, name: str) -> str:
            if "query against key" in name:
                return "QK, GL per head"
            if "writer and reader" in name:
                return "OV, GL per head"
            return "MLP units" if "channel" in name else "norm gains"

        table: dict[str, list[tuple[float, float, int, bool]]] = {}
        for name, where, of in names:
            if of != "charge" or ":" in name or not any(name.startswith(c["name"]) for c in charges):
                continue
            seen, error = record.series(name, where), record.series(f"{name}: prediction error", where)
            exact = seen.status[-1] == "ok"
            law = record.series(f"{name}: {'residual of the step' if exact else 'gradient along the orbit'}", where)
            table.setdefault(kind(where, name), []).append((float(error.value[-1]), float(law.value.max()), len(seen.step), exact))
    print(f"  {'charge':18} {'families':>8} {'looks':>8} {'prediction error':>17} {'residual of the law':>21}  law")
    for name, found in sorted(table.items()):
        error = torch.tensor([f[0] for f in found])
        print(
            f"  {name:18} {len(found):8d} {found[0][2]:8.0f} {float(error.median()):8.1%} (to {float(error.max()):.1%}) "
            f"{max(f[1] for f in found):21.1e}  {'exact' if found[0][3] else '<A theta, g> = 0 alone'}"
        )


def main_trainer(rule: str, steps: int, rounds: int) -> None:
    """Interleaved pairs."""
    last: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.sqlite"

        def run(watch: bool) -> Seconds:
            if watch:
                path.unlink(missing_ok=True)
            seconds, clock = trainer(rule, steps, path if watch else None)
            if watch:
                last.update(clock)
            return seconds

        words, plain = alternate(rounds, run)
        size = Record.open(path).meta["parameters"]
        print(
            f"{rule}: GPT of {size:,} parameters, Hugging Face Trainer, {steps} steps of {1e3 * plain / (steps - WARM):.0f} ms CPU, "
            f"budget 5 %\n  {words}"
        )
        info = last["watch"]
        print(
            f"  by the watch's own clock {info['overhead']:.1%} of the run; search for symmetries, once: {sum(info['once'].values()):.1f} s"
        )
        for name, (times, costs) in info["times"].items():
            print(f"    {name:10} {times:4d} times" + (f", {1e3 * costs[-1]:.0f} ms each" if costs else ""))
        families(path)


def main_cnn(steps: int, rounds: int) -> None:
    """A plain loop, and Cockpit's stock configurations at every step and at the cadence that would cost 5 %."""
    for path in os.environ.get("PEERS", "").split(os.pathsep):
        sys.path.append(path)
    torch.manual_seed(0)
    X, y = torch.randn(128, 1, 28, 28), torch.randint(0, 10, (128,))

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip

    def loop(path: Path | None) -> tuple[Seconds, Any]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        watcher = None
        if path is not None:
            watcher = parasym.watch(model, optimizer, F.cross_entropy, batch=(X[:32], y[:32]), path=path)
        for k in range(steps):
            if k == WARM:
                start = now()
            optimizer.zero_grad()
            F.cross_entropy(model(X), y).backward()
            optimizer.step()
        end = now()
        if watcher is not None:
            watcher.close()
        return (end[0] - start[0], end[1] - start[1]), watcher

    held: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:

        def run(watch: bool) -> Seconds:
            seconds, watcher = loop(Path(folder) / f"{len(held)}.sqlite" if watch else None)
            held.extend([watcher] if watch else [])
            return seconds

        words, plain = alternate(rounds, run)
    watcher, unit = held[-1], plain / (steps - WARM)
    print(f"cnn: plain SGD step {1e3 * unit:.1f} ms CPU, budget 5 %\n  {words}")
    for name, m in watcher.budget.meters.items():
        if m.times:
            print(f"    {name:10} {m.times:4d} times, {m.costs[-1] / watcher.budget.step_time:.1f} steps each")
    _cockpit(net, X, y, unit)


def _cockpit(net: Callable[[], nn.Module], X: torch.Tensor, y: torch.Tensor, unit: float) -> None:
    try:
        from backpack import extend
        from cockpit import Cockpit
        from cockpit.utils.configuration import configuration
    except Exception as error:
        print(f"    Cockpit: not here ({type(error).__name__}: {str(error)[:100]})")
        return
    for name in ("economy", "business", "full"):
        model, loss_fn, each = extend(net()), extend(nn.CrossEntropyLoss()), nn.CrossEntropyLoss(reduction="none")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        try:
            monitor, seconds = Cockpit(model.parameters(), quantities=configuration(name)), []
            for k in range(6):
                start = time.process_time()
                optimizer.zero_grad()
                out = model(X)
                loss, losses = loss_fn(out, y), each(out, y)
                with monitor(k, info={"batch_size": len(X), "individual_losses": losses, "loss": loss, "optimizer": optimizer}):
                    loss.backward(create_graph=monitor.create_graph(k))
                optimizer.step()
                seconds.append(time.process_time() - start)
        except Exception as error:
            print(f"    Cockpit {name}: fails: {type(error).__name__}: {str(error)[:120]}")
            continue
        ratio = min(seconds) / unit
        print(f"    Cockpit {name}: {ratio:.1f} steps at each step it tracks; 5 % would allow it every {20 * (ratio - 1):.0f} steps")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["trainer", "adamw", "cnn"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for what in options.what:
        if what == "cnn":
            main_cnn(options.steps, options.rounds)
        else:
            main_trainer(what, options.steps, options.rounds)
