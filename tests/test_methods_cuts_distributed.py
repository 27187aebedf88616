"""Masked, thinned and revived networks under DDP and FSDP2: two gloo processes do what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parasym.methods import prune, revive, thin

pytestmark = pytest.mark.slow
STEPS = 3


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64), torch.randint(3, (16,), generator=generator)


def network(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    x, _ = data()
    if method == "prune":
        prune(model, (x[:1],), keep=0.4).apply()
    elif method == "thin":
        thin(model, (x,), where="0", order=1).apply()
    else:
        model[2].weight.data[:, 5] = 0
        revive(model, (x,)).apply()
    return model


def train(model: nn.Module, rows: slice) -> None:
    x, y = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.state_dict().items()}


def worker(rank: int, folder: str, method: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(8 * rank, 8 * rank + 8)
    try:
        model = network(method)
        train(nn.parallel.DistributedDataParallel(model), rows)
        results = {"ddp": whole(model)}
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        sharded = network(method)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        train(sharded, rows)
        results["fsdp"] = whole(sharded)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", ["prune", "thin", "revive"])
def test_two_processes_do_what_one_does(method: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path), method), nprocs=2)
    alone = network(method)
    train(alone, slice(None))
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind in ("ddp", "fsdp"):
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(results[kind][name], value, atol=1e-12, rtol=0, msg=f"{kind} {name}")
