"""The random numbers of a replica: xoshiro256++ keyed by (seed, replica), as numba functions.

The state is an array of four uint64 that belongs to one replica, so no draw depends on threads or on other replicas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["Buffer", "below", "normal", "seeded", "uniform"]

Buffer = NDArray[Any]  # an array inside a kernel, of floats, whole numbers or generator words
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


@njit(cache=True)
def _splitmix(x: np.uint64) -> np.uint64:
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


@njit(cache=True)
def seeded(seed: int, replica: int) -> Buffer:
    """The generator of one replica."""
    state = np.empty(4, np.uint64)
    key = _splitmix(np.uint64(seed) + _GOLDEN) ^ _splitmix(np.uint64(replica) * _GOLDEN + _MIX1)
    for i in range(4):
        key += _GOLDEN
        state[i] = _splitmix(key)
    return state


@njit(cache=True)
def _next(state: Buffer) -> np.uint64:
    total = state[0] + state[3]
    result = ((total << np.uint64(23)) | (total >> np.uint64(41))) + state[0]
    shifted = state[1] << np.uint64(17)
    state[2] ^= state[0]
    state[3] ^= state[1]
    state[1] ^= state[2]
    state[0] ^= state[3]
    state[2] ^= shifted
    state[3] = (state[3] << np.uint64(45)) | (state[3] >> np.uint64(19))
    return result


@njit(cache=True)
def uniform(state: Buffer) -> float:
    """A number in [0, 1), 53 bits."""
    return np.float64(_next(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(cache=True)
def below(state: Buffer, size: int) -> Any:
    """A whole number in [0, size), size < 2**32, by multiply and shift (bias below size / 2**32)."""
    return np.int64(((_next(state) >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32))


@njit(cache=True)
def normal(state: Buffer) -> float:
    """A standard normal number (Marsaglia's polar method, one of the pair kept)."""
    while True:
        a = 2.0 * uniform(state) - 1.0
        b = 2.0 * uniform(state) - 1.0
        square = a * a + b * b
        if 0.0 < square < 1.0:
            return a * np.sqrt(-2.0 * np.log(square) / square)
