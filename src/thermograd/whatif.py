"""What-if questions to a run's folder: the problem, last weights and momentum come from the folder itself."""

from __future__ import annotations

import difflib
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import config as configuration
from .building import build
from .errors import ConfigError, InputError, StoreError
from .prediction import Predictions, measure, predictions
from .prediction import predict as predict_measured
from .prediction.validation import Validation
from .prediction.validation import validate as validate_measured
from .runfolder import CONFIG, is_complete, of_configuration, read_checkpoint

if TYPE_CHECKING:
    import xarray

    from .problem import Problem

__all__ = ["measured_run", "predict", "validate"]

VALIDATION = "validation"
_SWEPT = ("lr", "batch_size", "momentum", "weight_decay", "sampling")
_ALIASES = {"learning_rate": "lr", "eta": "lr", "beta": "momentum", "bs": "batch_size", "batch": "batch_size"}


def measured_run(run: Any, problem: Problem | None = None, *, steps: int | None = None, **options: Any) -> Predictions:
    """A run ready to be asked: rebuilt from its folder, measured (or read, where that was done before).

    Args:
        run: folder of a run made by ``thermograd run`` or ``thermograd demo``; with ``problem`` any recorded run.
        problem: for a run of your own loop: the network with all trained weights, its loss and data.
        steps: how many steps ahead predictions look.
        options: see :func:`thermograd.prediction.measure`.

    Raises:
        StoreError: no such run, or it is not trained to its end.
        InputError: a run without configuration and no problem, another optimizer than SGD, a schedule.
    """
    _refuse_unknown(options)
    if problem is None:
        rebuilt, state = _rebuild(run)
        problem, options = rebuilt, {**state, **options}
    return predictions(run, problem, steps=steps, **options)


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Name the argument that was meant, where one is not known."""
    measured = [name for name in inspect.signature(measure).parameters if name not in ("run", "problem", "steps")]
    for name in options:
        if name not in measured:
            known = ["steps", *_SWEPT, *measured]
            near = _ALIASES.get(name) or next(iter(difflib.get_close_matches(name, known, 1)), None)
            raise InputError(
                f"there is no argument {name!r}",
                expected=f"one of {', '.join(known)}",
                remedy=f"did you mean {near!r}?" if near else None,
            )


def _rebuild(run: Any) -> tuple[Problem, dict[str, Any]]:
    """The problem with all weights, and the state that training ended in."""
    if not isinstance(run, str | os.PathLike):
        raise InputError(f"the run is a {type(run).__name__}", expected="the path of a run's folder, or a problem too")
    folder = of_configuration(run, "call thermograd.predict(path, problem), or validate, in Python")
    if not is_complete(folder):
        raise StoreError(f"the run in {folder} is not trained to its end", remedy="resume it first")
    config = configuration.load(folder / CONFIG)
    if not config.optimizer.is_sgd:
        raise ConfigError(f"the run was trained by {config.optimizer.name}", expected="sgd, which can be predicted")
    if config.training.schedule is not None:
        raise ConfigError("the run has a learning-rate schedule", expected="a constant learning rate")
    saved = read_checkpoint(folder)
    assert saved is not None
    experiment = build(config.replace("training", record=None))
    problem, optimizer = experiment.problem, experiment.optimizer
    assert problem.model is not None
    problem.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    parameters = dict(problem.model.named_parameters())
    buffers: dict[str, Tensor] = {}
    for name in problem.names:
        kept = optimizer.state[parameters[name]].get("momentum_buffer")
        buffers[name] = torch.zeros_like(parameters[name]) if kept is None else kept
    theta = problem.flatten({name: parameters[name].detach() for name in problem.names})
    state = {"theta": theta, "velocity": -problem.flatten(buffers), "drop_last": config.training.drop_last}
    return problem, state


def predict(
    run: Any,
    problem: Problem | None = None,
    *,
    lr: Any = None,
    batch_size: Any = None,
    momentum: Any = None,
    weight_decay: Any = None,
    sampling: Any = None,
    steps: int | None = None,
    **options: Any,
) -> xarray.Dataset:
    r"""Predict what a run would do at other hyperparameters, trained on from where it ended.

    Numbers or lists of numbers; each list becomes a dimension of the result. The excess of the objective is the energy
    of modes kicked by noise, :math:`\frac12\sum_l(h_l+\lambda)E\theta_l^2` (second moments exact for the sampling
    scheme), plus where the mean of the weights stands on its way down; what is predicted and how:
    :func:`thermograd.prediction.predict`, :mod:`thermograd.prediction.forecast` and ``docs/predict.md``.

    Args:
        run: the run's folder.
        problem: for a run of your own loop.
        lr: learning rate; default the run's own, as for the others.
        batch_size: batch size.
        momentum: momentum.
        weight_decay: weight decay.
        sampling: "replacement", "reshuffle" or "shuffle-once".
        steps: how many steps after the change.
        options: see :func:`thermograd.prediction.measure`.

    Returns:
        An :class:`xarray.Dataset` with units and long names in its attributes.

    Raises:
        StoreError: no such run. InputError: arguments that are no hyperparameters, a run that cannot be predicted
            from.

    >>> import tempfile, torch, thermograd as tg
    >>> _, weights = torch.manual_seed(0), torch.zeros(2, requires_grad=True)
    >>> points, folder = torch.randn(64, 2), tempfile.mkdtemp()
    >>> problem = tg.Problem.from_function(lambda w, a: (w - a).square().sum(), weights, points)
    >>> optimizer = torch.optim.SGD([weights], lr=0.05)
    >>> with tg.Recorder(folder, problem, optimizer, batch_size=8, sampling="replacement"):
    ...     for _ in range(400):
    ...         optimizer.zero_grad()
    ...         (weights - points[torch.randint(64, (8,))]).square().sum(1).mean().backward()
    ...         _ = optimizer.step()
    >>> found = tg.predict(folder, problem, lr=[0.01, 0.05], steps=200)
    >>> found["excess_loss"].dims, bool(found["excess_loss"][0] < found["excess_loss"][1])
    (('lr',), True)
    """
    ready = measured_run(run, problem, steps=steps, **options)
    return predict_measured(
        run, ready.forecast.standing.problem, lr=lr, batch_size=batch_size, momentum=momentum,
        weight_decay=weight_decay, sampling=sampling, steps=steps, measured=ready,
    )  # fmt: skip


def validate(
    run: Any,
    problem: Problem | None = None,
    *,
    steps: int | None = None,
    replicas: int = 4,
    seed: int = 0,
    settings: Any = None,
    folder: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    **options: Any,
) -> Validation:
    """Predict, freeze the predictions, really train at every setting, compare: :func:`thermograd.prediction.validate`.

    Args:
        run: the run's folder.
        problem: for a run of your own loop.
        steps: how many steps each training takes.
        replicas: trainings of each setting.
        seed: of their minibatches.
        settings: hyperparameters to train at, a list of :class:`~thermograd.SGD`; default sixteen.
        folder: where predictions and results are kept; default ``validation`` in the run's folder.
        fresh: start anew.
        options: see :func:`thermograd.prediction.measure`.

    Raises:
        InputError: fewer than two replicas, an open tree in place of a folder, a run that cannot be predicted from.
        StoreError: no such run, or the frozen predictions were changed or are for other settings.

    >>> import tempfile, torch, thermograd as tg
    >>> _, weights = torch.manual_seed(0), torch.zeros(2, requires_grad=True)
    >>> points, folder = torch.randn(64, 2), tempfile.mkdtemp()
    >>> problem = tg.Problem.from_function(lambda w, a: (w - a).square().sum(), weights, points)
    >>> optimizer = torch.optim.SGD([weights], lr=0.05)
    >>> with tg.Recorder(folder, problem, optimizer, batch_size=8, sampling="replacement"):
    ...     for _ in range(400):
    ...         optimizer.zero_grad()
    ...         (weights - points[torch.randint(64, (8,))]).square().sum(1).mean().backward()
    ...         _ = optimizer.step()
    >>> own = tg.SGD(lr=0.05, batch_size=8, dataset_size=64, sampling="replacement")
    >>> check = tg.validate(folder, problem, settings=[own, own.replace(lr=0.1)], steps=100, replicas=2)
    >>> check.relative_error.shape, len(check.frozen)
    ((2,), 64)
    """
    if folder is None and not isinstance(run, str | os.PathLike):
        raise InputError(
            f"the run is a {type(run).__name__}", expected="the path of its folder", remedy="or pass folder= as well"
        )
    # the replicas use every sample of an epoch, short last batch included
    ready = measured_run(run, problem, steps=steps, **{**options, "drop_last": False})
    place = Path(folder) if folder is not None else Path(run) / VALIDATION
    return validate_measured(ready, place, settings=settings, replicas=replicas, seed=seed, fresh=fresh)
