r"""Second moments of SGD along its modes at every step of an epoch, from any start, for each sampling scheme.

A mode of curvature h moves by

.. math:: u_{k+1} = \beta u_k - (1-\tau)(h\theta_k + \xi_k), \qquad \theta_{k+1} = \theta_k + \eta u_{k+1}.

Within an epoch of batches without repetition the noise remembers what is left: after K samples were used, with
:math:`r = -\sum_i n_i\xi_i` the sum still to come, the next batch of n samples has

.. math::
    E[\xi\,|\,r] = \frac{r}{N-K}, \qquad
    \mathrm{Var}[\xi\,|\,r] = \frac{\sigma^2}{N-1}\Big(\frac{N-n}{n} - \frac{K}{N-K}\Big)

(derived: all pairs of samples are equally correlated, :math:`-\sigma^2/(N-1)`; short last batches included). With r as
a third coordinate the second moments follow a linear recursion that is exact at every step, not only on average over
the epoch. Noise that is drawn anew every step ("white") is added to it: that is what weight-dependent noise adds whose
weights change faster than an epoch.
"""

# mypy: disable-error-code="untyped-decorator"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError, NotAvailableError, UnstableError
from ..hyperparameters import SGD
from ..theory.arrays import Array, as_modes, each
from ..theory.stability import largest_stable_curvature

__all__ = ["BlockMoments", "block_moments", "epoch_batches", "epoch_profile"]

_SETTLED = 1e-9  # relative change of the second moments over an epoch at which they have settled
_HUGE = 1e200  # a second moment beyond which the mode counts as diverged


@dataclass(frozen=True)
class BlockMoments:
    """Moments averaged over blocks of steps; infinite in modes that diverge.

    ``position`` is the mean square of the position (the square of its mean included), ``mean_square`` the square of
    the mean alone, ``velocity`` the mean squared move of a step over the learning rate: all [blocks, n].
    """

    edges: NDArray[np.int64]
    position: Array
    mean_square: Array
    velocity: Array


def epoch_batches(sgd: SGD, *, drop_last: bool = False) -> NDArray[np.int64]:
    """Sizes of the minibatches of one epoch; a single one where every draw is independent.

    >>> epoch_batches(SGD(lr=1, batch_size=4, dataset_size=10)).tolist()
    [4, 4, 2]
    """
    batch = sgd._needed("batch_size")
    if sgd.sampling == "replacement":
        return np.array([batch])
    size = sgd._needed("dataset_size")
    whole, rest = divmod(size, batch)
    return np.array([batch] * whole + ([rest] if rest and not drop_last else []), dtype=np.int64)


def block_moments(
    sgd: SGD,
    curvature: ArrayLike,
    sample_variance: ArrayLike,
    edges: ArrayLike,
    *,
    white: ArrayLike = 0.0,
    position: ArrayLike = 0.0,
    velocity: ArrayLike = 0.0,
    drop_last: bool = False,
) -> BlockMoments:
    """Exact second moments of each mode from a sharp start, averaged over blocks of steps.

    Args:
        sgd: hyperparameters with a batch size; ``sampling`` "replacement" or "reshuffle".
        curvature: Hessian eigenvalues without weight decay, [n]; any sign.
        sample_variance: variance over samples of the gradient along the mode, divisor N, [n].
        edges: increasing step numbers [m + 1]; block i is the steps after ``edges[i]`` up to ``edges[i + 1]``. The
            first step of training is step 1, at the beginning of an epoch.
        white: further variance over samples that is drawn anew each step, scalar or [n].
        position: offset from the minimum at step 0, scalar or [n].
        velocity: minus the momentum buffer at step 0, scalar or [n].
        drop_last: whether a short last batch is dropped.

    Returns:
        Averages [m, n].

    Raises:
        InputError: edges that do not increase. NotAvailableError: one order repeated every epoch.

    >>> sgd = SGD(lr=0.1, momentum=0.9, batch_size=1, sampling="replacement")
    >>> block_moments(sgd, [1.0], [1.0], [5000, 5001]).position.round(6)
    array([[0.513514]])
    """
    _refuse_one_order(sgd)
    h, s = as_modes(curvature, sample_variance)
    n = h.size
    at = np.asarray(edges, dtype=np.int64)
    if at.ndim != 1 or len(at) < 2 or at[0] < 0 or np.any(np.diff(at) <= 0):
        raise InputError(f"edges are {edges!r}", expected="at least two increasing step numbers >= 0")
    batch, rates, move = _facts(sgd, drop_last)
    out = np.zeros((3, len(at) - 1, n))
    _iterate(
        out, h + sgd.weight_decay, s, each(white, n, "white"), each(position, n, "position"),
        each(velocity, n, "velocity"), at, batch, rates, move,
    )  # fmt: skip
    return BlockMoments(at, out[0], out[1], out[2])


