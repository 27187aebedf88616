"""Neural Mechanics: symmetry and broken conservation laws in deep learning dynamics.

Slug neural-mechanics. Translation, scale and rescale symmetries constrain gradient and Hessian on any data, so some combinations of
the weights are conserved by gradient flow. Weight decay, momentum, batches and the finite step break them in a way that is
known exactly: a damped, driven oscillator in continuous time, a recursion in discrete time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from parasym.core.errors import MissingExtraError
from parasym.gallery.contract import Check, Entry, Figure, Part, control, holds, match
from parasym.gallery.drawings import curves
from parasym.gallery.ensemble import slope
from parasym.laws.charges import Charge, charges, rescale, scale, translation
from parasym.laws.flow import ModifiedFlow, modified_flow
from parasym.laws.ledger import Account, Ledger
from parasym.measure.gradients import Objective
from parasym.measure.identities import hvp

SLUG = "neural-mechanics"
NO_EPS = 1e-30  # the smallest eps torch's batch norm takes; 0 for all purposes


# ------------------------------------------------------------------------------------------------ nets and data


@dataclass(frozen=True)
class DataConfig:
    """``kind``: "clusters" (classes of N(m_c, spread^2) around m_c ~ U(0, height)) or "digits" (scikit-learn's, over 16)."""

    kind: str = "clusters"
    samples: int = 1024
    dim: int = 64
    classes: int = 10
    height: float = 0.6
    spread: float = 0.25


def draw_data(config: DataConfig, seed: int) -> tuple[Tensor, Tensor]:
    """X (n, dim) float64 and labels (n,).

    Raises:
        MissingExtraError: the digits need scikit-learn.
    """
    if config.kind == "digits":
        try:
            from sklearn.datasets import load_digits  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise MissingExtraError("the digits come with scikit-learn: pip install scikit-learn, or run with kind='clusters'") from error
        digits = load_digits()
        return torch.tensor(digits.data / 16, dtype=torch.float64), torch.tensor(digits.target)
    g = torch.Generator().manual_seed(1000 + seed)
    centres = config.height * torch.rand(config.classes, config.dim, generator=g, dtype=torch.float64)
    y = torch.randint(config.classes, (config.samples,), generator=g)
    return centres[y] + config.spread * torch.randn(config.samples, config.dim, generator=g, dtype=torch.float64), y


def net(kind: str, sizes: tuple[int, int, int], seed: int, eps: float = NO_EPS) -> tuple[nn.Module, dict[str, Charge]]:
    """A net with one hidden layer ("relu", "tanh", "gelu", or "bn": batch norm and ReLU) and its would-be charges."""
    d, h, c = sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        act: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
        if kind == "bn":
            model = nn.Sequential(nn.Linear(d, h), nn.BatchNorm1d(h, eps=eps), nn.ReLU(), nn.Linear(h, c)).double()
        else:
            model = nn.Sequential(nn.Linear(d, h), act[kind](), nn.Linear(h, c)).double()
    P = dict(model.named_parameters())
    if kind == "bn":
        first = scale(P, ["0.weight", "0.bias"], "scale of a unit before batch norm")
        return model, {"quadratic": first, "translation": translation(P, ["3.weight", "3.bias"])}
    first = rescale(P, ["0.weight", "0.bias"], ["2.weight"])
    return model, {"quadratic": first, "translation": translation(P, ["2.weight", "2.bias"])}


def cross_entropy(out: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(out, y)


def squared_error(out: Tensor, y: Tensor) -> Tensor:
    """Mean over samples of |out - onehot|^2: no softmax, so no translation symmetry."""
    return (out - nn.functional.one_hot(y, out.shape[1])).square().sum(-1).mean()


# ------------------------------------------------------------------------------------------------ A1, A3: curves


@dataclass(frozen=True)
class Rule:
    """Constants of torch's SGD."""

    lr: float
    decay: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False


RULES = (Rule(0.1, 0.0), Rule(0.1, 5e-3), Rule(0.05, 1e-3, 0.9), Rule(0.02, 5e-3, 0.9), Rule(0.05, 1e-3, 0.9, 0.5))


@dataclass(frozen=True)
class CurveConfig:
    """``net``-s of sizes 64-32-10 under torch's SGD, default initialisation, batches drawn with replacement, float64, cross-entropy."""

    data: DataConfig = DataConfig()
    sizes: tuple[int, int, int] = (64, 32, 10)
    nets: tuple[str, ...] = ("relu", "bn")
    rules: tuple[Rule, ...] = RULES
    nesterov: Rule = Rule(0.05, 1e-2, 0.9, 0.0, True)
    steps: int = 400
    batch: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)


def run(config: CurveConfig, kind: str, rule: Rule, seed: int, scheduled: bool = False) -> dict[str, Account]:
    """Train and keep the ledger of each charge."""
    X, y = draw_data(config.data, seed)
    model, found = net(kind, config.sizes, seed)
    optimizer = torch.optim.SGD(
        model.parameters(), rule.lr, momentum=rule.momentum, dampening=rule.dampening, weight_decay=rule.decay, nesterov=rule.nesterov
    )
    g = torch.Generator().manual_seed(seed)
    with Ledger(optimizer, list(found.values()), model) as ledger:
        for k in range(config.steps):
            if scheduled:
                for group in optimizer.param_groups:
                    group["lr"] = rule.lr * (0.5 + 0.5 * (1 - k / config.steps))
            index = torch.randint(len(X), (config.batch,), generator=g)
            optimizer.zero_grad()
            cross_entropy(model(X[index]), y[index]).backward()
            optimizer.step()
    return dict(zip(found, ledger.accounts(), strict=True))


def relative_error(predicted: Tensor, measured: Tensor) -> Tensor:
    """Largest over time of max |predicted - measured| / max |Q| at that time."""
    return ((predicted - measured).abs().amax(1) / measured.abs().amax(1)).max()


def curve(config: CurveConfig) -> Part:
    """A1, A3, R7-R9, R11: the closed form and the exact ledger against training, and the two known ways to get them wrong."""
    checks: list[Check] = []
    figures: list[Figure] = []
    for rule in config.rules:
        for kind in config.nets:
            accounts = [run(config, kind, rule, seed) for seed in config.seeds]
            checks += _curve_checks(config, rule, kind, accounts)
            if rule.momentum and kind == "relu" and not figures:
                figures.append(_curve_figure(rule, accounts[0]["quadratic"]))
    for kind in config.nets:
        accounts = [run(config, kind, config.nesterov, seed, scheduled=True) for seed in config.seeds]
        worst = torch.tensor([max(a.residual for a in each.values()) for each in accounts])
        claim = f"{kind}, Nesterov with a falling learning rate: largest |ledger - charge|"
        checks.append(match(claim, 0.0, worst, 1e-12, source=f"{SLUG} R9, A3", spread=worst))
    return Part(tuple(checks), tuple(figures))


def _curve_checks(config: CurveConfig, rule: Rule, kind: str, accounts: Sequence[dict[str, Account]]) -> list[Check]:
    where = f"{kind}, eta {rule.lr}, decay {rule.decay}, momentum {rule.momentum}" + (
        f", dampening {rule.dampening}" if rule.dampening else ""
    )
    ledger = torch.tensor([max(a.residual for a in each.values()) for each in accounts])
    changed = torch.stack([_change(each["quadratic"].measured) for each in accounts])
    forms = {key: torch.stack([_closed(rule, each[key], rule.dampening) for each in accounts]) for key in ("quadratic", "translation")}
    tolerance = 1e-12 if not rule.decay else 1e-2 if rule.dampening else 2e-2 if rule.momentum else 1.5e-3
    checks = [
        match(f"{where}: largest |ledger - charge|", 0.0, ledger, 1e-12, source=f"{SLUG} R9, A3", spread=ledger),
        match(f"{where}: closed form of the {'scale' if kind == 'bn' else 'rescale'} charge, largest relative error", 0.0,
              forms["quadratic"], tolerance, source=f"{SLUG} R7, A1", spread=forms["quadratic"]),
        match(f"{where}: closed form of the translation charge, largest relative error", 0.0, forms["translation"],
              1e-12 if not rule.decay else 1e-3, source=f"{SLUG} R7, A1", spread=forms["translation"]),
        holds(f"{where}: the charge moved (relative change), so there was something to predict", changed, at_least=1e-2,
            source=f"{SLUG} A1"),
    ]  # fmt: skip
    if rule.dampening:
        unscaled = torch.stack([_closed(rule, each["quadratic"], 0.0) for each in accounts])
        claim = f"{where}: relative error with the source left unscaled, as in the official code"
        checks.append(control(claim, unscaled, at_least=1e-1, source=f"{SLUG} R8, A1", spread=unscaled))
    return checks


def _closed(rule: Rule, account: Account, dampening: float) -> Tensor:
    if dampening == rule.dampening:
        return relative_error(modified_flow(account, rule.lr, rule.momentum, rule.dampening, rule.decay), account.measured)
    flow = ModifiedFlow(rule.lr, rule.momentum, rule.dampening, rule.decay, account.charge.kind == "linear")
    source = account.source[1:] / rule.lr**2 * (1 - rule.dampening) ** 2  # undo the scaling that predict applies
    return relative_error(flow.predict(account.measured[0], source), account.measured)


def _change(measured: Tensor) -> Tensor:
    return ((measured[-1] - measured[0]).abs() / measured[0].abs().clamp_min(1e-3)).max()


def _curve_figure(rule: Rule, account: Account) -> Figure:
    predicted = modified_flow(account, rule.lr, rule.momentum, rule.dampening, rule.decay)
    every = max(1, len(account.steps) // 200)
    x = account.steps[::every].tolist()
    series = []
    for j in range(min(4, account.measured.shape[1])):
        series.append({"name": f"unit {j}", "x": x, "y": account.measured[::every, j].tolist(), "colour": j})
        series.append({"name": f"unit {j}, theory", "x": x, "y": predicted[::every, j].tolist(), "mark": "dash", "colour": j})
    title = f"rescale charges: eta {rule.lr}, decay {rule.decay}, momentum {rule.momentum}"
    return Figure(title, {"series": series, "x": "step", "y": "charge"}, curves, "Closed form (dashed) over training.")


# ------------------------------------------------------------------------------------------------ A2, A4: geometry


@dataclass(frozen=True)
class GeometryConfig:
    """Residuals of the gradient and Hessian identities at initialisation, 64-16-10, one batch of ``batch`` samples, float64."""

    data: DataConfig = DataConfig()
    sizes: tuple[int, int, int] = (64, 16, 10)
    batch: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)


def residuals(
    kind: str, key: str, config: GeometryConfig, seed: int, eps: float = NO_EPS, loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
) -> tuple[Tensor, Tensor]:
    """(|<A theta, g>| / |A theta| |g|, |H A theta + A g| / |A g|), the largest over units; for a translation a in the place of A theta,
    0 of A g."""
    X, y = draw_data(config.data, seed)
    batch = X[: config.batch], y[: config.batch]
    model, found = net(kind, config.sizes, seed, eps)
    objective, charge = Objective(model, loss), found[key]
    theta = objective.params

    def function(params: Mapping[str, Tensor]) -> Tensor:
        return objective(params, batch)

    g = torch.func.grad(function)(dict(theta))
    first, second = [], []
    for j in range(charge.count):
        lam = torch.zeros(charge.count, dtype=torch.float64).index_fill(0, torch.tensor([j]), 1.0)
        tangent = _tangent(charge, theta, lam)
        size = _norm(tangent) * _norm({n: g[n] for n in tangent})
        first.append(_dot(tangent, g).abs() / size.clamp_min(1e-300))
        curved = hvp(function, theta, tangent)
        turned = _tangent(charge, g, lam) if charge.kind != "linear" else {}
        gap = {n: curved[n] + turned.get(n, torch.zeros_like(curved[n])) for n in curved}
        second.append(torch.stack([_norm(gap), _norm(turned) if turned else _norm(tangent)]))
    rows = torch.stack(second)
    return torch.stack(first).max(), rows[:, 0].max() / rows[:, 1].max().clamp_min(1e-300)


def _tangent(charge: Charge, at: Mapping[str, Tensor], lam: Tensor) -> dict[str, Tensor]:
    """A theta (or the translation) of one unit: the derivative of the group action."""
    names = {n: at[n] for n in charge.parameters}
    if charge.kind == "linear":
        zero = {n: torch.zeros_like(p) for n, p in names.items()}
        return charge.act(zero, lam)
    return charge.multiply(names, lambda weight: weight * lam)


def _norm(x: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([v.square().sum() for v in x.values()]).sum().sqrt()


def _dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([(v * y[n]).sum() for n, v in x.items()]).sum()


def geometry(config: GeometryConfig) -> Part:
    """A2, A4, R1, R2: the identities hold at round-off where the symmetry is exact, and are visibly broken where it is not."""
    table = {
        (name, i): torch.stack([residuals(kind, key, config, seed, eps)[i] for seed in config.seeds])
        for name, kind, key, eps in (
            ("ReLU rescale", "relu", "quadratic", NO_EPS),
            ("scale before batch norm", "bn", "quadratic", NO_EPS),
            ("logit translation under cross-entropy", "relu", "translation", NO_EPS),
            ("tanh rescale", "tanh", "quadratic", NO_EPS),
            ("GELU rescale", "gelu", "quadratic", NO_EPS),
            ("batch norm with eps 1e-5", "bn", "quadratic", 1e-5),
            ("batch norm with eps 0.1", "bn", "quadratic", 0.1),
        )
        for i in (0, 1)
    }
    wrong = torch.stack([residuals("relu", "translation", config, seed, loss=squared_error)[0] for seed in config.seeds])
    checks: list[Check] = []
    for name in ("ReLU rescale", "scale before batch norm", "logit translation under cross-entropy"):
        one, two = table[name, 0], table[name, 1]
        checks.append(match(f"{name}: <A theta, g> relative to |A theta| |g|", 0.0, one, 1e-14, source=f"{SLUG} R1, A2", spread=one))
        checks.append(match(f"{name}: H A theta + A g relative to |A g|", 0.0, two, 1e-10, source=f"{SLUG} R2, A2", spread=two))
    for name in ("tanh rescale", "GELU rescale", "batch norm with eps 0.1"):
        checks.append(control(f"{name}: gradient residual, above the limit of an approximate symmetry", table[name, 0], at_least=1e-4,
                              source=f"{SLUG} A4", spread=table[name, 0]))  # fmt: skip
        checks.append(control(f"{name}: Hessian residual", table[name, 1], at_least=1e-2, source=f"{SLUG} A4", spread=table[name, 1]))
    small = table["batch norm with eps 1e-5", 0]
    checks.append(control("batch norm with eps 1e-5: residual beyond round-off", small, at_least=1e-12, source=f"{SLUG} A4", spread=small))
    checks.append(holds("batch norm with eps 1e-5: residual of an approximate symmetry", small, at_most=1e-4, source=f"{SLUG} A4"))
    checks.append(
        control("logit translation under squared error: gradient residual", wrong, at_least=1e-4, source=f"{SLUG} A4", spread=wrong)
    )
    return Part(tuple(checks))


# ------------------------------------------------------------------------------------------------ R3, R4: gradient flow


@dataclass(frozen=True)
class FlowConfig:
    """Gradient flow on L + decay |theta|^2 / 2 by the classical fourth-order Runge-Kutta rule with step h up to time ``time``."""

    data: DataConfig = DataConfig(samples=128, dim=16, classes=5)
    sizes: tuple[int, int, int] = (16, 12, 5)
    time: float = 1.0
    h: float = 0.005
    decays: tuple[float, ...] = (0.0, 0.1)
    seeds: tuple[int, ...] = (0, 1, 2)


def flow(config: FlowConfig) -> Part:
    """R3, R4: charges are conserved by gradient flow and fall as e^{-2 decay t} (e^{-decay t} for translations) under decay."""
    checks: list[Check] = []
    for kind in ("relu", "bn"):
        for decay in config.decays:
            ends = [_integrate(config, kind, decay, seed) for seed in config.seeds]
            for key, rate in (("quadratic", 2.0), ("translation", 1.0)):
                start, end = (torch.stack([e[key][i] for e in ends]) for i in (0, 1))
                factor = torch.exp(torch.tensor(-rate * decay * config.time, dtype=torch.float64))
                gap = (end - factor * start).abs().amax(1) / start.abs().amax(1)
                claim = f"{kind}, gradient flow with decay {decay}: {key} charge against e^(-{rate:g} decay t), relative"
                checks.append(match(claim, 0.0, gap, 1e-6, source=f"{SLUG} R3, R4", spread=gap))
    tanh = torch.stack([(lambda e: (e[1] - e[0]).abs().max() / e[0].abs().max())(_integrate(config, "tanh", 0.0, s)["quadratic"])
                        for s in config.seeds])  # fmt: skip
    checks.append(
        control("tanh, gradient flow: relative change of the would-be charge", tanh, at_least=1e-4, source=f"{SLUG} R3", spread=tanh)
    )
    return Part(tuple(checks))


def _integrate(config: FlowConfig, kind: str, decay: float, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    batch = draw_data(config.data, seed)
    model, found = net(kind, config.sizes, seed)
    objective = Objective(model, cross_entropy)
    slope_of = torch.func.grad(lambda p: objective(p, batch))
    theta = {n: p.clone() for n, p in objective.params.items()}
    start = {k: c(theta) for k, c in found.items()}

    def push(at: Mapping[str, Tensor], by: float, along: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: p + by * along[n] for n, p in at.items()}

    def speed(at: Mapping[str, Tensor]) -> dict[str, Tensor]:
        g = slope_of(dict(at))
        return {n: -g[n] - decay * p for n, p in at.items()}

    for _ in range(round(config.time / config.h)):
        k1 = speed(theta)
        k2 = speed(push(theta, config.h / 2, k1))
        k3 = speed(push(theta, config.h / 2, k2))
        k4 = speed(push(theta, config.h, k3))
        theta = {n: p + config.h / 6 * (k1[n] + 2 * k2[n] + 2 * k3[n] + k4[n]) for n, p in theta.items()}
    return {k: (start[k], c(theta)) for k, c in found.items()}


# ------------------------------------------------------------------------------------------------ R5, R6: modified equation


@dataclass(frozen=True)
class QuadraticConfig:
    """Descent on (4 x^2 + y^2) / 2 from (1, 1): the flow on L + eta |grad L|^2 / 4 is a better picture than the flow on L."""

    curvatures: tuple[float, ...] = (4.0, 1.0)
    rates: tuple[float, ...] = (0.1, 0.025, 0.0125, 0.00625, 0.003125)
    time: float = 1.0


def quadratic(config: QuadraticConfig) -> Part:
    """R5: orders of the error of the plain and of the modified flow."""
    h = torch.tensor(config.curvatures, dtype=torch.float64)
    plain_error, better = [], []
    for eta in config.rates:
        k = round(config.time / eta)
        end = (1 - eta * h) ** k
        plain_error.append((torch.exp(-h * eta * k) - end).norm())
        better.append((torch.exp(-(h + eta * h**2 / 2) * eta * k) - end).norm())
    x = torch.tensor(config.rates[1:], dtype=torch.float64).log()  # the first rate is the paper's, too large for the asymptotic order
    orders = [slope(x, torch.stack(e[1:]).log()) for e in (plain_error, better)]
    return Part(
        (
            match("order of the gradient flow's error in eta", 1.0, orders[0], 0.15, source=f"{SLUG} R5"),
            match("order of the modified flow's error in eta", 2.0, orders[1], 0.15, source=f"{SLUG} R5"),
            holds(
                "eta 0.1: error of the modified flow over that of the plain one",
                better[0] / plain_error[0],
                at_most=0.5,
                source=f"{SLUG} R5",
            ),
        )
    )


# ------------------------------------------------------------------------------------------------ A4: adaptive control


@dataclass(frozen=True)
class AdaptiveConfig:
    """Adam on the ReLU net: the change of the charge that the exact law of SGD leaves out (its cross term), relative to the whole
    change."""

    data: DataConfig = DataConfig()
    sizes: tuple[int, int, int] = (64, 32, 10)
    lr: float = 1e-3
    steps: int = 200
    batch: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)


def adaptive(config: AdaptiveConfig) -> Part:
    """A4: without the measured cross term no ledger closes under Adam; with it the bookkeeping is exact."""
    shares, closed = [], []
    for seed in config.seeds:
        X, y = draw_data(config.data, seed)
        model, found = net("relu", config.sizes, seed)
        optimizer = torch.optim.Adam(model.parameters(), config.lr)
        g = torch.Generator().manual_seed(seed)
        with Ledger(optimizer, [found["quadratic"]], model) as ledger:
            for _ in range(config.steps):
                index = torch.randint(len(X), (config.batch,), generator=g)
                optimizer.zero_grad()
                cross_entropy(model(X[index]), y[index]).backward()
                optimizer.step()
        (account,) = ledger.accounts()
        shares.append(account.cross.sum(0).norm() / (account.measured[-1] - account.measured[0]).norm())
        closed.append(account.residual)
    return Part(
        (
            control("Adam: cross term -2 eta <A theta, u> over the change of the charge", torch.stack(shares), at_least=0.1,
                    source=f"{SLUG} A4", spread=torch.stack(shares)),
            match("Adam: the ledger with its cross term measured", 0.0, closed, 1e-12, source=f"{SLUG} A4", spread=closed),
        )
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ R10: which sets


@dataclass(frozen=True)
class SetsConfig:
    """Two blocks of convolution, ReLU and max pooling, then a linear classifier, on 8 x 8 images; with batch norm before each ReLU and
    without. The charges are those that the library finds on the net; the sets of the paper's code are written down by hand.

    The closed form is farther off here than on the dense nets of A1: the filters before a batch norm are small and grow by more. With this
    rule at eta .05, .025, .0125 over equal times its largest error there is .027, .013, .007: of first order in eta.
    """

    data: DataConfig = DataConfig(samples=256)
    channels: tuple[int, int] = (4, 5)
    rule: Rule = Rule(0.025, 1e-3, 0.9)
    steps: int = 200
    batch: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)


def convnet(config: SetsConfig, normed: bool, seed: int) -> nn.Sequential:
    """The net of `SetsConfig`, float64, torch's own start."""
    a, b = config.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks: list[nn.Module] = []
        for before, after in ((1, a), (a, b)):
            norm = [nn.BatchNorm2d(after, eps=NO_EPS)] if normed else []
            blocks += [nn.Conv2d(before, after, 3, padding=1), *norm, nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(4 * b, config.data.classes)).double()


def paper_sets(model: nn.Sequential, normed: bool) -> dict[str, Tensor]:
    """R10 from the weights themselves: sums over classes of the classifier; |w|^2 + b^2 of each channel before a batch norm; without one,
    the squares of a channel's out-synapses less those of its in-synapses and its bias."""
    first, second = (m for m in model if isinstance(m, nn.Conv2d))
    last = model[-1]
    assert isinstance(last, nn.Linear)

    def into(conv: nn.Conv2d) -> Tensor:
        assert conv.bias is not None
        return conv.weight.square().sum((1, 2, 3)) + conv.bias.square()

    found = {"translation": torch.cat([last.weight.sum(0), last.bias.sum()[None]])}
    if normed:
        found |= {"scale of block 1": into(first), "scale of block 2": into(second)}
    else:
        onwards = last.weight.reshape(last.out_features, second.out_channels, -1).square().sum((0, 2))
        found |= {"rescale of block 1": second.weight.square().sum((0, 2, 3)) - into(first), "rescale of block 2": onwards - into(second)}
    return {name: value.detach() for name, value in found.items()}


def _as_sets(values: Mapping[tuple[str, ...], Tensor], model: nn.Sequential, normed: bool) -> dict[str, Tensor]:
    """The library's charges put together as the sets of R10 are: before a batch norm the bias is free, a charge of its own."""
    names = [n for n, m in model.named_children() if isinstance(m, nn.Conv2d)]
    tail = f"{len(model) - 1}"
    found = {"translation": torch.cat([values[(f"{tail}.weight",)], values[(f"{tail}.bias",)]])}
    for k, (name, after) in enumerate(zip(names, [*names[1:], tail], strict=True), 1):
        if normed:
            found[f"scale of block {k}"] = values[(f"{name}.weight",)] + values[(f"{name}.bias",)].square()
        else:
            found[f"rescale of block {k}"] = -values[(f"{name}.weight", f"{name}.bias", f"{after}.weight")]
    return found


def sets(config: SetsConfig) -> Part:
    """R10: on convolutional nets the charges found are the sets of the paper's code, and obey the same laws."""
    checks: list[Check] = []
    for normed in (False, True):
        X, _ = draw_data(config.data, 0)
        name = "batch norm" if normed else "no norm"
        known = charges(convnet(config, normed, 0), (X[:8].reshape(-1, 1, 8, 8),), head=lambda out: out.log_softmax(-1))
        runs = [_trained(config, list(known), normed, seed) for seed in config.seeds]
        gap, ledger, closed, short, across = (torch.tensor([run[i] for run in runs], dtype=torch.float64) for i in range(5))
        checks += [
            match(f"{name}: every set of the paper against the charges found, largest relative difference", 0.0, gap, 1e-12,
                  source=f"{SLUG} R10", spread=gap),
            match(f"{name}: largest |ledger - charge|", 0.0, ledger, 1e-12, source=f"{SLUG} R10, R9", spread=ledger),
            match(f"{name}: closed form of the quadratic charges, largest relative error", 0.0, closed, 2e-2, source=f"{SLUG} R10, R7",
                  spread=closed),
        ]  # fmt: skip
        if normed:
            claim = "batch norm: <A theta, g> of the rescaling of a net without one, relative"
            checks.append(control(claim, across, at_least=1e-4, source=f"{SLUG} R10", spread=across))
        else:
            claim = "no norm: <A theta, g> with the bias left out of the in-synapses, relative"
            checks.append(control(claim, short, at_least=1e-4, source=f"{SLUG} R10", spread=short))
    return Part(tuple(checks))


def _trained(config: SetsConfig, known: Sequence[Charge], normed: bool, seed: int) -> tuple[float, float, float, float, float]:
    """Gap to the paper's sets; ledger's and closed form's errors over a run; residuals at the start of two sets that are none."""
    X, y = draw_data(config.data, seed)
    images, model, rule = X.reshape(-1, 1, 8, 8), convnet(config, normed, seed), config.rule
    P = {n: p.detach() for n, p in model.named_parameters()}
    mine = _as_sets({c.parameters: c(P).reshape(-1) for c in known if c.count}, model, normed)
    gap = max(float((mine[k] - v).abs().max() / v.abs().max()) for k, v in paper_sets(model, normed).items())
    objective = Objective(model, cross_entropy)
    g = torch.func.grad(lambda p: objective(p, (images[:64], y[:64])))(dict(objective.params))
    convs = [n for n, m in model.named_children() if isinstance(m, nn.Conv2d)]
    bare = rescale(P, [f"{convs[0]}.weight"], [f"{convs[1]}.weight"])
    full = rescale(P, [f"{convs[0]}.weight", f"{convs[0]}.bias"], [f"{convs[1]}.weight"])
    short, across = (float(c.form(P, g).abs().max() / (_norm({n: P[n] for n in c.parameters}) * _norm({n: g[n] for n in c.parameters})))
                     for c in (bare, full))  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), rule.lr, momentum=rule.momentum, weight_decay=rule.decay)
    draws = torch.Generator().manual_seed(seed)
    with Ledger(optimizer, known, model) as ledger:
        for _ in range(config.steps):
            index = torch.randint(len(X), (config.batch,), generator=draws)
            optimizer.zero_grad()
            cross_entropy(model(images[index]), y[index]).backward()
            optimizer.step()
    accounts = ledger.accounts()
    closed = max(float(_closed(rule, a, rule.dampening)) for a in accounts if a.charge.kind == "quadratic")
    return gap, max(float(a.residual) for a in accounts), closed, short, across


