"""Teleport on networks that others trained, int8 on a stream with outliers, and re-basin beside git-re-basin's weight matching.

python bench/teleport.py --data demo/data            # all parts; --only models|llama|rebasin for one
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from parasym.methods.objectives import Function, Int8, NoiseEquilibrium, Sharpness, rounded
from parasym.methods.rebasin import Agreement
from parasym.methods.teleport import find_symmetries, teleport

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))


def row(*cells: Any) -> None:
    print("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def still(stage: str, fraction: float) -> None:
    """No progress bar."""


# ------------------------------------------------------------------------------------------------ networks that others trained


def first_loss(out: Any, target: Tensor) -> Tensor:
    """Mean squared distance of the first output to a target: a loss for networks whose own loss did not ship with them."""
    first = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out.last_hidden_state
    return (first.flatten(1) - target.flatten(1)).square().mean()


def models(data: Path, names: Sequence[str], wanted: Sequence[str] | None, dtypes: Sequence[torch.dtype]) -> None:
    """Each objective on each packaged model, in float32 and float64."""
    import demo

    print("\n| model | dtype | to | before | after | outputs change, stored | outputs change, exact | CPU s | status |\n|" + "---|" * 9)
    for name in names:
        loaded = demo.encoder(data) if name == "minilm" else demo.detector(data, name)
        symmetries = find_symmetries(loaded.model, loaded.args, loaded.kwargs, 0, still)
        for dtype in dtypes:
            model = copy.deepcopy(loaded.model).to(dtype)
            args = tuple(a.to(dtype) if a.is_floating_point() else a for a in loaded.args)
            with torch.no_grad():
                out = model(*args, **loaded.kwargs)
            first = out[0] if isinstance(out, tuple) else out.last_hidden_state
            target = first + 0.1 * torch.randn(first.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
            batch = (args if args else dict(loaded.kwargs), target)
            heavy = name == "minilm"
            size = first.shape[0]
            weight = next(n for n, p in model.named_parameters() if p.dim() > 1 and (not heavy or "query" in n))
            aims: dict[str, Any] = {
                "balance": "balance",
                "minimum-norm": "minimum-norm",
                "int8": Int8(iterations=12 if heavy else 40),
                "function": Function(lambda p, w=weight: p[w].square().sum(), iterations=10 if heavy else 40),
                "sharpness": Sharpness(first_loss, batch, iterations=3 if heavy else 8, tol=1e-2),
                "noise-equilibrium": NoiseEquilibrium(first_loss, batch, batch_size=max(1, size // 2), passes=4 if heavy else 12),
            }
            for aim, to in aims.items():
                if wanted and aim not in wanted:
                    continue
                start = time.process_time()
                edit = teleport(model, args, loaded.kwargs, to=to, symmetries=symmetries)
                s = edit.summary
                stored = float(edit.certificate.value) if isinstance(edit.certificate.value, float) else math.nan
                seconds = time.process_time() - start
                row(name, str(dtype)[6:], aim, s["before"], s["after"], f"{stored:.1e}", f"{s['exact']:.1e}", seconds, s["status"])


# ------------------------------------------------------------------------------------------------------- a stream with outliers


def llama(width: int = 32) -> None:
    """int8 error of a pre-norm Llama with two outlier channels in its stream, before and after."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=width, intermediate_size=3 * width // 2, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "norm" in n:
                p.uniform_(0.5, 1.5)
        for channel in (3, 17):
            model.model.embed_tokens.weight[:, channel] *= 30
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[channel] *= 30
                layer.mlp.down_proj.weight[channel] *= 30
    kwargs = {"input_ids": torch.randint(0, 97, (4, 12)), "use_cache": False}
    edit = teleport(model, (), kwargs, to=Int8(iterations=40))
    errors = [mean_error(m) for m in (model, edit.edited())]
    print("\n| Llama, 2 layers, 2 outlier channels | before | after | ratio |\n|---|---|---|---|")
    row("outputs after int8, per tensor", edit.summary["before"], edit.summary["after"], edit.summary["before"] / edit.summary["after"])
    row("weights after int8, rms over tensors", *errors, errors[0] / errors[1])
    row("change of the outputs", f"{edit.certificate.value:.1e}", f"exact {edit.summary['exact']:.1e}", "")


def mean_error(model: nn.Module) -> float:
    each = [((rounded(p.detach().double()) - p).norm() / p.norm()).item() ** 2 for p in model.parameters() if p.dim() > 1]
    return math.sqrt(sum(each) / len(each))


# ---------------------------------------------------------------------------------------------------------------- re-basin


