"""Replicas of minibatch SGD on a quadratic loss and on linear regression, drawn as a ``DataLoader`` draws."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike

from ..errors import DataError
from ..hyperparameters import SGD
from ..theory.arrays import Array, finite
from .blocks import check_counts, check_finite, run_blocks
from .ensemble import Ensemble
from .generator import Buffer, below, seeded

__all__ = ["linear_regression_sgd", "quadratic_sgd"]

SCHEMES = {"replacement": 0, "reshuffle": 1, "shuffle-once": 2}


@njit(cache=True)
def shuffle(order: Buffer, state: Buffer) -> None:
    """Fisher-Yates in place."""
    for i in range(order.size - 1, 0, -1):
        j = below(state, i + 1)
        order[i], order[j] = order[j], order[i]


@njit(cache=True)
def start_order(order: Buffer, state: Buffer, scheme: int, batch: int, usable: int, random_phase: bool) -> int:
    """A first permutation, and where in its epoch the replica begins."""
    for i in range(order.size):
        order[i] = i
    if scheme == 0:
        return 0
    shuffle(order, state)
    return batch * below(state, -(-usable // batch)) if random_phase else 0


@njit(cache=True)
def draw(
    chosen: Buffer, order: Buffer, at: int, state: Buffer, scheme: int, batch: int, usable: int
) -> tuple[int, int]:
    """Fill ``chosen`` with the next minibatch; return its size and where the epoch stands after it."""
    if scheme == 0:
        for j in range(batch):
            chosen[j] = below(state, order.size)
        return batch, 0
    if at >= usable:
        at = 0
        if scheme == 1:
            shuffle(order, state)
    size = min(batch, usable - at)
    for j in range(size):
        chosen[j] = order[at + j]
    return size, at + size


@njit(cache=True)
def move(
    theta: Buffer, buffer: Buffer, gradient: Buffer, before: Buffer,
    lr: float, beta: float, decay: float, gain: float, nesterov: bool,
) -> None:  # fmt: skip
    """One step of torch's SGD in place; ``before`` keeps the old weights."""
    for i in range(theta.size):
        before[i] = theta[i]
        g = gradient[i] + decay * theta[i]
        buffer[i] = beta * buffer[i] + gain * g
        theta[i] -= lr * (g + beta * buffer[i] if nesterov else buffer[i])


@njit(cache=True)
def regression_gradient(X: Buffer, y: Buffer, theta: Buffer, chosen: Buffer, size: int, out: Buffer) -> None:
    """Gradient of the mean of (x.theta - y)^2 / 2 over the minibatch."""
    out[:] = 0.0
    for j in range(size):
        row = X[chosen[j]]
        residual = -y[chosen[j]]
        for i in range(theta.size):
            residual += row[i] * theta[i]
        for i in range(theta.size):
            out[i] += residual * row[i]
    for i in range(theta.size):
        out[i] /= size


@njit(cache=True)
def quadratic_gradient(h: Buffer, offsets: Buffer, theta: Buffer, chosen: Buffer, size: int, out: Buffer) -> None:
    """Gradient h * theta plus the mean offset of the minibatch."""
    out[:] = 0.0
    for j in range(size):
        row = offsets[chosen[j]]
        for i in range(theta.size):
            out[i] += row[i]
    for i in range(theta.size):
        out[i] = h[i] * theta[i] + out[i] / size


@njit(cache=True, nogil=True)
def _run(
    regression: bool, X: Buffer, y: Buffer, start: Buffer, start_velocity: Buffer,
    lr: float, beta: float, decay: float, gain: float, nesterov: bool,
    batch: int, scheme: int, usable: int, random_phase: bool,
    burn_in: int, every: int, seed: int, first: int, position: Buffer, velocity: Buffer,
) -> None:  # fmt: skip
    size_n, d = X.shape
    chosen = np.empty(batch, np.int64)
    order = np.empty(size_n, np.int64)
    theta, buffer, gradient, before = np.empty(d), np.empty(d), np.empty(d), np.empty(d)
    for r in range(position.shape[0]):
        state = seeded(seed, first + r)
        at = start_order(order, state, scheme, batch, usable, random_phase)
        theta[:] = start[r]
        buffer[:] = -start_velocity[r]
        before[:] = theta - lr * start_velocity[r]
        last = burn_in + every * (position.shape[1] - 1)
        for k in range(last + 1):
            if k >= burn_in and (k - burn_in) % every == 0:
                row = (k - burn_in) // every
                for i in range(d):
                    position[r, row, i] = theta[i]
                    velocity[r, row, i] = (theta[i] - before[i]) / lr
            if k == last:
                break
            size, at = draw(chosen, order, at, state, scheme, batch, usable)
            if regression:
                regression_gradient(X, y, theta, chosen, size, gradient)
            else:
                quadratic_gradient(y, X, theta, chosen, size, gradient)
            move(theta, buffer, gradient, before, lr, beta, decay, gain, nesterov)


