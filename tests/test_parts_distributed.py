"""LaProp, walls, Snake and the gambler's loss under DDP and FSDP2: two gloo processes do what one does."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from parasym.nn import AbstainHead, GamblerLoss, Snake
from parasym.optim import LaProp, Volumize

pytestmark = pytest.mark.slow
STEPS = 4


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), Snake(8, a=2.0, learnable=True, log_scale=True), AbstainHead(nn.Linear(8, 3))).double()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = LaProp(model.parameters(), lr=2e-2, weight_decay=1e-2)
    Volumize(optimizer, 0.9, exclude=lambda name, p: p.dim() < 2 or p.shape[0] == 1)
    return optimizer


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64), torch.randint(3, (16,), generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, steps: int) -> None:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        GamblerLoss(2.5)(model(x[rows]), y[rows]).backward()
        optimizer.step()


def alone(steps: int) -> dict[str, Tensor]:
    model = network()
    train(model, optimizer_of(model), slice(None), steps)
    return model.state_dict()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.state_dict().items()}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(8 * rank, 8 * rank + 8)
    try:
        model = network()
        replica = nn.parallel.DistributedDataParallel(model)
        train(replica, optimizer_of(replica), rows, STEPS)
        results = {"ddp": whole(model)}

        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        sharded = network()
        fully_shard(sharded, mesh=mesh)
        optimizer = optimizer_of(sharded)
        train(sharded, optimizer, rows, STEPS // 2)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        kept = copy.deepcopy(get_optimizer_state_dict(sharded, optimizer, options=options))  # as on disk: torch shares the steps
        weights = whole(sharded)
        train(sharded, optimizer, rows, STEPS - STEPS // 2)
        results["fsdp"] = whole(sharded)

        again = network(seed=7)
        again.load_state_dict(weights)
        fully_shard(again, mesh=mesh)
        resumed = optimizer_of(again)
        set_optimizer_state_dict(again, resumed, kept, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
        train(again, resumed, rows, STEPS - STEPS // 2)
        results["fsdp resumed"] = whole(again)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    expected, early = alone(STEPS), alone(STEPS - 1)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind in ("ddp", "fsdp"):
            for name, value in expected.items():
                torch.testing.assert_close(results[kind][name], value, atol=1e-12, rtol=0, msg=f"{kind} {name}")
        for name, value in results["fsdp"].items():
            assert torch.equal(results["fsdp resumed"][name], value), name
        assert any(not torch.allclose(value, results["ddp"][name], atol=1e-6) for name, value in early.items())
