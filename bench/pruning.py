"""Torch-Pruning's dependency graph beside our discovery, on the same full-size models in the same run.

Both find by themselves which slices of which parameters belong together. Printed for each: seconds (wall and CPU), the share of
the parameters it says anything about, and how much of what it says is a symmetry. One judge for both: an element is applied to
the weights in float64, and the outputs of the model itself are compared. A group of Torch-Pruning couples slices of several
tensors; read as a symmetry it claims that its channels may be permuted. Counted apart: a group that only permutes the model's own
outputs; one whose indices do not line up, so that no permutation can be read off; and one that is a symmetry only within each
attention head, whose number Torch-Pruning does not find but takes from its user.

The peer traces real weights; ours traces the meta device ("weights: none"). The judge needs weights for both.

    pip install --no-deps torch-pruning==1.6.1
    python bench/pruning.py [MODEL ...] [--judge] [--limit SECONDS]
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from growth import MODELS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ACCEPT = 1e-10
MOVED = 1e-4
SHAPES = {"llama-small": ("LlamaForCausalLM", "LlamaConfig", {**MODELS["llama-1b"][2], "hidden_size": 256, "intermediate_size": 688,
          "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 5000}),
          "gpt2-384": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 384, "n_head": 6, "vocab_size": 5000})}  # fmt: skip
ALL = {**MODELS, **SHAPES}


def build(name: str, device: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and inputs for it; weights and running statistics in general position, no two alike."""
    import transformers

    from parasym.core.load import example_inputs

    model_class, config_class, options = ALL[name]
    config = getattr(transformers, config_class)(**options)
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, model_class)(config).eval()
    if device != "meta":
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
            for n, b in model.named_buffers():
                if n.endswith(("running_mean", "running_var")):
                    b.add_(0.2 * torch.rand_like(b))
    return model, example_inputs(model, batch=2)


class Clock:
    """Wall and CPU seconds of a block."""

    def __enter__(self) -> Clock:
        self.wall, self.cpu = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.cpu += time.process_time()


class Lifted(TorchFunctionMode):
    """Casts to float32 inside a forward (norms, rotary tables) become casts to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args, kwargs = pytree.tree_map(lambda a: torch.float64 if a is torch.float32 else a, (args, kwargs or {}))
        return func(*args, **kwargs)


class Judge:
    """Outputs of a model in float64 before and after some of its tensors are moved."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.model = model.double()
        self.inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        self.before = self.outputs()

    def outputs(self, moved: Mapping[str, Tensor] | None = None) -> Tensor:
        with torch.no_grad(), Lifted():
            found: Tensor = torch.func.functional_call(self.model, dict(moved or {}), (), dict(self.inputs)).logits
        return found

    def change(self, after: Tensor, before: Tensor | None = None) -> float:
        before = self.before if before is None else before
        return float((after - before).abs().max() / before.abs().max())


# -- the peer ------------------------------------------------------------------------------------------------------------------


def peer(name: str, judged: bool) -> dict[str, Any]:
    """Torch-Pruning's groups: time, coverage, and how many are symmetries."""
    import torch_pruning

    model, inputs = build(name, "cpu")
    with Clock() as clock:
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=inputs)
        groups = list(graph.get_all_groups())
    members = {id(p) for g in groups for dep, _ in g for p, _ in slices(dep, tensors=False)}
    size = sum(p.numel() for p in model.parameters())
    covered = sum(p.numel() for p in model.parameters() if id(p) in members)
    out = {"parameters": size, "wall": clock.wall, "cpu": clock.cpu, "found": len(groups), "covered": covered / size}
    if judged:
        verdicts = [verdict for verdict, _ in judge_groups(groups, Judge(model, inputs))]
        out |= {v: verdicts.count(v) for v in ("true", "heads", "false", "outputs", "unreadable")}
    return out


