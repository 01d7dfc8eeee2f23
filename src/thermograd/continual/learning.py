"""One cell of a comparison: a network learns the tasks one after the other under one constraint."""

from __future__ import annotations

import difflib
import inspect
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import models
from ..errors import DivergedError, InputError
from ..problem import Problem
from .constraint import Constraint
from .diagonal import EWC, L2ToAnchor
from .landscape_constraint import LandscapeConstraint, RandomDirections
from .layer_landscape import LayerLandscape
from .settings import LearningSettings, NetworkSettings, Settings
from .streams import Pair, Stream
from .synaptic import SynapticIntelligence

__all__ = ["Cell", "constraint_of", "learn", "path_rows"]

_CLASSES: dict[str, type[Constraint]] = {
    "l2": L2ToAnchor,
    "ewc": EWC,
    "synaptic_intelligence": SynapticIntelligence,
    "random": RandomDirections,
    "landscape": LandscapeConstraint,
    "layer_landscape": LayerLandscape,
}
_SET_BY_COMPARISON = ("self", "strength", "options", "params", "seed")  # every method holds all weights
_FEWEST_ROWS = 4  # of a path that has principal components
_EVALUATED = 2000  # samples that pass through the network at once


@dataclass
class Cell:
    """What one run found.

    Args:
        test: [T, T], accuracy on the test part of task j after task i; NaN for tasks to come.
        validation: likewise on the validation part.
        memory: numbers stored between tasks.
        weights: numbers of weights.
        fit_seconds: time spent measuring finished tasks.
        hold_seconds: time spent in proximal steps.
        train_seconds: time of all else that training takes.

    A run whose weights stopped being finite is a cell with no weights.
    """

    test: list[list[float]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)
    memory: int = 0
    weights: int = 0
    fit_seconds: float = 0.0
    hold_seconds: float = 0.0
    train_seconds: float = 0.0

    @property
    def diverged(self) -> bool:
        """Whether its weights stopped being finite."""
        return self.weights == 0


class _Network(nn.Module):
    """A network of which only the outputs of the task at hand are seen: a head for each task."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        self.outputs: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(x)
        return found if self.outputs is None else found[:, self.outputs]


def network(settings: NetworkSettings, inputs: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    """The untrained network.

    Raises:
        InputError: images are needed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.name == "mlp":
            width = int(np.prod(inputs))
            return _Network(models.mlp([width, *settings.widths, outputs], settings.activation))
        if len(inputs) != 3:
            raise InputError(f"small_cnn with inputs of shape {inputs}", expected="images [channels, height, width]")
        return _Network(models.small_cnn(settings.widths, outputs, inputs[0], settings.activation))


def constraint_of(kind: str, strength: float, options: dict[str, Any], samples: int | None, seed: int) -> Constraint:
    """The constraint that a method of the configuration names; one that holds nothing for plain training.

    Raises:
        InputError: an option that the constraint does not have, or a bad value.
    """
    if kind in ("none", "joint"):
        return L2ToAnchor(0.0)
    makers = (_CLASSES[kind].__init__, Constraint.__init__) + ((LandscapeConstraint.__init__,) * (kind == "random"))
    known = {name for make in makers for name in inspect.signature(make).parameters} - {*_SET_BY_COMPARISON}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            raise InputError(
                f"{kind} has no option {name!r} here{guess}", expected=f"one of {', '.join(sorted(known))}"
            )
    try:
        return _CLASSES[kind](strength, **{"samples": samples, "seed": seed, **options})
    except TypeError as error:  # a value that cannot even be compared
        raise InputError(f"an option of {kind} has a value of another type: {error}") from None


