"""A watched run on two gloo processes, replicated and sharded: unchanged, and the charges are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import parasym
from parasym.watch.record import Record
from test_watch import mlp, same, series, state_of

pytestmark = pytest.mark.slow
STEPS = 8


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(16, 6, generator=g, dtype=torch.float64), torch.randint(4, (16,), generator=g)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, watch: Any = None) -> list[float]:
    x, y = data()
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        torch.rand(3)
        if watch is not None:
            watch.log(loss=loss)
        losses.append(float(loss))
        optimizer.step()
    return losses


def local(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Everything of this rank, shards as plain tensors."""
    return [(k, v.to_local() if hasattr(v, "to_local") else v) for k, v in state_of(model, optimizer)]


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(8 * rank, 8 * rank + 8)
    options: dict[str, Any] = {"budget": None, "every": {"core": 1, "collapse": 3, "noise": 2}}
    out: dict[str, Any] = {}
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for kind in ("ddp", "fsdp"):
            states = []
            for watched in (False, True):
                model: nn.Module = mlp(3, dtype=torch.float64)
                if kind == "ddp":
                    model = nn.parallel.DistributedDataParallel(model)
                else:
                    fully_shard(model[2], mesh=mesh)  # type: ignore[index]
                    fully_shard(model, mesh=mesh)
                optimizer = optimizer_of(model)
                torch.manual_seed(rank)
                if watched:
                    with parasym.watch(model, optimizer, path=f"{folder}/{kind}.sqlite", **options) as watch:
                        out[kind] = train(model, optimizer, rows, watch)
                        assert (watch.record is None) == (rank > 0) and not watch._silent
                else:
                    train(model, optimizer, rows)
                states.append(local(model, optimizer))
            assert same(*states) == "", (kind, same(*states))
        # one rank fails: all stop watching, none waits for another, training goes on
        model = nn.parallel.DistributedDataParallel(mlp(3, dtype=torch.float64))
        optimizer = optimizer_of(model)
        watch = parasym.watch(model, optimizer, path=f"{folder}/broken.sqlite", charges=(), measure=("core",), **options)
        if rank == 0:
            watch._after = None  # type: ignore[assignment, method-assign]
        train(model, optimizer, rows)
        out["stopped"] = watch._silent
        watch.close()
        torch.save(out, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_two_processes_are_watched_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(r["stopped"] for r in results)

    model = mlp(3, dtype=torch.float64)
    optimizer = optimizer_of(model)
    with parasym.watch(model, optimizer, path=tmp_path / "alone.sqlite", budget=None) as watch:
        train(model, optimizer, slice(None), watch)
    with Record.open(tmp_path / "alone.sqlite") as record:
        wanted = [n for n in record.names() if n[2] == "charge" and ":" not in n[0]]
    assert len(wanted) == 2
    for kind in ("ddp", "fsdp"):
        path = tmp_path / f"{kind}.sqlite"
        for name, where, _ in wanted:
            alone, here = (series(p, name, where) for p in (tmp_path / "alone.sqlite", path))
            np.testing.assert_allclose(here.value, alone.value, rtol=0, atol=1e-12, err_msg=kind)
            np.testing.assert_allclose(here.predicted, alone.value, rtol=0, atol=1e-12, err_msg=kind)
            assert set(here.status) == {"ok"}
        for name in ("weight norm", "gradient norm"):
            np.testing.assert_allclose(series(path, name).value, series(tmp_path / "alone.sqlite", name).value, rtol=1e-9, err_msg=kind)
        mean = np.mean([r[kind] for r in results], axis=0)
        np.testing.assert_allclose(series(path, "loss").value, mean, rtol=1e-6)
        pairs = (series(p, "trace of the gradient covariance (batches)").value for p in (tmp_path / "alone.sqlite", path))
        assert [len(p) > 0 for p in pairs] == [True, True]
        with Record.open(path) as record:
            assert record.meta["ranks"] == 2 and len(record.segments) == 1
            assert any(k == "collapse" for *_, k in record.names())
