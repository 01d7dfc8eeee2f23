"""The random numbers of a replica, keyed by (seed, replica), as numba functions.

No draw depends on threads or on other replicas. A replica in a lane has xoshiro128++ (four 32-bit words) and normal
numbers by Box and Muller with polynomial logarithm, sine and cosine, all of which the compiler turns into vector
instructions; a replica on its own has xoshiro256++.
"""

# mypy: disable-error-code="call-arg,var-annotated,return-value"
from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .lanes import bits, bits_to_float, fma

__all__ = [
    "Buffer",
    "advance",
    "begin_order",
    "below",
    "below_word",
    "circle32",
    "circle64",
    "exponential32",
    "exponential64",
    "lane_seed",
    "normal",
    "seeded",
    "uniform",
]

Buffer = NDArray[Any]  # an array inside a kernel, of floats, whole numbers or generator words
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_U32 = np.uint64(32)
_S7, _S9, _S11, _S21, _S25 = (np.uint32(shift) for shift in (7, 9, 11, 21, 25))


def _single(*numbers: float) -> tuple[Any, ...]:
    return tuple(np.float32(number) for number in numbers)


# Chebyshev fits. (log(1+f) - f + f^2/2) / f^3 on [2^-1/2 - 1, 2^1/2 - 1], error of the logarithm 5e-8;
# sin(pi t)/t and cos(pi t) in t^2 on [0, 1/4], errors 1e-8 and 5e-8
_LOG32 = _single(0.3333341, -0.25000922, 0.19985134, -0.16592851, 0.14676314, -0.1411846, 0.09272538)
_SIN32 = _single(3.14159264, -5.16771008, 2.55007752, -0.59829129, 0.07765766)
_COS32 = _single(0.99999995, -4.93479283, 4.05841135, -1.33187657, 0.21968961)
# fdlibm's coefficients of the logarithm; Taylor series of sine and cosine, last term below 1e-17
_LOG64 = (
    6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01,
    1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01,
)  # fmt: skip
_SIN64 = tuple((-1) ** k * math.pi ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(11))
_COS64 = tuple((-1) ** k * math.pi ** (2 * k) / math.factorial(2 * k) for k in range(11))


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


# ---------------------------------------------------------------- lanes: 32-bit words, normals by polynomials


@njit(error_model="numpy", cache=True)
def lane_seed(seed: int, replica: int) -> tuple[Any, Any, Any, Any]:
    """The xoshiro128++ state of one replica in a lane: four 32-bit words keyed by (seed, replica)."""
    key = _splitmix(np.uint64(seed) + _GOLDEN) ^ _splitmix(np.uint64(replica) * _GOLDEN + _MIX1)
    one, two = _splitmix(key + _GOLDEN), _splitmix(key + np.uint64(2) * _GOLDEN)
    low = np.uint64(0xFFFFFFFF)
    return np.uint32(one & low), np.uint32(one >> _U32), np.uint32(two & low), np.uint32((two >> _U32) | np.uint64(1))


@njit(error_model="numpy", cache=True)
def advance(a: Any, b: Any, c: Any, d: Any) -> tuple[Any, Any, Any, Any, Any]:
    """One step of xoshiro128++ (Blackman and Vigna 2021): the next word and the new state."""
    total = np.uint32(a + d)
    word = np.uint32(((total << _S7) | (total >> _S25)) + a)
    shifted = np.uint32(b << _S9)
    c ^= a
    d ^= b
    b ^= c
    a ^= d
    c ^= shifted
    d = np.uint32((d << _S11) | (d >> _S21))
    return word, a, b, c, d


@njit(error_model="numpy", cache=True)
def below_word(word: Any, size: Any) -> Any:
    """A whole number in [0, size), size < 2**32, of one word by multiply and shift (bias below size / 2**32)."""
    return np.uint32((np.uint64(word) * np.uint64(size)) >> _U32)


@njit(error_model="numpy", cache=True)
def exponential32(word: Any) -> Any:
    """A standard exponential number in single precision, -log u with u = (31 bits + 1/2) / 2**31; at most 22.2."""
    u = (np.float32(np.int32(word >> np.uint32(1))) + np.float32(0.5)) * np.float32(2.0**-31)
    word = bits(u)
    power = np.int32(word - np.uint32(0x3F3504F3)) >> np.int32(23)
    f = bits_to_float(np.uint32(word - (np.uint32(power) << np.uint32(23)))) - np.float32(1.0)
    p = fma(_LOG32[6], f, _LOG32[5])
    p = fma(p, f, _LOG32[4])
    p = fma(p, f, _LOG32[3])
    p = fma(p, f, _LOG32[2])
    p = fma(p, f, _LOG32[1])
    p = fma(p, f, _LOG32[0])
    square = f * f
    log = fma(p * square, f, fma(np.float32(-0.5), square, f))
    return max(-fma(np.float32(power), np.float32(0.6931471805599453), log), np.float32(0.0))


