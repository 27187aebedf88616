"""Optimisers of the programme, drop-in for `torch.optim`."""

from parasym.optim.laprop import LaProp
from parasym.optim.volumize import (
    Volumize,
    binarize_,
    clip_bias_variance,
    flip_convention,
    resting_offset,
    ternarize_,
    volumize_,
    wall_alpha,
    wall_occupancy,
    wall_penalty,
)

__all__ = [
    "LaProp",
    "Volumize",
    "binarize_",
    "clip_bias_variance",
    "flip_convention",
    "resting_offset",
    "ternarize_",
    "volumize_",
    "wall_alpha",
    "wall_occupancy",
    "wall_penalty",
]
