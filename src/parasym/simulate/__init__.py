"""Many replicas of a small stochastic system, stepped together, measured as they go.

A step is written once, on symbols, with plain arithmetic and the functions below; see `System`, `Ensemble` and the observables.
"""

from parasym.simulate.ensemble import Ensemble, Run, grid
from parasym.simulate.expr import cos, dot, exp, gradient, log, maximum, sin, sqrt, tanh, where
from parasym.simulate.observe import (
    Average,
    Covariance,
    Displacement,
    FirstPassage,
    Histogram,
    Increments,
    Lyapunov,
    Observable,
    Snapshots,
    diffusion_exponent,
)
from parasym.simulate.problems import diffusion, quadratic, regression, square_root, student, table_regression, two_layer
from parasym.simulate.rules import SGD, Adam, LaProp, Momentum, Preconditioned, Rule, descent
from parasym.simulate.system import Draws, Moment, Params, Sampling, System, Table, TorchSystem

__all__ = [
    "SGD",
    "Adam",
    "Average",
    "Covariance",
    "Displacement",
    "Draws",
    "Ensemble",
    "FirstPassage",
    "Histogram",
    "Increments",
    "LaProp",
    "Lyapunov",
    "Moment",
    "Momentum",
    "Observable",
    "Params",
    "Preconditioned",
    "Rule",
    "Run",
    "Sampling",
    "Snapshots",
    "System",
    "Table",
    "TorchSystem",
    "cos",
    "descent",
    "diffusion",
    "diffusion_exponent",
    "dot",
    "exp",
    "gradient",
    "grid",
    "log",
    "maximum",
    "quadratic",
    "regression",
    "sin",
    "sqrt",
    "square_root",
    "student",
    "table_regression",
    "tanh",
    "two_layer",
    "where",
]
