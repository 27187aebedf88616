"""Trainers under watch: Lightning, Hugging Face, accelerate. The watched run is the unwatched one bitwise, is recorded, and resumes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parasym.watch.record as record_room
from parasym.core.errors import InputError, RecordError
from parasym.laws.charges import rescale
from parasym.watch.record import Record, Series
from test_watch import same, state_of

OPTIONS: dict[str, Any] = {"budget": None, "measure": ("core", "noise")}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", module="lightning|pytorch_lightning")


def series(path: Path, name: str, where: str = "") -> Series:
    with Record.open(path) as record:
        return record.series(name, where)


def samples(count: int = 48) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(7)
    return [(torch.randn(6, generator=g), torch.randint(4, (), generator=g)) for _ in range(count)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 4))


def first_charge(prefix: str = "") -> list[Any]:
    params = {f"{prefix}{name}": p for name, p in net().named_parameters()}
    return [rescale(params, [f"{prefix}0.weight", f"{prefix}0.bias"], [f"{prefix}3.weight"], "first")]


def make_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


# -- Lightning -------------------------------------------------------------------------------------------------------------------------


def lightning_module(room: Any, forward: bool = True, fails_at: int | None = None, rule: Callable[..., Any] = make_sgd) -> Any:
    class Classifier(room.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()
            self.losses: list[float] = []

        def training_step(self, batch: Any, index: int) -> Tensor:
            if index == fails_at:
                raise KeyError("no such thing")
            loss = F.cross_entropy((self if forward else self.net)(batch[0]), batch[1])
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return rule(self)

    if forward:
        Classifier.forward = lambda self, x: self.net(x)
    return Classifier()


def fit(room: Any, model: Any, folder: Path, callbacks: Any = (), ckpt: str | None = None, **options: Any) -> Any:
    trainer = room.Trainer(
        max_steps=options.pop("max_steps", 8), logger=False, accelerator="cpu", devices=1, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), accumulate_grad_batches=2, gradient_clip_val=0.5,
        enable_checkpointing=options.pop("enable_checkpointing", False), **options,
    )  # fmt: skip
    torch.manual_seed(3)
    trainer.fit(model, torch.utils.data.DataLoader(samples(), batch_size=4, shuffle=True), ckpt_path=ckpt)
    return trainer


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("lightning.pytorch")


def test_lightning_is_not_changed_and_its_steps_are_exact(lightning: Any, tmp_path: Path) -> None:
    """Lightning computes the gradient in a closure inside the optimiser's step; the books are exact all the same."""
    from parasym.watch.lightning import WatchCallback

    states = []
    for watched in (False, True):
        model = lightning_module(lightning)
        callbacks = [WatchCallback(tmp_path / "run.sqlite", charges=first_charge("net."), **OPTIONS)] if watched else []
        trainer = fit(lightning, model, tmp_path, callbacks)
        states.append(state_of(model, trainer.optimizers[0]))
    assert same(*states) == ""
    seen = series(tmp_path / "run.sqlite", "first", "net")
    np.testing.assert_array_equal(seen.step, range(1, 9))
    assert set(seen.status) == {"ok"}
    assert abs(seen.value[-1] - seen.value[0]) > 1e-3
    np.testing.assert_allclose(seen.predicted, seen.value, rtol=0, atol=1e-5)
    assert set(series(tmp_path / "run.sqlite", "first: residual of the step", "net").status) == {"ok"}
    loss = series(tmp_path / "run.sqlite", "loss")
    np.testing.assert_allclose(loss.value, np.reshape(model.losses, (8, 2)).mean(1), rtol=1e-6)  # over both micro-batches
    with Record.open(tmp_path / "run.sqlite") as record:
        assert record.meta["trainer"] == "lightning.Trainer"
        assert record.segments[0].outcome == "finished"
        assert {"charge", "norm", "rate", "loss", "noise", "cost"} <= {kind for _, _, kind in record.names()}


def test_lightning_finds_symmetries_by_itself(lightning: Any, tmp_path: Path) -> None:
    """From the first batch, of a module whose training step calls a child."""
    from parasym.watch.lightning import WatchCallback

    fit(lightning, lightning_module(lightning, forward=False), tmp_path, [WatchCallback(measure=("core",), budget=None)], max_steps=3)
    with Record.open(tmp_path / record_room.FILE_NAME) as record:
        assert len(record.meta["charges"]) >= 1
        assert any(kind == "charge" for _, _, kind in record.names())


