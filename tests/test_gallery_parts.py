"""The gallery entries of the torch parts: their data, and each of them sabotaged."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from parasym.core.errors import MissingExtraError
from parasym.gallery import deep_gamblers, digits, gamblers_noisy_labels, label_smoothing, laprop, snake_activation, volumization
from parasym.gallery.contract import Part
from parasym.gallery.ensemble import Ensemble


@pytest.fixture
def needs() -> None:
    """Asked for by the tests that train on the digits."""
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install 'parasym[data]'")


def failed(part: Part) -> list[str]:
    return [check.claim for check in part.checks if not check.passed]


# ------------------------------------------------------------------------------------------------ the shared runner


def test_a_net_of_a_stack_is_the_net_alone() -> None:
    nets = digits.networks(Ensemble((0, 1)), (5, 7, 3), methods=2)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    stacked = digits.outputs(nets, x)
    for i in range(4):
        value = torch.relu(x @ nets[0][i, :-1] + nets[0][i, -1]) @ nets[1][i, :-1] + nets[1][i, -1]
        torch.testing.assert_close(stacked[i], value)
    assert torch.equal(nets[0][0], nets[0][2])  # one start for every method
    assert not torch.equal(nets[0][0], nets[0][1])
    assert torch.equal(digits.networks(Ensemble((1,)), (5, 7, 3))[1][0], nets[1][1])  # a seed's net depends on the seed alone


def test_training_a_stack_is_training_each() -> None:
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    y = torch.randint(3, (2, 30), generator=torch.Generator().manual_seed(1))

    def run(seeds: tuple[int, ...], labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        draws = Ensemble(seeds)
        nets = digits.networks(draws, (5, 7, 3))
        optimizer = torch.optim.SGD(nets, lr=0.1, momentum=0.9)
        history = digits.train(
            lambda images: digits.outputs(nets, images),
            optimizer,
            x,
            labels,
            lambda logits, given, epoch: digits.cross_entropies(logits, given),
            epochs=3,
            batch=8,
            draws=draws,
        )
        return history, nets[0].detach()

    together, weights = run((3, 4), y)
    alone, weight = run((4,), y[1:])
    torch.testing.assert_close(together[:, 1:], alone)
    torch.testing.assert_close(weights[1:], weight)
    assert together[-1, 0] < together[0, 0]


def test_missing_data_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"parasym\[data\]"):
        digits.digits()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"parasym\[data\]"):
        snake_activation.seattle()
    with pytest.raises(MissingExtraError, match="dataset-fashion-mnist"):
        deep_gamblers.clothes(deep_gamblers.ClothesConfig(folder="/nonexistent"))


def test_the_digits_are_split_by_class(needs: None) -> None:
    split = digits.digits()
    assert len(split.y) == 1078
    assert len(split.y_test) == 719
    shares = [torch.bincount(y) / len(y) for y in (split.y, split.y_test)]
    torch.testing.assert_close(*shares, atol=2e-3, rtol=0)
    assert (split.x.min().item(), split.x.max().item()) == (0.0, 1.0)


# ------------------------------------------------------------------------------------------------ sabotage


def test_sabotage_laprop(monkeypatch: pytest.MonkeyPatch) -> None:
    same = laprop.RecurrenceConfig(steps=60, drop=1.0)
    assert "with a schedule the two forms differ, largest distance" in failed(laprop.recurrence(same))
    assert any("within 1 %" in claim for claim in failed(laprop.bounds(replace(laprop.BoundConfig(), growth=1.0, white=200))))
    assert len(failed(laprop.online(laprop.OnlineConfig(cost=3.0, steps=30)))) >= 3

    class Averaged(torch.optim.Adam):
        """Adam under LaProp's name: momentum first, scale afterwards."""

        def __init__(self, params: Any, lr: float = 4e-4, betas: Any = (0.9, 0.999), eps: float = 1e-15, **options: Any) -> None:
            super().__init__(params, lr=lr, betas=betas, eps=eps, foreach=options.get("foreach"))

        def updates(self) -> list[torch.Tensor]:
            return [state["exp_avg"] for state in self.state.values()]

    monkeypatch.setattr(laprop, "LaProp", Averaged)
    assert len(failed(laprop.recurrence(laprop.RecurrenceConfig(steps=60)))) >= 3
    assert len(failed(laprop.bounds(laprop.BoundConfig(white=200)))) >= 2


