"""Search random architectures and let the module itself judge every symmetry found: counts of what is false or left open.

python bench/random_nets.py [--seeds 1000] [--first 0] [--jobs 2] [--limit 120]

Prints one line for each network that is not clean, and the totals. The exit code is 1 if any symmetry was false or anything raised.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed

TESTS = Path(__file__).resolve().parent.parent / "tests"
WRONG, STILL = 1e-9, 1e-6  # a change of the outputs above the first is false; a move below the second tests nothing


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise TimeoutError when a block takes more processor time (POSIX only)."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def examine(seed: int, limit: int) -> dict[str, Any]:
    """Search one network: its nullity, what is explained and listed as undecided, the symmetries that are false, seconds."""
    if str(TESTS) not in sys.path:  # in every worker
        sys.path.insert(0, str(TESTS))
    from judge import change
    from parasym.core.graph import trace
    from parasym.core.samples import flatten
    from parasym.symmetry.search import search
    from strategies import random_architecture

    torch.set_num_threads(1)
    net = random_architecture(seed)
    row: dict[str, Any] = {"seed": seed, "net": net.description, "params": net.params, "false": [], "error": "", "symmetries": 0}
    start = time.process_time()
    try:
        with at_most(limit):
            graph = trace(net.model, net.args)
            found = search(graph, [flatten(graph, net.args)], torch.Generator().manual_seed(0))
            generator = torch.Generator().manual_seed(seed + 1)
            for s in found.symmetries:
                residual, moved = change(net.model, s, [net.args], generator)
                if not residual <= WRONG or moved < STILL:
                    row["false"].append(f"{s.name} {s.group} ({s.kind}) {residual:.1e}, moved {moved:.1e}")
            row |= {
                "symmetries": len(found.symmetries),
                "nullity": found.null.nullity,
                "explained": found.explained,
                "undecided": sum(int(u.get("dim", 0)) for u in found.undecided),
            }
    except TimeoutError:
        row["error"] = f"more than {limit} s"
    except Exception as error:  # a count of failures is what this is for
        row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    return {**row, "seconds": time.process_time() - start}


def clean(row: dict[str, Any]) -> bool:
    """Nothing false, nothing raised, everything explained."""
    return not row["false"] and not row["error"] and row["explained"] == row["nullity"]


def show(row: dict[str, Any]) -> None:
    what = row["error"] or f"nullity {row['nullity']}, explained {row['explained']}, undecided {row['undecided']}"
    print(f"seed {row['seed']} ({row['seconds']:.1f} s) {row['net']}: {what}", flush=True)
    for line in row["false"]:
        print(f"    FALSE {line}", flush=True)


def main() -> None:
    """Examine the seeds and print the totals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=120, help="processor seconds for one network")
    given = parser.parse_args()
    start = time.perf_counter()
    seeds = range(given.first, given.first + given.seeds)
    rows = []
    for row in Parallel(n_jobs=given.jobs, return_as="generator")(delayed(examine)(seed, given.limit) for seed in seeds):
        rows.append(row)
        if not clean(row):
            show(row)
    done = [r for r in rows if not r["error"]]
    slow = sorted(r["seconds"] for r in rows)
    late = sum("more than" in r["error"] for r in rows)
    false = sum(len(r["false"]) for r in rows)
    print(f"networks            {len(rows)}")
    print(f"symmetries judged   {sum(r['symmetries'] for r in rows)}")
    print(f"false symmetries    {false}")
    print(f"null directions     {sum(r['nullity'] for r in done)}")
    print(f"  explained         {sum(r['explained'] for r in done)}")
    print(f"  undecided, listed {sum(r['undecided'] for r in done)}")
    print(f"  unaccounted       {sum(max(0, r['nullity'] - r['explained'] - r['undecided']) for r in done)}")
    print(f"over the time limit {late}")
    print(f"raised              {len(rows) - len(done) - late}")
    print(f"seconds, median     {slow[len(slow) // 2]:.1f}, longest {slow[-1]:.1f}, in all {time.perf_counter() - start:.0f}")
    if false or len(rows) - len(done) - late:
        sys.exit(1)


if __name__ == "__main__":
    main()
