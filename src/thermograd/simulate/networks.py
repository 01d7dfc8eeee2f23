"""Many small networks trained at once: stacked weights, per-replica seeds, learning rates and batch sizes."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import DataError, DivergedError, HyperparameterError, NotAvailableError, ThermogradWarning
from ..hyperparameters import SGD
from ..measurement import Measurement, new_axes, quantity
from ..progress import bar
from ..theory.arrays import Array, finite
from .blocks import check_counts
from .estimators import FirstPassage, summary
from .generator import Buffer, seeded
from .one_by_one import SCHEMES, draw, start_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..problem import Problem

__all__ = ["Networks", "minibatches", "networks", "networks_first_passage"]

_BLOCK = 256  # steps whose minibatches are drawn at once


@dataclass(frozen=True)
class Networks(Measurement):
    """What replicas of a network did: full training loss and weights at the recorded steps.

    ``partial`` says that an interrupt ended the run; the rows until then are kept.
    """

    step: Array = quantity("step", units="steps", long_name="optimizer steps since the start")
    loss: Array = quantity("replica", "step", units="loss", long_name="loss over all samples")
    theta: Tensor = quantity("replica", "weight", units="weight", long_name="weights at the end")
    velocity: Tensor = quantity(
        "replica", "weight", units="gradient", long_name="(theta_k - theta_{k-1})/lr at the end"
    )
    position: Tensor | None = quantity("replica", "step", "weight", units="weight", long_name="weights", default=None)
    learning_rate: Array | None = quantity("replica", units="1", long_name="learning rate", default=None)
    batch_size: Buffer | None = quantity("replica", units="1", long_name="batch size", default=None)
    partial: bool = False
    squared_norm: Array | None = quantity(
        "replica", "step", units="weight^2", long_name="squared norm of the weights", default=None
    )
    _primary = "loss"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The loss of the first replicas against the step."""
        axes = new_axes(ax)
        axes.plot(self.step, self.loss[:20].T, lw=0.8)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        return axes


@njit(cache=True, error_model="numpy")
def _draw_block(
    index: Buffer, sizes: Buffer, order: Buffer, at: Buffer, states: Buffer, batch: Buffer, scheme: int
) -> None:
    """Minibatches of all replicas for a block of steps: ``index`` [R, T, B], their sizes [R, T]."""
    for r in range(index.shape[0]):
        for t in range(index.shape[1]):
            size, place = draw(index[r, t], order[r], at[r], states[r], scheme, batch[r], order.shape[1])
            at[r], sizes[r, t] = place, size
            for j in range(size, index.shape[2]):
                index[r, t, j] = 0