def slices(dep: Any, tensors: bool = True) -> Iterator[tuple[Tensor, int]]:
    """The tensors that one member of a group cuts, each with the axis it is cut along (running statistics too)."""
    module, node = dep.target.module, dep.target
    if isinstance(module, nn.Parameter):
        yield module, node.pruning_dim % module.dim()
        return
    held = [*module.parameters(recurse=False), *(module.buffers(recurse=False) if tensors else ())]
    reads = "in_channels" in dep.handler.__name__ and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    for t in held:
        if reads and tensors:
            if t.dim() > 1:
                yield t, 1
        elif t.dim():
            yield t, 1 if isinstance(module, nn.Embedding) else 0


def judge_groups(groups: list[Any], judge: Judge) -> Iterator[tuple[str, float]]:
    """For each group what a random permutation of its channels does, and the relative change of the outputs."""
    names = {id(t): n for n, t in [*judge.model.named_parameters(), *judge.model.named_buffers()]}
    config: Any = judge.model.config
    heads = {getattr(config, n, None) or 1 for n in ("num_attention_heads", "num_key_value_heads")}
    generator = torch.Generator().manual_seed(1)
    for group in groups:
        roots = sorted({r for item in group.items for r in item.root_idxs})
        n = len(roots)
        order = torch.randperm(n, generator=generator)
        moved = permuted(group, roots, order, names)
        if moved is None:
            yield "unreadable", float("nan")
            continue
        after = judge.outputs(moved)
        change = judge.change(after)
        if change <= ACCEPT:
            yield "true", change
        elif after.shape[-1] == n and judge.change(after, judge.before[..., order]) <= ACCEPT:
            yield "outputs", change
        else:
            told = [m for h in heads if n % h == 0 and (m := within(group, roots, h, names, generator))]
            yield "heads" if any(judge.change(judge.outputs(m)) <= ACCEPT for m in told) else "false", change


