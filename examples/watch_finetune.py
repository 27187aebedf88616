"""Watch a small GPT while Hugging Face's Trainer trains it, then read the run.

    python examples/watch_finetune.py --out demo/watch

The text is the documentation that comes with Python itself (the docstrings of its standard library), read character by character, so
nothing is downloaded. Follow the run from a second terminal with ``parasym watch tail demo/watch``.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from parasym.watch.huggingface import WatchCallback
from parasym.watch.page import write_run
from parasym.watch.record import Record
from parasym.watch.summary import summary

LENGTH = 64
MODULES = (
    "argparse",
    "asyncio/tasks",
    "collections/__init__",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "functools",
    "heapq",
    "random",
    "textwrap",
)


def text() -> str:
    """The docstrings of a few modules of the standard library, about 200,000 characters."""
    library, out = Path(sysconfig.get_paths()["stdlib"]), []
    for name in MODULES:
        file = library / f"{name}.py"
        if file.is_file():
            tree = ast.parse(file.read_text(encoding="utf-8"))
            nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
            out += [doc for node in nodes if (doc := ast.get_docstring(node))]
    return "\n\n".join(out)


def windows(content: str) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Windows of characters as numbers, and how many characters there are."""
    known = sorted(set(content))
    number = {character: index for index, character in enumerate(known)}
    codes = torch.tensor([number[character] for character in content])
    return [{"input_ids": (window := codes[at : at + LENGTH]), "labels": window} for at in range(0, len(codes) - LENGTH, LENGTH // 2)], len(
        known
    )


def main() -> None:
    """Train, and write the record and its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/watch"), help="folder for the record, the checkpoints and the page")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--budget", type=float, default=0.05, help="share of the run's time that watching may take")
    options = parser.parse_args()

    data, vocabulary = windows(text())
    torch.manual_seed(0)
    no_dropout = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }  # dropout on the stream breaks its invisible mean, and the watch says so
    sizes = {"n_layer": options.layers, "n_head": 4, "n_embd": options.width, "vocab_size": vocabulary, "n_positions": LENGTH}
    config = GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        weight_decay=0.1,
        warmup_steps=min(50, options.steps // 10),
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[WatchCallback(budget=options.budget)])
    trainer.train()

    with Record.open(options.out) as record:
        page = write_run(record, options.out / "watch.html")
        print(summary(record)["verdict"]["sentence"])
    print(f"record: {record.path}\npage: {page}\nread it again: parasym watch report {options.out}")


if __name__ == "__main__":
    main()
