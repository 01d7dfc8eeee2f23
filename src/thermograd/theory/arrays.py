"""How the closed forms read their arguments: one-dimensional float64 arrays of modes, all finite."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DataError, NonFiniteError

__all__ = ["Array", "as_modes", "as_steps", "finite"]

Array = NDArray[np.float64]


def finite(value: ArrayLike | Any, name: str) -> Array:
    """``value`` as a float64 array, refused when it holds a NaN or an infinity.

    Args:
        value: a number, list, numpy array or torch CPU tensor.
        name: what to call it in the error.

    Raises:
        NonFiniteError: a NaN or an infinity.

    >>> finite([1, 2], "curvature")
    array([1., 2.])
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    array = np.asarray(value, dtype=np.float64)
    if not np.all(np.isfinite(array)):
        bad = int(np.count_nonzero(~np.isfinite(array)))
        raise NonFiniteError(
            f"{name} holds {bad} value(s) that are NaN or infinite",
            expected="finite numbers",
            remedy="look for the divergence or the failed measurement that made them",
        )
    return array


def as_modes(curvature: ArrayLike, noise_variance: ArrayLike = 1.0) -> tuple[Array, Array]:
    """Curvature and minibatch-gradient variance, broadcast to one common length ``[n]``.

    Raises:
        NonFiniteError: a NaN or an infinity.
        DataError: more than one dimension, lengths that do not fit, or a negative variance.

    >>> as_modes([1.0, 2.0], 3.0)
    (array([1., 2.]), array([3., 3.]))
    """
    h = np.atleast_1d(finite(curvature, "curvature"))
    s = np.atleast_1d(finite(noise_variance, "noise_variance"))
    if h.ndim > 1 or s.ndim > 1 or (h.size != s.size and 1 not in (h.size, s.size)):
        raise DataError(
            f"curvature has shape {h.shape} and noise_variance {s.shape}",
            expected="one value a mode in each (or a single number)",
        )
    if np.any(s < 0):
        raise DataError(f"noise_variance is negative ({s.min():g})", expected="variances >= 0")
    h, s = np.broadcast_arrays(h, s)
    return h.copy(), s.copy()


def as_steps(steps: ArrayLike, name: str = "steps") -> NDArray[np.int64]:
    """Numbers of optimizer steps as whole numbers >= 0, shape ``[t]``.

    Raises:
        NonFiniteError: a NaN or an infinity.
        DataError: a negative number or a fraction.

    >>> as_steps([0, 10.0])
    array([ 0, 10])
    """
    array = np.atleast_1d(finite(steps, name))
    if array.ndim > 1 or np.any(array < 0) or np.any(array != np.floor(array)):
        raise DataError(f"{name} is {steps!r}", expected="whole numbers of optimizer steps, 0 or more")
    return array.astype(np.int64)