def _start(value: ArrayLike, replicas: int, d: int, name: str) -> Array:
    array = finite(value, name)
    try:
        return np.ascontiguousarray(np.broadcast_to(array, (replicas, d)))
    except ValueError:
        raise DataError(
            f"{name} has shape {array.shape}", expected=f"a number, [{d}] or [{replicas}, {d}] (replicas, weights)"
        ) from None


def _simulate(
    sgd: SGD, regression: bool, X: Array, y: Array, *,
    steps: int, replicas: int, seed: int, record_every: int, burn_in: int, start: ArrayLike,
    velocity: ArrayLike, random_phase: bool, drop_last: bool, threads: int | None,
) -> Ensemble:  # fmt: skip
    check_counts(steps=steps, replicas=replicas, record_every=record_every, burn_in=burn_in, seed=seed)
    samples, d = X.shape
    batch = sgd._needed("batch_size")
    if sgd.dataset_size not in (None, samples):
        raise DataError(f"{samples} samples given but dataset_size is {sgd.dataset_size}", expected="the same number")
    if sgd.sampling != "replacement" and batch > samples:
        raise DataError(f"batch_size {batch} exceeds the {samples} samples", expected="a batch no larger than the data")
    usable = samples - samples % batch if drop_last and samples >= batch else samples
    start, velocity = _start(start, replicas, d, "start"), _start(velocity, replicas, d, "velocity")
    rows = steps // record_every + 1
    where, how_fast = np.empty((replicas, rows, d)), np.empty((replicas, rows, d))

    def block(first: int, last: int) -> None:
        _run(
            regression, X, y, start[first:last], velocity[first:last],
            sgd.lr, sgd.momentum, sgd.weight_decay, 1 - sgd.dampening, sgd.nesterov,
            batch, SCHEMES[sgd.sampling], usable, random_phase,
            burn_in, record_every, seed, first, where[first:last], how_fast[first:last],
        )  # fmt: skip

    run_blocks(block, replicas, "replicas of SGD", threads)
    check_finite(where, "SGD")
    return Ensemble((burn_in + record_every * np.arange(rows)).astype(float), where, how_fast)


def linear_regression_sgd(
    sgd: SGD,
    X: ArrayLike,
    y: ArrayLike,
    *,
    steps: int,
    replicas: int = 100,
    seed: int = 0,
    record_every: int = 1,
    burn_in: int = 0,
    start: ArrayLike | None = None,
    velocity: ArrayLike = 0.0,
    random_phase: bool = True,
    drop_last: bool = False,
    threads: int | None = None,
) -> Ensemble:
    r"""Replicas of minibatch SGD on linear regression, :math:`\ell_i=\frac12(x_i\cdot\theta-y_i)^2`, in float64.

    Drawn with replacement, from a fresh permutation every epoch, or from one permutation a replica (``sgd.sampling``);
    momentum, Nesterov, dampening and weight decay as in ``torch.optim.SGD``.

    Args:
        sgd: hyperparameters with a batch size.
        X: inputs, [N, d].
        y: targets, [N].
        steps: optimizer steps after the burn-in.
        replicas: R.
        seed: of all random numbers.
        record_every: optimizer steps between recorded rows.
        burn_in: steps before the first recorded row.
        start: first weights, a number, [d] or [R, d]; by default the minimum of the loss with weight decay.
        velocity: first velocity (minus the momentum buffer).
        random_phase: begin each replica at a random place in its first epoch, so that every row is an average
            over the phase (what the theory predicts); False begins at the epoch's start.
        drop_last: drop a short last batch.
        threads: at most this many; the numbers do not depend on it.

    Returns:
        ``.step`` [T], ``.position`` and ``.velocity`` [R, T, d]; row 0 is the state after the burn-in.

    Raises:
        DataError: shapes or counts that make no sense.
        DivergedError: a replica ran away.

    >>> X = np.array([[1.0], [2.0]])
    >>> sgd = SGD(lr=0.1, batch_size=1, sampling="reshuffle")
    >>> linear_regression_sgd(sgd, X, [1.0, 2.0], steps=400, replicas=2, start=0.0).position[:, -1, 0].round(6)
    array([1., 1.])
    """
    inputs, targets = np.ascontiguousarray(finite(X, "X")), np.ascontiguousarray(finite(y, "y").reshape(-1))
    if inputs.ndim != 2 or len(inputs) != len(targets) or inputs.size == 0:
        raise DataError(f"X has shape {inputs.shape} and y {targets.shape}", expected="X [N, d] and y [N], not empty")
    if start is None:
        hessian = inputs.T @ inputs / len(inputs) + sgd.weight_decay * np.eye(inputs.shape[1])
        start = np.linalg.lstsq(hessian, inputs.T @ targets / len(inputs), rcond=None)[0]
    return _simulate(
        sgd, True, inputs, targets,
        steps=steps, replicas=replicas, seed=seed, record_every=record_every, burn_in=burn_in, start=start,
        velocity=velocity, random_phase=random_phase, drop_last=drop_last, threads=threads,
    )  # fmt: skip


