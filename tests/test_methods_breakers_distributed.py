"""syre, spred and DCS under DDP and FSDP2: two gloo processes do what one does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from parasym.methods import Reparametrization, dcs, spred, syre
from parasym.symmetry.mirror import Mirror

pytestmark = pytest.mark.slow
STEPS = 4
METHODS = ("hook", "shift", "spred", "dcs")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def planned(method: str, model: nn.Module) -> Reparametrization | None:
    if method == "shift":
        return syre(model, 0.1).shift().apply()
    if method == "spred":
        return spred(model, 1e-2).apply()
    if method == "dcs":
        mirror = Mirror.linear({"0.bias": torch.eye(8)[:2], "2.bias": torch.eye(8)[:2]})
        return dcs(model, mirror, 1e-2, imposed=True).apply()
    return None


def optimizer_of(method: str, model: nn.Module, plan: Reparametrization | None) -> torch.optim.Optimizer:
    """AdamW with the hook; elsewhere Adam over the groups of the plan, by name where the model was sharded since."""
    if method == "hook":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
        syre(model, 0.1, metric="random").attach(optimizer)
        return optimizer
    assert plan is not None
    return torch.optim.Adam(plan.param_groups(lr=1e-2, weight_decay=1e-3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64), torch.randn(16, 3, generator=generator, dtype=torch.float64)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, steps: int) -> None:
    x, y = data()
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.state_dict().items()}


def alone(method: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = network()
    plan = planned(method, model)
    train(model, optimizer_of(method, model, plan), slice(None), steps)
    return copy.deepcopy(model.state_dict()), (plan.bake() if plan is not None else model).state_dict()


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows, results = slice(8 * rank, 8 * rank + 8), {}
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for method in METHODS:
            model = network()
            plan = planned(method, model)
            optimizer = optimizer_of(method, model, plan)
            train(nn.parallel.DistributedDataParallel(model), optimizer, rows, STEPS)
            results[method, "ddp"] = whole(model)
            results[method, "ddp plain"] = (plan.bake() if plan is not None else model).state_dict()

            def sharded(seed: int, weights: dict[str, Tensor] | None = None, method: str = method) -> tuple[Any, Any, Any]:
                model = network(seed)
                plan = planned(method, model)
                if weights is not None:
                    model.load_state_dict(weights)
                fully_shard(model, mesh=mesh)
                return model, plan, optimizer_of(method, model, plan)

            model, plan, optimizer = sharded(0)
            train(model, optimizer, rows, STEPS // 2)
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            kept = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
            weights = {n: t.detach().clone() for n, t in whole(model).items()}
            train(model, optimizer, rows, STEPS - STEPS // 2)
            results[method, "fsdp"] = whole(model)
            if plan is not None and method != "dcs":
                results[method, "fsdp plain"] = plan.plain_state_dict(whole(model))
            again, _, resumed = sharded(7, weights)
            set_optimizer_state_dict(again, resumed, kept, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
            train(again, resumed, rows, STEPS - STEPS // 2)
            results[method, "resumed"] = whole(again)
        torch.save({f"{m} {k}": {n: t.detach().clone() for n, t in v.items()} for (m, k), v in results.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for method in METHODS:
            expected, plain = alone(method, STEPS)
            early, _ = alone(method, STEPS - 1)
            for kind, values in (("ddp", expected), ("ddp plain", plain), ("fsdp", expected), ("fsdp plain", plain)):
                if f"{method} {kind}" in results:
                    found = results[f"{method} {kind}"]
                    assert set(found) == set(values)
                    for name, value in values.items():
                        torch.testing.assert_close(found[name], value, atol=1e-12, rtol=0, msg=f"{method} {kind} {name}")
            for name, value in results[f"{method} fsdp"].items():
                assert torch.equal(results[f"{method} resumed"][name], value), (method, name)
            assert any(not torch.allclose(v, results[f"{method} ddp"][n], atol=1e-6) for n, v in early.items())