def test_sabotage_laprop_on_a_shallow_net(needs: None) -> None:
    shallow = laprop.DivergenceConfig(hidden=1, nus=(0.7,), steps=60)
    assert any("Adam's largest" in claim for claim in failed(laprop.divergence(shallow)))


def test_sabotage_rosenbrock_without_a_small_nu() -> None:
    assert failed(laprop.rosenbrock(laprop.RosenbrockConfig(nus=(0.99,), steps=300, replicas=2)))


def test_sabotage_snake(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failed(snake_activation.moments(snake_activation.MomentConfig(width=2.0, units=32, inputs=8, depth=2)))
    dull = snake_activation.AsymptoteConfig(activations=("relu", "tanh", "snake 0.0001"), steps=30)
    assert any("snake" in claim for claim in failed(snake_activation.asymptotes(dull)))
    monkeypatch.setattr(snake_activation, "snake", lambda x, a: x + torch.sin(a * x).square())  # without the 1 / a
    wrong = failed(snake_activation.symmetry(snake_activation.SymmetryConfig(etas=(2e-2, 1e-2))))
    assert any("rescaling with the frequency" in claim for claim in wrong)
    assert any("drift" in claim for claim in wrong)


def test_sabotage_label_smoothing(monkeypatch: pytest.MonkeyPatch, needs: None) -> None:
    assert any("memorises" in claim for claim in failed(label_smoothing.memorising(label_smoothing.NetConfig(steps=3))))
    honest = label_smoothing.flip_labels
    monkeypatch.setattr(label_smoothing, "flip_labels", lambda y, r, m, **k: honest(y, r / 2, m, **k))
    assert len(failed(label_smoothing.exact(label_smoothing.ExactConfig(samples=50_000)))) >= 2
    assert failed(label_smoothing.neighbours(label_smoothing.NeighbourConfig(rates=(0.4,), draws=3)))


def test_sabotage_deep_gamblers(monkeypatch: pytest.MonkeyPatch, needs: None) -> None:
    short = deep_gamblers.DigitsConfig(payoffs=(2.5,), beyond=2.5, epochs=6)
    assert len(failed(deep_gamblers.wrong_labels(short))) >= 1
    honest = deep_gamblers.kelly_reserve

    def greedy(q: torch.Tensor, o: Any) -> Any:
        best = honest(q, o)
        return best._replace(k=torch.zeros_like(best.k), p=q, value=-(q * q.log()).sum(-1))

    monkeypatch.setattr(deep_gamblers, "kelly_reserve", greedy)
    assert len(failed(deep_gamblers.exact(deep_gamblers.ExactConfig(draws=2)))) >= 3


def test_sabotage_noisy_labels(needs: None) -> None:
    hasty = gamblers_noisy_labels.TableConfig(steps=(30, 10), flips=2000)
    assert len(failed(gamblers_noisy_labels.table(hasty))) >= 2
    short = gamblers_noisy_labels.NetConfig(noises=(0.5,), warmups=(0,), epochs=3)
    assert len(failed(gamblers_noisy_labels.memorising(short))) >= 3
    idle = replace(gamblers_noisy_labels.AUTOMATIC, lr=1e-5, warmups=(0, 0), epochs=2)
    assert len(failed(gamblers_noisy_labels.automatic(idle))) >= 2


def test_sabotage_volumization(monkeypatch: pytest.MonkeyPatch, needs: None) -> None:
    wide = volumization.NetConfig(boxes=((1.0, 1.0), (50.0, 0.0)), epochs=2)
    assert len(failed(volumization.noisy_labels(wide))) >= 3
    monkeypatch.setattr(volumization, "wall_penalty", lambda alpha, eta: 2 * (1 - alpha) / (alpha * eta) if alpha else float("inf"))
    assert any("minimiser of L + R" in claim for claim in failed(volumization.penalty(volumization.PenaltyConfig(steps=3000))))
    monkeypatch.setattr(volumization, "clip_bias_variance", lambda u, s, v, a: (v * v, s * s * (1 + a * a)))
    assert len(failed(volumization.bias(volumization.BiasConfig(samples=20_000)))) >= 2
