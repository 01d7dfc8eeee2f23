"""The exceptions of thermograd. Each says what was wrong, what was expected, and what to do.

Every exception derives from :class:`ThermogradError`; those that a caller can mend by
passing something else derive from :class:`InputError` (which is also a ``ValueError``).
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "ConvergenceError",
    "DataError",
    "DivergedError",
    "HyperparameterError",
    "InputError",
    "LossError",
    "ModelError",
    "NonFiniteError",
    "NotAvailableError",
    "OutputMismatchError",
    "StoreError",
    "ThermogradError",
    "ThermogradWarning",
    "TooShortError",
    "UnstableError",
]


class ThermogradError(Exception):
    """Base of all errors raised on purpose by thermograd.

    Args:
        what: what was wrong, with the offending value.
        expected: what would have been right.
        remedy: what to do now.

    >>> error = ThermogradError("lr is -1", expected="a positive number", remedy="pass lr > 0")
    >>> print(error)
    lr is -1. Expected: a positive number. What to do: pass lr > 0.
    """

    def __init__(self, what: str, *, expected: str | None = None, remedy: str | None = None):
        self.what, self.expected, self.remedy = what, expected, remedy
        parts = [what, expected and f"Expected: {expected}", remedy and f"What to do: {remedy}"]
        super().__init__(" ".join(p if p.endswith((".", "!", "?")) else p + "." for p in parts if p))


class InputError(ThermogradError, ValueError):
    """An argument is wrong: the call can be mended by passing something else."""


class HyperparameterError(InputError):
    """A learning rate, momentum, batch size, ... outside its range."""


class UnstableError(HyperparameterError):
    """The dynamics diverge at these hyperparameters and this curvature, so no stationary state exists."""


class ModelError(InputError):
    """The model breaks the contract of a problem (samples coupled, random output, no weights, ...)."""


class LossError(InputError):
    """The loss is not a mean over samples of a per-sample loss."""


class OutputMismatchError(LossError):
    """The model's output and the target do not fit the loss together."""


class DataError(InputError):
    """The data are empty, not finite, out of range, not repeatable, or absent."""


class NonFiniteError(ThermogradError, ArithmeticError):
    """A NaN or an infinity appeared where a number was needed."""


class DivergedError(NonFiniteError):
    """Training or a simulation diverged."""


class TooShortError(InputError):
    """The record is too short for the statistic that was asked for."""


class ConvergenceError(ThermogradError):
    """An iteration ended without reaching the tolerance that was asked for."""


class StoreError(ThermogradError):
    """A run's store is absent, damaged, locked, or holds something else."""


class ConfigError(InputError):
    """A configuration file is wrong."""


class NotAvailableError(ThermogradError):
    """What was asked for does not exist for this kind of object, or needs an extra that is not installed."""


class ThermogradWarning(UserWarning):
    """The category of every warning thermograd emits."""
