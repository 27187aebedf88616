"""Models with closed forms: prediction and simulation side by side.

A model (`parasym.solvable.models`) is a frozen description; `predict`, `simulate` and `compare` give a `Prediction`, a
`Measurement` and the `Comparison` in which they meet. A `Landscape` (`linear_nets`, `latent`, `autoencoder`, `joint_embedding`) adds
exact loss, weights, invariants and the global minimum; `engines` is what the models are minimised and followed with. The closed forms
are plain functions in `balance`, `factors`, `stationary`, `regression`, `langevin`, `escape`, `adaptive`, `chains` and `scale`.
"""

from parasym.solvable.autoencoder import RegularizedLAE
from parasym.solvable.balanced_net import LambdaBalancedNet
from parasym.solvable.barlow import LinearBarlowTwins
from parasym.solvable.contract import Comparison, Measurement, Model, NotSolvable, Prediction, Row, beside
from parasym.solvable.diagonal import DiagonalLinear
from parasym.solvable.edln import EDLN, LinearRegressionNetwork
from parasym.solvable.factors import Discrete, Normal, Uniform
from parasym.solvable.joint_embedding import GaussianInfoNCE, SSLQuartic
from parasym.solvable.landscape import Landscape
from parasym.solvable.latent import LinearLVM
from parasym.solvable.line_net import OneDLinearNet
from parasym.solvable.linear_nets import DeepLinear, DeepLinearMulti
from parasym.solvable.margin import TwoBalls
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
    "DeepLinear",
    "DeepLinearMulti",
    "DiagonalLinear",
    "Discrete",
    "GaussianInfoNCE",
    "LabelNoiseRegression",
    "LambdaBalancedNet",
    "Landscape",
    "LinearBarlowTwins",
    "LinearLVM",
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
    "RegularizedLAE",
    "Row",
    "SSLQuartic",
    "TwoBalls",
    "TwoLayerOrigin",
    "Uniform",
    "beside",
]
