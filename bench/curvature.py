"""Ten largest-magnitude Hessian eigenvalues of a small GPT and of a ResNet-18-like CNN: parasym beside its peers.

Run with one thread; peers are optional and looked for in the directories of PEERS (``pip install --no-deps --target DIR pyhessian
hessian-eigenthings curvlinops-for-pytorch ...``). Every method is judged by the same numbers: Hessian-vector products, CPU seconds (the
smallest of three), the largest relative error of the ten values against a float64 reference (parasym in float64 at a residual of
1e-8), and, where it returns vectors, the largest residual |H v - lambda v| / |lambda| of its ten pairs, taken in float64. SciPy's eigsh is
also run on parasym's own product: what is left between the two is the eigensolver alone.

    OMP_NUM_THREADS=1 PEERS=DIR python bench/curvature.py [gpt|cnn]
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from parasym.core.guards import blas_threads
from parasym.measure.curvature import eigenpairs, hessian

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
K = 10


class Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mask = torch.ones(t, t, dtype=torch.bool).triu(1)
        a = (q @ k.mT / (d // self.heads) ** 0.5).masked_fill(mask, float("-inf")).softmax(-1)
        return self.out((a @ v).transpose(1, 2).reshape(b, t, d))


class Layer(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.n1, self.n2, self.attention = nn.LayerNorm(d), nn.LayerNorm(d), Attention(d, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int = 128, length: int = 32, d: int = 96, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, d), nn.Parameter(0.02 * torch.randn(length, d))
        self.layers = nn.Sequential(*(Layer(d, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.token(x) + self.place))).flatten(0, 1)


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.c1, self.n1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.GroupNorm(4, o)
        self.c2, self.n2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.GroupNorm(4, o)
        self.short = nn.Identity() if stride == 1 and i == o else nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.n2(self.c2(F.gelu(self.n1(self.c1(x))))) + self.short(x))


def resnet(width: int = 8) -> nn.Module:
    """The topology of ResNet-18, narrow, with group norm and GELU."""
    parts: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(4, width), nn.GELU()]
    inner = width
    for stage, outer in enumerate([width, 2 * width, 4 * width, 8 * width]):
        for block in range(2):
            parts.append(Residual(inner, outer, 2 if block == 0 and stage else 1))
            inner = outer
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 10))


def problem(kind: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model after 40 steps of Adam on one batch, so that its spectrum has outliers."""
    torch.manual_seed(0)
    if kind == "cnn":
        model, batch = resnet(), (torch.randn(16, 3, 16, 16), torch.randint(0, 10, (16,)))
    else:
        model, text = GPT(), torch.randint(0, 128, (4, 33))
        batch = text[:, :-1], text[:, 1:].reshape(-1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model, batch


def main(kind: str) -> None:
    """One table."""
    for path in os.environ.get("PEERS", "").split(os.pathsep):
        sys.path.append(path)
    model, batch = problem(kind)
    n = sum(p.numel() for p in model.parameters())
    wide = (batch[0].double() if batch[0].is_floating_point() else batch[0], batch[1])
    exact = hessian(model, F.cross_entropy, wide, dtype=torch.float64)
    reference = eigenpairs(exact, K, tol=1e-8).values.numpy()
    print(f"{kind}: {n:,} parameters; top {reference[0]:.4f}, tenth {reference[-1]:.4f}")
    counts: Counter[str] = Counter()

    def residual(values: np.ndarray, vectors: np.ndarray) -> float:
        V = torch.as_tensor(np.array(vectors, float))
        V = V / V.norm(dim=0)
        off = torch.stack([exact @ v for v in V.T], 1) - V * torch.as_tensor(values)
        return float((off.norm(dim=0) / torch.as_tensor(abs(values))).max())

    def row(name: str, run: Callable[[], tuple[np.ndarray, np.ndarray | None]], repeat: int = 3) -> None:
        best = float("inf")
        for _ in range(repeat):
            counts.clear()
            start = time.process_time()
            try:
                found, vectors = run()
            except Exception as e:
                print(f"  {name:52} fails: {type(e).__name__}: {str(e).splitlines()[0][:90]}")
                return
            best = min(best, time.process_time() - start)
        values, used = np.asarray(found, float), counts["hvp"]
        order = np.argsort(-abs(values))[:K]
        error = np.max(abs(values[order] - reference) / abs(reference))
        left = "" if vectors is None else f", residual {residual(values[order], vectors[:, order]):.1e}"
        print(f"  {name:46} {used:4d} HVPs {best:7.2f} CPU s   largest relative error {error:.1e}{left}")

    for tol in (1e-2, 1e-3):

        def own(tol: float = tol) -> tuple[np.ndarray, np.ndarray]:
            found = eigenpairs(hessian(model, F.cross_entropy, batch), K, tol=tol)
            counts["hvp"] = found.products
            assert found.status == "ok", found
            return found.values.numpy(), found.vectors.numpy()

        def scipy(tol: float = tol) -> tuple[np.ndarray, np.ndarray]:
            op = hessian(model, F.cross_entropy, batch)

            def product(x: np.ndarray) -> np.ndarray:
                counts["hvp"] += 1
                return (op @ torch.from_numpy(x.reshape(-1))).numpy()

            with blas_threads(1):
                found = eigsh(LinearOperator((n, n), matvec=product, dtype="float32"), k=K, which="LM", tol=tol, v0=_start(n))
            return found[0], found[1]

        row(f"parasym, residual {tol:g}", own)
        row(f"parasym's product + eigsh, tol {tol:g}", scipy)
    _peers(model, batch, row, counts)


def _start(n: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(n).astype("float32")


def _peers(model: nn.Module, batch: tuple[Tensor, Tensor], row: Callable[..., None], counts: Counter[str]) -> None:
    n, parameters = sum(p.numel() for p in model.parameters()), list(model.parameters())
    try:
        from curvlinops import HessianLinearOperator

        def curvlinops(tol: float) -> tuple[np.ndarray, np.ndarray]:
            A = HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, [batch]).to_scipy()

            def product(x: np.ndarray) -> np.ndarray:
                counts["hvp"] += 1
                return A @ x

            with blas_threads(1):
                found = eigsh(LinearOperator((n, n), matvec=product, dtype="float32"), k=K, which="LM", tol=tol, v0=_start(n))
            return found[0], found[1]

        for tol in (1e-2, 1e-3):
            row(f"curvlinops + eigsh, tol {tol:g}", lambda tol=tol: curvlinops(tol))
    except ImportError as e:
        print(f"  curvlinops: not installed ({e})")
    try:
        import hessian_eigenthings as things

        def lanczos(steps: int) -> tuple[np.ndarray, None]:
            op = things.HessianOperator(model, [batch], things.supervised_loss(nn.CrossEntropyLoss()))
            inner = op.matvec

            def product(x: Tensor) -> Tensor:
                counts["hvp"] += 1
                return inner(x)

            op.matvec = product
            return things.lanczos(op, k=K, max_iter=steps, tol=1e-3, reorthogonalize=True).eigenvalues.numpy(), None

        for steps in (32, 36, 40):
            row(f"hessian-eigenthings lanczos, {steps} steps", lambda steps=steps: lanczos(steps))
        row(
            "hessian-eigenthings lanczos, default",
            lambda: (
                things.lanczos(
                    things.HessianOperator(model, [batch], things.supervised_loss(nn.CrossEntropyLoss())), k=K
                ).eigenvalues.numpy(),
                None,
            ),
        )
    except ImportError as e:
        print(f"  hessian-eigenthings: not installed ({e})")
    try:
        import pyhessian

        inner = sys.modules["pyhessian.hessian"]
        product = inner.hessian_vector_product

        def counted(*a: object, **k: object) -> object:
            counts["hvp"] += 1
            return product(*a, **k)

        inner.hessian_vector_product = counted
        row(
            "PyHessian eigenvalues, default",
            lambda: (np.array(pyhessian.hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False).eigenvalues(top_n=K)[0]), None),
        )
    except ImportError as e:
        print(f"  PyHessian: not installed ({e})")


if __name__ == "__main__":
    for which in sys.argv[1:] or ("gpt", "cnn"):
        main(which)
