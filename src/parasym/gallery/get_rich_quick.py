"""Get rich quick: unbalanced starts, exact solutions, and why upstream layers make ReLU networks rich and fast.

Slug get-rich-quick. Minimal model f = a w.x, L = |y - X w a|^2 / 2. Networks f = a.relu(W x), L = mean (f - y)^2 / 2, full-batch gradient
descent, inputs on the unit sphere, doubled start (pairs (w, a), (w, -a), so f = 0) with |w| = scale alpha, |a| = scale / alpha,
a^2 - |w|^2 = delta. Grokking: addition mod p, one-hot pairs, f = (x W)^2 V, mean squared error over entries, full-batch AdamW.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parasym.core.errors import InputError
from parasym.gallery.contract import Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import bars, curves
from parasym.gallery.ensemble import Ensemble, plain
from parasym.solvable.engines import follow
from parasym.solvable.minimal_rich import MinimalRich, NeuronFlow, interpolator, kernel_distance, metric, mirror

SLUG = "get-rich-quick"

# ------------------------------------------------------------------------------------------------ A, B: one neuron


@dataclass(frozen=True)
class NeuronConfig:
    """``cases`` random starts (one of them with a sign change of a): d = 5, rates in [.2, 2], delta in [-12, 9]; time 6.

    Implicit bias: d = 6, n = 3 Gaussian samples, beta0 = .3 N(0, 1), unit rates, integrated until the loss is below 1e-18.
    """

    dim: int = 5
    cases: int = 12
    time: float = 6.0
    charges: tuple[float, ...] = (-2.0, -0.5, 0.0, 0.5, 2.0)
    basins: int = 200
    seeds: tuple[int, ...] = (0, 1, 2)


def neuron(config: NeuronConfig) -> Part:
    """A, B, R1-R7: the exact run of one neuron, its basins, its kernel, and which interpolator it finds."""
    draws = torch.Generator().manual_seed(config.seeds[0])
    errors, drift, turned, moved, algebra = [], [], 0, [], []
    t = torch.linspace(0, config.time, 4, dtype=torch.float64)
    for case in range(config.cases):
        flow = _random_flow(config.dim, case, draws)
        w, a = flow.weights(t)
        exact_w, exact_a = _ode(flow, t)
        errors.append(float(torch.maximum((w - exact_w).abs().max(), (a - exact_a).abs().max())))
        delta = flow.eta_w * exact_a.square() - flow.eta_a * exact_w.square().sum(-1)
        drift.append(float((delta - flow.delta).abs().max()))
        turned += int(a[0].sign() != a[-1].sign())
        moved.append(_slow_distance(flow, exact_w[-1], exact_a[-1]) - float(flow.kernel_distance(t)[-1]))
        beta = a[-1] * w[-1]
        direct = flow.eta_w * a[-1] ** 2 * torch.eye(config.dim, dtype=torch.float64) + flow.eta_a * torch.outer(w[-1], w[-1])
        algebra.append(float((metric(beta, float(flow.delta), flow.eta_a, flow.eta_w) - direct).abs().max()))
    right, stuck = _basins(config)
    upstream = len(config.seeds) * sum(delta >= 0 for delta in config.charges)
    off, wrong, seen, theory = _bias(config)
    checks = (
        match("weights against the ODE, every case", 0.0, errors, 1e-8, source=f"{SLUG} A, R3", spread=errors),
        holds("cases in which a changes sign", turned, at_least=1.0, source=f"{SLUG} A"),
        match("delta along the ODE", 0.0, drift, 1e-8, source=f"{SLUG} R1"),
        match("M = ((kappa + delta) I + (kappa - delta) bb^T) / 2", 0.0, algebra, 1e-10, source=f"{SLUG} R2"),
        match("kernel distance against whole kernels", 0.0, moved, 1e-8, source=f"{SLUG} R6"),
        match("sign of a at the end, share predicted", 1.0, right, 0.0, source=f"{SLUG} R5"),
        match("on the separating surface the run goes to the saddle: |beta| at the end", 0.0, stuck, 1e-3, source=f"{SLUG} R5"),
        match("grad Psi(beta_inf) - grad Psi(beta_0) off the row space of X", 0.0, off, 1e-8, source=f"{SLUG} B, R7", spread=off),
        holds(
            "runs without a sign change of a that were looked at (all those with delta >= 0 are)",
            len(off),
            at_least=upstream,
            source=f"{SLUG} B",
        ),
        match("beta_inf against the minimiser of the potential", theory, seen, 1e-6, source=f"{SLUG} R7"),
        control("the potential of delta = 0 for runs with delta = 2", wrong, at_least=1e-3, source=f"{SLUG} B", spread=wrong),
    )
    return Part(checks, (_regimes(),))


def _random_flow(dim: int, case: int, draws: torch.Generator) -> NeuronFlow:
    uniform = torch.rand(3, generator=draws, dtype=torch.float64)
    eta_a, eta_w = (0.2 + 1.8 * uniform[:2]).tolist()
    target, w = torch.randn(2, dim, generator=draws, dtype=torch.float64)
    delta = -12 + 21 * float(uniform[2]) if case else -9.0
    if delta > 0:
        w = 0.5 * w
    a2 = (delta + eta_a * float(w @ w)) / eta_w
    if a2 < 0:  # the charge fixes |w| from below
        w = w * math.sqrt((0.05 * eta_w - delta) / eta_a) / w.norm()
        a2 = 0.05
    sign = -1.0 if case % 3 == 0 else 1.0
    # case 0: a starts against its predicted end, and delta < 0 lets it cross
    a = torch.tensor(sign * math.sqrt(a2), dtype=torch.float64)
    flow = NeuronFlow(w, a, target, eta_a, eta_w)
    return (
        replace(flow, a=-a) if case == 0 and float(flow.final_sign()) == sign and float(replace(flow, a=-a).final_sign()) == sign else flow
    )


def _ode(flow: NeuronFlow, t: Tensor) -> tuple[Tensor, Tensor]:
    def rhs(_: float, q: dict[str, Tensor]) -> dict[str, Tensor]:
        rho = flow.target - q["a"] * q["w"]
        return {"w": flow.eta_w * q["a"] * rho, "a": flow.eta_a * (q["w"] * rho).sum()}

    found = follow(rhs, {"w": flow.w, "a": flow.a}, t, rtol=1e-12, atol=1e-14)
    return found.theta["w"], found.theta["a"]


def _slow_distance(flow: NeuronFlow, w: Tensor, a: Tensor) -> float:
    """From the kernels themselves, on random orthonormal inputs."""
    d = len(w)
    x = torch.linalg.qr(torch.randn(2 * d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    kernels = []
    for v, b in ((flow.w, flow.a), (w, a)):
        M = flow.eta_w * b**2 * torch.eye(d, dtype=torch.float64) + flow.eta_a * torch.outer(v, v)
        kernels.append(x @ M @ x.mT)
    return 1 - float((kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm()))


def _basins(config: NeuronConfig) -> tuple[float, float]:
    draws = Ensemble(config.seeds)
    w, a = draws.normal(config.basins, config.dim).flatten(0, 1), draws.normal(config.basins).flatten()
    target = draws.normal(config.basins, config.dim).flatten(0, 1)
    flow = NeuronFlow(w, a, target)
    W, A, dt = w.clone(), a.clone(), 0.02

    def push(v: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rho = target - b[:, None] * v
        return b[:, None] * rho, (v * rho).sum(-1)

    for _ in range(2000):  # midpoint rule: a start near the surface is decided by small errors
        half = push(W, A)
        full = push(W + 0.5 * dt * half[0], A + 0.5 * dt * half[1])
        W, A = W + dt * full[0], A + dt * full[1]
    right = float((A.sign() == flow.final_sign()).double().mean())
    # a start moved onto the surface w.beta* = -a (delta + r) / 2 by its component along beta*, at fixed delta
    v, b, aim = w[0], torch.tensor(0.3, dtype=torch.float64), target[0] / target[0].norm()
    v = v - (v @ aim) * aim
    for _ in range(200):
        flow0 = NeuronFlow(v, b, target[0])
        v = v - (v @ aim) * aim - 0.5 * b * (flow0.delta + flow0.gap) / target[0].norm() * aim
    wrong = NeuronFlow(v, b, target[0])
    end_w, end_a = wrong.weights([5.0])
    return right, float((end_a[0] * end_w[0]).norm())


def _bias(config: NeuronConfig) -> tuple[list[float], list[float], list[Tensor], list[Tensor]]:
    off, wrong, seen, theory = [], [], [], []
    for seed in config.seeds:
        for delta in config.charges:
            model = _kept_sign(delta, seed)
            if model is None:
                continue
            full, found = model.full(), model.simulate("implicit_bias").values["beta"]
            if not found.ok:
                continue
            beta = torch.as_tensor(found.value, dtype=torch.float64)
            null = torch.linalg.svd(full["x"], full_matrices=True)[2][model.samples :]
            off.append(float((null @ (mirror(beta, delta) - mirror(full["beta0"], delta))).norm()))
            if delta == 2.0:
                wrong.append(float((null @ (mirror(beta, 0.0) - mirror(full["beta0"], 0.0))).norm()))
            seen.append(beta)
            theory.append(torch.as_tensor(interpolator(full["x"], full["y"], full["beta0"], delta).value))
    return off, wrong, [v for row in seen for v in row], [v for row in theory for v in row]


def _kept_sign(delta: float, seed: int) -> MinimalRich | None:
    """A model of this charge whose interpolator exists; None if its dual has no solution (a would change sign)."""
    model = MinimalRich(6, delta, start=0.7, samples=3, seed=seed)
    try:
        found = model.predict("implicit_bias").values["beta"]
    except InputError:
        return None
    return model if found.ok else None


def _regimes() -> Figure:
    t = torch.linspace(0, 4, 100, dtype=torch.float64)
    target = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    beta0 = torch.tensor([0.1, -0.05, 0.1], dtype=torch.float64)
    series = []
    for delta in (4.0, 1.0, 0.0, -1.0, -4.0):
        kappa = math.sqrt(delta**2 + 4 * float(beta0 @ beta0))
        a = torch.tensor(math.sqrt((kappa + delta) / 2), dtype=torch.float64)
        flow = NeuronFlow(beta0 / a, a, target)
        series.append({"name": f"delta = {delta:g}", "x": plain(t), "y": plain(flow.kernel_distance(t))})
    return Figure("kernel distance of one neuron", {"series": series, "x": "time", "y": "1 - cos"}, curves,
                  "Upstream (delta > 0) lazy, balanced rich at once, downstream rich after a delay.")  # fmt: skip


# ------------------------------------------------------------------------------------------------ C: networks


@dataclass(frozen=True)
class NetConfig:
    """Teacher-student with ``pairs`` doubled units, d = 20, n = 200; ``relu`` or linear units and teacher.

    ``fitted``: share of the null error below which a network has fitted; none for runs too short for that. ReLU: three unit teachers with
    output +-1. Linear: beta* of norm 2. A learning rate of ``rate`` / scale^2 (ReLU) or ``rate``.
    """

    relu: bool = True
    deltas: tuple[float, ...] = (1.0, 0.3, 0.0, -0.3, -1.0)
    dim: int = 20
    samples: int = 200
    pairs: int = 10
    scale: float = 0.4
    lr: float = 0.125
    steps: int = 12_000
    records: int = 60
    test: int = 1000
    fitted: float | None = 0.02
    seeds: tuple[int, ...] = (0, 1, 2)


LINEAR = NetConfig(relu=False, deltas=(1.0, 0.3, 0.03, 0.0, -0.03, -0.3, -1.0), scale=0.1, lr=0.05, steps=6000, records=600)


def doubled_start(config: NetConfig, draws: Ensemble) -> tuple[Tensor, Tensor]:
    """W (deltas, seeds, 2 pairs, d) and a (deltas, seeds, 2 pairs): pairs with opposite a, a^2 - |w|^2 = delta, |a| |w| = scale^2 (R10)."""
    v = draws.normal(config.pairs, config.dim)
    v = v / v.norm(dim=-1, keepdim=True)
    sign = draws.normal(config.pairs).sign()
    W, a = [], []
    for delta in config.deltas:
        ratio = delta / config.scale**2
        alpha = math.sqrt((math.sqrt(4 + ratio**2) - ratio) / 2) if ratio <= 0 else math.sqrt(2 / (math.sqrt(4 + ratio**2) + ratio))
        W.append(config.scale * alpha * torch.cat([v, v], 1))
        a.append(config.scale / alpha * torch.cat([sign, -sign], 1))
    return torch.stack(W), torch.stack(a)


@dataclass(frozen=True)
class Trained:
    """(deltas, seeds) each: losses at the end, Hamming distance of patterns, kernel distance, charge drift; and curves (records, ...)."""

    train: Tensor
    test: Tensor
    null: Tensor
    hamming: Tensor
    kernel: Tensor
    drift: Tensor
    steps: Tensor
    losses: Tensor
    hammings: Tensor


def train(config: NetConfig) -> Trained:
    """All charges and seeds at once, in float64."""
    draws = Ensemble(config.seeds)
    sphere = lambda v: v / v.norm(dim=-1, keepdim=True)  # noqa: E731
    x, x_test = sphere(draws.normal(config.samples, config.dim)), sphere(draws.normal(config.test, config.dim))
    teacher, sign, beta = sphere(draws.normal(3, config.dim)), draws.normal(3).sign(), 2 * sphere(draws.normal(config.dim))

    def target(z: Tensor) -> Tensor:
        return (torch.relu(z @ teacher.mT) * sign[:, None]).sum(-1) if config.relu else (z * beta[:, None]).sum(-1)

    y, y_test = target(x), target(x_test)
    W, a = doubled_start(config, draws)
    W0, a0, every = W.clone(), a.clone(), config.steps // config.records
    losses, hammings = [], []
    gram = x.mT @ x / config.samples
    for step in range(config.steps + 1):
        if step % every == 0:
            pre = x @ W.mT
            r = ((torch.relu(pre) if config.relu else pre) @ a[..., None])[..., 0] - y
            losses.append(r.square().mean(-1))
            hammings.append(((pre > 0) != (x @ W0.mT > 0)).double().mean((-1, -2)))
        if config.relu:
            pre = x @ W.mT
            on = (pre >= 0).to(W)
            r = (((pre * on) @ a[..., None])[..., 0] - y) / config.samples
            grad_a = ((pre * on) * r[..., None]).sum(-2)
            grad_W = ((on * r[..., None]).mT @ x) * a[..., None]
        else:
            g = (gram @ ((W.mT @ a[..., None])[..., 0] - beta)[..., None])[..., 0]
            grad_a, grad_W = (W @ g[..., None])[..., 0], a[..., None] * g[..., None, :]
        W, a = W - config.lr * grad_W, a - config.lr * grad_a
    pre = x_test @ W.mT
    test = (((torch.relu(pre) if config.relu else pre) @ a[..., None])[..., 0] - y_test).square().mean(-1)
    drift = ((a.square() - W.square().sum(-1)) - (a0.square() - W0.square().sum(-1))).abs().amax(-1)
    steps = torch.arange(0, config.steps + 1, every).double()
    first, last = _kernel(x, W0, a0, config.relu), _kernel(x, W, a, config.relu)
    moved = 1 - (first * last).sum((-1, -2)) / (first.square().sum((-1, -2)) * last.square().sum((-1, -2))).sqrt()
    null = y.square().mean(-1)
    return Trained(losses[-1], test, null, hammings[-1], moved, drift, steps, torch.stack(losses), torch.stack(hammings))


def _kernel(x: Tensor, W: Tensor, a: Tensor, relu: bool) -> Tensor:
    """Tangent kernel (..., n, n) (R11)."""
    pre = x @ W.mT
    on = (pre >= 0).to(W) if relu else torch.ones_like(pre)
    h, gate = pre * on, on * a[..., None, :]
    return h @ h.mT + (x @ x.mT) * (gate @ gate.mT)


def networks(config: NetConfig) -> Part:
    """C, R9-R11: with ReLU, the more upstream the start, the more the activation patterns turn, and the better it generalises."""
    found = train(config)
    hamming, test = found.hamming.mean(1), found.test.mean(1)
    falls = found.hamming[:-1] - found.hamming[1:]
    fitted = () if config.fitted is None else (
        holds("every network has fitted: training over null error", found.train / found.null, at_most=config.fitted, source=f"{SLUG} C"),
    )  # fmt: skip
    checks = (
        holds("Hamming distance of the patterns falls from each delta to the next, every seed", falls, at_least=1e-6, source=f"{SLUG} C",
              spread=falls.amin(0)),
        holds("test error, delta = -1 over delta = 1, every seed", found.test[-1] / found.test[0], at_least=1.0, source=f"{SLUG} C",
              spread=found.test[0]),
        *fitted,
        holds("drift of delta (order of the learning rate)", found.drift, at_most=5e-3, source=f"{SLUG} C, R9"),
        holds("delta = 1 moves the ReLU kernel", found.kernel[0], at_least=0.05, source=f"{SLUG} C", spread=found.kernel[0]),
    )  # fmt: skip
    names = [f"{d:g}" for d in config.deltas]
    rows = [{"name": "Hamming", "y": plain(hamming)}, {"name": "kernel distance", "y": plain(found.kernel.mean(1))},
            {"name": "test error x 10", "y": plain(10 * test)}]  # fmt: skip
    series = [
        {"name": f"delta = {d:g}", "x": plain(found.steps), "y": plain(found.hammings[:, i].mean(1))} for i, d in enumerate(config.deltas)
    ]
    return Part(checks, (
        Figure("ReLU networks by charge", {"labels": names, "series": rows, "x": "delta", "y": ""}, bars),
        Figure("activation patterns turn", {"series": series, "x": "step", "y": "Hamming distance"}, curves),
    ))  # fmt: skip


def linear(config: NetConfig) -> Part:
    """The control of C: in a linear network the upstream start is lazy, the balanced one rich, the downstream one delayed."""
    found = train(config)
    share = found.losses / found.losses[0]
    done = torch.where(share < 0.01, found.steps[:, None, None], math.inf).amin(0)
    kernel = found.kernel.mean(1)
    index = {d: i for i, d in enumerate(config.deltas)}
    rise = [found.kernel[index[b]] - found.kernel[index[a]] for a, b in ((1.0, 0.3), (0.3, 0.03), (0.03, 0.0), (0.0, -0.03), (-0.03, -0.3))]
    single = _single_neuron()
    checks = (
        control("linear: delta = 1 is lazy: kernel distance", found.kernel[0], at_most=1e-3, source=f"{SLUG} C, linear control",
                spread=found.kernel[0]),
        holds("linear: kernel distance rises from delta = 1 to -.3, every seed", torch.stack(rise), at_least=0.0,
              source=f"{SLUG} C, linear control"),
        holds("linear: steps to 1 % of the loss rise from delta = 1 to -1, every seed", done[1:] - done[:-1], at_least=0.0,
              source=f"{SLUG} C, linear control"),
        control("a single upstream neuron (X^T X = I) is less lazy: kernel distance at delta = 1", single, at_least=1e-3,
                source=f"{SLUG} C, linear control"),
    )  # fmt: skip
    rows = [{"name": "kernel distance", "y": plain(kernel)}]
    labels = [f"{d:g}" for d in config.deltas]
    return Part(
        checks, (Figure("linear networks by charge", {"labels": labels, "series": rows, "x": "delta", "y": "kernel distance"}, bars),)
    )


def _single_neuron(dim: int = 20) -> float:
    target = torch.zeros(dim, dtype=torch.float64)
    target[0] = 2.0
    beta0 = 0.01 * torch.ones(dim, dtype=torch.float64) / dim**0.5
    a = torch.tensor(math.sqrt((math.sqrt(1 + 4 * float(beta0 @ beta0)) + 1) / 2), dtype=torch.float64)
    w, last = NeuronFlow(beta0 / a, a, target).weights([50.0])
    return float(kernel_distance(beta0 / a, a, w[0], last[0]))


# ------------------------------------------------------------------------------------------------ D: grokking


@dataclass(frozen=True)
class GrokConfig:
    """Addition mod ``p``, 75 % of the pairs, f = (x W)^2 V with h = 96, W = N(0,1) / alpha, V = N(0,1) alpha^power / h.

    ``nets``: (alpha, power, weight decay); power 1 also divides f_0 by alpha, power 2 keeps the function.
    """

    p: int = 17
    hidden: int = 96
    nets: tuple[tuple[float, int, float], ...] = ((3.0, 1, 0.1), (1.0, 1, 0.1), (3.0, 1, 0.0), (0.3, 1, 0.1), (3.0, 2, 0.1))
    lr: float = 5e-3
    steps: int = 6000
    every: int = 25
    seeds: tuple[int, ...] = (0, 1, 2)


def grok(config: GrokConfig) -> tuple[Tensor, Tensor]:
    """Train and test accuracy (records, nets, seeds)."""
    draws, p, count = Ensemble(config.seeds), config.p, len(config.nets)
    pairs = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    order = draws.permutation(p * p)
    inputs = torch.cat([torch.nn.functional.one_hot(pairs[:, 0], p), torch.nn.functional.one_hot(pairs[:, 1], p)], 1).float()
    labels = (pairs[:, 0] + pairs[:, 1]) % p
    cut = round(0.75 * p * p)
    x, y = inputs[order].repeat(count, 1, 1), labels[order].repeat(count, 1)
    aim = torch.nn.functional.one_hot(y[:, :cut], p).float()
    W0, V0 = draws.normal(2 * p, config.hidden, dtype=torch.float32), draws.normal(config.hidden, p, dtype=torch.float32) / config.hidden
    W = torch.cat([W0 / alpha for alpha, _, _ in config.nets])
    V = torch.cat([V0 * alpha**power for alpha, power, _ in config.nets])
    decay = torch.tensor([d for _, _, d in config.nets]).repeat_interleave(len(config.seeds))[:, None, None]
    weights, moments = [W, V], [[torch.zeros_like(w), torch.zeros_like(w)] for w in (W, V)]
    seen: list[Tensor] = []
    for step in range(1, config.steps + 1):
        W, V = weights
        pre = x[:, :cut] @ W
        square = pre * pre
        r = (square @ V - aim) * (2 / (cut * p))
        grads = (x[:, :cut].mT @ ((r @ V.mT) * (2 * pre)), square.mT @ r)
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):  # AdamW, a decay for each network
            m, v = moments[i]
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.001)
            ratio = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            weights[i] = w * (1 - config.lr * decay) - config.lr * ratio
        if step % config.every == 0:
            right = ((x @ weights[0]).square() @ weights[1]).argmax(-1) == y
            seen.append(torch.stack([right[:, :cut].double().mean(1), right[:, cut:].double().mean(1)]).reshape(2, count, -1))
    curves_ = torch.stack(seen)
    return curves_[:, 0], curves_[:, 1]


def grokking(config: GrokConfig) -> Part:
    """D: the more upstream the start, the sooner it generalises; without weight decay it does not."""
    train_accuracy, test = grok(config)
    steps = config.every * torch.arange(1, len(test) + 1).double()
    first = lambda curve, level: torch.where(curve >= level, steps[:, None], math.inf).amin(0)  # noqa: E731
    index = {net: i for i, net in enumerate(config.nets)}
    up, even, bare = (index.get(net) for net in ((3.0, 1, 0.1), (1.0, 1, 0.1), (3.0, 1, 0.0)))
    assert up is not None and even is not None and bare is not None
    fast, slow = first(test[:, up], 0.95), first(test[:, even], 0.95)
    capped = fast.clamp_max(2 * config.steps), slow.clamp_max(2 * config.steps)
    checks = [
        holds("median steps to 95 % test accuracy: .75 t(alpha = 1) - t(alpha = 3)", 0.75 * capped[1].median() - capped[0].median(),
              at_least=1.0, source=f"{SLUG} D", spread=capped[0]),
        holds("median t(alpha = 1)", capped[1].median(), at_most=float(config.steps), source=f"{SLUG} D", spread=capped[1]),
        holds("the training set is learned before: t_train(99 %) / t_test, alpha = 1", first(train_accuracy[:, even], 0.99) / capped[1],
              at_most=0.2, source=f"{SLUG} D"),
        control("no weight decay: test accuracy at the end", test[-1, bare], at_most=0.5, source=f"{SLUG} D", spread=test[-1, bare]),
    ]  # fmt: skip
    if (same := index.get((3.0, 2, 0.1))) is not None:
        kept = first(test[:, same], 0.95).clamp_max(2 * config.steps)
        checks += [
            holds("same function at the start: t(alpha = 3) / t(alpha = 1), median of the seeds (not of each: see the spread)",
                  (kept / capped[1]).median(), at_most=1.0, source=f"{SLUG} D", spread=kept / capped[1]),
            holds("most of the speed-up comes from the smaller function: steps that keeping it costs at alpha = 3, every seed",
                  kept - capped[0], at_least=1.0, source=f"{SLUG} D", spread=kept),
        ]  # fmt: skip
    if (down := index.get((0.3, 1, 0.1))) is not None:
        late = first(test[:, down], 0.95).clamp_max(2 * config.steps)
        checks.append(holds("downstream (alpha = .3): steps later than alpha = 1, median of the seeds (not of each: see the spread)",
                            (late - capped[1]).median(), at_least=1.0, source=f"{SLUG} D", spread=late - capped[1]))  # fmt: skip
    series = []
    for i, (alpha, power, decay) in enumerate(config.nets):
        name = f"alpha = {alpha:g}" + (", same function" if power == 2 else "") + (", no decay" if decay == 0 else "")
        series.append(
            {
                "name": name,
                "x": plain(steps),
                "y": plain(test[:, i].mean(1)),
                "low": plain(test[:, i].amin(1)),
                "high": plain(test[:, i].amax(1)),
            }
        )
    data = {"series": series, "x": "step", "y": "test accuracy", "log": "x"}
    return Part(tuple(checks), (Figure("grokking against imbalance", data, curves,
                                       "Mean and range of the seeds; alpha > 1 is upstream."),))  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    neuron: NeuronConfig | None = NeuronConfig()
    networks: NetConfig | None = NetConfig()
    linear: NetConfig | None = LINEAR
    grokking: GrokConfig | None = GrokConfig()


ENTRY = Entry(
    slug=SLUG,
    title="Get rich quick: exact solutions reveal how unbalanced initializations promote rapid feature learning",
    paper="D. Kunin, A. Raventos, C. Domine, F. Chen, D. Klindt, A. Saxe, S. Ganguli, NeurIPS 2024, arXiv 2406.06158",
    claims=(
        "One neuron is solved exactly for any signs, rates and charge: its run, its basins, its kernel, the interpolator it finds.",
        "In linear networks an upstream start is lazy; with ReLU it turns activation patterns early, and generalises better.",
        "Upstream starts grok sooner.",
    ),
    presets={
        "smoke": Config(
            neuron=NeuronConfig(cases=8, charges=(0.0, 2.0)),
            networks=NetConfig(deltas=(1.0, 0.0, -1.0), steps=4000, records=20, test=500, fitted=None),
            linear=replace(LINEAR, steps=4000, records=400),
            grokking=None,
        ),
        "default": Config(),
        "full": Config(
            networks=NetConfig(seeds=tuple(range(8))),
            linear=replace(LINEAR, seeds=tuple(range(8))),
            grokking=GrokConfig(steps=12_000),
        ),
    },
    experiments={"neuron": neuron, "networks": networks, "linear": linear, "grokking": grokking},
)