@dataclass(frozen=True)
class Config:
    """One field for each experiment."""

    geometry: GeometryConfig | None = GeometryConfig()
    flow: FlowConfig | None = FlowConfig()
    quadratic: QuadraticConfig | None = QuadraticConfig()
    curve: CurveConfig | None = CurveConfig()
    adaptive: AdaptiveConfig | None = AdaptiveConfig()
    sets: SetsConfig | None = SetsConfig()


_DIGITS = DataConfig(kind="digits")

ENTRY = Entry(
    slug=SLUG,
    title="Neural Mechanics: Symmetry and Broken Conservation Laws in Deep Learning Dynamics",
    paper="Daniel Kunin, Javier Sagastuy-Brena, Surya Ganguli, Daniel L. K. Yamins, Hidenori Tanaka, ICLR 2021, arXiv 2012.04728",
    claims=(
        "A symmetry makes the gradient orthogonal to its orbit and fixes part of the Hessian, on every batch.",
        "Gradient flow conserves a charge for each; weight decay makes it fall exponentially.",
        "With a finite step and momentum the charge is a damped oscillator driven by the squared velocity.",
        "In discrete time the same bookkeeping is exact, whatever the data, batch, schedule or momentum.",
    ),
    presets={
        "smoke": Config(
            geometry=GeometryConfig(batch=64, sizes=(64, 8, 10)),
            flow=FlowConfig(time=0.1, h=0.005, decays=(0.1,)),
            curve=replace(CurveConfig(), steps=60, sizes=(64, 8, 10), rules=(RULES[2], RULES[4])),
            adaptive=AdaptiveConfig(steps=40),
            sets=None,
        ),
        "default": Config(),
        "full": Config(
            geometry=GeometryConfig(data=_DIGITS, seeds=tuple(range(5))),
            flow=FlowConfig(seeds=tuple(range(5))),
            curve=replace(CurveConfig(), data=_DIGITS, steps=1000, seeds=tuple(range(5))),
            adaptive=AdaptiveConfig(data=_DIGITS, seeds=tuple(range(5))),
        ),
    },
    experiments={"geometry": geometry, "flow": flow, "quadratic": quadratic, "curve": curve, "adaptive": adaptive, "sets": sets},
)
