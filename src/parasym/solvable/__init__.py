"""Models with closed forms: prediction and simulation side by side.

A model (`parasym.solvable.models`) is a frozen description; `predict`, `simulate` and `compare` give a `Prediction`, a
`Measurement` and the `Comparison` in which they meet. The closed forms are plain functions in `factors`, `stationary`,
`regression`, `langevin`, `escape`, `adaptive` and `chains`.
"""

from parasym.solvable.balanced_net import LambdaBalancedNet
from parasym.solvable.barlow import LinearBarlowTwins
from parasym.solvable.contract import Comparison, Measurement, Model, NotSolvable, Prediction, Row, beside
from parasym.solvable.edln import EDLN, LinearRegressionNetwork
from parasym.solvable.factors import Discrete, Normal, Uniform
from parasym.solvable.line_net import OneDLinearNet
from parasym.solvable.minimal_rich import MinimalRich
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
    "LambdaBalancedNet",
    "LinearBarlowTwins",
    "LinearRegressionNetwork",
    "LocalMaximum",
    "LogLossSDE",
    "Measurement",
    "MinimalRich",
    "Model",
    "MomentumModes",
    "Normal",
    "NotSolvable",
    "OneDLinearNet",
    "Prediction",
    "QuadraticSGD",
    "RandomCurvature",
    "Row",
    "TwoLayerOrigin",
    "Uniform",
    "beside",
]
