"""Masked, compressed, thinned and revived networks under DDP and FSDP2: two gloo processes do what one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from parasym.core.errors import InputError
from parasym.methods import compress, prune, revive, thin

pytestmark = pytest.mark.slow
STEPS = 3


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64), torch.randint(3, (16,), generator=generator)


def sick(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    with torch.no_grad():
        if method in ("compress", "revive"):
            model[0].weight[5], model[0].bias[5], model[2].weight[:, 5] = 0, 0, 0  # stays so in training, and so do equal units
            model[0].weight[9], model[0].bias[9], model[2].weight[:, 9] = model[0].weight[4], model[0].bias[4], model[2].weight[:, 4]
    return model


def edited(method: str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    x, _ = data()
    if method == "prune":
        prune(model, (x[:1],), keep=0.4).apply(optimizer)
    elif method == "thin":
        thin(model, (x,), where="0", order=1).apply(optimizer)
    elif method == "compress":
        compress(model, (x,)).apply(optimizer)
        assert model[0].weight.shape == (38, 6)
    else:
        revive(model, (x,)).apply(optimizer)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice) -> None:
    x, y = data()
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


def train(method: str, rows: slice, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """Train, edit in the middle with the momentum, train on; the plain model is edited, and wrapped again."""
    model = sick(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapped = wrap(model)
    steps(wrapped, optimizer, rows)
    if wrapped is not model and method in ("compress", "thin"):
        refused(method, wrapped)
    edited(method, model, optimizer)
    wrapped = wrap(model)  # the old wrapper goes, and its hooks on the gradients with it
    steps(wrapped, optimizer, rows)
    return whole(model)


def sharded(method: str, rows: slice) -> dict[str, Tensor]:
    """Edited first, then sharded: every rank makes the same edit. What is sharded already is refused with the way out."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = sick(method)
    edited(method, model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(InputError, match=r"gather|parametrized already"):
        edited(method, model)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rows)
    return whole(model)


def refused(method: str, wrapped: nn.Module) -> None:
    """A change of shapes inside DDP, which would leave its reducer with the old tensors."""
    x, _ = data()
    plan = compress(wrapped, (x,)) if method == "compress" else thin(wrapped, (x,), where="0", order=1)
    with pytest.raises(InputError, match=r"ddp\.module"):
        plan.apply()


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.state_dict().items()}


def worker(rank: int, folder: str, method: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = slice(8 * rank, 8 * rank + 8)
    try:
        results = {"ddp": train(method, rows, nn.parallel.DistributedDataParallel), "fsdp": sharded(method, rows)}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("method", ["prune", "compress", "thin", "revive"])
def test_two_processes_do_what_one_does(method: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path), method), nprocs=2)
    through = train(method, slice(None), lambda model: model)
    model = sick(method)
    edited(method, model)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), slice(None))
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind, alone in (("ddp", through), ("fsdp", model.state_dict())):
            assert set(results[kind]) == set(alone)
            for name, value in alone.items():
                torch.testing.assert_close(results[kind][name], value, atol=1e-12, rtol=0, msg=f"{kind} {name}")
