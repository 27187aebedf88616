"""The errors parasym raises: each says what was found, where, and what to do about it."""

from __future__ import annotations


class ParasymError(Exception):
    """Base of every error parasym raises on purpose."""


class TraceError(ParasymError):
    """The model could not be turned into a graph of operators."""


class InputError(ParasymError):
    """The model, its example arguments or its weights cannot be used as given."""


class NonDeterministicError(ParasymError):
    """Two evaluations of the same model on the same input disagree."""


class NotASymmetryError(ParasymError):
    """A proposed action changes what the network computes."""


class CheckpointError(ParasymError):
    """A weights file is missing, truncated, hostile, or does not fit the model."""


class RecordError(ParasymError):
    """The record of a watched run cannot be written or read: full disk, lock, damage, foreign or newer file."""


class MissingExtraError(ParasymError):
    """A feature needs an optional package; the message names the extra to install."""