def epoch_profile(
    sgd: SGD, curvature: ArrayLike, sample_variance: ArrayLike, *, white: ArrayLike = 0.0, drop_last: bool = False
) -> Array:
    r"""Stationary mean square of each mode after every step of an epoch, [batches, n].

    Reshuffled epochs end where the noise of their batches has cancelled, so that the weights spread more in the middle
    of an epoch than at its ends. Exact: the second moments at the start of an epoch solve
    :math:`m = A m + b`, where A and b are what an epoch does to them.

    Args:
        sgd: hyperparameters with a batch size; ``sampling`` "replacement" (a single row) or "reshuffle".
        curvature: Hessian eigenvalues without weight decay, [n].
        sample_variance: variance over samples of the gradient along the mode, divisor N, [n].
        white: further variance over samples that is drawn anew each step, scalar or [n].
        drop_last: whether a short last batch is dropped.

    Raises:
        NotAvailableError: one order repeated every epoch. UnstableError: a mode has no stationary state.

    >>> epoch_profile(SGD(lr=0.1, batch_size=2, dataset_size=4), [1.0], [1.0]).round(5)
    array([[0.00341],
           [0.0001 ]])
    """
    _refuse_one_order(sgd)
    h, s = as_modes(curvature, sample_variance)
    pull = h + sgd.weight_decay
    if np.any(pull <= 0) or np.any(h > largest_stable_curvature(sgd)):
        raise UnstableError(
            f"curvatures from {h.min():.3g} to {h.max():.3g} have no stationary state at this learning rate",
            expected="curvatures above minus the weight decay and below the stability bound",
        )
    batch, rates, move = _facts(sgd, drop_last)
    squares, ends = np.empty((len(batch), h.size)), np.empty((4, h.size, 3))
    starts = np.zeros((4, h.size, 3))
    for k in range(3):
        starts[k + 1, :, k] = 1.0
    noise = (s, each(white, h.size, "white"), batch, rates, move)
    for end, start in zip(ends, starts, strict=True):  # an epoch is linear: read it off the origin and unit vectors
        _walk_an_epoch(squares, end, start, pull, *noise)
    through = np.eye(3) - np.moveaxis(ends[1:] - ends[0], 0, 2)  # [n, 3, 3]
    _walk_an_epoch(squares, ends[0].copy(), np.linalg.solve(through, ends[0][..., None])[..., 0], pull, *noise)
    return squares


def _refuse_one_order(sgd: SGD) -> None:
    if sgd.sampling == "shuffle-once":
        raise NotAvailableError(
            "with one order repeated every epoch each run settles on a cycle of its own",
            remedy="use theory.sampling, which averages over permutations",
        )


def _facts(sgd: SGD, drop_last: bool) -> tuple[Array, Array, Array]:
    """What a step needs: the batches of an epoch [batches, 4], the rates, and v = v_theta theta + v_u u + v_xi xi."""
    sizes = epoch_batches(sgd, drop_last=drop_last)
    samples = 0 if sgd.sampling == "replacement" else sgd._needed("dataset_size")
    gain, beta = 1 - sgd.dampening, sgd.momentum
    move = (-(1 + beta), beta**2, -(1 + beta)) if sgd.nesterov else (-gain, beta, -gain)
    batch = np.stack([*_noise(sizes, samples), sizes.astype(float)], axis=1)
    return batch, np.array([sgd.lr, beta, gain]), np.array(move)


def _noise(sizes: NDArray[np.int64], samples: int) -> tuple[Array, Array, Array]:
    """For each batch of an epoch, at unit variance: weight of r in its mean, variance about that, variance in all."""
    if samples == 0:
        one = 1.0 / sizes
        return np.zeros(len(sizes)), one, one
    used = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(float)
    left = samples - used
    drawn = (samples - sizes) / (sizes * max(samples - 1.0, 1.0))
    fresh = np.maximum(drawn - used / (left * max(samples - 1.0, 1.0)), 0.0)
    return 1 / left, fresh, drawn