class Rows(nn.Module):
    """A pre-norm transformer that reads a digit row by row: RMS norms with gains, four heads, a ReLU MLP."""

    def __init__(self, width: int = 32, heads: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Linear(8, width, bias=False), nn.Parameter(0.02 * torch.randn(8, width))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.one, self.two, self.last = (nn.RMSNorm(width) for _ in range(3))
        self.read = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unflatten(1, (8, 8))) + self.place
        y = self.one(h)
        q, k, v = (m(y).unflatten(2, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        h = h + self.o(a.transpose(1, 2).flatten(2))
        h = h + self.down(torch.relu(self.up(self.two(h))))
        return self.read(self.last(h).mean(1))


class Residual(nn.Module):
    """A small ResNet on 8 x 8 digits: a stem and two blocks of two convolutions, batch norm after each."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(4))
        self.read = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm(self.stem(x.unflatten(1, (1, 8, 8)))))
        for i in (0, 2):
            y = torch.relu(self.norms[i](self.convs[i](h)))
            h = torch.relu(h + self.norms[i + 1](self.convs[i + 1](y)))
        return self.read(h.mean((2, 3)))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


Spec = Mapping[str, Sequence[tuple[str, int, int | None]]]
MLP: Spec = {str(i): [(f"{i}.weight", 0, None), (f"{i}.bias", 0, None), (f"{i + 2}.weight", 1, None)] for i in (0, 2, 4)}
RESIDUAL: Spec = {
    "stream": [("stem.weight", 0, None), *((f"norm.{p}", 0, None) for p in ("weight", "bias")),
               *((f"convs.{i}.weight", 1, None) for i in (0, 2)), *((f"convs.{i}.weight", 0, None) for i in (1, 3)),
               *((f"norms.{i}.{p}", 0, None) for i in (1, 3) for p in ("weight", "bias")), ("read.weight", 1, None)],
    **{f"inner {i}": [(f"convs.{i}.weight", 0, None), *((f"norms.{i}.{p}", 0, None) for p in ("weight", "bias")),
                      (f"convs.{i + 1}.weight", 1, None)] for i in (0, 2)},
}  # fmt: skip
ROWS: Spec = {
    "stream": [("embed.weight", 0, None), ("place", 1, None), ("q.weight", 2, None), ("k.weight", 2, None), ("v.weight", 2, None),
               ("o.weight", 0, None), ("up.weight", 1, None), ("down.weight", 0, None), ("read.weight", 1, None),
               *((f"{n}.weight", 0, None) for n in ("one", "two", "last"))],
    "hidden": [("up.weight", 0, None), ("up.bias", 0, None), ("down.weight", 1, None)],
    "heads": [("q.weight", 0, None), ("k.weight", 0, None), ("v.weight", 0, None), ("o.weight", 1, None)],
    **{f"qk {h}": [("q.weight", 1, h), ("k.weight", 1, h)] for h in range(4)},
    **{f"ov {h}": [("v.weight", 1, h), ("o.weight", 2, h)] for h in range(4)},
}  # fmt: skip


def weight_matching(a: Mapping[str, Tensor], b: Mapping[str, Tensor], spec: Spec, seed: int, sweeps: int = 200) -> dict[str, Tensor]:
    """git-re-basin's weight matching, written from the paper: one permutation at a time, in random order, until none improves.

    ``spec``: permutation -> (tensor, axis, head); with a head the permutation acts inside it (heads are axis 0 of q, k, v and axis 1 of o).
    """
    g, now = torch.Generator().manual_seed(seed), dict(b)

    def head(t: Tensor, name: str, h: int | None) -> Tensor:
        return t if h is None else t.select(1 if name.startswith("o") else 0, h)

    def axis(i: int, name: str, h: int | None) -> int:
        return i if h is None else i - 1

    for _ in range(sweeps):
        changed = False
        for k in torch.randperm(len(spec), generator=g).tolist():
            places = list(spec.values())[k]
            score: Any = 0
            for name, i, h in places:
                x, y = (head(t[name], name, h).movedim(axis(i, name, h), 0) for t in (a, now))
                x, y = (v[:, None].flatten(1) for v in (x, y))
                score = score + x @ y.T
            order = torch.tensor(linear_sum_assignment(score.numpy(), maximize=True)[1])
            if float(score[range(len(order)), order].sum()) > float(score.trace()) + 1e-9:
                changed = True
                for name, i, h in places:
                    t = now[name] = now[name].clone()
                    part = head(t, name, h)
                    part.copy_(part.index_select(axis(i, name, h), order))
        if not changed:
            return now
    return now


def views(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, those of attention with the heads on an axis of their own."""
    out = {n: p.detach().clone() for n, p in model.named_parameters()}
    if isinstance(model, Rows):
        for n in ("q", "k", "v"):
            out[f"{n}.weight"] = out[f"{n}.weight"].unflatten(0, (model.heads, -1))
        out["o.weight"] = out["o.weight"].unflatten(1, (model.heads, -1))
    return out


def with_views(model: nn.Module, held: Mapping[str, Tensor]) -> nn.Module:
    out = copy.deepcopy(model)
    with torch.no_grad():
        for n, p in out.named_parameters():
            p.copy_(held[n].reshape(p.shape))
    return out


def trained(make: Callable[[], nn.Module], seed: int, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model, g = make(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        i = torch.randint(len(x), (64,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(model(x[i]), y[i]).backward()
        optimizer.step()
    return model.eval()


def barrier(a: nn.Module, b: nn.Module, x: Tensor, y: Tensor, points: int = 11) -> float:
    """Largest loss above the straight line between the ends; batch statistics are taken anew at every point, for every method alike."""
    pa, pb, line = dict(a.named_parameters()), dict(b.named_parameters()), []
    ts = torch.linspace(0, 1, points).tolist()
    for t in ts:
        mid = copy.deepcopy(a)
        with torch.no_grad():
            for n, p in mid.named_parameters():
                p.copy_((1 - t) * pa[n] + t * pb[n])
            norms = [m for m in mid.modules() if isinstance(m, nn.BatchNorm2d)]
            if norms:
                for m in norms:
                    m.reset_running_stats()
                    m.momentum = None
                mid.train()
                mid(x)
                mid.eval()
            line.append(float(F.cross_entropy(mid(x), y)))
    return max(v - (1 - t) * line[0] - t * line[-1] for v, t in zip(line, ts, strict=True))


def gap(a: nn.Module, b: nn.Module) -> float:
    """Squared distance of the parameters."""
    return sum(float((p - q).detach().square().sum()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


RESTARTS = 6


def loss_midway(a: nn.Module, b: nn.Module, x: Tensor, y: Tensor) -> float:
    """The loss half-way, fresh batch statistics as in `barrier`: what a matcher may judge by on the data it is given."""
    return barrier(a, b, x, y, points=3)


def rebasin(kinds: Sequence[str], pairs: int, seed: int) -> None:
    """Loss barriers between two independently trained networks, before and after each alignment.

    Networks and judges see the training digits, nobody sees the test digits before the last column of each pair of figures. Both methods
    have the same number of restarts: weight matching draws as many orders as ours makes descents (five times ``RESTARTS``).
    """
    from parasym.gallery.digits import digits

    d = digits(0.7)
    makers: dict[str, tuple[Callable[[], nn.Module], Spec, int]] = {
        "mlp": (mlp, MLP, 1500), "resnet": (Residual, RESIDUAL, 500), "transformer": (Rows, ROWS, 1500),
    }  # fmt: skip
    heads = ("apart", "weight matching", "teleport", "weight matching, judged midway", "teleport, judged midway")
    print("\nbarrier on held-out data (on training data); without data the closest of all restarts is taken, else the lowest loss midway\n")
    print("| pair | " + " | ".join(heads) + " | CPU s |\n|" + "---|" * (len(heads) + 2))
    count = dict.fromkeys(("without data", "with data"), 0)
    for kind in kinds:
        make, spec, steps = makers[kind]
        symmetries = None
        for pair in range(pairs):
            a, b = (trained(make, seed + 2 * pair + s, d.x, d.y, steps) for s in (0, 1))
            start = time.process_time()
            x = d.x[:32]
            symmetries = symmetries or find_symmetries(b, (x,), None, 0, still)
            va, vb = views(a), views(b)
            matched = [with_views(b, weight_matching(va, vb, spec, s)) for s in range(5 * RESTARTS)]
            nets = (
                b,
                min(matched, key=lambda m: gap(a, m)),
                teleport(b, (x,), to=Agreement(a, restarts=RESTARTS), symmetries=symmetries).edited(),
                min(matched, key=lambda m: loss_midway(a, m, d.x, d.y)),
                teleport(b, (x,), to=Agreement(a, restarts=RESTARTS, loss_fn=F.cross_entropy, data=(d.x, d.y)),
                         symmetries=symmetries).edited(),
            )  # fmt: skip
            held = [barrier(a, m, d.x_test, d.y_test) for m in nets]
            row(f"{kind} {pair}", *(f"{h:.4f} ({barrier(a, m, d.x, d.y):.4f})" for h, m in zip(held, nets, strict=True)),
                time.process_time() - start)  # fmt: skip
            count["without data"] += held[2] <= held[1]
            count["with data"] += held[4] <= held[3]
    print(f"\nteleport no higher on held-out data, of {len(kinds) * pairs} pairs: {count}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "demo" / "data", help="folder with the packaged models (make demo-data)")
    parser.add_argument("--only", choices=("models", "llama", "rebasin"), help="one part")
    parser.add_argument("--names", nargs="*", help="of models (rnet onet minilm) or of pairs (mlp resnet transformer)")
    parser.add_argument("--pairs", type=int, default=3, help="independent pairs of each kind")
    parser.add_argument("--seed", type=int, default=1000, help="of the first network of a pair")
    parser.add_argument("--aims", nargs="*", help="of models: balance minimum-norm int8 function sharpness noise-equilibrium")
    parser.add_argument("--dtypes", nargs="*", choices=("float32", "float64"), default=("float32", "float64"), help="of models")
    o = parser.parse_args()
    if o.only in (None, "rebasin"):
        rebasin(o.names or ("mlp", "resnet", "transformer"), o.pairs, o.seed)
    if o.only in (None, "llama"):
        llama()
    if o.only in (None, "models"):
        models(o.data, o.names or ("rnet", "onet", "minilm"), o.aims, [getattr(torch, d) for d in o.dtypes])


if __name__ == "__main__":
    main()
