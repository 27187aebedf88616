"""The simulator beside other engines on four small works, in one run: millions of replica-updates a second, and the roofline.

A  scalar SGD, w -= lr x (w x - e): two normals an update.
B  linear regression, D = 8, S = 8 fresh samples: 72 normals an update.
C  two-layer scalar net on a table of 64 samples, four draws an update, no normals.
Q  product of random rank-one-updated 4 x 4 matrices, orthogonalised at every step: all four Lyapunov exponents.

Engines: the compiled lanes, the torch reference of this library, torch eager written by hand for the work, numpy written by hand,
and (A, B) a plain compiled loop over replicas. One thread; CPU seconds, best of three; the first call, which compiles, is not
counted and is shown apart.

The roof is what this processor does in a loop of independent float32 multiply-adds that never leave the registers; the share is
(operations an update needs) x (updates a second) / roof, counting every operation of the graph once and 58 for a pair of normals
(two words of generator, a logarithm, a square root, a sine and a cosine). Integer operations and plain additions have ports of
their own, so a share a little above one is possible. All lanes stay in the first cache: memory bandwidth is no limit at any size.

python bench/simulate.py [A B C Q]        exits 1 if the lanes miss the targets: 4, 3, 10, 15 times torch eager
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numba
import numpy as np
import torch

from parasym.simulate import SGD, Ensemble, Lyapunov, System, descent, dot, regression, two_layer
from parasym.simulate.expr import needed
from parasym.simulate.system import trace, trace_start

LR = 0.1
X = np.random.default_rng(0).normal(size=64)
Y = 0.5 * X + 0.1 * np.random.default_rng(1).normal(size=64)
TARGETS = {"A": 4.0, "B": 3.0, "C": 10.0, "Q": 15.0}


def scalar(w, p, draws):
    """Work A."""
    x, e = draws.normals(2)
    return [w[0] - p.lr * x * (w[0] * x - e)]


def rank_one(w, p, draws):
    """Work Q."""
    x = draws.normals(4)
    along = dot(x, w)
    return [a - p.lr * along * b for a, b in zip(w, x, strict=True)]


SYSTEMS = {
    "A": (System("A", lambda p, d: [0.0], scalar), {"lr": LR}, []),
    "B": (descent("B", regression(np.eye(8), 8), SGD(), [0.0] * 8), {"lr": LR, "sigma": 1.0}, []),
    "C": (descent("C", two_layer(X, Y, 4), SGD(), lambda p, d: [0.3 + 0.1 * d.normal(), 0.3]), {"lr": LR}, []),
    # the product alone: a state that decays would pass through subnormal numbers, each of which costs a hundred ordinary ones
    "Q": (System("Q", lambda p, d: [0.0] * 4, rank_one), {"lr": 0.3}, [Lyapunov(4)]),
}
SIZES = {"A": (1024, 65536, 1_000_000), "B": (1024, 16384), "C": (1024, 65536, 1_000_000), "Q": (1024, 16384)}
BUDGET = {"A": 4e8, "B": 2e7, "C": 2e8, "Q": 4e7}


# ------------------------------------------------------------------------------------------------ the works by hand


def torch_a(r: int, steps: int) -> None:
    w = torch.zeros(r)
    for _ in range(steps):
        x, e = torch.randn(r), torch.randn(r)
        w = w - LR * x * (w * x - e)


def torch_b(r: int, steps: int) -> None:
    w = torch.zeros(r, 8, 1)
    for _ in range(steps):
        x = torch.randn(r, 8, 8)
        residual = torch.bmm(x, w) - torch.randn(r, 8, 1)
        w = torch.baddbmm(w, x.transpose(1, 2), residual, alpha=-LR / 8)


def torch_c(r: int, steps: int) -> None:
    x, y = torch.from_numpy(X).float(), torch.from_numpy(Y).float()
    u, w = torch.full((r,), 0.3), torch.full((r,), 0.3)
    for _ in range(steps):
        k = torch.randint(64, (4, r))
        a, b = x[k], y[k]
        g = ((u * w * a - b) * a).mean(0)
        u, w = u - LR * g * w, w - LR * g * u


def torch_q(r: int, steps: int) -> None:
    q, grown = torch.eye(4).expand(r, 4, 4), torch.zeros(r, 4, dtype=torch.float64)
    for _ in range(steps):
        x = torch.randn(r, 4, 1)
        q, upper = torch.linalg.qr(q - 0.3 * torch.bmm(x, torch.bmm(x.transpose(1, 2), q)))
        grown += upper.diagonal(dim1=1, dim2=2).abs().log()


def torch_q_by_hand(r: int, steps: int) -> None:
    """The same with modified Gram-Schmidt written out, which is faster than batched QR."""
    columns, grown = list(torch.eye(4)[:, :, None].expand(4, 4, r)), torch.zeros(4, r, dtype=torch.float64)
    for _ in range(steps):
        x = torch.randn(4, r)
        kept: list[torch.Tensor] = []
        for k, column in enumerate(columns):
            c = column - 0.3 * (x * column).sum(0) * x
            for other in kept:
                c = c - (c * other).sum(0) * other
            length = c.norm(dim=0)
            grown[k] += length.log()
            kept.append(c / length)
        columns = kept


def numpy_a(r: int, steps: int) -> None:
    draw = np.random.Generator(np.random.SFC64(0))
    w = np.zeros(r, np.float32)
    for _ in range(steps):
        x, e = draw.standard_normal(r, np.float32), draw.standard_normal(r, np.float32)
        w -= np.float32(LR) * x * (w * x - e)


def numpy_b(r: int, steps: int) -> None:
    draw = np.random.Generator(np.random.SFC64(0))
    w = np.zeros((r, 8), np.float32)
    for _ in range(steps):
        x = draw.standard_normal((r, 8, 8), np.float32)
        residual = np.einsum("rsd,rd->rs", x, w) - draw.standard_normal((r, 8), np.float32)
        w -= np.float32(LR / 8) * np.einsum("rsd,rs->rd", x, residual)


def numpy_c(r: int, steps: int) -> None:
    draw = np.random.Generator(np.random.SFC64(0))
    x, y = X.astype(np.float32), Y.astype(np.float32)
    u, w = np.full(r, 0.3, np.float32), np.full(r, 0.3, np.float32)
    for _ in range(steps):
        k = draw.integers(64, size=(4, r), dtype=np.uint8)
        g = ((u * w * x[k] - y[k]) * x[k]).mean(0)
        u, w = u - np.float32(LR) * g * w, w - np.float32(LR) * g * u


def numpy_q(r: int, steps: int) -> None:
    draw = np.random.Generator(np.random.SFC64(0))
    q, grown = np.broadcast_to(np.eye(4, dtype=np.float32), (r, 4, 4)), np.zeros((r, 4))
    for _ in range(steps):
        x = draw.standard_normal((r, 4, 1), np.float32)
        q, upper = np.linalg.qr(q - np.float32(0.3) * x * (x.transpose(0, 2, 1) @ q))
        grown += np.log(np.abs(np.diagonal(upper, axis1=1, axis2=2)))


@numba.njit
def loop_a(r, steps):
    """A plain compiled loop, replica by replica."""
    out = np.zeros(r)
    for k in range(r):
        w = 0.0
        for _ in range(steps):
            x, e = np.random.standard_normal(), np.random.standard_normal()
            w -= LR * x * (w * x - e)
        out[k] = w
    return out


@numba.njit
def loop_b(r, steps):
    """A plain compiled loop, replica by replica."""
    out = np.zeros((r, 8))
    x, g = np.zeros(8), np.zeros(8)
    for k in range(r):
        w = out[k]
        for _ in range(steps):
            g[:] = 0
            for _ in range(8):
                residual = -np.random.standard_normal()
                for i in range(8):
                    x[i] = np.random.standard_normal()
                    residual += x[i] * w[i]
                for i in range(8):
                    g[i] += residual * x[i]
            for i in range(8):
                w[i] -= LR / 8 * g[i]
    return out


BY_HAND: dict[str, dict[str, Callable[[int, int], object]]] = {
    "A": {"torch eager": torch_a, "numpy": numpy_a, "plain loop": loop_a},
    "B": {"torch eager": torch_b, "numpy": numpy_b, "plain loop": loop_b},
    "C": {"torch eager": torch_c, "numpy": numpy_c},
    "Q": {"torch eager": torch_q, "torch by hand": torch_q_by_hand, "numpy": numpy_q},
}


# ------------------------------------------------------------------------------------------------ timing


def speed(work: Callable[[int, int], object], r: int, updates: float) -> float:
    """Millions of replica-updates a second of CPU time: a short run to find the pace, then the best of three."""

    def once(steps: int) -> float:
        begun = time.process_time()
        work(r, steps)
        return r * steps / max(time.process_time() - begun, 1e-9) / 1e6

    once(1)
    pace = once(2)
    steps = max(2, min(int(updates / r), int(0.6 * pace * 1e6 / r)))
    return max(once(steps) for _ in range(3))


def lanes(name: str, r: int) -> tuple[float, float]:
    """The compiled engine: its speed, and what its first call took (compiling or loading)."""
    system, params, observe = SYSTEMS[name]
    ensemble = Ensemble(system, r, params, engine="lanes")
    begun = time.process_time()
    ensemble.run(64, observe)
    first = time.process_time() - begun
    steps = max(64, int(BUDGET[name] / r) // 64 * 64)
    best = 0.0
    for _ in range(3):
        run = ensemble.run(steps, observe)
        best = max(best, run.updates / run.seconds / 1e6)
    return best, first


def reference(name: str, r: int) -> float:
    """This library's engine without a compiler."""
    system, params, observe = SYSTEMS[name]
    ensemble = Ensemble(system, r, params, engine="torch")
    best = 0.0
    for _ in range(3):
        run = ensemble.run(max(4, int(BUDGET[name] / 100 / r)), observe)
        best = max(best, run.updates / run.seconds / 1e6)
    return best