class _Minibatches:
    """The stream of minibatches of every replica, each from its own generator keyed by (seed, replica)."""

    def __init__(self, samples: int, batch: np.ndarray, scheme: str, seeds: np.ndarray, seed: int):
        self.batch, self.scheme = batch, SCHEMES[scheme]
        self.states = np.stack([seeded(seed, int(replica)) for replica in seeds])
        self.order = np.empty((len(batch), samples), np.int64)
        self.at = np.array(
            [
                start_order(self.order[r], self.states[r], self.scheme, int(b), samples, False)
                for r, b in enumerate(batch)
            ]
        )

    def block(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices [R, T, B] padded with 0, and sizes [R, T]."""
        index = np.empty((len(self.batch), steps, int(self.batch.max())), np.int64)
        sizes = np.empty((len(self.batch), steps), np.int64)
        _draw_block(index, sizes, self.order, self.at, self.states, self.batch, self.scheme)
        return index, sizes

    def keep(self, chosen: np.ndarray) -> None:
        """Drop the replicas that are not chosen."""
        self.batch, self.states = self.batch[chosen], self.states[chosen]
        self.order, self.at = self.order[chosen], self.at[chosen]


def minibatches(
    samples: int, batch_size: int, steps: int, *, sampling: str, seed: int = 0, replica: int = 0
) -> list[Array]:
    """The sample indices of each minibatch that one replica of :func:`networks` sees, to repeat its training alone.

    >>> [len(index) for index in minibatches(10, 4, 3, sampling="reshuffle")]
    [4, 4, 2]
    """
    stream = _Minibatches(samples, np.array([batch_size]), sampling, np.array([replica]), seed)
    index, sizes = stream.block(steps)
    return [index[0, t, : sizes[0, t]] for t in range(steps)]


@dataclass
class _State:
    """All replicas at one step."""

    theta: Tensor  # [R, P]
    buffer: Tensor  # [R, P]
    lr: Tensor  # [R, 1]
    moved: Tensor  # [R, P] the last direction, minus the velocity

    def keep(self, chosen: Tensor) -> None:
        self.theta, self.buffer, self.lr, self.moved = (
            array[chosen] for array in (self.theta, self.buffer, self.lr, self.moved)
        )


def _gradient_function(problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Gradients [R, P] of the weighted minibatch losses of all replicas at once.

    The losses of different replicas share no weight, so the gradient of their sum is all of their gradients.
    """
    inputs, targets = problem._samples.take(torch.arange(problem.N), problem.device, problem.dtype)

    def weighted(theta: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        rows = tree_map(lambda leaf: leaf[index], (inputs, targets) if targets is not None else (inputs,))
        losses = problem._function.losses(problem.unflatten(theta), rows[0], rows[1] if targets is not None else None)
        return (losses * weight).sum()

    mapped = torch.func.vmap(weighted)

    def gradient(theta: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        leaf = theta.detach().requires_grad_()
        with problem._function.context():
            (found,) = torch.autograd.grad(mapped(leaf, index, weight).sum(), leaf)
        return found

    return gradient


def _loss_function(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Full losses [R] of all replicas, in chunks of samples."""
    chunks = [
        problem._samples.take(block, problem.device, problem.dtype)
        for block in problem.chunks(max(1, min(problem.chunk_size, problem.N)))
    ]

    def total(theta: Tensor, inputs: Any, targets: Any) -> Tensor:
        return problem._function.losses(problem.unflatten(theta), inputs, targets).sum()

    def loss(theta: Tensor) -> Tensor:
        with torch.no_grad(), problem._function.context():
            parts = [
                torch.func.vmap(total, in_dims=(0, None, None))(theta, inputs, targets) for inputs, targets in chunks
            ]
        return torch.stack(parts).sum(0) / problem.N

    return loss


def _each(value: ArrayLike | None, fallback: Any, replicas: int, name: str) -> np.ndarray:
    if value is None and fallback is None:
        raise HyperparameterError(
            f"{name} is not set", remedy=f"pass SGD(..., {name}=...), or {name}= for each replica"
        )
    array = np.atleast_1d(finite(fallback if value is None else value, name))
    if array.ndim != 1 or array.size not in (1, replicas) or np.any(array <= 0):
        raise HyperparameterError(
            f"{name} is {value!r}", expected=f"one positive number, or one for each of {replicas}"
        )
    return np.broadcast_to(array, (replicas,)).copy()


class _Training:
    """Replicas in training: where they stand, their minibatches, and the step that moves them all."""

    def __init__(
        self, problem: Problem, sgd: SGD, replicas: int, lr: ArrayLike | None, batch_size: ArrayLike | None, seed: int,
        start: Any, velocity: Any = None,
    ):  # fmt: skip
        self.sgd, self.problem = sgd, problem
        rates = _each(lr, sgd.lr, replicas, "lr")
        sizes = _each(batch_size, sgd.batch_size, replicas, "batch_size")
        if np.any(sizes != np.floor(sizes)):
            raise HyperparameterError(f"batch_size is {batch_size!r}", expected="whole numbers")
        batch = sizes.astype(np.int64)
        if sgd.sampling != "replacement" and batch.max() > problem.N:
            raise DataError(f"batch_size {batch.max()} exceeds the {problem.N} samples", expected="a smaller batch")
        if sgd.dataset_size not in (None, problem.N):
            raise DataError(
                f"the problem has {problem.N} samples but dataset_size is {sgd.dataset_size}",
                expected="the same number",
            )
        theta = _start(problem, start, replicas, seed)
        zero = torch.zeros_like(theta)
        buffer = zero if velocity is None else -_rows(problem, velocity, replicas, "velocity")
        lr_column = torch.as_tensor(rates, dtype=problem.dtype, device=problem.device)[:, None]
        self.state = _State(theta, buffer, lr_column, buffer)
        self.stream = _Minibatches(problem.N, batch, sgd.sampling, np.arange(replicas), seed)
        self.rates, self.batch = rates, batch
        try:
            self.gradient, self.loss = _gradient_function(problem), _loss_function(problem)
            self.loss(theta)
        except (RuntimeError, NotImplementedError) as error:
            raise NotAvailableError(
                f"the model cannot be mapped over replicas: {error}", remedy="use layers that torch.func.vmap knows"
            ) from error

    def steps(self, count: int) -> Iterator[None]:
        """Make ``count`` steps; a change of the replicas kept takes effect at the next call."""
        left = count
        while left:
            size = min(left, _BLOCK)
            index, sizes = self.stream.block(size)
            weight = (np.arange(index.shape[2]) < sizes[..., None]) / sizes[..., None]
            device, dtype = self.problem.device, self.problem.dtype
            indices = torch.as_tensor(index.transpose(1, 0, 2).copy(), device=device)  # [T, R, B]
            weights = torch.as_tensor(weight.transpose(1, 0, 2).copy(), device=device, dtype=dtype)
            for t in range(size):
                self._step(indices[t], weights[t])
                yield
            left -= size

    def _step(self, index: Tensor, weight: Tensor) -> None:
        state, sgd = self.state, self.sgd
        pull = self.gradient(state.theta, index, weight)
        if sgd.weight_decay:
            pull = pull.add(state.theta, alpha=sgd.weight_decay)
        if sgd.momentum or sgd.dampening:
            state.buffer = state.buffer * sgd.momentum + pull * (1 - sgd.dampening)
            pull = pull + sgd.momentum * state.buffer if sgd.nesterov else state.buffer
        state.theta = state.theta - state.lr * pull
        state.moved = pull

    def check(self, losses: Tensor, alive: np.ndarray) -> None:
        """Refuse losses that are not finite."""
        lost = alive[(~torch.isfinite(losses)).cpu().numpy()]
        if len(lost):
            raise DivergedError(
                f"{len(lost)} of {len(self.rates)} networks diverged, the first is replica {lost[0]} with "
                f"lr {self.rates[lost[0]]:g} and batch size {self.batch[lost[0]]}",
                expected="a finite loss",
                remedy="lower the learning rate or raise the batch size",
            )


def _start(problem: Problem, start: Any, replicas: int, seed: int) -> Tensor:
    """First weights, [R, P]."""
    if isinstance(start, str):
        if start != "fresh" or problem.model is None:
            raise DataError(
                f"start is {start!r}", expected="None, weights [P] or [R, P], or 'fresh' for a problem that has a model"
            )
        return _fresh(problem, replicas, seed)
    return _rows(problem, problem.theta if start is None else start, replicas, "start")


def _rows(problem: Problem, given: Any, replicas: int, name: str) -> Tensor:
    """One vector for each replica, [R, P], from one for all or one for each."""
    rows = torch.as_tensor(np.asarray(given) if isinstance(given, list) else given)
    rows = rows.detach().to(problem.device, problem.dtype)
    if rows.shape not in ((problem.P,), (replicas, problem.P)) or not bool(torch.isfinite(rows).all()):
        raise DataError(
            f"{name} has shape {tuple(rows.shape)}",
            expected=f"finite numbers [{problem.P}] or [{replicas}, {problem.P}]",
        )
    return rows.expand(replicas, problem.P).clone()


def _fresh(problem: Problem, replicas: int, seed: int) -> Tensor:
    """Weights as ``reset_parameters`` of each layer makes them, a torch seed for each replica."""
    model = copy.deepcopy(problem.model)
    if model is None:
        raise DataError("the problem has no model", expected="a problem with a model")
    rows = []
    with torch.random.fork_rng(devices=[]):
        for replica in range(replicas):
            torch.manual_seed(seed * 1_000_003 + replica)
            for layer in model.modules():
                reset = getattr(layer, "reset_parameters", None)
                if callable(reset):
                    reset()
            named = dict(model.named_parameters())
            rows.append(problem.flatten({name: named[name] for name in problem.names}))
    return torch.stack(rows)


def networks(
    problem: Problem,
    replicas: int = 100,
    steps: int = 1000,
    sgd: SGD | None = None,
    *,
    lr: ArrayLike | None = None,
    batch_size: ArrayLike | None = None,
    seed: int = 0,
    record_every: int | None = None,
    start: Any = None,
    velocity: Any = None,
    keep_weights: bool = False,
) -> Networks:
    r"""Train many copies of a small network at once, each with its own seed, learning rate and batch size.

    The weights of all replicas are stacked, [R, P], and every step is one vectorised evaluation of all minibatches
    (``torch.func.vmap``), on the device of the problem. Replica r draws its minibatches from a generator keyed by
    (seed, r), see :func:`minibatches`: training it alone gives the same weights to rounding.

    Args:
        problem: model, loss and data; its dtype and device are used.
        replicas: R.
        steps: optimizer steps.
        sgd: momentum, weight decay, sampling, and the learning rate and batch size of those not given per replica.
        lr: learning rate of each replica, a number or [R].
        batch_size: batch size of each replica, a number or [R].
        seed: of all random numbers.
        record_every: optimizer steps between recorded losses over all samples; default only the first and the last.
        start: first weights [P] or [R, P]; default where the model stands; ``"fresh"`` initialises each replica anew.
        velocity: minus the momentum buffer at the start, [P] or [R, P]; default zero.
        keep_weights: also record the weights of all replicas at the recorded steps.

    Returns:
        ``.step`` [T], ``.loss`` [R, T], ``.squared_norm`` likewise, ``.theta`` and ``.velocity`` [R, P] at the end.
        After Ctrl-C the rows recorded by then, and ``.partial`` is True.

    Raises:
        HyperparameterError: no or impossible learning rates or batch sizes.
        DataError: shapes or counts that make no sense.
        DivergedError: the loss of a replica is not finite.

    >>> import torch, thermograd as tg
    >>> X, y = torch.randn(40, 3), torch.randn(40, 1)
    >>> problem = tg.Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (X, y))
    >>> run = networks(problem, 5, 20, tg.SGD(lr=0.1), batch_size=[4, 4, 8, 8, 16], record_every=10)
    >>> run.loss.shape, run.theta.shape
    ((5, 3), torch.Size([5, 4]))
    """
    every = record_every or steps
    check_counts(steps=steps, replicas=replicas, record_every=every, seed=seed)
    sgd = _hyperparameters(sgd, lr)
    training = _Training(problem, sgd, replicas, lr, batch_size, seed, start, velocity)
    losses, kept, partial, alive = (
        [training.loss(training.state.theta)],
        [training.state.theta],
        False,
        np.arange(replicas),
    )
    norms = [training.state.theta.square().sum(1)]
    training.check(losses[0], alive)
    began = time.monotonic()
    try:
        with bar("networks", steps) as progress:
            for k, _ in enumerate(training.steps(steps - steps % every), 1):
                if k % every == 0:
                    losses.append(training.loss(training.state.theta))
                    norms.append(training.state.theta.square().sum(1))
                    training.check(losses[-1], alive)
                    if keep_weights:
                        kept.append(training.state.theta)
                if k % 32 == 0:
                    rate = replicas * k / (time.monotonic() - began) / 1e3
                    progress.advance(32, f"networks, {rate:,.0f} thousand replica-steps/s")
    except KeyboardInterrupt:
        partial = True
        warnings.warn(
            f"interrupted at step {(len(losses) - 1) * every} of {steps}: the result is partial", ThermogradWarning, 2
        )
    state = training.state
    return Networks(
        every * np.arange(len(losses)).astype(float),
        torch.stack(losses, 1).cpu().numpy(),
        state.theta,
        -state.moved,
        torch.stack(kept, 1) if keep_weights else None,
        training.rates,
        training.batch,
        partial,
        torch.stack(norms, 1).cpu().numpy(),
    )


def _hyperparameters(sgd: SGD | None, lr: ArrayLike | None) -> SGD:
    if sgd is not None:
        return sgd
    if lr is None:
        raise HyperparameterError("neither sgd nor lr is given", remedy="pass SGD(...) or lr=")
    return SGD(lr=float(np.max(lr)))


def networks_first_passage(
    problem: Problem,
    thresholds: ArrayLike,
    *,
    sgd: SGD | None = None,
    replicas: int = 100,
    max_steps: int = 10_000,
    lr: ArrayLike | None = None,
    batch_size: ArrayLike | None = None,
    seed: int = 0,
    watch_every: int = 1,
    start: Any = None,
) -> FirstPassage:
    """Steps until the full training loss of each network first reaches given values above that at the start.

    Replicas that have reached the last threshold are dropped from the stack. Watched every ``watch_every`` steps, the
    times are late by half of that on average.

    Args:
        problem: model, loss and data.
        thresholds: losses above that of every start, [m].
        sgd: hyperparameters, as in :func:`networks`.
        replicas: R.
        max_steps: when a replica is given up (censored).
        lr: learning rate of each replica, a number or [R].
        batch_size: batch size of each replica, a number or [R].
        seed: of all random numbers.
        watch_every: steps between evaluations of the full loss, the costly part.
        start: first weights, as in :func:`networks`.

    Returns:
        Times in optimizer steps. After Ctrl-C what was found by then, and ``.partial`` is True.

    Raises:
        DataError: a threshold not above the loss at the start.
        DivergedError: a loss is not finite.

    >>> import torch, thermograd as tg
    >>> X, y = torch.randn(40, 3), torch.randn(40, 1)
    >>> problem = tg.Problem(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (X, y))
    >>> minimum = torch.linalg.lstsq(torch.cat([X, torch.ones(40, 1)], 1), y).solution.flatten()
    >>> low = float(problem.loss(minimum))
    >>> found = networks_first_passage(
    ...     problem, 1.01 * low, sgd=tg.SGD(lr=0.1, batch_size=2), replicas=8, max_steps=500, start=minimum
    ... )
    >>> int(found.events[0])
    8
    """
    check_counts(max_steps=max_steps, replicas=replicas, seed=seed, watch_every=watch_every)
    levels = np.atleast_1d(finite(thresholds, "thresholds"))
    training = _Training(problem, _hyperparameters(sgd, lr), replicas, lr, batch_size, seed, start)
    begin = training.loss(training.state.theta).cpu().numpy()
    if levels.size == 0 or not np.all(levels > begin.max()):
        raise DataError(
            f"the thresholds {levels} are not above the loss at the start, {begin.max():g}",
            expected="losses above that of every start",
        )
    order = np.argsort(levels, kind="stable")
    arrived, lasted = np.full((replicas, levels.size), -1, np.int64), np.zeros(replicas, np.int64)
    partial, alive, k, lane_steps = False, np.arange(replicas), 0, 0
    try:
        with bar("first passages of networks", replicas) as progress:
            while len(alive) and k < max_steps:
                more = min(watch_every * max(1, 64 // watch_every), max_steps - k)
                ended = np.zeros(len(alive), bool)
                for _ in training.steps(more):
                    k += 1
                    lane_steps += len(alive)
                    if k % watch_every and k != max_steps:
                        continue
                    losses = training.loss(training.state.theta)
                    training.check(torch.where(torch.as_tensor(ended, device=losses.device), 0.0, losses), alive)
                    seen = losses.cpu().numpy()[:, None] >= levels[order]
                    arrived[alive] = np.where((arrived[alive] < 0) & seen & ~ended[:, None], k, arrived[alive])
                    over = seen[:, -1] & ~ended
                    lasted[alive[over]] = k
                    ended |= over
                lasted[alive[~ended]] = k
                if ended.any():
                    progress.advance(int(ended.sum()))
                    training.state.keep(torch.as_tensor(~ended, device=problem.device))
                    training.stream.keep(~ended)
                    alive = alive[~ended]
    except KeyboardInterrupt:
        partial = True
        lasted[alive] = np.where(arrived[alive, -1] >= 0, lasted[alive], k)
        warnings.warn("interrupted: the result is partial", ThermogradWarning, stacklevel=2)
    idle = max(0.0, 1 - float(lasted.sum()) / max(lane_steps, 1))
    return summary(levels, arrived[:, np.argsort(order)], lasted, 1.0, idle=idle, partial=partial)