@njit(cache=True, error_model="numpy")
def _step(state: Any, h: float, sample: float, white: float, batch: Any, rates: Any, move: Any) -> Any:
    """One step of the second moments (tt, tu, uu, tr, ur, rr); also the mean squared move over the learning rate.

    ``batch``: weight of r in the mean of the noise, its variance about that, its variance in all, and the size of the
    batch, at unit variance over samples; ``rates``: learning rate, momentum and one less the dampening.
    """
    tt, tu, uu, tr, ur, rr = state
    a, fresh, drawn, n = batch
    lr, beta, gain = rates
    # noise xi = a r + iota; one step of (theta, u, r) is A x + B iota
    extra, q = white * drawn, sample * fresh
    vt, vu, vx = move[0] * h, move[1], move[2]
    ut, ux = -gain * h, -gain
    # moments of v = vt theta + vu u + vx (a r + iota + w)
    vr = vx * a
    vv = (
        vt * vt * tt + vu * vu * uu + vr * vr * rr + 2 * (vt * vu * tu + vt * vr * tr + vu * vr * ur)
        + vx * vx * (q + extra)
    )  # fmt: skip
    wr = ux * a
    new_uu = (
        ut * ut * tt + beta * beta * uu + wr * wr * rr
        + 2 * (ut * beta * tu + ut * wr * tr + beta * wr * ur) + ux * ux * (q + extra)
    )  # fmt: skip
    pt, pu, pr, px = 1 + lr * vt, lr * vu, lr * vr, lr * vx
    new_tt = (
        pt * pt * tt + pu * pu * uu + pr * pr * rr + 2 * (pt * pu * tu + pt * pr * tr + pu * pr * ur)
        + px * px * (q + extra)
    )  # fmt: skip
    new_tu = (
        pt * ut * tt + pu * beta * uu + pr * wr * rr + (pt * beta + pu * ut) * tu + (pt * wr + pr * ut) * tr
        + (pu * wr + pr * beta) * ur + px * ux * (q + extra)
    )  # fmt: skip
    stay = 1 - n * a
    new_tr = stay * (pt * tr + pu * ur + pr * rr) - n * px * q
    new_ur = stay * (ut * tr + beta * ur + wr * rr) - n * ux * q
    new_rr = stay * stay * rr + n * n * q
    return (new_tt, new_tu, new_uu, new_tr, new_ur, new_rr), vv


@njit(cache=True, error_model="numpy")
def _iterate(
    out: Any, pull: Any, sample: Any, white: Any, position: Any, velocity: Any, edges: Any, batch: Any, rates: Any,
    move: Any,
) -> None:  # fmt: skip
    """Fill ``out`` [3, blocks, n]; each mode on its own, step by step, until its epochs repeat."""
    batches, blocks = len(batch), len(edges) - 1
    lr, beta, gain = rates
    for i in range(len(pull)):
        h = pull[i]
        mt, mu = position[i], velocity[i]
        state = (mt * mt, mt * mu, mu * mu, 0.0, 0.0, 0.0)
        before_tt, before_uu = -1.0, -1.0
        block, k, settled = 0, 0, False
        while block < blocks and not settled:
            epoch_p = epoch_m = epoch_v = 0.0
            for b in range(batches):
                state, vv = _step(state, h, sample[i], white[i], batch[b], rates, move)
                mv = move[0] * h * mt + move[1] * mu
                mu = -gain * h * mt + beta * mu
                mt = mt + lr * mv
                tt = state[0]
                k += 1
                epoch_p += tt
                epoch_m += mt * mt
                epoch_v += vv
                if edges[block] < k <= edges[block + 1]:
                    out[0, block, i] += tt
                    out[1, block, i] += mt * mt
                    out[2, block, i] += vv
                if k == edges[block + 1]:
                    for kind in range(3):
                        out[kind, block, i] /= edges[block + 1] - edges[block]
                    block += 1
                    if block == blocks:
                        break
            if block == blocks:
                break
            tt, uu = state[0], state[2]
            state = (tt, state[1], uu, 0.0, 0.0, 0.0)  # the epoch is over: nothing is left to come
            if not tt < _HUGE:
                out[:, block:, i] = np.inf
                break
            if abs(tt - before_tt) <= _SETTLED * tt and abs(uu - before_uu) <= _SETTLED * uu:
                # epochs repeat from here on: every later block is the mean of an epoch
                settled = True
                means = (epoch_p / batches, epoch_m / batches, epoch_v / batches)
                span = edges[block + 1] - edges[block]
                left = edges[block + 1] - max(k, edges[block])
                for kind in range(3):
                    out[kind, block, i] = (out[kind, block, i] + left * means[kind]) / span
                    out[kind, block + 1 :, i] = means[kind]
            before_tt, before_uu = tt, uu


@njit(cache=True, error_model="numpy")
def _walk_an_epoch(
    squares: Any, ends: Any, starts: Any, pull: Any, sample: Any, white: Any, batch: Any, rates: Any, move: Any
) -> None:
    """From the moments (tt, tu, uu) ``starts`` [n, 3]: tt after each step [batches, n], all three at the end [n, 3]."""
    for i in range(len(pull)):
        state = (starts[i, 0], starts[i, 1], starts[i, 2], 0.0, 0.0, 0.0)
        for b in range(len(batch)):
            state, _ = _step(state, pull[i], sample[i], white[i], batch[b], rates, move)
            squares[b, i] = state[0]
        ends[i, 0], ends[i, 1], ends[i, 2] = state[0], state[1], state[2]