def roof() -> float:
    """Billions of float32 lane operations a second, a multiply-add counted once: chains unrolled by hand below the cache."""
    # straight-line body of 64 x 4 multiply-adds, so that the lane loop vectorises
    straight = ["def chains(a, rounds, x, y):", "    for _ in range(rounds):", "        for l in range(64):"]
    straight += [f"            v{k} = a[{k * 64}+l]" for k in range(8)]
    straight += [f"            v{k} = v{k}*x+y" for _ in range(64) for k in range(8)]
    straight += [f"            a[{k * 64}+l] = v{k}" for k in range(8)]
    space: dict[str, Callable[..., None]] = {}
    exec("\n".join(straight), space)
    chains = numba.njit(fastmath={"contract"}, error_model="numpy")(space["chains"])
    a, x, y = np.ones(512, np.float32), np.float32(0.999), np.float32(1e-3)
    chains(a, 1, x, y)
    best = 0.0
    for _ in range(5):
        begun = time.process_time()
        chains(a, 4000, x, y)
        best = max(best, 4000 * 64 * 64 * 8 / (time.process_time() - begun))
    return best / 1e9


def operations(name: str) -> int:
    """Operations an update needs: the nodes of the graph, and the words and pairs it draws."""
    system, _, observe = SYSTEMS[name]
    program, _, _ = trace(system, len(trace_start(system)[0]), observe)
    nodes = [program.tape.nodes[k] for k in needed(program.tape, [*program.outputs, *program.sums])]
    cost = {"const": 0, "input": 0, "log": 20, "sqrt": 4, "div": 4}
    arithmetic = sum(cost.get(node[0], 1) for node in nodes)
    rows = sum(draw.count * (2 + draw.table.rows.shape[1]) for draw in program.draws.row_draws)
    words = sum(-(-draw.count // 5) for draw in program.draws.row_draws)
    return arithmetic + 58 * ((program.draws.normal_count + 1) // 2) + rows + 12 * words


def main() -> None:
    """The table, and the verdict."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or list(SYSTEMS)
    top = roof()
    print(
        f"roof: {top:.0f} G lane operations/s (float32 multiply-add, one thread); all figures in millions of replica-updates per CPU second"
    )
    print(f"{'work':5}{'engine':16}" + "".join(f"{label:>12}" for label in ("small", "medium", "large")) + "   note")
    missed = []
    for name in wanted:
        sizes = SIZES[name]
        ops = operations(name)
        table: dict[str, list[float]] = {}
        firsts = []
        for r in sizes:
            found, first = lanes(name, r)
            table.setdefault("lanes", []).append(found)
            firsts.append(first)
            table.setdefault("torch reference", []).append(reference(name, r) if r < 1_000_000 else float("nan"))
            for engine, work in BY_HAND[name].items():
                table.setdefault(engine, []).append(speed(work, r, BUDGET[name] / 4))
        rivals = [max(table[e][k] for e in table if e.startswith("torch ") and e != "torch reference") for k in range(len(sizes))]
        ratios = [ours / rival for ours, rival in zip(table["lanes"], rivals, strict=True)]
        for engine, row in table.items():
            note = ""
            if engine == "lanes":
                share = max(row) * ops / top / 1e3
                note = (
                    f"{ops} ops an update: {share:.0%} of the roof; first call {max(firsts):.1f} s; replicas {', '.join(map(str, sizes))}"
                )
            print(f"{name:5}{engine:16}" + "".join(f"{v:12.1f}" for v in row) + " " * 12 * (3 - len(row)) + f"   {note}", flush=True)
        print(f"{name:5}{'lanes / torch':16}" + "".join(f"{v:12.1f}" for v in ratios) + f"   target {TARGETS[name]:.0f}", flush=True)
        best = max(max(row) for engine, row in table.items() if engine != "lanes")
        if min(ratios) < TARGETS[name] or max(table["lanes"]) < best:
            missed.append(name)
    print("targets met" if not missed else f"missed: {', '.join(missed)}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
