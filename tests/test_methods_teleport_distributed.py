"""Teleport under DDP and FSDP2: two gloo processes do what one does, and a sharded model is refused with the way out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.methods.teleport import teleport

pytestmark = pytest.mark.slow


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].weight *= torch.linspace(0.2, 4, 8).double()[:, None]
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64), torch.randint(3, (16,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice) -> None:
    x, y = data()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def run(model: nn.Module, wrapped: nn.Module, rows: slice) -> dict[str, Tensor]:
    """Train, teleport in the middle with the momentum, train on."""
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    train(wrapped, optimizer, rows)
    edit = teleport(wrapped, (data()[0][:4],), to="balance")
    assert edit.summary["after"] < 1e-9 and set(edit.apply(optimizer).moved) == set(edit.after)
    train(wrapped, optimizer, rows)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(8 * rank, 8 * rank + 8)
    try:
        model = network()
        found = {"ddp": run(model, nn.parallel.DistributedDataParallel(model), rows)}

        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        plain = network()
        teleport(plain, (data()[0][:4],), to="balance").bake()  # before it is sharded: every rank makes the same move
        want = copy.deepcopy(plain.state_dict())
        fully_shard(plain, mesh=mesh)
        held = {n: p.full_tensor() for n, p in plain.state_dict().items()}
        assert all(torch.equal(held[n], v) for n, v in want.items())
        with pytest.raises(InputError, match="gather"):
            teleport(plain, (data()[0][:4],), to="balance")
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    model = network()
    expected = run(model, model, slice(None))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)["ddp"]
        for n, v in expected.items():
            torch.testing.assert_close(found[n], v, atol=1e-12, rtol=0, msg=n)
