"""Discovery written down at full size on the meta device: seconds, processor seconds and peak memory, by model and by layers.

python bench/growth.py [models|layers]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

MODELS = {
    "resnet-50": ("ResNetForImageClassification", "ResNetConfig", {}),
    "vit-b": ("ViTForImageClassification", "ViTConfig", {}),
    "gpt2-small": ("GPT2LMHeadModel", "GPT2Config", {}),
    "llama-1b": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
    ),
}
LAYERS = {f"gpt2-{n}-layers": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": n}) for n in (6, 12, 24, 48, 96)}


def measure(name: str) -> None:
    """One model in this process: trace, twin, search, certificates, writing."""
    import torch
    import transformers

    import parasym
    from parasym.core.load import example_inputs

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    model_class, config_class, options = {**MODELS, **LAYERS}[name]
    config = getattr(transformers, config_class)(**options)
    config.use_cache = False
    with torch.device("meta"):
        model = getattr(transformers, model_class)(config).eval()
    start, used = time.perf_counter(), time.process_time()
    found = parasym.symmetries(model, (), example_inputs(model, batch=2))
    seconds, used = time.perf_counter() - start, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    undecided = sum(u.get("dim", 0) for u in found.undecided)
    dims = sum(s.dim for s in found)
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{name:18} {size:>14,} {seconds:>8.1f} {used:>8.1f} {peak:>7.2f} {peak - before:>7.2f} {len(found):>6} {dims:>12,} {undecided:>6}",
        flush=True,
    )


def main() -> None:
    """Each row in its own process, so that its peak memory is its own."""
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2])
        return
    wanted = {"models": MODELS, "layers": LAYERS}
    heads = f"{'seconds':>8} {'CPU':>8} {'GiB':>7} {'above':>7} {'found':>6} {'dimensions':>12} {'open':>6}"
    print(f"{'model':18} {'parameters':>14} {heads}", flush=True)
    for part in sys.argv[1:] or list(wanted):
        for name in wanted[part]:
            subprocess.run([sys.executable, __file__, "--one", name], check=True)


if __name__ == "__main__":
    main()
