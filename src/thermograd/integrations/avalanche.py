"""Constraints of :mod:`thermograd.continual` as a plugin of Avalanche's supervised strategies.

Needs ``pip install "thermograd[avalanche]"``. Avalanche imports torchvision, whose build must match that of torch:
beside a torch without CUDA install the torchvision of the same package index.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..continual import Constraint, SynapticIntelligence
from ..errors import InputError, NotAvailableError

try:
    from avalanche.models import MultiTaskModule
    from avalanche.training.plugins import SupervisedPlugin
except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError where it does not fit torch
    raise NotAvailableError(
        f"Avalanche cannot be imported: {error}",
        expected="avalanche-lib with a torchvision that fits torch",
        remedy='pip install "thermograd[avalanche]", and torch and torchvision from one package index',
    ) from error

__all__ = ["ConstraintPlugin"]

_READ = 512  # samples read from the data set at once


class ConstraintPlugin(SupervisedPlugin):
    """Fits a constraint after each experience, and applies it to every step of the experiences that follow.

    .. code-block:: python

        plugin = ConstraintPlugin(tg.continual.LayerLandscape(strength=100.0))
        strategy = Naive(model=model, optimizer=optimizer, criterion=CrossEntropyLoss(), plugins=[plugin])

    Single-head models, growing heads (``IncrementalClassifier``) and multi-head models (``MultiTaskModule``) will do;
    an experience has one task label. ``plugin.constraint.state_dict()`` is what a checkpoint needs.

    Args:
        constraint: any of :mod:`thermograd.continual`.
        in_loss: add the penalty to the loss; by default a proximal step follows each step of the optimizer.

    Raises:
        InputError: the constraint is none, or needs what the plugin does not have (a recorded run).
    """

    def __init__(self, constraint: Constraint, in_loss: bool = False):
        super().__init__()
        if not isinstance(constraint, Constraint):
            raise InputError(f"the constraint is a {type(constraint).__name__}", expected="one of thermograd.continual")
        if "trajectory" in getattr(constraint, "directions", ()):
            raise InputError("directions from a trajectory", expected="directions that need no recorded run")
        self.constraint, self.in_loss = constraint, in_loss
        self._watching = ExitStack()

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """The model is adapted to the experience; its steps are watched where the constraint needs that."""
        self._watching.close()
        if isinstance(self.constraint, SynapticIntelligence):
            self._watching.enter_context(self.constraint.watch(self._model(strategy), strategy.optimizer))

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """The loss of the minibatch is known."""
        if self.in_loss and self.constraint.tasks:
            strategy.loss = strategy.loss + self.constraint.penalty(self._model(strategy))

    def after_update(self, strategy: Any, **_: Any) -> None:
        """The optimizer has made its step."""
        if not self.in_loss:
            self.constraint.proximal_step(self._model(strategy), strategy.optimizer)

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """The experience is finished."""
        self._watching.close()
        data = _tensors(strategy.experience.dataset, strategy.device)
        self.constraint.fit(self._model(strategy), strategy._criterion, data)

    def _model(self, strategy: Any) -> nn.Module:
        model = strategy.model
        if not isinstance(model, MultiTaskModule):
            return model
        labels = set(strategy.experience.task_labels)
        if len(labels) != 1:
            raise InputError(f"the experience has the task labels {sorted(labels)}", expected="one for all its samples")
        return _AtTask(model, int(labels.pop()))


class _AtTask(nn.Module):
    """A multi-head model at one task."""

    def __init__(self, model: nn.Module, task: int):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, self.task)


def _tensors(dataset: Any, device: Any) -> tuple[Tensor, Tensor]:
    """Inputs and targets of an experience, which also yields task labels."""
    loader = DataLoader(dataset.eval(), batch_size=_READ)
    batches = [(batch[0], batch[1]) for batch in loader]
    return torch.cat([x for x, _ in batches]).to(device), torch.cat([y for _, y in batches]).to(device)
