"""Time the audit on networks of growing size: seconds, peak memory and what was found.

python bench/audit.py [TARGET ...]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

TARGETS = [
    "hf:GPT2Config?n_layer=1&n_embd=8&n_head=2&vocab_size=11&n_positions=8",
    "hf:GPT2Config?n_layer=2&n_embd=64&n_head=4&vocab_size=101&n_positions=16",
    "hf:LlamaConfig?num_hidden_layers=2&hidden_size=64&intermediate_size=128&num_attention_heads=4&num_key_value_heads=2&vocab_size=101",
    "hf:BertConfig?num_hidden_layers=6&hidden_size=384&num_attention_heads=12&intermediate_size=1536",
    "hf:GPT2Config?n_layer=12",
]


def measure(target: str) -> None:
    """Audit one target in this process and print its row."""
    import parasym
    from parasym.core.load import load_target

    loaded = load_target(target)
    start = time.perf_counter()
    found = parasym.audit(loaded.model, args=loaded.args, kwargs=loaded.kwargs).to_dict()
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    certified = sum(symmetry["certified"] for symmetry in found["symmetries"])
    print(f"{found['model']['parameters']:>12,} {seconds:>9.1f} {memory:>9.2f} {certified:>9}  {target}", flush=True)


def main() -> None:
    """Each target runs in its own process, so that its peak memory is its own."""
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2])
        return
    print(f"{'parameters':>12} {'seconds':>9} {'GB peak':>9} {'certified':>9}  target", flush=True)
    failed = [
        target for target in sys.argv[1:] or TARGETS if subprocess.run([sys.executable, __file__, "--one", target], check=False).returncode
    ]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
