"""Streamed audit of a generated safetensors checkpoint of 2 GiB: peak memory and seconds, each network in processes of its own.

The peak is the high-water mark of the whole command `parasym audit FILE --model TARGET --stream`, imports included, read from
/proc/self/status (Linux). It is printed above two starting points: a bare interpreter, and an interpreter that has imported torch
and the Transformers model class, which is what building the same network without parasym takes.

python bench/streaming.py [NAME ...]
"""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = {
    "llama-1b-bf16": (
        "LlamaForCausalLM",
        "hf:LlamaConfig?hidden_size=2048&intermediate_size=5632&num_hidden_layers=22&num_attention_heads=32&num_key_value_heads=4",
        "BF16",
    ),
    "gpt2-24-layers-f32": ("GPT2LMHeadModel", "hf:GPT2Config?n_embd=1280&n_layer=24&n_head=20", "F32"),
}
SMALLEST, LIMIT, CHUNK = 2 << 30, 1 << 30, 1 << 22


def write(path: Path, target: str, dtype: str) -> None:
    """Random weights (seed 0; gains around one), a few million numbers at a time."""
    import torch

    from parasym.core.load import load_on_meta

    path.touch()
    model = load_on_meta(str(path), target).model
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    header: dict[str, Any] = {}
    end = 0
    for name, p in model.named_parameters():
        begin, end = end, end + p.numel() * kind.itemsize
        header[name] = {"dtype": dtype, "shape": list(p.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for p in model.parameters():
            for at in range(0, p.numel(), CHUNK):
                numbers = 0.02 * torch.randn(min(CHUNK, p.numel() - at), generator=generator) + (p.dim() == 1)
                file.write(numbers.to(kind).view(torch.uint8).numpy().data)


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def step(kind: str, *args: str) -> None:
    """One measured process; prints its figures as JSON."""
    result: dict[str, Any] = {}
    if kind == "write":
        write(Path(args[0]), args[1], args[2])
    elif kind == "imports":
        importlib.import_module("torch")
        getattr(importlib.import_module("transformers"), args[0])
    elif kind == "audit":
        from contextlib import redirect_stdout
        from io import StringIO

        from parasym.cli import app

        start, printed = time.perf_counter(), StringIO()
        with redirect_stdout(printed):
            app(["audit", args[0], "--model", args[1], "--stream", "--json"], standalone_mode=False)
        found = json.loads(printed.getvalue())
        result |= {"symmetries": len(found["symmetries"]), "rows": len(found["collapse"]), "wall": time.perf_counter() - start}
    print(json.dumps({**result, "peak": peak(), "cpu": time.process_time()}))


def run(*args: str) -> dict[str, Any]:
    """A step in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--step", *args], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Exit code 1 if a peak, above the interpreter with its imports, reaches a GiB."""
    if sys.argv[1:2] == ["--step"]:
        step(*sys.argv[2:])
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a run that is stopped leaves no checkpoint behind
    columns = ("network", "file", "peak", "above", "above bare", "CPU", "wall", "found", "rows")
    print("{:20} {:>7} {:>7} {:>7} {:>10} {:>7} {:>7} {:>6} {:>5}".format(*columns))
    print("{:20} {:>7} {:>7} {:>7} {:>10} {:>7} {:>7} {:>6} {:>5}".format("", *4 * ["GiB"], *2 * ["s"], "", ""), flush=True)
    over, gib = [], float(1 << 30)
    bare = run("bare")["peak"]
    for name in sys.argv[1:] or MODELS:
        model_class, target, dtype = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.safetensors"
            run("write", str(path), target, dtype)
            size = path.stat().st_size
            if size < SMALLEST:
                sys.exit(f"{name} has only {size:,} bytes")
            base, found = run("imports", model_class)["peak"], run("audit", str(path), target)
        above = found["peak"] - base
        over += [name] if above >= LIMIT else []
        print(
            f"{name:20} {size / gib:7.2f} {found['peak'] / gib:7.2f} {above / gib:7.2f} {(found['peak'] - bare) / gib:10.2f} "
            f"{found['cpu']:7.1f} {found['wall']:7.1f} {found['symmetries']:6} {found['rows']:5}",
            flush=True,
        )
    sys.exit(f"a GiB or more above the imports: {', '.join(over)}" if over else 0)


if __name__ == "__main__":
    main()
