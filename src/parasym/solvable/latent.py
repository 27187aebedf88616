"""A linear latent variable model and the collapse of its posterior (posterior-collapse).

    z = W^T x + eps, eps ~ N(0, diag s^2);  L = E |U z - y|^2 / (2 e_d^2) + beta E KL(N(W^T x, diag s^2) || N(0, e_e^2)) [+ d2/2 log e_d^2]

k = beta e_d^2, c = k / e_e^2; zeta are the singular values of E[y x^T] A^(-1/2). A mode lives iff zeta^2 > k (learned variances) or
zeta > sqrt(c) s (fixed ones).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from parasym.core.errors import InputError
from parasym.core.results import Estimate
from parasym.solvable.contract import NotSolvable, Prediction, absent, positive
from parasym.solvable.engines import Params
from parasym.solvable.landscape import Array, Generator, Landscape, joint_sample, matrix, normal, roots_of, rotation, sizes, skew, symmetric


@dataclass(frozen=True, eq=False)
class LinearLVM(Landscape):
    """The linear latent variable model; y = x gives the linear VAE.

    Attributes:
        second: (d0, d0) A = E[x x^T] of centred inputs; may be singular.
        cross: (d2, d0) E[y x^T].
        power: (d2, d2) E[y y^T].
        latents: d1.
        beta: weight of the KL term.
        encoder: e_e, standard deviation of the prior.
        decoder: e_d, standard deviation of the decoder; its start where it is learned.
        sigma: fixed standard deviations (d1,) of the posterior; learned when None.
        learn_decoder: add (d2 / 2) log e_d^2 and minimise over e_d too; learned posterior variances only.

    Kinds: ``minimum`` (loss, whitened map U W^T A^(1/2), singular values of the decoder, posterior variances, KL of each latent, active
    modes, and e_d^2 where learned), ``phase`` (beta at which each mode dies).

    Raises:
        InputError: moments no data has, numbers that are not positive, NaN.
    """

    second: Tensor
    cross: Tensor
    power: Tensor
    latents: int
    beta: float = 1.0
    encoder: float = 1.0
    decoder: float = 1.0
    sigma: tuple[float, ...] | None = None
    learn_decoder: bool = False
    slug: ClassVar[str] = "posterior-collapse"
    kinds: ClassVar[tuple[str, ...]] = ("minimum", "phase")
    tolerance: ClassVar[Mapping[str, Mapping[str, float]]] = {
        "minimum": {"loss": 1e-8, "map": 1e-5, "decoder": 1e-4, "variances": 1e-4, "KL": 1e-5, "decoder variance": 1e-5, "active": 0.0},
        "phase": {"critical beta": 1e-4},
    }
    scales: ClassVar[tuple[float, ...]] = (0.7, 1.0, 1.4)

    def __post_init__(self) -> None:
        a = symmetric("second", self.second, definite=False)
        z = matrix("cross", self.cross, (None, len(a)))
        power = symmetric("power", self.power, len(z), definite=False)
        (latents,) = sizes("latents", (self.latents,))
        positive(encoder=self.encoder, decoder=self.decoder)
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise InputError(f"beta must be a number at least 0, got {self.beta!r}")
        if self.sigma is not None:
            if len(self.sigma) != latents or not all(math.isfinite(s) and s > 0 for s in self.sigma):
                raise InputError(f"sigma needs one positive standard deviation for each of {latents} latents, got {self.sigma}")
            if self.learn_decoder:
                raise InputError("a learned decoder variance has a closed form with learned posterior variances only: leave sigma out")
        for name, value in {"second": a, "cross": z, "power": power, "latents": latents}.items():
            object.__setattr__(self, name, value)
        rest = power - self.whitened @ self.whitened.T
        if float(torch.linalg.eigvalsh(rest)[0]) < -1e-8 * float(power.trace()) or bool(
            ((z - self.whitened @ roots_of(a)[0]).abs() > 1e-8 * z.abs().max()).any()
        ):
            raise InputError("E[y x^T] does not fit E[x x^T] and E[y y^T]: no data has such moments")

    @classmethod
    def of_data(cls, x: ArrayLike, y: ArrayLike | None = None, *, latents: int, **rest: Any) -> LinearLVM:
        """From data x (n, d0) and y (n, d2), centred here; y = x without y."""
        inputs = matrix("x", x, (None, None))
        targets = inputs if y is None else matrix("y", y, (len(inputs), None))
        inputs, targets = inputs - inputs.mean(0), targets - targets.mean(0)
        n = len(inputs)
        return cls(inputs.T @ inputs / n, targets.T @ inputs / n, targets.T @ targets / n, latents, **rest)

    # ---------------------------------------------------------------- the closed form

    @cached_property
    def whitened(self) -> Tensor:
        """(d2, d0) Z = E[y x^T] A^(-1/2), on the range of A."""
        return self.cross @ roots_of(self.second)[1]

    @cached_property
    def zeta(self) -> Tensor:
        """Singular values of Z, largest first."""
        return torch.linalg.svdvals(self.whitened)

    @property
    def residual(self) -> float:
        """R = E|y|^2 - sum zeta^2: what linear regression leaves."""
        return max(0.0, float(self.power.trace() - self.zeta.square().sum()))

    @property
    def k(self) -> float:
        """beta e_d^2."""
        return self.beta * self.decoder**2

    def critical_beta(self) -> Tensor:
        """beta at which each mode dies: zeta^2 / e_d^2 (R2), or zeta^2 e_e^2 / (e_d s)^2 with fixed variances (R3)."""
        zeta = self.zeta[: self.latents]
        if self.sigma is None:
            return zeta.square() / self.decoder**2
        s = torch.tensor(sorted(self.sigma), dtype=torch.float64)[: len(zeta)]
        return (zeta * self.encoder / (self.decoder * s)).square()

    def active(self, beta: float | None = None) -> int:
        """How many modes live at ``beta``."""
        if self.learn_decoder and beta is None:
            return self.decoder_variance()[0]
        return int((self.critical_beta() > (self.beta if beta is None else beta)).sum())

    def phase_diagram(self, betas: Sequence[float], decoders: Sequence[float]) -> Tensor:
        """(betas, decoders) number of living modes at fixed decoder deviations."""
        b, d = torch.tensor(betas, dtype=torch.float64), torch.tensor(decoders, dtype=torch.float64)
        unit = self.critical_beta() * self.decoder**2  # critical beta e_d^2 of each mode
        return (unit > b[:, None, None] * d[:, None].square()).sum(-1)

    def decoder_variance(self) -> tuple[int, float]:
        """Living modes and e_d^2 where it is learned: (R + sum of dead zeta^2) / (d2 - beta n), the self-consistent n of lowest loss (R6).

        Raises:
            NotSolvable: no n is self-consistent: the loss is unbounded below, or flat in e_d.
        """
        square, outputs = self.zeta.square(), len(self.power)
        most = min(self.latents, len(square))
        floor = 1e-12 * float(self.power.trace())
        found = []
        for n in range(most + 1):
            left = self.residual + float(square[n:].sum())
            room = outputs - self.beta * n
            if left <= floor or room <= 0:
                continue
            variance = left / room
            k = self.beta * variance
            if (n == 0 or float(square[n - 1]) > k) and (n == most or float(square[n]) <= k):
                found.append((self._loss_of(n, variance) + 0.5 * outputs * math.log(variance), n, variance))
        able = int((square[:most] > floor).sum())  # directions y does not share never live
        whole = self.residual + float(square[able:].sum())
        if whole <= floor and outputs > self.beta * able:
            raise NotSolvable("the living modes explain everything and d2 > beta n: the loss falls without bound as e_d goes to 0")
        if not found:
            raise NotSolvable("no number of living modes is consistent with its own e_d: the loss is flat as e_d goes to 0")
        _, n, variance = min(found)
        return n, variance

    def _loss_of(self, n: int, variance: float) -> float:
        """R4 with the first n modes living at decoder variance ``variance``."""
        square, k = self.zeta.square(), self.beta * variance
        living = sum(k * (1 + math.log(float(z) / k)) for z in square[:n])
        return (self.residual + living + float(square[n:].sum())) / (2 * variance)

    def _modes(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """lam, theta (singular values of decoder and whitened encoder) and s^2, each (d1,), and e_d^2."""
        if self.beta == 0:
            raise NotSolvable("beta = 0: nothing holds the encoder, the posterior variances go to 0 and the infimum is not attained")
        variance = self.decoder_variance()[1] if self.learn_decoder else self.decoder**2
        k, e2 = self.beta * variance, self.encoder**2
        c = k / e2
        zeta = torch.zeros(self.latents, dtype=torch.float64)
        count = min(self.latents, len(self.zeta))
        zeta[:count] = self.zeta[:count]
        tiny = zeta.clamp_min(1e-300)
        if self.sigma is None:
            gap = (zeta.square() - k).clamp_min(0)
            lam, th = (gap / e2).sqrt(), (e2 * gap).sqrt() / tiny
            return lam, th, torch.where(gap > 0, k * e2 / tiny.square(), e2), variance
        s = torch.tensor(sorted(self.sigma), dtype=torch.float64)
        lam = (c**0.5 * zeta / s - c).clamp_min(0).sqrt()
        return lam, (zeta * s / c**0.5 - s.square()).clamp_min(0).sqrt(), s.square(), variance

    def minimal_loss(self) -> float:
        """R4, R6: the loss at the global minimum."""
        lam, _, s2, variance = self._modes()
        if self.sigma is None:
            n = int((lam > 0).sum())
            return self._loss_of(n, variance) + (0.5 * len(self.power) * math.log(variance) if self.learn_decoder else 0.0)
        k, e2 = self.k, self.encoder**2
        c, count = k / e2, min(self.latents, len(self.zeta))
        gain = (self.zeta[:count] - (c * s2[:count]).sqrt()).clamp_min(0).square().sum()
        kept = (c * s2 - k * (s2 / e2).log() - k).sum()
        return float(self.residual + self.zeta.square().sum() - gain + kept) / (2 * self.decoder**2)

    # ---------------------------------------------------------------- the model

    def init(self, seed: int, scale: float = 1.0) -> Params:
        d0, d2 = len(self.second), len(self.power)
        theta = {
            "W": scale * normal(2 * seed, d0, self.latents) / d0**0.5,
            "U": scale * normal(2 * seed + 1, d2, self.latents) / self.latents**0.5,
        }
        if self.sigma is None:
            theta["log s2"] = torch.full((self.latents,), math.log(self.encoder**2) - 1, dtype=torch.float64)
        if self.learn_decoder:
            theta["log e2"] = torch.tensor(math.log(float(self.power.trace()) / len(self.power)), dtype=torch.float64)
        return theta

    def _variances(self, theta: Params) -> Tensor:
        return theta["log s2"].exp() if self.sigma is None else torch.tensor(self.sigma, dtype=torch.float64).square()

    def kl(self, theta: Params) -> Tensor:
        """(d1,) mean KL of each latent from the prior."""
        s2, e2 = self._variances(theta), self.encoder**2
        mean = torch.einsum("ai,ab,bi->i", theta["W"], self.second, theta["W"])
        return 0.5 * ((mean + s2) / e2 - 1 - (s2 / e2).log())

    def loss(self, theta: Params) -> Tensor:
        through, s2 = theta["U"] @ theta["W"].T, self._variances(theta)
        error = (through @ self.second * through).sum() + (theta["U"].square() * s2).sum() - 2 * (through * self.cross).sum()
        log_e2 = theta["log e2"] if self.learn_decoder else torch.tensor(2 * math.log(self.decoder), dtype=torch.float64)
        extra = 0.5 * len(self.power) * log_e2 if self.learn_decoder else 0.0
        return (error + self.power.trace()) / (2 * log_e2.exp()) + self.beta * self.kl(theta).sum() + extra

    def data(self, count: int, seed: int) -> Mapping[str, Tensor]:
        """Gaussian x (count, d0) and y (count, d2) with the model's moments; y = x where they are the same."""
        if self.cross.shape == self.second.shape and torch.equal(self.cross, self.second) and torch.equal(self.power, self.second):
            root, _ = roots_of(self.second)
            x = normal(seed, count, len(root)) @ root
            return {"x": x, "y": x}
        x, y = joint_sample(self.second, self.cross, self.power, count, seed)
        return {"x": x, "y": y}

    def sample_losses(self, theta: Params, count: int, seed: int) -> Tensor:
        batch, s2, e2 = self.data(count, seed), self._variances(theta), self.encoder**2
        mean = batch["x"] @ theta["W"]
        z = mean + s2.sqrt() * normal(seed + 1, count, self.latents)
        d2 = theta["log e2"].exp() if self.learn_decoder else torch.tensor(self.decoder**2, dtype=torch.float64)
        kl = 0.5 * ((mean.square() + s2) / e2 - 1 - (s2 / e2).log()).sum(-1)
        extra = 0.5 * len(self.power) * d2.log() if self.learn_decoder else 0.0
        return (z @ theta["U"].T - batch["y"]).square().sum(-1) / (2 * d2) + self.beta * kl + extra

    def observables(self, theta: Params) -> dict[str, Tensor]:
        lam = torch.zeros(self.latents, dtype=torch.float64)
        values = torch.linalg.svdvals(theta["U"])
        lam[: len(values)] = values
        s2 = self._variances(theta)
        out = {
            "map": theta["U"] @ theta["W"].T @ roots_of(self.second)[0],
            "decoder": lam,
            "active": (lam > 1e-3 * max(1.0, float(lam.max()))).sum(),
        }
        if self.sigma is None:
            out |= {"variances": s2.sort().values, "KL": self.kl(theta).sort(descending=True).values}
        if self.learn_decoder:
            out["decoder variance"] = theta["log e2"].exp()
        return out

    def output_variance(self, theta: Params) -> Tensor:
        """Tr Var of the decoder's mean over the latent noise: sum_i s_i^2 |u_i|^2 (stochastic-networks-deterministic R5)."""
        return (theta["U"].square() * self._variances(theta)).sum()

    def predicted_output_variance(self) -> float:
        """sum over living modes of k (1 - k / zeta^2), whatever the number of latents."""
        lam, _, s2, _ = self._modes()
        return float((lam.square() * s2).sum())

    def generators(self) -> Mapping[str, Generator]:
        if self.sigma is None or self.latents < 2 or len(set(self.sigma)) > 1:
            return {}
        turn = skew(self.latents)
        return {"rotation": lambda theta: {"W": theta["W"] @ turn, "U": theta["U"] @ turn}}

    def representative(self, seed: int = 0) -> Params:
        lam, th, s2, variance = self._modes()
        left, _, right = torch.linalg.svd(self.whitened, full_matrices=False)
        count = min(self.latents, len(self.zeta))
        draws = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.latents, generator=draws) if self.sigma is None else torch.tensor(self.sigma).argsort().argsort()
        turn = torch.eye(self.latents, dtype=torch.float64)[order] * (torch.randint(0, 2, (self.latents,), generator=draws) * 2.0 - 1)
        if self.sigma is not None and len(set(self.sigma)) == 1:
            turn = rotation(self.latents, seed)
        u = torch.zeros(len(self.power), self.latents, dtype=torch.float64)
        w = torch.zeros(len(self.second), self.latents, dtype=torch.float64)
        u[:, :count], w[:, :count] = left[:, :count] * lam[:count], roots_of(self.second)[1] @ right[:count].T * th[:count]
        theta = {"W": w @ turn.T, "U": u @ turn.T}
        if self.sigma is None:
            theta["log s2"] = s2.log()[order]
        if self.learn_decoder:
            theta["log e2"] = torch.tensor(math.log(variance), dtype=torch.float64)
        return theta

    # ---------------------------------------------------------------- prediction and runs

    def _predict(self, kind: str) -> Prediction:
        if kind == "phase":
            if self.learn_decoder:
                return Prediction(kind, {"critical beta": absent("a learned decoder variance moves with beta: see decoder_variance")})
            alive = self.critical_beta()
            return Prediction(kind, {"critical beta": Estimate(alive[alive > 1e-9])}, refs=("posterior-collapse R2, R3",))
        try:
            lam, th, s2, variance = self._modes()
            loss = self.minimal_loss()
        except NotSolvable as reason:
            return Prediction(kind, {"loss": absent(str(reason), ("posterior-collapse R6",))})
        left, _, right = torch.linalg.svd(self.whitened, full_matrices=False)
        count = min(self.latents, len(self.zeta))
        through = Estimate((left[:, :count] * (lam * th)[:count]) @ right[:count])
        if count < len(self.zeta) and lam[count - 1] > 0 and float(self.zeta[count - 1] - self.zeta[count]) < 1e-9 * float(self.zeta[0]):
            through = absent("the last kept mode is degenerate with the first one left out: the map is not unique")
        values = {"loss": Estimate(loss), "map": through, "decoder": Estimate(lam.sort(descending=True).values)}
        values["active"] = Estimate(float((lam > 0).sum()))
        if self.sigma is None:
            kl = torch.where(lam > 0, 0.5 * (self._padded().square() / (self.beta * variance)).clamp_min(1e-300).log(), 0.0)
            values |= {"variances": Estimate(s2.sort().values), "KL": Estimate(kl.sort(descending=True).values)}
        if self.learn_decoder:
            values["decoder variance"] = Estimate(variance)
        return Prediction(kind, values, refs=("posterior-collapse R1, R3, R4, R6, R7",))

    def _padded(self) -> Tensor:
        out = torch.ones(self.latents, dtype=torch.float64)
        count = min(self.latents, len(self.zeta))
        out[:count] = self.zeta[:count]
        return out

    def _control(self, kind: str) -> Prediction:
        """No penalty on the encoder's mean: the full regression, no mode dies; for the phase, zeta instead of zeta^2."""
        if kind == "phase":
            alive = self.critical_beta()
            return Prediction(kind, {"critical beta": Estimate(2 * alive[alive > 1e-9].sqrt())})
        left, values, right = torch.linalg.svd(self.whitened, full_matrices=False)
        kept = min(self.latents, len(values))
        return Prediction(kind, {"map": Estimate((left[:, :kept] * values[:kept]) @ right[:kept])})

    def _measure(self, kind: str, seed: int, budget: float) -> Mapping[str, Estimate]:
        """Where the square of each decoder singular value vanishes: minimised on a grid of betas, and extrapolated by a parabola in
        beta^(1/2) from three betas at which the mode still lives."""
        if self.learn_decoder:
            return {"critical beta": absent("a learned decoder variance moves with beta")}
        modes = int((self.critical_beta() > 1e-9).sum())
        top = 2 * float(self.power.trace()) / self.decoder**2 * max(1.0, (self.encoder / min(self.sigma or (self.encoder,))) ** 2)

        def squares(beta: float) -> Array:
            found = replace(self, beta=beta).minimise(seed, restarts=1)
            return np.square(torch.linalg.svdvals(found.best["U"]).numpy()[:modes])  # type: ignore[no-any-return]

        grid = top * np.geomspace(1e-4, 1, 16)
        seen = np.array([squares(beta) for beta in grid])
        out = []
        for i in range(modes):
            alive = np.nonzero(seen[:, i] > 1e-6)[0]
            if not len(alive):
                return {"critical beta": Estimate(None, status="not_converged", note=f"mode {i} lives at no beta of the grid")}
            low = float(grid[alive[-1]])
            at = np.sqrt(low * np.array([0.7, 0.85, 1.0]))
            roots = np.roots(np.polyfit(at, [squares(x * x)[i] for x in at], 2))
            real = roots[np.abs(roots.imag) < 1e-9].real
            out.append(float(real[np.argmin(np.abs(real - at[-1]))]) ** 2)
        return {"critical beta": Estimate(torch.tensor(out, dtype=torch.float64))}