def path_rows(constraint: Constraint, stream: Stream, training: LearningSettings) -> int:
    """How many of the last steps of a task are recorded for a constraint that takes directions from the path.

    Raises:
        InputError: too few for principal components.
    """
    if not _takes_path(constraint):
        return 0
    shortest = min(len(task.train[0]) for task in stream.tasks)
    rows = min(training.path_steps, training.epochs * -(-shortest // training.batch_size))
    if rows < _FEWEST_ROWS:
        raise InputError(
            f"the path of a task has {rows} steps",
            expected=f"{_FEWEST_ROWS} or more for directions from the trajectory",
            remedy="train for more epochs, on more samples or with smaller batches",
        )
    return rows


def _takes_path(constraint: Constraint) -> bool:
    return isinstance(constraint, LandscapeConstraint) and "trajectory" in constraint.directions


def learn(stream: Stream, settings: Settings, kind: str, strength: float, options: dict[str, Any], seed: int) -> Cell:
    """Learn all tasks in turn, and measure after each.

    Raises:
        NonFiniteError: the weights stopped being finite.
    """
    training, protocol = settings.training, settings.protocol
    model = network(settings.network, stream.inputs, stream.outputs, seed)
    constraint = constraint_of(kind, strength, options, protocol.samples, seed)
    cell = Cell(weights=sum(p.numel() for p in model.parameters()))
    loss = nn.CrossEntropyLoss()
    dtype = getattr(torch, protocol.measure_dtype)
    for t, task in enumerate(stream.tasks):
        seen = stream.tasks[: t + 1] if kind == "joint" else (task,)
        model.outputs = None if task.outputs is None else list(task.outputs)  # type: ignore[assignment]
        path = _train(model, constraint, [(s.train, s.outputs) for s in seen], training, seed * 1000 + t, cell)
        if not all(bool(torch.isfinite(p.sum())) for p in model.parameters()):
            raise DivergedError(f"{kind} of strength {strength:g}, seed {seed}: the weights are not finite in task {t}")
        if kind not in ("none", "joint") and t + 1 < len(stream.tasks):
            began = time.perf_counter()
            problem = Problem(model, loss, task.train, dtype=dtype)
            constraint.fit(problem, **({} if path is None else {"run": path}))
            cell.fit_seconds += time.perf_counter() - began
        for part in ("test", "validation"):
            accuracies = [_accuracy(model, getattr(s, part), s.outputs) for s in stream.tasks[: t + 1]]
            getattr(cell, part).append(accuracies + [float("nan")] * (len(stream.tasks) - t - 1))
    cell.memory = 0 if kind in ("none", "joint") else constraint.memory
    return cell


def _train(
    model: nn.Module,
    constraint: Constraint,
    parts: list[tuple[Pair, tuple[int, ...] | None]],
    training: LearningSettings,
    seed: int,
    cell: Cell,
) -> np.ndarray | None:
    """SGD on one task (or on several at once); the path of its last steps [T, P] where the constraint wants it."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=training.lr, momentum=training.momentum)
    loss = nn.CrossEntropyLoss()
    sizes = [len(part[0]) for part, _ in parts]
    batches = _batches(sizes, training, random)
    wants_path = _takes_path(constraint)
    path: list[np.ndarray] = []
    watching = constraint.watch(model, optimizer) if isinstance(constraint, SynapticIntelligence) else nullcontext()
    began, held = time.perf_counter(), 0.0
    with watching:
        for step, (which, index) in enumerate(batches):
            (X, y), outputs = parts[which]
            model.outputs = None if outputs is None else list(outputs)  # type: ignore[assignment]
            optimizer.zero_grad()
            loss(model(X[index]), y[index]).backward()
            optimizer.step()
            if constraint.tasks:
                before = time.perf_counter()
                constraint.proximal_step(model, optimizer)
                held += time.perf_counter() - before
            if wants_path and step >= len(batches) - training.path_steps:
                path.append(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())
    cell.hold_seconds += held
    cell.train_seconds += time.perf_counter() - began - held
    return np.stack(path) if wants_path else None


def _batches(sizes: list[int], training: LearningSettings, random: torch.Generator) -> list[tuple[int, Tensor]]:
    """Minibatches of all epochs; those of several tasks in turn, in random order."""
    batches = []
    for _ in range(training.epochs):
        epoch = [
            (which, index)
            for which, size in enumerate(sizes)
            for index in torch.randperm(size, generator=random).split(training.batch_size)
        ]
        order = torch.randperm(len(epoch), generator=random) if len(sizes) > 1 else torch.arange(len(epoch))
        batches += [epoch[i] for i in order]
    return batches


@torch.no_grad()
def _accuracy(model: nn.Module, part: Pair, outputs: tuple[int, ...] | None) -> float:
    model.outputs = None if outputs is None else list(outputs)  # type: ignore[assignment]
    X, y = part
    right = [(model(a).argmax(1) == b).sum() for a, b in zip(X.split(_EVALUATED), y.split(_EVALUATED))]
    return float(torch.stack(right).sum()) / len(y)