def test_lightning_resumes_from_its_checkpoint(lightning: Any, tmp_path: Path) -> None:
    from parasym.watch.lightning import WatchCallback

    def callbacks() -> list[Any]:
        keep = lightning.callbacks.ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1)
        return [WatchCallback(tmp_path / "run.sqlite", charges=first_charge("net."), **OPTIONS), keep]

    fit(lightning, lightning_module(lightning), tmp_path, callbacks(), enable_checkpointing=True)
    (kept,) = (tmp_path / "kept").glob("*step=3.ckpt")
    before = series(tmp_path / "run.sqlite", "first", "net")
    fit(lightning, lightning_module(lightning), tmp_path, callbacks(), ckpt=str(kept), enable_checkpointing=True, max_steps=6)
    seen = series(tmp_path / "run.sqlite", "first", "net")
    np.testing.assert_array_equal(seen.step, range(1, 7))
    np.testing.assert_array_equal(seen.value[:3], before.value[:3])
    np.testing.assert_allclose(seen.predicted, seen.value, rtol=0, atol=1e-5)  # the prediction went on from step 3
    with Record.open(tmp_path / "run.sqlite") as record:
        assert [(part.first, part.until) for part in record.segments] == [(1, 4), (4, None)]
        assert record.superseded > 0
    fresh = [WatchCallback(tmp_path / "run.sqlite", charges=[], **OPTIONS)]
    with pytest.raises(RecordError, match="exists already"):  # a new run does not write into the old one's record
        fit(lightning, lightning_module(lightning), tmp_path, fresh)


def test_lightning_run_that_fails_is_recorded_as_such(lightning: Any, tmp_path: Path) -> None:
    from parasym.watch.lightning import WatchCallback

    with pytest.raises(KeyError, match="no such thing"):
        fit(lightning, lightning_module(lightning, fails_at=6), tmp_path, [WatchCallback(charges=[], **OPTIONS)])
    with Record.open(tmp_path) as record:
        assert record.last_step == 3 and record.segments[0].outcome == "KeyError"
    with pytest.raises(InputError, match="no sub-module 'nett'; it has: net"):
        fit(lightning, lightning_module(lightning), tmp_path, [WatchCallback(tmp_path / "a.sqlite", module="nett")])
    with pytest.raises(InputError, match="1 optimisers; WatchCallback was asked for number 1"):
        fit(lightning, lightning_module(lightning), tmp_path, [WatchCallback(tmp_path / "a.sqlite", optimizer=1)])


def test_the_trainer_of_pytorch_lightning(tmp_path: Path) -> None:
    room = pytest.importorskip("pytorch_lightning")
    from parasym.watch.lightning import WatchCallback

    fit(room, lightning_module(room), tmp_path, [WatchCallback(charges=first_charge("net."), **OPTIONS)], max_steps=2)
    assert len(series(tmp_path / record_room.FILE_NAME, "first", "net").step) == 2


# -- Hugging Face ------------------------------------------------------------------------------------------------------------------------


def gpt() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]


