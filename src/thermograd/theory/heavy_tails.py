r"""Exit under heavy-tailed (Levy) noise, which jumps over barriers instead of climbing them.

:math:`d\theta=-L'dt+\epsilon\,dL^\alpha` with symmetric alpha-stable increments,
:math:`E\,e^{iqL^\alpha_t}=e^{-t|q|^\alpha}`. From the Levy measure (Imkeller & Pavlyukevich 2006; for SGD: Simsekli et
al. 2019, Nguyen et al. 2019).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import gamma as gamma_function

from ..errors import DataError
from .arrays import Array, finite

__all__ = ["levy_exit_time", "levy_jump_constant"]


def levy_jump_constant(alpha: ArrayLike) -> Array:
    r"""Density of large jumps, :math:`c_\alpha|x|^{-1-\alpha}`, :math:`c_\alpha=\Gamma(1+\alpha)\sin(\pi\alpha/2)/\pi`.

    Args:
        alpha: tail index in (0, 2], any shape; at 2 (Gaussian) there are no jumps and it is zero.

    Returns:
        Same shape.

    Raises:
        DataError: alpha outside (0, 2].

    >>> float(levy_jump_constant(1.0).round(6))  # Cauchy: 1 / pi
    0.31831
    """
    index = finite(alpha, "alpha")
    if np.any((index <= 0) | (index > 2)):
        raise DataError(f"alpha is {index}", expected="a tail index in (0, 2]")
    return np.where(index == 2, 0.0, gamma_function(1 + index) * np.sin(np.pi * index / 2) / np.pi)


def levy_exit_time(
    half_width: ArrayLike, scale: ArrayLike, alpha: ArrayLike, *, right_width: ArrayLike | None = None
) -> Array:
    r"""Mean time to leave a valley by one jump, :math:`\tau=\frac{\alpha a^\alpha}{2c_\alpha\epsilon^\alpha}`.

    Polynomial in the width a and independent of the height of the barrier, at small :math:`\epsilon`. Ends at
    distances a (left) and b (right): rates add,
    :math:`\tau^{-1}=c_\alpha\epsilon^\alpha(a^{-\alpha}+b^{-\alpha})/\alpha`. Independent coordinates add their rates
    as well (:func:`thermograd.theory.paths.total_rate`), so that those with heavier tails are the way out (Battash &
    Lindenbaum 2023).

    Args:
        half_width: distance a from the minimum to the left end, > 0.
        scale: epsilon > 0.
        alpha: tail index in (0, 2).
        right_width: distance to the right end; the same by default, infinite for no end there.

    Returns:
        In units of t, broadcast over the arguments.

    Raises:
        DataError: an argument out of range; alpha = 2 has no jumps (use :mod:`~thermograd.theory.kramers`).

    >>> float(levy_exit_time(1.0, 0.01, 1.0).round(2))  # Cauchy: pi a / (2 epsilon)
    157.08
    """
    left, eps, index = finite(half_width, "half_width"), finite(scale, "scale"), finite(alpha, "alpha")
    right = left if right_width is None else np.asarray(right_width, dtype=np.float64)
    if np.any(left <= 0) or np.any(eps <= 0) or np.any(np.isnan(right) | (right <= 0)):
        raise DataError("a width or the scale is not positive", expected="numbers > 0")
    if np.any(index >= 2):
        raise DataError(
            "alpha = 2 is Gaussian noise, which does not jump",
            expected="a tail index in (0, 2)",
            remedy="use theory.kramers",
        )
    rate = levy_jump_constant(index) / index * ((eps / left) ** index + (eps / right) ** index)
    return 1 / rate
