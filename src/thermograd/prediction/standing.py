"""Where a run stands: its last weights and momentum, what they fluctuate about, and the mean loss while they do."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DivergedError, InputError, TooShortError
from ..hyperparameters import SGD
from ..problem import Problem
from ..progress import track
from ..simulate import networks
from ..theory.arrays import Array
from ..trajectory import open_run, select
from .descent import objective

__all__ = ["Standing", "stand"]

_LOOKS = 240  # weights at which the loss is evaluated
_POINTS = 8  # weights at which curvature and noise are measured
_BLOCKS = 8
_PROBE_REPLICAS = 2


@dataclass(frozen=True)
class Standing:
    """A run as predictions see it.

    ``losses`` is the objective (training loss with weight decay) at evenly spaced rows of the last half of the record,
    ``centre`` their mean weights, ``rows`` how many steps they cover; where the run did not record all its weights,
    they come from training on for as long with the run's own settings (``continued``). ``points`` are weights at which
    curvature and noise are measured, ``point_losses`` the objective there, and mirrored at the centre, on average.
    """

    problem: Problem
    sgd: SGD
    theta: Tensor
    velocity: Tensor
    centre: Tensor
    points: tuple[Tensor, ...]
    point_losses: Array
    losses: Array
    rows: int
    continued: bool
    drop_last: bool

    @property
    def loss(self) -> float:
        """Mean objective of the run."""
        return float(self.losses.mean())

    @property
    def loss_stderr(self) -> float:
        """Its standard error, from blocks of the record."""
        blocks = np.array([part.mean() for part in np.array_split(self.losses, _BLOCKS)])
        return float(blocks.std(ddof=1) / math.sqrt(_BLOCKS))

    @property
    def drift(self) -> tuple[float, float]:
        """Change of the objective across the rows along a straight line, and its standard error."""
        blocks = np.array([part.mean() for part in np.array_split(self.losses, _BLOCKS)])
        time = (np.arange(_BLOCKS) - (_BLOCKS - 1) / 2) / _BLOCKS
        slope = time @ blocks / (time @ time)
        rest = blocks - blocks.mean() - slope * time
        return float(slope), float(np.sqrt(rest @ rest / (_BLOCKS - 2) / (time @ time)))

    def drifts(self, excess: float, part: float) -> bool:
        """Whether the objective changed across the rows by more than a part of the excess, for certain."""
        change, error = self.drift
        return abs(change) > part * excess and abs(change) > 2.5 * error


def stand(
    run: Any,
    problem: Problem,
    *,
    theta: Any = None,
    velocity: Any = None,
    sgd: SGD | None = None,
    drop_last: bool = False,
    seed: int = 0,
) -> Standing:
    """Read from a run what predictions start from.

    Args:
        run: a run's folder or its open tree.
        problem: the network with *all* weights that were trained, its loss and data.
        theta: the last weights [P]; default: the last that were recorded.
        velocity: minus the momentum buffer at the end [P]; default: the last recorded velocity.
        sgd: hyperparameters; default those that the recorder noted.
        drop_last: whether short last batches were dropped.
        seed: of the minibatches where the run is continued.

    Raises:
        InputError: not a run of SGD with known batches, or run and problem do not fit.
        TooShortError: fewer than 64 recorded steps.
    """
    tree = open_run(run)
    attrs = tree["trajectory"].attrs if "trajectory" in tree.children else {}
    _refuse_another_problem(problem, attrs)
    sgd = sgd or _noted(attrs)
    if sgd.batch_size is None or sgd.sampling is None:
        raise InputError("the batch size of the run is not known", remedy="pass sgd=SGD(..., batch_size=...)")
    sgd = sgd.replace(dataset_size=problem.N)
    whole = select(tree) if "theta" in tree["trajectory"].to_dataset() else None
    full = whole is not None and whole.P == problem.P and not attrs.get("others_trained")
    if whole is not None and full:
        if whole.T < 64:
            raise TooShortError(f"the run has {whole.T} recorded steps", expected="at least 64")
        _refuse_schedules(tree["trajectory"].to_dataset(), int(whole.steps[whole.T // 2]))
        half = whole.rows(whole.T // 2, whole.T)
        theta = whole.read(whole.T - 1, whole.T)[0] if theta is None else theta
        if velocity is None:
            source = whole.velocity_source
            velocity = np.zeros(whole.P) if source is None else np.asarray(source[whole.T - 1])
        rows = np.unique(np.linspace(0, half.T - 1, _LOOKS).round().astype(int))
        losses = np.array(
            [
                objective(problem, sgd.weight_decay, problem.as_theta(half.read(int(r), int(r) + 1)[0]))
                for r in track(rows, "loss along the run")
            ]
        )
        at = np.unique(np.linspace(0, half.T - 1, _POINTS + 2).round().astype(int)[1:-1])
        points = tuple(problem.as_theta(half.read(int(r), int(r) + 1)[0]) for r in at)
        centre, span, continued = problem.as_theta(half.mean()), int(half.T * half.every), False
        theta, velocity = problem.as_theta(theta), problem.as_theta(velocity)
    else:
        if theta is None:
            raise InputError(
                "the run does not hold all its weights",
                expected="a run recorded in full, or one made by `thermograd run`, which keeps its last weights",
                remedy="pass theta= and velocity=, the weights and minus the momentum buffer at the end",
            )
        theta = problem.as_theta(theta)
        velocity = torch.zeros_like(theta) if velocity is None else problem.as_theta(velocity)
        span = int(attrs.get("rows", 4000)) // 2
        losses, centre, points = _continue(problem, sgd, theta, velocity, span, seed)
        continued = True
    if not np.isfinite(losses).all():
        raise DivergedError("the training loss of the run is not finite", remedy="predict from a run that converges")
    both = ((at, 2 * centre - at) for at in points)
    there = np.array([np.mean([objective(problem, sgd.weight_decay, at) for at in pair]) for pair in both])
    return Standing(problem, sgd, theta, velocity, centre, points, there, losses, span, continued, drop_last)


def _continue(
    problem: Problem, sgd: SGD, theta: Tensor, velocity: Tensor, span: int, seed: int
) -> tuple[Array, Tensor, tuple[Tensor, ...]]:
    """Train on with the run's own settings, and look at what it does."""
    looks = min(_LOOKS // _PROBE_REPLICAS, max(2 * _BLOCKS, 2**28 // (8 * problem.P * _PROBE_REPLICAS)))
    every = max(1, span // looks)
    batches = math.ceil(sgd.steps_per_epoch)
    while every > 1 and math.gcd(every, batches) > 1:  # so that every phase of the epoch is looked at
        every -= 1
    found = networks(
        problem, _PROBE_REPLICAS, every * looks, sgd, start=theta, velocity=velocity, seed=seed + 7919,
        record_every=every, keep_weights=True,
    )  # fmt: skip
    assert found.position is not None
    assert found.squared_norm is not None
    losses = (found.loss + sgd.weight_decay / 2 * found.squared_norm)[:, 1:]
    weights = found.position[:, 1:]
    rows = np.linspace(0, weights.shape[1] - 1, _POINTS // _PROBE_REPLICAS + 2).round().astype(int)[1:-1]
    points = tuple(weights[r, int(k)].clone() for r in range(_PROBE_REPLICAS) for k in rows)
    return losses.mean(0), weights[0].mean(0), points


def _refuse_another_problem(problem: Problem, attrs: Any) -> None:
    """A run and a problem that merely have as many weights in common give numbers that mean nothing."""
    if attrs.get("shapes") is not None and not attrs.get("others_trained"):
        theirs = {name: tuple(shape) for name, shape in zip(attrs["names"], attrs["shapes"], strict=True)}
        ours = {name: tuple(shape) for name, shape in problem.shapes.items()}
        other = next((name for name in [*theirs, *ours] if theirs.get(name) != ours.get(name)), None)
        if other is not None:
            raise InputError(
                f"the weights {other!r} are {theirs.get(other, 'absent')} in the run and "
                f"{ours.get(other, 'absent')} in the problem",
                expected="the problem that was trained, with all its weights",
            )
    size = attrs.get("dataset_size")
    if size is not None and size != problem.N:
        raise InputError(
            f"the run was trained on {size} samples, the problem has {problem.N}",
            expected="the problem with the data that the run was trained on",
        )


def _noted(attrs: Any) -> SGD:
    optimizer = attrs.get("optimizer", "SGD")
    if optimizer != "SGD":
        raise InputError(
            f"the run was trained by {optimizer}", expected="a run of torch.optim.SGD, which is what can be predicted"
        )
    noted = attrs.get("sgd")
    values = (json.loads(noted) if isinstance(noted, str) else dict(noted or {})) or {}
    known = {name: value for name, value in values.items() if value is not None}
    if "lr" not in known:
        raise InputError(
            "the run notes no hyperparameters that hold for all its weights",
            expected="SGD with one positive learning rate, momentum and weight decay for all weights, which minimises",
            remedy="pass sgd=SGD(lr=..., batch_size=...) where they are known",
        )
    return SGD.from_dict(known)


def _refuse_schedules(trajectory: Any, first: int) -> None:
    """From this step on the record has to be of one setting."""
    steps = trajectory["step"].values
    begun_anew = np.flatnonzero(np.diff(steps) <= 0)  # where training went on from an older checkpoint
    start = int(begun_anew[-1]) + 1 if len(begun_anew) else 0
    for name in ("learning_rate", "momentum", "weight_decay"):
        if name not in trajectory:
            continue
        values = np.asarray(trajectory[name].values[start:], float)[steps[start:] >= first]
        if np.ptp(values) > 1e-9 * np.abs(values).max():
            raise InputError(
                f"the {name.replace('_', ' ')} changed from {values[0]:g} to {values[-1]:g} in the last half of the "
                "record",
                expected=f"a run that ends with a constant {name.replace('_', ' ')}",
                remedy="record the last part as a run of its own, or train on without a change",
            )