def hf_trainer(model: nn.Module, folder: Path, callbacks: Any = (), **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    g = torch.Generator().manual_seed(5)
    texts = [{"input_ids": (t := torch.randint(11, (8,), generator=g)), "labels": t} for _ in range(64)]
    settings = {
        "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3, "learning_rate": 1e-2, "max_grad_norm": 0.5,
        "save_strategy": "no",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**{**settings, **options})
    return transformers.Trainer(model, arguments, train_dataset=texts, callbacks=list(callbacks))


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    while not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def test_hugging_face_trainer_is_not_changed(tmp_path: Path) -> None:
    from parasym.watch.huggingface import WatchCallback

    states = []
    for watched in (False, True):
        trainer = hf_trainer(gpt(), tmp_path / str(watched), [WatchCallback(charges=[], **OPTIONS)] if watched else [])
        trainer.train()
        states.append(state_of(trainer.model, torch_optimizer(trainer.optimizer)))
    assert same(*states) == ""
    path = tmp_path / "True" / record_room.FILE_NAME
    loss = series(path, "loss")
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    np.testing.assert_array_equal(loss.step, range(1, 7))
    np.testing.assert_allclose(loss.value, logged, rtol=0, atol=1e-4)
    with Record.open(path) as record:
        assert {"norm", "rate", "loss", "noise", "cost"} <= {kind for _, _, kind in record.names()}
        assert record.meta["model"] == "GPT2LMHeadModel" and record.segments[0].outcome == "finished"
        np.testing.assert_allclose(record.series("learning rate", "group 0").value[0], 1e-2)
    assert not trainer.model._forward_hooks


def test_hugging_face_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    from parasym.watch.huggingface import STATE_NAME, WatchCallback

    options = {"save_strategy": "steps", "save_steps": 3}
    hf_trainer(gpt(), tmp_path, [WatchCallback(charges=[], **OPTIONS)], **options).train()
    whole = series(tmp_path / record_room.FILE_NAME, "loss")
    checkpoint = tmp_path / "checkpoint-3"
    assert torch.load(checkpoint / STATE_NAME, weights_only=True)["step"] == 3
    hf_trainer(gpt(), tmp_path, [WatchCallback(charges=[], **OPTIONS)], **options).train(resume_from_checkpoint=str(checkpoint))
    seen = series(tmp_path / record_room.FILE_NAME, "loss")
    np.testing.assert_array_equal(seen.step, range(1, 7))
    np.testing.assert_array_equal(seen.value, whole.value)  # the resumed run is the uninterrupted one
    with Record.open(tmp_path) as record:
        assert [(part.first, part.until) for part in record.segments] == [(1, 4), (4, None)]
    (tmp_path / "checkpoint-3" / STATE_NAME).unlink()  # a checkpoint that nobody watched: steps go on, predictions start anew
    hf_trainer(gpt(), tmp_path, [WatchCallback(charges=[], **OPTIONS)], **options).train(resume_from_checkpoint=str(checkpoint))
    np.testing.assert_array_equal(series(tmp_path / record_room.FILE_NAME, "loss").step, range(1, 7))


@pytest.mark.slow
def test_hugging_face_trainer_with_charges_found_on_a_gpt(tmp_path: Path) -> None:
    from parasym.watch.huggingface import WatchCallback

    hf_trainer(gpt(), tmp_path, [WatchCallback(budget=None, measure=("core",))], max_steps=12).train()
    with Record.open(tmp_path) as record:
        names = " ".join(item["name"] for item in record.meta["charges"])
        for part in ("query against key", "writer and reader", "norm gain"):
            assert part in names
        for name, where, kind in record.names():
            if kind == "charge" and ": " not in name:
                seen = record.series(name, where)
                assert np.isfinite(seen.predicted).all() and len(seen.step) == 12


# -- accelerate ----------------------------------------------------------------------------------------------------------------------------


def accelerated(folder: Path, watched: bool, start: str | None = None, until: int = 8, save_at: int = 0) -> list[Any]:
    """Steps of two micro-batches; state saved after ``save_at``; or begun from what was saved. Returns the state at the end."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.utils import ProjectConfiguration

    from parasym.watch.accelerate import watch

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, project_config=ProjectConfiguration(str(folder)))
    model = net()
    model, optimizer = accelerator.prepare(model, make_sgd(model))
    charges = first_charge()
    torch.manual_seed(3)
    run = watch(accelerator, model, optimizer, charges=charges, **OPTIONS) if watched else None
    done = 0
    if start is not None:
        accelerator.load_state(start)
        done = run.step if run is not None else 4
    data = samples()
    while done < until:
        for _ in range(2):
            at = torch.randint(len(data), (8,))
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(torch.stack([data[i][0] for i in at])), torch.stack([data[i][1] for i in at]))
                accelerator.backward(loss)
                if run is not None:
                    run.log(loss=loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        done += 1
        if done == save_at:
            accelerator.save_state(str(folder / "kept"))
    if run is not None:
        run.close()
    return state_of(model, torch_optimizer(optimizer))


def test_accelerate_is_not_changed_and_resumes(tmp_path: Path) -> None:
    plain = accelerated(tmp_path / "a", False)
    assert same(plain, accelerated(tmp_path / "b", True, save_at=4)) == ""
    path = tmp_path / "b" / record_room.FILE_NAME
    whole = series(path, "first", "0")
    np.testing.assert_array_equal(whole.step, range(1, 9))
    np.testing.assert_allclose(whole.predicted, whole.value, rtol=0, atol=1e-5)
    assert set(whole.status) == {"ok"} and abs(whole.value[-1] - whole.value[0]) > 1e-3
    resumed = accelerated(tmp_path / "b", True, start=str(tmp_path / "b" / "kept"))
    assert same(plain, resumed) == ""  # weights, momentum and random states of the run that was never interrupted
    again = series(path, "first", "0")
    np.testing.assert_array_equal(again.step, whole.step)
    np.testing.assert_array_equal(again.value, whole.value)
    np.testing.assert_allclose(again.predicted, whole.predicted, rtol=0, atol=1e-7)
    with Record.open(path) as record:
        assert [(part.first, part.until) for part in record.segments] == [(1, 5), (5, None)]


# -- packages ------------------------------------------------------------------------------------------------------------------------------


ROOMS = {"lightning": ("lightning", "pytorch_lightning"), "huggingface": ("transformers",), "accelerate": ("accelerate",)}


def test_missing_packages_are_named_and_lightning_pulls_no_torchvision() -> None:
    code = (
        "import sys, importlib\n"
        "from parasym.core.errors import MissingExtraError\n"
        f"for room, packages in {ROOMS!r}.items():\n"
        "    kept = dict(sys.modules)\n"
        "    sys.modules.update({name: None for name in packages})\n"
        "    try: importlib.import_module(f'parasym.watch.{room}')\n"
        "    except MissingExtraError as error: print(error)\n"
        "    for name in packages: del sys.modules[name]\n"
        "import parasym.watch.lightning\n"
        "print([name for name in ('torchvision', 'mlflow', 'wandb') if sys.modules.get(name)])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(record_room.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    *errors, pulled = done.stdout.strip().splitlines()
    assert [error.rpartition("pip install ")[2] for error in errors] == [
        f"'parasym[{name}]'" for name in ("lightning", "transformers", "accelerate")
    ]
    assert pulled == "[]"