def quadratic_sgd(
    sgd: SGD,
    hessian: ArrayLike,
    offsets: ArrayLike,
    *,
    steps: int,
    replicas: int = 100,
    seed: int = 0,
    record_every: int = 1,
    burn_in: int = 0,
    start: ArrayLike = 0.0,
    velocity: ArrayLike = 0.0,
    random_phase: bool = True,
    drop_last: bool = False,
    threads: int | None = None,
) -> Ensemble:
    r"""Replicas of minibatch SGD on a quadratic loss with additive noise, :math:`g_i(\theta)=H\theta+o_i`.

    The noise comes from a finite set of per-sample gradient offsets, whose mean is removed, so that every sampling
    scheme is the real one. Arguments not listed are those of :func:`linear_regression_sgd`.

    Args:
        sgd: hyperparameters with a batch size.
        hessian: eigenvalues [n], or a symmetric matrix [n, n].
        offsets: gradient of each sample at the minimum, [N, n].
        steps: optimizer steps after the burn-in.
        replicas: R.
        seed: of all random numbers.
        record_every: optimizer steps between recorded rows.
        burn_in: steps before the first recorded row.
        start: first weights, a number, [n] or [R, n].
        velocity: first velocity (minus the momentum buffer).
        random_phase: begin each replica at a random place in its first epoch.
        drop_last: drop a short last batch.
        threads: at most this many.

    Returns:
        ``.step`` [T], ``.position`` and ``.velocity`` [R, T, n].

    Raises:
        DataError: shapes or counts that make no sense.
        DivergedError: a replica ran away.

    >>> offsets = np.random.default_rng(0).normal(size=(100, 2))
    >>> sgd = SGD(lr=0.1, batch_size=10, dataset_size=100)
    >>> quadratic_sgd(sgd, [1.0, 0.1], offsets, steps=20, replicas=4).velocity.shape
    (4, 21, 2)
    """
    h, noise = finite(hessian, "hessian"), finite(offsets, "offsets")
    if noise.ndim != 2 or h.ndim not in (1, 2) or any(size != noise.shape[1] for size in h.shape):
        raise DataError(
            f"hessian has shape {h.shape} and offsets {noise.shape}", expected="[n] or [n, n], and offsets [N, n]"
        )
    noise = noise - noise.mean(axis=0)
    options: dict[str, Any] = {
        "steps": steps, "replicas": replicas, "seed": seed, "record_every": record_every, "burn_in": burn_in,
        "random_phase": random_phase, "drop_last": drop_last, "threads": threads,
    }  # fmt: skip
    if h.ndim == 1:
        return _simulate(
            sgd, False, np.ascontiguousarray(noise), np.ascontiguousarray(h), start=start, velocity=velocity, **options
        )
    curvature, basis = np.linalg.eigh((h + h.T) / 2)
    n = len(curvature)
    turned = _simulate(
        sgd, False, np.ascontiguousarray(noise @ basis), curvature,
        start=_start(start, replicas, n, "start") @ basis,
        velocity=_start(velocity, replicas, n, "velocity") @ basis, **options,
    )  # fmt: skip
    return Ensemble(turned.step, turned.position @ basis.T, turned.velocity @ basis.T)
