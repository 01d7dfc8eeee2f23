"""Taking the mean or the straight line out of time series."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from ..errors import InputError

__all__ = ["Detrend", "detrended"]

Detrend = Literal["linear", "constant", "none"]


def detrended(series: np.ndarray, kind: Detrend) -> np.ndarray:
    """Time series [T, k] less their mean ("none", "constant"), or less their least-squares line.

    >>> np.abs(detrended(np.arange(5.0)[:, None], "linear")).max() < 1e-12
    np.True_
    """
    if kind not in get_args(Detrend):
        raise InputError(f"detrend is {kind!r}", expected="'linear', 'constant' or 'none'")
    centred = series - series.mean(axis=0)
    if kind != "linear":
        return centred
    time = np.arange(len(series)) - (len(series) - 1) / 2
    return centred - np.outer(time, time @ centred / (time @ time))
