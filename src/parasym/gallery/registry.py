"""The papers of the gallery: one line for each file."""

from __future__ import annotations

import importlib

from parasym.gallery.contract import Entry

FILES: dict[str, str] = {
    "adaptive-gradient-distribution": "adaptive_gradient_distribution",
    "dcs-mirror-symmetry": "dcs_mirror_symmetry",
    "deep-gamblers": "deep_gamblers",
    "deep-linear-exact": "deep_linear_exact",
    "equivariance-toolbox": "equivariance_toolbox",
    "exact-phase-transitions": "exact_phase_transitions",
    "finite-lr-noise": "finite_lr_noise",
    "flatness-or-sharpness": "flatness_or_sharpness",
    "gamblers-noisy-labels": "gamblers_noisy_labels",
    "get-rich-quick": "get_rich_quick",
    "label-smoothing": "label_smoothing",
    "laprop": "laprop",
    "law-of-balance": "law_of_balance",
    "lazy-to-rich": "lazy_to_rich",
    "limiting-dynamics": "limiting_dynamics",
    "minibatch-noise-strength": "minibatch_noise_strength",
    "neural-mechanics": "neural_mechanics",
    "neural-thermodynamics": "neural_thermodynamics",
    "noether-learning-dynamics": "noether_learning_dynamics",
    "noise-equilibrium": "noise_equilibrium",
    "parameter-symmetry-unifies": "parameter_symmetry_unifies",
    "perfect-platonic": "perfect_platonic",
    "posterior-collapse": "posterior_collapse",
    "power-law-escape": "power_law_escape",
    "probabilistic-stability": "probabilistic_stability",
    "quasi-homogeneous-margin": "quasi_homogeneous_margin",
    "regularized-lae": "regularized_lae",
    "sgd-local-maxima": "sgd_local_maxima",
    "snake-activation": "snake_activation",
    "spred": "spred",
    "ssl-landscape": "ssl_landscape",
    "stepwise-ssl": "stepwise_ssl",
    "stochastic-collapse": "stochastic_collapse",
    "stochastic-networks-deterministic": "stochastic_networks_deterministic",
    "synflow": "synflow",
    "syre": "syre",
    "thermodynamic-irreversibility": "thermodynamic_irreversibility",
    "three-mechanisms": "three_mechanisms",
    "topological-invariance": "topological_invariance",
    "universal-compression": "universal_compression",
    "volumization": "volumization",
}


def entries() -> dict[str, Entry]:
    """All papers by slug; each file holds its `Entry` as ``ENTRY``."""
    return {slug: importlib.import_module(f"parasym.gallery.{file}").ENTRY for slug, file in FILES.items()}
