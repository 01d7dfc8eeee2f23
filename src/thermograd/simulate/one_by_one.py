"""SGD of one replica after the other: kernels for problems too wide to hold in lanes."""

from __future__ import annotations

import numpy as np
from numba import njit

from .generator import Buffer, below, seeded

__all__ = ["SCHEMES", "draw", "escape_one_by_one", "run_one_by_one", "start_order"]

SCHEMES = {"replacement": 0, "reshuffle": 1, "shuffle-once": 2}


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def shuffle(order: Buffer, state: Buffer) -> None:
    """Fisher-Yates in place."""
    for i in range(order.size - 1, 0, -1):
        j = below(state, i + 1)
        order[i], order[j] = order[j], order[i]


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def start_order(order: Buffer, state: Buffer, scheme: int, batch: int, usable: int, random_phase: bool) -> int:
    """A first permutation, and where in its epoch the replica begins."""
    for i in range(order.size):
        order[i] = i
    if scheme == 0:
        return 0
    shuffle(order, state)
    return batch * below(state, -(-usable // batch)) if random_phase else 0


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
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


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
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


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
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


@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
def quadratic_gradient(h: Buffer, offsets: Buffer, theta: Buffer, chosen: Buffer, size: int, out: Buffer) -> None:
    """Gradient h * theta plus the mean offset of the minibatch."""
    out[:] = 0.0
    for j in range(size):
        row = offsets[chosen[j]]
        for i in range(theta.size):
            out[i] += row[i]
    for i in range(theta.size):
        out[i] = h[i] * theta[i] + out[i] / size


@njit(cache=True, nogil=True, error_model="numpy")
def run_one_by_one(
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


@njit(cache=True, nogil=True, error_model="numpy")
def escape_one_by_one(
    regression: bool, X: Buffer, y: Buffer, curvature: Buffer, centre: Buffer, bottom: float, start: Buffer,
    lr: float, beta: float, decay: float, gain: float, nesterov: bool, batch: int, scheme: int,
    levels: Buffer, limit: int, seed: int, first: int, out: Buffer, lasted: Buffer,
) -> None:  # fmt: skip
    samples, d = X.shape
    chosen, order = np.empty(batch, np.int64), np.empty(samples, np.int64)
    theta, buffer, gradient, before = np.empty(d), np.empty(d), np.empty(d), np.empty(d)
    for r in range(out.shape[0]):
        state = seeded(seed, first + r)
        at = start_order(order, state, scheme, batch, samples, True)
        theta[:] = start[r]
        buffer[:] = 0.0
        reached = 0
        for k in range(1, limit + 1):
            size, at = draw(chosen, order, at, state, scheme, batch, samples)
            if regression:
                regression_gradient(X, y, theta, chosen, size, gradient)
            else:
                quadratic_gradient(y, X, theta, chosen, size, gradient)
            move(theta, buffer, gradient, before, lr, beta, decay, gain, nesterov)
            loss = bottom  # exact for a quadratic in its own basis, without a pass over the data
            for i in range(d):
                loss += 0.5 * curvature[i] * (theta[i] - centre[i]) ** 2
            if not np.isfinite(loss):
                out[r, reached:] = -2
                lasted[r] = k
                break
            while reached < levels.size and loss >= levels[reached]:
                out[r, reached] = k
                reached += 1
            if reached == levels.size:
                lasted[r] = k
                break
