"""The papers of the gallery: one line for each file."""

from __future__ import annotations

import importlib

from parasym.gallery.contract import Entry

FILES: dict[str, str] = {
    "dcs-mirror-symmetry": "dcs_mirror_symmetry",
    "deep-gamblers": "deep_gamblers",
    "equivariance-toolbox": "equivariance_toolbox",
    "gamblers-noisy-labels": "gamblers_noisy_labels",
    "label-smoothing": "label_smoothing",
    "laprop": "laprop",
    "law-of-balance": "law_of_balance",
    "neural-mechanics": "neural_mechanics",
    "noether-learning-dynamics": "noether_learning_dynamics",
    "noise-equilibrium": "noise_equilibrium",
    "snake-activation": "snake_activation",
    "stochastic-collapse": "stochastic_collapse",
    "volumization": "volumization",
}


def entries() -> dict[str, Entry]:
    """All papers by slug; each file holds its `Entry` as ``ENTRY``."""
    return {slug: importlib.import_module(f"parasym.gallery.{file}").ENTRY for slug, file in FILES.items()}