def within(group: Any, roots: list[int], heads: int, names: Mapping[int, str], generator: torch.Generator) -> dict[str, Tensor] | None:
    """One permutation for the channels of every head."""
    each = torch.randperm(len(roots) // heads, generator=generator)
    order = (torch.arange(heads)[:, None] * len(each) + each).reshape(-1)
    return permuted(group, roots, order, names) if 1 < heads < len(roots) else None


def permuted(group: Any, roots: list[int], order: Tensor, names: Mapping[int, str]) -> dict[str, Tensor] | None:
    """The moved tensors when channel i of the group's root becomes channel ``order[i]``; None where a member has no such permutation."""
    takes = dict(zip(roots, (roots[i] for i in order.tolist()), strict=True))
    moved: dict[str, Tensor] = {}
    done: set[tuple[int, int]] = set()
    for item in group.items:
        places: dict[int, list[int]] = {}
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            places.setdefault(root, []).append(index)
        for t, axis in slices(item.dep):
            if (id(t), axis) in done:
                continue
            done.add((id(t), axis))
            index = torch.arange(t.shape[axis])
            for root, other in takes.items():
                if len(places.get(root, ())) != len(places.get(other, ())) or root not in places:
                    return None
                index[places[root]] = torch.tensor(places[other])
            name = names[id(t)]
            moved[name] = moved.get(name, t.detach()).index_select(axis, index)
    return moved


# -- ours ----------------------------------------------------------------------------------------------------------------------


def ours(name: str, judged: bool) -> dict[str, Any]:
    """Our symmetries on the meta device: time, certificates, and the class of every parameter."""
    import parasym

    model, inputs = build(name, "meta")
    with Clock() as clock:
        found = parasym.symmetries(model, (), inputs)
    size = sum(p.numel() for p in model.parameters())
    classes, reasons = found.counts(), {r["why"]: r["count"] for r in found.reasons()}
    out = {"parameters": size, "wall": clock.wall, "cpu": clock.cpu, "found": len(found), "certified": sum(s.certified for s in found)}
    out |= {"covered": sum(classes.values()) / size, "classes": classes, "reasons": reasons}
    if judged:
        out |= judge_ours(name)
    return out


def judge_ours(name: str) -> dict[str, Any]:
    """Audit the model with weights, then let the peer's judge test what it claims.

    All members of a family (the same symmetry in every layer) are moved at once; where that changes the outputs, one by one.
    """
    import parasym

    model, inputs = build(name, "cpu")
    claimed = parasym.audit(model, (), inputs).symmetries
    judge = Judge(model, inputs)
    named = dict(judge.model.named_parameters())
    carried = {f"b_{n.replace('.', '_')}": n for n, _ in judge.model.named_buffers()}
    start = {**{n: p.detach() for n, p in named.items()}, **{b: judge.model.get_buffer(n) for b, n in carried.items()}}
    generator = torch.Generator().manual_seed(1)

    def holds(members: list[Any]) -> bool:
        moved = dict(start)
        for s in members:
            before = {p: moved[p] for p in s.parameters if p in moved}
            moved = s.act(moved, element(s, generator))
            if s.dim and max(float((moved[p] - b).norm() / (b.norm() + 1e-300)) for p, b in before.items()) < MOVED:
                return False
        return judge.change(judge.outputs({carried.get(n, n): t for n, t in moved.items()})) <= ACCEPT

    families: dict[Any, list[Any]] = {}
    for s in claimed:
        families.setdefault((s.name, s.kind, re.sub(r"\d+", "#", s.where)), []).append(s)
    true = sum(len(f) if holds(f) else sum(holds([s]) for s in f) if len(f) > 1 else 0 for f in families.values())
    return {"claimed": len(claimed), "true": true, "false": len(claimed) - true}


def element(s: Any, generator: torch.Generator) -> Tensor:
    """A random element: coordinates of a matrix group shrink with its width, so that its exponential stays well conditioned."""
    entry = getattr(s.action, "entry", None)
    width = entry.size if entry is not None and entry.algebra in ("gl", "so", "so1") else 1
    found: Tensor = s.random_element(generator, scale=0.3 / max(1, width) ** 0.5)
    return found


# -- the table -----------------------------------------------------------------------------------------------------------------


def run(side: str, name: str, judged: bool, limit: float) -> dict[str, Any] | str:
    """One side on one model in a process of its own; what it found, or why not."""
    command = [sys.executable, __file__, name, "--side", side, *(["--judge"] if judged else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"did not finish in {limit:.0f} s"
    if done.returncode:
        return f"failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:160]}"
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def line(side: str, name: str, found: dict[str, Any] | str) -> str:
    if isinstance(found, str):
        return f"{name:12} {side:14} {found}"
    text = f"{name:12} {side:14} {found['parameters']:>13,} {found['wall']:>7.2f} {found['cpu']:>7.2f}"
    text += f" {found['found']:>6} {found['covered']:>8.1%}"
    if side == "ours":
        shares = ", ".join(f"{kind} {n / found['parameters']:.2%}" for kind, n in found["classes"].items())
        text += f"   {found['certified']} certified; {shares}"
        text += f"; judged {found['true']} of {found['claimed']} true" if "claimed" in found else ""
        return "\n".join([text, *(f"{'':27} undecided {n:,}: {why}" for why, n in found["reasons"].items())])
    if "true" in found:
        told = found["found"] - found["outputs"]
        text += f"   {found['true']} of {told} are symmetries, {found['heads']} only within heads given by hand, {found['false']} are not"
        text += f", {found['unreadable']} unreadable; {found['outputs']} relabel the outputs"
    return text


def main() -> None:
    """Both sides on every model, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*ALL, []])
    parser.add_argument("--judge", action="store_true", help="test with weights what both sides claim (minutes for a large model)")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each side of each model")
    parser.add_argument("--side", choices=("torch-pruning", "ours"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        side: Callable[[str, bool], dict[str, Any]] = {"torch-pruning": peer, "ours": ours}[given.side]
        print(json.dumps(side(given.models[0], given.judge)))
        return
    print(f"{'model':12} {'side':14} {'parameters':>13} {'wall s':>7} {'CPU s':>7} {'found':>6} {'covered':>8}", flush=True)
    for name in given.models or list(ALL):
        for side_name in ("torch-pruning", "ours"):
            print(line(side_name, name, run(side_name, name, given.judge, given.limit)), flush=True)


if __name__ == "__main__":
    main()