@njit(error_model="numpy", cache=True)
def exponential64(high: Any, low: Any) -> Any:
    """A standard exponential number in double precision, -log u with 52 random bits (fdlibm's polynomial)."""
    word = (np.uint64(high) << np.uint64(20)) ^ (np.uint64(low) >> np.uint64(12))
    u = bits_to_float(word | np.uint64(0x3FF0000000000000)) - (1.0 - 2.0**-53)
    word = bits(u)
    raised = word + np.uint64(0x3FF0000000000000 - 0x3FE6A09E00000000)
    power = np.int32(raised >> np.uint64(52)) - np.int32(1023)
    f = bits_to_float((raised & np.uint64(0x000FFFFFFFFFFFFF)) + np.uint64(0x3FE6A09E00000000)) - 1.0
    s = f / (2.0 + f)
    z = s * s
    p = fma(_LOG64[6], z, _LOG64[5])
    p = fma(p, z, _LOG64[4])
    p = fma(p, z, _LOG64[3])
    p = fma(p, z, _LOG64[2])
    p = fma(p, z, _LOG64[1])
    p = fma(p, z, _LOG64[0])
    half = 0.5 * f * f
    log = f - (half - s * fma(p, z, half))
    return max(-fma(np.float64(power), 0.6931471805599453, log), 0.0)


@njit(error_model="numpy", cache=True)
def circle32(word: Any) -> tuple[Any, Any]:
    """A uniform point on the unit circle in single precision: 31 bits of angle in a half, one bit for which half."""
    t = np.float32(np.int32(np.uint32(word << np.uint32(1)))) * np.float32(2.0**-32)
    z = t * t
    s = fma(_SIN32[4], z, _SIN32[3])
    s = fma(s, z, _SIN32[2])
    s = fma(s, z, _SIN32[1])
    s = fma(s, z, _SIN32[0]) * t
    c = fma(_COS32[4], z, _COS32[3])
    c = fma(c, z, _COS32[2])
    c = fma(c, z, _COS32[1])
    c = fma(c, z, _COS32[0])
    return bits_to_float(np.uint32(bits(c) ^ (word & np.uint32(0x80000000)))), s


@njit(error_model="numpy", cache=True)
def circle64(word: Any) -> tuple[Any, Any]:
    """A uniform point on the unit circle in double precision."""
    t = (np.float64(np.int32(np.uint32(word << np.uint32(1)))) + 1.0) * 2.0**-32
    z = t * t
    s = fma(_SIN64[10], z, _SIN64[9])
    c = fma(_COS64[10], z, _COS64[9])
    s, c = fma(s, z, _SIN64[8]), fma(c, z, _COS64[8])
    s, c = fma(s, z, _SIN64[7]), fma(c, z, _COS64[7])
    s, c = fma(s, z, _SIN64[6]), fma(c, z, _COS64[6])
    s, c = fma(s, z, _SIN64[5]), fma(c, z, _COS64[5])
    s, c = fma(s, z, _SIN64[4]), fma(c, z, _COS64[4])
    s, c = fma(s, z, _SIN64[3]), fma(c, z, _COS64[3])
    s, c = fma(s, z, _SIN64[2]), fma(c, z, _COS64[2])
    s, c = fma(s, z, _SIN64[1]), fma(c, z, _COS64[1])
    s, c = fma(s, z, _SIN64[0]) * t, fma(c, z, _COS64[0])
    return bits_to_float(bits(c) ^ (np.uint64(word & np.uint32(0x80000000)) << _U32)), s


@njit(error_model="numpy", cache=True)
def begin_order(
    order: Buffer, s0: Buffer, s1: Buffer, s2: Buffer, s3: Buffer, lane: int, batch: int, usable: int, phase: bool
) -> int:
    """A first permutation drawn from the words of a lane, and where in its epoch the replica begins."""
    a, b, c, d = s0[lane], s1[lane], s2[lane], s3[lane]
    for i in range(order.size):
        order[i] = i
    for i in range(order.size - 1, 0, -1):
        word, a, b, c, d = advance(a, b, c, d)
        j = np.int64(below_word(word, np.uint32(i + 1)))
        order[i], order[j] = order[j], order[i]
    word, a, b, c, d = advance(a, b, c, d)
    s0[lane], s1[lane], s2[lane], s3[lane] = a, b, c, d
    return batch * np.int64(below_word(word, np.uint32(-(-usable // batch)))) if phase else 0
