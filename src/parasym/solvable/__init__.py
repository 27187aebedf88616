"""Models with closed forms: prediction and simulation side by side.

A model (`parasym.solvable.models`) is a frozen description; `predict`, `simulate` and `compare` give a `Prediction`, a
`Measurement` and the `Comparison` in which they meet. The closed forms are plain functions in `factors`, `stationary`,
`regression`, `langevin`, `escape`, `adaptive` and `chains`.
"""

from parasym.solvable.contract import Comparison, Measurement, Model, NotSolvable, Prediction, Row, beside
from parasym.solvable.edln import EDLN, LinearRegressionNetwork
from parasym.solvable.factors import Discrete, Normal, Uniform
from parasym.solvable.models import (
    AdaptiveStep,
    DataRegression,
    LabelNoiseRegression,
    LocalMaximum,
    LogLossSDE,
    MomentumModes,
    QuadraticSGD,
    RandomCurvature,
    TwoLayerOrigin,
)

__all__ = [
    "EDLN",
    "AdaptiveStep",
    "Comparison",
    "DataRegression",
    "Discrete",
    "LabelNoiseRegression",
    "LinearRegressionNetwork",
    "LocalMaximum",
    "LogLossSDE",
    "Measurement",
    "Model",
    "MomentumModes",
    "Normal",
    "NotSolvable",
    "Prediction",
    "QuadraticSGD",
    "RandomCurvature",
    "Row",
    "TwoLayerOrigin",
    "Uniform",
    "beside",
]
