"""A sharded run whose watcher fails on one rank: the others are told before they wait for it, and training is the unwatched one's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import parasym
from parasym.watch import ranks as room
from parasym.watch.ranks import Ranks
from test_watch_repairs import CHARGES, net, step

WAIT = 60  # seconds after which gloo calls a rank that waits for another one lost: a hang is an error here
STEPS = 4


def broken(times: int, run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that raises at its ``times``-th call."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == times:
            raise RuntimeError(f"call {times}")
        return run(*args, **kwargs)

    return call


def sharded() -> tuple[nn.Module, torch.optim.Optimizer]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def trained(rank: int, spoil: Callable[[Any], None] | None, **options: Any) -> tuple[list[torch.Tensor], Any]:
    """Local shards after the run, and the watch."""
    model, optimizer = sharded()
    run = None
    if spoil is not None:
        run = parasym.watch(model, optimizer, path=None, **{"budget": None, "charges": CHARGES, "measure": ("core", "noise"), **options})
        spoil(run)
    for i in range(STEPS):
        step(model, optimizer, 2 * i + rank)
    if run is not None:
        run.close()
    return [p.to_local().clone() for p in model.parameters()], run  # type: ignore[attr-defined]


def faults(rank: int) -> dict[str, tuple[Callable[[Any], None], dict[str, Any]]]:
    """What fails on the second rank."""

    def nothing(run: Any) -> None:
        pass

    def gather(times: int) -> Callable[[Any], None]:
        def spoil(run: Any) -> None:
            if rank:
                run._ranks.gather = broken(times, run._ranks.gather)

        return spoil

    def part(name: str, times: int = 1) -> Callable[[Any], None]:
        def spoil(run: Any) -> None:
            if rank:
                setattr(run, name, broken(times, getattr(run, name)))

        return spoil

    def swallowed(run: Any) -> None:
        if rank:
            whole, calls = run._ranks.whole, iter(range(10**6))
            run._ranks.whole = lambda t: whole(t) if next(calls) != 7 else torch.zeros(t.shape)  # a gather left out: no error of its own

    return {
        "nothing": (nothing, {}),
        **{f"gather {k}": (gather(k), {}) for k in (1, 2, 9, 30, 47)},
        "a gather left out": (swallowed, {}),
        "before the step": (part("_observe", 2), {}),
        "after the step": (part("_after", 2), {}),
        "planning": (part("_plan", 2), {}),
        "norms": (part("_norms", 3), {}),
        "the search": (part("_search_here"), {"charges": None}),
        "collapse": (gather(3), {"charges": None, "measure": ("collapse",)}),
    }


def worker(rank: int, folder: str, control: bool) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    wait = timedelta(seconds=4 if control else WAIT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=wait)
    if control:
        Ranks._exchange = lambda self, at, value=0: value  # type: ignore[method-assign]
        Ranks._meet = lambda self, failed, at, value: []  # type: ignore[method-assign]
        spoil, options = faults(rank)["gather 9"]
        trained(rank, spoil, **options)
        return
    plain, _ = trained(rank, None)
    out = {}
    for name, (spoil, options) in faults(rank).items():
        shards, run = trained(rank, spoil, **options)
        assert all(torch.equal(a, b) for a, b in zip(plain, shards, strict=True)), name
        out[name] = [run._silent, run.budget.meters["collapse"].active, run.step]
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_fault_on_one_rank_ends_the_watching_on_all_and_training_on_none(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path), False), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert found[0] == found[1]  # both know
    assert {n for n, (silent, *_) in found[0].items() if not silent} == {"nothing", "collapse"}
    assert found[0]["collapse"] == [False, False, STEPS]  # is given up, and the rest goes on


@pytest.mark.slow
def test_without_the_exchange_a_fault_on_one_rank_ends_the_training(tmp_path: Path) -> None:
    """Control: the other rank waits in a gather until gloo gives up, or meets a gather of another size and is aborted."""
    with pytest.raises(Exception, match=r"(?i)timed? ?out|connection|gloo|SIGABRT"):
        torch.multiprocessing.spawn(worker, (str(tmp_path), True), nprocs=2)


def test_ranks_alone_exchange_nothing() -> None:
    ranks = Ranks(False, torch.device("cpu"))
    with ranks.section():
        assert ranks.everywhere(True) and not ranks.everywhere(False)
        t = torch.ones(2)
        assert ranks.whole(t) is t
    assert room.OtherRankError.__mro__[1] is parasym.core.errors.ParasymError
