"""A small library of potentials as numba functions, and the way to bring one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

from ..errors import DataError
from ..theory.arrays import Array
from .callables import compiled

__all__ = ["POTENTIALS", "Potential", "library_name"]


def library_name(function: Callable[..., Any]) -> str | None:
    """The name of a function of this module, None for any other: kernels of the former are kept on disk."""
    plain = getattr(function, "py_func", function)
    known = plain.__module__ == __name__ and "<locals>" not in plain.__qualname__
    return plain.__qualname__ if known else None


@dataclass(frozen=True)
class Potential:
    """A potential: ``value(x)`` of an array [d], and ``gradient(x, out)`` that fills ``out`` [d].

    Both must be numba functions or plain functions that numba can compile.

    >>> well = Potential.one_dimensional(lambda x: x**2 / 2, lambda x: x)
    >>> well.value(np.array([2.0]))
    2.0
    """

    value: Callable[[Array], float]
    gradient: Callable[[Array, Array], None]

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", compiled(self.value))
        object.__setattr__(self, "gradient", compiled(self.gradient))

    @classmethod
    def one_dimensional(cls, value: Callable[[float], float], slope: Callable[[float], float]) -> Potential:
        """From two functions of one number: the potential and its derivative."""
        scalar, derivative = compiled(value), compiled(slope)

        @njit
        def array_value(x: Array) -> float:
            return scalar(x[0])

        @njit
        def array_gradient(x: Array, out: Array) -> None:
            out[0] = derivative(x[0])

        return cls(array_value, array_gradient)

    @classmethod
    def named(cls, name: str | Potential) -> Potential:
        """One of :data:`POTENTIALS` by name; a potential passes through.

        Raises:
            DataError: no such name.
        """
        if isinstance(name, Potential):
            return name
        if name not in POTENTIALS:
            raise DataError(f"there is no potential {name!r}", expected=f"one of {sorted(POTENTIALS)}")
        return POTENTIALS[name]


@njit(cache=True)
def _quadratic(x: Array) -> float:
    return 0.5 * np.sum(x * x)


@njit(cache=True)
def _quadratic_gradient(x: Array, out: Array) -> None:
    for i in range(x.size):
        out[i] = x[i]


@njit(cache=True)
def _double_well(x: Array) -> float:
    """x^4/4 - x^2/2 along the first coordinate, quadratic in the others: minima at -1 and 1, barrier 1/4."""
    total = x[0] ** 4 / 4 - x[0] ** 2 / 2
    for i in range(1, x.size):
        total += 0.5 * x[i] * x[i]
    return total


@njit(cache=True)
def _double_well_gradient(x: Array, out: Array) -> None:
    out[0] = x[0] * x[0] * x[0] - x[0]
    for i in range(1, x.size):
        out[i] = x[i]


@njit(cache=True)
def _styblinski_tang(x: Array) -> float:
    total = 0.0
    for i in range(x.size):
        total += 0.5 * (x[i] ** 4 - 16 * x[i] ** 2 + 5 * x[i])
    return total


@njit(cache=True)
def _styblinski_tang_gradient(x: Array, out: Array) -> None:
    for i in range(x.size):
        out[i] = 2 * x[i] ** 3 - 16 * x[i] + 2.5


@njit(cache=True)
def _valley(x: Array) -> float:
    """Yang, Tang & Tu (2023): (1 + x_0^2) x_1^2 / 2, a line of minima whose curvature grows away from the origin."""
    return 0.5 * (1 + x[0] * x[0]) * x[1] * x[1]


@njit(cache=True)
def _valley_gradient(x: Array, out: Array) -> None:
    out[0] = x[0] * x[1] * x[1]
    out[1] = (1 + x[0] * x[0]) * x[1]


POTENTIALS: dict[str, Potential] = {
    "quadratic": Potential(_quadratic, _quadratic_gradient),
    "double-well": Potential(_double_well, _double_well_gradient),
    "styblinski-tang": Potential(_styblinski_tang, _styblinski_tang_gradient),
    "valley": Potential(_valley, _valley_gradient),
}
